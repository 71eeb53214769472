"""Checkpoints → per-image CSV: every validation image once per prompt source, and its probability map."""

from __future__ import annotations

import csv
import io
import typing as t
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bushpc.config import CellConfig
from bushpc.data.loader import FoldData, validation_batches
from bushpc.dist import World, any_rank, gather
from bushpc.files import write_atomically
from bushpc.metrics.mask import confusion, mask_metrics
from bushpc.models.base import Model
from bushpc.sample import Batch, Prediction

COLUMNS = (
    *("key", "patient", "label", "fold", "prompts", "dice", "iou", "fpr", "fnr", "tp", "fp", "fn", "tn"),
    *("length_px", "spatial_prompt", "attribute_prompt"),
)
METRICS = ("dice", "iou", "fpr", "fnr")


@dataclass(frozen=True, kw_only=True)
class Predicting:
    """Where and how predictions are made. device: of the model. autocast: opens the context of its precision.

    stop: true when the job was told to leave. alive: told now and then how far it got.
    """

    device: torch.device
    autocast: t.Callable[[], t.ContextManager[t.Any]]
    stop: t.Callable[[], bool]
    alive: t.Callable[[str], None]


def evaluate(
    cell: CellConfig,
    model: Model,
    data: FoldData,
    cell_dir: Path,
    how: Predicting,
    world: World,
    say: t.Callable[[str], None],
) -> list[dict[str, t.Any]] | None:
    """Score the validation part under every prompt source; writes per_image.csv last, when all is there.

    Metrics are taken at the network's resolution and `evaluate.threshold`, as in the paper (2.2, 2.4).
    Returns all rows, on every rank; None where a stop signal came between two batches, and nothing is written then.
    """
    rows: list[dict[str, t.Any]] = []
    for source in cell.prompt_sources:
        folder = cell_dir / "predictions" / source
        folder.mkdir(parents=True, exist_ok=True)
        mine = _score_part(cell, model, data, source, how, world, folder)
        if mine is None:
            return None
        part = gather(mine)
        rows += sorted(part, key=lambda row: row["key"])
        label = f"{source} (uses the ground-truth mask)" if source == "oracle" else source
        say(f"evaluated {len(part)} images with prompts={label}: " + summary_line(part))
    if world.is_main:
        write_atomically(cell_dir / "per_image.csv", _to_csv(rows))
    return rows


def validation_metrics(
    cell: CellConfig, model: Model, data: FoldData, how: Predicting, world: World
) -> dict[str, float] | None:
    """Mean metrics of the validation part under the headline prompt source; for curves, nothing is written.

    None where a stop signal came between two batches.
    """
    mine = _score_part(cell, model, data, cell.prompt_sources[0], how, world, None)
    return None if mine is None else means(gather(mine))


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
    how: Predicting,
    world: World,
    folder: Path | None,
) -> list[dict[str, t.Any]] | None:
    model.eval()
    rows: list[dict[str, t.Any]] = []
    batches = validation_batches(cell, data, source, world)
    while True:
        batch = next(batches, None)
        # Ranks have different numbers of batches, and leave together: when all are through, or one was told to.
        going, stopped = any_rank(batch is not None, how.stop())
        if stopped:
            return None
        if not going:
            return rows
        if batch is None:
            continue
        with torch.inference_mode(), how.autocast():
            prediction = model.predict(batch.to(how.device))
        assert prediction.prob_BKHW is not None, f"{type(model).__name__}.makes lacks prob_BKHW"
        prob_BHW = prediction.prob_BKHW[:, 0].float().cpu().numpy()
        for i, key in enumerate(batch.keys):
            if folder:
                save_probability(prob_BHW[i], folder / f"{key}.png")
            rows.append(_row(cell, data, batch, prediction, i, source, prob_BHW[i]))
        how.alive(f"evaluated {len(rows)} images with prompts={source}")


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
