#!/usr/bin/env bash
# SimpleITK 2.5.7: the less common kinds of PNG in which masks and scans are published.
#
# Guess: a palette PNG gives its indices (the labels), a 1-bit mask 0 and 1, and grey with alpha two components.
# Seen: a palette is resolved to RGB, so label 1 of a mask is the colour that the palette gives it; a 1-bit mask comes
# as 0 and 255; grey with alpha is refused with "Unknown PixelType", while RGB with alpha gives four components.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check SimpleITK==2.5.7 numpy==2.4.6 pillow==13.0.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import sys

import numpy as np
import SimpleITK as sitk
from PIL import Image

labels = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
labels.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
labels.save("palette.png")
Image.fromarray(np.array([[0, 1], [1, 0]], bool)).save("one_bit.png")
Image.new("LA", (2, 2), (100, 255)).save("grey_alpha.png")
Image.new("RGBA", (2, 2), (100, 100, 100, 255)).save("colour_alpha.png")


def read(name):
    try:
        image = sitk.ReadImage(name)
    except RuntimeError as error:
        return "refused" if "Unknown PixelType" in str(error) else str(error)
    return image.GetNumberOfComponentsPerPixel(), sitk.GetArrayFromImage(image)[0, 1].tolist()


seen = {name: read(name) for name in ("palette.png", "one_bit.png", "grey_alpha.png", "colour_alpha.png")}
for name, what in seen.items():
    print(f"{name:17} {what}")
as_seen = seen == {
    "palette.png": (3, [128, 0, 0]),
    "one_bit.png": (1, 255),
    "grey_alpha.png": "refused",
    "colour_alpha.png": (4, [100, 100, 100, 255]),
}
sys.exit(not as_seen)
PY
