#!/usr/bin/env bash
# SimpleITK 2.5.7 beside OpenCV 5.0 and Pillow 13: a colour PNG read as a grey image.
#
# Guess: all three weight the channels by 0.299, 0.587 and 0.114, within a grey level.
# Seen: ReadImage(path, sitkUInt8) weights them by 0.2126, 0.7152 and 0.0722 (the luminance of linear light, applied to
# the stored values as they are) and cuts off the fraction. A red overlay of (200, 10, 30) is grey level 51, where
# OpenCV and Pillow give 69. Scans with coloured calipers or Doppler therefore differ between two pipelines.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check SimpleITK==2.5.7 numpy==2.4.6 \
  opencv-python-headless==5.0.0.93 pillow==13.0.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import sys

import cv2
import numpy as np
import SimpleITK as sitk
from PIL import Image

Image.new("RGB", (4, 4), (200, 10, 30)).save("overlay.png")
levels = {
    "SimpleITK": int(sitk.GetArrayFromImage(sitk.ReadImage("overlay.png", sitk.sitkUInt8))[0, 0]),
    "SimpleITK, float": round(float(sitk.GetArrayFromImage(sitk.ReadImage("overlay.png", sitk.sitkFloat32))[0, 0]), 2),
    "OpenCV": int(cv2.imread("overlay.png", cv2.IMREAD_GRAYSCALE)[0, 0]),
    "Pillow": int(np.asarray(Image.open("overlay.png").convert("L"))[0, 0]),
}
print(levels)
sys.exit(levels != {"SimpleITK": 51, "SimpleITK, float": 51.82, "OpenCV": 69, "Pillow": 69})
PY
