"""Papers' figures are shown where they belong and hold what the paper prints."""

import numpy as np
import pytest

from bushpc.report.published import find_published


def test_the_papers_folds_average_to_the_papers_mean_row() -> None:
    rows = dict(find_published("breast", "xbusnet", "fold_wise").rows)
    mean = rows.pop("Mean")
    for metric, printed in mean.items():
        assert np.mean([fold[metric] for fold in rows.values()]) == pytest.approx(printed, abs=0.5e-4 + 1e-9)


def test_the_papers_strata_weighted_by_measured_counts_give_its_overall_dice() -> None:
    strata = find_published("breast", "xbusnet", "strata").rows["XBusNet"]
    counts = {"0-110": 49, "111-250": 142, "250+": 61}  # lesions of BrEaST by longest side of their bounding box
    assert sum(counts[name] * strata[name]["dice"] for name in counts) / 252 == pytest.approx(0.8766, abs=5e-5)


@pytest.mark.parametrize("kind", ["overall", "strata", "fold_wise"])
@pytest.mark.parametrize(
    ("data", "model", "shown"),
    [
        ("breast", "xbusnet", True),
        ("breast", "xbusnet_small", True),
        ("phantom", "xbusnet", False),
        ("breast", "vit_diffusion", False),
        ("breast", "xbusnetwork", False),
    ],
)
def test_a_paper_is_shown_for_its_own_dataset_and_model_family_only(
    kind: str, data: str, model: str, shown: bool
) -> None:
    assert (find_published(data, model, kind) is not None) == shown


def test_a_baseline_of_the_paper_sees_its_tables_but_not_xbusnets_folds() -> None:
    assert find_published("breast", "unet", "overall").rows["UNet"]["dice"] == [0.604, 0.038]
    assert find_published("breast", "unet", "fold_wise") is None
