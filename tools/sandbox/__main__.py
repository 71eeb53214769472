"""A real Slurm on this machine, for the Slurm tests and for trying bushpc without a cluster. Outside the package.

    up → eval "$(tools/slurm_sandbox env)" → sbatch, srun, squeue, sacct … → down

One sandbox is one directory: munged, a private MariaDB under slurmdbd, slurmctld, one slurmd per emulated node, and
their configuration, logs, keys and sockets. Nothing in /etc/slurm is read or written, every port is chosen free at
start, and MariaDB listens on a socket in the directory alone, so several sandboxes run side by side. Jobs run as the
user who called `up`, or as an ordinary one (`--like ordinary-user`). Needs Python 3.10 or newer and no other module.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pwd
import shlex
import signal
import sys
import time
import typing as t
from collections.abc import Callable

import sites
from configuration import bound_to_loopback, choose_ports, host_name
from daemons import (
    accepts,
    bring_up,
    clear,
    client_env,
    node_started,
    node_state,
    start,
    start_slurmd,
    take_down,
    wait_until,
)
from install import ensure_installed
from layout import Layout, SandboxError, dir_option, locked, sandbox_root, say
from processes import DAEMON_MARK, boot_id, end, everything_of, read_environ
from record import Record, Settings


def standing(layout: Layout) -> Record:
    """The record of a sandbox that runs, killed nodes or not. Raises: SandboxError."""
    record = Record.read(layout)
    if record is None or "slurmctld" not in record.daemons or not record.daemons["slurmctld"].alive():
        raise SandboxError(
            f"no sandbox is up in {layout.root}; start one with: tools/slurm_sandbox up{dir_option(layout)}"
        )
    return record


def command_up(layout: Layout, args: argparse.Namespace) -> int:
    sites.check(args.like)
    asked = Settings(
        nodes=args.nodes,
        cpus=args.cpus or sites.cpus_needed(args.like),
        grace=args.grace,
        user_signal=args.user_signal,
        accounting=not args.no_accounting,
        cluster=args.cluster,
        like=tuple(args.like),
        **({"user": sites.ORDINARY_USER} if "ordinary-user" in args.like else {}),
    )
    ensure_installed(asked.accounting)
    if asked.shared:
        sites.ensure_user()
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
    settings = standing(layout).settings
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise SandboxError("run: no command given; for example: tools/slurm_sandbox run -- sinfo")
    env = client_env(layout)
    if args.as_user:
        if not settings.shared:
            raise SandboxError("run --as-user: jobs here belong to you; start the sandbox with --like ordinary-user")
        who = pwd.getpwnam(settings.user)
        env |= {"HOME": who.pw_dir, "USER": who.pw_name, "LOGNAME": who.pw_name}
        os.initgroups(who.pw_name, who.pw_gid)
        os.setgid(who.pw_gid)
        os.setuid(who.pw_uid)
    try:
        os.execvpe(command[0], command, env)
    except OSError as e:
        raise SandboxError(f"run: {command[0]}: {e.strerror}") from e


def command_stop_daemon(layout: Layout, args: argparse.Namespace) -> int:
    """What a restart of a daemon does to a site while it lasts: jobs go on, and nobody answers."""
    with locked(layout):
        end([known_daemon(layout, args.daemon).daemons[args.daemon]])
    say(f"{args.daemon} is stopped; jobs go on")
    return 0


def command_start_daemon(layout: Layout, args: argparse.Namespace) -> int:
    with locked(layout):
        record = known_daemon(layout, args.daemon)
        if record.daemons[args.daemon].alive():
            say(f"{args.daemon} already runs")
            return 0
        daemon = start(layout, record, args.daemon, args.daemon, "-D")
        port = record.ports[args.daemon]
        wait_until(lambda: accepts(("127.0.0.1", port)), f"{args.daemon} to listen", layout, {args.daemon: daemon})
    say(f"{args.daemon} is back")
    return 0


def known_daemon(layout: Layout, name: str) -> Record:
    """The record of a sandbox that has this daemon, running or not. Raises: SandboxError."""
    record = Record.read(layout)
    if record is None or name not in record.daemons:
        raise SandboxError(f"{layout.root} has no {name}: no sandbox is up there, or one without accounting")
    return record


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
        before = node_started(layout, args.node)
        slurmd = start_slurmd(layout, record, args.node)

        def back() -> bool:
            """A job that waits for the node may take it at once, so it need not be idle for long enough to be seen."""
            state = node_state(layout, args.node)
            return node_started(layout, args.node) != before and not state.startswith("down") and "*" not in state

        wait_until(back, f"{args.node} to be back", layout, {name: slurmd})
    say(f"{args.node} is back")
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
    up.add_argument("--cpus", type=at_least(1), help="CPUs of each node (default 2, or what a kind of site needs)")
    grace = "seconds between the preemption of a job and its end (default %(default)s)"
    up.add_argument("--grace", type=at_least(0), default=defaults.grace, help=grace)
    user_signal = "at preemption a job that was submitted with --signal gets that signal first, instead of TERM"
    up.add_argument("--user-signal", action="store_true", help=user_signal)
    up.add_argument("--no-accounting", action="store_true", help="without slurmdbd and MariaDB; sacct does not work")
    up.add_argument("--cluster", default=defaults.cluster, help="its ClusterName (default %(default)s)")
    like = "set up like this kind of site; may be repeated, also with a number: --like submit-limit=2"
    up.add_argument("--like", action="append", default=[], metavar="KIND[=N]", help=like)
    up.formatter_class = argparse.RawDescriptionHelpFormatter
    kinds = [(name + (f"={kind.number}" if kind.number else ""), kind.summary) for name, kind in sites.KINDS.items()]
    up.epilog = "\n".join(["kinds of site:", *(f"  {name:<19} {summary}" for name, summary in kinds)])
    down = add("down", command_down, "end all jobs and daemons and remove the directory")
    down.add_argument("--keep", action="store_true", help="keep the directory with its logs")
    add("status", command_status, "nodes, daemons and ports").add_argument("--json", action="store_true")
    add("env", command_env, 'shell exports: eval "$(tools/slurm_sandbox env)"')
    run = add("run", command_run, "run a command in the sandbox: run -- sbatch job.sh")
    run.add_argument("--as-user", action="store_true", help="as the user whom jobs belong to (--like ordinary-user)")
    run.add_argument("command", nargs=argparse.REMAINDER)
    for name, function, text in (
        ("kill-node", command_kill_node, "kill a node with all that runs on it, as a power cut would"),
        ("start-node", command_start_node, "start a killed node again"),
    ):
        add(name, function, text).add_argument("node", help="n1, n2 …")
    for name, function, text in (
        ("stop-daemon", command_stop_daemon, "stop slurmctld or slurmdbd; jobs go on"),
        ("start-daemon", command_start_daemon, "start it again"),
    ):
        add(name, function, text).add_argument("daemon", choices=("slurmctld", "slurmdbd"))
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
