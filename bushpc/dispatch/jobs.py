"""Packs of cells → jobs that are in the queue, and notes of which job works on which cell.

    profile and packs ─part_of→ what one submission is (a Part: the request, and what is noted) ─queue_cells→ jobs

Where jobs may outlive a command that was killed before it knew their ids, they are written down twice: before the
submission as jobs/submitting-<id>.json, and after it in each cell's job.json. A command that is killed between the two
leaves the first, and the next command finds the jobs by it.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bushpc.cluster.base import TooManyJobs, cluster_for
from bushpc.cluster.profile import packs_by_profile, shell_lines, stop_lead_s
from bushpc.cluster.records import Job, JobRequest
from bushpc.config import ClusterConfig
from bushpc.dispatch.job import CellJob
from bushpc.dispatch.lanes import Pack, Way, counted, deal
from bushpc.dispatch.requeue import command_at_end
from bushpc.dispatch.snapshot import take_snapshot
from bushpc.dispatch.turns import command_for_turns, lane_name
from bushpc.errors import DispatchError
from bushpc.files import write_all, write_atomically
from bushpc.runs.layout import RunDir
from bushpc.runs.records import JobNote, LaneNote, SubmittingNote


@dataclass(frozen=True, kw_only=True)
class Part:
    """One submission to the cluster: one job for each of its lists of packs. Making it writes nothing.

    lanes: by its name, what each job is to work on, where that is more than a pack.
    """

    submission: str
    request: JobRequest
    intent: SubmittingNote
    lanes: Mapping[str, LaneNote]


def parts_of(run_dir: Path, profiles: Mapping[str, ClusterConfig], code: Path, way: Way | None) -> Iterator[Part]:
    """All submissions that cells come to where the cluster refuses none, as `queue_cells` would make them."""
    for profile, packs in packs_by_profile(profiles).items():
        if way is None or profile in way.jobs:
            todo, at_once = _jobs_of(packs, profile, way)
            for i in range(0, len(todo), at_once):
                yield part_of(run_dir, todo[i : i + at_once], profile, code, way)


def queue_cells(
    run_dir: Path,
    profiles: Mapping[str, ClusterConfig],
    code: Path | None = None,
    way: Way | None = None,
    said: list[str] | None = None,
    after: Sequence[str] = (),
) -> list[Job]:
    """Submit cells of a written run: those of one profile together, in parts where the cluster limits submissions.

    profiles: cell → its profile. code: what jobs import bushpc from; None takes a snapshot of what runs now. way: None
    for a job per pack. said: takes what is to be told. after: ids of jobs that have to end
    first. Raises: DispatchError if the cluster refuses.
    """
    code = code or take_snapshot(run_dir)
    queued: list[Job] = []
    for profile, packs in packs_by_profile(profiles).items():
        if way is None or profile in way.jobs:
            try:
                queued += _queue_packs(run_dir, packs, profile, code, way, [] if said is None else said, after)
            except TooManyJobs as error:
                before = f"{counted(len(queued), 'job')} of this command, which run" if queued else "none"
                raise TooManyJobs(f"{error}. Accepted until then: {before}") from error
    return queued


def _queue_packs(
    run_dir: Path,
    packs: Sequence[Pack],
    profile: ClusterConfig,
    code: Path,
    way: Way | None,
    said: list[str],
    first: Sequence[str],
) -> list[Job]:
    """Submit packs of one profile. What the site refuses as too many jobs is tried again as half as many lanes."""
    cluster, after, queued = cluster_for(profile.executor), list(first), []
    todo, at_once = _jobs_of(packs, profile, way)
    while todo:
        part = part_of(run_dir, todo[:at_once], profile, code, way, after)
        try:
            jobs = _send(RunDir(run_dir), part)
        except TooManyJobs:
            if len(todo) == 1 or not cluster.takes_turns:
                raise
            refused, left = len(todo[:at_once]), [pack for lane in todo for pack in lane]
            todo = deal(left, max(1, refused // 2))
            at_once = min(at_once, len(todo))
            way = Way(jobs={profile: len(todo)}, lanes=True, report=way.lanes_report if way else "last_cell")
            said.append(
                f"Slurm took no {refused} jobs: {counted(sum(map(len, left)), 'cell')} in {counted(len(todo), 'job')}"
            )
            continue
        # One part after the other, where `cluster.parallel` cells may run at a time and not twice as many.
        todo = todo[len(jobs) :]
        after = [*first, jobs[0].id] if profile.parallel else list(first)
        queued += jobs
    return queued


def _jobs_of(packs: Sequence[Pack], profile: ClusterConfig, way: Way | None) -> tuple[list[list[Pack]], int]:
    """The packs of each job, and how many jobs one submission may have."""
    jobs = deal(packs, way.jobs[profile] if way and way.lanes else len(packs))
    return jobs, (way and way.at_once) or len(jobs)


def part_of(
    run_dir: Path,
    jobs: Sequence[Sequence[Pack]],
    profile: ClusterConfig,
    code: Path,
    way: Way | None,
    after: Sequence[str] = (),
) -> Part:
    """The submission of one job for each list of packs. after: jobs that have to end first."""
    run, cluster, lanes = RunDir(run_dir), cluster_for(profile.executor), way is not None and way.lanes
    submission, packed = uuid.uuid4().hex, profile.cells_per_job > 1
    intent = SubmittingNote(
        job_name=f"{run_dir.name}-{submission[:8]}",
        packs=[[name for pack in packs for name in pack] for packs in jobs],
        packed=packed,
        executor=cluster.executor,
        submitted=time.time(),
        code=code.name,
        lanes=lanes,
    )
    work = [
        CellJob(
            run_dir=str(run_dir),
            packs=tuple(map(tuple, packs)),
            packed=packed,
            submission=submission,
            submitted=intent.submitted,
            gpus=profile.gpu_count,
        )
        for packs in jobs
    ]
    request = JobRequest(
        name=intent.job_name,
        work=work,
        folder=run.jobs,
        profile=profile,
        setup=shell_lines(profile, run_dir, code),
        at_end=() if lanes else command_at_end(run_dir),
        turns=command_for_turns(run_dir, submission) if lanes else (),
        after=after,
    )
    notes = {
        lane_name(submission, number): LaneNote(
            packs=[list(pack) for pack in packs],
            submitted=intent.submitted,
            lead_s=stop_lead_s(profile),
            report=way is not None and way.report == "last_cell",
        )
        for number, packs in enumerate(jobs if lanes else ())
    }
    return Part(submission=submission, request=request, intent=intent, lanes=notes)


def _send(run: RunDir, part: Part) -> list[Job]:
    """Submit it, with notes of it before and after."""
    cluster = cluster_for(part.intent.executor)
    intent = msgspec.structs.replace(part.intent, cluster=cluster.here())
    run.jobs.mkdir(exist_ok=True)
    written = {run.lane(name): note.to_json() for name, note in part.lanes.items()}
    write_all(written)
    if cluster.outlives_submitter:
        intent.write(run.submitting(part.submission))
    try:
        with _without_failures(run, [name for names in intent.packs for name in names]):
            jobs = cluster.submit(part.request)
    except DispatchError:
        for path in (*written, run.submitting(part.submission)):
            path.unlink(missing_ok=True)
        raise
    noted = (each for number, job in enumerate(jobs) for each in _job_notes(run, part.submission, intent, number, job))
    write_all(dict(noted))
    run.submitting(part.submission).unlink(missing_ok=True)
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


def adopt(run_dir: Path) -> None:
    """Find the jobs of a submission that was killed before it had noted them with their cells; under the lock."""
    run = RunDir(run_dir)
    for path in run.all_submitting():
        intent = SubmittingNote.read_whole(path)
        submission = path.stem.removeprefix("submitting-")
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
                    write_all(dict(_job_notes(run, submission, intent, number, job)))
                else:  # it was not told yet what to run
                    with contextlib.suppress(DispatchError):
                        cluster.cancel([job])
        path.unlink()


def _job_notes(
    run: RunDir, submission: str, intent: SubmittingNote, number: int, job: Job
) -> Iterator[tuple[Path, str]]:
    """Of each cell of a job its note's path, and which job works on it with the log of its task."""
    path = run.lane(lane_name(submission, number)) if intent.lanes else None
    lane = LaneNote.read(path) if path else None
    note = msgspec.structs.replace(
        note_of(job, intent.submitted), code=intent.code, packed=intent.packed, lane=str(path) if path else None
    )
    for turn, pack in enumerate(lane.packs if lane else [intent.packs[number]]):
        for task, cell in enumerate(pack if intent.packed else pack[:1]):
            log = job.log.removesuffix("_0_log.out") + f"_{task}_log.out" if task else job.log
            yield run.cell(cell).job_note, msgspec.structs.replace(note, log=log, turn=turn).to_json()


def note_of(job: Job, submitted: float) -> JobNote:
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
