"""Which checkpoints of a cell are kept: the newest, every so many steps, the best."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bushpc.errors import ResumeError
from bushpc.runs.checkpoint import READING_FAILS, delete, paths_in, validation_of, verify


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints to keep: the newest `keep`, those at multiples of `every` (0 for none), and the best.

    best: a validation metric (`more`: higher is better); None for none.
    """

    keep: int
    every: int = 0
    best: str | None = None
    more: bool = True


def retain(folder: Path, rule: Retention, log: Callable[[str], None] = print) -> None:
    """Delete the checkpoints that `rule` does not keep, and leftovers of killed writers. Call it after a sealed write.

    Nothing is deleted unless the newest checkpoint verifies, so the last good one survives a faulty disk.
    Raises: OSError for what cannot be deleted; it no longer counts as a checkpoint, and the next call tries again.
    """
    for path in _surplus(folder, rule, log):
        # Rename first: a kill during the deletion must not leave a partial checkpoint that looks sealed.
        path.rename(path.with_name(f".{path.name}.deleted"))
    errors = []
    for path in folder.glob(".step_*"):
        try:
            delete(path)
        except OSError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _surplus(folder: Path, rule: Retention, log: Callable[[str], None]) -> list[Path]:
    paths = paths_in(folder)
    kept = _kept(paths, rule)
    if len(paths) == len(kept):
        return []
    try:
        verify(paths[max(paths)])
    except ResumeError as error:
        log(f"{error}; as it is the newest, no older checkpoint is deleted")
        return []
    return [path for step, path in paths.items() if step not in kept]


def _kept(paths: dict[int, Path], rule: Retention) -> set[int]:
    """The steps of `paths` (ascending) that `rule` keeps."""
    kept = set(list(paths)[-rule.keep :])
    if rule.every:
        kept |= {step for step in paths if step % rule.every == 0}
    if rule.best and len(paths) > len(kept):
        scores = {step: score for step, path in paths.items() if (score := _score(path, rule.best)) is not None}
        if scores:
            kept.add((max if rule.more else min)(scores, key=lambda step: scores[step]))
    return kept


def _score(path: Path, metric: str) -> float | None:
    """One metric of a checkpoint's validation; None without one, or if it is not finite."""
    try:
        value = float((validation_of(path) or {})[metric])
    except READING_FAILS:
        return None
    return value if math.isfinite(value) else None
