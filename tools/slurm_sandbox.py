"""A real Slurm on this machine, for the Slurm tests and for trying bushpc without a cluster. Outside the package.

    up → eval "$(tools/slurm_sandbox env)" → sbatch, srun, squeue, sacct … → down

One sandbox is one directory: munged, a private MariaDB under slurmdbd, slurmctld, one slurmd per emulated node, and
their configuration, logs, keys and sockets. Nothing in /etc/slurm is read or written, every port is chosen free at
start, and MariaDB listens on a socket in the directory alone, so several sandboxes run side by side. Jobs run as the
user who called `up`. Needs Python 3.10 or newer and no other module.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import getpass
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import typing as t
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge", "slurmdbd", "mariadb-server")
SLURM_PROGRAMS = ("munged", "slurmctld", "slurmd", "sinfo", "scancel", "squeue", "scontrol")
ACCOUNTING_PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db", "sacct", "sacctmgr")

READY_SECONDS = 60  # a sandbox is up in about 10 s; this is for a machine that is busy with other things
STOP_SECONDS = 10
KILL_WAIT_SECONDS = 5

DAEMON_MARK = "SLURM_SANDBOX_DAEMON"  # set for daemons only, never by `env`: tells our slurmd from anybody else's
NODE_MARK = "SLURM_SANDBOX_NODE"
EXIT_NOT_INSTALLED = 3  # a caller that may go on without Slurm tells this from a Slurm that is broken
LOOPBACK_ONLY = "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny"
LONGEST_SOCKET_PATH = 107  # bytes; sun_path holds 108 with its final zero


class SandboxError(Exception):
    """What keeps the sandbox from doing what was asked, and what the user can do."""

    exit_status = 1


class NotInstalledError(SandboxError):
    """Slurm is not on this machine and could not be put there."""

    exit_status = EXIT_NOT_INSTALLED


# --- what a sandbox is: its directory, its settings, its record of what it started ---------------------------------


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
    def mysql_socket(self) -> Path:
        return self.root / "mysql" / "socket"

    def output(self, daemon: str) -> Path:
        """What a daemon says on its standard streams: for Slurm's, the same as in `log/<daemon>.log`, and more."""
        return self.root / "log" / f"{daemon}.out"


@dataclass(frozen=True)
class Settings:
    """What the user asked `up` for.

    nodes, cpus: emulated nodes, and CPUs on each; both may exceed what the machine has.
    grace: seconds that a preempted job of `low` may go on before it is killed and requeued.
    user_signal: at preemption a job gets the signal of its own `--signal` option first, if it has one, instead of
        TERM (SlurmctldParameters=preempt_send_user_signal).
    accounting: slurmdbd and MariaDB behind sacct; without it `sacct`, and so submitit, knows no job's state.
    """

    nodes: int = 2
    cpus: int = 2
    grace: int = 10
    user_signal: bool = False
    accounting: bool = True

    @property
    def node_names(self) -> list[str]:
        return [f"n{i}" for i in range(1, self.nodes + 1)]


@dataclass(frozen=True)
class Process:
    """A process that cannot be mistaken for a later one with the same pid.

    started: clock ticks after boot, field 22 of /proc/<pid>/stat.
    """

    pid: int
    started: int

    def alive(self) -> bool:
        stat = read_stat(self.pid)
        return stat is not None and stat.started == self.started and stat.state not in "ZX"


@dataclass
class Record:
    """`sandbox.json`: what runs for this sandbox. Written after every start, so a killed `up` can be cleaned up."""

    settings: Settings
    boot_id: str
    ports: dict[str, int] = field(default_factory=dict)
    daemons: dict[str, Process] = field(default_factory=dict)

    @classmethod
    def read(cls, layout: Layout) -> Record | None:
        """The record, or None where no sandbox is. Raises: SandboxError on a file that is none of ours."""
        try:
            raw = json.loads(layout.record.read_text())
        except FileNotFoundError:
            return None
        except ValueError as e:
            raise SandboxError(f"{layout.record} is not a sandbox's record ({e}); remove {layout.root} by hand") from e
        alive_since_boot = raw["boot_id"] == boot_id()
        daemons = {name: Process(**p) for name, p in raw["daemons"].items()} if alive_since_boot else {}
        return cls(Settings(**raw["settings"]), raw["boot_id"], raw["ports"], daemons)

    def write(self, layout: Layout) -> None:
        aside = layout.record.with_suffix(".tmp")
        aside.write_text(json.dumps(dataclasses.asdict(self), indent=1))
        aside.replace(layout.record)

    @property
    def expected(self) -> list[str]:
        """The daemons that a whole sandbox has, in the order of their start."""
        accounting = ["mariadbd", "slurmdbd"] if self.settings.accounting else []
        return ["munged", *accounting, "slurmctld", *(f"slurmd.{n}" for n in self.settings.node_names)]

    def running(self) -> bool:
        return all(name in self.daemons and self.daemons[name].alive() for name in self.expected)


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
            layout.root.chmod(0o700)
            yield
            return
        finally:
            os.close(fd)


# --- processes -----------------------------------------------------------------------------------------------------


class Stat(t.NamedTuple):
    """The fields of /proc/<pid>/stat that are used here."""

    state: str
    parent: int
    started: int


def read_stat(pid: int) -> Stat | None:
    try:
        # The command's name is in brackets and may hold spaces and brackets of its own.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Stat(fields[0], int(fields[1]), int(fields[19]))


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def read_environ(pid: int) -> dict[str, str]:
    """A process's environment as it was at its start; empty where we may not look."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (entry.partition(b"=") for entry in raw.split(b"\0") if b"=" in entry)
    return {os.fsdecode(key): os.fsdecode(value) for key, _, value in pairs}


def everything_of(layout: Layout, node: str | None = None) -> list[Process]:
    """All live processes of this sandbox: daemons, slurmstepd, and whatever jobs started; of one node if given.

    Daemons and their slurmstepd carry our mark. A job's processes have the environment of whoever submitted it, so
    they are known by this sandbox's SLURM_CONF beside a SLURM_JOB_ID, or by their parents. A shell that merely
    evaluated `env` has no SLURM_JOB_ID and is left alone, and so are this process and those above it.
    """
    stats = {int(p.name): stat for p in Path("/proc").glob("[0-9]*") if (stat := read_stat(int(p.name)))}
    spared = set()
    pid = os.getpid()
    while pid in stats:
        spared.add(pid)
        pid = stats[pid].parent
    ours = {pid for pid in stats if _belongs(read_environ(pid), layout, node)} - spared
    grown = -1
    while grown != len(ours):
        grown = len(ours)
        ours |= {pid for pid, stat in stats.items() if stat.parent in ours} - spared
    return [Process(pid, stats[pid].started) for pid in sorted(ours) if stats[pid].state not in "ZX"]


def _belongs(environ: Mapping[str, str], layout: Layout, node: str | None) -> bool:
    if environ.get(DAEMON_MARK) == str(layout.root):
        return node is None or environ.get(NODE_MARK) == node
    in_a_job = environ.get("SLURM_CONF") == str(layout.slurm_conf) and "SLURM_JOB_ID" in environ
    return in_a_job and (node is None or environ.get("SLURMD_NODENAME") == node)


def end(processes: list[Process], patience: float = STOP_SECONDS) -> None:
    """TERM, and KILL for those that are still there after `patience` seconds."""
    for kind, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, STOP_SECONDS)):
        for process in processes:
            if process.alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, kind)
        deadline = time.monotonic() + seconds
        while (processes := [p for p in processes if p.alive()]) and time.monotonic() < deadline:
            time.sleep(0.02)


def search_path() -> str:
    """PATH with the folders that hold daemons, which a plain user's PATH may lack."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])


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


# --- installing ----------------------------------------------------------------------------------------------------


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
    say(f"installing {packages} (once)")
    install = ["apt-get", "-y", "-qq", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300"]
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with services_kept_off():
        for step in (["install", *packages.split()], ["update"], ["install", *packages.split()]):
            done = subprocess.run([*install, *step], env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            if step[0] == "install" and done.returncode == 0:
                break
    if missing := missing_programs(accounting):
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise NotInstalledError(f"apt-get did not bring {', '.join(missing)}:\n{tail}\n{by_hand}")


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


# --- configuration -------------------------------------------------------------------------------------------------


def choose_ports(names: list[str]) -> dict[str, int]:
    """A free TCP port per name, below the range from which the kernel serves outgoing connections."""
    lowest_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = list(range(10_000, lowest_outgoing)) or list(range(10_000, 65_536))
    random.shuffle(candidates)
    ports: dict[str, int] = {}
    for port in candidates:
        if len(ports) == len(names):
            break
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))  # fails if any address of this machine has it in use
            ports[names[len(ports)]] = port
    if len(ports) < len(names):
        raise SandboxError(f"only {len(ports)} of {len(names)} TCP ports that Slurm needs are free on this machine")
    return ports


def slurm_conf(layout: Layout, settings: Settings, ports: Mapping[str, int]) -> str:
    """slurm.conf of the sandbox; every path in it lies below the sandbox's directory."""
    user = getpass.getuser()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20 // settings.nodes
    nodes = "\n".join(
        f"NodeName={n} NodeHostname={host_name()} NodeAddr=127.0.0.1 Port={ports[f'slurmd.{n}']} "
        f"CPUs={settings.cpus} RealMemory={memory} State=UNKNOWN"
        for n in settings.node_names
    )
    accounting = (
        "AccountingStorageType=accounting_storage/slurmdbd\n"
        f"AccountingStorageHost=127.0.0.1\nAccountingStoragePort={ports['slurmdbd']}\n"
        f"AccountingStoragePass={layout.munge_socket}"  # with munge, the "password" is the socket to ask
        if settings.accounting
        else "AccountingStorageType=accounting_storage/none"
    )
    controller = "SlurmctldParameters=preempt_send_user_signal" if settings.user_signal else ""
    return f"""\
ClusterName=sandbox
SlurmctldHost={host_name()}(127.0.0.1)
SlurmctldPort={ports["slurmctld"]}
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={layout.root}/state
SlurmdSpoolDir={layout.root}/spool.%n
SlurmctldPidFile={layout.root}/run/slurmctld.pid
SlurmdPidFile={layout.root}/run/slurmd.%n.pid
SlurmctldLogFile={layout.root}/log/slurmctld.log
SlurmdLogFile={layout.root}/log/slurmd.%n.log
MailProg=/bin/true
{LOOPBACK_ONLY if bound_to_loopback() else ""}
{controller}

# A requeued job waits until the credential of its last start has expired: 121 s by default.
AuthType=auth/munge
AuthInfo=socket={layout.munge_socket},cred_expire=5
CredType=cred/munge

# No cgroups: the sandbox also runs in containers that may not write to them.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
{accounting}

# Nodes have the CPUs that were asked for, not those that slurmd counts on the machine.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
DefMemPerCPU={max(1, memory // settings.cpus)}
PropagateResourceLimits=NONE
ReturnToService=2
SlurmdTimeout=30

SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
MaxArraySize=1001
JobRequeue=1
KillWait={KILL_WAIT_SECONDS}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE

{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={settings.grace} State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""


def slurmdbd_conf(layout: Layout, ports: Mapping[str, int]) -> str:
    user = getpass.getuser()
    return f"""\
DbdHost=localhost
DbdAddr=127.0.0.1
{LOOPBACK_ONLY if bound_to_loopback() else ""}
DbdPort={ports["slurmdbd"]}
SlurmUser={user}
AuthType=auth/munge
AuthInfo=socket={layout.munge_socket}
PidFile={layout.root}/run/slurmdbd.pid
LogFile={layout.root}/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser={user}
StorageLoc=slurm_accounting
"""


def host_name() -> str:
    """slurmctld only runs on the host that slurm.conf names, by its short name."""
    return socket.gethostname().partition(".")[0]


def bound_to_loopback() -> bool:
    """Whether Slurm can be told to listen on loopback alone.

    It can only be told to bind to what the host's own name means, and all of it talks to 127.0.0.1. Where the name
    means another address (Debian's 127.0.1.1, a machine on a network), ports are open on all addresses, guarded by
    munge's key as on any cluster.
    """
    try:
        return socket.gethostbyname(socket.gethostname()) == "127.0.0.1"
    except OSError:
        return False


def write_configuration(layout: Layout, record: Record) -> None:
    for name in ("etc", "log", "run", "state", "munge", "mysql", "tmp"):
        (layout.root / name).mkdir(mode=0o700)
    key = layout.etc / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    layout.slurm_conf.write_text(slurm_conf(layout, record.settings, record.ports))
    if record.settings.accounting:
        dbd = layout.etc / "slurmdbd.conf"
        dbd.touch(mode=0o600)  # slurmdbd refuses to start when others can read it
        dbd.write_text(slurmdbd_conf(layout, record.ports))


# --- daemons -------------------------------------------------------------------------------------------------------


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
    """Start a daemon in the foreground of a session of its own, so that its pid is the one recorded."""
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
    write_configuration(layout, record)
    start_munged(layout, record)
    if record.settings.accounting:
        start_accounting(layout, record)
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
        # munged wants a socket that every user can reach; this one is for a single user, in a private directory.
        "--force",
        f"--key-file={layout.etc}/munge.key",
        f"--socket={layout.munge_socket}",
        f"--pid-file={layout.root}/run/munged.pid",
        f"--seed-file={layout.root}/munge/seed",
    )
    wait_until(lambda: accepts(str(layout.munge_socket)), "munged to listen", layout, {"munged": munged})


def start_accounting(layout: Layout, record: Record) -> None:
    user, data = getpass.getuser(), layout.root / "mysql" / "data"
    common = ["--no-defaults", f"--datadir={data}", f"--user={user}", f"--tmpdir={layout.root}/tmp"]
    # Small, and never waiting for the disk: after a crash the sandbox starts anew anyway.
    quick = ["--innodb-log-file-size=8M", "--innodb-buffer-pool-size=64M", "--innodb-flush-method=nosync"]
    with layout.output("mariadb-install-db").open("wb") as log:
        # The database knows its only user by the socket's credentials: there is no password to keep.
        made = subprocess.run(
            ["mariadb-install-db", *common, *quick, "--skip-test-db", "--auth-root-socket-user=" + user],
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
    for what in (["cluster", "sandbox"], ["account", "sandbox"], ["user", user, "account=sandbox"]):
        added = ask(layout, "sacctmgr", "-i", "add", *what)
        if added.returncode and "already" not in added.stdout + added.stderr:
            text = (added.stdout + added.stderr).strip()
            raise SandboxError(f"sacctmgr add {' '.join(what)}: {text}\n{log_tail(layout, 'slurmdbd')}")


def node_state(layout: Layout, node: str) -> str:
    """A node's state as sinfo has it (`idle`, `mixed`, `down*` …); empty while slurmctld does not answer."""
    return ask(layout, "sinfo", "-h", "-N", "-p", "low", "-n", node, "-o", "%T").stdout.strip()


def take_down(layout: Layout, record: Record, keep: bool) -> None:
    """End jobs first, while Slurm still stands to tell them; then everything in the order of dependence."""
    daemon = {name: p for name, p in record.daemons.items() if p.alive()}
    if "slurmctld" in daemon and any(name.startswith("slurmd.") for name in daemon):
        cancel_jobs(layout)
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


def cancel_jobs(layout: Layout) -> None:
    """Cancel every job and wait until the queue is empty, at most the time that a job has between TERM and KILL."""
    ask(layout, "scancel", "--user", getpass.getuser())
    deadline = time.monotonic() + KILL_WAIT_SECONDS + 3
    while time.monotonic() < deadline:
        queue = ask(layout, "squeue", "-h", "-o", "%i", seconds=2)
        if queue.returncode or not queue.stdout.strip():
            return
        time.sleep(0.1)


# --- commands ------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """To the terminal; standard output belongs to what scripts read."""
    print(f"slurm_sandbox: {text}", file=sys.stderr, flush=True)


def standing(layout: Layout) -> Record:
    """The record of a sandbox that runs, killed nodes or not. Raises: SandboxError."""
    record = Record.read(layout)
    if record is None or "slurmctld" not in record.daemons or not record.daemons["slurmctld"].alive():
        raise SandboxError(
            f"no sandbox is up in {layout.root}; start one with: tools/slurm_sandbox up{dir_option(layout)}"
        )
    return record


def dir_option(layout: Layout) -> str:
    return "" if layout.root == sandbox_root(None) else f" --dir {layout.root}"


def command_up(layout: Layout, args: argparse.Namespace) -> int:
    asked = Settings(args.nodes, args.cpus, args.grace, args.user_signal, not args.no_accounting)
    ensure_installed(asked.accounting)
    with locked(layout):
        record = Record.read(layout)
        if record and record.running():
            if record.settings != asked:
                raise SandboxError(
                    f"a sandbox with other settings is up in {layout.root} ({record.settings}); "
                    f"take it down first (tools/slurm_sandbox down{dir_option(layout)}) or give another --dir"
                )
            say(f"already up in {layout.root}")
            return 0
        if record:
            say(f"clearing what an earlier sandbox left in {layout.root}")
            end(everything_of(layout), patience=0)
            clear(layout)
        begun = time.monotonic()
        record = Record(asked, boot_id())
        record.ports = choose_ports([name for name in record.expected if name not in ("munged", "mariadbd")])
        record.write(layout)
        try:
            bring_up(layout, record)
        except BaseException:  # an interrupt too must leave nothing behind
            take_down(layout, record, keep=False)
            raise
        say(f"{asked.nodes} nodes idle after {time.monotonic() - begun:.1f} s in {layout.root}")
        if not bound_to_loopback():
            say(f"its ports are open on all addresses of this machine: the name {host_name()} is not 127.0.0.1")
        say(f'next: eval "$(tools/slurm_sandbox env{dir_option(layout)})"')
    return 0


def clear(layout: Layout) -> None:
    """Empty the directory, the record last: without it, what remains would count as somebody else's."""
    for path in layout.root.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != layout.record:
            path.unlink()
    layout.record.unlink()


def command_down(layout: Layout, args: argparse.Namespace) -> int:
    if not layout.record.exists():
        say(f"no sandbox in {layout.root}")
        return 0
    with locked(layout):
        record = Record.read(layout)
        if record is None:  # another `down` was quicker
            layout.root.rmdir()
            return 0
        take_down(layout, record, args.keep)
        say(f"down; {layout.root} is {'kept' if args.keep else 'removed'}")
    return 0


def command_status(layout: Layout, args: argparse.Namespace) -> int:
    """Print what runs. Returns 0 where the whole sandbox does, 1 otherwise."""
    record = Record.read(layout)
    facts: dict[str, t.Any] = {"dir": str(layout.root), "up": record is not None and record.running()}
    if record:
        facts["settings"] = dataclasses.asdict(record.settings)
        facts["nodes"] = {n: node_state(layout, n) if facts["up"] else "" for n in record.settings.node_names}
        facts["daemons"] = {
            name: record.daemons[name].pid if name in record.daemons and record.daemons[name].alive() else None
            for name in record.expected
        }
        facts["ports"] = record.ports
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        print(f"{facts['dir']}: {'up' if facts['up'] else 'not up'}")
        for node, state in facts.get("nodes", {}).items():
            print(f"  node {node:<12} {state or 'unknown'}")
        for name, pid in facts.get("daemons", {}).items():
            port = f"port {facts['ports'][name]}" if name in facts["ports"] else "unix socket"
            print(f"  {name:<17} {f'pid {pid}' if pid else 'not running':<14} {port}")
    return 0 if facts["up"] else 1


def command_env(layout: Layout, args: argparse.Namespace) -> int:
    standing(layout)
    print(f"export SLURM_CONF={shlex.quote(str(layout.slurm_conf))}")
    return 0


def command_run(layout: Layout, args: argparse.Namespace) -> int:
    standing(layout)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise SandboxError("run: no command given; for example: tools/slurm_sandbox run -- sinfo")
    try:
        os.execvpe(command[0], command, client_env(layout))
    except OSError as e:
        raise SandboxError(f"run: {command[0]}: {e.strerror}") from e


def command_kill_node(layout: Layout, args: argparse.Namespace) -> int:
    """What a power cut does: slurmd, its steps and their processes are gone at once, and nobody reports it."""
    with locked(layout):
        record = known_node(layout, args.node)
        daemon = record.daemons[f"slurmd.{args.node}"]
        everything = everything_of(layout, args.node)
        # slurmd and slurmstepd first: a step that saw its task die would report an ordinary failure.
        for process in sorted(everything, key=lambda p: (p != daemon, DAEMON_MARK not in read_environ(p.pid))):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        end(everything)
    say(f"{args.node} is dead; slurmctld notices within 30 s, or at once after:")
    say(f"  scontrol update NodeName={args.node} State=DOWN Reason=killed")
    return 0


def command_start_node(layout: Layout, args: argparse.Namespace) -> int:
    with locked(layout):
        record = known_node(layout, args.node)
        name = f"slurmd.{args.node}"
        if record.daemons[name].alive():
            say(f"{args.node} already runs")
            return 0
        slurmd = start_slurmd(layout, record, args.node)
        wait_until(lambda: node_state(layout, args.node) == "idle", f"{args.node} to be idle", layout, {name: slurmd})
    say(f"{args.node} is idle again")
    return 0


def known_node(layout: Layout, node: str) -> Record:
    """The record of a sandbox that has this node. Raises: SandboxError."""
    record = standing(layout)
    if node not in record.settings.node_names:
        raise SandboxError(f"unknown node '{node}'. Valid: {', '.join(record.settings.node_names)}.")
    return record


def at_least(lowest: int) -> Callable[[str], int]:
    """An argparse type: a whole number not below `lowest`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {lowest} or more")
        return int(text)

    return number


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="slurm_sandbox", description=(__doc__ or "").partition("\n")[0])
    commands = top.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[Layout, argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--dir", help="the sandbox's directory (default: slurm-sandbox-<uid> in $TMPDIR or /tmp)")
        sub.set_defaults(run=run)
        return sub

    up = add("up", command_up, "start a sandbox; where Slurm is missing, root installs Debian's packages first")
    defaults = Settings()
    up.add_argument("--nodes", type=at_least(1), default=defaults.nodes, help="emulated nodes (default %(default)s)")
    up.add_argument("--cpus", type=at_least(1), default=defaults.cpus, help="CPUs of each node (default %(default)s)")
    grace = "seconds between the preemption of a job and its end (default %(default)s)"
    up.add_argument("--grace", type=at_least(0), default=defaults.grace, help=grace)
    user_signal = "at preemption a job that was submitted with --signal gets that signal first, instead of TERM"
    up.add_argument("--user-signal", action="store_true", help=user_signal)
    up.add_argument("--no-accounting", action="store_true", help="without slurmdbd and MariaDB; sacct does not work")
    down = add("down", command_down, "end all jobs and daemons and remove the directory")
    down.add_argument("--keep", action="store_true", help="keep the directory with its logs")
    add("status", command_status, "nodes, daemons and ports").add_argument("--json", action="store_true")
    add("env", command_env, 'shell exports: eval "$(tools/slurm_sandbox env)"')
    run = add("run", command_run, "run a command in the sandbox: run -- sbatch job.sh")
    run.add_argument("command", nargs=argparse.REMAINDER)
    for name, function, text in (
        ("kill-node", command_kill_node, "kill a node with all that runs on it, as a power cut would"),
        ("start-node", command_start_node, "start a killed node again"),
    ):
        add(name, function, text).add_argument("node", help="n1, n2 …")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    # TERM unwinds like an interrupt does, so that a half-started sandbox is taken down.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return int(args.run(Layout(sandbox_root(args.dir)), args))
    except SandboxError as e:
        say(str(e))
        return e.exit_status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
