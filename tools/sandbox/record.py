"""What `up` was asked for, and what it started: `sandbox.json`."""

from __future__ import annotations

import dataclasses
import getpass
import json
from dataclasses import dataclass, field

from layout import Layout, SandboxError
from processes import Process, boot_id, daemon_in_place


@dataclass(frozen=True)
class Settings:
    """What the user asked `up` for.

    nodes, cpus: emulated nodes, and CPUs on each; both may exceed what the machine has.
    grace: seconds that a preempted job of `low` may go on before it is killed and requeued.
    user_signal: at preemption a job gets the signal of its own `--signal` option first, if it has one, instead of
        TERM (SlurmctldParameters=preempt_send_user_signal).
    accounting: slurmdbd and MariaDB behind sacct; without it `sacct`, and so submitit, knows no job's state.
    cluster: ClusterName.
    like: kinds of site (sites.py), such as `typed-gpus` or `submit-limit=2`.
    user: who jobs belong to.
    """

    nodes: int = 2
    cpus: int = 2
    grace: int = 10
    user_signal: bool = False
    accounting: bool = True
    cluster: str = "sandbox"
    like: tuple[str, ...] = ()
    user: str = field(default_factory=getpass.getuser)

    @property
    def node_names(self) -> list[str]:
        return [f"n{i}" for i in range(1, self.nodes + 1)]

    @property
    def shared(self) -> bool:
        """Whether jobs belong to somebody else than the daemons do."""
        return self.user != getpass.getuser()


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
        for name in ("slurmctld", "slurmdbd"):
            # Somebody may have started it again by hand.
            if name in daemons and not daemons[name].alive() and (other := daemon_in_place(layout, name)):
                daemons[name] = other
        settings = Settings(**{**raw["settings"], "like": tuple(raw["settings"]["like"])})
        return cls(settings, raw["boot_id"], raw["ports"], daemons)

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
