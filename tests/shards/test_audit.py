"""Promises of the audit: what is wrong is found and named, what is right is not, and grouped folds hold together."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from PIL import Image

from bushpc.cli import main
from bushpc.shards.audit import audit
from bushpc.shards.audit_findings import balance
from bushpc.shards.manifest import Manifest, Record, ShardInfo, read_image
from bushpc.shards.split import load_folds, write_folds

SHARD = "lesion-000000.tar"


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


class Planted:
    """Scans to be packed as they are, which `bushpc pack` would in part refuse."""

    def __init__(self, name):
        self.name, self.records, self.bytes, self.folds = name, [], b"", {}

    def add(self, key, image, mask=None, *, patient=None, label="benign", fold=None):
        height, width = image.shape[:2]
        if mask is None:
            mask = np.zeros((height, width), np.uint8)
            mask[height // 3 : height // 2, width // 3 : width // 2] = label != "normal"
        files = png(np.ascontiguousarray(image)), png(mask)
        facts = {"key": key, "patient": patient or key, "label": label, "attributes": {}, "pixel_mm": None}
        size = {"height": height, "width": width, "lesion_pixels": int(mask.sum()), "lesion_length": 1}
        offset = len(self.bytes)
        self.bytes += b"".join(files)
        place = {"shard": SHARD, "image_offset": offset, "image_bytes": len(files[0])}
        place |= {"mask_offset": offset + len(files[0]), "mask_bytes": len(files[1])}
        self.records.append(Record(**facts, **size, **place))
        self.folds[key] = len(self.folds) % 2 if fold is None else fold

    def pack(self, folder):
        folder.mkdir()
        (folder / SHARD).write_bytes(self.bytes)
        shard = ShardInfo(file=SHARD, sha256="", bytes=len(self.bytes), samples=len(self.records))
        Manifest(dataset=self.name, packer_version=1, excerpt=False, shards=[shard], records=self.records).save(folder)
        write_folds(folder / "folds.csv", self.records, self.folds)
        return folder


@pytest.fixture(scope="module")
def scans(phantom_folder):
    """24 unrelated scans, 160 x 200."""
    return [read_image(phantom_folder, record) for record in Manifest.load(phantom_folder).records]


def found(result):
    return {(finding.kind, finding.key) for finding in result.findings}


def test_bad_masks_and_images_are_named_and_good_ones_are_not(scans, tmp_path):
    planted = Planted("planted")
    planted.add("good", scans[0], fold=0)
    planted.add("good_normal", scans[1], label="normal", fold=1)
    empty = np.zeros(scans[0].shape[:2], np.uint8)

    def mask(*boxes):
        drawn = empty.copy()
        for top, bottom, left, right in boxes:
            drawn[top:bottom, left:right] = 1
        return drawn

    planted.add("empty", scans[2], empty)
    planted.add("normal_with", scans[3], mask((40, 60, 40, 60)), label="normal")
    planted.add("tiny", scans[4], mask((40, 44, 40, 44)))
    planted.add("parts", scans[5], mask((40, 60, 40, 60), (90, 91, 90, 91)))
    planted.add("border", scans[6], mask((40, 60, 0, 40)))
    caliper = scans[7] // 3
    caliper[55:66, 60:62], caliper[60:62, 55:66] = 255, 255
    planted.add("caliper", caliper, mask((40, 90, 61, 110)))
    far = scans[8] // 3
    far[125:136, 160:162], far[130:132, 155:166] = 255, 255
    planted.add("caliper_far_off", far, mask((40, 90, 61, 110)))
    coloured = scans[9].copy()
    coloured[5:9, 5:90] = (255, 30, 30)
    planted.add("coloured", coloured)
    planted.add("constant", np.full_like(scans[0], 77))
    planted.add("small", scans[10][:63])
    planted.add("unknown", scans[11], label="bening")
    planted.add("unlabelled", scans[12], label="unlabelled")
    planted.add("other_size", scans[13], mask((40, 60, 40, 60))[:-1])
    planted.add("two_scans", scans[14], patient="ann", fold=0)
    planted.add("two_labels", scans[15], patient="ann", label="malignant", fold=0)
    planted.add("two_classes", scans[16], mask((40, 60, 40, 60)) + 2 * mask((50, 70, 50, 70)))
    result = audit([planted.pack(tmp_path / "planted")])
    assert found(result) == {
        ("empty_mask", "empty"),
        ("normal_with_mask", "normal_with"),
        ("tiny_mask", "tiny"),
        ("parts", "parts"),
        ("border", "border"),
        ("marks", "caliper"),
        ("colour", "coloured"),
        ("constant", "constant"),
        ("small", "small"),
        ("unknown_label", "unknown"),
        ("unreadable", "other_size"),
        ("patient_labels", ""),
    }
    assert result.twins == []
    assert result.grave == 5
    said = {finding.kind: finding.said for finding in result.findings}
    assert said["tiny_mask"] == "16 pixels, 0.050% of the image"
    assert said["parts"] == "2 parts, the smallest of 1 pixels"
    assert said["patient_labels"] == "patient ann: labels benign, malignant"
    assert "200x159 pixels, the manifest says 200x160" in said["unreadable"]


def test_one_picture_twice_is_told_by_label_fold_patient_and_dataset(scans, tmp_path):
    one, other = Planted("one"), Planted("other")
    one.add("a", scans[0], fold=0)
    one.add("a_again", scans[0], label="malignant", fold=1)
    one.add("b", scans[1], patient="bea", fold=0)
    one.add("b_mirrored", scans[1][:, ::-1], patient="bea", fold=0)
    one.add("c", scans[2], fold=1)
    other.add("c_brighter", np.clip(scans[2] * 1.2, 0, 255).astype(np.uint8), label="unlabelled", fold=0)
    other.add("d", scans[3], fold=1)
    result = audit([one.pack(tmp_path / "one"), other.pack(tmp_path / "other")])
    assert [(pair.key, pair.other_key, pair.says().rpartition(", correlation")[0]) for pair in result.twins[1:]] == [
        ("b", "b_mirrored", "of one patient"),
        ("c", "c_brighter", "in two datasets"),
    ]
    assert result.twins[0].says() == "benign against malignant, folds 0 and 1, identical pixels"
    assert [pair.grave for pair in result.twins] == [True, False, False]
    assert result.twins[1].mirrored
    assert result.pair_counts == {
        "identical pixels": 1,
        "near duplicates": 2,
        "mirrored": 1,
        "within one label": 1,
        "with conflicting labels": 1,
        "in training and validation": 1,
        "of one patient": 1,
        "across datasets": 1,
    }


def test_leaking_folds_are_findings_and_no_end(scans, tmp_path):
    planted = Planted("planted")
    for number, fold in enumerate((0, 1, 1)):
        planted.add(f"scan{number}", scans[number], patient=("ann", "ann", "bea")[number], fold=fold)
    result = audit([planted.pack(tmp_path / "planted")])
    assert [finding.said for finding in result.findings if finding.kind == "patient_in_folds"] == [
        "patient ann: folds 0, 1"
    ]
    assert "patients in more than one fold: ann (folds 0, 1)" in next(
        finding.said for finding in result.findings if finding.kind == "folds"
    )


def test_counts_are_those_of_the_fold_file(scans, tmp_path):
    planted = Planted("planted")
    for number, label in enumerate(("benign", "benign", "malignant", "normal")):
        planted.add(f"scan{number}", scans[number], label=label, patient=f"patient{number // 2}", fold=number // 2)
    rows = balance(audit([planted.pack(tmp_path / "planted")]))
    kept = ("fold", "scans", "patients", "benign", "malignant", "normal")
    assert [tuple(row[name] for name in kept) for row in rows] == [
        ("", 4, 2, 2, 1, 1),
        ("0", 2, 1, 2, 0, 0),
        ("1", 2, 1, 0, 1, 1),
    ]
    share = 100 * (160 // 2 - 160 // 3) * (200 // 2 - 200 // 3) / (160 * 200)
    assert rows[0]["lesion_share"] == [round(share, 2)] * 3


def test_the_command_writes_page_and_lists_and_says_by_its_status_whether_it_is_grave(scans, tmp_path, capsys):
    planted = Planted("planted")
    planted.add("<a>", scans[0], fold=0)
    planted.add("a_again", scans[0], fold=1)
    folder, out = planted.pack(tmp_path / "planted"), tmp_path / "out"
    assert main(["shards", "audit", f"data={folder}", f"out={out}"]) == 1
    with (out / "pairs.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["key"], row["other_key"], row["identical"]) == ("<a>", "a_again", "True")
    assert json.loads((out / "audit.json").read_text())["pair_counts"]["in training and validation"] == 1
    page = (out / "index.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2
    assert "&lt;a&gt;" in page
    assert "<a>" not in page
    assert "folds 0 and 1, identical pixels" in page
    assert main(["shards", "audit", f"data={folder}", "data=nowhere"]) == 2
    assert "unknown data 'nowhere'" in capsys.readouterr().err
    assert main(["shards", "audit", f"data={folder}", f"data={folder}"]) == 2
    assert "is given twice" in capsys.readouterr().err


def test_nothing_grave_is_found_in_a_packed_phantom(phantom_folder, tmp_path):
    assert main(["shards", "audit", f"data={phantom_folder}", f"out={tmp_path}"]) == 0
    assert list(csv.reader((tmp_path / "pairs.csv").open()))[1:] == []


def test_grouped_folds_keep_copies_together_and_are_not_overwritten(scans, tmp_path, capsys):
    planted = Planted("planted")
    for number, scan in enumerate(scans[:12]):
        planted.add(f"scan{number:02d}", scan, label=("benign", "malignant")[number % 2], fold=0)
        if number < 4:
            planted.add(f"scan{number:02d}again", scan[:, ::-1], label=("benign", "malignant")[number % 2], fold=1)
    folder = planted.pack(tmp_path / "planted")
    command = ["shards", "folds", f"data={folder}", "duplicates=group"]
    assert main(command) == 0
    assert "4 pairs are one picture, so 16 patients count as 12" in capsys.readouterr().out
    path = folder / "folds_grouped.csv"
    folds = load_folds(path, planted.records).fold_by_key
    assert all(folds[f"scan{number:02d}"] == folds[f"scan{number:02d}again"] for number in range(4))
    text = path.read_text()
    assert main(command) == 0
    assert path.read_text() == text
    write_folds(path, planted.records, planted.folds)
    assert main(command) == 2
    assert "holds other folds" in capsys.readouterr().err
    assert load_folds(path, planted.records).fold_by_key == planted.folds
    assert main(["shards", "folds", f"data={folder}", "duplicates=grup"]) == 2
    assert main(["shards", "audit", f"data={folder}", "folds=grouped", f"out={tmp_path / 'out'}"]) == 1


def test_bus_bra_has_calipers_at_its_outlines_and_no_picture_twice(real_data, tmp_path):
    source = real_data / "busbra_excerpt" / "BUSBRA"
    packing = ["pack", "data=bus_bra", f"src={source}", f"out={tmp_path / 'packed'}", "excerpt=true", "workers=1"]
    assert main(packing) == 0
    result = audit([tmp_path / "packed"])
    assert result.twins == []
    assert {"bus_0118-l", "bus_0101-l", "bus_0077-s"} <= {f.key for f in result.findings if f.kind == "marks"}
