"""One image → its row of per_image.csv: facts, counts of pixels, metrics by mask class and on each grid.

probability map, mask at the network's size ─┐
… brought to the scan's size, packed mask ───┴→ `MaskPair` of each class → metrics → row
"""

from __future__ import annotations

import math
import typing as t
from dataclasses import replace

import numpy as np
import torch

from bushpc.conditions import COLUMNS as CONDITION_COLUMNS
from bushpc.conditions import columns_of
from bushpc.config import CellConfig
from bushpc.config.evaluate import EvaluateConfig
from bushpc.data.loader import FoldData
from bushpc.evaluate.components import processed
from bushpc.evaluate.views import resized
from bushpc.metrics.mask import Confusion, MaskPair, Spacing
from bushpc.metrics.registry import ALWAYS, METRICS, mask_metrics, on_original
from bushpc.runs.chosen import Rule
from bushpc.sample import LABELS, Batch, Prediction
from bushpc.shards.manifest import Record, read_mask

COLUMNS = (
    *("key", "patient", "label", "fold", "prompts", *ALWAYS, "tp", "fp", "fn", "tn"),
    *("length_px", *CONDITION_COLUMNS),
)


def prob_column(label: str) -> str:
    """The column with a label's probability."""
    return f"prob_{label}"


def image_row(
    cell: CellConfig,
    data: FoldData,
    batch: Batch,
    prediction: Prediction,
    i: int,
    source: str,
    prob_KHW: np.ndarray | None,
    mask_KHW: np.ndarray,
) -> dict[str, t.Any]:
    """The row of image `i` of a batch. source: of its prompts. prob_KHW: its map, None if the model makes none."""
    record = data.manifest.record(batch.keys[i])
    used = batch.conditions | (prediction.conditions or {})
    classes = data.manifest.mask_classes
    counts, by_class = Confusion(*[np.zeros(len(classes), int)] * 4), {}
    if prob_KHW is not None:
        pairs = [pair_of(cell.evaluate, record, *of_class) for of_class in zip(prob_KHW, mask_KHW, strict=True)]
        counts = Confusion(*map(np.array, zip(*(pair.counts for pair in pairs), strict=True)))
        wanted = (*ALWAYS, *cell.evaluate.metrics)
        by_class = {name: mask_metrics(pair, wanted) for name, pair in zip(classes, pairs, strict=True)}
        if cell.evaluate.resolution == "original":
            on_scan = _on_original(cell, data, record, prob_KHW, wanted)
            by_class = {name: by_class[name] | on_scan[name] for name in classes}
    measured = mean_of_classes(list(by_class.values()))
    if prediction.scores is not None:
        measured |= {name: float(score_B[i]) for name, score_B in prediction.scores.items()}
    row = {
        "key": record.key,
        "patient": record.patient,
        "label": record.label,
        "fold": cell.fold,
        "prompts": source,
        **{name: measured.get(name, float("nan")) for name in ALWAYS},
        **{name: int(of_class_K.sum()) for name, of_class_K in counts._asdict().items()},
        "length_px": record.lesion_length,
        **columns_of(record, data.conditions, used, i),
    }
    assert tuple(row)[: len(COLUMNS)] == COLUMNS
    row |= {name: measured[name] for name in cell.evaluate.metrics if name in measured}
    row |= {name: value for name, value in measured.items() if METRICS[name].grid == "original"}
    if len(classes) > 1:
        shown = [name for name in row if name in measured]
        row |= {f"{name}:{of_class}": values[name] for of_class, values in by_class.items() for name in shown}
    if prediction.class_prob_BL is not None:
        class_prob_L = prediction.class_prob_BL[i].float().cpu()
        row |= {prob_column(label): float(value) for label, value in zip(LABELS, class_prob_L, strict=True)}
    return row


def pair_of(how: EvaluateConfig, record: Record, prob_HW: np.ndarray, mask_HW: np.ndarray) -> MaskPair:
    """Prediction and reference of one mask class, with the pixel's size in every unit that is known for this image."""
    edges: dict[Spacing, float | None] = {"mm": record.pixel_mm, "px": 1.0}
    height, width = mask_HW.shape
    return MaskPair(
        prob=prob_HW,
        mask=mask_HW,
        threshold=how.threshold,
        pixel={
            unit: (edge * record.height / height, edge * record.width / width)
            for unit, edge in edges.items()
            if edge is not None
        },
        tolerance={"mm": how.nsd_mm, "px": how.nsd_px},
    )


def pairs_at(how: EvaluateConfig, record: Record, prob_KHW: np.ndarray, bits_HW: np.ndarray) -> list[MaskPair]:
    """`pair_of` of every mask class on the mask's grid, to which the maps are brought. bits_HW: a bit of each class."""
    there_KHW = resized(torch.from_numpy(prob_KHW)[None], bits_HW.shape)[0].clamp(0, 1).numpy()
    return [pair_of(how, record, there_HW, bits_HW >> k & 1) for k, there_HW in enumerate(there_KHW)]


def metrics_after(pair: MaskPair, rule: Rule, names: t.Iterable[str]) -> dict[str, float]:
    """`mask_metrics` of the mask after post-processing; without those of probabilities, of which a rule keeps none."""
    mask_HW = processed(np.asarray(pair.prob) >= pair.threshold, rule).astype(np.float32)
    kept = [name for name in names if not METRICS[name].of_probability]
    return mask_metrics(replace(pair, prob=mask_HW, threshold=0.5), kept)


def _on_original(
    cell: CellConfig, data: FoldData, record: Record, prob_KHW: np.ndarray, wanted: t.Iterable[str]
) -> dict[str, dict[str, float]]:
    """Mask class → metric → value on the scan as it was packed: the map is enlarged, the mask is the publisher's."""
    bits_HW = read_mask(data.folder, record)
    pairs, twins = pairs_at(cell.evaluate, record, prob_KHW, bits_HW), on_original(wanted)
    return {name: mask_metrics(pair, twins) for name, pair in zip(data.manifest.mask_classes, pairs, strict=True)}


def mean_of_classes(of_classes: list[dict[str, float]]) -> dict[str, float]:
    """Means over the classes in which a metric is defined; of one class its own numbers."""
    means = {}
    for name in of_classes[0] if of_classes else ():
        defined = [measured[name] for measured in of_classes if not math.isnan(measured[name])]
        means[name] = math.fsum(defined) / len(defined) if defined else float("nan")
    return means
