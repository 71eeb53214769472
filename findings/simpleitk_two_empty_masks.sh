#!/usr/bin/env bash
# SimpleITK 2.5.7, LabelOverlapMeasuresImageFilter: a normal scan that is segmented as normal.
#
# Guess: the Dice of two empty masks is nan, or the filter raises, as SimpleITK's Hausdorff distance does.
# Seen: Dice is inf, and the Jaccard index, both error rates and the volume similarity are the largest double
# (1.8e308). On a false alarm the false-negative error is the largest double as well. Nothing is raised or warned, so
# one normal scan makes the mean over a test set infinite; nanmean does not help.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check SimpleITK==2.5.7 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys

import numpy as np
import SimpleITK as sitk

empty = np.zeros((40, 40), np.uint8)
lesion = empty.copy()
lesion[5:15, 5:15] = 1
LARGEST = np.finfo(float).max


def overlap(truth, prediction):
    measures = sitk.LabelOverlapMeasuresImageFilter()
    measures.Execute(sitk.GetImageFromArray(prediction), sitk.GetImageFromArray(truth))
    return {
        "Dice": measures.GetDiceCoefficient(),
        "Jaccard": measures.GetJaccardCoefficient(),
        "false negatives": measures.GetFalseNegativeError(),
    }


correct, false_alarm = overlap(empty, empty), overlap(empty, lesion)
print("SimpleITK", sitk.__version__)
print("normal scan, nothing predicted:", correct)
print("normal scan, false alarm:      ", false_alarm)
as_seen = correct == {"Dice": np.inf, "Jaccard": LARGEST, "false negatives": LARGEST}
as_seen &= false_alarm == {"Dice": 0.0, "Jaccard": 0.0, "false negatives": LARGEST}
sys.exit(not as_seen)
PY
