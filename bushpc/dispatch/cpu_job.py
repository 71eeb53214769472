"""Any of bushpc's commands as a job without a GPU, such as pack or resume; `cluster.cpu_jobs` says where it goes.

words of a command and a profile ─request_of→ one job, in <runs_dir>/job-<time>-<command>
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import bushpc
from bushpc import environment
from bushpc.cluster.profile import cpu_profile, shell_lines
from bushpc.cluster.records import JobRequest
from bushpc.config import ClusterConfig
from bushpc.config.cluster import ContainerConfig
from bushpc.runs.layout import RunDir


@dataclass(frozen=True, kw_only=True)
class CommandJob:
    """One of bushpc's commands, in the folder where it was submitted."""

    words: tuple[str, ...]
    folder: str

    def __call__(self) -> None:
        """Raises: SystemExit with the command's exit status unless it is 0."""
        command, env = [sys.executable, "-m", "bushpc.cli", *self.words], environment.for_process(environment.WORKER)
        status = subprocess.run(command, cwd=self.folder, env=env).returncode
        if status:
            raise SystemExit(status)


def request_of(words: Sequence[str], profile: ClusterConfig, runs_dir: Path, *, cores: int, minutes: int) -> JobRequest:
    """The job that runs a command. cores, minutes: what it takes."""
    small = cpu_profile(profile, time_min=minutes, cores=cores)
    # Outside a container: a command such as resume submits, and its folders are anywhere.
    small = dataclasses.replace(small, container=ContainerConfig())
    folder = runs_dir / f"job-{time.strftime('%Y%m%d-%H%M%S')}-{words[0]}"
    return JobRequest(
        name=f"bushpc-{words[0]}",
        work=[CommandJob(words=tuple(words), folder=os.getcwd())],
        folder=RunDir(folder).jobs,
        profile=small,
        setup=shell_lines(small, folder, Path(bushpc.__file__).parents[1]),
        takes_place=False,
    )
