"""Out-of-fold predictions of a run → the post-processing of each fold, and of new images. No training, no GPU.

    cells/*/predictions/ ─every rule on every image→ Dice ─folds but k→ rule of fold k ─judged on fold k→ Chosen
                                                          └─all folds→ rule for new images

No fold has a say in its own rule, so the figures after post-processing are as honest as the plain ones. A rule is taken
only if it is better than plain; of equals the one that changes least.
"""

from __future__ import annotations

import csv
import itertools
import time
import typing as t
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from bushpc.data.square import resize
from bushpc.errors import ConfigError, DataError
from bushpc.evaluate.evaluate import to_csv
from bushpc.evaluate.rows import mean_of_classes, metrics_after, pairs_at
from bushpc.evaluate.trained import TrainedCell, open_run
from bushpc.files import write_atomically
from bushpc.metrics.mask import MaskPair
from bushpc.metrics.registry import ALWAYS, on_original
from bushpc.runs.chosen import PLAIN, Chosen, FoldChoice, Rule, stamp
from bushpc.runs.layout import RunDir
from bushpc.shards.manifest import Manifest, Record, read_mask

SIZES = (0.001, 0.0025, 0.005, 0.01)  # smallest parts that are tried, as shares of the image's area
DECIDES = "dice"  # on the grid of the evaluation

Progress = Callable[[int, int, str], None]


def candidates(sizes: Sequence[float]) -> list[Rule]:
    """Every rule that is tried, the one that changes least first. Raises: ConfigError for an impossible size."""
    tried = [
        Rule(fill=fill, smallest=smallest, largest=largest)
        for fill, smallest, largest in itertools.product((False, True), sorted({0.0, *sizes}), (False, True))
    ]
    return sorted(
        dict.fromkeys(tried), key=lambda rule: (rule.fill + rule.largest + (rule.smallest > 0), rule.smallest)
    )


def nested(score_RI: np.ndarray, fold_I: np.ndarray) -> tuple[dict[int, int], int]:
    """The best rule for each fold, by the other folds alone, and for all: indices into the rules, 0 being plain.

    score_RI: of each rule (row) on each image, NaN where there is none. fold_I: the fold that an image validates.
    A rule's score is the mean over folds of their means over images. Raises: ConfigError for fewer than two folds.
    """
    folds = sorted({int(fold) for fold in fold_I})
    if len(folds) < 2:
        raise ConfigError(
            f"post-processing would be chosen on the fold that it is judged on: there is fold {folds[0]} alone. It is "
            "chosen on the other folds of a cross-validation; train two or more folds"
        )
    mean_RK = np.stack([_means(score_RI[:, fold_I == fold]) for fold in folds], axis=1)
    chosen = {fold: _best(np.delete(mean_RK, k, axis=1)) for k, fold in enumerate(folds)}
    return chosen, _best(mean_RK)


def _means(score_RI: np.ndarray) -> np.ndarray:
    there = ~np.isnan(score_RI)
    with np.errstate(invalid="ignore"):
        return np.where(there, score_RI, 0).sum(axis=1) / there.sum(axis=1)


def _best(mean_RK: np.ndarray) -> int:
    """The first of the best: plain where nothing is better. Differences of rounding are none."""
    if not (defined := ~np.isnan(mean_RK).any(axis=0)).any():
        return 0
    return int(np.round(mean_RK[:, defined].mean(axis=1), 12).argmax())


@dataclass(frozen=True, eq=False)
class _Scored:
    """An image with what each rule makes of it. pairs: by class, plain, from which any rule's metrics follow."""

    key: str
    fold: int
    pairs: list[MaskPair]
    score_R: list[float]
    evaluated: float


def choose(run_dir: Path, row: str | None, sizes: Sequence[float], show: Progress) -> tuple[Chosen, Path]:
    """Choose for a run, or a row of a grid, and write <run>/postprocess/<row>.json and .csv.

    Raises: ConfigError for impossible sizes, for a run of one fold, and as `open_run`; DataError for a run whose folds
    are not all done, or whose masks or maps are gone.
    """
    rules = candidates(sizes)
    run = open_run(run_dir, None, row, lambda line: None)
    if run.missing:
        raise DataError(
            f"{run_dir}: {', '.join(run.missing)} not done, and every fold has a say in the others' post-processing; "
            f"see `bushpc status {run_dir}`"
        )
    nested(np.zeros((1, len(run.cells))), np.array([cell.fold for cell in run.cells]))  # before minutes of work
    config = run.cells[0].config
    if "prob_BKHW" not in config.model_class.makes:
        raise ConfigError(f"{config.model.title} makes no masks, so there is nothing to post-process")
    manifest = Manifest.load(config.data.folder)
    if manifest.hash != run.record.manifest_sha256:
        raise DataError(f"{config.data.folder} was packed again after this run, so its masks may be others")
    on_grid = on_original if config.evaluate.resolution == "original" else tuple
    [decides] = on_grid([DECIDES])
    names = on_grid(dict.fromkeys((*config.evaluate.metrics, *ALWAYS)))
    scored = [image for cell in run.cells for image in _score_cell(cell, manifest, rules, decides, show)]
    score_RI = np.array([image.score_R for image in scored]).T
    fold_I = np.array([image.fold for image in scored])
    by_fold, for_all = nested(score_RI, fold_I)
    rows = [_row(image, rules[by_fold[image.fold]], names) for image in scored]
    chosen = Chosen(
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        cells={cell.name: stamp(cell.folder) for cell in run.cells},
        metric=decides,
        source=config.variants[0].name,
        grid=config.evaluate.resolution,
        candidates=len(rules),
        folds=[_fold_choice(fold, sorted(by_fold), rules[index], rows) for fold, index in by_fold.items()],
        for_all=rules[for_all],
        largest_difference=float(np.nanmax([0.0, *(abs(image.score_R[0] - image.evaluated) for image in scored)])),
    )
    path = RunDir(run_dir).postprocess(run.row)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path.with_suffix(".csv"), to_csv(rows, tuple(rows[0])))
    chosen.write(path)
    return chosen, path


def _score_cell(
    cell: TrainedCell, manifest: Manifest, rules: list[Rule], decides: str, show: Progress
) -> t.Iterator[_Scored]:
    source = cell.config.variants[0].name
    with cell.folder.per_image.open(newline="") as file:
        lines = [row for row in csv.DictReader(file) if row["prompts"] == source]
    for number, line in enumerate(lines):
        show(number, len(lines), "")
        record = manifest.record(line["key"])
        pairs = _pairs(cell, manifest, record, source)
        scores = [_measured(pairs, rule, [decides])[decides] for rule in rules]
        yield _Scored(record.key, cell.fold, pairs, scores, float(line[decides]))


def _pairs(cell: TrainedCell, manifest: Manifest, record: Record, source: str) -> list[MaskPair]:
    """Kept map and mask of each class, on the grid of the evaluation."""
    config, folder = cell.config, cell.folder.predictions / source
    bits_HW = read_mask(config.data.folder, record)
    if config.evaluate.resolution == "network":
        _, bits_HW = resize(np.zeros((1, 1, 3), np.uint8), bits_HW, config.model.image_size)
    maps = []
    for k, name in enumerate(manifest.mask_classes):
        path = (folder / name if k else folder) / f"{record.key}.png"
        try:
            maps.append(np.asarray(Image.open(path), np.float32) / 255)
        except OSError as error:
            raise DataError(
                f"{path} cannot be read ({error}). The evaluation writes it: delete the cell's DONE and run the same "
                "command again"
            ) from error
    return pairs_at(config.evaluate, record, np.stack(maps), bits_HW)


def _measured(pairs: list[MaskPair], rule: Rule, names: Sequence[str]) -> dict[str, float]:
    return mean_of_classes([metrics_after(pair, rule, names) for pair in pairs])


def _row(image: _Scored, rule: Rule, names: Sequence[str]) -> dict[str, t.Any]:
    """A line of the CSV: before and after, under the rule of the image's fold."""
    plain, chosen = (_measured(image.pairs, each, names) for each in (PLAIN, rule))
    return {
        **{"key": image.key, "fold": image.fold, "rule": rule.words},
        **{f"{name}:plain": value for name, value in plain.items()},
        **{f"{name}:chosen": value for name, value in chosen.items()},
    }


def _fold_choice(fold: int, folds: list[int], rule: Rule, rows: list[dict[str, t.Any]]) -> FoldChoice:
    own = [row for row in rows if row["fold"] == fold]
    names = [name.removesuffix(":plain") for name in own[0] if name.endswith(":plain")]

    def means(which: str) -> dict[str, float | None]:
        values = {name: [row[f"{name}:{which}"] for row in own] for name in names}
        return {name: None if np.isnan(each).all() else float(np.nanmean(each)) for name, each in values.items()}

    others = [other for other in folds if other != fold]
    return FoldChoice(
        fold=fold, chosen_on=others, rule=rule, images=len(own), plain=means("plain"), chosen=means("chosen")
    )
