"""Checkpoints → CSV: every validation image once per prompt source, its probability map, and their calibration."""

from __future__ import annotations

import csv
import io
import time
import typing as t
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bushpc.config import CellConfig
from bushpc.data.batches import validation_batches
from bushpc.data.loader import FoldData
from bushpc.dist import World, any_rank, from_main, gather
from bushpc.evaluate.journal import Journal, Line
from bushpc.evaluate.rows import image_row, prob_column
from bushpc.evaluate.views import predict, views_of
from bushpc.files import write_atomically
from bushpc.metrics.registry import IMAGE_METRICS, METRICS, label_metrics
from bushpc.models.base import Model
from bushpc.runs.layout import CellDir
from bushpc.sample import LABELS, Batch, Prediction, label_index

CALIBRATION_COLUMNS = ("prompts", "bin", "low", "high", "pixels", "prob_sum", "lesion_pixels")
# Bounds of the bins of predicted probability; a bin holds its lower one, the last its upper one, too.
BOUNDS = np.linspace(0, 1, 16, dtype=np.float32)
SAY_EVERY_S = 60.0  # so often the log hears how far an evaluation is that takes longer


@dataclass(frozen=True, kw_only=True)
class Predicting:
    """Where and how predictions are made. device: of the model. autocast: opens the context of its precision.

    stop: true when the job was told to leave. alive: told now and then how far it got.
    """

    device: torch.device
    autocast: t.Callable[[], t.ContextManager[t.Any]]
    stop: t.Callable[[], bool]
    alive: t.Callable[[str], None]


@dataclass(frozen=True)
class Evaluation:
    """A model and the validation part that it is scored on. say: told how far it got, where that takes long."""

    cell: CellConfig
    model: Model
    data: FoldData
    how: Predicting
    world: World
    say: t.Callable[[str], None] = lambda line: None

    def lines(
        self,
        source: str,
        done: t.Collection[str] = (),
        maps: _Maps | None = None,
        journal: Journal | None = None,
    ) -> list[Line] | None:
        """This rank's images under a prompt source, but those of batches that are `done`; None at a stop signal.

        maps: takes the probability maps, journal: each batch when these are saved.
        """
        self.model.eval()
        lines: list[Line] = []
        began = said = time.monotonic()
        views = views_of(self.cell.evaluate.tta, self.cell.model)
        batches = validation_batches(self.cell, self.data, source, self.world)
        todo = (batch for batch in batches if not all(key in done for key in batch.keys))
        try:
            for batch in _together(todo, self.how):
                with torch.inference_mode(), self.how.autocast():
                    prediction = predict(self.model, batch.to(self.how.device), self.data.conditions, views)
                of_batch = [self._line(source, batch, prediction, i, maps) for i in range(len(batch.keys))]
                if journal:
                    journal.note(of_batch)
                lines += of_batch
                self.how.alive(f"evaluated {len(lines)} images with prompts={source}")
                if time.monotonic() - said > SAY_EVERY_S:
                    said = time.monotonic()
                    mine = len(range(self.world.rank, len(self.data.validation), self.world.size))
                    self.say(
                        f"evaluated {len(lines)} of this rank's {mine} images with prompts={source}, "
                        f"{(said - began) / len(lines):.3g} s each"
                    )
        except _ToldToLeave:
            return None
        return lines

    def _line(self, source: str, batch: Batch, prediction: Prediction, i: int, maps: _Maps | None) -> Line:
        mask_KHW = batch.mask_BKHW[i].cpu().numpy()
        prob_KHW = None if prediction.prob_BKHW is None else prediction.prob_BKHW[i].float().cpu().numpy()
        line: Line = {"row": image_row(self.cell, self.data, batch, prediction, i, source, prob_KHW, mask_KHW)}
        if maps and prob_KHW is not None:
            deviation_BKHW = prediction.uncertainty_BKHW
            maps.save(batch.keys[i], prob_KHW, None if deviation_BKHW is None else deviation_BKHW[i].float().cpu())
            line["bins"] = _calibration_bins(prob_KHW, mask_KHW).tolist()
        return line


def evaluate(at: Evaluation, folder: CellDir, step: int) -> list[dict[str, t.Any]] | None:
    """Score the validation part under every prompt source; writes per_image.csv last, when all is there.

    Metrics are taken at the network's resolution and `evaluate.threshold`, as in the paper (2.2, 2.4); distances are in
    millimetres or original pixels nevertheless, as each pixel of the network's image has its own height and width in
    these. With `evaluate.resolution=original` those on the original scans have columns `<metric>_original`. `nan`
    where a metric is not defined, or not made by the model. With several mask classes a metric is the mean
    over those in which it is defined, and has a column `<metric>:<class>` of each; counts of pixels are sums. Models
    that tell labels apart add a probability of each. calibration.csv counts all pixels in 15 equal bins of the
    predicted probability: how many there are, the sum of their probabilities, and how many are lesion. So
    sum(|prob_sum - lesion_pixels|) / sum(pixels) is the expected calibration error (Guo et al. 2017).
    folder: of the cell. step: of the weights. Returns all rows, on every rank; None where a stop signal came between
    two batches: then nothing is written but the journal, and a later call goes on from there.
    """
    cell, data, world, say = at.cell, at.data, at.world, at.say
    rows: list[dict[str, t.Any]] = []
    calibration: list[dict[str, t.Any]] = []
    for variant in cell.variants:
        source = variant.name
        journal = Journal(folder, source, world.rank, weights=f"{cell.hash} {step}")
        done = from_main(journal.read() if world.is_main else {})
        if done:
            say(f"{len(done)} of {len(data.validation)} images were evaluated before, with prompts={source}")
        mine = at.lines(source, done, _Maps(folder.predictions / source, data.manifest.mask_classes), journal)
        if mine is None:
            return None
        lines = done | {line["row"]["key"]: line for line in gather(mine)}
        of_source = [lines[key]["row"] for key in sorted(lines)]
        rows += of_source
        if "prob_BKHW" in type(at.model).makes:
            calibration += _calibration_rows(source, np.sum([lines[key]["bins"] for key in sorted(lines)], axis=0))
        label = f"{source} (uses the ground-truth mask)" if variant.uses_ground_truth else source
        say(f"evaluated {len(of_source)} images with prompts={label}: " + summary_line(of_source))
    if world.is_main:
        if calibration:
            write_atomically(folder.calibration, to_csv(calibration, CALIBRATION_COLUMNS))
        write_atomically(folder.per_image, to_csv(rows, tuple(rows[0])))
    return rows


def validation_metrics(at: Evaluation) -> dict[str, float] | None:
    """Mean metrics of the validation part under the headline prompt source; for curves, nothing is written.

    None where a stop signal came between two batches.
    """
    mine = at.lines(at.cell.variants[0].name)
    return None if mine is None else means([line["row"] for line in gather(mine)])


def tuning_loss(at: Evaluation) -> float | None:
    """Mean training loss over the samples that are held out of the training part; for the schedule.

    They belong to it, so they come with the conditions of training. None where a stop signal came.
    """
    how = at.how
    at.model.eval()
    losses: list[float] = []
    try:
        for batch in _together(validation_batches(at.cell, at.data, None, at.world, at.data.holdout), how):
            with torch.inference_mode(), how.autocast():
                loss = float(at.model(batch.to(how.device)).total)
            losses += [loss] * len(batch.keys)
            how.alive(f"measured the loss of {len(losses)} held-out samples")
    except _ToldToLeave:
        return None
    return float(np.mean(gather(losses)))


def means(rows: list[dict[str, t.Any]]) -> dict[str, float]:
    """Mean of each image metric over the rows that have it, and the label metrics; what is not defined is left out."""
    image = {name: np.array([row[name] for row in rows]) for name in rows[0] if name in IMAGE_METRICS}
    found = {name: float(np.nanmean(values)) for name, values in image.items() if not np.isnan(values).all()}
    if prob_column(LABELS[0]) in rows[0]:
        prob_NL = np.array([[row[prob_column(label)] for label in LABELS] for row in rows])
        label_N = np.array([label_index(row["label"]) for row in rows])
        found |= {name: value for name, value in label_metrics(prob_NL, label_N).items() if not np.isnan(value)}
    return found


def summary_line(rows: list[dict[str, t.Any]]) -> str:
    """`Dice 0.8123  IoU …` for the log."""
    return "  ".join(f"{METRICS[name].heading} {value:.4f}" for name, value in means(rows).items())


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


def save_probability(prob_HW: np.ndarray, path: Path) -> None:
    """8-bit gray PNG, 255 = certain lesion."""
    buffer = io.BytesIO()
    Image.fromarray(np.round(prob_HW * 255).astype(np.uint8)).save(buffer, format="PNG")
    path.write_bytes(buffer.getvalue())


class _Maps:
    """Where the probability maps of one prompt source go: <key>.png of the first class, <class>/<key>.png of others.

    Below uncertainty/ of each lies the deviation of a model that samples, 255 = 0.5, the most that a probability has.
    """

    def __init__(self, folder: Path, classes: t.Sequence[str]) -> None:
        self.folders = [folder, *(folder / name for name in classes[1:])]
        for each in self.folders:
            each.mkdir(parents=True, exist_ok=True)

    def save(self, key: str, prob_KHW: np.ndarray, deviation_KHW: torch.Tensor | None) -> None:
        for k, folder in enumerate(self.folders):
            save_probability(prob_KHW[k], folder / f"{key}.png")
            if deviation_KHW is not None:
                (folder / "uncertainty").mkdir(exist_ok=True)
                save_probability(2 * deviation_KHW[k].numpy(), folder / "uncertainty" / f"{key}.png")


def _calibration_bins(prob: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """3 x bins of BOUNDS, of all pixels of an image: pixels, the sum of their probabilities, and lesion pixels."""
    bin_of_pixel = np.digitize(prob.ravel(), BOUNDS[1:-1])
    weighted = (None, prob.ravel(), mask.ravel())
    return np.stack([np.bincount(bin_of_pixel, weights, minlength=len(BOUNDS) - 1) for weights in weighted])


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


def to_csv(rows: list[dict[str, t.Any]], columns: tuple[str, ...]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
