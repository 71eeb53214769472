#!/usr/bin/env bash
# miseval 1.3.0 (hausdorff 0.2.6): Dice and IoU of two masks with the levels 0 and 255, as mask PNGs have them.
#
# Guess: any level above 0 is the lesion, or the call refuses what is neither 0 nor 1.
# Seen: two lesions that share no pixel get a Dice of 1.0 and an IoU of 0.0. Only pixels of exactly 1 count, so both
# masks are empty to it, and its two scores disagree on what two empty masks are worth. With levels 0 and 1 both are 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  miseval==1.3.0 hausdorff==0.2.6 scipy==1.17.1 numpy==2.2.6
seen=$("$folder/venv/bin/python" -W ignore -c '
import numpy as np
from miseval import evaluate
truth, predicted = np.zeros((2, 32, 32), np.uint8)
truth[2:10, 2:10] = predicted[20:28, 20:28] = 1
for level in (1, 255):
    pair = truth * np.uint8(level), predicted * np.uint8(level)
    print(level, *(float(evaluate(*pair, metric=name, multi_class=False)) for name in ("DSC", "IoU")))')
echo "level of the lesion, Dice, IoU of two lesions apart:"
echo "$seen"
[ "$(echo $seen)" = "1 0.0 0.0 255 1.0 0.0" ]
