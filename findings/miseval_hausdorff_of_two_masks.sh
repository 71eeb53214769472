#!/usr/bin/env bash
# miseval 1.3.0 (hausdorff 0.2.6): Hausdorff distance "HD" and average Hausdorff distance "AHD" of a disc of radius 10
# and the same disc shifted by 1, 2, 5 and 8 pixels.
#
# Guess: HD is the shift, and AHD is smaller than HD.
# Seen: HD is 1.41, 2.00, 3.16 and 4.00: the mask's rows are taken as points of a 64-dimensional space, not its pixels
# as points of the plane. AHD is 1, 2, 5 and 8: the maximum, not an average.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  miseval==1.3.0 hausdorff==0.2.6 scipy==1.17.1 numpy==2.2.6
seen=$("$folder/venv/bin/python" -W ignore -c '
import numpy as np
from miseval import evaluate
y, x = np.mgrid[:64, :64]
def disc(shift):
    return ((y - 32) ** 2 + (x - 32 - shift) ** 2 <= 100).astype(np.uint8)
for shift in (1, 2, 5, 8):
    found = (evaluate(disc(0), disc(shift), metric=name, multi_class=False) for name in ("HD", "AHD"))
    print(shift, *(f"{distance:.2f}" for distance in found))')
echo "shift in pixels, HD, AHD:"
echo "$seen"
[ "$(echo $seen)" = "1 1.41 1.00 2 2.00 2.00 5 3.16 5.00 8 4.00 8.00" ]
