"""Checkpoints → per-image CSV: every validation image once per prompt source, and its probability map."""

from __future__ import annotations

import csv
import io
import typing as t
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from bushpc.config import CellConfig
from bushpc.data.loader import FoldData, validation_batches
from bushpc.dist import World, gather
from bushpc.files import write_atomically
from bushpc.metrics.mask import confusion, mask_metrics
from bushpc.models.base import Model
from bushpc.sample import Batch, Prediction

COLUMNS = (
    *("key", "patient", "label", "fold", "prompts", "dice", "iou", "fpr", "fnr", "tp", "fp", "fn", "tn"),
    *("length_px", "spatial_prompt", "attribute_prompt"),
)
METRICS = ("dice", "iou", "fpr", "fnr")


def evaluate(
    cell: CellConfig,
    model: Model,
    data: FoldData,
    cell_dir: Path,
    accelerator: Accelerator,
    world: World,
    say: t.Callable[[str], None],
) -> list[dict[str, t.Any]]:
    """Score the validation part under every prompt source; writes per_image.csv last, when all is there.

    Metrics are taken at the network's resolution and `evaluate.threshold`, as in the paper (2.2, 2.4).
    Returns all rows, on every rank.
    """
    rows: list[dict[str, t.Any]] = []
    for source in cell.prompt_sources:
        folder = cell_dir / "predictions" / source
        folder.mkdir(parents=True, exist_ok=True)
        part = gather(list(_score_part(cell, model, data, source, accelerator, world, folder)))
        rows += sorted(part, key=lambda row: row["key"])
        label = f"{source} (uses the ground-truth mask)" if source == "oracle" else source
        say(f"evaluated {len(part)} images with prompts={label}: " + summary_line(part))
    if world.is_main:
        write_atomically(cell_dir / "per_image.csv", _to_csv(rows))
    return rows


def validation_metrics(
    cell: CellConfig, model: Model, data: FoldData, accelerator: Accelerator, world: World
) -> dict[str, float]:
    """Mean metrics of the validation part under the headline prompt source; for curves, nothing is written."""
    source = cell.prompt_sources[0]
    rows = gather(list(_score_part(cell, model, data, source, accelerator, world, None)))
    return means(rows)


def means(rows: list[dict[str, t.Any]]) -> dict[str, float]:
    """Mean of each metric over rows."""
    return {name: float(np.mean([row[name] for row in rows])) for name in METRICS}


def summary_line(rows: list[dict[str, t.Any]]) -> str:
    """`Dice 0.8123  IoU …` for the log."""
    names = {"dice": "Dice", "iou": "IoU", "fpr": "FPR", "fnr": "FNR"}
    return "  ".join(f"{names[name]} {value:.4f}" for name, value in means(rows).items())


def _score_part(
    cell: CellConfig,
    model: Model,
    data: FoldData,
    source: str,
    accelerator: Accelerator,
    world: World,
    folder: Path | None,
) -> Iterator[dict[str, t.Any]]:
    model.eval()
    for batch in validation_batches(cell, data, source, world):
        with torch.inference_mode(), accelerator.autocast():
            prediction = model.predict(batch.to(accelerator.device))
        assert prediction.prob_BKHW is not None, f"{type(model).__name__}.makes lacks prob_BKHW"
        prob_BHW = prediction.prob_BKHW[:, 0].float().cpu().numpy()
        for i, key in enumerate(batch.keys):
            if folder:
                save_probability(prob_BHW[i], folder / f"{key}.png")
            yield _row(cell, data, batch, prediction, i, source, prob_BHW[i])


def _row(
    cell: CellConfig, data: FoldData, batch: Batch, prediction: Prediction, i: int, source: str, prob_HW: np.ndarray
) -> dict[str, t.Any]:
    record = data.manifest.record(batch.keys[i])
    mask_HW = batch.mask_BKHW[i, 0].cpu().numpy()
    used = prediction.spatial_prompts or batch.spatial_prompts
    return {
        "key": record.key,
        "patient": record.patient,
        "label": record.label,
        "fold": cell.fold,
        "prompts": source,
        **{name: float(value) for name, value in mask_metrics(prob_HW, mask_HW, cell.evaluate.threshold).items()},
        **{name: int(value) for name, value in confusion(prob_HW, mask_HW, cell.evaluate.threshold)._asdict().items()},
        "length_px": record.lesion_length,
        "spatial_prompt": used[i],
        "attribute_prompt": batch.attribute_prompts[i],
    }


def save_probability(prob_HW: np.ndarray, path: Path) -> None:
    """8-bit gray PNG, 255 = certain lesion."""
    buffer = io.BytesIO()
    Image.fromarray(np.round(prob_HW * 255).astype(np.uint8)).save(buffer, format="PNG")
    path.write_bytes(buffer.getvalue())


def _to_csv(rows: list[dict[str, t.Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
