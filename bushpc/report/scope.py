"""Runs → what one report covers: its arms side by side, its metrics, and the baseline that arms are compared with.

A cross-validation has one arm, a grid has one per row, and a comparison has those of all its runs. The code after this
file only knows the scope, so all three are reported by the same code.
"""

from __future__ import annotations

import typing as t
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas as pd

from bushpc.errors import DataError
from bushpc.metrics.registry import ALWAYS, IMAGE_METRICS, METRICS, TWO_CLASS
from bushpc.report.per_image import PROB_COLUMNS
from bushpc.report.published import find_published
from bushpc.report.read_run import read_run
from bushpc.report.results import Arm, Run
from bushpc.sample import LABELS


class ArmVariant(t.NamedTuple):
    """A line of the tables: an arm under one prompt source."""

    arm: Arm
    source: str
    label: str

    @property
    def uses_ground_truth(self) -> bool:
        return self.arm.uses_ground_truth(self.source)


@dataclass(frozen=True)
class ReportScope:
    """What one report covers. kind: cv, grid, train or compare. arms: in the order shown; `baseline` is one of them."""

    title: str
    kind: str
    runs: list[Run]
    arms: list[Arm]
    baseline: Arm

    @cached_property
    def entries(self) -> list[ArmVariant]:
        """A single arm under all its prompt sources; several arms, each under its headline source.

        Arms without a complete fold have no entry.
        """
        if len(self.arms) == 1:
            (arm,) = self.arms
            return [ArmVariant(arm, source, f"{arm.model}, {arm.source_label(source)}") for source in arm.sources]
        evaluated = [arm for arm in self.arms if arm.sources]
        mixed = len({arm.headline for arm in evaluated}) > 1
        return [ArmVariant(arm, arm.headline, _label(arm, mixed)) for arm in evaluated]

    @cached_property
    def _chosen(self) -> list[str]:
        chosen = list(dict.fromkeys(name for arm in self.arms for name in arm.metrics)) or list(ALWAYS)
        return list(dict.fromkeys([*chosen, *self._of_papers(chosen)]))

    def _of_papers(self, chosen: list[str]) -> list[str]:
        """2-class means of chosen metrics that a paper prints of this dataset.

        They follow from the counts of pixels, so every run has them; without ours, the paper's would stand beside
        figures of another quantity.
        """
        tables = (find_published(arm.run.data, arm.model, "overall") for arm in self.arms)
        printed = dict.fromkeys(name for table in tables if table for name in table.metrics)
        return [name for name in printed if name.endswith(TWO_CLASS) and name.removesuffix(TWO_CLASS) in chosen]

    @cached_property
    def undefined(self) -> list[str]:
        """Metrics that were asked for but are undefined for all images of all entries."""
        rows = [entry.arm.rows(entry.source) for entry in self.entries]
        return [name for name in self._chosen if rows and not any(_is_defined(name, frame) for frame in rows)]

    @cached_property
    def metrics(self) -> list[str]:
        """The metrics that the tables show: those of the runs' configs, in order, the first run's first."""
        return [name for name in self._chosen if name not in self.undefined]

    @property
    def image_metrics(self) -> list[str]:
        """The shown metrics of single images."""
        return [name for name in self.metrics if name in IMAGE_METRICS]

    @property
    def tested(self) -> list[str]:
        """The image metrics that are tested: all but rates of pixels. A threshold trades those for one another, so a
        better one alone means nothing (XBusNet 3.1 tests Dice and IoU). Empty for models that only give labels.
        """
        found = [name for name in self.image_metrics if METRICS[name].tested]
        return found or (["dice"] if self.image_metrics or not self.metrics else [])

    @property
    def measured(self) -> list[str]:
        """All metrics that need figures: the shown ones, and the tested ones even if they aren't shown."""
        return list(dict.fromkeys([*self.metrics, *self.tested]))

    @property
    def headline_metric(self) -> str:
        """The metric that has intervals and ranks: Dice as in the papers (XBusNet 3.1, hybrid attention 5.1.1), on the
        original scans if all arms have it there, else the first tested one, else the first shown one.
        """
        for name in ("dice_original", "dice"):
            if name in self.tested and all(name in arm.metrics for arm in self.arms if arm.metrics):
                return name
        return "dice" if "dice" in self.tested else [*self.tested, *self.metrics][0]

    @property
    def segments(self) -> bool:
        """Whether any arm has masks, or may have some later."""
        return not self.entries or any(_is_defined("fpr", entry.arm.rows(entry.source)) for entry in self.entries)

    @property
    def external(self) -> list[str]:
        """Other datasets that arms were scored on."""
        return list(dict.fromkeys(name for arm in self.arms for name in arm.external))

    @property
    def reference(self) -> ArmVariant | None:
        """The entry that the others are compared with; None while the baseline has no complete fold."""
        found = (entry for entry in self.entries if entry.arm is self.baseline and entry.source == entry.arm.headline)
        return next(found, None)


def _is_defined(name: str, rows: pd.DataFrame) -> bool:
    if name in IMAGE_METRICS:
        return bool(rows[name].notna().any())
    labelled = rows[rows["label"].isin(LABELS) & rows[PROB_COLUMNS[0]].notna()]
    return labelled["label"].nunique() > (1 if name == "label_auc" else 0)


def _label(arm: Arm, mixed: bool) -> str:
    says_source = mixed or arm.uses_ground_truth(arm.headline)
    return f"{arm.label}, {arm.source_label(arm.headline)}" if says_source else arm.label


def scope_of_run(run_dir: Path) -> ReportScope:
    """What the report of one run covers. Raises: DataError if its folder contradicts itself."""
    run = read_run(run_dir)
    title = run.record.grid.title if run.record.grid else run.arms[0].model
    return ReportScope(f"{title} ({run.record.name})", run.record.kind, [run], run.arms, run.baseline)


def scope_of_runs(run_dirs: Sequence[Path]) -> ReportScope:
    """What a comparison of several runs on the same data and folds covers.

    Raises: DataError for fewer than two runs, a run given twice, or runs that cannot be compared image by image.
    """
    if len(run_dirs) < 2:
        raise DataError(
            f"compare was given {len(run_dirs)} run(s); it needs two or more: bushpc compare RUN RUN…. "
            "For one run write: bushpc report RUN"
        )
    folders = [folder.resolve() for folder in run_dirs]
    twice = [str(given) for given, folder in zip(run_dirs, folders, strict=True) if folders.count(folder) > 1]
    if twice:
        raise DataError(f"compare was given the same run twice ({', '.join(twice)}). Give every run once.")
    runs = [read_run(folder) for folder in run_dirs]
    for run in runs[1:]:
        _refuse_other_data(runs[0], run)
    names = [run.record.name for run in runs]
    # Runs of the same name are in different folders, which tell them apart.
    titles = [str(run.path) if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]
    arms = [_named(arm, run, name) for run, name in zip(runs, titles, strict=True) for arm in run.arms]
    baseline = arms[runs[0].arms.index(runs[0].baseline)]
    return ReportScope(f"Comparison of {' and '.join(titles)}", "compare", runs, arms, baseline)


def _named(arm: Arm, run: Run, name: str) -> Arm:
    label = f"{name}: {arm.label}" if len(run.arms) > 1 else f"{name} ({arm.model})"
    return replace(arm, name=f"{name}/{arm.name}", label=label)


def _refuse_other_data(first: Run, other: Run) -> None:
    for what, key in (("datasets", "data"), ("packed data (manifests)", "manifest_sha256")):
        ours, theirs = getattr(first.record, key), getattr(other.record, key)
        if ours != theirs:
            raise DataError(
                f"mixed {what} in one comparison: {first.path} has {ours}, {other.path} has {theirs}. "
                "Allowed are runs on the same packed data: compare those, or run one of them again."
            )
    if first.record.folds.sha256 != other.record.folds.sha256:
        folds = [f"{run.path} has {run.record.folds.source} {run.record.folds.sha256[:12]}" for run in (first, other)]
        raise DataError(
            f"mixed folds in one comparison: {', '.join(folds)}. An image would be judged by models that trained on "
            "other images. Allowed are runs on the same folds file: compare those, or run one of them again with "
            "folds=… as the other."
        )
