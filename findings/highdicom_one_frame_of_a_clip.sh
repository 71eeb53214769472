#!/usr/bin/env bash
# highdicom 0.28.2 (pydicom 3.0.2): a lesion mask of one frame of an ultrasound clip (SOP class Ultrasound Multi-frame
# Image, pydicom's example "ybr_color") as DICOM SEG. Clips of ultrasound have no Frame of Reference.
#
# Guess: masks of all frames are accepted, or else the mask of one frame whose number is given.
# Seen: neither. Masks of all frames are refused for lack of a Frame of Reference UID ("Only a single frame is
# supported"), and so is a source cut down to one frame, over a sequence that this SOP class never has: what counts as
# multi-frame is decided by the SOP class, not by the number of frames. Only as the single-frame class it is written.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check highdicom==0.28.2 pydicom==3.0.2 numpy==2.4.6
cat >"$folder/seg.py" <<'PYTHON'
import copy
import highdicom, numpy, pydicom
from highdicom import seg, sr
from pydicom.examples import get_path
from pydicom.uid import UltrasoundImageStorage
clip = pydicom.dcmread(get_path("ybr_color"))
empty = ("AccessionNumber", "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate",
         "StudyTime", "ReferringPhysicianName")
for name in empty:
    setattr(clip, name, clip.get(name, ""))
lesion = seg.SegmentDescription(
    segment_number=1,
    segment_label="lesion",
    segmented_property_category=sr.CodedConcept("49755003", "SCT", "Morphologically Abnormal Structure"),
    segmented_property_type=sr.CodedConcept("52988006", "SCT", "Lesion"),
    algorithm_type="MANUAL",
)
one = copy.deepcopy(clip)
one.NumberOfFrames = 1
picture = copy.deepcopy(one)
del picture.NumberOfFrames
picture.SOPClassUID = picture.file_meta.MediaStorageSOPClassUID = UltrasoundImageStorage
print("Frame of Reference:", "FrameOfReferenceUID" in clip)
for name, source, frames in (("all frames", clip, int(clip.NumberOfFrames)), ("one frame", one, 1), ("as image", picture, 1)):
    masks = numpy.zeros((frames, clip.Rows, clip.Columns), bool)
    masks[:, 10:20, 10:20] = True
    try:
        seg.Segmentation(
            source_images=[source], pixel_array=masks, segmentation_type="BINARY", segment_descriptions=[lesion],
            series_instance_uid=highdicom.UID(), series_number=1, sop_instance_uid=highdicom.UID(), instance_number=1,
            manufacturer="m", manufacturer_model_name="m", software_versions="1", device_serial_number="1",
        )
        print(name, "written")
    except (ValueError, AttributeError) as error:
        print(name, type(error).__name__)
PYTHON
seen=$("$folder/venv/bin/python" -W ignore "$folder/seg.py")
echo "$seen"
[ "$(echo $seen)" = "Frame of Reference: False all frames ValueError one frame AttributeError as image written" ]
