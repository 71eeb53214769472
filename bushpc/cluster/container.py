"""Ranks in a container (`cluster.container`): the words before their `python`, and the shell lines that prepare them.

    batch shell (outside: Slurm's commands, requeue) ─srun→ runtime ─image→ python -m submitit… (one per rank)

What a run needs is mounted at the same path as outside: its folder, the folder of all runs, data, weights, caches. The
list is completed on the node, where variables have their values.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import typing as t
from collections.abc import Iterator, Sequence
from pathlib import Path

from bushpc.cluster.checks import OK, WARNING, Check
from bushpc.errors import ConfigError

if t.TYPE_CHECKING:
    from bushpc.config import ClusterConfig

# In the job: `from:to` of everything that is mounted, with commas between.
BINDS = "BUSHPC_BINDS"
# Runtimes give other characters a meaning of their own.
BIND = re.compile(r"[\w./~@%+=${}-]+(:[\w./~@%+=${}-]+)?(:(ro|rw))?")
SQUASHED = (".sqsh", ".squashfs")
PROGRAMS = {"apptainer": "apptainer", "singularity": "singularity", "enroot": "enroot"}
# What the image sets itself.
OF_THE_IMAGE = ("PATH", "LD_LIBRARY_PATH", "HOME")


def python_command(profile: ClusterConfig) -> str | None:
    """The words, for a shell, that start the ranks' Python; None without a container.

    They stand behind srun's own options, so those of pyxis can begin them.
    """
    container = profile.container
    if not container.used:
        return None
    image, python = shlex.quote(container.image or ""), container.python
    if container.runtime in ("apptainer", "singularity"):
        gpu = '"${BUSHPC_GPU_OPTION}" ' if profile.gpu_count else ""
        return f'{container.runtime} exec {gpu}--bind "${BINDS}" {image} {python}'
    if container.runtime == "pyxis":
        where = f'--container-image={image} --container-mounts="${BINDS}" --container-workdir="$PWD"'
        return f"{where} --no-container-entrypoint {python}"
    if container.runtime == "enroot":
        # It hands nothing on by itself, and a rank's own variables are known in the rank alone.
        script = (
            'mounts=(); IFS=,; for bind in $BUSHPC_BINDS; do mounts+=(--mount "$bind"); done; unset IFS; '
            f"names=(); for name in $(compgen -e); do case $name in {'|'.join(OF_THE_IMAGE)}) ;; "
            '*) names+=(--env "$name");; esac; done; '
            f'exec enroot start "${{mounts[@]}}" "${{names[@]}}" {image} {python} "$@"'
        )
        return f"bash -c {shlex.quote(script)} enroot"
    assert container.command is not None, "checked"
    before = container.command.replace("{image}", image).replace("{binds}", f'"${BINDS}"')
    return f"{before} {python}"


def setup_lines(profile: ClusterConfig, runs_dir: Path, scratch: Sequence[str] = ()) -> list[str]:
    """Shell lines before the ranks, outside the container.

    runs_dir: the folder of all runs. scratch: variables that may name a job's own folder on its node.
    """
    container = profile.container
    if not container.used:
        return []
    both_sides = [str(runs_dir), *(bind for bind in container.binds if ":" not in bind)]
    lines = [
        f"export {BINDS}= PYTHONNOUSERSITE=1",
        # A folder that is not there yet stands for the nearest one above it.
        "bushpc_bind() {",
        '  local at="$1"; while [ -n "$at" ] && [ ! -e "$at" ]; do at="${at%/*}"; done',
        f'  [ -z "$at" ] || {BINDS}="${{{BINDS}:+${BINDS},}}$at:$at"',
        "}",
        *(f"bushpc_bind {_expandable(folder)}" for folder in _outermost(both_sides)),
    ]
    if profile.staging:
        places = [f"${name}" for name in scratch] if profile.staging == "auto" else [profile.staging]
        lines += [f"[ ! -d {place} ] || bushpc_bind {place}" for place in map(_expandable, places)]
    lines += [f'{BINDS}="${BINDS},"{_expandable(bind)}' for bind in container.binds if ":" in bind]
    if profile.gpu_count and container.runtime in ("apptainer", "singularity"):
        lines.append("if [ -e /dev/kfd ]; then export BUSHPC_GPU_OPTION=--rocm; else export BUSHPC_GPU_OPTION=--nv; fi")
    if program := _program(profile):
        missing = f"{program}: not found on this node; cluster.setup may have to load it, as in `module load {program}`"
        lines.append(f"command -v {_expandable(program)} >/dev/null || echo {shlex.quote(missing)}")
    return lines


def require(profile: ClusterConfig) -> None:
    """Raises: ConfigError for a container that no job could start."""
    container = profile.container
    if not container.used:
        if container.binds:
            raise ConfigError(
                f"cluster.container.binds={list(container.binds)} without cluster.container.image: name the image, or "
                "leave the binds out"
            )
        return
    for bind in container.binds:
        if not BIND.fullmatch(bind):
            raise ConfigError(
                f"cluster.container.binds=[{bind}]: write folder, from:to or from:to:ro, for example [/scratch:/data]. "
                "No runtime can mount a folder with a comma, colon, quote or space in its name; choose another for "
                "the data or weights that lie there"
            )
    if container.image is not None:
        _require_image(container.image, container.runtime)


def warnings(profile: ClusterConfig) -> list[str]:
    """What may be wrong with the container, seen from here: compute nodes may have what a login node lacks."""
    program = _program(profile)
    if program is None or shutil.which(os.path.expandvars(program)):
        return []
    return [
        f"cluster.container: {program} is not found here. Where compute nodes have it, all is well (cluster.setup can "
        f"load a module); `bushpc doctor --slurm` tries it"
    ]


def check(profile: ClusterConfig) -> Iterator[Check]:
    """What doctor says of the container."""
    container = profile.container
    if not container.used:
        return
    for warning in warnings(profile):
        yield Check(name="container", verdict=WARNING, found=warning)
        return
    yield Check(name="container", verdict=OK, found=f"{container.runtime} with {container.image or container.command}")


def _require_image(image: str, runtime: str) -> None:
    is_path = image.startswith(("/", ".", "~"))
    if runtime in ("apptainer", "singularity"):
        if "://" in image:
            raise ConfigError(
                f"cluster.container.image={image} with runtime={runtime}: every rank would fetch it anew, and compute "
                f"nodes are often offline. Fetch it once, `{runtime} pull image.sif {image}`, and name the file"
            )
        is_path = True
    if runtime in ("pyxis", "enroot") and is_path and not image.endswith(SQUASHED):
        raise ConfigError(
            f"cluster.container.image={image} with runtime={runtime}: its images are squashfs files ({SQUASHED[0]}; "
            f"`enroot import` makes one) or names in a registry; for {Path(image).suffix or 'others'} take "
            "runtime=apptainer"
        )
    if is_path and not Path(image).expanduser().exists():
        raise ConfigError(
            f"cluster.container.image={image} does not exist. docs/how-to/containers.md says how to build one, and it "
            "has to lie where compute nodes see it"
        )


def _program(profile: ClusterConfig) -> str | None:
    """The program that must be found on the node."""
    container = profile.container
    if not container.used or container.runtime == "pyxis":
        return None
    if container.command is not None:
        words = shlex.split(container.command)
        return words[0] if words else None
    return PROGRAMS[container.runtime]


def _outermost(folders: Sequence[str]) -> list[str]:
    """As named and as they really are, as ranks follow links; without those that lie in another one of them."""
    real = [os.path.realpath(folder) for folder in folders if "$" not in folder]
    paths = sorted({os.path.normpath(folder) for folder in (*folders, *real)})
    return [path for path in paths if not any(path != other and path.startswith(f"{other}/") for other in paths)]


def _expandable(text: str) -> str:
    """In quotes in which only variables mean anything to the shell."""
    return '"' + re.sub(r'(["\\`]|\$\()', lambda match: "\\" + match[0], text) + '"'
