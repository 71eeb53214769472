"""The daemons of a sandbox, started in the order in which they need each other, and taken down again."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping

import sites
from configuration import KILL_WAIT_SECONDS, Draft, ordinary, write_configuration
from install import search_path
from layout import Layout, SandboxError
from processes import DAEMON_MARK, NODE_MARK, Process, end, everything_of, read_stat
from record import Record

READY_SECONDS = 60  # a sandbox is up in about 10 s; this is for a machine that is busy with other things


def client_env(layout: Layout) -> dict[str, str]:
    """This process's environment, turned towards the sandbox; nothing of another Slurm's job is left in it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SLURMD_", "SBATCH_", "SRUN_"))}
    return {**kept, "SLURM_CONF": str(layout.slurm_conf)}


def ask(layout: Layout, *command: str, seconds: float = 20) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands in the sandbox; a failure or a hang is the caller's to judge."""
    try:
        return subprocess.run(
            command,
            env={**client_env(layout), "PATH": search_path()},
            capture_output=True,
            text=True,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer in {seconds:g} s")


def daemon_env(layout: Layout, node: str = "") -> dict[str, str]:
    """A small environment: what the user exports is for jobs, which bring it with them, not for daemons."""
    return {
        "PATH": search_path(),
        "LANG": "C.UTF-8",
        "SLURM_CONF": str(layout.slurm_conf),
        # slurmdbd.conf has no key for a socket; the MariaDB client library reads this one.
        "MYSQL_UNIX_PORT": str(layout.mysql_socket),
        DAEMON_MARK: str(layout.root),
        **({NODE_MARK: node} if node else {}),
    }


def start(layout: Layout, record: Record, name: str, *command: str, node: str = "") -> subprocess.Popen[bytes]:
    """Start a daemon in the foreground of a new session, so that its pid is the one recorded."""
    with layout.output(name).open("ab") as log:
        daemon = subprocess.Popen(
            command,
            env=daemon_env(layout, node),
            cwd=layout.root,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    stat = read_stat(daemon.pid)
    assert stat is not None, "a child that nobody has waited for keeps its entry in /proc"
    record.daemons[name] = Process(daemon.pid, stat.started)
    record.write(layout)
    return daemon


def start_slurmd(layout: Layout, record: Record, node: str) -> subprocess.Popen[bytes]:
    return start(layout, record, f"slurmd.{node}", "slurmd", "-D", "-N", node, node=node)


def wait_until(
    ready: Callable[[], object], what: str, layout: Layout, watched: Mapping[str, subprocess.Popen[bytes]]
) -> None:
    """Poll until `ready()`. Raises: SandboxError with the log's tail when a watched daemon ends or time is up."""
    deadline = time.monotonic() + READY_SECONDS
    while not ready():
        ended = [name for name, daemon in watched.items() if daemon.poll() is not None]
        if ended or time.monotonic() > deadline:
            names = ended or list(watched)
            why = f"{', '.join(ended)} ended" if ended else f"not within {READY_SECONDS} s"
            raise SandboxError(f"waiting for {what}: {why}\n" + "\n".join(log_tail(layout, n) for n in names))
        time.sleep(0.05)


def log_tail(layout: Layout, name: str, lines: int = 15) -> str:
    path = layout.output(name)
    text = path.read_text(errors="replace").strip() if path.exists() else "(no log)"
    return "\n".join([f"--- {path}", *text.splitlines()[-lines:]])


def accepts(address: str | tuple[str, int]) -> bool:
    """Whether somebody listens at a unix socket's path or a TCP address."""
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as s:
        s.settimeout(1)
        return s.connect_ex(address) == 0


def bring_up(layout: Layout, record: Record) -> None:
    """Start everything, each daemon as soon as what it needs answers. Raises: SandboxError."""
    draft = ordinary(layout, record.settings, record.ports)
    sites.apply(draft)
    write_configuration(layout, record, draft)
    start_munged(layout, record)
    if record.settings.accounting:
        start_accounting(layout, record, draft)
    daemons = {"slurmctld": start(layout, record, "slurmctld", "slurmctld", "-D")}
    # A slurmd that finds no controller waits seconds before it tries again.
    wait_until(lambda: accepts(("127.0.0.1", record.ports["slurmctld"])), "slurmctld to listen", layout, daemons)
    for node in record.settings.node_names:
        daemons[f"slurmd.{node}"] = start_slurmd(layout, record, node)
    names = record.settings.node_names
    wait_until(lambda: all(node_state(layout, n) == "idle" for n in names), "all nodes to be idle", layout, daemons)
    if record.settings.accounting:
        wait_until(lambda: ask(layout, "sacct", "-n").returncode == 0, "sacct to answer", layout, daemons)


def start_munged(layout: Layout, record: Record) -> None:
    munged = start(
        layout,
        record,
        "munged",
        "munged",
        "--foreground",
        # munged wants a socket that every user can reach; here it may lie in a private directory.
        "--force",
        f"--key-file={layout.etc}/munge.key",
        f"--socket={layout.munge_socket}",
        f"--pid-file={layout.root}/run/munged.pid",
        f"--seed-file={layout.root}/munge/seed",
    )
    wait_until(lambda: accepts(str(layout.munge_socket)), "munged to listen", layout, {"munged": munged})


def start_accounting(layout: Layout, record: Record, draft: Draft) -> None:
    owner, data = getpass.getuser(), layout.root / "mysql" / "data"
    common = ["--no-defaults", f"--datadir={data}", f"--user={owner}", f"--tmpdir={layout.root}/tmp"]
    # Small, and never waiting for the disk: after a crash the sandbox is rebuilt anyway.
    quick = ["--innodb-log-file-size=8M", "--innodb-buffer-pool-size=64M", "--innodb-flush-method=nosync"]
    with layout.output("mariadb-install-db").open("wb") as log:
        # The database knows its only user by the socket's credentials: there is no password to keep.
        made = subprocess.run(
            ["mariadb-install-db", *common, *quick, "--skip-test-db", "--auth-root-socket-user=" + owner],
            env=daemon_env(layout),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    if made.returncode:
        raise SandboxError(f"mariadb-install-db failed\n{log_tail(layout, 'mariadb-install-db')}")
    own = [f"--socket={layout.mysql_socket}", f"--pid-file={layout.root}/run/mariadbd.pid", "--skip-networking"]
    mariadbd = start(layout, record, "mariadbd", "mariadbd", *common, *quick, *own, "--skip-log-bin")
    wait_until(lambda: accepts(str(layout.mysql_socket)), "MariaDB to listen", layout, {"mariadbd": mariadbd})
    slurmdbd = start(layout, record, "slurmdbd", "slurmdbd", "-D")
    watched = {"mariadbd": mariadbd, "slurmdbd": slurmdbd}
    wait_until(lambda: accepts(("127.0.0.1", record.ports["slurmdbd"])), "slurmdbd to listen", layout, watched)
    cluster = record.settings.cluster
    users = dict.fromkeys([owner, record.settings.user])
    first = [["cluster", cluster], ["account", "sandbox"], *(["user", user, "account=sandbox"] for user in users)]
    for what in [*(["add", *words] for words in first), *draft.accounting]:
        done = ask(layout, "sacctmgr", "-i", *what)
        if done.returncode and "already" not in done.stdout + done.stderr:
            text = (done.stdout + done.stderr).strip()
            raise SandboxError(f"sacctmgr {' '.join(what)}: {text}\n{log_tail(layout, 'slurmdbd')}")


def node_state(layout: Layout, node: str) -> str:
    """A node's state as sinfo has it (`idle`, `mixed`, `down*` …); empty while slurmctld does not answer."""
    return ask(layout, "sinfo", "-h", "-N", "-p", "low", "-n", node, "-o", "%T").stdout.strip()


def node_started(layout: Layout, node: str) -> str:
    """When the node's slurmd started that slurmctld knows of; empty while it knows of none or does not answer."""
    facts = ask(layout, "scontrol", "--oneliner", "show", "node", node).stdout.split()
    return next((fact for fact in facts if fact.startswith("SlurmdStartTime=")), "")


def take_down(layout: Layout, record: Record, keep: bool) -> None:
    """End jobs first, while Slurm still stands to tell them; then everything in the order of dependence."""
    daemon = {name: p for name, p in record.daemons.items() if p.alive()}
    if "slurmctld" in daemon and any(name.startswith("slurmd.") for name in daemon):
        cancel_jobs(layout, record)
    last = [daemon.pop(name) for name in ("slurmdbd", "mariadbd", "munged") if name in daemon]
    end(list(daemon.values()))
    # Jobs had their TERM from scancel; slurmstepd heeds none.
    end([p for p in everything_of(layout) if p not in last], patience=0)
    for process in last:
        end([process])
    end(everything_of(layout), patience=0)  # by their mark: what a killed `up` had not yet written down
    if keep:
        record.daemons = {}
        record.write(layout)
    else:
        clear(layout)
        layout.root.rmdir()


def cancel_jobs(layout: Layout, record: Record) -> None:
    """Cancel every job and wait until the queue is empty, at most the time that a job has between TERM and KILL."""
    for user in dict.fromkeys([getpass.getuser(), record.settings.user]):
        ask(layout, "scancel", "--user", user)
    deadline = time.monotonic() + KILL_WAIT_SECONDS + 3
    while time.monotonic() < deadline:
        queue = ask(layout, "squeue", "-h", "-o", "%i", seconds=2)
        if queue.returncode or not queue.stdout.strip():
            return
        time.sleep(0.1)


def clear(layout: Layout) -> None:
    """Empty the directory, the record last: without it, what remains would count as somebody else's."""
    for path in layout.root.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != layout.record:
            path.unlink()
    layout.record.unlink()
