#!/usr/bin/env bash
# opencv-python-headless 5.0.0.93 and pycocotools 2.0.11: a lesion mask written as COCO polygons from cv2.findContours
# and read back by COCO's own decoder.
#
# Guess: the mask comes back as it was; both libraries count pixels from the same corner.
# Seen: it comes back smaller by about half a pixel all round: 29, 81, 317 and 1257 pixels become 20, 66, 288 and 1200,
# so the Dice of a mask with itself is 0.82 for the smallest. OpenCV's contour runs through the centres of the outermost
# pixels, COCO's polygons run along pixel edges. cv2.fillPoly of the same contours gives every pixel back.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  opencv-python-headless==5.0.0.93 pycocotools==2.0.11 numpy==2.4.6
seen=$("$folder/venv/bin/python" -c '
import cv2, numpy as np
from pycocotools import mask as coco
y, x = np.mgrid[:64, :64]
for radius in (3, 5, 10, 20):
    disc = ((y - 32) ** 2 + (x - 32) ** 2 <= radius**2).astype(np.uint8)
    contours = cv2.findContours(disc, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
    polygons = [contour.reshape(-1).astype(float).tolist() for contour in contours]
    decoded = coco.decode(coco.frPyObjects(polygons, 64, 64)).max(-1)
    filled = cv2.fillPoly(np.zeros_like(disc), contours, 1)
    print(disc.sum(), decoded.sum(), filled.sum())')
echo "pixels of the mask, read back through COCO, filled by OpenCV:"
echo "$seen"
[ "$(echo $seen)" = "29 20 29 81 66 81 317 288 317 1257 1200 1257" ]
