#!/usr/bin/env bash
# highdicom 0.28.2 (pydicom 3.0.2): the mask of an ultrasound image as DICOM SEG, with the size of a pixel and without a
# slice thickness, as a picture has none; the image is the one that pydicom ships as "palette_color".
#
# Guess: highdicom reads the file that it wrote and gives the size of the pixel back.
# Seen: it writes the file without a warning, and its own segread ends in an AttributeError over missing attributes of
# the pixel measures. With a made-up thickness of 1 mm it reads it. A SEG of an ultrasound image that is meant to be
# read by highdicom can only state its pixel size together with a thickness that nobody measured.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check highdicom==0.28.2 pydicom==3.0.2 numpy==2.4.6
cat >"$folder/seg.py" <<'PYTHON'
import sys
import highdicom, numpy, pydicom
from highdicom import seg, sr
from pydicom.examples import get_path
image = pydicom.dcmread(get_path("palette_color"))
for name in ("AccessionNumber", "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate"):
    setattr(image, name, image.get(name, ""))
image.StudyTime = image.get("StudyTime", "")
image.ReferringPhysicianName = image.get("ReferringPhysicianName", "")
mask = numpy.zeros((image.Rows, image.Columns), bool)
mask[100:200, 200:300] = True
lesion = seg.SegmentDescription(
    segment_number=1,
    segment_label="lesion",
    segmented_property_category=sr.CodedConcept("49755003", "SCT", "Morphologically Abnormal Structure"),
    segmented_property_type=sr.CodedConcept("52988006", "SCT", "Lesion"),
    algorithm_type="MANUAL",
)
for thickness in (1.0, None):
    written = seg.Segmentation(
        source_images=[image], pixel_array=mask, segmentation_type="BINARY", segment_descriptions=[lesion],
        series_instance_uid=highdicom.UID(), series_number=1, sop_instance_uid=highdicom.UID(), instance_number=1,
        manufacturer="m", manufacturer_model_name="m", software_versions="1", device_serial_number="1",
        pixel_measures=highdicom.PixelMeasuresSequence(pixel_spacing=(0.2, 0.1), slice_thickness=thickness),
    )
    file = f"{sys.argv[1]}/seg.dcm"
    written.save_as(file)
    try:
        seg.segread(file)
        print("thickness", thickness, "written and read")
    except AttributeError as error:
        print("thickness", thickness, "written, then AttributeError:", error)
PYTHON
seen=$("$folder/venv/bin/python" -W ignore "$folder/seg.py" "$folder")
echo "$seen"
[ "$(echo $seen)" = "thickness 1.0 written and read thickness None written, then AttributeError: Sequence does not have the required attributes for a Pixel Measures Sequence." ]
