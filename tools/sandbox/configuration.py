"""Slurm's configuration files: an ordinary cluster as a draft, what kinds of site change in it, and the files."""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from layout import Layout, SandboxError
from record import Record, Settings

KILL_WAIT_SECONDS = 5
LOOPBACK_ONLY = "NoInAddrAny,NoCtldInAddrAny"

Keys = dict[str, object]


@dataclass
class Draft:
    """A cluster before its files are written; kinds of site change it.

    keys: slurm.conf's lines that hold for the whole cluster.
    nodes, partitions: the options of each node's and each partition's line.
    gpus: node → type of GPU ("" for none) and number.
    rules: lines of Lua in slurm_job_submit (job_submit/lua), see RULES.
    dbd: further lines of slurmdbd.conf.
    accounting: arguments of sacctmgr, run when the user has an association.
    prolog: shell lines run before each task; `export NAME=value` printed by them reaches the task.
    """

    settings: Settings
    keys: Keys
    nodes: dict[str, Keys]
    partitions: dict[str, Keys]
    gpus: dict[str, tuple[str, int]] = field(default_factory=dict)
    rules: list[str] = field(default_factory=list)
    dbd: Keys = field(default_factory=dict)
    accounting: list[list[str]] = field(default_factory=list)
    prolog: list[str] = field(default_factory=list)

    def enforce(self, *what: str) -> None:
        """Add to AccountingStorageEnforce."""
        self.append("AccountingStorageEnforce", *what)

    def append(self, key: str, *values: str) -> None:
        """Add to one of slurm.conf's comma-separated lists."""
        have = [one for one in str(self.keys.get(key, "")).split(",") if one]
        self.keys[key] = ",".join(dict.fromkeys([*have, *values]))


def ordinary(layout: Layout, settings: Settings, ports: Mapping[str, int]) -> Draft:
    """Nodes without GPUs; partition `low` is the default and preemptible, `high` preempts it."""
    owner = getpass.getuser()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20 // settings.nodes
    keys: Keys = {
        "ClusterName": settings.cluster,
        "SlurmctldHost": f"{host_name()}(127.0.0.1)",
        "SlurmctldPort": ports["slurmctld"],
        "SlurmUser": owner,
        "SlurmdUser": owner,
        "StateSaveLocation": f"{layout.root}/state",
        "SlurmdSpoolDir": f"{layout.root}/spool.%n",
        "SlurmctldPidFile": f"{layout.root}/run/slurmctld.pid",
        "SlurmdPidFile": f"{layout.root}/run/slurmd.%n.pid",
        "SlurmctldLogFile": f"{layout.root}/log/slurmctld.log",
        "SlurmdLogFile": f"{layout.root}/log/slurmd.%n.log",
        "MailProg": "/bin/true",
        # A requeued job waits until the credential of its last start has expired: 121 s by default.
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={layout.munge_socket},cred_expire=5",
        "CredType": "cred/munge",
        # No cgroups: the sandbox also runs in containers that may not write to them.
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        # Nodes have the CPUs that were asked for, not those that slurmd counts on the machine.
        "SlurmdParameters": "config_overrides",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "DefMemPerCPU": max(1, memory // settings.cpus),
        "PropagateResourceLimits": "NONE",
        "ReturnToService": 2,
        "SlurmdTimeout": 30,
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,bf_interval=1",
        "MaxArraySize": 1001,
        "JobRequeue": 1,
        "KillWait": KILL_WAIT_SECONDS,
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
    }
    if bound_to_loopback():
        keys["CommunicationParameters"] = LOOPBACK_ONLY
    if settings.user_signal:
        keys["SlurmctldParameters"] = "preempt_send_user_signal"
    if settings.accounting:
        keys |= {
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": "127.0.0.1",
            "AccountingStoragePort": ports["slurmdbd"],
            "AccountingStoragePass": layout.munge_socket,  # with munge, the "password" is the socket to ask
        }
    else:
        keys["AccountingStorageType"] = "accounting_storage/none"
    nodes: dict[str, Keys] = {
        name: {
            "NodeHostname": host_name(),
            "NodeAddr": "127.0.0.1",
            "Port": ports[f"slurmd.{name}"],
            "CPUs": settings.cpus,
            "RealMemory": memory,
            "State": "UNKNOWN",
        }
        for name in settings.node_names
    }
    low: Keys = {"Default": "YES", "PriorityTier": 1, "PreemptMode": "REQUEUE", "GraceTime": settings.grace}
    return Draft(settings, keys, nodes, {"low": low, "high": {"PriorityTier": 10, "PreemptMode": "OFF"}})


# In Lua 5.1, as Debian's plugin has it. A job that asks for GPUs says so in one of the fields tres_per_…
RULES = """\
local function asked_gpus(job)
  for _, name in ipairs({"tres_per_node", "tres_per_job", "tres_per_task", "tres_per_socket"}) do
    local asked = job[name]
    if asked and string.find(asked, "gpu") then return asked end
  end
end

local function asked_memory(job)
  return job.min_mem_per_node or job.min_mem_per_cpu or job.mem_per_tres
end

local function refuse(text)
  slurm.log_user(text)
  return slurm.ERROR
end

function slurm_job_submit(job, partitions, uid)
  local partition = job.partition or "low"
  local gpus, memory = asked_gpus(job), asked_memory(job)
  %s
  return slurm.SUCCESS
end

function slurm_job_modify(job, record, partitions, uid)
  return slurm.SUCCESS
end
"""


def write_configuration(layout: Layout, record: Record, draft: Draft) -> None:
    """Every file of Slurm's configuration, with the modes that Slurm insists on."""
    # Clients of another user read slurm.conf and reach the sockets; the rest stays private.
    open_to_all = 0o755 if record.settings.shared else 0o700
    layout.root.chmod(open_to_all)
    for name in ("etc", "munge", "gpus"):
        (layout.root / name).mkdir(mode=open_to_all)
    for name in ("log", "run", "state", "mysql", "tmp"):
        (layout.root / name).mkdir(mode=0o700)
    for name in draft.nodes if draft.prolog else ():
        local = layout.root / "local" / name
        local.mkdir(parents=True)
        local.chmod(0o1777)
    key = layout.etc / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    if draft.gpus:
        draft.append("GresTypes", "gpu")
        (layout.etc / "gres.conf").write_text(gres_conf(layout, draft))
    if draft.rules:
        draft.keys["JobSubmitPlugins"] = "lua"
        (layout.etc / "job_submit.lua").write_text(RULES % "\n  ".join(draft.rules))
    if draft.prolog:
        prolog = layout.etc / "task_prolog"
        prolog.write_text("\n".join(["#!/bin/sh", *draft.prolog, ""]))
        prolog.chmod(0o755)
        draft.keys["TaskProlog"] = prolog
    layout.slurm_conf.write_text(slurm_conf(draft))
    if record.settings.accounting:
        dbd = layout.etc / "slurmdbd.conf"
        dbd.touch(mode=0o600)  # slurmdbd refuses to start when others can read it
        dbd.write_text(slurmdbd_conf(layout, record.ports, draft))


def gres_conf(layout: Layout, draft: Draft) -> str:
    """gres.conf, and a link per device: Slurm sets CUDA_VISIBLE_DEVICES only for files that are devices."""
    lines = []
    for node, (kind, count) in draft.gpus.items():
        folder = layout.gpus / node
        folder.mkdir(mode=0o755)
        for i in range(count):
            (folder / f"gpu{i}").symlink_to("/dev/null")
        typed = f"Type={kind} " if kind else ""
        lines.append(f"NodeName={node} Name=gpu {typed}File={folder}/gpu[0-{count - 1}]")
        own = str(draft.nodes[node].get("Gres", ""))
        gpus = ":".join(filter(None, ["gpu", kind, str(count)]))
        draft.nodes[node]["Gres"] = f"{own},{gpus}" if own else gpus
    return "AutoDetect=off\n" + "\n".join(lines) + "\n"


def slurm_conf(draft: Draft) -> str:
    """Every path in it lies below the sandbox's directory."""

    def options(keys: Keys) -> str:
        return " ".join(f"{key}={value}" for key, value in keys.items())

    lines = [f"{key}={value}" for key, value in draft.keys.items()]
    lines += [f"NodeName={name} {options(keys)}" for name, keys in draft.nodes.items()]
    for name, keys in draft.partitions.items():
        lines.append(f"PartitionName={name} {options({'Nodes': 'ALL', 'State': 'UP', **keys})}")
    return "\n".join(lines) + "\n"


def slurmdbd_conf(layout: Layout, ports: Mapping[str, int], draft: Draft) -> str:
    owner = getpass.getuser()
    keys: Keys = {
        "DbdHost": "localhost",
        "DbdAddr": "127.0.0.1",
        "DbdPort": ports["slurmdbd"],
        "SlurmUser": owner,
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={layout.munge_socket}",
        "PidFile": f"{layout.root}/run/slurmdbd.pid",
        "LogFile": f"{layout.root}/log/slurmdbd.log",
        "StorageType": "accounting_storage/mysql",
        "StorageHost": "localhost",
        "StorageUser": owner,
        "StorageLoc": "slurm_accounting",
        **draft.dbd,
    }
    if bound_to_loopback():
        keys["CommunicationParameters"] = LOOPBACK_ONLY
    return "".join(f"{key}={value}\n" for key, value in keys.items())


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
