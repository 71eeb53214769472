"""Cells → jobs: one submission for all that is missing, and a report job that follows it.

    plan ─write_run→ run folder ─what is missing→ packs per profile, in parts that the site accepts → jobs

Where jobs may outlive a command that was killed before it knew their ids, they are written down twice: before the
submission as jobs/submitting-<id>.json, and after it in each cell's job.json. A command that is killed between the two
leaves the first, and the next command finds the jobs by it.
"""

from __future__ import annotations

import contextlib
import os
import time
import typing as t
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from bushpc.cluster.base import Job, JobRequest, cluster_for, job_states
from bushpc.cluster.profile import packs_by_profile, report_profile, shell_lines
from bushpc.config import ClusterConfig
from bushpc.dispatch.job import CellJob, ReportJob
from bushpc.dispatch.plan import Plan
from bushpc.dispatch.requeue import command_at_end
from bushpc.dispatch.run_folder import alone_in, owner_of, snapshot, write_run
from bushpc.dispatch.status import RunStatus, job_of, read_job, read_status, report_is_current
from bushpc.errors import DispatchError
from bushpc.files import write_all, write_atomically
from bushpc.runs.goodput import read_note
from bushpc.runs.layout import RunDir
from bushpc.runs.records import JobNote, SubmittingNote


class Submission(t.NamedTuple):
    """What one call of `submit` did: names of the cells, by what happened to them, and what to look out for.

    elsewhere: cell → the run that it belongs to, where that is another one: it is trained once for both.
    """

    run_dir: Path
    submitted: list[str]
    done: list[str]
    live: list[str]
    elsewhere: dict[str, str]
    warnings: list[str]


def submit(plan: Plan, command: Sequence[str]) -> Submission:
    """Submit those of `plan.wanted` that are neither done nor live, and a report job after them.

    The same call again is safe, whatever became of the jobs, or of the last call, meanwhile.
    Raises: ConfigError if the run folder holds a run with other settings; DispatchError if the cluster refuses; then
    what it had accepted stays submitted, and the next call goes on with the rest.
    """
    run_dir, profile = plan.first.run_dir, plan.first.cluster
    with alone_in([run_dir]):
        code = write_run(run_dir, plan, command)
        owners = {name: owner_of(run_dir, name) for name in plan.cells}
        with alone_in([owner for owner in owners.values() if owner != run_dir.resolve()]):
            for other in {run_dir.resolve(), *owners.values()}:  # whose submitter may have died as well
                adopt(other)
            status = read_status(run_dir)
            states = {cell.name: cell for cell in status.cells}
            done = [name for name in plan.wanted if states[name].state == "done"]
            live = [name for name in plan.wanted if states[name].live]
            missing = [name for name in plan.wanted if name not in {*done, *live}]
            queued: list[Job] = []
            if missing:
                profiles = {name: plan.cells[name].cluster for name in _once_each(run_dir, missing)}
                queued = queue_cells(run_dir, profiles, code)
            if missing or live or not report_is_current(run_dir):
                _submit_report(run_dir, profile, status, queued, code)
    return Submission(
        run_dir=run_dir,
        submitted=missing,
        done=done,
        live=live,
        elsewhere={name: owner.name for name, owner in owners.items() if owner != run_dir.resolve()},
        warnings=[*short_grace(run_dir, profile), *cluster_for(profile.executor).environment_notes(profile)]
        if missing
        else [],
    )


def _once_each(run_dir: Path, names: Sequence[str]) -> list[str]:
    """Without those that are the same cell as an earlier one: two rows may have the same settings."""
    return list({RunDir(run_dir).cell(name).resolve(): name for name in reversed(names)}.values())[::-1]


def short_grace(run_dir: Path, profile: ClusterConfig) -> list[str]:
    """A line if a stop of this run may take longer, by what was last measured, than the site gives after a signal."""
    if profile.grace_s is None:
        return []
    took = 0.0
    for cell in RunDir(run_dir).cell_dirs():
        meta = read_note(cell.checkpoint(cell.newest_step()) / "meta.json")  # empty where it is damaged
        seconds = meta.get("stop_s")
        took = max(took, seconds if isinstance(seconds, (int, float)) else 0.0)
    if took <= profile.grace_s:
        return []
    return [
        f"to stop may take {took:.1f} s (a step, a write under way and a save), and cluster.grace_s="
        f"{profile.grace_s:g}: a stop signal may lose the steps since the last save, so there will be more saves than "
        "train.save_every asks for. A longer grace time of the partition, more ranks or a faster runs_dir would help"
    ]


def adopt(run_dir: Path) -> None:
    """Find the jobs of a submission that was killed before it had noted them with their cells; under the lock."""
    run = RunDir(run_dir)
    for path in run.all_submitting():
        intent = SubmittingNote.read_whole(path)
        if intent:
            cluster = cluster_for(intent.executor)
            cluster.require_here([intent.cluster])
            for job_id in cluster.find(intent.job_name):
                number = int(job_id.rpartition("_")[2]) if "_" in job_id else 0
                folder = run.job_folder(job_id)
                job = Job(
                    id=job_id,
                    executor=cluster.executor,
                    cluster=intent.cluster,
                    name=intent.job_name,
                    log=str(run.log_in(folder, job_id, 0)),
                    owner=os.getuid(),
                )
                if any(folder.glob("*_submitted.pkl")):
                    write_all(dict(_job_notes(run, intent, number, job)))
                else:  # it was not told yet what to run
                    with contextlib.suppress(DispatchError):
                        cluster.cancel([job])
        path.unlink()


def queue_cells(run_dir: Path, profiles: Mapping[str, ClusterConfig], code: Path | None = None) -> list[Job]:
    """Submit cells of a written run: those of one profile together, in parts where the cluster limits submissions.

    profiles: cell → its profile. code: what jobs import bushpc from; None takes a snapshot of what runs now.
    Raises: DispatchError if the cluster refuses.
    """
    code = code or snapshot(run_dir)
    queued = []
    for profile, packs in packs_by_profile(profiles).items():
        cluster, after = cluster_for(profile.executor), None
        at_once = cluster.limits().jobs_at_once or len(packs)
        for i in range(0, len(packs), at_once):
            # One part after the other, where `cluster.parallel` cells may run at a time and not twice as many.
            jobs = _submit_packs(run_dir, packs[i : i + at_once], profile, after if profile.parallel else None, code)
            after = jobs[0].id
            queued += jobs
    return queued


def _submit_packs(
    run_dir: Path, packs: Sequence[Sequence[str]], profile: ClusterConfig, after: str | None, code: Path
) -> list[Job]:
    """Submit one job per pack of cells."""
    cluster = cluster_for(profile.executor)
    submission, packed = uuid.uuid4().hex, profile.cells_per_job > 1
    intent = SubmittingNote(
        job_name=f"{run_dir.name}-{submission[:8]}",
        cluster=cluster.here(),
        packs=[list(pack) for pack in packs],
        packed=packed,
        executor=cluster.executor,
        submitted=time.time(),
        code=code.name,
    )
    run = RunDir(run_dir)
    run.jobs.mkdir(exist_ok=True)
    if cluster.outlives_submitter:
        intent.write(run.submitting(submission))
    work = [CellJob(run_dir=str(run_dir), cells=tuple(pack), packed=packed, submission=submission) for pack in packs]
    request = JobRequest(
        name=intent.job_name,
        work=work,
        folder=RunDir(run_dir).jobs,
        profile=profile,
        setup=shell_lines(profile, run_dir, code),
        at_end=command_at_end(run_dir),
        after=[after] if after else [],
    )
    with _without_failures(run, [name for pack in packs for name in pack]):
        jobs = cluster.submit(request)
    notes = (note for number, job in enumerate(jobs) for note in _job_notes(run, intent, number, job))
    write_all(dict(notes))
    run.submitting(submission).unlink(missing_ok=True)
    return jobs


@contextlib.contextmanager
def _without_failures(run: RunDir, names: Sequence[str]) -> Iterator[None]:
    """Forget why cells failed, as they are tried again; not where the cluster refuses them."""
    paths = [run.cell(name).failed for name in names]
    texts = {path: path.read_text() for path in paths if path.exists()}
    for path in texts:
        path.unlink()
    try:
        yield
    except DispatchError:
        for path, text in texts.items():
            write_atomically(path, text)
        raise


def _job_notes(run: RunDir, intent: SubmittingNote, number: int, job: Job) -> Iterator[tuple[Path, str]]:
    """Of each cell of a pack its note's path, and which job works on it with the log of its task."""
    note = _note_of(job, intent.submitted)
    for task, name in enumerate(intent.packs[number]):
        log = job.log.removesuffix("_0_log.out") + f"_{task}_log.out" if task else job.log
        mine = msgspec.structs.replace(note, code=intent.code, packed=intent.packed, log=log)
        yield run.cell(name).job_note, mine.to_json()


def _note_of(job: Job, submitted: float) -> JobNote:
    note = JobNote(
        executor=job.executor,
        job_id=job.id,
        cluster=job.cluster,
        name=job.name,
        user=job.owner,
        submitted=submitted,
        log=job.log,
    )
    return msgspec.structs.replace(note, process_start=job.process_start, host=job.host) if job.host else note


def _submit_report(run_dir: Path, profile: ClusterConfig, before: RunStatus, queued: Sequence[Job], code: Path) -> None:
    """One report job after every live cell: held back by the cluster where it can, else waiting for the cells itself.

    before: the run's status before this submission. queued: new jobs, which a report job in the queue does not wait
    for.
    """
    cluster = cluster_for(profile.executor)
    path = RunDir(run_dir).report_job
    old = read_job(path)
    if old and old.job_id in job_states([job_of(old)]):
        if not cluster.waits or not queued:
            return  # one that waits by itself watches the cells' states, the new jobs' included
        with contextlib.suppress(DispatchError):
            cluster.cancel([job_of(old)], waiting_only=True)
    # A cluster can wait for its own jobs only, and a cell of `bushpc train` may be none.
    live = [cell.job_id for cell in before.cells if cell.live and cell.local != cluster.waits]
    after = list(dict.fromkeys((*live, *(job.id for job in queued))))
    small = report_profile(profile, 0 if cluster.waits else profile.time_min * max(1, len(after)))
    request = JobRequest(
        name=f"{run_dir.name}-report-{uuid.uuid4().hex[:8]}",
        work=[ReportJob(run_dir=str(run_dir), wait=not cluster.waits)],
        folder=RunDir(run_dir).jobs,
        profile=small,
        setup=shell_lines(small, run_dir, code),
        at_end=command_at_end(run_dir),
        after=after if cluster.waits else [],
        takes_place=False,
    )
    [job] = cluster.submit(request)
    _note_of(job, job.submitted).write(path)
