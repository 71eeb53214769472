"""Promises of a fold's parts: held-out patients stay out, labels keep their shares, rare labels come as often."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bushpc.config import compose
from bushpc.data.members import fold_members, hold_out, repeats
from bushpc.errors import ConfigError
from bushpc.shards.split import Folds


def scans(*labels: str, each: int = 1):
    return [
        SimpleNamespace(key=f"k{i}s{scan}", patient=f"p{i}", label=label)
        for i, label in enumerate(labels)
        for scan in range(each)
    ]


@settings(deadline=None)
@given(
    benign=st.integers(1, 40), malignant=st.integers(0, 40), each=st.integers(1, 3), seed=st.integers(0, 99),
    share=st.sampled_from([0.1, 0.2, 0.5]),
)  # fmt: skip
def test_no_patient_is_divided_and_every_label_gives_its_share(benign, malignant, each, seed, share):
    whole = scans(*["benign"] * benign, *["malignant"] * malignant, each=each)
    train, held = hold_out(whole, share, seed)
    assert sorted(s.key for s in train + held) == sorted(s.key for s in whole)
    assert not {s.patient for s in train} & {s.patient for s in held}
    for label, count in (("benign", benign), ("malignant", malignant)):
        got = sum(s.label == label for s in held)
        assert abs(got - share * count * each) <= max(each / 2, share * each)
        assert not count or any(s.label == label for s in train)


def test_the_same_seed_holds_out_the_same_and_another_one_others():
    whole = scans(*["benign"] * 30)
    first, again, other = (
        {s.key for s in hold_out(part, 0.2, seed)[1]} for part, seed in ((whole, 0), (whole[::-1], 0), (whole, 1))
    )
    assert first == again != other


def test_nothing_is_held_out_where_nothing_asks():
    whole = scans("benign", "malignant")
    assert hold_out(whole, 0.0, 0) == (whole, [])


def test_balance_draws_rare_labels_about_as_often():
    # The counts of the SAM multi-task paper's Table 1.
    whole = scans(*["benign"] * 1553, *["malignant"] * 765, *["normal"] * 182)
    drawn: Counter[str] = Counter()
    for scan, times in zip(whole, repeats(whole, balance=True), strict=True):
        drawn[scan.label] += times
    assert drawn == {"benign": 1553, "malignant": 2 * 765, "normal": 9 * 182}
    assert set(repeats(whole, balance=False)) == {1}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("train.iterations=70",), 70),
        (("train.epochs=3",), 8),  # 3 x 20 samples in batches of 8
        (("train.epochs=3", "train.balance=true"), 12),  # 15 benign and 3 x 5 malignant
        (("train.epochs=3", "train.holdout=0.2", "train.stop_patience=2"), 6),  # 3 benign and 1 malignant held out
    ],
)
def test_epochs_are_counted_in_steps(words, expected):
    config = compose(["model=unet_small", "data=phantom", "train.batch_size=8", *words])
    members = fold_of(config, scans(*["benign"] * 15, *["malignant"] * 5))
    assert members.steps(config.train) == expected


def test_a_share_that_holds_out_nobody_is_refused_before_anything_runs():
    words = ["model=unet_small", "data=phantom", "train.holdout=0.01", "train.stop_patience=2"]
    with pytest.raises(ConfigError, match=r"train\.holdout=0\.01: of the fold's 40 training scans"):
        fold_of(compose(words), scans(*["benign"] * 40))


def test_every_scan_trains_tunes_or_validates_and_none_does_two_of_them():
    words = ["model=unet_small", "data=phantom", "train.holdout=0.2", "train.stop_patience=2"]
    whole = scans(*["benign"] * 20, *["malignant"] * 10, *["normal"] * 5)
    folds = Folds(fold_by_key={scan.key: i % 5 for i, scan in enumerate(whole)})
    for normals in (False, True):
        members = fold_members(whole, folds, 2, compose([*words, f"data.normals={str(normals).lower()}"]))
        parts = [[scan.key for scan in part] for part in (members.train, members.holdout, members.validation)]
        assert sorted(itertools.chain(*parts)) == sorted(s.key for s in whole if normals or s.label != "normal")
        assert all(parts)
        assert {folds.fold_by_key[key] for key in parts[2]} == {2}
        assert members.draws == dict.fromkeys(parts[0], 1)


def test_a_fold_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="fold=1 does not exist"):
        fold_members(scans("benign"), Folds(fold_by_key={"k0s0": 0}), 1, compose(["model=unet_small", "data=phantom"]))


def fold_of(config, part):
    """Fold 0, which `part` trains, of a dataset with one more scan to validate."""
    alone = SimpleNamespace(key="alone", patient="alone", label="benign")
    folds = Folds(fold_by_key={scan.key: int(scan is not alone) for scan in (*part, alone)})
    return fold_members([*part, alone], folds, 0, config)
