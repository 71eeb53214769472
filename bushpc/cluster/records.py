"""What passes between bushpc and a cluster: requests, jobs and their states, limits, what a job knows of itself."""

from __future__ import annotations

import typing as t
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

if t.TYPE_CHECKING:
    from bushpc.config import ClusterConfig


@dataclass(frozen=True, kw_only=True)
class Job:
    """A submitted job, as the notes in a run folder name it.

    id: as the cluster names it; of a local job the process id. cluster, name: what the cluster calls itself and the
    job; other clusters, and this one when its numbers begin again, have jobs of the same id. "" where they are not
    known. log: what rank 0 prints to. owner: user id of whoever submitted it. host, process_start: of a process on a
    single machine; with the id they name it for good. heartbeat: a file that the job touches while it works, where the
    log alone would not tell.
    """

    id: str
    executor: str
    cluster: str = ""
    name: str = ""
    log: str = ""
    submitted: float = 0.0
    owner: int | None = None
    host: str | None = None
    process_start: str | None = None
    heartbeat: str | None = None


class JobState(t.NamedTuple):
    """The state of a job that still exists.

    waiting: it has not started. word: the cluster's own word for the state. held: why it will not start by itself
    and what to do about it; "" where nobody has to do anything. nodes: where it runs, as the cluster writes it.
    """

    waiting: bool
    word: str = ""
    held: str = ""
    nodes: str = ""


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """What `Cluster.submit` is asked for.

    name: of the job. work: one picklable callable per job; several become one array where the cluster has arrays.
    folder: takes scripts, pickles and logs. setup: shell lines before the ranks start. at_end: a command that the batch
    shell runs when the ranks have ended, with their exit status added as its last but one word; only where `requeues`.
    turns: instead of it, only where `takes_turns`, a command that the shell runs before it starts the ranks, with the
    exit status of the last ones added (`none` at first): what it prints is BUSHPC_TURN for the next ones, until it ends
    with another status than 0.
    after: ids of jobs that have to end first. lead_s: seconds before the time limit at which the
    job is told; None takes the profile's. takes_place: False for a small job that need not wait until the machine has
    room.
    """

    name: str
    work: Sequence[Callable[[], t.Any]]
    folder: Path
    profile: ClusterConfig
    setup: Sequence[str]
    at_end: Sequence[str] = ()
    turns: Sequence[str] = ()
    after: Sequence[str] = ()
    lead_s: int | None = None
    takes_place: bool = True


class Limits(t.NamedTuple):
    """What the cluster allows. jobs_at_once: jobs of one submission; None without a limit.

    room: jobs that it takes at present, and why no more; None without a limit, or if it does not tell. never: why it
    would never start a job of this profile; "" where it would. running: jobs of which it runs no more at the same time,
    and why.
    """

    jobs_at_once: int | None = None
    room: int | None = None
    why: str = ""
    never: str = ""
    running: int | None = None
    why_running: str = ""


@dataclass(frozen=True, kw_only=True)
class ThisJob:
    """The job that this process runs in.

    id: of this job alone, also for a task of an array. queue_id: what `states` calls it. name: of the job. cluster:
    what it calls itself. restarts: how often the cluster has started the job again. batch: False in an interactive
    allocation, which outlives what runs in it. node: what the cluster calls this node. started: when it was started
    this time, in seconds since 1970; 0 if unknown.
    """

    executor: str
    id: str
    queue_id: str
    name: str = ""
    cluster: str = ""
    restarts: int = 0
    batch: bool = True
    node: str = ""
    started: int = 0


class Step(t.NamedTuple):
    """A parallel step of the cluster's own launcher, such as srun's.

    variables: environment variables with rank, number of ranks and local rank. start: unique per start of the step,
    the same on all its ranks. node: what the cluster calls this node.
    """

    variables: tuple[str, str, str]
    start: str
    node: str


@dataclass(frozen=True, kw_only=True)
class JobFacts:
    """What the cluster says of a running job whose ranks have ended.

    ours_to_requeue: False for one that was cancelled, or that the cluster requeues itself. limit_min: its time limit;
    None without one. requeue_as: the id that `requeue` takes.
    """

    ours_to_requeue: bool
    preempted: bool
    restarts: int
    limit_min: int | None
    requeue_as: str
