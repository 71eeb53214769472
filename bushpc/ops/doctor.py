"""`bushpc doctor`: will it work here? Checks on the login node everything that a run needs, and changes nothing.

    overrides → installation → configuration → data, weights → folders → cluster → a table of checks

Every check is a function of the composed config that yields its results. `bushpc.ops.survey` checks on a compute
node, in a short job, what the login node cannot know.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import typing as t
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from bushpc import environment, weights
from bushpc.cluster.base import cluster_for
from bushpc.cluster.checks import BROKEN, OK, WARNING, Check, is_broken, one_line, run_check
from bushpc.config import CellConfig, compose
from bushpc.data.cache import places, room
from bushpc.data.external import open_external
from bushpc.data.mixture import open_synthetic
from bushpc.errors import BushpcError, ConfigError, DispatchError
from bushpc.files import size_text
from bushpc.ops.gpu_build import Build, gpus_and_driver, judge_profile
from bushpc.shards.manifest import Manifest, verify
from bushpc.shards.split import find_folds, load_folds

if t.TYPE_CHECKING:
    from rich.table import Table

STYLES = {OK: "green", WARNING: "yellow", BROKEN: "red"}
ANSWERS_S = 60
IMPORTS_S = 180
CLOCK_S = 2.0
OPEN_FILES = 1024
# Bytes of a float32, and how many more of them AdamW keeps per trained parameter.
FLOAT, ADAM_MOMENTS = 4, 2
# Batches that torch's DataLoader keeps ready per worker.
PREFETCH = 2


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


# --- the installation ----------------------------------------------------------------------------------------------


def _python() -> Iterator[Check]:
    from importlib.metadata import metadata

    from packaging.specifiers import SpecifierSet

    wanted, found = metadata("bushpc")["Requires-Python"], platform.python_version()
    fits = SpecifierSet(wanted).contains(found)
    advice = "" if fits else f"make the environment with a Python {wanted}"
    yield Check(name="Python", verdict=OK if fits else BROKEN, found=f"{found}, {sys.executable}", advice=advice)


def _packages() -> Iterator[Check]:
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in requires("bushpc") or ()]
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    install = "pip install -c constraints.txt -e . (in the clone)"
    misfits = 0
    for one in wanted:
        try:
            found = version(one.name)
        except PackageNotFoundError:
            found = "not installed"
        if found == "not installed" or not one.specifier.contains(found, prereleases=True):
            misfits += 1
            said = f"{found}; wanted is {one.specifier}"
            yield Check(name=f"package {one.name}", verdict=BROKEN, found=said, advice=install)
    if not misfits:
        yield Check(name="packages", verdict=OK, found=f"all {len(wanted)} installed, each within its range")


def _decoders() -> Iterator[Check]:
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import JPEG2000Lossless, JPEGExtended12Bit, JPEGLosslessSV1, JPEGLSLossless

    kinds = {"JPEG Lossless": JPEGLosslessSV1, "JPEG-LS": JPEGLSLossless, "JPEG 2000": JPEG2000Lossless}
    missing = [name for name, uid in kinds.items() if not get_decoder(uid).is_available]
    # Pillow counts as a decoder of JPEG Extended, but only of its 8-bit kind.
    missing += [] if "pylibjpeg" in get_decoder(JPEGExtended12Bit).available_plugins else ["12-bit JPEG"]
    found = f"compressed with {', '.join(missing)} cannot be decoded" if missing else "every common compression"
    advice = "only if `bushpc predict` shall read such files: pip install 'bushpc[dicom]'" if missing else ""
    yield Check(name="DICOM decoders", verdict=OK, found=found, advice=advice)


def _torch() -> Iterator[Check]:
    try:
        import torch
    except Exception as error:  # a broken torch raises whatever its shared libraries make it raise
        yield Check(
            name="torch", verdict=BROKEN, found=f"does not import: {one_line(error)}", advice="install it again"
        )
        return
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU only"
    yield Check(name="torch", verdict=OK, found=f"{torch.__version__}, built {built}")


# --- what the configuration needs ----------------------------------------------------------------------------------


def _gpus(config: CellConfig) -> Iterator[Check]:
    import torch

    needed = config.cluster.gpu_count
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen:
        yield Check(name="GPUs", verdict=OK, found=f"{seen} x {torch.cuda.get_device_name(0)}, driver {_driver()}")
    elif needed and cluster_for(config.cluster.executor).one_machine:
        found = f"none is seen, and cluster.gpus={needed} (driver {_driver()})"
        yield Check(name="GPUs", verdict=BROKEN, found=found, advice="cluster.gpus=0 trains on the CPU")
    else:
        where = "none on this node; `bushpc doctor --slurm` looks on a compute node" if needed else "none, none needed"
        yield Check(name="GPUs", verdict=OK, found=where)


def _driver() -> str:
    return gpus_and_driver()[1] or "not found"


def _gpu_build(config: CellConfig) -> Iterator[Check]:
    """Driver, GPU and build, as far as profile, site and this machine tell."""
    if not config.cluster.gpu_count:
        return
    if config.cluster.container.used:
        found = "the torch of the container counts; `bushpc doctor --slurm` tries it on a node"
        yield Check(name="GPU and build", verdict=OK, found=found)
        return
    cluster = cluster_for(config.cluster.executor)
    names: list[str] = []
    with contextlib.suppress(DispatchError):  # the cluster's own checks report a site that does not answer
        names = cluster.gpu_names(config.cluster)
    yield from judge_profile(Build.installed(), names, here=cluster.one_machine, precision=config.engine.precision)


def _deepspeed(config: CellConfig) -> Iterator[Check]:
    """Run in a separate process, because DeepSpeed prints, starts threads and fixes its accelerator at import."""
    zero = config.engine.kind.startswith("zero")
    env = environment.for_process(environment.WORKER)
    env |= {"DS_ACCELERATOR": "cpu"} if config.engine.device == "cpu" else {}
    command = [sys.executable, "-c", "import deepspeed"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=IMPORTS_S, check=False)
    if done.returncode == 0:
        yield Check(name="DeepSpeed", verdict=OK, found=f"imports, for {config.engine.device}")
        return
    said = done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}"
    found = f"does not import: {said}"
    advice = "engine=ddp does without it" if zero else "engine=ddp does without it; ZeRO will not run"
    yield Check(name="DeepSpeed", verdict=BROKEN if zero else WARNING, found=found, advice=advice)


def _compiler(config: CellConfig) -> Iterator[Check]:
    """torch.compile writes C++ on the CPU; on GPUs Triton compiles a launcher against Python's headers."""
    if not config.engine.compile:
        return
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    advice = "install a C++ compiler and Python's headers, load the site's module, or use engine.compile=false"
    if compiler is None:
        yield Check(name="C++ compiler", verdict=BROKEN, found="none, and engine.compile=true", advice=advice)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, "-x", "c++", "-", f"-I{sysconfig.get_paths()['include']}", "-c", "-o", f"{folder}/out.o"]
        source = "#include <Python.h>\n#include <vector>\nint main() { return 0; }\n"
        env = environment.for_process(environment.WORKER)
        done = subprocess.run(
            command, input=source, env=env, capture_output=True, text=True, timeout=IMPORTS_S, check=False
        )
    if done.returncode:
        found = f"{compiler} fails: {done.stderr.strip().partition(chr(10))[0]}"
        yield Check(name="C++ compiler", verdict=BROKEN, found=found, advice=advice)
    else:
        yield Check(name="C++ compiler", verdict=OK, found=f"{compiler} compiles with Python's headers")


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
    folds = _load_folds(config)
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
    config.model.check_run(config)
    if config.model_class.trainer:
        yield Check(name="trainer", verdict=OK, found="the model's own; its package is there, and it can follow this")


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
    cells = _load_folds(config).count if config.fold is None else 1
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


def _shared_memory(config: CellConfig) -> Iterator[Check]:
    """Loader workers hand batches over through /dev/shm: image and mask in float32."""
    shm = Path("/dev/shm")
    if not config.loader.workers or not shm.exists():
        return
    per_node = config.train.batch_size / config.cluster.nodes * 4 * FLOAT * config.model.image_size**2
    needed, free = per_node * config.loader.workers * PREFETCH, shutil.disk_usage(shm).free
    found = f"{size_text(free)} free, loader workers hold up to {size_text(needed)}"
    verdict = OK if free > 2 * needed else WARNING
    advice = "" if verdict == OK else "lower loader.workers, or start the container with more shared memory"
    yield Check(name="shared memory", verdict=verdict, found=found, advice=advice)


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


# --- helpers -------------------------------------------------------------------------------------------------------


def _load_folds(config: CellConfig) -> t.Any:
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


INSTALLATION: tuple[tuple[str, Callable[[], Iterable[Check]]], ...] = (
    ("Python", _python),
    ("packages", _packages),
    ("torch", _torch),
    ("DICOM decoders", _decoders),
)
CONFIGURED: tuple[tuple[str, Callable[[CellConfig], Iterable[Check]]], ...] = (
    ("GPUs", _gpus),
    ("GPU and build", _gpu_build),
    ("DeepSpeed", _deepspeed),
    ("C++ compiler", _compiler),
    ("shards", _shards),
    ("folds", _folds),
    ("weights", _weights),
    ("trainer", _trainer),
    ("run folder", _run_folder),
    ("disk room", _disk_room),
    ("shared memory", _shared_memory),
    ("image cache", _image_cache),
    ("open files", _open_files),
)
