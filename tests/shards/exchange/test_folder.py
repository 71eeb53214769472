"""Promises of importing folders of images and masks: the same pixels, all problems named, nothing half-written."""

from __future__ import annotations

import json
import shutil

import numpy as np
import openpyxl
import pytest
import yaml

from bushpc.cli import main
from bushpc.config import compose, shards_folder
from bushpc.shards.audit import audit
from bushpc.shards.listing import list_datasets
from bushpc.shards.manifest import read_image, read_mask
from bushpc.shards.split import load_folds
from bushpc.shards.write import pack

from .cohorts import LABELS, MEANINGS, PACKED, PATIENTS, image_of, mask_of, save, table, write_folder


def test_a_cohort_is_packed_with_its_pixels_labels_patients_and_folds(importing):
    importing(*write_folder(importing.src))
    importing.check_all()
    assert {record.attributes["birads"] for record in importing.manifest.records} == {"4a"}


def test_columns_that_may_identify_a_patient_are_imported_on_request_only(importing):
    words = write_folder(importing.src)
    assert "physician" in importing(*words)
    assert all("physician" not in record.attributes for record in importing.manifest.records)
    importing(*words, "attributes=physician:reader")
    assert {record.attributes["reader"] for record in importing.manifest.records} == {"Dr X"}


def test_the_card_repeats_the_import(importing, tmp_path):
    importing(*write_folder(importing.src))
    first = importing.manifest
    card = importing.out.rename(tmp_path / "first")
    importing(f"card={card}")
    assert importing.manifest.hash == first.hash
    assert pack("mine", importing.src, importing.out).hash == first.hash


def test_data_takes_the_name_of_the_cohort(importing):
    importing(*write_folder(importing.src))
    assert compose(["data=mine", "cluster=local", "engine=cpu"]).data.folder == importing.out
    assert shards_folder("mine") == importing.out
    [entry] = [entry for entry in list_datasets(importing.out.parent) if entry.name == "mine"]
    assert entry.packed == "whole"
    assert entry.scans == {"benign": 3, "malignant": 2, "normal": 1}


def test_a_dry_run_packs_nothing_and_its_card_packs_the_same(importing, tmp_path):
    words = write_folder(importing.src)
    page = tmp_path / "page"
    assert main(["shards", "import", "data=mine", f"src={importing.src}", f"out={page}", "dry_run=true", *words]) == 0
    assert "3 benign, 2 malignant, 1 normal; 5 patients; 0 problems" in importing.capsys.readouterr().out
    html = (page / "index.html").read_text()
    assert all(f'"{name}"' in html for name in LABELS)
    assert "<link" not in html
    assert not list(page.glob("*.tar"))
    importing(f"card={page}")
    importing.check_all()


def test_a_dry_run_shows_problems_beside_the_sound_scans(importing, tmp_path):
    words = write_folder(importing.src)
    save(importing.src / "contours" / "s1_roi.png", np.full((7, 9), 255, np.uint8))
    page = tmp_path / "page"
    assert main(["shards", "import", "data=mine", f"src={importing.src}", f"out={page}", "dry_run=true", *words]) == 1
    printed = importing.capsys.readouterr().out
    assert "frames/s1.png has 31x20 pixels, its mask contours/s1_roi.png has 9x7" in printed
    assert "has 9x7" in (page / "index.html").read_text()


def test_patients_are_required_or_declared_absent(importing):
    words = [word for word in write_folder(importing.src) if not word.startswith("patients=")]
    assert "patients= is missing" in importing.refused(*words)
    assert "too good" in importing(*words, "patients=none")
    assert [record.patient for record in importing.manifest.records] == [r.key for r in importing.manifest.records]
    card = yaml.safe_load((importing.out / "card.yaml").read_text())
    assert card["imported"]["patients"] == "none"
    assert "may be too good" in card["notes"][0]
    [finding] = [each for each in audit([importing.out]).findings if each.kind == "patients_unknown"]
    assert "patients=none" in finding.said


def test_patients_and_labels_come_from_folders_and_names(importing):
    for name in LABELS:
        place = f"{PATIENTS[name]}_{LABELS[name]}"
        save(importing.src / "images" / place / f"{name}.png", image_of(name))
        if LABELS[name] != "N":
            save(importing.src / "masks" / place / f"{name}.png", mask_of(name) * 255)
    importing(
        "patients=folder", "label=name:^(s)", "labels=s:unlabelled", "without_mask=normal", "skip_incomplete=true"
    )
    assert {record.patient for record in importing.manifest.records} == {"P1_B", "P1_M", "P2_B", "P3_M", "P4_B"}
    assert {record.label for record in importing.manifest.records} == {"unlabelled"}


def test_masks_beside_their_images_are_found_by_their_names(importing):
    for name in LABELS:
        save(importing.src / f"{name}.png", image_of(name))
        if LABELS[name] != "N":
            save(importing.src / f"{name}_tumor.png", mask_of(name))  # of 0 and 1
    importing("patients=none", "without_mask=normal")
    for record in importing.manifest.records:
        assert np.array_equal(read_image(importing.out, record), image_of(record.key))
        assert np.array_equal(read_mask(importing.out, record), mask_of(record.key))
    assert [record.label for record in importing.manifest.records] == ["unlabelled"] * 5 + ["normal"]


@pytest.mark.parametrize("words", [(), ("masks={name}_mask*.png",)])
def test_class_folders_with_several_masks_per_image_are_read(importing, words):
    """As BUSI names its files; the pattern says the same as what is found without."""
    for name in LABELS:
        label = PACKED[LABELS[name]]
        place = importing.src / label
        save(place / f"{label} ({name[1]}).png", image_of(name))
        top, bottom = mask_of(name) * 255, mask_of(name) * 255
        top[4:], bottom[:4] = 0, 0
        save(place / f"{label} ({name[1]})_mask.png", top)
        save(place / f"{label} ({name[1]})_mask_1.png", bottom)
    importing("label=folder", "patients=none", *words)
    for name in LABELS:
        label = PACKED[LABELS[name]]
        record = importing.manifest.record(f"{label}-{label}_({name[1]})")
        assert record.label == label
        assert np.array_equal(read_mask(importing.out, record), mask_of(name))


def test_levels_of_a_mask_can_be_classes(importing):
    both = mask_of("s1") + 2 * mask_of("s5") * (1 - mask_of("s1"))
    save(importing.src / "images" / "s1.png", image_of("s1"))
    save(importing.src / "masks" / "s1.png", both)
    importing("patients=none", "classes=lesion:1,shadow:2")
    assert importing.manifest.mask_classes == ["lesion", "shadow"]
    assert np.array_equal(read_mask(importing.out, importing.manifest.records[0]), both)


def test_a_workbook_and_a_column_of_masks_are_read(importing):
    write_folder(importing.src)
    book = openpyxl.Workbook()
    book.active.append(["File", "Mask", "Patient", "Class", "mm", "fold"])
    for number, name in enumerate(LABELS):
        mask = f"{name}_roi.png" if LABELS[name] != "N" else None
        book.active.append([f"{name}.png", mask, PATIENTS[name], LABELS[name], 0.1, number // 2])
    book.save(importing.src / "list.xlsx")
    words = ["table=list.xlsx", "image=File", "mask=Mask", "images=frames", "patients=Patient", "label=Class", MEANINGS]
    importing(*words, "pixel_mm=mm")
    importing.check_all()
    assert {record.pixel_mm for record in importing.manifest.records} == {0.1}
    folds = load_folds(importing.out / "folds_published.csv", importing.manifest.records, normals=True)
    assert folds.validation(2) == ["s5", "s6"]


def break_size(src):
    save(src / "contours" / "s1_roi.png", np.full((7, 9), 255, np.uint8))


def break_mask(src):
    (src / "contours" / "s2_roi.png").unlink()


def add_orphan(src):
    save(src / "contours" / "zz.png", mask_of("s1"))


def two_of_one_name(src):
    shutil.copy(src / "frames" / "s1.png", src / "frames" / "s1.bmp")


def two_folders(src):
    for place in ("left", "right"):
        (src / "frames" / place).mkdir()
        shutil.copy(src / "frames" / "s1.png", src / "frames" / place / "s1.png")
    (src / "frames" / "s1.png").unlink()


def change_table(old, new):
    def change(src):
        text = (src / "list.csv").read_text()
        assert old in text
        (src / "list.csv").write_text(text.replace(old, new))

    return change


BAD = {
    "a mask of another size": (break_size, ["frames/s1.png has 31x20 pixels, its mask contours/s1_roi.png has 9x7"]),
    "a missing mask": (break_mask, ["frames/s2.png is malignant and has no mask"]),
    "a mask without image": (add_orphan, ["contours/zz.png is the mask of no image"]),
    "two images of one name": (two_of_one_name, ["s1.bmp", "s1.png"]),
    "one name in two folders": (two_folders, ["left/s1.png", "right/s1.png"]),
    "a row without image": (change_table("s6,", "s7,"), ["list.csv, row 7: there is no image s7", "s6.png has no row"]),
    "two rows of one image": (change_table("s6,", "s5,"), ["row 7: frames/s5.png already has row 6"]),
    "an empty patient": (change_table("s3,P2", "s3,"), ["the patient is not stated for 1 scans (list.csv, row 4)"]),
    "an unknown label": (change_table("P2,B", "P2,fibro"), ["fibro (1)", "labels=fibro:benign"]),
    "an empty label": (change_table("P2,B", "P2,"), ["the label is empty for 1 scans (list.csv, row 4)"]),
    "a normal scan with a mask": (change_table("P2,B", "P2,N"), ["'s3' is normal but has lesion pixels"]),
    "no column of images": (
        lambda src: table(src / "list.csv", [["pid", "dx"], ["P1", "B"]]),
        ["no column names the images"],
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_folders_are_refused_whole(importing, what):
    change, expected = BAD[what]
    words = write_folder(importing.src)
    change(importing.src)
    text = importing.refused(*words)
    assert all(part in text for part in expected), text


def test_all_problems_are_listed_at_once(importing):
    words = write_folder(importing.src)
    break_size(importing.src)
    break_mask(importing.src)
    text = importing.refused(*words)
    assert "s2.png is malignant and has no mask" in text


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("label=diagnose", "unknown column 'diagnose'"),
        ("labels=B:harmless", "unknown label 'harmless'"),
        ("labels=B", "VALUE:MEANING"),
        ("patients=name:P[0-9]+", "one group in brackets"),
        ("patients=name:(", "not a regular expression"),
        ("masks=contour", "no such folder. It has: contours, frames"),
        ("kind=cocoa", "did you mean 'coco'"),
        ("table=lost.csv", "does not exist"),
        ("classes=lesion:1,cyst:1", "a level of its own"),
        ("mask_threshold=0", "1 to 255"),
        ("images=masks_of", "no such folder"),
    ],
)
def test_a_word_that_cannot_be_says_what_is_allowed(importing, word, expected):
    words = [each for each in write_folder(importing.src) if each.split("=")[0] != word.split("=")[0]]
    assert expected in importing.refused(*words, word)


@pytest.mark.parametrize(("name", "expected"), [("breast", "bushpc pack data=breast"), ("a b", "letters, digits")])
def test_names_of_known_datasets_are_refused(importing, name, expected):
    write_folder(importing.src)
    assert main(["shards", "import", f"data={name}", f"src={importing.src}", "patients=none"]) == 2
    assert expected in importing.capsys.readouterr().err


def test_incomplete_scans_are_left_out_on_request_and_named_on_the_card(importing):
    words = write_folder(importing.src)
    break_mask(importing.src)
    importing(*words, "skip_incomplete=true")
    assert "s2" not in {record.key for record in importing.manifest.records}
    assert any("s2.png" in note for note in yaml.safe_load((importing.out / "card.yaml").read_text())["notes"])


def test_another_dataset_is_not_overwritten(importing):
    words = write_folder(importing.src)
    importing(*words)
    before = (importing.out / "manifest.json").read_bytes()
    status = main(["shards", "import", "data=other", f"src={importing.src}", f"out={importing.out}", *words])
    assert status == 2
    assert "holds mine" in importing.capsys.readouterr().err
    assert (importing.out / "manifest.json").read_bytes() == before
    assert json.loads(before)["dataset"] == "mine"
