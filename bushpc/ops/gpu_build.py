"""Do driver, GPU and the installed torch fit together? Known before the queue from names and versions alone.

GPU names (profile, site or node), driver (node) ─judge→ checks ← Build (the installed torch)
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import typing as t
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bushpc import environment
from bushpc.cluster.checks import BROKEN, OK, Check
from bushpc.config.gpus import Capability, capability_of, has_bf16

Version = tuple[int, ...]
# NVIDIA, CUDA Toolkit Release Notes, "Minimum Required Driver Version for CUDA Minor Version Compatibility" on Linux:
# a driver runs every minor version of the same major version.
LEAST_DRIVER: dict[int, Version] = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580, 65, 6)}
# PyTorch's CUDA 12.6 builds have machine code up to this; for GPUs of later generations they have none.
CU126_UP_TO = Capability(9, 0)
CU126_FILE = "constraints-cuda126.txt"
AMD = re.compile(r"(?:^|[^a-z0-9])mi\d{2,3}|instinct|gfx\d", re.IGNORECASE)
GUIDE = "docs/how-to/install.md says how"
ANSWERS_S, TRIAL_S = 10, 180


@dataclass(frozen=True, kw_only=True)
class Build:
    """A build of torch. cuda, rocm: the version that it was made for, if any. arches: `sm_80`, `compute_90` …"""

    torch: str
    cuda: str | None = None
    rocm: str | None = None
    arches: tuple[str, ...] = ()

    @classmethod
    def installed(cls) -> Build:
        """The torch of this environment; it needs no GPU to tell."""
        import torch

        # torch.cuda.get_arch_list() tells nothing where there is no GPU, as on a login node.
        flags = getattr(torch._C, "_cuda_getArchFlags", lambda: "")() or ""
        return cls(
            torch=torch.__version__, cuda=torch.version.cuda, rocm=torch.version.hip, arches=tuple(flags.split())
        )

    @classmethod
    def of(cls, told: Mapping[str, t.Any]) -> Build:
        """From plain data, as a node tells it."""
        return cls(**{**told, "arches": tuple(told["arches"])})

    def __str__(self) -> str:
        made_for = f"CUDA {self.cuda}" if self.cuda else f"ROCm {self.rocm}" if self.rocm else "the CPU only"
        return f"torch {self.torch} for {made_for}"

    def runs_on(self, gpu: Capability) -> bool:
        """Whether it has machine code for this GPU, or code that the driver can translate.

        Machine code of 8.0 runs on 8.6, but not the other way, and not on 9.0.
        """
        for arch in self.arches:
            kind, digits = re.fullmatch(r"(sm|compute)_(\d+)[af]?", arch).groups()  # type: ignore[union-attr]
            made_for = Capability(int(digits[:-1]), int(digits[-1]))
            exact = arch.endswith(("a", "f"))
            if exact and made_for == gpu:
                return True
            if not exact and (
                made_for <= gpu if kind == "compute" else made_for.major == gpu.major and made_for <= gpu
            ):
                return True
        return False


def version_of(driver: str) -> Version | None:
    """`535.129.03` → (535, 129, 3); None for what is no version."""
    return tuple(map(int, driver.split("."))) if re.fullmatch(r"\d+(\.\d+)*", driver) else None


def judge(build: Build, gpus: Sequence[str], driver: str | None, *, precision: str = "") -> Iterator[Check]:
    """The check of the build: known failures, or OK.

    gpus: names of those that a job may get; [] if nobody knows. driver: of NVIDIA; None if it is not known here.
    """
    amd = [name for name in gpus if AMD.search(name)]
    if not build.cuda and not build.rocm:
        yield _broken(f"{build}, and the profile asks for GPUs", f"install a build for the GPUs; {GUIDE}")
        return
    if amd and build.cuda:
        yield _broken(f"{build}; {amd[0]} is an AMD GPU", f"install the build for ROCm (constraints-rocm.txt); {GUIDE}")
        return
    known = {name: capability for name in gpus if (capability := capability_of(name)) is not None}
    if build.rocm:
        if known:
            yield _broken(f"{build}; {next(iter(known))} is a GPU of NVIDIA's", f"install a build for CUDA; {GUIDE}")
        else:
            yield Check(name="GPU and build", verdict=OK, found=f"{build}; GPUs: {', '.join(gpus) or 'not known here'}")
        return
    assert build.cuda is not None
    broken = [*_too_new_for_driver(build, driver, known), *_without_code(build, known, driver)]
    yield from broken
    if not broken:
        told = ", ".join(f"{name} ({known[name]})" if name in known else f"{name} (unknown)" for name in gpus)
        found = f"{build}; GPUs: {told or 'not known here'}; driver {driver or 'not known here'}"
        yield Check(name="GPU and build", verdict=OK, found=found)
    for name, generation in known.items():
        if precision == "bf16" and not has_bf16(generation):
            found = f"engine.precision=bf16, and {name} (compute capability {generation}) has no bf16"
            yield Check(name="precision", verdict=BROKEN, found=found, advice="set engine.precision=fp16")


def _too_new_for_driver(build: Build, driver: str | None, known: dict[str, Capability]) -> Iterator[Check]:
    have, least = version_of(driver or ""), LEAST_DRIVER.get(int(str(build.cuda).partition(".")[0]))
    if have is None or least is None or have >= least:
        return
    wanted = ".".join(map(str, least))
    yield _broken(f"{build} needs driver {wanted} or later; the node has {driver}", _older_build(have, known))


def _without_code(build: Build, known: dict[str, Capability], driver: str | None) -> Iterator[Check]:
    for name, capability in known.items():
        if build.arches and not build.runs_on(capability):
            found = (
                f"{build} has no code for {name} (compute capability {capability}); it has {', '.join(build.arches)}"
            )
            yield _broken(found, _older_build(version_of(driver or ""), known))


def _older_build(driver: Version | None, known: dict[str, Capability]) -> str:
    """Advice on what to install instead; empty if nothing fits."""
    if driver is not None and driver < LEAST_DRIVER[12]:
        return "ask the site for a newer driver, or load its module of one; no supported torch runs on this one"
    if any(capability > CU126_UP_TO for capability in known.values()):
        return f"ask the site for driver {LEAST_DRIVER[13][0]} or later, or use its own container with torch"
    return f"install torch for CUDA 12.6 ({CU126_FILE}); {GUIDE}"


def _broken(found: str, advice: str) -> Check:
    return Check(name="GPU and build", verdict=BROKEN, found=found, advice=advice)


# --- on the machine that has the GPU -----------------------------------------------------------------------------


def gpus_and_driver() -> tuple[list[str], str | None]:
    """Names of the GPUs that a driver shows here, and NVIDIA's driver version."""
    return names_and_driver(gpu_lines())


def gpu_lines() -> list[str]:
    """`name, driver version` of each GPU here: what nvidia-smi says, or the kernel of AMD's."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    env = environment.for_process(environment.WORKER)
    try:
        answer = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=ANSWERS_S)
    except (OSError, subprocess.SubprocessError):
        return amd_gpus()
    return answer.stdout.splitlines()


def amd_gpus(root: Path = Path("/sys")) -> list[str]:
    """`name, driver version` of AMD's GPUs, from the kernel's own list. root: where sysfs is mounted."""
    version = root / "module" / "amdgpu" / "version"
    driver = version.read_text().strip() if version.exists() else "amdgpu"
    lines = []
    for path in sorted((root / "class" / "kfd" / "kfd" / "topology" / "nodes").glob("*/properties")):
        with contextlib.suppress(OSError, ValueError, KeyError):  # of a GPU that belongs to another job
            values = dict(line.split(maxsplit=1) for line in path.read_text().splitlines())
            if int(values["simd_count"]):  # processors are in the list, too
                major, rest = divmod(int(values["gfx_target_version"]), 10000)
                lines.append(f"AMD gfx{major}{rest // 100:x}{rest % 100:x}, {driver}")
    return lines


def names_and_driver(lines: Sequence[str]) -> tuple[list[str], str | None]:
    """From `name, driver` lines."""
    rows = [line.rpartition(",") for line in lines if "," in line]
    return list(dict.fromkeys(name.strip() for name, _, _ in rows)), rows[0][2].strip() if rows else None


@dataclass(frozen=True)
class Trial:
    """A product of torch on this node's GPU. failed: "" where it worked, else what torch said."""

    failed: str
    build: Build | None


TRIAL = """
import json, torch
from bushpc.ops.gpu_build import Build
print(json.dumps(Build.installed().__dict__), flush=True)
x = torch.ones(64, 64, device="cuda")
assert float((x @ x).sum()) == 64**3
"""


def try_gpu() -> Trial:
    """In a separate process, because torch may abort it."""
    command, env = [sys.executable, "-c", TRIAL], environment.for_process(environment.WORKER)
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TRIAL_S, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return Trial(str(error), None)
    failed = done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}"
    return Trial(failed if done.returncode else "", _build_of(done.stdout))


def _build_of(text: str) -> Build | None:
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return Build.of(json.loads(text))
    return None


def judge_trial(lines: Sequence[str], failed: str, build: Build, *, precision: str = "") -> list[Check]:
    """On a node, where a trial product on the GPU counts more than the tables.

    lines: of the driver. failed: as in Trial. build: of the ranks, which may be that of a container.
    """
    names, driver = names_and_driver(lines)
    checks = list(judge(build, names, driver, precision=precision))
    if not failed:
        of_precision = [check for check in checks if check.name == "precision"]
        found = f"{build} computes on {', '.join(names)}, driver {driver}"
        return [Check(name="GPU and build", verdict=OK, found=found), *of_precision]
    if any(check.verdict == BROKEN for check in checks):
        return checks
    advice = "start a job with this GPU by hand and import torch there; ask the site"
    return [_broken(f"{build} fails on {', '.join(names)}: {failed}", advice)]


def judge_profile(build: Build, gpus: Sequence[str], *, here: bool, precision: str) -> Iterator[Check]:
    """Before the queue. gpus: what profile and site call those of a job. here: jobs run on this machine."""
    seen, driver = gpus_and_driver() if here else ([], None)
    yield from judge(build, seen or gpus, driver, precision=precision)
