"""Promises of duplicates: changed copies are found, unrelated scans are not, and copies never straddle a split."""

from __future__ import annotations

import csv
import io

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bushpc.cli import main
from bushpc.shards import duplicates
from bushpc.shards.duplicates import (
    EDGE,
    Pair,
    aligned_correlation,
    find_pairs,
    fingerprint_of,
    group,
    perceptual_hash,
    tie_patients,
)
from bushpc.shards.manifest import Manifest, Record, read_image
from bushpc.shards.split import make_folds, read_fold_numbers


def record(key, patient, label="benign"):
    place = {"shard": "lesion-000000.tar", "image_offset": 0, "image_bytes": 1, "mask_offset": 2, "mask_bytes": 1}
    size = {"height": 8, "width": 8, "lesion_pixels": 4, "lesion_length": 2}
    return Record(key=key, patient=patient, label=label, attributes={}, pixel_mm=None, **size, **place)


@pytest.fixture(scope="module")
def scans(phantom_folder):
    """24 unrelated scans, 4 of them without a lesion."""
    manifest = Manifest.load(phantom_folder)
    return [read_image(phantom_folder, record) for record in manifest.records]


def re_encoded(scan):
    stream = io.BytesIO()
    Image.fromarray(scan).save(stream, "JPEG", quality=50)
    return np.array(Image.open(stream))


def resized(scan):
    return np.array(Image.fromarray(scan).resize((300, 260)))


def brightened(scan):
    return np.clip(scan * 1.3 + 15, 0, 255).astype(np.uint8)


def mirrored(scan):
    return scan[:, ::-1]


def cropped(scan):
    height, width = scan.shape[:2]
    return scan[int(0.03 * height) : int(0.99 * height), int(0.02 * width) : int(0.96 * width)]


def everything(scan):
    return mirrored(re_encoded(brightened(resized(cropped(scan)))))


def cut(side, share):
    def change(scan):
        height, width = scan.shape[:2]
        rows, columns = round(share * height), round(share * width)
        return {
            "top": scan[rows:], "bottom": scan[: height - rows],
            "left": scan[:, columns:], "right": scan[:, : width - columns],
        }[side]  # fmt: skip

    change.__name__ = f"{side} by {share}"
    return change


def with_calipers(scan):
    scan = scan.copy()
    height, width = scan.shape[:2]
    for x, y in (
        (width // 4, height // 3),
        (width // 2, height // 3),
        (width // 3, height // 5),
        (width // 3, height // 2),
    ):
        scan[y - 1 : y + 2, x - 6 : x + 7] = scan[y - 6 : y + 7, x - 1 : x + 2] = 255
    return scan


def cut_and_marked(scan):
    return brightened(with_calipers(cut("bottom", 0.22)(scan)))


def cut_and_mirrored(scan):
    return cut("left", 0.18)(mirrored(scan))


CUTS = [cut(side, share) for side in ("top", "bottom", "left", "right") for share in (0.1, 0.2, 0.29, 0.35)]


@pytest.mark.parametrize("change", [*CUTS, with_calipers, cut_and_marked, cut_and_mirrored], ids=lambda c: c.__name__)
def test_copies_that_were_cropped_on_one_side_or_marked_are_found(scans, change):
    copies = [fingerprint_of(np.ascontiguousarray(scan)) for scan in (*scans, *map(change, scans))]
    pairs = {(pair.first, pair.second): pair for pair in find_pairs(copies)}
    assert set(pairs) == {(i, i + len(scans)) for i in range(len(scans))}
    assert {pair.mirrored for pair in pairs.values()} == {change is cut_and_mirrored}


def test_bus_bras_cases_that_show_the_same_frames_are_found_and_kept_together(real_data, tmp_path, capsys):
    """Cases 44 = 65, 56 = 91 and 341 = 356, both images of each, among 30 others."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    pairs = {("0044", "0065"), ("0056", "0091"), ("0341", "0356")}
    cases = {case for pair in pairs for case in pair} | {f"{number:04d}" for number in range(100, 130)}
    for part, pattern in (("Images", "bus_*"), ("Masks", "mask_*")):
        (raw / part).mkdir(parents=True)
        for path in (real_data / "bus_bra" / "BUSBRA" / part).glob(f"{pattern}.png"):
            if path.stem.split("_")[1][:4] in cases:
                (raw / part / path.name).symlink_to(path)
    for name in ("bus_data.csv", "5-fold-cv.csv"):
        (raw / name).symlink_to(real_data / "bus_bra" / "BUSBRA" / name)
    assert main(["pack", "data=bus_bra", f"src={raw}", f"out={out}", "excerpt=true"]) == 0
    main(["shards", "audit", f"data={out}", f"out={tmp_path / 'page'}", "folds=published"])
    with (tmp_path / "page" / "pairs.csv").open() as file:
        found = {(row["key"], row["other_key"]) for row in csv.DictReader(file)}
    assert {(one[4:8], other[4:8]) for one, other in found} == pairs
    assert len(found) == 6
    assert "What a 0 here cannot see" in (tmp_path / "page" / "index.html").read_text()
    assert main(["shards", "folds", f"data={out}", "duplicates=group"]) == 0
    folds = read_fold_numbers(out / "folds_grouped.csv")
    assert all(folds[one] == folds[other] for one, other in found)


CHANGES = [re_encoded, resized, brightened, mirrored, cropped, everything]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found_and_nothing_else(scans, change):
    fingerprints = [fingerprint_of(np.ascontiguousarray(scan)) for scan in (*scans, *map(change, scans))]
    pairs = find_pairs(fingerprints)
    assert [(pair.first, pair.second) for pair in pairs] == [(i, i + len(scans)) for i in range(len(scans))]
    assert {pair.mirrored for pair in pairs} == {change in (mirrored, everything)}
    assert not any(pair.identical for pair in pairs)


def test_identical_pixels_are_told_from_near_ones(scans):
    fingerprints = [fingerprint_of(scan) for scan in (scans[0], scans[0].copy(), re_encoded(scans[0]))]
    assert [(pair.first, pair.second, pair.identical) for pair in find_pairs(fingerprints)] == [
        (0, 1, True),
        (0, 2, False),
        (1, 2, False),
    ]
    again = find_pairs([fingerprint_of(scan) for scan in (*scans, *scans)])
    assert again == [Pair(i, i + len(scans), True, False, 1.0) for i in range(len(scans))]


def test_many_copies_of_a_picture_are_one_group_without_aligning_every_pair(scans, monkeypatch):
    calls = []
    monkeypatch.setattr(duplicates, "aligned_correlation", lambda *two: calls.append(1) or aligned_correlation(*two))
    rng = np.random.default_rng(0)

    def cut(scan):
        (top, bottom), (left, right) = (rng.integers(0, side // 16, 2) for side in scan.shape[:2])
        return np.ascontiguousarray(scan[top : scan.shape[0] - bottom, left : scan.shape[1] - right])

    copies = [cut(scan) for _ in range(20) for scan in scans[:3]]
    pairs = find_pairs([fingerprint_of(copy) for copy in copies])
    groups = group(len(copies), pairs)
    assert [groups[i] for i in range(len(copies))] == groups[:3] * 20
    assert len(set(groups[:3])) == 3
    assert len(calls) < 3 * 60  # of the 570 pairs within the groups
    assert len(pairs) < 570


def test_empty_images_are_not_one_picture():
    black = fingerprint_of(np.zeros((80, 90, 3), np.uint8))
    assert find_pairs([black, black]) == []
    assert find_pairs([]) == []


def test_images_of_four_channels_are_compared_too(scans):
    four = [np.dstack([scan, scan[..., 0] // 2]) for scan in scans[:3]]
    pairs = find_pairs([fingerprint_of(image) for image in (*four, four[1])])
    assert [(pair.first, pair.second, pair.identical) for pair in pairs] == [(1, 3, True)]


def test_the_hash_is_the_sign_of_the_lowest_cosine_terms_about_their_median(scans):
    small = fingerprint_of(scans[0]).small_HW
    coarse = small.reshape(32, 2, 32, 2).mean(axis=(1, 3))
    row = (np.arange(32) + 0.5) * np.pi / 32
    terms = []
    for u in range(8):
        for v in range(8):
            scale = (0.5 if u == 0 else 1) ** 0.5 * (0.5 if v == 0 else 1) ** 0.5
            terms.append(scale * np.cos(u * row) @ coarse @ np.cos(v * row))
    above = np.array(terms) > np.median(terms[1:])
    assert perceptual_hash(small[None]).tolist() == [int(np.packbits(above).view(np.uint64)[0])]


def test_alignment_undoes_a_shift_and_a_stretch():
    rng = np.random.default_rng(0)
    row, column = np.mgrid[:EDGE, :EDGE] / EDGE
    waves = [(rng.uniform(2, 9, 2), rng.uniform(0, 6)) for _ in range(12)]

    def picture(row, column):
        return sum(np.sin(2 * np.pi * (a * row + b * column) + phase) for (a, b), phase in waves)

    one, other = picture(row, column), picture(0.95 * row + 0.03, 1.04 * column - 0.02)
    assert np.corrcoef(one.ravel(), other.ravel())[0, 1] < 0.8
    assert aligned_correlation(one, other) > 0.98


edges = st.lists(st.tuples(st.integers(0, 14), st.integers(0, 14)).filter(lambda edge: edge[0] < edge[1]), max_size=15)


def pairs_of(drawn):
    return [Pair(i, j, True, False, 1.0) for i, j in drawn]


@settings(deadline=None)
@given(edges)
def test_copies_of_copies_are_of_one_group(drawn):
    graph = networkx.Graph(drawn)
    graph.add_nodes_from(range(15))
    groups = group(15, pairs_of(drawn))
    expected = {frozenset(part) for part in networkx.connected_components(graph)}
    assert {frozenset(i for i in range(15) if groups[i] == number) for number in groups} == expected


@settings(deadline=None)
@given(
    edges, st.lists(st.tuples(st.integers(0, 11), st.sampled_from(["benign", "malignant"])), min_size=15, max_size=15)
)
def test_neither_copies_nor_patients_straddle_grouped_folds(drawn, scans):
    records = [record(f"scan{i:02d}", f"patient{patient:02d}", label) for i, (patient, label) in enumerate(scans)]
    tied = tie_patients(records, pairs_of(drawn))
    assert [each.key for each in tied] == [each.key for each in records]
    if len({each.patient for each in tied}) < 2:
        return
    folds = make_folds(tied, k=2)
    for i, j in drawn:
        assert folds[records[i].key] == folds[records[j].key]
    for one in records:
        for other in records:
            assert one.patient != other.patient or folds[one.key] == folds[other.key]


def test_without_pairs_grouped_folds_are_those_of_make_folds():
    records = [record(f"scan{i:02d}", f"patient{i // 2:02d}", ("benign", "malignant")[i % 4 // 2]) for i in range(20)]
    assert make_folds(tie_patients(records, [])) == make_folds(records)
