#!/usr/bin/env bash
# scikit-image 0.26.0, SimpleITK 2.5.7, OpenCV 5.0: the longest diameter of one mask, here a square of 10 x 10 pixels.
#
# Guess: a Feret diameter is taken between the pixels' corners, 14.14, or between their centres, 12.73.
# Seen: scikit-image's feret_diameter_max is 13.45, the square root of 10² + 9²: its outline runs through the midpoints
# of the pixels' outer edges. SimpleITK's is 12.73 (centres). The sides of OpenCV's minAreaRect are 9 (centres), and its
# contourArea is 81. Of a single pixel scikit-image says 1.0, and SimpleITK 0. At 0.1 mm a pixel the same lesion is 1.35
# or 1.27 mm long.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check scikit-image==0.26.0 SimpleITK==2.5.7 \
  numpy==2.4.6 opencv-python-headless==5.0.0.93
"$folder/venv/bin/python" - <<'PY'
import sys

import cv2
import numpy as np
import SimpleITK as sitk
from skimage.measure import regionprops


def skimage(mask):
    return round(float(regionprops(mask)[0].feret_diameter_max), 2)


def simpleitk(mask):
    shape = sitk.LabelShapeStatisticsImageFilter()
    shape.ComputeFeretDiameterOn()
    shape.Execute(sitk.GetImageFromArray(mask))
    return round(shape.GetFeretDiameter(1), 2)


def opencv(mask):
    (outline,), _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.minAreaRect(outline)[1], cv2.contourArea(outline)


square = np.zeros((40, 40), np.uint8)
square[5:15, 5:15] = 1
pixel = np.zeros((40, 40), np.uint8)
pixel[5, 5] = 1
seen = (skimage(square), simpleitk(square), *opencv(square), skimage(pixel), simpleitk(pixel))
print("10 x 10 pixels: scikit-image {}, SimpleITK {}, OpenCV {} with area {}; one pixel: {} and {}".format(*seen))
sys.exit(seen != (13.45, 12.73, (9.0, 9.0), 81.0, 1.0, 0.0))
PY
