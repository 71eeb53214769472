"""The real Slurm of the tests in this folder: a two-node sandbox for the whole session (tools/slurm_sandbox)."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import typing as t
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import pytest

from bushpc.process import children
from tests.clone import ONE_AFTER_ANOTHER

TOOL = Path(__file__).resolve().parents[2] / "tools" / "slurm_sandbox"
EXIT_NOT_INSTALLED = 3
ENDED = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"})
# A deadline for what must happen, so long that no load on the machine reaches it.
PATIENCE_S = 300.0

Result = t.TypeVar("Result")

ROOT = Path(__file__).resolve().parents[2]


class Answer(t.NamedTuple):
    """What one of bushpc's commands returned and said."""

    status: int
    said: str


class Sandbox:
    """A running Slurm and the questions that tests ask it.

    env: the environment for subprocesses whose Slurm is this one.
    ready_seconds: how long its `up` took.
    """

    def __init__(self, root: Path, *options: str) -> None:
        self.root = root
        self.options = options
        self.env = {**os.environ, "SLURM_CONF": str(root / "etc" / "slurm.conf")}
        self.ready_seconds = float("nan")
        self.python = sys.executable

    @property
    def user(self) -> pwd.struct_passwd | None:
        """The user whom jobs belong to; None where that is who runs the tests."""
        return pwd.getpwnam("researcher") if "ordinary-user" in self.options else None

    def bushpc(self, *commands: Sequence[str], **variables: str) -> list[Answer]:
        """Run commands of bushpc as the user whom jobs belong to; variables: further ones of their environment."""
        command = [self.python, "-c", ONE_AFTER_ANOTHER]
        if self.user:
            command = self.command("run", "--as-user", "--", *command)
        environment = {**self.env, "PYTHONPATH": str(ROOT), **variables}
        given = json.dumps([list(words) for words in commands])
        done = subprocess.run(command, env=environment, input=given, capture_output=True, text=True, cwd="/")
        assert done.returncode == 0, done.stdout + done.stderr
        return [Answer(*answer) for answer in json.loads(done.stdout.splitlines()[-1])]

    def tool(self, subcommand: str, *args: str) -> subprocess.CompletedProcess[str]:
        """One of `tools/slurm_sandbox`'s commands on this sandbox's directory."""
        return subprocess.run(self.command(subcommand, *args), capture_output=True, text=True, stdin=subprocess.DEVNULL)

    def command(self, subcommand: str, *args: str) -> list[str]:
        return [str(TOOL), subcommand, "--dir", str(self.root), *args]

    def beside(self, root: Path) -> Sandbox:
        """Another one in `root`, not started."""
        return Sandbox(root)

    def up(self) -> None:
        """Start it. Skips where Slurm cannot be had; fails there instead if BUSHPC_REQUIRE_REAL=1."""
        begun = time.monotonic()
        done = self.tool("up", *self.options)
        self.ready_seconds = time.monotonic() - begun
        if done.returncode == EXIT_NOT_INSTALLED and os.environ.get("BUSHPC_REQUIRE_REAL") != "1":
            pytest.skip(f"no real Slurm on this machine: {done.stderr.strip()}")
        if done.returncode:
            pytest.fail(f"the Slurm sandbox did not start:\n{done.stderr}")

    def down(self) -> None:
        """Take it down and insist that it left no process and no listening port."""
        ports = self.status().get("ports", {})
        done = self.tool("down")
        assert done.returncode == 0, done.stderr
        assert self.processes() == {}
        for port in ports.values():
            with socket.socket() as s:
                # Connections that have ended may still hold the port's number for a minute; a listener must not.
                s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                s.bind(("", port))

    def status(self) -> dict[str, t.Any]:
        """`status --json`."""
        return dict(json.loads(self.tool("status", "--json").stdout))

    def processes(self) -> dict[int, str]:
        """Command line by pid of every live process that this sandbox's directory appears in, whoever started it.

        Not our own children: the tests' environment names the sandbox, and helpers of multiprocessing inherit it.
        """
        needle, found = os.fsencode(self.root), {}
        ours = {os.getpid(), *children(os.getpid())}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command = (entry / "cmdline").read_bytes()
                if int(entry.name) not in ours and needle in command + (entry / "environ").read_bytes():
                    found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # it has just ended, or is another user's
        return found

    def run(self, command: list[str], **options: t.Any) -> str:
        """Run a command in the sandbox and return what it printed; a failure fails the test."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=PATIENCE_S, **options)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, script: str, *options: str) -> str:
        """Submit a shell script (its lines, without `#!`). Returns the job's id."""
        command = [
            "sbatch",
            "--parsable",
            "--chdir",
            str(self.root),
            "--output",
            str(self.root / "%A_%a.out"),
            *options,
        ]
        return self.run(command, input=f"#!/bin/sh\n{script}\n").strip()

    def squeue(self) -> dict[str, str]:
        """State by job id (`12`, or `12_0` in an array) of every job that Slurm still has in memory, ended or not."""
        lines = self.run(["squeue", "--noheader", "--array", "--states=all", "--format=%i %T"]).splitlines()
        return dict(line.split() for line in lines)

    def sacct(self, jobid: str) -> list[dict[str, str]]:
        """What accounting knows of a job, one row per job or array task, its steps left out."""
        columns = ["JobID", "State", "ExitCode", "Partition", "NodeList"]
        answer = self.run(["sacct", "-n", "-P", "-X", "-j", jobid, "-o", ",".join(columns)])
        return [dict(zip(columns, line.split("|"), strict=True)) for line in answer.splitlines()]

    def wait(self, jobid: str, states: Collection[str] = ENDED, timeout: float = PATIENCE_S) -> list[str]:
        """Poll until the job, or all tasks of the array, are in one of `states`. Returns their states by index."""

        def reached() -> list[str]:
            mine = [state for job, state in self.squeue().items() if job.partition("_")[0] == jobid]
            return mine if all(state in states for state in mine) else []

        return self.until(reached, timeout, lambda: f"job {jobid} in {sorted(states)}; the queue: {self.squeue()}")

    @staticmethod
    def until(
        question: Callable[[], Result], timeout: float = PATIENCE_S, what: Callable[[], str] = lambda: ""
    ) -> Result:
        """Poll until the answer is true and return it; fails the test with `what()` after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not (answer := question()):
            assert time.monotonic() < deadline, f"not within {timeout:g} s: {what()}"
            time.sleep(0.1)
        return answer


@pytest.fixture(scope="session")
def sandbox_of_the_session() -> Iterator[Sandbox]:
    # Not pytest's own folder: its path may be longer than a unix socket's may be.
    root = Path(tempfile.mkdtemp(prefix="slurm-"))
    sandbox = Sandbox(root)
    try:
        sandbox.up()
        yield sandbox
    finally:
        sandbox.down()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def slurm(sandbox_of_the_session: Sandbox) -> Iterator[Sandbox]:
    """A sandbox of two nodes with two CPUs each, with accounting; SLURM_CONF points at it in the tests' environment.

    Only as long as a file of this folder runs: others run in the same process.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", sandbox_of_the_session.env["SLURM_CONF"])
        yield sandbox_of_the_session


@pytest.fixture
def make_sandbox() -> Iterator[Callable[..., Sandbox]]:
    """Call it with options of `up` for one more sandbox, of one node unless they say otherwise."""
    made: list[Sandbox] = []

    def make(*options: str) -> Sandbox:
        made.append(Sandbox(Path(tempfile.mkdtemp(prefix="slurm-")), *(options or ("--nodes", "1"))))
        made[-1].up()
        return made[-1]

    yield make
    for sandbox in made:
        sandbox.down()
        shutil.rmtree(sandbox.root, ignore_errors=True)


@pytest.fixture(scope="module")
def site() -> Iterator[Callable[..., Sandbox]]:
    """site("typed-gpus", "submit-limit=2", …, nodes=2) → a sandbox like these kinds of site, for all tests of a file.

    cpus: of each node; None for what the kinds need. The folder `home` beside it belongs to the user of its jobs.
    """
    made: list[tuple[Path, Sandbox]] = []

    def make(*kinds: str, nodes: int = 2, cpus: int | None = None, cluster: str = "sandbox") -> Sandbox:
        folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        folder.chmod(0o755)
        likes = [word for kind in kinds for word in ("--like", kind)]
        options = ["--nodes", str(nodes), "--cluster", cluster, *(["--cpus", str(cpus)] if cpus else []), *likes]
        made.append((folder, Sandbox(folder / "s", *options)))
        sandbox = made[-1][1]
        sandbox.up()
        home = folder / "home"
        home.mkdir()
        if sandbox.user:
            os.chown(home, sandbox.user.pw_uid, sandbox.user.pw_gid)
            sandbox.python = str(python_for_others(folder / "python", sandbox))
        return sandbox

    yield make
    for folder, sandbox in made:
        sandbox.down()
        shutil.rmtree(folder, ignore_errors=True)


def python_for_others(folder: Path, sandbox: Sandbox) -> Path:
    """The interpreter of the tests, or a copy where it lies in a private folder such as root's home."""
    if all(parent.stat().st_mode & 0o001 for parent in Path(sys.executable).resolve().parents):
        return Path(sys.executable)
    version, base = f"python{sys.version_info.major}.{sys.version_info.minor}", Path(sys.base_prefix)
    not_needed = shutil.ignore_patterns("site-packages", "test", "tests", "__pycache__", "config-*", "idlelib")
    copy = folder / "base"
    shutil.copytree(base / "lib" / version, copy / "lib" / version, ignore=not_needed)
    for library in (base / "lib").glob("libpython*.so*"):
        shutil.copy2(library, copy / "lib" / library.name)
    (copy / "bin").mkdir()
    shutil.copy2(base / "bin" / version, copy / "bin" / version)
    # A virtual environment on the copy, with the packages of the one that the tests run in.
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(copy / "bin" / version)
    (folder / "pyvenv.cfg").write_text(f"home = {copy / 'bin'}\n")
    (folder / "lib" / version).mkdir(parents=True)
    (folder / "lib" / version / "site-packages").symlink_to(Path(sys.prefix) / "lib" / version / "site-packages")
    sandbox.env["LD_LIBRARY_PATH"] = str(copy / "lib")
    return folder / "bin" / "python"
