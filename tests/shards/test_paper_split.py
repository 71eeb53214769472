"""Promises of papers' single splits: the paper's counts, drawn once and frozen, and refused where they cannot be."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from bushpc.config import compose
from bushpc.config.paper_splits import SPLITS, split_of
from bushpc.data.members import fold_members
from bushpc.errors import ConfigError, DataError
from bushpc.shards.paper_split import draw_split
from bushpc.shards.split import TRAIN, TUNE, load_folds, write_folds
from tests.shards.test_split import record

BUSI = {"benign": 437, "malignant": 210, "normal": 133}
UDIAT = {"benign": 110, "malignant": 53}


def cohort(counts):
    return [record(f"{label}{i:04d}", label=label) for label, count in counts.items() for i in range(count)]


@pytest.mark.parametrize(
    ("source", "counts", "sizes"),
    [
        ("tumor_generator_split", BUSI, {TRAIN: 396, TUNE: 54, 0: 197}),
        ("hybrid_attention_split", BUSI, {TRAIN: 700, 0: 80}),
        ("tumor_generator_split", UDIAT, {TRAIN: 130, 0: 33}),
    ],
)
def test_parts_have_the_papers_sizes_and_the_datasets_shares_of_labels(source, counts, sizes):
    records = cohort(counts)
    split = split_of(source, "busi" if counts is BUSI else "udiat")
    drawn = draw_split(records, split)
    assert Counter(drawn.values()) == sizes
    assert drawn == draw_split(records[::-1], split)
    assert drawn != draw_split(records, split, seed=1)
    known = [each for each in records if each.key in drawn]
    for part, size in sizes.items():
        labels = Counter(each.label for each in known if drawn[each.key] == part)
        for label, count in Counter(each.label for each in known).items():
            assert abs(labels[label] - size * count / len(known)) < 2


def test_a_share_is_that_of_every_class_and_divides_no_patient():
    records = [record(f"p{i}_{k}", f"p{i}", ("benign", "malignant")[i % 3 == 0]) for i in range(200) for k in range(2)]
    drawn = draw_split(records, split_of("sam_multitask_split", "precise"))
    tests = [each for each in records if drawn[each.key] == 0]
    for label, count in Counter(each.label for each in records).items():
        assert abs(Counter(each.label for each in tests)[label] - 0.2 * count) <= 2
    assert not {each.patient for each in tests} & {each.patient for each in records if drawn[each.key] == TRAIN}


def test_a_split_larger_than_the_dataset_is_refused_with_what_would_work():
    with pytest.raises(DataError, match=r"133 training and 33 test scans, 166 in all, and 163 .*tumor_generator_split"):
        draw_split(cohort(UDIAT), split_of("hybrid_attention_split", "udiat"))
    with pytest.raises(DataError, match="folds=frozen"):
        draw_split(cohort({"benign": 40}), split_of("tumor_generator_split", "udiat"))


def test_only_the_first_part_trains_and_the_papers_validation_part_follows_the_schedule(tmp_path):
    records = cohort(BUSI)
    write_folds(tmp_path / "folds.csv", records, draw_split(records, split_of("tumor_generator_split", "busi")))
    folds = load_folds(tmp_path / "folds.csv", records)
    assert folds.count == 1
    cell = compose(["model=unet_small", "data=busi", "cluster=local"])
    members = fold_members(records, folds, 0, cell)
    assert [len(part) for part in (members.train, members.holdout, members.validation)] == [396, 54, 197]
    assert len(folds.train(0)) == 396
    with pytest.raises(ConfigError, match="fold=1 does not exist"):
        folds.validation(1)


def test_paper_split_is_that_of_the_models_paper():
    def chosen(model, data):
        return compose([f"model={model}", f"data={data}", "folds=paper_split", "cluster=local"]).folds

    assert chosen("hybrid_attention", "busi") == "hybrid_attention_split"
    assert chosen("tumor_generator_small", "busi") == "tumor_generator_split"
    assert chosen("unet", "precise") == "sam_multitask_split"
    with pytest.raises(ConfigError, match="more than one paper splits busi"):
        chosen("unet", "busi")
    with pytest.raises(ConfigError, match="busi, precise, udiat"):
        chosen("xbusnet", "breast")


def test_the_word_is_known_for_every_split():
    for split in SPLITS:
        cell = compose(["model=unet_small", f"data={split.data}", f"folds={split.source}", "cluster=local"])
        assert dataclasses.replace(cell).folds == split.source
