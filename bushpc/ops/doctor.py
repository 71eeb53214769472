"""`bushpc doctor`: will it work here? Checks on the login node everything that a run needs, and changes nothing.

    overrides → installation → configuration → data, weights → folders → cluster → a table of checks

Every check is a function of the composed config that yields its results; most are in doctor_installation.py and
doctor_folders.py. `bushpc.ops.survey` checks on a compute node, in a short job, what the login node cannot know.
"""

from __future__ import annotations

import typing as t
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from bushpc import weights
from bushpc.cluster.base import cluster_for
from bushpc.cluster.checks import BROKEN, OK, WARNING, Check, is_broken, one_line, run_check
from bushpc.config import CellConfig, compose
from bushpc.data.external import open_external
from bushpc.data.mixture import open_synthetic
from bushpc.errors import BushpcError
from bushpc.ops.doctor_folders import FOLDERS, folds_of
from bushpc.ops.doctor_installation import DEVICES, INSTALLATION
from bushpc.shards.manifest import Manifest, verify

if t.TYPE_CHECKING:
    from rich.table import Table

STYLES = {OK: "green", WARNING: "yellow", BROKEN: "red"}


def examine(overrides: Sequence[str]) -> list[Check]:
    """All checks that the login node can make of this configuration; none of them raises.

    Raises: ConfigError for overrides that cannot be composed, unless it is the installation that is broken.
    """
    checks = [check for name, check_ in INSTALLATION for check in run_check(name, check_)]
    try:
        config = compose(overrides)
    except Exception as error:
        if isinstance(error, BushpcError) and not is_broken(checks):
            raise
        return [
            *checks,
            Check(name="configuration", verdict=BROKEN, found=one_line(error), advice="mend the rest first"),
        ]
    return checks + check_config(config)


def check_config(config: CellConfig) -> list[Check]:
    """The checks of one composed configuration: data, weights, folders, and the cluster."""
    found = [check for name, check_ in CONFIGURED for check in run_check(name, check_, config)]
    return found + check_cluster(config)


def check_cluster(config: CellConfig) -> list[Check]:
    """Only what the cluster needs to accept a job, for `bushpc.ops.survey` to ask before it submits."""
    parts = cluster_for(config.cluster.executor).checks()
    return [check for name, check_ in parts for check in run_check(name, check_, config.cluster)]


def checks_table(checks: Sequence[Check]) -> Table:
    """What a terminal shows."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("check", "", "found", "what to do"):
        table.add_column(column, overflow="fold", no_wrap=column in ("check", ""))
    for check in checks:
        style = STYLES[check.verdict]
        table.add_row(escape(check.name), f"[{style}]{check.verdict}[/]", escape(check.found), escape(check.advice))
    return table


def plain_lines(check: Check) -> str:
    """What a log shows."""
    return f"{check.verdict:<8}{check.name}: {check.found}" + (f"\n        → {check.advice}" if check.advice else "")


def _shards(config: CellConfig) -> Iterator[Check]:
    manifest = Manifest.load(config.data.folder)
    found = f"{len(manifest.records)} scans of {manifest.dataset}" + (" (an excerpt)" if manifest.excerpt else "")
    if config.data.stream:
        found += f"; the tars stream from {config.data.stream} and are not looked at here"
    else:
        verify(config.data.folder, manifest, deep=True)
        found += f" in {len(manifest.shards)} tars, every SHA-256 as packed"
    yield Check(name="shards", verdict=OK, found=found)
    if config.data.mixed:
        added = open_synthetic(str(config.data.synthetic), config.fold or 0, config.data.synthetic_sha256)
        added.added_to(manifest)
        verify(added.folder, added.manifest, deep=True)
        found = f"{len(added.manifest.records)} synthetic scans, which may train, every SHA-256 as packed"
        yield Check(name="synthetic shards", verdict=OK, found=found)
    for name, folder in zip(config.evaluate.external_names, map(Path, config.evaluate.external), strict=True):
        external = open_external(folder, manifest)
        verify(folder, external, deep=True)
        found = f"{len(external.records)} scans to be scored as well, every SHA-256 as packed"
        yield Check(name=f"shards of {name}", verdict=OK, found=found)


def _folds(config: CellConfig) -> Iterator[Check]:
    folds = folds_of(config)
    if config.fold is not None:
        folds.validation(config.fold)  # refuses a fold that does not exist
    what = "scans, normal ones included" if config.data.normals else "lesions"
    found = f"{folds.count} folds of {len(folds.fold_by_key)} {what}, no patient in two of them"
    yield Check(name="folds", verdict=OK, found=found)


def _weights(config: CellConfig) -> Iterator[Check]:
    model = config.model.for_fold(config.fold or 0)
    weights.require(config.model_class, model, config.weights_folder)
    count = len(model.weight_files())
    found = f"{count} file(s) staged and verified" if count else "this configuration loads none"
    yield Check(name="weights", verdict=OK, found=found)


def _trainer(config: CellConfig) -> Iterator[Check]:
    config.check_prompts(in_grid=False)
    config.model.check_run(config)
    if config.model_class.trainer:
        yield Check(name="trainer", verdict=OK, found="the model's own; its package is there, and it can follow this")


CONFIGURED: tuple[tuple[str, Callable[[CellConfig], Iterable[Check]]], ...] = (
    *DEVICES,
    ("shards", _shards),
    ("folds", _folds),
    ("weights", _weights),
    ("trainer", _trainer),
    *FOLDERS,
)
