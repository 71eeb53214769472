"""Promises of folds: patients are never divided, labels are spread evenly, and a fold file that leaks is refused."""

from __future__ import annotations

import csv
import dataclasses
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bushpc.errors import ConfigError, DataError
from bushpc.shards.card import PROJECT_SHARDS
from bushpc.shards.manifest import Manifest, Record
from bushpc.shards.split import (
    Folds,
    ensure_folds,
    find_folds,
    load_folds,
    make_folds,
    write_folds,
)


def record(key, patient=None, label="benign"):
    place = {"shard": "lesion-000000.tar", "image_offset": 0, "image_bytes": 1, "mask_offset": 2, "mask_bytes": 1}
    size = {"height": 8, "width": 8, "lesion_pixels": 4, "lesion_length": 2}
    return Record(key=key, patient=patient or key, label=label, attributes={}, pixel_mm=None, **size, **place)


def cohort(benign, malignant):
    labels = ["benign"] * benign + ["malignant"] * malignant
    return [record(f"case{number:03d}", label=label) for number, label in enumerate(labels)]


patients = st.lists(
    st.tuples(st.sampled_from(["benign", "malignant"]), st.integers(1, 4)), min_size=5, max_size=60
)  # (label, scans) of every patient


def scans_of(drawn):
    return [
        record(f"scan{number:03d}x{scan}", f"patient{number:03d}", label)
        for number, (label, scans) in enumerate(drawn)
        for scan in range(scans)
    ]


@settings(max_examples=100, deadline=None)
@given(patients, st.integers(2, 5), st.integers(0, 3))
def test_no_patient_is_in_two_folds_and_nobody_is_left_out(drawn, k, seed):
    records = scans_of(drawn)
    folds = make_folds(records, k, seed)
    assert set(folds) == {record.key for record in records}
    assert set(folds.values()) == set(range(k))
    homes = {}
    for scan in records:
        assert homes.setdefault(scan.patient, folds[scan.key]) == folds[scan.key]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(2, 5), st.integers(0, 3))
def test_with_one_scan_a_patient_labels_and_sizes_are_within_one_of_even(benign, malignant, k, seed):
    if benign + malignant < k:
        return
    records = cohort(benign, malignant)
    folds = make_folds(records, k, seed)
    for label in ("benign", "malignant"):
        counts = Counter({fold: 0 for fold in range(k)})
        counts.update(folds[scan.key] for scan in records if scan.label == label)
        assert max(counts.values()) - min(counts.values()) <= 1
    sizes = Counter(folds.values())
    assert max(sizes.values()) - min(sizes.values()) <= 1


@settings(deadline=None)
@given(patients, st.randoms())
def test_folds_depend_on_records_and_seed_alone(drawn, random):
    records = scans_of(drawn)
    shuffled = list(records)
    random.shuffle(shuffled)
    assert make_folds(records, 3, 1) == make_folds(shuffled, 3, 1)


def test_another_seed_gives_other_folds():
    records = cohort(60, 40)
    assert make_folds(records, 5, 0) != make_folds(records, 5, 1)


@settings(max_examples=100, deadline=None)
@given(patients, st.lists(st.integers(0, 70), max_size=40), st.integers(2, 5))
def test_normal_scans_move_no_lesion_stay_with_their_patient_and_are_spread_evenly(drawn, owners, k):
    lesions = scans_of(drawn)
    normals = [record(f"normal{i:03d}", f"patient{owner:03d}", "normal") for i, owner in enumerate(owners)]
    alone = [record(f"alone{i:03d}", label="normal") for i in range(7)]
    folds = make_folds([*lesions, *normals, *alone], k)
    assert folds.keys() == {scan.key for scan in [*lesions, *normals, *alone]}
    assert {scan.key: folds[scan.key] for scan in lesions} == make_folds(lesions, k)
    homes = {}
    for scan in [*lesions, *normals]:
        assert homes.setdefault(scan.patient, folds[scan.key]) == folds[scan.key]
    if not owners:
        counts = Counter(folds[scan.key] for scan in alone)
        assert max(counts.values()) - min(counts[fold] for fold in range(k)) <= 1


def test_normal_scans_take_part_where_they_are_asked_for(tmp_path):
    records = [*cohort(6, 4), record("case998", label="normal"), record("case999", label="normal")]
    write_folds(tmp_path / "folds.csv", records, make_folds(records))
    lesions, whole = (load_folds(tmp_path / "folds.csv", records, normals=asked) for asked in (False, True))
    assert lesions.fold_by_key == make_folds(records[:10])
    assert whole.fold_by_key == make_folds(records)


def test_folds_of_lesions_alone_serve_until_normal_scans_are_asked_for(tmp_path):
    records = [*cohort(6, 4), record("case999", label="normal")]
    write_folds(tmp_path / "folds.csv", records, make_folds(records[:10]))
    assert load_folds(tmp_path / "folds.csv", records).fold_by_key == make_folds(records[:10])
    with pytest.raises(DataError, match=r"no fold of the 1 normal scans. Set folds=frozen .*or data.normals=false"):
        load_folds(tmp_path / "folds.csv", records, normals=True)
    assert load_folds(tmp_path / "folds.csv", records[:10], normals=True).fold_by_key == make_folds(records[:10])


def test_fewer_patients_than_folds_is_refused():
    records = [record(f"case{number}", f"patient{number % 4}") for number in range(20)]
    with pytest.raises(DataError, match="4 patients cannot be divided into 5 folds"):
        make_folds(records)
    with pytest.raises(ConfigError, match="k=1"):
        make_folds(records, k=1)


def test_written_folds_load_equal_in_the_manifests_order(tmp_path):
    records = cohort(12, 8)[::-1]
    drawn = make_folds(records)
    write_folds(tmp_path / "folds.csv", records, drawn)
    folds = load_folds(tmp_path / "folds.csv", records)
    assert folds == Folds(fold_by_key=drawn)
    assert list(folds.fold_by_key) == [record.key for record in records]
    for fold in range(5):
        train, validation = folds.train(fold), folds.validation(fold)
        assert len(train) == 16
        assert len(validation) == 4
        assert sorted(train + validation) == sorted(drawn)
        assert train == [record.key for record in records if record.key in train]


@pytest.mark.parametrize("fold", [5, 7, -1, "1", True])
def test_a_fold_that_does_not_exist_names_those_that_do(fold):
    folds = Folds(fold_by_key=make_folds(cohort(10, 10)))
    with pytest.raises(ConfigError, match=rf"fold={fold} does not exist: there are 5 folds, 0 to 4"):
        folds.train(fold)
    with pytest.raises(ConfigError):
        folds.validation(fold)


def saved(tmp_path, lines):
    path = tmp_path / "folds.csv"
    path.write_text("\n".join(["key,patient,label,fold", *lines]) + "\n")
    return path


LESIONS = [record("a1", "ann"), record("a2", "ann"), record("b1", "bea", "malignant")]
RECORDS = [*LESIONS, record("n1", "ann", "normal"), record("n2", "dot", "normal")]


A1, A2, B1 = "a1,ann,benign,0", "a2,ann,benign,0", "b1,bea,malignant,1"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([A1, "a2,ann,benign,1", B1], r"patients in more than one fold: ann \(folds 0, 1\)"),
        ([A1, B1], "lesions without a fold: a2"),
        ([A1, A2, B1, "c1,cyd,benign,1"], r"keys that no packed scan has: c1 \(row 5\)"),
        ([A1, A2, B1, "n1,ann,normal,1"], r"patients in more than one fold: ann \(folds 0, 1\)"),
        ([A1, A2, B1, "n2,dot,normal,1"], r"normal scans without a fold: n1"),
        ([A1, "a1,ann,benign,1", A2, B1], r"keys in two rows: a1 \(again in row 3\)"),
        ([A1, "a2,eve,benign,0", B1], r"differs from the packed one: a2 \(row 3\)"),
        ([A1, A2, "b1,bea,benign,1"], r"differs from the packed one: b1 \(row 4\)"),
        (["a1,ann,benign,x", A2, B1], "row 2: fold is 'x'"),
        ([A1, A2, "b1,bea,malignant,2"], "without gaps"),
        ([A1, "a2,ann"], "row 3: too few cells"),
    ],
)
def test_a_fold_file_that_leaks_or_does_not_fit_is_refused_by_name(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        load_folds(saved(tmp_path, lines), RECORDS)


def test_a_fold_file_without_a_column_is_refused(tmp_path):
    path = tmp_path / "folds.csv"
    path.write_text("key,label,fold\na1,benign,0\n")
    with pytest.raises(DataError, match="lacks the column patient; it has: key, label, fold"):
        load_folds(path, RECORDS)
    with pytest.raises(DataError, match=r"none\.csv does not exist"):
        load_folds(tmp_path / "none.csv", RECORDS)


def test_an_excerpt_uses_its_part_of_the_frozen_folds(tmp_path):
    records = cohort(12, 8)
    write_folds(tmp_path / "folds.csv", records, make_folds(records))
    with pytest.raises(DataError, match="no packed scan has"):
        load_folds(tmp_path / "folds.csv", records[:15])
    whole, part = load_folds(tmp_path / "folds.csv", records), load_folds(tmp_path / "folds.csv", records[:15], True)
    assert part.fold_by_key == {record.key: whole.fold_by_key[record.key] for record in records[:15]}


def phantom(folder, records):
    manifest = Manifest(dataset="phantom", packer_version=1, excerpt=False, records=records)
    manifest.save(folder)
    return manifest


def test_folds_are_made_where_there_are_none_and_then_stay(tmp_path):
    manifest = phantom(tmp_path, cohort(12, 8))
    path = ensure_folds(tmp_path, manifest)
    assert load_folds(path, manifest.lesions).fold_by_key == make_folds(manifest.records)
    other = make_folds(manifest.records, seed=5)
    write_folds(path, manifest.records, other)
    ensure_folds(tmp_path, manifest)
    assert load_folds(path, manifest.lesions).fold_by_key == other


def test_folds_of_another_phantom_are_made_anew(tmp_path):
    ensure_folds(tmp_path, phantom(tmp_path, cohort(12, 8)))
    manifest = phantom(tmp_path, cohort(5, 5))
    assert set(load_folds(ensure_folds(tmp_path, manifest), manifest.lesions).fold_by_key) == {
        record.key for record in manifest.lesions
    }


def test_frozen_folds_of_a_real_dataset_are_never_overwritten(tmp_path):
    manifest = dataclasses.replace(phantom(tmp_path, cohort(12, 8)), dataset="breast")
    text = saved(tmp_path, ["case000,case000,benign,0"]).read_text()
    with pytest.raises(DataError, match=r"(?s)lesions without a fold.*such as of an excerpt, move"):
        ensure_folds(tmp_path, manifest)
    assert (tmp_path / "folds.csv").read_text() == text


def test_a_folder_elsewhere_uses_the_folds_that_the_project_ships(tmp_path):
    manifest = dataclasses.replace(phantom(tmp_path, cohort(12, 8)), dataset="breast")
    assert find_folds(manifest, tmp_path, "published") == PROJECT_SHARDS / "breast" / "folds_published.csv"
    with pytest.raises(ConfigError, match=r"unknown folds 'publisht'; did you mean 'published'"):
        find_folds(manifest, tmp_path, "publisht")
    with pytest.raises(DataError, match=r"no folds_published\.csv"):
        find_folds(dataclasses.replace(manifest, dataset="phantom"), tmp_path, "published")


@pytest.mark.parametrize("file", ["folds.csv", "folds_published.csv"])
def test_the_frozen_breast_folds_are_five_of_252_patients(file):
    with (PROJECT_SHARDS / "breast" / file).open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    normals = [row for row in rows if row["label"] == "normal"]
    assert len({row["fold"] for row in normals}) == len(normals) == (4 if file == "folds.csv" else 0)
    rows = [row for row in rows if row not in normals]
    assert len({row["key"] for row in rows}) == len({row["patient"] for row in rows}) == 252
    assert Counter(row["label"] for row in rows) == {"benign": 154, "malignant": 98}
    assert sorted(Counter(row["fold"] for row in rows).values()) == [50, 50, 50, 51, 51]


def test_the_frozen_breast_folds_are_what_make_folds_draws():
    with (PROJECT_SHARDS / "breast" / "folds.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    records = [record(row["key"], row["patient"], row["label"]) for row in rows]
    assert make_folds(records, k=5, seed=0) == {row["key"]: int(row["fold"]) for row in rows}


def test_the_published_folds_in_the_tree_are_xbusnets_own(real_data):
    with (PROJECT_SHARDS / "breast" / "folds_published.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    records = [record(row["key"], row["patient"], row["label"]) for row in rows]
    folds = load_folds(PROJECT_SHARDS / "breast" / "folds_published.csv", records)
    for fold in range(5):
        for name, keys in (("train", folds.train(fold)), ("val", folds.validation(fold))):
            with (real_data / "xbusnet_folds" / f"{name}_fold{fold}.csv").open(newline="", encoding="utf-8") as stream:
                assert {f"{key}.png" for key in keys} == {row["Image Name"] for row in csv.DictReader(stream)}
