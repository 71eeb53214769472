"""Promises of `bushpc shards import --corrections`: new masks, nothing else changes, who and when is noted."""

from __future__ import annotations

import csv
import json
import shutil
import tarfile

import numpy as np
import pytest

from bushpc.cli import main
from bushpc.errors import DataError
from bushpc.shards.manifest import Manifest, read_image, read_mask, verify
from bushpc.shards.write import pack

from .cohorts import LABELS, image_of, mask_of, save, write_folder


@pytest.fixture
def packed(importing):
    importing(*write_folder(importing.src))
    return importing


def correct(importing, *words):
    status = main(["shards", "import", "data=mine", "--corrections", str(importing.src.parent / "new"), *words])
    printed = importing.capsys.readouterr()
    return printed.out + printed.err, status


def grown(name):
    mask = mask_of(name)
    mask[-4:, -4:] = 1
    return mask


def test_corrected_masks_replace_the_packed_ones_and_nothing_else_changes(packed):
    before = packed.manifest
    save(packed.src.parent / "new" / "s1.png", grown("s1") * 255)
    save(packed.src.parent / "new" / "s2_mask.png", mask_of("s2"))  # of 0 and 1, and as packed
    text, status = correct(packed, "by=A. Reader")
    assert status == 0
    assert "1 masks replaced, 1 were already so" in text
    after = packed.manifest
    verify(packed.out, after, deep=True)
    assert after.hash != before.hash
    for name in LABELS:
        record, old = after.record(name), before.record(name)
        assert np.array_equal(read_mask(packed.out, record), grown(name) if name == "s1" else mask_of(name))
        assert np.array_equal(read_image(packed.out, record), image_of(name))
        assert (record.label, record.patient, record.attributes) == (old.label, old.patient, old.attributes)
    assert after.record("s1").lesion_pixels == grown("s1").sum()
    assert sorted(path.name for path in packed.out.glob("*.tar")) == ["lesion-000000-c1.tar", "normal-000000.tar"]


def test_who_and_when_is_noted_beside_the_shards_and_in_the_tar(packed):
    for by in ("A. Reader", "B. Reader"):
        save(packed.src.parent / "new" / "s1.png", (grown("s1") if by[0] == "A" else mask_of("s1")) * 255)
        correct(packed, f"by={by}")
    rows = list(csv.DictReader((packed.out / "corrections.csv").open()))
    assert [(row["key"], row["by"], row["pixels_changed"]) for row in rows] == [
        ("s1", "A. Reader", "16"),
        ("s1", "B. Reader", "16"),
    ]
    assert rows[0]["after_sha256"] == rows[1]["before_sha256"]
    with tarfile.open(packed.out / packed.manifest.record("s1").shard) as tar:
        described = json.load(tar.extractfile("s1.json"))
    assert [(each["by"], each["when"]) for each in described["corrections"]] == [(r["by"], r["when"]) for r in rows]


BAD = {
    "no such scan": ("zz.png", lambda: mask_of("s1"), "mine has no scan 'zz'"),
    "another size": ("s1.png", lambda: np.full((3, 4), 255, np.uint8), "s1 has 31x20 pixels, its mask s1.png has 4x3"),
    "a lesion without mask": ("s1.png", lambda: mask_of("s6"), "s1 has a lesion, and its corrected mask is empty"),
    "a normal scan with one": ("s6.png", lambda: mask_of("s1"), "s6 is normal, and its corrected mask has lesion"),
    "two masks of a key": ("a/s2.png", lambda: mask_of("s2"), "are both masks of s2"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_masks_change_nothing(packed, what):
    name, mask, expected = BAD[what]
    save(packed.src.parent / "new" / "s2.png", grown("s2") * 255)
    save(packed.src.parent / "new" / name, mask() * 255)
    before = {path.name: path.read_bytes() for path in packed.out.iterdir() if path.is_file()}
    text, status = correct(packed, "by=A")
    assert status == 2
    assert expected in text
    assert {path.name: path.read_bytes() for path in packed.out.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("words", "expected"), [((), "by= is missing"), (("by= ",), "give the name"), (("by=A", "src=x"), "not src=")]
)
def test_words_that_cannot_be_are_refused(packed, words, expected):
    save(packed.src.parent / "new" / "s1.png", grown("s1"))
    text, status = correct(packed, *words)
    assert (status, expected in text) == (2, True), text


def test_packing_again_does_not_lose_corrections(packed):
    save(packed.src.parent / "new" / "s1.png", grown("s1") * 255)
    correct(packed, "by=A")
    with pytest.raises(DataError, match="holds corrected masks"):
        pack("mine", packed.src, packed.out)
    assert np.array_equal(read_mask(packed.out, Manifest.load(packed.out).record("s1")), grown("s1"))


def test_a_packed_dataset_of_the_project_takes_corrections_too(phantom_folder, tmp_path, capsys):
    shards = shutil.copytree(phantom_folder, tmp_path / "phantom")
    record = Manifest.load(shards).lesions[0]
    mask = read_mask(shards, record)
    mask[:3] = 1
    save(tmp_path / "new" / f"{record.key}.png", mask * 255)
    assert main(["shards", "import", f"data={shards}", "--corrections", str(tmp_path / "new"), "by=A"]) == 0
    assert np.array_equal(read_mask(shards, Manifest.load(shards).record(record.key)), mask)
