"""Debian's Slurm: which programs are missing, and their installation where we may."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from layout import NotInstalledError, say

PACKAGES = ("slurm-wlm", "munge", "slurmdbd", "mariadb-server")
SLURM_PROGRAMS = ("munged", "slurmctld", "slurmd", "sinfo", "scancel", "squeue", "scontrol")
ACCOUNTING_PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db", "sacct", "sacctmgr")


def search_path() -> str:
    """PATH with the folders that hold daemons, which a plain user's PATH may lack."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])


def missing_programs(accounting: bool) -> list[str]:
    wanted = SLURM_PROGRAMS + (ACCOUNTING_PROGRAMS if accounting else ())
    return [p for p in wanted if shutil.which(p, path=search_path()) is None]


def ensure_installed(accounting: bool) -> None:
    """Install Debian's Slurm where it is missing and we may. Raises: NotInstalledError."""
    missing = missing_programs(accounting)
    if not missing:
        return
    packages = " ".join(PACKAGES if accounting else PACKAGES[:2])
    by_hand = f"install them as root with: apt-get install {packages}"
    if os.getuid() != 0 or shutil.which("apt-get") is None:
        who = "this machine has no apt-get" if os.getuid() == 0 else "only root can install them"
        raise NotInstalledError(f"missing programs: {', '.join(missing)}; {who}; on Debian or Ubuntu, {by_hand}")
    with one_at_a_time():
        if missing_programs(accounting):
            install_packages(packages)
    if missing := missing_programs(accounting):
        raise NotInstalledError(f"apt-get did not bring {', '.join(missing)}; {by_hand}")


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Several sandboxes may be started at the same time on a machine without Slurm."""
    with Path("/run/slurm_sandbox_install.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def install_packages(packages: str) -> None:
    """Raises: NotInstalledError."""
    say(f"installing {packages} (once)")
    install = ["apt-get", "-y", "-qq", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300"]
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with services_kept_off():
        for step in (["install", *packages.split()], ["update"], ["install", *packages.split()]):
            done = subprocess.run([*install, *step], env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            if step[0] == "install" and done.returncode == 0:
                break
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise NotInstalledError(f"apt-get could not install {packages}:\n{tail}")


@contextlib.contextmanager
def services_kept_off() -> Iterator[None]:
    """Debian starts what it installs unless policy-rc.d forbids it. A policy that is there already is left as it is."""
    policy = Path("/usr/sbin/policy-rc.d")
    try:
        fd = os.open(policy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o755)
    except FileExistsError:
        yield
        return
    with os.fdopen(fd, "w") as f:
        f.write("#!/bin/sh\nexit 101\n")
    try:
        yield
    finally:
        policy.unlink()
