"""The one interface to whatever runs jobs, and the backends behind it, found by name.

    dispatch, ops ─submit, states, signal, cancel, requeue→ Cluster ─→ slurm.py | local.py | a file of yours
    job, trainer, lease ─this_job, this_step, time_limit→ the same

A backend is one file in this folder: a subclass of Cluster that names its `executor`, which is then a value of
`cluster.executor`. No torch: status and the batch shell's last question use it as well.
"""

from __future__ import annotations

import abc
import functools
import importlib
import os
import pkgutil
import subprocess
import sys
import time
import typing as t
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from bushpc import environment
from bushpc.cluster.checks import Check
from bushpc.cluster.records import Job, JobFacts, JobRequest, JobState, Limits, Step, ThisJob
from bushpc.errors import ConfigError, DispatchError, unknown_name

if t.TYPE_CHECKING:
    import submitit

    from bushpc.config import ClusterConfig

# A busy controller of a large site may take this long to answer.
ANSWERS_S = 60
# How long a controller that does not answer is asked again, and the pause in between.
PATIENCE_S, PAUSE_S = 120.0, 5.0
T = t.TypeVar("T")
NOT_BACKENDS = ("base", "checks", "container", "profile", "records", "scratch", "setup")


class Cluster(abc.ABC):
    """One way to run jobs.

    executor: the value of `cluster.executor` that chooses it. aliases: other names that job notes may have.
    requeues: whether a stopped job comes back without being submitted again. waits: whether a job can be submitted
    that starts when others have ended. takes_turns: whether a job can start its ranks several times.
    outlives_submitter: whether jobs may exist although the command that submitted them was killed before it knew their
    ids; `find` then tells them. ids_are_processes: job ids are process ids.
    one_machine: jobs run on the machine that submits them. launcher: the program that starts the ranks of a job.
    scratch: variables that may name a job's own folder on its node, the best first.
    variables: rules for the environment variables of its commands and jobs. chosen_by: the variable that says which of
    several clusters of this kind is meant.
    """

    executor: t.ClassVar[str]
    aliases: t.ClassVar[tuple[str, ...]] = ()
    requeues: t.ClassVar[bool] = False
    waits: t.ClassVar[bool] = False
    takes_turns: t.ClassVar[bool] = False
    outlives_submitter: t.ClassVar[bool] = False
    ids_are_processes: t.ClassVar[bool] = False
    one_machine: t.ClassVar[bool] = False
    launcher: t.ClassVar[str] = ""
    scratch: t.ClassVar[tuple[str, ...]] = ("TMPDIR",)
    variables: t.ClassVar[tuple[environment.Rule, ...]] = ()
    chosen_by: t.ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "executor" in cls.__dict__:
            environment.add_rules(cls.variables)
            backend = cls()
            for name in (cls.executor, *cls.aliases):
                _BACKENDS[name] = backend

    @abc.abstractmethod
    def submit(self, request: JobRequest) -> list[Job]:
        """Submit one job per callable. Raises: DispatchError where the cluster refuses; TooManyJobs."""

    def script(self, request: JobRequest) -> str:
        """What `submit` would hand to the cluster, in full; nothing is written. "" where there are no scripts."""
        return ""

    def refusal(self, request: JobRequest) -> str:
        """Why the cluster would never take such jobs, in its own words; "" where it would, or does not say.

        Nothing is submitted. Limits on the number of jobs are `limits`' concern.
        """
        return ""

    @abc.abstractmethod
    def states(self, jobs: Sequence[Job]) -> dict[str, JobState]:
        """Job id → its state, for every job that still exists; those that ended are absent.

        Raises: DispatchError where the cluster does not answer.
        """

    @abc.abstractmethod
    def signal(self, job: Job, name: str) -> None:
        """Send a signal (`TERM`, `USR2`) to all ranks of a running job. Raises: DispatchError."""

    @abc.abstractmethod
    def cancel(self, jobs: Sequence[Job], *, now: bool = False, waiting_only: bool = False) -> None:
        """End jobs. now: without time to save. waiting_only: leave those that have started. Raises: DispatchError."""

    def require(self, profile: ClusterConfig) -> None:
        """Raises: ConfigError for a profile that this kind of cluster can never run."""
        if self.one_machine and profile.nodes > 1:
            raise ConfigError(
                f"cluster.nodes={profile.nodes}: cluster.executor={self.executor} has one machine; use cluster=slurm"
            )
        if self.one_machine and profile.container.used:
            raise ConfigError(
                f"cluster.container with cluster.executor={self.executor}: ranks run in this machine's own Python. "
                "Start bushpc itself inside the container, or use cluster=slurm"
            )

    def requeue(self, job_id: str) -> None:
        """Stop a running job and put it back into the queue. Raises: DispatchError."""
        raise DispatchError(f"cluster.executor={self.executor} brings no job back: submit again")

    def here(self) -> str:
        """What the cluster that we talk to calls itself; "" where there is only one. Raises: DispatchError."""
        return ""

    def require_here(self, clusters: Iterable[str]) -> None:
        """clusters: those of jobs. Raises: DispatchError if one is not the cluster that we talk to."""
        for cluster in {*clusters} - {""}:
            here, chosen = self.here(), os.environ.get(self.chosen_by)
            if cluster != here:
                raise DispatchError(
                    f"jobs of this run are on the cluster '{cluster}', and this command talks to '{here}'"
                    f"{f' ({self.chosen_by}={chosen})' if chosen else ''}. Nothing was changed. Repeat it on a login "
                    f"node of {cluster}, or with its {self.chosen_by}. If {cluster} and its jobs are gone for good, "
                    "delete the job.json of the cells that have not ended, and submit again"
                )

    def environment_notes(self, profile: ClusterConfig) -> list[str]:
        """For whoever submits: which of their environment variables count for jobs of this profile, and which don't."""
        return []

    def concerns(self, profile: ClusterConfig) -> list[str]:
        """Why jobs of this profile may wait for long, for whoever submits them."""
        return []

    def limits(self, profile: ClusterConfig) -> Limits:
        """What a submission of jobs with this profile may be at present."""
        return Limits()

    def find(self, name: str) -> list[str]:
        """Ids of this user's jobs of that name that still exist. Raises: DispatchError."""
        raise NotImplementedError

    # --- asked inside a job

    def this_job(self, environment: Mapping[str, str]) -> ThisJob | None:
        """The job of this cluster that a process with these environment variables runs in; None outside."""
        return None

    def this_step(self, environment: Mapping[str, str]) -> Step | None:
        """The step of more than one rank that a process with these variables belongs to; None outside."""
        return None

    def rank(self, environment: Mapping[str, str]) -> int | None:
        """The rank of a process with these variables in the job's step; None outside."""
        return None

    def cores(self, environment: Mapping[str, str]) -> int | None:
        """Cores of this node that the job of a process with these variables has; None outside, or if nobody tells."""
        return None

    def time_limit(self, job: ThisJob) -> float | None:
        """When the job that we are in is ended, in seconds since 1970; None if nobody tells."""
        return None

    def facts(self, job: ThisJob) -> JobFacts:
        """Of the job that we are in, when its ranks have ended. Raises: DispatchError; NoClient."""
        raise NotImplementedError

    def is_final(self, error: DispatchError) -> bool:
        """Whether asking the cluster again would give the same answer."""
        return True

    # --- for doctor and drill

    def suggest(self, profile: ClusterConfig) -> dict[str, t.Any]:
        """Settings of `cluster.` that this profile leaves open → what the site has for them. Raises: DispatchError."""
        return {}

    def choices(self, profile: ClusterConfig) -> dict[str, list[str]]:
        """Settings of `cluster.` → what the site has to choose from: partitions, accounts, the most GPUs of each type
        on a node, the longest time. Raises: DispatchError."""
        return {}

    def describe(self) -> Iterator[Check]:
        """What the site has, whatever a profile asks for. Raises: DispatchError."""
        return iter(())

    def check(self, profile: ClusterConfig) -> Iterator[Check]:
        """Whether jobs of this profile would be accepted and started."""
        return iter(())

    def checks(self) -> Sequence[tuple[str, Callable[[ClusterConfig], Iterable[Check]]]]:
        """The parts of `check` by name, so that one that fails does not hide the others."""
        return ((self.executor, self.check),)

    def gpu_names(self, profile: ClusterConfig) -> list[str]:
        """What the cluster calls the GPUs that a job of this profile may get, as far as it tells."""
        return [profile.gpu_type] if profile.gpu_type else []

    def around_ranks(self, before: str, after: str) -> list[str]:
        """Setup lines that run a shell command before the ranks start and, where the batch shell outlives them, one
        after they have ended."""
        return [before]

    def kill_ranks(self, job: Job) -> None:
        """KILL all ranks of a job, but not the job. Raises: DispatchError."""
        raise DispatchError(f"cluster.executor={self.executor}: ranks cannot be killed apart from their job")

    def compete(self, nodes: str, options: Sequence[str], log: Path, seconds: int) -> Job:
        """Submit a job that should preempt what runs on these nodes. Raises: DispatchError."""
        raise DispatchError(f"cluster.executor={self.executor}: no job can preempt another")

    def node_names(self, nodes: str) -> list[str]:
        """The names in JobState.nodes, one by one."""
        return nodes.split()

    def run_on_nodes(
        self, command: Sequence[str], nodes: Sequence[str], *, cwd: Path, inside: Job | None, profile: ClusterConfig
    ) -> str:
        """Run a command once on each node and return what it prints.

        inside: within the allocation of this job; None asks for one. Raises: DispatchError.
        """
        return ask(*command)


_BACKENDS: dict[str, Cluster] = {}


class TooManyJobs(DispatchError):
    """The cluster takes no more, or not so many, jobs of this user."""

    code = "too-many-jobs"
    cure = "Wait until jobs end and run `bushpc resume`, or set cluster.submit_window to what the site allows."


class NoClient(DispatchError):
    """The cluster's commands are not installed here."""

    code = "no-client"
    cure = "Run the command on a login node, or with cluster=local."


def cluster_names() -> list[str]:
    """Every value that `cluster.executor` may have."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name not in NOT_BACKENDS:
            importlib.import_module(f"{__package__}.{module.name}")
    return sorted({backend.executor for backend in _BACKENDS.values()})


def cluster_for(executor: str) -> Cluster:
    """The backend of this name. Raises: ConfigError for a name that no backend has."""
    if executor not in _BACKENDS:
        names = cluster_names()
        if executor not in _BACKENDS:
            raise ConfigError(unknown_name("cluster.executor", executor, names))
    return _BACKENDS[executor]


def all_clusters() -> list[Cluster]:
    """Every backend."""
    return [_BACKENDS[name] for name in cluster_names()]


class NoAnswer(DispatchError):
    """The cluster's controller does not answer at present: it is being restarted, or has too much to do."""

    code = "no-answer"
    cure = "Try again in some minutes; running jobs continue meanwhile."


def patiently(question: Callable[[], T], wait_s: float | None = None) -> T:
    """The answer, asked for again for `wait_s` seconds while the controller does not answer. Raises: NoAnswer, then."""
    deadline = time.monotonic() + (PATIENCE_S if wait_s is None else wait_s)
    told = False
    while True:
        try:
            return question()
        except NoAnswer as error:
            left = deadline - time.monotonic()
            if left <= 0:
                raise
            if not told:
                print(f"{error}; asking again for {left:.0f} s", file=sys.stderr)
            told = True
            time.sleep(min(PAUSE_S, left))


def job_states(jobs: Iterable[Job], wait_s: float | None = None) -> dict[str, JobState]:
    """Job id → its state, for every job that still exists, whichever cluster it is on.

    wait_s: see `patiently`. Raises: DispatchError; NoAnswer.
    """
    by_executor: dict[str, list[Job]] = {}
    for job in jobs:
        by_executor.setdefault(job.executor, []).append(job)
    states: dict[str, JobState] = {}
    for executor, group in by_executor.items():
        states |= patiently(functools.partial(cluster_for(executor).states, group), wait_s)
    return states


def this_job(environment: Mapping[str, str] = os.environ) -> ThisJob | None:
    """The job that a process with these variables runs in; None outside every cluster's jobs."""
    return next((job for backend in all_clusters() if (job := backend.this_job(environment))), None)


def this_step(environment: Mapping[str, str] = os.environ) -> Step | None:
    """The parallel step that a process with these variables belongs to; None for a process by itself."""
    return next((step for backend in all_clusters() if (step := backend.this_step(environment))), None)


def rank_in(environment: Mapping[str, str]) -> int | None:
    """The rank of a process with these variables; None for one that is no rank."""
    return next((rank for backend in all_clusters() if (rank := backend.rank(environment)) is not None), None)


def job_cores(environment: Mapping[str, str] = os.environ) -> int | None:
    """Cores of this node that the job of a process with these variables has; None outside, or if nobody tells."""
    return next((cores for backend in all_clusters() if (cores := backend.cores(environment)) is not None), None)


def time_limit() -> float | None:
    """When the job that we are in is ended, in seconds since 1970; None outside a job, or if nobody tells."""
    job = this_job()
    return cluster_for(job.executor).time_limit(job) if job else None


def ask(*command: str, timeout: float = ANSWERS_S) -> str:
    """What one of a cluster's commands prints. Raises: DispatchError with its own reason; NoClient."""
    if ignored := environment.removed(environment.COMMAND):
        environment.say_once(f"not used from your environment: {', '.join(ignored)}")
    try:
        answer = subprocess.run(
            command,
            env=environment.for_process(environment.COMMAND),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=True,
            timeout=timeout,
        )
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.split()) or f"exit status {error.returncode}"
        raise DispatchError(f"`{' '.join(command)}` failed: {reason}") from error
    except FileNotFoundError as error:
        raise NoClient(f"`{' '.join(command)}` failed: {error}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise DispatchError(f"`{' '.join(command)}` failed: {error}") from error
    return answer.stdout


def submit_all(executor: submitit.Executor, work: Sequence[Callable[[], t.Any]], name: str, refused: str) -> list[Job]:
    """Submit through one of submitit's executors: several pieces of work as one array, where it has arrays.

    name: of the backend, for the jobs. Raises: DispatchError, which begins with `refused`.
    """
    all_clusters()  # a job must not inherit the variables of any of them
    with environment.applied(environment.JOB):
        try:
            with executor.batch():
                jobs = [executor.submit(each) for each in work]
        except Exception as error:  # submitit raises its own, subprocess's and plain exceptions alike
            raise DispatchError(f"{refused}: {error}") from error
    return [
        Job(id=job.job_id, executor=name, log=str(job.paths.folder / f"{job.job_id}_0_log.out"), submitted=time.time())
        for job in jobs
    ]
