#!/usr/bin/env bash
# dcm2niix 1.0.20260724 (nibabel 5.4.2, pydicom 3.0.2): a single ultrasound frame whose calibrated region says that a
# pixel is 0.05 mm wide and 0.08 mm high, converted to NIfTI for segmentation.
#
# Guess: the NIfTI has pixels of 0.05 x 0.08 mm, or its unit of length is "unknown".
# Seen: it has pixels of 1 x 1 x 1 and says "mm". Sequence of Ultrasound Regions is not read, and nothing warns of it:
# a lesion's diameter in "mm" is its number of pixels, and the pixels have become square.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  dcm2niix==1.0.20260724 nibabel==5.4.2 pydicom==3.0.2 numpy==2.4.6
mkdir "$folder/dicom" "$folder/nifti"
"$folder/venv/bin/python" - "$folder/dicom/frame.dcm" <<'PYTHON'
import sys
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, UltrasoundImageStorage, generate_uid

frame = Dataset()
frame.file_meta = FileMetaDataset()
frame.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
frame.SOPClassUID = frame.file_meta.MediaStorageSOPClassUID = UltrasoundImageStorage
frame.SOPInstanceUID = frame.file_meta.MediaStorageSOPInstanceUID = generate_uid()
frame.StudyInstanceUID, frame.SeriesInstanceUID = generate_uid(), generate_uid()
frame.PatientID, frame.PatientName, frame.Modality = "1", "One", "US"
frame.StudyDate, frame.StudyTime, frame.SeriesNumber, frame.InstanceNumber = "20200101", "120000", 1, 1
frame.Rows, frame.Columns, frame.SamplesPerPixel, frame.PhotometricInterpretation = 24, 32, 1, "MONOCHROME2"
frame.BitsAllocated, frame.BitsStored, frame.HighBit, frame.PixelRepresentation = 8, 8, 7, 0
frame.PixelData = bytes(i // 4 for i in range(24 * 32))
region = Dataset()
region.RegionSpatialFormat, region.RegionDataType, region.RegionFlags = 1, 1, 0  # 2-D, tissue
region.RegionLocationMinX0, region.RegionLocationMinY0 = 0, 0
region.RegionLocationMaxX1, region.RegionLocationMaxY1 = 31, 23
region.PhysicalUnitsXDirection, region.PhysicalUnitsYDirection = 3, 3  # cm
region.PhysicalDeltaX, region.PhysicalDeltaY = 0.005, 0.008
frame.SequenceOfUltrasoundRegions = [region]
frame.save_as(sys.argv[1], enforce_file_format=True)
PYTHON
"$folder/venv/bin/dcm2niix" -z n -f frame -o "$folder/nifti" "$folder/dicom" >"$folder/log"
seen=$("$folder/venv/bin/python" -c '
import sys, nibabel
header = nibabel.load(sys.argv[1]).header
print(*(float(size) for size in header.get_zooms()), header.get_xyzt_units()[0])' "$folder/nifti/frame.nii")
spoke=$(grep -ciE "calibrat|region|spacing" "$folder/log" || true)
echo "pixel size and unit in the NIfTI: $seen; lines of its log that speak of calibration, region or spacing: $spoke"
[ "$seen" = "1.0 1.0 1.0 mm" ] && [ "$spoke" = 0 ]
