#!/usr/bin/env bash
# MedPy 0.5.2: a normal scan on which nothing is predicted.
#
# Guess: Dice and Jaccard, each a function of the other, have the same answer for two empty masks.
# Seen: dc is nan (with a warning of numpy), jc is 1.0, precision and recall are nan, and hd raises. A table of means
# over such scans has a Jaccard that counts them as right and a Dice that is nan.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check MedPy==0.5.2 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PY'
import sys

import numpy as np
from medpy.metric import binary

empty = np.zeros((8, 8), np.uint8)
dice, jaccard = float(binary.dc(empty, empty)), float(binary.jc(empty, empty))
precision = float(binary.precision(empty, empty))
try:
    distance = binary.hd(empty, empty)
except RuntimeError as error:
    distance = f"raises: {error}"
print(f"Dice {dice}, Jaccard {jaccard}, precision {precision}, Hausdorff distance {distance}")
sys.exit(not (np.isnan(dice) and jaccard == 1.0 and np.isnan(precision) and str(distance).startswith("raises")))
PY
