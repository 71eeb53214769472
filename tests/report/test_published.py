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
    assert sum(counts[name] * strata[name]["dice_2class"] for name in counts) / 252 == pytest.approx(0.8766, abs=5e-5)


@pytest.mark.parametrize("kind", ["overall", "strata", "fold_wise"])
@pytest.mark.parametrize(
    ("data", "model", "shown"),
    [
        ("breast", "xbusnet", True),
        ("breast", "xbusnet_small", True),
        ("phantom", "xbusnet", False),
        ("breast", "hybrid_attention", False),
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


def test_a_table_by_mask_class_holds_what_the_paper_prints_of_each() -> None:
    rows = find_published("refuge2", "vit_diffusion", "by_class").rows
    assert rows["Ours"] == {"disc": {"dice": 0.972, "iou": 0.922}, "cup": {"dice": 0.869, "iou": 0.751}}
    assert rows["MedSegDiff"]["cup"] == {"dice": 0.821, "iou": 0.726}
    assert find_published("refuge2", "vit_diffusion", "overall") is None  # it prints no mean of the two


@pytest.mark.parametrize(
    ("data", "row", "printed"),
    [
        ("busi", "Ours (w/ Full Samp.)", {"dice": 0.80, "iou": 0.76}),
        ("breast", "Ours (w/ Aux. Head)", {"dice": 0.90, "iou": 0.86}),
        ("bus_uclm", "Ours (w/ Aux. Head)", {"dice": 0.97, "iou": 0.95}),
        ("isic2018", "Ours", {"dice": 0.941, "iou": 0.865}),
        ("brats2021", "Ours", {"dice": 0.897, "iou": 0.843}),
    ],
)
def test_a_paper_of_six_datasets_is_shown_for_each_with_that_ones_figures(data: str, row: str, printed: dict) -> None:
    assert find_published(data, "vit_diffusion", "overall").rows[row] == printed


def test_distances_whose_unit_cannot_be_right_stand_beside_nothing_and_the_table_says_so() -> None:
    for kind in ("overall", "ablation"):
        table = find_published("precise", "sam_multitask", kind)
        assert not {"hd95_mm", "hd95_px", "hd95_network_px", "nsd_mm", "nsd_px"} & set(table.metrics)
        assert "probably pixels" in table.note
    ablation = find_published("busi", "vit_diffusion", "ablation")
    assert ablation.rows["Enhanced Loss (with TDC)"]["hd95_network_px"] == 0.74
    assert "hd95_px" not in ablation.metrics
    assert "inferred" in ablation.note
