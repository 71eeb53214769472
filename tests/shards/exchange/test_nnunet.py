"""Promises of importing an nnU-Net raw dataset."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from bushpc.shards.manifest import read_mask

from .cohorts import LABELS, MEANINGS, PATIENTS, image_of, mask_of, save, table

DESCRIBED = {
    "channel_names": {"0": "R", "1": "G", "2": "B"},
    "labels": {"background": 0, "tumor": 1},
    "numTraining": 6,
    "file_ending": ".png",
}


def write_nnunet(folder, **changes):
    for name in LABELS:
        save(folder / "imagesTr" / f"{name}_0000.png", image_of(name))
        save(folder / "labelsTr" / f"{name}.png", mask_of(name))
    (folder / "dataset.json").write_text(json.dumps({**DESCRIBED, **changes}))


@pytest.fixture
def words(importing):
    write_nnunet(importing.src)
    table(importing.src / "list.csv", [("case", "who", "dx"), *((n, PATIENTS[n], LABELS[n]) for n in LABELS)])
    return ["table=list.csv", "patients=who", "label=dx", MEANINGS]


def test_cases_are_packed_with_their_masks(importing, words):
    importing(*words)
    importing.check_all()
    assert importing.manifest.mask_classes == ["lesion"]


def test_without_a_table_patients_must_be_declared_absent_and_empty_masks_are_normal(importing, words):
    assert "patients= is missing" in importing.refused()
    assert "no label" in importing("patients=none")
    assert {record.key for record in importing.manifest.records if record.label == "normal"} == {"s6"}


def test_regions_overlap(importing):
    labels = {"background": 0, "lesion": [1, 2], "core": [2]}
    write_nnunet(importing.src, labels=labels)
    levels = mask_of("s1").copy()
    levels[3:5, 4:6] = 2
    save(importing.src / "labelsTr" / "s1.png", levels)
    importing("patients=none")
    assert importing.manifest.mask_classes == ["lesion", "core"]
    expected = (levels > 0).astype(np.uint8) + 2 * (levels == 2)
    assert np.array_equal(read_mask(importing.out, importing.manifest.record("s1")), expected)


def test_benign_and_malignant_classes_become_labels(importing):
    write_nnunet(importing.src, labels={"background": 0, "benign": 1, "malignant": 2})
    for name in ("s2", "s4"):
        save(importing.src / "labelsTr" / f"{name}.png", mask_of(name) * 2)
    table(importing.src / "list.csv", [("case", "who"), *PATIENTS.items()])
    assert "taken as labels" in importing("table=list.csv", "patients=who")
    importing.check_all()


BAD = {
    "volumes": (lambda src: write_nnunet(src, file_ending=".nii.gz"), "bushpc reads 2D pictures"),
    "pixels to ignore": (lambda src: write_nnunet(src, labels={"background": 0, "a": 1, "ignore": 2}), "'ignore'"),
    "no labels": (lambda src: write_nnunet(src, labels={}), "'labels' must map names to values"),
    "a label of text": (lambda src: write_nnunet(src, labels={"background": 0, "a": "x"}), "a is 'x'"),
    "a mask with another level": (
        lambda src: save(src / "labelsTr" / "s1.png", mask_of("s1") * 3),
        "labelsTr/s1.png has pixels of value 3; masks of this dataset use only 0, 1",
    ),
    "a case without mask": (
        lambda src: (src / "labelsTr" / "s1.png").unlink(),
        "imagesTr/s1_0000.png is benign and has no mask",
    ),
    "a mask without case": (
        lambda src: save(src / "labelsTr" / "s9.png", mask_of("s1")),
        "labelsTr/s9.png is the mask of no image",
    ),
    "two channels": (
        lambda src: save(src / "imagesTr" / "s1_0001.png", image_of("s1")),
        "case s1 has 2 files (imagesTr/s1_0000.png, imagesTr/s1_0001.png)",
    ),
    "a name without channel": (lambda src: save(src / "imagesTr" / "s9.png", image_of("s1")), "<case>_0000.png"),
    "another number of cases": (lambda src: write_nnunet(src, numTraining=7), "numTraining 7, and imagesTr has 6"),
    "broken JSON": (lambda src: (src / "dataset.json").write_text("{"), "dataset.json cannot be read"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_datasets_are_refused_whole(importing, words, what):
    change, expected = BAD[what]
    change(importing.src)
    assert expected in importing.refused(*words)


def test_a_tiff_of_several_slices_is_a_volume(importing):
    write_nnunet(importing.src, file_ending=".tif")
    for part, picture in (("imagesTr/v_0000.tif", image_of("s1")), ("labelsTr/v.tif", mask_of("s1"))):
        slices = [Image.fromarray(picture)] * 3
        slices[0].save(importing.src / part, save_all=True, append_images=slices[1:])
    assert "v_0000.tif is a volume of 3 slices" in importing.refused("patients=none")


def test_the_folder_above_is_refused_with_the_right_one(importing):
    write_nnunet(importing.src / "Dataset001_x")
    assert f"src={importing.src / 'Dataset001_x'} looks like" in importing.refused("kind=nnunet", "patients=none")
