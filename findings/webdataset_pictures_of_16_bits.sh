#!/usr/bin/env bash
# webdataset 1.0.2 with Pillow 13.0.0: a 16-bit grey PNG (a ramp from 0 to 65535) in a shard, read by .decode("l8"),
# "rgb8", "l" and "pil".
#
# Guess: the upper byte, or floats from 0 to 1 in steps of 1/65535: either way a ramp.
# Seen: all of them clip at 255: 63 of 64 pixels are white (the float decoder gives 1.0), without a word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check webdataset==1.0.2 pillow==13.0.0 numpy==2.4.6
cd "$folder"
venv/bin/python -c '
import numpy as np
from PIL import Image
Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)).save("scan.png")'
tar cf shard.tar scan.png
seen=$(venv/bin/python -W ignore -c '
import numpy as np, webdataset
for kind in ("l8", "rgb8", "l", "pil"):
    [sample] = webdataset.WebDataset("shard.tar", shardshuffle=False).decode(kind)
    picture = np.asarray(sample["png"])
    if picture.ndim == 3:
        picture = picture[..., 0]
    print(kind, float(picture.max()), int((picture == picture.max()).sum()))')
echo "decoder, highest value, pixels of 64 that have it:"
echo "$seen"
[ "$(echo $seen)" = "l8 255.0 63 rgb8 255.0 63 l 1.0 63 pil 255.0 63" ]
