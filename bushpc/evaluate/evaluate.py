"""Checkpoints → CSV: every validation image once per prompt source, its probability map, and their calibration."""

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
from bushpc.data.prompts import FROM_MASK
from bushpc.dist import World, any_rank, gather
from bushpc.files import write_atomically
from bushpc.metrics.label import label_metrics
from bushpc.metrics.mask import confusion, mask_metrics, surface_metrics
from bushpc.metrics.names import ALWAYS, IMAGE_METRICS, METRICS
from bushpc.models.base import Model
from bushpc.sample import LABELS, Batch, Prediction, label_index
from bushpc.shards.manifest import Record

COLUMNS = (
    *("key", "patient", "label", "fold", "prompts", *ALWAYS, "tp", "fp", "fn", "tn"),
    *("length_px", "spatial_prompt", "attribute_prompt"),
)
CALIBRATION_COLUMNS = ("prompts", "bin", "low", "high", "pixels", "prob_sum", "lesion_pixels")
# Bounds of the bins of predicted probability; a bin holds its lower one, the last its upper one, too.
BOUNDS = np.linspace(0, 1, 16, dtype=np.float32)


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

    Metrics are taken at the network's resolution and `evaluate.threshold`, as in the paper (2.2, 2.4); distances are in
    millimetres or original pixels nevertheless, as each pixel of the network's image has its own height and width in
    these. `nan` where a metric is not defined. Models that tell labels apart add a probability of each. calibration.csv
    counts all pixels in 15 equal bins of the predicted probability: how many there are, the sum of their probabilities,
    and how many are lesion. So sum(|prob_sum - lesion_pixels|) / sum(pixels) is the expected calibration error (Guo et
    al. 2017).
    Returns all rows, on every rank; None where a stop signal came between two batches, and nothing is written then.
    """
    rows: list[dict[str, t.Any]] = []
    calibration: list[dict[str, t.Any]] = []
    for source in cell.prompt_sources:
        maps = _Maps(cell_dir / "predictions" / source)
        mine = _score_part(cell, model, data, source, how, world, maps)
        if mine is None:
            return None
        part = gather(mine)
        rows += sorted(part, key=lambda row: row["key"])
        calibration += _calibration_rows(source, sum(gather([maps.bins])))
        label = f"{source} (uses the ground-truth mask)" if source in FROM_MASK else source
        say(f"evaluated {len(part)} images with prompts={label}: " + summary_line(part))
    if world.is_main:
        write_atomically(cell_dir / "calibration.csv", _to_csv(calibration, CALIBRATION_COLUMNS))
        write_atomically(cell_dir / "per_image.csv", _to_csv(rows, tuple(rows[0])))
    return rows


def validation_metrics(
    cell: CellConfig, model: Model, data: FoldData, how: Predicting, world: World
) -> dict[str, float] | None:
    """Mean metrics of the validation part under the headline prompt source; for curves, nothing is written.

    None where a stop signal came between two batches.
    """
    mine = _score_part(cell, model, data, cell.prompt_sources[0], how, world, None)
    return None if mine is None else means(gather(mine))


def tuning_loss(cell: CellConfig, model: Model, data: FoldData, how: Predicting, world: World) -> float | None:
    """Mean training loss over the samples that are held out of the training part; for the schedule.

    They belong to it, so the spatial prompts come from their masks, as in training. None where a stop signal came.
    """
    model.eval()
    losses: list[float] = []
    prompts = "oracle" if "spatial_prompts" in cell.model_class.needs(cell.model) else "none"
    try:
        for batch in _together(validation_batches(cell, data, prompts, world, data.holdout), how):
            with torch.inference_mode(), how.autocast():
                loss = float(model(batch.to(how.device)).total)
            losses += [loss] * len(batch.keys)
            how.alive(f"measured the loss of {len(losses)} held-out samples")
    except _ToldToLeave:
        return None
    return float(np.mean(gather(losses)))


def means(rows: list[dict[str, t.Any]]) -> dict[str, float]:
    """Mean of each image metric over the rows that have it, and the label metrics; what is not defined is left out."""
    image = {name: np.array([row[name] for row in rows]) for name in rows[0] if name in IMAGE_METRICS}
    found = {name: float(np.nanmean(values)) for name, values in image.items() if not np.isnan(values).all()}
    if _prob(LABELS[0]) in rows[0]:
        prob_NL = np.array([[row[_prob(label)] for label in LABELS] for row in rows])
        label_N = np.array([label_index(row["label"]) for row in rows])
        found |= {name: value for name, value in label_metrics(prob_NL, label_N).items() if not np.isnan(value)}
    return found


def summary_line(rows: list[dict[str, t.Any]]) -> str:
    """`Dice 0.8123  IoU …` for the log."""
    return "  ".join(
        f"{METRICS[name].title}{f' ({METRICS[name].unit})' * bool(METRICS[name].unit)} {value:.4f}"
        for name, value in means(rows).items()
    )


def _prob(label: str) -> str:
    return f"prob_{label}"


def _score_part(
    cell: CellConfig,
    model: Model,
    data: FoldData,
    source: str,
    how: Predicting,
    world: World,
    maps: _Maps | None,
) -> list[dict[str, t.Any]] | None:
    """This rank's rows; None where a stop signal came. maps: takes the probability maps."""
    model.eval()
    rows: list[dict[str, t.Any]] = []
    try:
        for batch in _together(validation_batches(cell, data, source, world), how):
            with torch.inference_mode(), how.autocast():
                prediction = model.predict(batch.to(how.device))
            assert prediction.prob_BKHW is not None, f"{type(model).__name__}.makes lacks prob_BKHW"
            prob_BHW = prediction.prob_BKHW[:, 0].float().cpu().numpy()
            for i, key in enumerate(batch.keys):
                rows.append(_row(cell, data, batch, prediction, i, source, prob_BHW[i]))
                if maps:
                    maps.add(key, prob_BHW[i], batch.mask_BKHW[i, 0].cpu().numpy())
            how.alive(f"evaluated {len(rows)} images with prompts={source}")
    except _ToldToLeave:
        return None
    return rows


class _ToldToLeave(Exception):
    """A stop signal came to some rank."""


def _together(batches: t.Iterator[Batch], how: Predicting) -> t.Iterator[Batch]:
    """This rank's batches. Ranks have different numbers of them, and leave together.

    When all are through, or one was told to; the second raises _ToldToLeave.
    """
    while True:
        batch = next(batches, None)
        going, stopped = any_rank(batch is not None, how.stop())
        if stopped:
            raise _ToldToLeave
        if not going:
            return
        if batch is not None:
            yield batch


def _row(
    cell: CellConfig, data: FoldData, batch: Batch, prediction: Prediction, i: int, source: str, prob_HW: np.ndarray
) -> dict[str, t.Any]:
    record = data.manifest.record(batch.keys[i])
    mask_HW = batch.mask_BKHW[i, 0].cpu().numpy()
    used = prediction.spatial_prompts or batch.spatial_prompts
    overlap = {name: float(v) for name, v in mask_metrics(prob_HW, mask_HW, cell.evaluate.threshold).items()}
    measured = overlap | _surfaces(cell, record, prob_HW, mask_HW)
    row = {
        "key": record.key,
        "patient": record.patient,
        "label": record.label,
        "fold": cell.fold,
        "prompts": source,
        **{name: measured[name] for name in ALWAYS},
        **{name: int(value) for name, value in confusion(prob_HW, mask_HW, cell.evaluate.threshold)._asdict().items()},
        "length_px": record.lesion_length,
        "spatial_prompt": used[i],
        "attribute_prompt": batch.attribute_prompts[i],
    }
    assert tuple(row) == COLUMNS
    row |= {name: measured[name] for name in cell.evaluate.metrics if name in measured}
    if prediction.class_prob_BL is not None:
        class_prob_L = prediction.class_prob_BL[i].float().cpu()
        row |= {_prob(label): float(value) for label, value in zip(LABELS, class_prob_L, strict=True)}
    return row


def _surfaces(cell: CellConfig, record: Record, prob_HW: np.ndarray, mask_HW: np.ndarray) -> dict[str, float]:
    """Distances of surfaces in the units that were asked for, and that are known for this image."""
    measured: dict[str, float] = {}
    edges = {"mm": record.pixel_mm, "px": 1.0}
    for unit, tolerance in (("mm", cell.evaluate.nsd_mm), ("px", cell.evaluate.nsd_px)):
        names, edge = (f"hd95_{unit}", f"nsd_{unit}"), edges[unit]
        if not set(names) & set(cell.evaluate.metrics):
            continue
        values = (float("nan"), float("nan"))
        if edge is not None:
            pixel = (edge * record.height / mask_HW.shape[0], edge * record.width / mask_HW.shape[1])
            values = surface_metrics(prob_HW, mask_HW, pixel, tolerance, cell.evaluate.threshold)
        measured |= dict(zip(names, values, strict=True))
    return measured


def save_probability(prob_HW: np.ndarray, path: Path) -> None:
    """8-bit gray PNG, 255 = certain lesion."""
    buffer = io.BytesIO()
    Image.fromarray(np.round(prob_HW * 255).astype(np.uint8)).save(buffer, format="PNG")
    path.write_bytes(buffer.getvalue())


class _Maps:
    """Where the probability maps of one prompt source go.

    bins: 3 x bins of BOUNDS, of all maps so far: pixels, the sum of their probabilities, and lesion pixels.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.bins = folder, np.zeros((3, len(BOUNDS) - 1))

    def add(self, key: str, prob_HW: np.ndarray, mask_HW: np.ndarray) -> None:
        """Save one map, and count its pixels before they are rounded to 8 bits."""
        save_probability(prob_HW, self.folder / f"{key}.png")
        bin_of_pixel = np.digitize(prob_HW.ravel(), BOUNDS[1:-1])
        for row, weights in enumerate((None, prob_HW.ravel(), mask_HW.ravel())):
            self.bins[row] += np.bincount(bin_of_pixel, weights, minlength=len(BOUNDS) - 1)


def _calibration_rows(source: str, bins: np.ndarray) -> list[dict[str, t.Any]]:
    return [
        {
            "prompts": source,
            "bin": i,
            "low": round(float(BOUNDS[i]), 6),
            "high": round(float(BOUNDS[i + 1]), 6),
            "pixels": int(pixels),
            "prob_sum": float(prob_sum),
            "lesion_pixels": int(lesion_pixels),
        }
        for i, (pixels, prob_sum, lesion_pixels) in enumerate(bins.T)
    ]


def _to_csv(rows: list[dict[str, t.Any]], columns: tuple[str, ...]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
