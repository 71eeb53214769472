#!/usr/bin/env bash
# dicom2jpg 0.1.10 (pydicom 3.0.2): 8-bit ultrasound frames, grey and RGB, whose values lie between 20 and 115, turned
# into pictures for a data set.
#
# Guess: 8-bit pixels without a window or rescale slope stay as they are.
# Seen: each frame is stretched to 0 to 255 by its own lowest and highest pixel, colour frames, too. Two frames of one
# scan that differ in a single bright pixel come out with different greys.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  dicom2jpg==0.1.10 pydicom==3.0.2 opencv-python==5.0.0.93 numpy==2.4.6
seen=$("$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import sys
import dicom2jpg
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, UltrasoundImageStorage, generate_uid

for channels, photometric in ((1, "MONOCHROME2"), (3, "RGB")):
    greys = (np.arange(24 * 32) % 96 + 20).astype(np.uint8)
    frame = Dataset()
    frame.file_meta = FileMetaDataset()
    frame.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    frame.SOPClassUID = frame.file_meta.MediaStorageSOPClassUID = UltrasoundImageStorage
    frame.SOPInstanceUID = frame.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    frame.StudyInstanceUID, frame.SeriesInstanceUID = generate_uid(), generate_uid()
    frame.PatientID, frame.Modality, frame.StudyDate, frame.SeriesNumber, frame.InstanceNumber = "1", "US", "20200101", 1, 1
    frame.Rows, frame.Columns, frame.SamplesPerPixel, frame.PhotometricInterpretation = 24, 32, channels, photometric
    frame.BitsAllocated, frame.BitsStored, frame.HighBit, frame.PixelRepresentation = 8, 8, 7, 0
    if channels == 3:
        frame.PlanarConfiguration = 0
    frame.PixelData = np.repeat(greys, channels).tobytes()
    path = f"{sys.argv[1]}/{photometric}.dcm"
    frame.save_as(path, enforce_file_format=True)
    picture = dicom2jpg.dicom2img(path)
    print(photometric, greys.min(), greys.max(), picture.min(), picture.max())
PYTHON
)
echo "kind, lowest and highest value in the DICOM file, in the picture:"
echo "$seen"
[ "$(echo $seen)" = "MONOCHROME2 20 115 0 255 RGB 20 115 0 255" ]
