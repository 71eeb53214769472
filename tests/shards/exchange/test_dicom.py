"""Promises of importing DICOM with DICOM SEG, as highdicom writes it."""

from __future__ import annotations

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, UltrasoundImageStorage, UltrasoundMultiFrameImageStorage, generate_uid

from bushpc.shards.manifest import read_image, read_mask

from .cohorts import LABELS, PATIENTS, SIZE, image_of, mask_of, table

highdicom = pytest.importorskip("highdicom")
seg = highdicom.seg


def write_image(path, pixels, patient, frames=1):
    """A grey ultrasound image, or a clip, of pixels 0.2 mm wide."""
    dataset = Dataset()
    kind = UltrasoundImageStorage if frames == 1 else UltrasoundMultiFrameImageStorage
    dataset.SOPClassUID, dataset.SOPInstanceUID = kind, generate_uid()
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
    dataset.PatientID, dataset.PatientName, dataset.Modality = patient, "X", "US"
    dataset.PatientBirthDate = dataset.PatientSex = dataset.StudyDate = dataset.StudyTime = dataset.StudyID = ""
    dataset.AccessionNumber = dataset.ReferringPhysicianName = ""
    dataset.SeriesNumber = dataset.InstanceNumber = 1
    dataset.Rows, dataset.Columns = SIZE
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.PixelSpacing = [0.2, 0.2]
    if frames > 1:
        dataset.NumberOfFrames = frames
    dataset.PixelData = pixels.tobytes()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = kind
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return pydicom.dcmread(path)


def segment(number, label):
    return seg.SegmentDescription(
        segment_number=number,
        segment_label=label,
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.Neoplasm,
        algorithm_type=seg.SegmentAlgorithmTypeValues.MANUAL,
    )


def write_seg(path, source, mask_FHWS, labels, kind="BINARY"):
    made = seg.Segmentation(
        source_images=[source],
        pixel_array=mask_FHWS,
        segmentation_type=kind,
        segment_descriptions=[segment(number, label) for number, label in enumerate(labels, 1)],
        series_instance_uid=generate_uid(),
        series_number=2,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="bushpc's tests",
        manufacturer_model_name="none",
        software_versions="0",
        device_serial_number="0",
        omit_empty_frames=False,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save_as(path)


@pytest.fixture
def cohort(importing):
    """Six images of five patients, each with a segmentation; names without an ending."""
    for name in LABELS:
        source = write_image(importing.src / PATIENTS[name] / name, image_of(name)[..., 0], PATIENTS[name])
        write_seg(
            importing.src / "segs" / f"{name}_seg", source, mask_of(name)[None, ..., None].astype(bool), ["Lesion 1"]
        )
    table(importing.src / "list.csv", [("image", "dx"), *LABELS.items()])
    return importing


WORDS = ["table=list.csv", "label=dx", "labels=B:benign,M:malignant,N:normal"]


def test_images_masks_patients_and_pixel_sizes_are_read(cohort):
    cohort(*WORDS)
    assert cohort.manifest.mask_classes == ["lesion"]
    for record in cohort.manifest.records:
        name = record.key[-2:]
        assert record.key == f"{PATIENTS[name]}-{name}"
        assert (record.patient, record.pixel_mm) == (PATIENTS[name], 0.2)
        assert np.array_equal(read_mask(cohort.out, record), mask_of(name))
        assert np.array_equal(read_image(cohort.out, record)[..., 0], image_of(name)[..., 0])


def test_overlapping_segments_are_classes_and_numbered_ones_are_united(importing):
    first, second, third = mask_of("s1"), np.roll(mask_of("s1"), 2, axis=1), mask_of("s5")
    source = write_image(importing.src / "a.dcm", image_of("s1")[..., 0], "P1")
    planes = np.stack([first, second, third], axis=-1)[None].astype(bool)
    write_seg(importing.src / "b.dcm", source, planes, ["Lesion 1", "Shadow", "Lesion 2"])
    importing()
    record = importing.manifest.record("a")
    assert importing.manifest.mask_classes == ["Lesion", "Shadow"]
    assert np.array_equal(read_mask(importing.out, record), (first | third) + 2 * second)


def test_fractions_count_from_half(importing):
    source = write_image(importing.src / "a.dcm", image_of("s1")[..., 0], "P1")
    fractions = np.zeros((1, *SIZE, 1))
    fractions[0, 2:8, 3:9, 0], fractions[0, 2:8, 9:12, 0] = 0.75, 0.25
    write_seg(importing.src / "b.dcm", source, fractions, ["Lesion"], kind="FRACTIONAL")
    importing()
    assert np.array_equal(read_mask(importing.out, importing.manifest.record("a")), fractions[0, ..., 0] > 0.5)


def test_segmented_frames_of_a_clip_are_scans(importing):
    """highdicom refuses clips without a frame of reference, so each frame's SEG is made of the frame alone."""
    names = ("s1", "s2", "s3")
    clip = write_image(importing.src / "clip.dcm", np.stack([image_of(name)[..., 0] for name in names]), "P1", frames=3)
    for frame in (0, 2):
        alone = write_image(importing.src.parent / "alone.dcm", image_of(names[frame])[..., 0], "P1")
        write_seg(
            importing.src / f"{frame}.dcm", alone, mask_of(names[frame])[None, ..., None].astype(bool), ["Lesion"]
        )
        written = pydicom.dcmread(importing.src / f"{frame}.dcm")
        group = written.PerFrameFunctionalGroupsSequence[0]
        for place in (
            group.DerivationImageSequence[0].SourceImageSequence[0],
            written.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0],
        ):
            place.ReferencedSOPInstanceUID, place.ReferencedSOPClassUID = clip.SOPInstanceUID, clip.SOPClassUID
        group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber = frame + 1
        written.save_as(importing.src / f"{frame}.dcm")
    assert "2 of 3 frames have a mask" in importing()
    assert [record.key for record in importing.manifest.records] == ["clip-f0000", "clip-f0002"]
    for record, name in zip(importing.manifest.records, ("s1", "s3"), strict=True):
        assert np.array_equal(read_mask(importing.out, record), mask_of(name))
        assert np.array_equal(read_image(importing.out, record)[..., 0], image_of(name)[..., 0])
        assert record.patient == "P1"


def change(path, **tags):
    dataset = pydicom.dcmread(path)
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(path)


BAD = {
    "a segmentation of another image": (
        lambda src: (src / "P1" / "s1").unlink(),
        "segs/s1_seg, frame 1 refers to an image that is not in the folder",
    ),
    "an image without segmentation": (
        lambda src: (src / "segs" / "s1_seg").unlink(),
        "P1/s1 is benign and has no mask",
    ),
    "no patient": (lambda src: change(src / "P1" / "s1", PatientID=""), "the patient is not stated for 1 scans"),
    "another size": (lambda src: change(src / "segs" / "s1_seg", Rows=10), "P1/s1 has 31x20 pixels, its mask"),
    "two segmentations": (
        lambda src: (src / "segs" / "again").write_bytes((src / "segs" / "s1_seg").read_bytes()),
        "both segment Lesion in P1/s1: keep one of them",
    ),
    "an image twice": (
        lambda src: (src / "again").write_bytes((src / "P1" / "s1").read_bytes()),
        "are one image (SOP Instance UID",
    ),
    "a torn file": (
        lambda src: (src / "P1" / "s1").write_bytes((src / "P1" / "s1").read_bytes()[:-300]),
        "P1/s1",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_folders_are_refused_whole(cohort, what):
    spoil, expected = BAD[what]
    spoil(cohort.src)
    assert expected in cohort.refused(*WORDS)
