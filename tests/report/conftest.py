"""A builder of run directories as the trainer and evaluator leave them, with synthetic scans and predictions."""

from __future__ import annotations

import io
import json
import typing as t
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from scipy import ndimage

from bushpc.runs.goodput import SPENDINGS, Attempt
from bushpc.sample import LABELS
from bushpc.shards.manifest import Manifest, Record, ShardInfo

NETWORK = 64  # edge of the square predictions
Row = dict[str, t.Any]


def make_row(key: str, fold: int, prompts: str = "first_pass", dice: float = 0.8, **changes: t.Any) -> Row:
    """One line of per_image.csv; what a test does not care about is filled in consistently."""
    iou = dice / (2 - dice)
    filled = {
        "key": key, "patient": key, "label": "benign", "fold": fold, "prompts": prompts,
        "dice": dice, "iou": iou, "fpr": 0.01, "fnr": 1 - dice, "tp": 80, "fp": 20, "fn": 20, "tn": 3976,
        "length_px": 150, "spatial_prompt": "", "attribute_prompt": "",
    }  # fmt: skip
    return {**filled, **changes}


def make_rows(fold: int, dice_by_source: Mapping[str, Iterable[float]]) -> list[Row]:
    """Images named after fold and position, with the given Dice for each source."""
    return [
        make_row(f"f{fold}i{i}", fold, source, dice)
        for source, values in dice_by_source.items()
        for i, dice in enumerate(values)
    ]


@dataclass
class RunBuilder:
    """Writes `path` piece by piece. folds: expected folds of the run; only those added become complete.

    rows: of a grid, name → settings, the first being the baseline; `of` chooses the row that is written to.
    metrics: as `evaluate.metrics` has them; none for a run of before they could be chosen. external: as
    `evaluate.external` has them.
    """

    path: Path
    folds: int = 5
    run: Row = field(default_factory=dict)
    rows: Mapping[str, Mapping[str, t.Any]] = field(default_factory=dict)
    row: str = ""
    model: str = "xbusnet"
    metrics: Sequence[str] = ()
    external: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.path.mkdir(parents=True)
        self.write_run_json()

    def write_run_json(self, **changes: t.Any) -> None:
        cells = [{"name": f"fold{k}", "fold": k, "hash": f"{k:08x}"} for k in range(self.folds)]
        grid: Row = {}
        if self.rows:
            cells = [
                {**cell, "name": f"{row}-{cell['name']}", "row": row, "hash": f"{r}{cell['hash']}"}
                for r, row in enumerate(self.rows)
                for cell in cells
            ]
            rows = [
                {"name": row, "label": row.replace("_", " "), "model": self.model, "settings": dict(settings)}
                for row, settings in self.rows.items()
            ]
            grid = {
                "kind": "grid",
                "grid": {"name": "components", "title": "XBusNet components", "baseline": None, "rows": rows},
            }
        whole = {
            "name": self.path.name, "kind": "cv", "created": "2026-11-20T10:00:00+00:00", "commit": "0123abc",
            "command": ["bushpc", "cv", "model=xbusnet", "data=breast"], "model": self.model, "data": "breast",
            "prompts": "first_pass", "shards": str(self.path.parent / "shards"), "manifest_sha256": "0" * 64,
            "folds": {"source": "frozen", "sha256": "f" * 64}, "versions": {"bushpc": "0.1.0", "torch": "2.15.0"},
            "cells": cells, **grid,
        }  # fmt: skip
        self.run = {**whole, **self.run, **changes}
        (self.path / "run.json").write_text(json.dumps(self.run))

    def of(self, row: str) -> RunBuilder:
        """Where the cells of one row of the grid are written."""
        self.row = row
        return self

    def cell(self, fold: int) -> Path:
        folder = self.path / "cells" / (f"{self.row}-fold{fold}" if self.row else f"fold{fold}")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def trained(self, fold: int, steps: int = 1000, validations: bool = True) -> None:
        """Config and a training log of `steps` steps."""
        rng = np.random.default_rng(fold)
        config: Row = {
            "model": {"name": "xbusnet", "image_size": NETWORK}, "train": {"iterations": 1000},
            "evaluate": {"threshold": 0.4}, "cluster": {"cpus_per_rank": 4}, "fold": fold,
        }  # fmt: skip
        if self.metrics:
            config["evaluate"] |= {"metrics": list(self.metrics), "nsd_mm": 1.0, "nsd_px": 5.0}
        if self.external:
            config["evaluate"] |= {"external": [f"shards/{name}" for name in self.external]}
        for key, value in self.rows.get(self.row, {}).items():
            group, _, name = key.rpartition(".")
            (config.setdefault(group, {}) if group else config)[name] = value
        (self.cell(fold) / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        with (self.cell(fold) / "metrics.jsonl").open("w") as log:
            for step in range(10, steps + 1, 10):
                loss = 0.15 + 0.8 * np.exp(-step / 200) + 0.05 * rng.standard_normal()
                line = {"kind": "train", "step": step, "loss": loss, "terms": {"dice": loss}, "lr": 1e-4, "time": 0.0}
                log.write(json.dumps(line) + "\n")
                if validations and step % 200 == 0:
                    dice = 0.85 - 0.6 * np.exp(-step / 250) + 0.02 * rng.standard_normal()
                    log.write(json.dumps({"kind": "validation", "step": step, "dice": dice, "iou": dice / 2}) + "\n")

    def spent(self, fold: int, *attempts: Mapping[str, float], submitted: float = 1000.0) -> None:
        """attempts.jsonl: attempts of one job that follow each other at once, each with its seconds by cause.

        Every attempt does 100 steps, the first 20 of which the one before had done already.
        """
        lines, began = [], submitted + 60
        for number, seconds in enumerate(attempts):
            attempt = Attempt(
                number=number, job="7", restart=number, host="n1", pid=1, ranks=2, gpus=2, submitted=submitted,
                began=began, from_step=80 * number, step=80 * number + 100,
                seconds=dict.fromkeys(SPENDINGS, 0.0) | dict(seconds), end="",
            )  # fmt: skip
            lines.append(attempt.to_json() + "\n")
            began = attempt.last_sign
        (self.cell(fold) / "attempts.jsonl").write_text("".join(lines))

    def evaluated(self, fold: int, rows: list[Row], done: bool = True) -> Path:
        """per_image.csv and DONE."""
        path = self.cell(fold) / "per_image.csv"
        pd.DataFrame(rows).to_csv(path, index=False, na_rep="nan")
        if done:
            (self.cell(fold) / "DONE").write_text(json.dumps({"finished": "2026-11-20T11:00:00+00:00", "step": 1000}))
        return path

    def elsewhere(self, fold: int, name: str, rows: list[Row]) -> None:
        """external/<name>.csv: what the fold's model makes of another dataset."""
        (self.cell(fold) / "external").mkdir(exist_ok=True)
        pd.DataFrame(rows).to_csv(self.cell(fold) / "external" / f"{name}.csv", index=False, na_rep="nan")

    def failed(self, fold: int, why: str) -> None:
        (self.cell(fold) / "FAILED").write_text(why)

    def complete(self, rows_by_fold: Mapping[int, list[Row]]) -> RunBuilder:
        for fold, rows in rows_by_fold.items():
            self.trained(fold)
            self.evaluated(fold, rows)
        return self


@pytest.fixture(scope="session")
def row() -> t.Callable[..., Row]:
    return make_row


@pytest.fixture
def rows_with_dice() -> t.Callable[..., list[Row]]:
    return make_rows


@pytest.fixture
def builder(tmp_path: Path) -> RunBuilder:
    return RunBuilder(tmp_path / "run")


@pytest.fixture
def new_run(tmp_path: Path) -> t.Callable[[str], RunBuilder]:
    """Makes a run of a name; all of them lie side by side."""
    return lambda name: RunBuilder(tmp_path / name)


SAM_METRICS = (
    *("label_accuracy", "label_f1", "label_auc", "label_ce"),
    *("bce", "dice", "hd95_mm", "hd95_px", "nsd_mm", "nsd_px"),
)


def two_task_rows(
    fold: int, images: int = 12, skill: float = 1.0, pixel_sizes: bool = True, seed: int = 0
) -> list[Row]:
    """Lines of a model that segments and tells labels apart, two scans a patient, a third of them normal; every fourth
    scan has no known pixel size. skill: how far the true label's score stands out.
    """
    rng = np.random.default_rng([seed, fold])
    rows = []
    for i in range(images):
        label = LABELS[i // 2 % 3]
        score_L = rng.normal(size=3) + skill * np.eye(3)[LABELS.index(label)]
        prob_L = np.exp(score_L) / np.exp(score_L).sum()
        dice, far = rng.uniform(0.5, 0.9), rng.uniform(5, 40)
        changes: Row = {
            "patient": f"f{fold}p{i // 2}", "label": label, "bce": rng.uniform(0.02, 0.2), "hd95_px": far,
            "hd95_mm": far / 10 if i % 4 and pixel_sizes else np.nan, "nsd_px": dice / 2,
            "nsd_mm": dice / 3 if i % 4 and pixel_sizes else np.nan,
            **{f"prob_{name}": prob for name, prob in zip(LABELS, prob_L, strict=True)},
        }  # fmt: skip
        if label == "normal":
            nothing = dict.fromkeys(("iou", "fnr", "hd95_mm", "hd95_px", "nsd_mm", "nsd_px"), np.nan)
            pixels = {"tp": 0, "fn": 0, "fp": 40 * (i % 2), "tn": 4096 - 40 * (i % 2), "fpr": 40 * (i % 2) / 4096}
            changes |= {**nothing, **pixels, "length_px": 0}
            dice = np.nan
        rows.append(make_row(f"f{fold}i{i}", fold, "none", dice, **changes))
    return rows


@pytest.fixture(scope="session")
def two_tasks() -> t.Callable[..., list[Row]]:
    return two_task_rows


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> t.Callable[..., RunBuilder]:
    """Makes a run of a name that all tests of a file read and none changes."""
    return lambda name, **fields: RunBuilder(tmp_path_factory.mktemp("runs") / name, **fields)


TABLE_4 = {
    "full": {"model.lfe": True, "model.gfe": True, "model.sfa": True},
    "no_lfe": {"model.lfe": False, "model.gfe": True, "model.sfa": False},
    "no_gfe": {"model.lfe": True, "model.gfe": False, "model.sfa": True},
    "no_sfa": {"model.lfe": True, "model.gfe": True, "model.sfa": False},
}


@pytest.fixture
def grid(tmp_path: Path) -> RunBuilder:
    """A grid of XBusNet's Table 4 with five folds a row, nothing of it done yet."""
    return RunBuilder(tmp_path / "grid", rows=TABLE_4)


@pytest.fixture
def realistic_grid(tmp_path: Path) -> RunBuilder:
    """The same with everything that trainer and evaluator leave, three scans a fold."""
    return write_realistic(tmp_path / "grid", images_per_fold=3, edge=90, rows=TABLE_4)


@pytest.fixture
def realistic(tmp_path: Path) -> RunBuilder:
    """Five complete folds of four scans each with packed images and predictions of three prompt sources."""
    return write_realistic(tmp_path / "run", images_per_fold=4, edge=90)


def write_realistic(
    path: Path, images_per_fold: int, edge: int, seed: int = 1, rows: Mapping[str, Mapping[str, t.Any]] | None = None
) -> RunBuilder:
    """A whole run, or grid of `rows`, each row a little worse than the one before: scans of about `edge` pixels and
    predictions whose metrics and calibration are really theirs, with a heat map for two images of each fold.
    """
    rng = np.random.default_rng(seed)
    run = RunBuilder(path, rows=rows or {})
    samples: list[tuple[str, np.ndarray, np.ndarray]] = []
    for fold in range(run.folds):
        scans = [(f"case{fold * images_per_fold + i:03d}", *_scan(rng, edge)) for i in range(images_per_fold)]
        samples += [(key, image_HWC, mask_HW) for key, image_HWC, mask_HW, _ in scans]
        for worse, row in enumerate(run.rows or [""]):
            _write_cell(rng, run.of(row), fold, scans, worse)
    run.of("").write_run_json(manifest_sha256=write_shards(path.parent / "shards", samples).hash)
    return run


def _write_cell(rng: np.random.Generator, run: RunBuilder, fold: int, scans: list[t.Any], worse: int) -> None:
    rows, bins = [], []
    for source, spread in (("first_pass", 0.10), ("oracle", 0.06), ("none", 0.14)):
        probs = []
        for i, (key, _, mask_HW, place) in enumerate(scans):
            prob_HW = _prediction(rng, mask_HW, spread * (1 + 0.4 * worse))
            spatial = "" if source == "none" else f"a medium lesion in the {place} quadrant"
            rows.append(_measured(key, fold, source, mask_HW, prob_HW, spatial))
            probs.append((prob_HW, _shrunk(mask_HW)))
            _save(run.cell(fold) / "predictions" / source / f"{key}.png", prob_HW)
            if source == "first_pass" and i < 2:
                _save(run.cell(fold) / "explain" / f"{key}.png", ndimage.gaussian_filter(prob_HW, 4))
        bins += calibration_rows(source, probs)
    run.trained(fold)
    run.evaluated(fold, rows)
    pd.DataFrame(bins).to_csv(run.cell(fold) / "calibration.csv", index=False)


def calibration_rows(source: str, probs: list[tuple[np.ndarray, np.ndarray]]) -> list[Row]:
    """Lines of calibration.csv. probs: probability x 255 and truth of each image."""
    prob_N = np.concatenate([prob_HW.ravel() for prob_HW, _ in probs]) / 255
    truth_N = np.concatenate([truth_HW.ravel() for _, truth_HW in probs])
    bin_N = np.minimum((prob_N * 15).astype(int), 14)
    counts = [np.bincount(bin_N, weights, minlength=15) for weights in (np.ones_like(prob_N), prob_N, truth_N)]
    return [
        {"prompts": source, "bin": i, "low": i / 15, "high": (i + 1) / 15, "pixels": int(pixels), "prob_sum": prob_sum,
         "lesion_pixels": int(lesion)}
        for i, (pixels, prob_sum, lesion) in enumerate(zip(*counts, strict=True))
    ]  # fmt: skip


def _save(path: Path, gray_HW: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(gray_HW).save(path)


def write_shards(folder: Path, samples: list[tuple[str, np.ndarray, np.ndarray]]) -> Manifest:
    """One file with all PNGs one after the other, which is all that reading by offset needs of a tar. Of a mask bit k
    is class k.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records, at = [], 0
    with (folder / "lesion-000000.tar").open("wb") as tar:
        for key, image_HWC, mask_HW in samples:
            sizes = [tar.write(_png(array)) for array in (image_HWC, mask_HW)]
            facts = {"key": key, "patient": key, "label": "benign", "attributes": {}, "pixel_mm": None}
            extent = {"height": mask_HW.shape[0], "width": mask_HW.shape[1]}
            lesion = {"lesion_pixels": int((mask_HW > 0).sum()), "lesion_length": _length(mask_HW)}
            image = {"image_offset": at, "image_bytes": sizes[0]}
            mask = {"mask_offset": at + sizes[0], "mask_bytes": sizes[1]}
            records.append(Record(**facts, **extent, **lesion, **image, **mask, shard="lesion-000000.tar"))
            at += sum(sizes)
    shard = ShardInfo(file="lesion-000000.tar", sha256="0" * 64, bytes=at, samples=len(records))
    manifest = Manifest(dataset="breast", packer_version=1, excerpt=False, shards=[shard], sources={}, records=records)
    manifest.save(folder)
    return manifest


@pytest.fixture(scope="session")
def shards() -> t.Callable[..., Manifest]:
    return write_shards


def _png(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def _length(mask_HW: np.ndarray) -> int:
    return int(max(np.ptp(np.flatnonzero(mask_HW.any(axis))) for axis in (0, 1))) + 1


def _scan(rng: np.random.Generator, edge: int) -> tuple[np.ndarray, np.ndarray, str]:
    """A dark ellipse in Rayleigh speckle that fades with depth: (image, mask, place in words)."""
    height, width = int(edge * rng.uniform(0.7, 0.9)), edge
    y_HW, x_HW = np.mgrid[:height, :width]
    cy, cx = height * rng.uniform(0.35, 0.65), width * rng.uniform(0.3, 0.7)
    a, b = edge * rng.uniform(0.07, 0.3), edge * rng.uniform(0.06, 0.2)
    mask_HW = (((x_HW - cx) / a) ** 2 + ((y_HW - cy) / b) ** 2 < 1).astype(np.uint8)
    tissue_HW = np.where(mask_HW, 35, 120) * np.exp(-y_HW / height)
    grey_HW = np.clip(ndimage.gaussian_filter(tissue_HW * rng.rayleigh(0.9, tissue_HW.shape), 0.8), 0, 255)
    place = f"{'upper' if cy < height / 2 else 'lower'} {'left' if cx < width / 2 else 'right'}"
    return np.repeat(grey_HW.astype(np.uint8)[..., None], 3, axis=2), mask_HW, place


def _prediction(rng: np.random.Generator, mask_HW: np.ndarray, spread: float) -> np.ndarray:
    """The mask squeezed to the network's square, moved and blurred: probability x 255."""
    small = np.asarray(Image.fromarray(mask_HW * 255).resize((NETWORK, NETWORK), Image.Resampling.BILINEAR)) / 255
    moved = ndimage.shift(small, rng.normal(0, spread * NETWORK / 3, 2), order=1)
    return np.round(255 * np.clip(ndimage.gaussian_filter(moved, 1.2), 0, 1)).astype(np.uint8)


def _measured(key: str, fold: int, source: str, mask_HW: np.ndarray, prob_HW: np.ndarray, spatial: str) -> Row:
    truth, found = _shrunk(mask_HW), prob_HW > 127
    tp, fp = int((truth & found).sum()), int((found & ~truth).sum())
    fn, tn = int((truth & ~found).sum()), int((~truth & ~found).sum())
    return make_row(
        key, fold, source, 2 * tp / (2 * tp + fp + fn + 1e-8), iou=tp / (tp + fp + fn + 1e-8),
        fpr=fp / (fp + tn + 1e-8), fnr=fn / (fn + tp + 1e-8), tp=tp, fp=fp, fn=fn, tn=tn, length_px=_length(mask_HW),
        spatial_prompt=spatial, attribute_prompt="oval shape, circumscribed margin, BI-RADS 3",
    )  # fmt: skip


def _shrunk(mask_HW: np.ndarray) -> np.ndarray:
    """The mask at the network's resolution."""
    return np.asarray(Image.fromarray(mask_HW * 255).resize((NETWORK, NETWORK), Image.Resampling.NEAREST)) > 127
