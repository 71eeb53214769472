"""Shards → a folder in a format that others read: `bushpc shards export`. Whole, or not there."""

from __future__ import annotations

import os
import shutil
import socket
import typing as t
from collections.abc import Callable, Mapping
from pathlib import Path

from bushpc.errors import ConfigError, DataError
from bushpc.files import flush_folder
from bushpc.shards.card import Card
from bushpc.shards.exchange import to_coco, to_nnunet
from bushpc.shards.exchange.packed import Scans
from bushpc.shards.manifest import Manifest
from bushpc.shards.progress import Show
from bushpc.shards.split import find_folds, load_folds, read_fold_numbers

FORMATS = ("nnunet", "coco")
_WRITERS: dict[str, Callable[[Scans, Path], None]] = {"nnunet": to_nnunet.write, "coco": to_coco.write}


class Exported(t.NamedTuple):
    """scans: how many. folds: how many, 0 without. unassigned: scans that have no fold. why: there are no folds."""

    scans: int
    folds: int
    unassigned: int
    why: str


def export(folder: Path, out: Path, kind: str, *, folds: str | None = None, show: Show) -> Exported:
    """Write the packed dataset in `folder` to `out`.

    folds: frozen, published or grouped; None takes the frozen ones where there are any.
    Raises: ConfigError if `out` has content; DataError for shards or folds that are missing or damaged.
    """
    if kind == "coco":
        to_coco.require_pycocotools()
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder: choose another with out=…, or delete it")
    manifest = Manifest.load(folder)
    fold_of, why = _folds(folder, manifest, folds)
    card = Card.find(manifest.dataset, folder)
    aside = out.with_name(f".{out.name}.{socket.gethostname()}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        _WRITERS[kind](Scans(folder=folder, manifest=manifest, card=card, folds=fold_of, show=show), aside)
        aside.rename(out)
        flush_folder(out.parent)
    except OSError as error:
        raise DataError(f"{out} could not be written ({error}); nothing was left there") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    count = max(fold_of.values(), default=-1) + 1
    return Exported(len(manifest.records), count, len(manifest.records) - len(fold_of), why)


def _folds(folder: Path, manifest: Manifest, wanted: str | None) -> tuple[Mapping[str, int], str]:
    """(key → fold, "") or (nothing, why), where folds were not asked for."""
    try:
        path = find_folds(manifest, folder, wanted or "frozen")
        listed = read_fold_numbers(path)
        normals = any(record.key in listed for record in manifest.records if record.label == "normal")
        return load_folds(path, manifest.records, manifest.excerpt, normals=normals).fold_by_key, ""
    except DataError as error:
        if wanted:
            raise
        return {}, str(error)
