#!/usr/bin/env bash
# opencv-python-headless 4.12.0.88 and scipy 1.17.1: 8-bit speckle rotated by 13 degrees with bilinear interpolation, by
# cv2.warpAffine and by map_coordinates at the same places.
#
# Guess: they differ by rounding to whole grey levels, by half a level at most.
# Seen: by up to five levels, 0.87 on average: OpenCV 4 rounds the places to 1/32 of a pixel before it interpolates.
# OpenCV 5.0.0 does not (half a level at most), so an augmented training set isn't the same under both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 4.12.0.88 5.0.0.93; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --disable-pip-version-check \
    opencv-python-headless==$version scipy==1.17.1 numpy==2.2.6
done
cat >"$folder/warp.py" <<'PYTHON'
import cv2, numpy as np
from scipy.ndimage import map_coordinates
speckle = np.random.default_rng(0).integers(0, 256, (200, 200)).astype(np.uint8)
turn = cv2.getRotationMatrix2D((99.5, 99.5), 13, 1.1)
turned = cv2.warpAffine(speckle, turn, (200, 200), flags=cv2.INTER_LINEAR)
y, x = np.mgrid[:200, :200]
from_x, from_y = cv2.invertAffineTransform(turn) @ np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
exact = map_coordinates(speckle.astype(float), [from_y, from_x], order=1).reshape(200, 200)
off = np.abs(turned - exact)[20:-20, 20:-20]
print(cv2.__version__, "at most", round(float(off.max()), 1), "mean", round(float(off.mean()), 2))
PYTHON
seen=$(for version in 4.12.0.88 5.0.0.93; do "$folder/$version/bin/python" "$folder/warp.py"; done)
echo "$seen"
[ "$(echo $seen)" = "4.12.0 at most 5.4 mean 0.87 5.0.0 at most 0.5 mean 0.25" ]
