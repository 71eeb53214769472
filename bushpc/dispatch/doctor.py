"""`bushpc doctor`: will it work here? Looks on the login node at all that a run will need, and changes nothing.

    overrides → installation → configuration → data, weights → folders → machine or Slurm → a table of checks

Every check is a function of the composed config that yields what it found. `bushpc.dispatch.survey` asks a
compute node, by a short job, what cannot be known from here.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import typing as t
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bushpc import weights
from bushpc.config import CellConfig, ClusterConfig, compose
from bushpc.data.cache import places, room
from bushpc.data.external import open_external
from bushpc.data.mixture import open_synthetic
from bushpc.errors import BushpcError, ConfigError, DispatchError, unknown_name
from bushpc.shards.manifest import Manifest, verify
from bushpc.shards.split import find_folds, load_folds

if t.TYPE_CHECKING:
    from rich.table import Table

OK, WARNING, BROKEN = "ok", "warning", "broken"
STYLES = {OK: "green", WARNING: "yellow", BROKEN: "red"}
SLURM_COMMANDS = ("squeue", "sbatch", "scontrol", "sacct")
# A busy controller of a large site may think for this long.
ANSWERS_S = 60
IMPORTS_S = 180
CLOCK_S = 2.0
OPEN_FILES = 1024
# Of a node, as sinfo's %t writes them, less the sign that may follow.
OUT_OF_SERVICE = ("down", "drain", "drng", "fail", "failg")
GB = 1e9
MB = 1e6
# Bytes of one float32, and how many of them AdamW keeps per trained parameter beside it.
FLOAT, ADAM_MOMENTS = 4, 2
# Batches that torch's DataLoader keeps ready per worker.
PREFETCH = 2


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the table. verdict: ok, warning or broken. advice: what to do next; "" where nothing is to do."""

    name: str
    verdict: str
    found: str
    advice: str = ""


def examine(overrides: Sequence[str]) -> list[Check]:
    """All checks that the login node can make of this configuration; none of them raises.

    Raises: ConfigError for overrides that cannot be composed, unless it is the installation that is broken.
    """
    checks = [check for name, check_ in INSTALLATION for check in _run(name, check_)]
    try:
        config = compose(overrides)
    except Exception as error:
        if isinstance(error, BushpcError) and not is_broken(checks):
            raise
        return [*checks, Check(name="configuration", verdict=BROKEN, found=_line(error), advice="mend the rest first")]
    return checks + check_config(config)


def check_config(config: CellConfig) -> list[Check]:
    """The checks of one composed configuration: data, weights, folders, and the machine or Slurm."""
    place = SLURM if config.cluster.executor == "slurm" else LOCAL
    return [check for name, check_ in (*CONFIGURED, *place) for check in _run(name, check_, config)]


def check_slurm(config: CellConfig) -> list[Check]:
    """Only what a Slurm job needs to be taken, for `bushpc.dispatch.survey` to ask before it submits."""
    return [check for name, check_ in SLURM for check in _run(name, check_, config)]


def is_broken(checks: Iterable[Check]) -> bool:
    return any(check.verdict == BROKEN for check in checks)


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


def ask(*command: str) -> str:
    """What one of Slurm's commands says. Raises: DispatchError with its own reason."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=ANSWERS_S)
    except subprocess.CalledProcessError as error:
        raise DispatchError(f"`{' '.join(command)}` failed: {' '.join(error.stderr.split())}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise DispatchError(f"`{' '.join(command)}` failed: {error}") from error
    return answer.stdout


def partition_facts(cluster: ClusterConfig) -> list[dict[str, str]]:
    """What `scontrol show partition` says of each of the config's partitions (`low,high`), or of the default one.

    Raises: DispatchError for one that does not exist.
    """
    lines = ask("scontrol", "show", "partition", "--oneliner").splitlines()
    partitions = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines if line.strip()]
    by_name = {partition["PartitionName"]: partition for partition in partitions}
    if cluster.partition is None:
        default = [partition for partition in partitions if partition.get("Default") == "YES"]
        if not default:
            raise DispatchError(
                f"this cluster has no default partition: set cluster.partition to one of {', '.join(sorted(by_name))}"
            )
        return default[:1]
    names = cluster.partition.split(",")
    for name in names:
        if name not in by_name:
            raise DispatchError(unknown_name("cluster.partition", name, by_name))
    return [by_name[name] for name in names]


def site_settings() -> dict[str, str]:
    """Slurm's own configuration, as `scontrol show config` tells it: KillWait, JobRequeue, PreemptMode …"""
    pairs = (line.partition("=") for line in ask("scontrol", "show", "config").splitlines())
    return {key.strip(): value.strip() for key, equals, value in pairs if equals}


def minutes_of(limit: str) -> float:
    """A time limit in Slurm's notation, in minutes; infinite where there is none.

    >>> [minutes_of(text) for text in ("90", "1:30:00", "2-00:00:00", "UNLIMITED")]
    [90.0, 90.0, 2880.0, inf]
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if match is None:
        return math.inf
    days, first, second, third = (int(part) if part else None for part in match.groups())
    assert first is not None
    if days is not None or third is not None:  # D-HH[:MM[:SS]] or HH:MM:SS
        return (days or 0) * 1440.0 + first * 60 + (second or 0) + (third or 0) / 60
    return first + (second or 0) / 60


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


def _torch() -> Iterator[Check]:
    try:
        import torch
    except Exception as error:  # a broken torch raises whatever its shared libraries make it raise
        yield Check(name="torch", verdict=BROKEN, found=f"does not import: {_line(error)}", advice="install it again")
        return
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU only"
    yield Check(name="torch", verdict=OK, found=f"{torch.__version__}, built {built}")


# --- what the configuration needs ----------------------------------------------------------------------------------


def _gpus(config: CellConfig) -> Iterator[Check]:
    import torch

    needed = config.cluster.gpus_per_node
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen:
        yield Check(name="GPUs", verdict=OK, found=f"{seen} x {torch.cuda.get_device_name(0)}, driver {_driver()}")
    elif needed and config.cluster.executor == "local":
        found = f"none is seen, and cluster.gpus_per_node={needed} (driver {_driver()})"
        yield Check(name="GPUs", verdict=BROKEN, found=found, advice="cluster.gpus_per_node=0 trains on the CPU")
    else:
        where = "none on this node; `bushpc doctor --slurm` looks on a compute node" if needed else "none, none needed"
        yield Check(name="GPUs", verdict=OK, found=where)


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=ANSWERS_S)
    except (OSError, subprocess.SubprocessError):
        return "not found"
    return answer.stdout.partition("\n")[0]


def _deepspeed(config: CellConfig) -> Iterator[Check]:
    """In a process of its own: it prints, starts threads, and chooses its accelerator once and for all."""
    zero = config.engine.kind.startswith("zero")
    env = {**os.environ, **({"DS_ACCELERATOR": "cpu"} if config.engine.device == "cpu" else {})}
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
        done = subprocess.run(command, input=source, capture_output=True, text=True, timeout=IMPORTS_S, check=False)
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
    count = len(config.model_class.weight_files(model))
    found = f"{count} file(s) staged and verified" if count else "this configuration loads none"
    yield Check(name="weights", verdict=OK, found=found)


def _trainer(config: CellConfig) -> Iterator[Check]:
    config.model_class.check_run(config)
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
    if config.cluster.executor == "slurm" and system in ("tmpfs", "ramfs"):
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
    """Whether a second process notices a lock that this one holds."""
    from bushpc.files import exclusive

    code = (
        "import sys, pathlib; from bushpc.files import exclusive\n"
        "with exclusive(pathlib.Path(sys.argv[1])) as alone: print(alone)"
    )
    with exclusive(folder / "lock") as alone:
        command = [sys.executable, "-c", code, str(folder / "lock")]
        other = subprocess.run(command, capture_output=True, text=True, timeout=IMPORTS_S, check=False).stdout.strip()
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
        found = f"{free / GB:.0f} GB free; the checkpoints' size is not known ({_line(error)})"
        yield Check(name="disk room", verdict=WARNING, found=found, advice="look at the first checkpoint's size")
        return
    found = (
        f"about {needed / GB:.1f} GB of checkpoints for {cells} cell(s) ({trained:,} of {total:,} parameters trained); "
        f"{free / GB:.0f} GB free, a quota not counted"
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
    found = f"{free / GB:.1f} GB free, loader workers hold up to {needed / MB:.0f} MB"
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
    found = f"{folder}: room for {free / GB:.1f} GB, decoded images take {needed / MB:.0f} MB"
    advice = "" if free > needed else "choose another with loader.cache_dir=FOLDER, or make room"
    yield Check(name="image cache", verdict=OK if free > needed else WARNING, found=found, advice=advice)


def _open_files(config: CellConfig) -> Iterator[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    verdict = OK if soft >= OPEN_FILES or soft == resource.RLIM_INFINITY else WARNING
    advice = "" if verdict == OK else f"`ulimit -n {min(4096, hard)}` in cluster.setup"
    yield Check(name="open files", verdict=verdict, found=f"at most {soft} per process", advice=advice)


# --- this machine as the cluster -----------------------------------------------------------------------------------


def _machine(config: CellConfig) -> Iterator[Check]:
    from bushpc.dispatch.submit import local_parallel

    cluster, cores = config.cluster, len(os.sched_getaffinity(0))
    if shutil.which("flock") is None:
        found = "the command `flock` is missing; cells queue with it"
        yield Check(name="this machine", verdict=BROKEN, found=found, advice="install the package util-linux")
        return
    needed = cluster.ranks_per_node * cluster.cpus_per_rank
    found = f"{cores} cores; a cell takes {needed}, {local_parallel(cluster)} run side by side"
    advice = "" if needed <= cores else "lower cluster.ranks_per_node or cluster.cpus_per_rank"
    yield Check(name="this machine", verdict=OK if needed <= cores else WARNING, found=found, advice=advice)


# --- Slurm ---------------------------------------------------------------------------------------------------------


def _slurm_commands(config: CellConfig) -> Iterator[Check]:
    questions = {
        "squeue": ["squeue", "--noheader", f"--user={os.getuid()}"],
        "sbatch": ["sbatch", "--version"],
        "scontrol": ["scontrol", "ping"],
        "sacct": ["sacct", "--noheader", "--allocations", "--starttime=now"],
    }
    for name in SLURM_COMMANDS:
        needed = name != "sacct"
        advice = "run this on a login node, or use cluster=local" if needed else "nothing: bushpc does without it"
        try:
            found, verdict = ask(*questions[name]).strip().partition("\n")[0][:60], OK
        except DispatchError as error:
            found, verdict = str(error), BROKEN if needed else WARNING
        said = "answers" + (f": {found}" if name in ("sbatch", "scontrol") else "") if verdict == OK else found
        yield Check(name=name, verdict=verdict, found=said, advice="" if verdict == OK else advice)


def _partition(config: CellConfig) -> Iterator[Check]:
    """Slurm starts a job in whichever of its partitions can first, so it takes one that fits."""
    judged = [list(_one_partition(config.cluster, facts)) for facts in partition_facts(config.cluster)]
    some_fit = not all(is_broken(checks) for checks in judged)
    for check in itertools.chain(*judged):
        yield dataclasses.replace(check, verdict=WARNING) if some_fit and check.verdict == BROKEN else check


def _one_partition(cluster: ClusterConfig, facts: dict[str, str]) -> Iterator[Check]:
    name, most, wide = facts["PartitionName"], minutes_of(facts["MaxTime"]), facts.get("MaxNodes", "")
    problems = []
    if facts["State"] != "UP":
        problems.append((f"{name} is {facts['State']}", "wait, or choose another with cluster.partition"))
    for key, asked in (("time_min", cluster.time_min), ("report_time_min", cluster.report_time_min)):
        if asked > most:
            found = f"{name} allows jobs of {most:.0f} minutes, cluster.{key}={asked}"
            advice = f"cluster.{key}={most:.0f}: a cell that is stopped by the limit goes on in its next turn"
            problems.append((found, advice))
    if wide.isdecimal() and cluster.nodes > int(wide):
        found = f"{name} allows jobs of {wide} nodes, cluster.nodes={cluster.nodes}"
        problems.append((found, f"cluster.nodes={wide}"))
    for found, advice in problems:
        yield Check(name="partition", verdict=BROKEN, found=found, advice=advice)
    if not problems:
        limit = "without a limit" if most == math.inf else f"of at most {most:.0f} minutes"
        preempted = f"PreemptMode={facts['PreemptMode']}, GraceTime={facts['GraceTime']} s"
        yield Check(name="partition", verdict=OK, found=f"{name}: jobs {limit}; {preempted}")


def _nodes(config: CellConfig) -> Iterator[Check]:
    """Whether enough nodes of the partition have the cores, memory, GPUs and features that a cell asks of one node."""
    judged = [_fitting_nodes(config.cluster, facts["PartitionName"]) for facts in partition_facts(config.cluster)]
    some_fit = any(check.verdict != BROKEN for check in judged)
    for check in judged:
        yield dataclasses.replace(check, verdict=WARNING) if some_fit and check.verdict == BROKEN else check


def _fitting_nodes(cluster: ClusterConfig, name: str) -> Check:
    """The nodes of one partition. Slurm takes a job for nodes that are out of service, too, and lets it wait."""
    cores = cluster.ranks_per_node * cluster.cpus_per_rank
    fitting, away, seen = 0, 0, []
    rows = ask("sinfo", "--noheader", "--exact", f"--partition={name}", "--format=%c|%m|%G|%f|%D|%t").splitlines()
    for row in rows:
        cpus, megabytes, gres, features, count, state = row.split("|")
        gpus = gpus_of(gres)
        seen.append(f"{count} x {cpus} cores, {int(megabytes) / 1024:.0f} GB, {gpus} GPUs")
        fits = int(cpus) >= cores and gpus >= cluster.gpus_per_node
        fits &= cluster.mem_gb is None or int(megabytes) >= cluster.mem_gb * 1024
        # Only a plain feature is understood here; an expression such as `a|b` is Slurm's to judge.
        plain = re.fullmatch(r"[\w.-]+", cluster.constraint or "")
        fits &= plain is None or cluster.constraint in features.split(",")
        if fits and re.match(r"[a-z]*", state)[0] in OUT_OF_SERVICE:  # type: ignore[index]  # always matches
            away += int(count)
        elif fits:
            fitting += int(count)
    asked = f"{cluster.nodes} node(s) with {cores} cores, {cluster.gpus_per_node} GPUs"
    asked += f", {cluster.mem_gb} GB" if cluster.mem_gb else ""
    asked += f", feature {cluster.constraint}" if cluster.constraint else ""
    found = f"{fitting} of {name}'s nodes have what a cell asks for: {asked}"
    found += f"; {away} more are down or drained" if away else ""
    if fitting >= cluster.nodes:
        return Check(name="nodes", verdict=OK, found=found)
    if fitting + away >= cluster.nodes:
        advice = "jobs wait until the site brings them back; or choose another with cluster.partition"
        return Check(name="nodes", verdict=WARNING, found=found, advice=advice)
    advice = "ask for less (cluster.cpus_per_rank, ranks_per_node, gpus_per_node, mem_gb, constraint)"
    return Check(name="nodes", verdict=BROKEN, found=f"{found}; it has {'; '.join(seen)}", advice=advice)


def gpus_of(gres: str) -> int:
    """GPUs in a node's generic resources, as sinfo writes them.

    >>> [gpus_of(text) for text in ("(null)", "gpu:8(S:0-1)", "gpu:a100:4(S:0),gpu:v100:2,nvme:1")]
    [0, 8, 6]
    """
    return sum(int(count) for count in re.findall(r"gpu(?::[^:,()]+)??:(\d+)(?![\w.])", gres))


def _account(config: CellConfig) -> Iterator[Check]:
    """Accounts and qualities of service that accounting knows this user to have."""
    import getpass

    cluster = config.cluster
    asked = {"account": cluster.account, "qos": cluster.qos}
    if not any(asked.values()):
        yield Check(name="account and qos", verdict=OK, found="the cluster's defaults")
        return
    command = ["sacctmgr", "--noheader", "--parsable2", "show", "assoc"]
    rows = ask(*command, f"user={getpass.getuser()}", "format=account,qos").splitlines()
    pairs = [line.split("|") for line in rows if line]
    valid = {"account": {row[0] for row in pairs}, "qos": {name for row in pairs for name in row[1].split(",")}}
    # Without enforcement Slurm takes any name.
    strict = BROKEN if site_settings().get("AccountingStorageEnforce", "none") != "none" else WARNING
    for key, given in asked.items():
        if given is None:
            continue
        if given in valid[key]:
            yield Check(name=key, verdict=OK, found=given)
        else:
            yield Check(
                name=key,
                verdict=strict,
                found=unknown_name(f"cluster.{key}", given, valid[key] - {""}),
                advice=f"set cluster.{key}=null for the default, or ask the site",
            )


def _stopping(config: CellConfig) -> Iterator[Check]:
    """What is known about how jobs end, before the probe has measured it."""
    site, partitions = site_settings(), partition_facts(config.cluster)
    if site.get("JobRequeue") == "0":
        found = "JobRequeue=0: a preempted job comes back only if it asks for it, as the cells do (sbatch --requeue)"
        yield Check(name="requeue", verdict=OK, found=found)
    graces = " and ".join(f"{partition['GraceTime']} sec" for partition in partitions)
    told = f"KillWait={site.get('KillWait')}, GraceTime={graces}"
    if config.cluster.grace_s is None:
        advice = f"`bushpc doctor --slurm cluster={config.choices['cluster']} --write mysite` measures it"
        yield Check(name="grace time", verdict=WARNING, found=f"cluster.grace_s is not known ({told})", advice=advice)
    else:
        yield Check(name="grace time", verdict=OK, found=f"cluster.grace_s={config.cluster.grace_s:g} ({told})")


# --- helpers -------------------------------------------------------------------------------------------------------


def _run(name: str, check: Callable[..., Iterable[Check]], *args: t.Any) -> list[Check]:
    """One check's findings; if it fails itself, that is a finding, and the ones before it are kept."""
    found: list[Check] = []
    try:
        for finding in check(*args):  # one by one: those before a failure are kept
            found.append(finding)
    except BushpcError as error:
        what, _, then = str(error).rpartition("\nRun: ")
        found.append(Check(name=name, verdict=BROKEN, found=what or then, advice=f"run: {then}" if what else ""))
    except Exception as error:
        found.append(Check(name=name, verdict=BROKEN, found=f"the check itself failed: {_line(error)}"))
    return found


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


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
)
CONFIGURED: tuple[tuple[str, Callable[[CellConfig], Iterable[Check]]], ...] = (
    ("GPUs", _gpus),
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
LOCAL = (("this machine", _machine),)
SLURM: tuple[tuple[str, Callable[[CellConfig], Iterable[Check]]], ...] = (
    ("Slurm", _slurm_commands),
    ("partition", _partition),
    ("nodes", _nodes),
    ("account and qos", _account),
    ("stopping", _stopping),
)
