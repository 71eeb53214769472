"""What `bushpc doctor` asks of folders and limits: file system, room on disk and in memory, open files."""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import typing as t
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from bushpc import environment
from bushpc.cluster.base import cluster_for
from bushpc.cluster.checks import BROKEN, OK, WARNING, Check, one_line
from bushpc.config import CellConfig
from bushpc.data.room import places, room
from bushpc.errors import ConfigError
from bushpc.files import size_text
from bushpc.ops.doctor_installation import IMPORTS_S
from bushpc.shards.manifest import Manifest
from bushpc.shards.split import find_folds, load_folds

ANSWERS_S = 60
CLOCK_S = 2.0
OPEN_FILES = 1024
# Bytes of a float32, and how many more of them AdamW keeps per trained parameter.
FLOAT, ADAM_MOMENTS = 4, 2


def expected_checkpoint_bytes(config: CellConfig, cells: int) -> tuple[float, int, int]:
    """(bytes on the disk at the fullest, parameters trained, parameters in all) of a run of `cells` cells.

    Per trained parameter: the weight, AdamW's two moments and the moving average where there is one, in float32. The
    checkpoint being written counts too. Parameters that no step changes are stored once per run. The model is built
    on torch's meta device, so neither memory nor weight files are needed. Raises: ConfigError for a model whose own
    trainer builds it.
    """
    import torch

    if config.model_class.trainer:
        raise ConfigError("its own trainer plans the network from the data")
    with torch.device("meta"):
        model = config.model_class(dataclasses.replace(config.model.for_fold(config.fold or 0), pretrained=False))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    train = config.train
    kept = train.keep + 1 + (train.iterations // train.keep_every if train.keep_every else 0) + bool(train.keep_best)
    copies = 1 + ADAM_MOMENTS + bool(train.ema)
    return FLOAT * (cells * kept * copies * trained + total - trained), trained, total


def _run_folder(config: CellConfig) -> Iterator[Check]:
    """Writing, renaming over an existing file, flushing, locks between processes, and the file server's clock."""
    folder = _existing(Path(config.runs_dir or "."))
    system = _file_system(folder)
    try:
        aside = tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-")
    except OSError as error:
        advice = "choose another with runs_dir=FOLDER"
        yield Check(name="run folder", verdict=BROKEN, found=f"{folder} cannot be written: {error}", advice=advice)
        return
    with aside as name:
        yield _whole_writes(Path(name), f"{folder} ({system})")
        yield _locks(Path(name))
        yield _clock(Path(name))
    if not cluster_for(config.cluster.executor).one_machine and system in ("tmpfs", "ramfs"):
        found = f"{folder} is in this node's memory: compute nodes do not see it"
        yield Check(name="run folder", verdict=BROKEN, found=found, advice="runs_dir=FOLDER on a shared file system")


def _whole_writes(folder: Path, where: str) -> Check:
    from bushpc.files import write_atomically

    target = folder / "file"
    write_atomically(target, "old")
    write_atomically(target, "new")
    (folder / "aside").mkdir()
    (folder / "aside").rename(folder / "sealed")
    if target.read_text() != "new" or not (folder / "sealed").is_dir():
        return Check(
            name="run folder",
            verdict=BROKEN,
            found=f"{where}: a renamed file is not what was written",
            advice="checkpoints are sealed by a rename: choose another file system with runs_dir=FOLDER",
        )
    return Check(name="run folder", verdict=OK, found=f"{where}: writable, renames whole, flushes")


def _locks(folder: Path) -> Check:
    """Whether another process sees a lock that this one holds."""
    from bushpc.files import exclusive

    code = (
        "import sys, pathlib; from bushpc.files import exclusive\n"
        "with exclusive(pathlib.Path(sys.argv[1])) as alone: print(alone)"
    )
    with exclusive(folder / "lock") as alone:
        command = [sys.executable, "-c", code, str(folder / "lock")]
        env = environment.for_process(environment.WORKER)
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=IMPORTS_S, check=False)
        other = done.stdout.strip()
    if alone and other == "False":
        return Check(name="file locks", verdict=OK, found="hold between processes on this node")
    return Check(
        name="file locks",
        verdict=WARNING,
        found="do not hold between processes in the run folder",
        advice="never submit one run twice at the same time, or choose another file system with runs_dir=FOLDER",
    )


def _clock(folder: Path) -> Check:
    before = time.time()
    (folder / "clock").touch()
    stamped, after = (folder / "clock").stat().st_mtime, time.time()
    off = max(before - stamped, stamped - after, 0.0)
    if off <= CLOCK_S:
        return Check(name="clock", verdict=OK, found=f"within {CLOCK_S:.0f} s of the file server's")
    return Check(
        name="clock",
        verdict=WARNING,
        found=f"{off:.0f} s away from the file server's",
        advice="waiting times and heartbeats in `bushpc status` will be wrong by that: ask the site to mend its NTP",
    )


def _disk_room(config: CellConfig) -> Iterator[Check]:
    folder = _existing(Path(config.runs_dir or "."))
    free = shutil.disk_usage(folder).free
    cells = folds_of(config).count if config.fold is None else 1
    try:
        needed, trained, total = expected_checkpoint_bytes(config, cells)
    except Exception as error:  # not every model can be built without memory
        found = f"{size_text(free)} free; the checkpoints' size is not known ({one_line(error)})"
        yield Check(name="disk room", verdict=WARNING, found=found, advice="look at the first checkpoint's size")
        return
    found = (
        f"about {size_text(needed)} of checkpoints for {cells} cell(s) ({trained:,} of {total:,} parameters trained); "
        f"{size_text(free)} free, a quota not counted"
    )
    verdict = BROKEN if needed > free else WARNING if 2 * needed > free else OK
    advice = "" if verdict == OK else "make room, lower train.keep, or use another disk with runs_dir=FOLDER"
    yield Check(name="disk room", verdict=verdict, found=found, advice=advice)


def _image_cache(config: CellConfig) -> Iterator[Check]:
    """Where decoded images are kept on a node like this one: three bytes of image and one of mask per pixel."""
    if config.data.stream:
        return
    folders = [folder for place in places(config.loader) if os.access(folder := _existing(place), os.W_OK)]
    if not folders:
        found, advice = "no folder for decoded images can be written", "choose one with loader.cache_dir=FOLDER"
        yield Check(name="image cache", verdict=BROKEN, found=found, advice=advice)
        return
    samples = len(Manifest.load(config.data.folder).records)
    needed = samples * 4 * config.model.image_size**2
    folder = next((folder for folder in folders if room(folder) > needed), folders[-1])
    free = room(folder)
    found = f"{folder}: room for {size_text(free)}, decoded images take {size_text(needed)}"
    advice = "" if free > needed else "choose another with loader.cache_dir=FOLDER, or make room"
    yield Check(name="image cache", verdict=OK if free > needed else WARNING, found=found, advice=advice)


def _open_files(config: CellConfig) -> Iterator[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    verdict = OK if soft >= OPEN_FILES or soft == resource.RLIM_INFINITY else WARNING
    advice = "" if verdict == OK else f"`ulimit -n {min(4096, hard)}` in cluster.setup"
    yield Check(name="open files", verdict=verdict, found=f"at most {soft} per process", advice=advice)


def folds_of(config: CellConfig) -> t.Any:
    manifest = Manifest.load(config.data.folder)
    path = find_folds(manifest, config.data.folder, config.folds)
    return load_folds(path, manifest.records, manifest.excerpt, normals=config.data.normals)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists: a check makes none."""
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def _file_system(folder: Path) -> str:
    """The type of the file system that holds a folder: nfs4, lustre, ext4, tmpfs …"""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [(len(at), kind) for at, kind in mounts if folder.resolve().is_relative_to(at.replace("\\040", " "))]
    return max(holding)[1] if holding else "unknown"


FOLDERS: tuple[tuple[str, Callable[[CellConfig], Iterable[Check]]], ...] = (
    ("run folder", _run_folder),
    ("disk room", _disk_room),
    ("image cache", _image_cache),
    ("open files", _open_files),
)
