#!/usr/bin/env bash
# opencv-python-headless 5.0.0.93: cv2.bitwise_not(mask) of a boolean mask, to score or paint the background.
#
# Guess: OpenCV 5 takes NumPy booleans, so the result is the background: 48 of 64 pixels for a lesion of 16.
# Seen: an array of dtype bool that is True everywhere, because the bytes 0 and 1 become 255 and 254. Comparisons with
# ~mask differ and the mean is 1.0. bitwise_and, _or and _xor of the same masks are right. 4.12 refuses boolean arrays.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check opencv-python-headless==5.0.0.93 numpy==2.4.6
seen=$("$folder/venv/bin/python" -c '
import cv2, numpy as np
mask = np.zeros((8, 8), bool)
mask[2:6, 2:6] = True
background = cv2.bitwise_not(mask)
print(background.dtype, int(background.sum()), *sorted(set(background.tobytes())), int(cv2.bitwise_xor(mask, ~mask).sum()))')
echo "lesion of 16 in 64 pixels: dtype, true pixels and bytes of bitwise_not, true pixels of mask xor ~mask: $seen"
[ "$seen" = "bool 64 254 255 64" ]
