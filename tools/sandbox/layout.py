"""One sandbox's folder: every path in it, and the lock under which `up`, `down` and the node commands work on it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

EXIT_NOT_INSTALLED = 3  # a caller that may go on without Slurm tells this from a Slurm that is broken
LONGEST_SOCKET_PATH = 107  # bytes; sun_path holds 108 with its final zero


class SandboxError(Exception):
    """What keeps the sandbox from doing what was asked, and what the user can do."""

    exit_status = 1


class NotInstalledError(SandboxError):
    """Slurm is not on this machine and could not be put there."""

    exit_status = EXIT_NOT_INSTALLED


def say(text: str) -> None:
    """To the terminal; standard output belongs to what scripts read."""
    print(f"slurm_sandbox: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Layout:
    """Every path of one sandbox."""

    root: Path

    @property
    def etc(self) -> Path:
        return self.root / "etc"

    @property
    def slurm_conf(self) -> Path:
        return self.etc / "slurm.conf"

    @property
    def record(self) -> Path:
        return self.root / "sandbox.json"

    @property
    def munge_socket(self) -> Path:
        return self.root / "munge" / "socket"

    @property
    def gpus(self) -> Path:
        """Links to /dev/null in place of GPU devices, one folder per node."""
        return self.root / "gpus"

    @property
    def mysql_socket(self) -> Path:
        return self.root / "mysql" / "socket"

    def output(self, daemon: str) -> Path:
        """What a daemon says on its standard streams: for Slurm's, the same as in `log/<daemon>.log`, and more."""
        return self.root / "log" / f"{daemon}.out"


def sandbox_root(given: str | None) -> Path:
    """The sandbox's directory, absolute. Raises: SandboxError for a path that Slurm's own files cannot hold."""
    root = Path(given or Path(os.environ.get("TMPDIR") or "/tmp") / f"slurm-sandbox-{os.getuid()}").absolute()
    if not re.fullmatch(r"[\w./+@-]+", str(root), re.ASCII):
        raise SandboxError(
            f"--dir {str(root)!r}: slurm.conf cannot hold this path; use letters, digits and . / + @ _ - only"
        )
    longest = len(str(Layout(root).mysql_socket).encode())
    if longest > LONGEST_SOCKET_PATH:
        raise SandboxError(
            f"--dir {root} is {longest - LONGEST_SOCKET_PATH} characters too long for the sockets in it; "
            "give a shorter one, such as --dir /tmp/slurm1"
        )
    return root


@contextlib.contextmanager
def locked(layout: Layout) -> Iterator[None]:
    """The directory, made if it is missing, for one `up`, `down` or node command at a time.

    Raises: SandboxError where it is not ours, so that `down` never removes what no sandbox made.
    """
    while True:
        layout.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(layout.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)  # dies with this process, however that ends
            # Whoever waited for a `down` to end has locked a directory that is gone.
            if not layout.root.exists() or not os.path.samestat(os.fstat(fd), os.stat(layout.root)):
                continue
            if layout.root.is_symlink() or os.fstat(fd).st_uid != os.getuid():
                raise SandboxError(f"{layout.root} belongs to somebody else; give --dir a directory of your own")
            if not layout.record.exists() and any(layout.root.iterdir()):
                raise SandboxError(f"{layout.root} has files that no sandbox made; give --dir a new or empty directory")
            yield
            return
        finally:
            os.close(fd)


def dir_option(layout: Layout) -> str:
    return "" if layout.root == sandbox_root(None) else f" --dir {layout.root}"
