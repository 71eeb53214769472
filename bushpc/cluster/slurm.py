"""Slurm, through its commands; jobs are submitted by submitit. The only room that knows its words and variables.

    request ─submitit→ sbatch, one array per submission
    states ← squeue     signal, cancel → scancel     requeue → scontrol     inside a job ← SLURM_* variables

What a site's Slurm allows is looked at in slurm_site.py. sacct is never needed: not every site has accounting.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import time
import typing as t
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bushpc.cluster import container, slurm_variables
from bushpc.cluster.base import Cluster, NoAnswer, TooManyJobs, ask, patiently, submit_all
from bushpc.cluster.checks import Check
from bushpc.cluster.records import Job, JobFacts, JobRequest, JobState, Limits, Step, ThisJob
from bushpc.cluster.slurm_ask import NOT_OURS, ask_controller, is_away, job_facts, site_settings
from bushpc.cluster.slurm_options import require_known
from bushpc.cluster.slurm_script import LATER_TURN, executor_of
from bushpc.errors import ConfigError, DispatchError

if t.TYPE_CHECKING:
    from bushpc.config import ClusterConfig

# Why Slurm lets a job wait that will start by itself; any other reason may need someone to do something.
PLAIN_REASONS = ("", "None", "Priority", "Resources", "BeginTime", "Dependency", "JobArrayTaskLimit", "Cleaning")
# Limits on how many jobs run at the same time: when others end, the job starts.
OTHERS_FIRST = re.compile(r"(?:Assoc|QOS)?(?:Max|Grp)Jobs\w*")
# A stop signal leaves seconds, so a rank or batch shell waits no longer than this for an answer.
IN_JOB_ANSWERS_S = 10
AT_END_ANSWERS_S = 30
# Ids on one command line of scancel.
IDS_AT_ONCE = 200
# A job that only looks for processes waits this long for nodes that others may have by now.
SEARCH_WAIT_S = 300
# In answers of a controller that is well: asking again would change nothing.
REFUSALS = (NOT_OURS, "Invalid job id", "denied", "disabled", "already completing or completed")


class SlurmCluster(Cluster):
    """A site's Slurm. Cells are tasks of job arrays; a stopped cell's job goes back into the queue by itself."""

    executor = "slurm"
    requeues = True
    waits = True
    takes_turns = True
    outlives_submitter = True
    launcher = "srun"
    scratch = ("SLURM_TMPDIR", "TMPDIR")
    variables = slurm_variables.RULES
    chosen_by = "SLURM_CONF"

    def submit(self, request: JobRequest) -> list[Job]:
        if shutil.which("sbatch") is None:
            raise DispatchError(
                "cluster=slurm: there is no sbatch here; run this on a login node, or use cluster=local"
            )
        request.folder.mkdir(parents=True, exist_ok=True)
        here = patiently(self.here)  # first: jobs that are submitted are to be noted, whatever Slurm does then
        jobs = patiently(functools.partial(self._send, request))
        return [replace(job, owner=os.getuid(), cluster=here, name=request.name) for job in jobs]

    def _send(self, request: JobRequest) -> list[Job]:
        """Submit, once. Raises: DispatchError; TooManyJobs; NoAnswer, and then no such job is there."""
        try:
            executor = executor_of(request, self.scratch)
            return submit_all(executor, request.work, self.executor, "the cluster refused the job")
        except DispatchError as error:
            from bushpc.cluster.slurm_limits import explain_refusal

            if explained := explain_refusal(str(error)):
                raise TooManyJobs(explained) from error
            if not is_away(error):
                raise
            # A controller may have taken the jobs and lost its answer. They were not told yet what to run.
            if taken := self.find(request.name):
                patiently(functools.partial(ask_controller, "scancel", *taken))
            raise NoAnswer(str(error)) from error

    def here(self) -> str:
        return _cluster_name(os.environ.get(self.chosen_by))

    def environment_notes(self, profile: ClusterConfig) -> list[str]:
        return slurm_variables.notes(profile)

    def concerns(self, profile: ClusterConfig) -> list[str]:
        from bushpc.cluster import slurm_site

        try:
            return [*container.warnings(profile), *slurm_site.concerns(slurm_variables.in_force(profile))]
        except DispatchError:  # the submission will tell
            return []

    def script(self, request: JobRequest) -> str:
        executor = executor_of(request, self.scratch)
        if len(request.work) > 1:
            executor.parameters["map_count"] = len(request.work)  # as submitit does for an array
        return str(executor._make_submission_file_text(executor._submitit_command_str, ""))

    def refusal(self, request: JobRequest) -> str:
        from bushpc.cluster import slurm_trial

        return patiently(functools.partial(slurm_trial.refusal, self.script(request)))

    def require(self, profile: ClusterConfig) -> None:
        """Also refuses options that Slurm does not have, and what no node or partition could ever give."""
        from bushpc.cluster import slurm_site

        super().require(profile)
        container.require(profile)
        twice = [name for name in profile.srun if name.startswith("container")] if profile.container.used else []
        if twice:
            raise ConfigError(f"cluster.srun has {twice[0]} besides cluster.container: set the container once")
        profile = slurm_variables.in_force(profile)
        require_known(profile)
        slurm_site.refuse_impossible(profile)

    def states(self, jobs: Sequence[Job]) -> dict[str, JobState]:
        """squeue is asked once, by user: colleagues look at each other's runs.

        A job of the same number that has another name or owner is not the one meant: Slurm's numbers begin again. The
        submit time tells nothing more: a requeue renews it, and each submission has a name that no other one has.
        """
        self.require_here(job.cluster for job in jobs)
        wanted = {job.id: job for job in jobs}
        owners = sorted({_owner(job) for job in jobs})
        # --all: jobs of hidden partitions are left out without it, even one's own.
        command = ["squeue", "--noheader", "--array", "--all", f"--user={','.join(map(str, owners))}"]
        command += ["--format=%i|%T|%U|%r|%N|%j"]
        try:
            out = ask(*command)
        except DispatchError as error:
            kind = NoAnswer if is_away(error) else DispatchError
            raise kind(f"Slurm does not tell its queue: {error}") from error
        states = {}
        for line in out.splitlines():
            if line.count("|") < 5:  # not to be taken for a job that has ended
                raise DispatchError(f"Slurm's answer is not understood: `{line}` of `{' '.join(command)}`")
            job_id, word, owner, reason, nodes, name = (part.strip() for part in line.split("|", 5))
            job = wanted.get(job_id)
            if job and owner == str(_owner(job)) and job.name in ("", name):
                waiting = word == "PENDING"
                held = _why_held(job_id, reason) if waiting else ""
                states[job_id] = JobState(waiting=waiting, word=word, held=held, nodes=nodes)
        return states

    def signal(self, job: Job, name: str) -> None:
        self._require_alive(job)
        ask("scancel", f"--signal={name}", job.id)

    def cancel(self, jobs: Sequence[Job], *, now: bool = False, waiting_only: bool = False) -> None:
        """The queue is asked first which of them are there and ours. scancel's own filters, such as --name and --state,
        would not do: with any of them the id of one waiting task stands for all waiting tasks of its array."""
        found = patiently(functools.partial(self.states, jobs))
        ids = sorted(job_id for job_id, state in found.items() if state.waiting or not waiting_only)
        waiting_only &= not any("_" in job_id for job_id in ids)
        for i in range(0, len(ids), IDS_AT_ONCE):
            some = ids[i : i + IDS_AT_ONCE]
            if now:  # before a plain scancel, which would leave a job that ignores TERM its KillWait
                with contextlib.suppress(DispatchError):
                    ask("scancel", "--signal=KILL", "--full", *some)
            command = ("scancel", *(["--state=PENDING"] if waiting_only else []), *some)
            try:
                patiently(functools.partial(ask_controller, *command))
            except DispatchError as error:
                if not (now or waiting_only):
                    raise DispatchError(f"Slurm did not cancel {', '.join(some[:3])} … ({error}); try again") from error

    def requeue(self, job_id: str) -> None:
        ask("scontrol", "requeue", job_id, timeout=AT_END_ANSWERS_S)

    def limits(self, profile: ClusterConfig) -> Limits:
        from bushpc.cluster.slurm_limits import read_limits

        return read_limits(profile)

    def find(self, name: str) -> list[str]:
        command = ["squeue", "--noheader", "--array", "--all", "--me", f"--name={name}", "--format=%i"]
        try:
            return patiently(functools.partial(ask_controller, *command)).split()
        except DispatchError as error:
            raise DispatchError(
                "a submission was killed, and Slurm does not tell which of its jobs it has accepted "
                f"({error}); try again"
            ) from error

    # --- asked inside a job

    def this_job(self, environment: Mapping[str, str]) -> ThisJob | None:
        """SLURM_JOB_ID is the job's own id, also for a task of an array.

        SLURM_ARRAY_JOB_ID and SLURM_ARRAY_TASK_ID are no substitute: what a task submits inherits both. To Slurm's
        commands the id of an array's last task means the whole array, so only squeue's own way of writing it is used
        to ask for the state.
        """
        job_id = environment.get("SLURM_JOB_ID")
        if job_id is None:
            return None
        array = environment.get("SLURM_ARRAY_JOB_ID")
        return ThisJob(
            executor=self.executor,
            id=job_id,
            name=environment.get("SLURM_JOB_NAME", ""),
            cluster=environment.get("SLURM_CLUSTER_NAME", ""),
            queue_id=f"{array}_{environment.get('SLURM_ARRAY_TASK_ID')}" if array else job_id,
            restarts=_number(environment, "SLURM_RESTART_COUNT"),
            # An interactive allocation has the same variables.
            batch=environment.get("ENVIRONMENT") == "BATCH",
            node=environment.get("SLURMD_NODENAME", ""),
            started=0 if LATER_TURN in environment else _number(environment, "SLURM_JOB_START_TIME"),
        )

    def this_step(self, environment: Mapping[str, str]) -> Step | None:
        """In a batch script Slurm sets SLURM_PROCID and SLURM_NTASKS, too, for a single process: only
        SLURM_STEP_NUM_TASKS tells a step."""
        if environment.get("SLURM_STEP_NUM_TASKS", "1") == "1":
            return None
        names = ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        return Step(
            variables=("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
            start="-".join(environment.get(name, "0") for name in names),
            node=environment.get("SLURMD_NODENAME", ""),
        )

    def rank(self, environment: Mapping[str, str]) -> int | None:
        number = environment.get("SLURM_PROCID", "")
        return int(number) if number.isdecimal() else None

    def cores(self, environment: Mapping[str, str]) -> int | None:
        return _number(environment, "SLURM_CPUS_ON_NODE") or None

    def time_limit(self, job: ThisJob) -> float | None:
        if "SLURM_JOB_END_TIME" in os.environ:  # not before Slurm 23.02
            return float(os.environ["SLURM_JOB_END_TIME"])
        command = ["squeue", "--noheader", f"--jobs={job.id}", "--format=%A %e"]
        try:
            answer = ask(*command, timeout=IN_JOB_ANSWERS_S)
            # The last task of an array has the array's number, so asking for it may name its neighbours, too.
            limits = dict(line.split() for line in answer.splitlines())
            return time.mktime(time.strptime(limits[job.id], "%Y-%m-%dT%H:%M:%S"))
        except (DispatchError, ValueError, KeyError) as error:
            print(f"the time limit of job {job.id} is not known here, only its signal will tell: {error}", flush=True)
            return None

    def facts(self, job: ThisJob) -> JobFacts:
        text = ask("scontrol", "--oneliner", "show", "job", job.id, timeout=AT_END_ANSWERS_S)
        return job_facts(text, job.id, job.name)

    def is_final(self, error: DispatchError) -> bool:
        return any(word in str(error) for word in REFUSALS)

    # --- for doctor and drill

    def checks(self) -> Sequence[tuple[str, Callable[[ClusterConfig], Iterable[Check]]]]:
        from bushpc.cluster import setup, slurm_site

        def as_submitted(
            check: Callable[[ClusterConfig], Iterable[Check]],
        ) -> Callable[[ClusterConfig], Iterable[Check]]:
            return lambda profile: check(slurm_variables.in_force(profile))

        every = (*slurm_site.CHECKS, ("setup lines", setup.check))
        return [(name, as_submitted(check)) for name, check in every]

    def suggest(self, profile: ClusterConfig) -> dict[str, t.Any]:
        from bushpc.cluster import slurm_suggest

        return slurm_suggest.suggest(profile)

    def choices(self, profile: ClusterConfig) -> dict[str, list[str]]:
        from bushpc.cluster import slurm_suggest

        return slurm_suggest.choices(profile)

    def describe(self) -> Iterator[Check]:
        from bushpc.cluster import slurm_suggest

        return slurm_suggest.site_lines()

    def check(self, profile: ClusterConfig) -> Iterator[Check]:
        for _, check in self.checks():
            yield from check(profile)

    def gpu_names(self, profile: ClusterConfig) -> list[str]:
        from bushpc.cluster import slurm_site

        return super().gpu_names(profile) or slurm_site.gpu_types(profile)

    def around_ranks(self, before: str, after: str) -> list[str]:
        """A shell finds a function before the program of the same name; srun's exit status is kept."""
        return [before, f'srun() {{ command srun "$@"; local status=$?; {after}; return $status; }}']

    def kill_ranks(self, job: Job) -> None:
        """To the step: `scancel --signal=KILL JOB` would cancel the job."""
        self._require_alive(job)
        ask("scancel", "--signal=KILL", f"{job.id}.0")

    def compete(self, nodes: str, options: Sequence[str], log: Path, seconds: int) -> Job:
        command = ["sbatch", "--parsable", f"--nodelist={nodes}", "--time=1", f"--output={log}", *options]
        told = ask(*command, f"--wrap=sleep {seconds}")
        return Job(id=told.strip().partition(";")[0], executor=self.executor, owner=os.getuid())

    def node_names(self, nodes: str) -> list[str]:
        return ask("scontrol", "show", "hostnames", nodes).split() if nodes else []

    def run_on_nodes(
        self, command: Sequence[str], nodes: Sequence[str], *, cwd: Path, inside: Job | None, profile: ClusterConfig
    ) -> str:
        if inside:
            options = [f"--jobid={inside.id}", "--overlap"]
        else:
            profile = slurm_variables.in_force(profile)
            wanted = {name: getattr(profile, name) for name in ("partition", "account", "qos", "constraint")}
            options = [f"--{name}={value}" for name, value in wanted.items() if value]
            options += ["--time=2", f"--immediate={SEARCH_WAIT_S}"]
        count = len(nodes)
        where = [f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", f"--nodelist={','.join(nodes)}"]
        return ask("srun", "--quiet", *options, *where, f"--chdir={cwd}", *command)

    def _require_alive(self, job: Job) -> None:
        """Raises: DispatchError unless the job is in the queue."""
        if job.id not in self.states([job]):
            raise DispatchError(f"job {job.id} of this run is not in the queue any more")


@functools.cache
def _cluster_name(conf: str | None) -> str:
    """ClusterName of the Slurm that this configuration leads to. Raises: DispatchError."""
    return site_settings().get("ClusterName", "")


def _why_held(job_id: str, reason: str) -> str:
    """Why a job will not start by itself, and what to do; "" for one that only waits for its turn."""
    if reason in PLAIN_REASONS or OTHERS_FIRST.fullmatch(reason):
        return ""
    # "JobHeldUser", "launch failed requeued held", "job requeued in held state"
    held = "held" in reason.lower()
    then = f"`scontrol release {job_id}` lets it go" if held else f"`scontrol show job {job_id}` tells more"
    return f"Slurm keeps job {job_id} back ({reason}); {then}"


def _owner(job: Job) -> int:
    return os.getuid() if job.owner is None else job.owner


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdecimal() else 0
