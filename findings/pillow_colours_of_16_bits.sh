#!/usr/bin/env bash
# Pillow 13.0.0: a PNG with 16 bits per channel and three channels whose values end at 4095, as scanners export 12 bits.
#
# Guess: it is read with its 16 bits, or refused, as Pillow has no such mode.
# Seen: mode RGB, 8 bits, the upper byte alone, without a word: the whole range of the picture is 0 to 15. A grey PNG of
# the same values keeps its 16 bits, so the two kinds of one scan differ by a factor of 256.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0 numpy==2.4.6
seen=$("$folder/venv/bin/python" -W error - "$folder" <<'PYTHON'
import struct
import sys
import zlib
import numpy as np
from PIL import Image

def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

greys = np.linspace(0, 4095, 64).astype(">u2").reshape(8, 8)
for name, colour_type, channels in (("grey", 0, 1), ("colour", 2, 3)):
    rows = np.repeat(greys[..., None], channels, axis=2).reshape(8, -1)
    pixels = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", 8, 8, 16, colour_type, 0, 0, 0)
    path = f"{sys.argv[1]}/{name}.png"
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b""))
    picture = Image.open(path)
    print(name, picture.mode, np.asarray(picture).max())
PYTHON
)
echo "kind, Pillow's mode, highest value (4095 in the file):"
echo "$seen"
[ "$(echo $seen)" = "grey I;16 4095 colour RGB 15" ]
