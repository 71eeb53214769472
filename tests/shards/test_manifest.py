"""Promises of the manifest: it comes back as it was saved, and no damage to it or to a tar goes unnamed."""

from __future__ import annotations

import dataclasses
import tarfile

import numpy as np
import pytest

from bushpc.errors import DataError
from bushpc.shards.card import PROJECT_SHARDS, Card
from bushpc.shards.manifest import Manifest, read_image, read_mask, verify
from bushpc.shards.sources import read
from bushpc.shards.write import pack

SMALL: dict[str, int | float] = {"count": 6, "normals": 1, "height": 64, "width": 80}


@pytest.fixture
def packed(tmp_path):
    return tmp_path, pack("phantom", None, tmp_path, parameters=SMALL, shard_samples=4)


def flip_byte(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_a_saved_manifest_loads_equal_and_saves_to_the_same_bytes(packed):
    folder, manifest = packed
    text = (folder / "manifest.json").read_bytes()
    loaded = Manifest.load(folder)
    assert loaded == manifest
    assert loaded.hash == manifest.hash
    loaded.save(folder)
    assert (folder / "manifest.json").read_bytes() == text


def test_the_hash_changes_with_any_fact(packed):
    _, manifest = packed
    record = dataclasses.replace(manifest.records[0], lesion_pixels=1)
    shard = dataclasses.replace(manifest.shards[0], sha256="0" * 64)
    others = [
        dataclasses.replace(manifest, excerpt=True),
        dataclasses.replace(manifest, records=[record, *manifest.records[1:]]),
        dataclasses.replace(manifest, shards=[shard, *manifest.shards[1:]]),
    ]
    assert len({manifest.hash, *(other.hash for other in others)}) == 4


def test_an_unpacked_folder_says_how_to_pack(tmp_path):
    folder = tmp_path / "breast"
    folder.mkdir()
    with pytest.raises(DataError, match=r"(?s)manifest\.json does not exist.*bushpc pack data=breast src=FOLDER"):
        Manifest.load(folder)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_cut_off_manifest_is_damaged(packed, share):
    folder, _ = packed
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(DataError, match="is damaged"):
        Manifest.load(folder)


def test_a_changed_number_in_the_manifest_is_noticed(packed):
    folder, manifest = packed
    path = folder / "manifest.json"
    pixels = f'"lesion_pixels": {manifest.records[0].lesion_pixels}'
    path.write_text(path.read_text().replace(pixels, '"lesion_pixels": 7'))
    with pytest.raises(DataError, match="is damaged"):
        Manifest.load(folder)


def test_pixels_come_back_as_the_source_made_them(packed):
    folder, manifest = packed
    card = Card.load(PROJECT_SHARDS / "phantom").override(SMALL)
    for sample in read("phantom", None, card):
        record = manifest.record(sample.key)
        image, mask = read_image(folder, record), read_mask(folder, record)
        assert image.dtype == mask.dtype == np.uint8
        assert np.array_equal(image, sample.image_HWC)
        assert np.array_equal(mask, sample.mask_HW)
        rows, columns = np.nonzero(sample.mask_HW)
        assert record.lesion_pixels == len(rows)
        if len(rows):
            assert record.lesion_length == max(rows.max() - rows.min(), columns.max() - columns.min()) + 1
        assert (record.patient, record.label, record.attributes) == (sample.patient, sample.label, sample.attributes)


def test_offsets_are_those_that_tarfile_finds(packed):
    folder, manifest = packed
    for shard in manifest.shards:
        with tarfile.open(folder / shard.file) as tar:
            members = {member.name: member for member in tar}
        for record in (record for record in manifest.records if record.shard == shard.file):
            image, mask = members[f"{record.key}.image.png"], members[f"{record.key}.mask.png"]
            assert (record.image_offset, record.image_bytes) == (image.offset_data, image.size)
            assert (record.mask_offset, record.mask_bytes) == (mask.offset_data, mask.size)
            assert (image.mtime, image.uid, image.uname, image.mode) == (0, 0, "", 0o644)


def test_lesions_leave_the_normals_out(packed):
    _, manifest = packed
    assert len(manifest.lesions) == 6
    assert "normal" not in {record.label for record in manifest.lesions}
    assert len(manifest.records) == 7


def test_an_unknown_key_is_named(packed):
    _, manifest = packed
    with pytest.raises(DataError, match="phantom has no sample 'case001': it has 7 samples"):
        manifest.record("case001")


def test_a_truncated_tar_is_named_by_verify_and_by_reading(packed):
    folder, manifest = packed
    tar = folder / "lesion-000000.tar"
    record = manifest.records[3]
    tar.write_bytes(tar.read_bytes()[: record.image_offset + 10])
    with pytest.raises(DataError, match=r"lesion-000000\.tar: \d+ bytes instead of"):
        verify(folder, manifest)
    with pytest.raises(DataError, match=rf"'{record.key}' in .*lesion-000000\.tar is cut off"):
        read_image(folder, record)


def test_every_bad_tar_is_named_at_once(packed):
    folder, manifest = packed
    (folder / "lesion-000000.tar").unlink()
    flip_byte(folder / "lesion-000001.tar", 5000)
    with pytest.raises(DataError, match=r"(?s)2 of 3 shards.*lesion-000000\.tar: missing.*lesion-000001\.tar: content"):
        verify(folder, manifest, deep=True)


def test_a_flipped_byte_anywhere_is_named_by_a_deep_verify(packed):
    folder, manifest = packed
    verify(folder, manifest, deep=True)
    tar = folder / "normal-000000.tar"
    for at in (0, 300, 512, tar.stat().st_size - 1):
        flip_byte(tar, at)
        with pytest.raises(DataError, match=r"normal-000000\.tar: content altered"):
            verify(folder, manifest, deep=True)
        flip_byte(tar, at)
    verify(folder, manifest, deep=True)


def test_a_flipped_byte_in_an_image_is_not_decoded_into_other_pixels(packed):
    folder, manifest = packed
    record = manifest.records[0]
    tar = folder / record.shard
    for at in range(record.image_offset, record.image_offset + record.image_bytes, 97):
        flip_byte(tar, at)
        with pytest.raises(DataError, match=rf"image of '{record.key}' in .*{record.shard}"):
            read_image(folder, record)
        flip_byte(tar, at)


def test_a_picture_of_another_size_than_stated_is_named(packed):
    folder, manifest = packed
    record = dataclasses.replace(manifest.records[0], width=81)
    with pytest.raises(DataError, match="has 80x64 pixels, the manifest says 81x64"):
        read_mask(folder, record)
