"""The list of metrics: every entry can be computed, and the list costs little to import."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from bushpc.metrics.mask import MaskPair
from bushpc.metrics.registry import METRICS, label_metrics, mask_metrics


def test_every_metric_has_a_function_of_its_own_kind_and_a_grid() -> None:
    pair = MaskPair(
        prob=np.eye(4), mask=np.eye(4), pixel={"mm": (0.1, 0.1), "px": (2.0, 2.0)}, tolerance={"mm": 1.0, "px": 5.0}
    )
    of_masks = mask_metrics(pair, METRICS)
    of_labels = label_metrics(np.eye(3), np.arange(3))
    for name, metric in METRICS.items():
        value = of_masks[name] if metric.of == "masks" else of_labels[name] if metric.of == "labels" else metric.high
        best = metric.high if metric.more_is_better else metric.low
        assert metric.low <= value <= metric.high
        if metric.of != "pixels":
            assert value == pytest.approx(best, abs=1e-6), f"a perfect prediction has the best {name}"
        on = "original" if name.endswith("_original") else "network"
        assert metric.grid == (None if metric.of == "labels" else on)


def test_distances_in_millimetres_are_undefined_where_the_pixel_size_is_not_known() -> None:
    pair = MaskPair(prob=np.eye(4), mask=np.eye(4), pixel={"px": (1.0, 1.0)}, tolerance={"mm": 1.0, "px": 5.0})
    found = mask_metrics(pair, ("hd95_mm", "nsd_mm", "hd95_px", "nsd_px"))
    assert np.isnan([found["hd95_mm"], found["nsd_mm"]]).all()
    assert (found["hd95_px"], found["nsd_px"]) == (0.0, 1.0)


def test_the_list_of_metrics_is_imported_without_torch_or_scipy() -> None:
    script = "import sys, bushpc.metrics.registry; sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
