"""What `bushpc doctor` asks of the installation: Python, packages, torch and its GPUs, DeepSpeed, compiler."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator

from bushpc import environment
from bushpc.cluster.base import cluster_for
from bushpc.cluster.checks import BROKEN, OK, WARNING, Check, one_line
from bushpc.config import CellConfig
from bushpc.config.gpu_memory import estimate, images_at_a_time, smallest, too_large
from bushpc.config.gpus import memory_gb
from bushpc.errors import DispatchError
from bushpc.ops.gpu_build import Build, gpus_and_driver, judge_profile

IMPORTS_S = 180


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
    names, here = _gpu_names(config), cluster_for(config.cluster.executor).one_machine
    yield from judge_profile(Build.installed(), names, here=here, precision=config.engine.precision)


def _gpu_names(config: CellConfig) -> list[str]:
    try:
        return cluster_for(config.cluster.executor).gpu_names(config.cluster)
    except DispatchError:  # the cluster's own checks report a site that does not answer
        return []


def _gpu_memory(config: CellConfig) -> Iterator[Check]:
    """A training step against the smallest GPU that a job may get, where both are known (config/gpu_memory.yaml)."""
    expected = estimate(config) if config.cluster.gpu_count else None
    if expected is None:
        return
    names = _gpu_names(config)
    name = smallest(names)
    if name is None:
        return
    if problem := too_large(config, names):
        found, _, advice = problem.partition(": ")
        yield Check(name="GPU memory", verdict=WARNING, found=found, advice=advice)
        return
    images, most = images_at_a_time(config), expected.fits(memory_gb(name) or 0.0)
    found = f"about {expected.peak_gb(images):.1f} GB for {images} image(s) at a time; {most} fit {name} (an estimate)"
    yield Check(name="GPU memory", verdict=OK, found=found)


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


INSTALLATION: tuple[tuple[str, Callable[[], Iterable[Check]]], ...] = (
    ("Python", _python),
    ("packages", _packages),
    ("torch", _torch),
    ("DICOM decoders", _decoders),
)
DEVICES: tuple[tuple[str, Callable[[CellConfig], Iterable[Check]]], ...] = (
    ("GPUs", _gpus),
    ("GPU and build", _gpu_build),
    ("GPU memory", _gpu_memory),
    ("DeepSpeed", _deepspeed),
    ("C++ compiler", _compiler),
)
