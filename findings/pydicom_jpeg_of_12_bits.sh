#!/usr/bin/env bash
# pydicom 3.0.2 with Pillow 13.0.0 and python-gdcm 3.2.6: a frame in JPEG Extended (Process 2 and 4) with 12 bits.
#
# Guess: pydicom's decoder says that it is available and has two plugins, so one of them decodes the frame.
# Seen: both are listed as available for the transfer syntax, and both refuse 12 bits when the pixels are asked for; so
# asking what is available before a job does not tell whether the job will read its pictures.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  pydicom==3.0.2 pillow==13.0.0 python-gdcm==3.2.6 imagecodecs==2026.3.6 numpy==2.4.6
seen=$("$folder/venv/bin/python" -W ignore - 2>"$folder/log" <<'PYTHON'
import imagecodecs
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
from pydicom.uid import JPEGExtended12Bit

frame = Dataset()
frame.file_meta = FileMetaDataset()
frame.file_meta.TransferSyntaxUID = JPEGExtended12Bit
frame.Rows, frame.Columns, frame.SamplesPerPixel, frame.PhotometricInterpretation = 16, 16, 1, "MONOCHROME2"
frame.BitsAllocated, frame.BitsStored, frame.HighBit, frame.PixelRepresentation = 16, 12, 11, 0
greys = np.linspace(0, 4095, 256).astype(np.uint16).reshape(16, 16)
frame.PixelData = encapsulate([imagecodecs.jpeg8_encode(greys, bitspersample=12)])
frame["PixelData"].VR = "OB"
decoder = get_decoder(JPEGExtended12Bit)
try:
    decoded = int(frame.pixel_array.max())
except RuntimeError:
    decoded = "RuntimeError"
print(decoder.is_available, *sorted(decoder.available_plugins), decoded)
PYTHON
)
echo "available, plugins, what asking for the pixels gives: $seen"
[ "$seen" = "True gdcm pillow RuntimeError" ]
