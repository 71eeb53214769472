#!/usr/bin/env bash
# torchmetrics 1.9.0 (torch 2.15.0): three overlap scores of the same two scans, one segmented perfectly, one without
# a lesion and rightly left empty; background not counted.
#
# Guess: all three treat the empty scan alike and give 1.0.
# Seen: DiceScore and MeanIoU leave it out and give 1.0; GeneralizedDiceScore counts it as 0 and gives 0.5. On a set
# with normal scans the two kinds of Dice cannot be put into one table.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torchmetrics==1.9.0 torch==2.15.0 numpy==2.4.6
seen=$("$folder/venv/bin/python" -W ignore -c '
import torch
from torchmetrics.segmentation import DiceScore, GeneralizedDiceScore, MeanIoU
scans = torch.zeros(2, 8, 8, dtype=torch.long)
scans[0, 2:6, 2:6] = 1
for kind in (DiceScore, MeanIoU, GeneralizedDiceScore):
    metric = kind(num_classes=2, include_background=False, input_format="index")
    metric.update(scans, scans)
    print(kind.__name__, float(metric.compute()))')
echo "$seen"
[ "$(echo $seen)" = "DiceScore 1.0 MeanIoU 1.0 GeneralizedDiceScore 0.5" ]
