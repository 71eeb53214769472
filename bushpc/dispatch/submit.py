"""Cells → jobs: one submission for all that is missing, and a report job that follows it.

plan ─write_run→ run folder ─what is missing→ packs per profile ─lanes.choose→ jobs, in parts that the site accepts
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import typing as t
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from bushpc.cluster.base import TooManyJobs, cluster_for, job_states
from bushpc.cluster.profile import packs_by_profile, report_profile, shell_lines
from bushpc.cluster.records import Job, JobRequest
from bushpc.config import ClusterConfig
from bushpc.config.gpu_memory import too_large
from bushpc.dispatch.chains import depth
from bushpc.dispatch.job import ReportJob
from bushpc.dispatch.jobs import adopt, note_of, parts_of, queue_cells
from bushpc.dispatch.lanes import Way, choose
from bushpc.dispatch.plan import Plan
from bushpc.dispatch.requeue import command_at_end
from bushpc.dispatch.run_folder import alone_in, done_elsewhere, owner_of, write_run
from bushpc.dispatch.status import RunStatus, job_of, read_job, read_status, report_is_current
from bushpc.errors import ConfigError, DispatchError
from bushpc.runs.goodput import read_note
from bushpc.runs.layout import META_FILE, CellDir, RunDir
from bushpc.runs.records import LaneNote


class Submission(t.NamedTuple):
    """What one call of `submit` did: names of the cells, by what happened to them, and what to look out for.

    elsewhere: cell → the run that it belongs to, where that is another one: it is trained once for both. said: how the
    cells became jobs, where that is not one for each.
    """

    run_dir: Path
    submitted: list[str]
    done: list[str]
    live: list[str]
    elsewhere: dict[str, str]
    warnings: list[str]
    said: list[str]


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
            said: list[str] = []
            warnings = list(plan.warnings)
            queued: list[Job] = []
            left: set[str] = set()
            if missing:
                profiles = {name: plan.cells[name].cluster for name in _once_each(run_dir, missing)}
                way = _choose_way(profiles, profile, status)
                left = {name for name in missing if plan.cells[name].cluster not in way.jobs}
                said += way.said
                _require_taken(run_dir, profiles, profile, code, way)
                queued = _queue_in_order(run_dir, plan, profiles, code, way, said)
                warnings += [*_held(queued), *short_grace(run_dir, profile)]
                warnings += _memory(plan, missing)
                for each in dict.fromkeys(profiles.values()):
                    warnings += cluster_for(each.executor).concerns(each)
                warnings += cluster_for(profile.executor).environment_notes(profile)
            if missing or live or not report_is_current(run_dir):
                warnings += _see_to_report(run_dir, profile, status, queued, code)
    return Submission(
        run_dir=run_dir,
        submitted=[name for name in missing if name not in left],
        done=done,
        live=live,
        elsewhere={name: owner.name for name, owner in owners.items() if owner != run_dir.resolve()},
        warnings=warnings,
        said=said,
    )


def _queue_in_order(
    run_dir: Path,
    plan: Plan,
    profiles: Mapping[str, ClusterConfig],
    code: Path,
    way: Way,
    said: list[str],
) -> list[Job]:
    """Submit cells, then those that follow them: a cell's job waits until those of its source have ended.

    Where jobs work on one cell after the other, all are submitted at once, sources first.
    """
    depths = {name: depth(plan.cells, name) for name in profiles}
    if way.lanes or not any(depths.values()):
        in_order = sorted(profiles, key=depths.__getitem__)
        return queue_cells(run_dir, {name: profiles[name] for name in in_order}, code, way, said)
    queued: list[Job] = []
    for level in sorted(set(depths.values())):
        of_level = {name: profile for name, profile in profiles.items() if depths[name] == level}
        jobs = {profile: len(packs) for profile, packs in packs_by_profile(of_level).items()}
        sources = {str(plan.cells[name].source) for name in of_level}
        after = [cell.job_id for cell in read_status(run_dir).cells if cell.name in sources and cell.live]
        part = dataclasses.replace(way, jobs={profile: count for profile, count in jobs.items() if profile in way.jobs})
        queued += queue_cells(run_dir, of_level, code, part, said, after=list(dict.fromkeys(after)))
    return queued


def _memory(plan: Plan, names: Sequence[str]) -> list[str]:
    """Cells whose training step probably does not fit their GPU; cells with the same problem share a line."""
    gpus: dict[ClusterConfig, list[str]] = {}
    found: dict[str, list[str]] = {}
    for name in names:
        cell, profile = plan.cells[name], plan.cells[name].cluster
        if profile.gpu_count and profile not in gpus:
            gpus[profile] = []
            with contextlib.suppress(DispatchError):  # the jobs are in the queue by now
                gpus[profile] = cluster_for(profile.executor).gpu_names(profile)
        if problem := too_large(cell, gpus.get(profile, [])):
            found.setdefault(problem, []).append(name)
    return [f"{', '.join(cells)}: {problem} (an estimate, made without a GPU)" for problem, cells in found.items()]


def requests_of(plan: Plan, code: Path) -> tuple[list[JobRequest], Sequence[str]]:
    """What `submit` would ask the cluster for at present, and what it would say about that. Writes nothing.

    code: what jobs would import bushpc from. Raises: as `submit`.
    """
    run_dir, profile = plan.first.run_dir, plan.first.cluster
    status = read_status(run_dir) if RunDir(run_dir).file.exists() else None
    settled = {cell.name for cell in status.cells if cell.live or cell.state == "done"} if status else set()
    wanted = [name for name in plan.wanted if name not in settled]
    if plan.kind == "grid":  # rows with the same settings are trained once, as those of runs beside this one
        done = done_elsewhere(plan)
        once = {plan.cells[name].hash: name for name in reversed(wanted) if name not in done}
        wanted = list(once.values())[::-1]
    profiles = {name: plan.cells[name].cluster for name in wanted}
    if not profiles:
        return [], []
    way = _choose_way(profiles, profile, status)
    requests = [part.request for part in parts_of(run_dir, profiles, code, way)]
    # Names stand for the numbers that jobs have once they are submitted.
    names = [request.name for request in requests]
    report = [report_request(run_dir, profile, names, code)] if way.report == "job" else []
    return [*requests, *report], way.said


def _once_each(run_dir: Path, names: Sequence[str]) -> list[str]:
    """Without those that are the same cell as an earlier one: two rows may have the same settings."""
    return list({RunDir(run_dir).cell(name).resolve(): name for name in reversed(names)}.values())[::-1]


def short_grace(run_dir: Path, profile: ClusterConfig) -> list[str]:
    """A line if a stop of this run may take longer, by what was last measured, than the site gives after a signal."""
    if profile.grace_s is None:
        return []
    took = 0.0
    for cell in RunDir(run_dir).cell_dirs():
        meta = read_note(cell.checkpoint(cell.newest_step()) / META_FILE)  # empty where it is damaged
        seconds = meta.get("stop_s")
        took = max(took, seconds if isinstance(seconds, (int, float)) else 0.0)
    if took <= profile.grace_s:
        return []
    return [
        f"to stop may take {took:.1f} s (a step, a write under way and a save), and cluster.grace_s="
        f"{profile.grace_s:g}: a stop signal may lose the steps since the last save, so there will be more saves than "
        "train.save_every asks for. A longer grace time of the partition, more ranks or a faster runs_dir would help"
    ]


def _choose_way(profiles: Mapping[str, ClusterConfig], first: ClusterConfig, status: RunStatus | None) -> Way:
    """How missing cells become jobs: asked of the cluster, which knows what it allows. profiles: of the cells.

    Raises: ConfigError where it would never start such a job; DispatchError where it takes no job now.
    """
    packs = packs_by_profile(profiles)
    if not all(cluster_for(profile.executor).takes_turns for profile in packs):
        report = "login" if first.report == "login" else "job"
        return Way(jobs={profile: len(some) for profile, some in packs.items()}, report=report)
    limits = [cluster_for(profile.executor).limits(profile) for profile in packs]
    if never := next((each.never for each in limits if each.never), None):
        raise ConfigError(f"nothing was submitted, as such a job would never start: {never}")
    tightest = min(limits, key=lambda each: math.inf if each.room is None else each.room)
    live = status.queued if status else 0
    report, small = first.report, report_profile(first)
    elsewhere = (small.account, small.qos, small.partition) != (first.account, first.qos, first.partition)
    if report == "job" and elsewhere and cluster_for(first.executor).limits(small).room == 0:
        report = "last_cell"
    return choose(packs, tightest, report=report, elsewhere=elsewhere, live=live, window=first.submit_window)


def _require_taken(
    run_dir: Path, profiles: Mapping[str, ClusterConfig], first: ClusterConfig, code: Path, way: Way
) -> None:
    """Ask the cluster about one job of each kind before any is submitted: a run without its report is half a run.

    Raises: DispatchError with the site's own words.
    """
    kinds = {profile: name for name, profile in profiles.items() if profile in way.jobs}
    requests = {
        f"the job of {name}": next(iter(parts_of(run_dir, {name: profile}, code, Way(jobs={profile: 1})))).request
        for profile, name in kinds.items()
    }
    if way.report == "job":
        requests["the job that writes the report"] = report_request(run_dir, first, [], code)
    for what, request in requests.items():
        if said := cluster_for(request.profile.executor).refusal(request):
            advice = ""
            if request.profile not in kinds:
                advice = (
                    ". Say in cluster.cpu_jobs (partition, account, qos, constraint) what jobs without a GPU need, or "
                    "set cluster.report=last_cell"
                )
            raise DispatchError(f"nothing was submitted, as the site refuses {what}: {said}{advice}")


def _held(queued: Sequence[Job]) -> list[str]:
    """Why new jobs will not start by themselves, as far as the cluster knows at once; one line for each reason."""
    with contextlib.suppress(DispatchError):
        held = [state.held for state in job_states(queued).values() if state.held]
        reasons: dict[str, str] = {}
        for line in held:
            reasons.setdefault(re.sub(r"\d+", "", line), line)
        return list(reasons.values())
    return []


def _see_to_report(
    run_dir: Path, profile: ClusterConfig, before: RunStatus, queued: Sequence[Job], code: Path
) -> list[str]:
    """Have the report written when the cells have ended, or now; returns what the user has to do for it."""
    run = RunDir(run_dir)
    if _last_cell_reports(run):
        return []
    later = f"the report is written by `bushpc report {run_dir}` when the cells have ended"
    live = queued or any(cell.live for cell in before.cells)
    # On one machine no cell knows that it is the last: the report job, which waits for them, costs nothing there.
    if profile.report == "login" or (profile.report == "last_cell" and cluster_for(profile.executor).takes_turns):
        if live:
            return [f"cluster.report={profile.report}: {later}"]
        from bushpc.report.page import build_report

        build_report(run_dir)
        return []
    try:
        _submit_report(run_dir, profile, before, queued, code)
    except TooManyJobs as error:
        return [f"there is no report job, {error}. Until then {later}" if live else f"{error}; {later}"]
    return []


def _last_cell_reports(run: RunDir) -> bool:
    """Whether a job that works on cells writes the report after them."""
    live = [CellDir(cell.folder) for cell in read_status(run.path).cells if cell.live]
    lanes = {note.lane for cell in live if (note := read_job(cell.job_note)) and note.lane}
    return any(lane.report for path in lanes if (lane := LaneNote.read_whole(Path(path))))


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
    [job] = cluster.submit(report_request(run_dir, profile, after, code))
    note_of(job, job.submitted).write(path)


def report_request(run_dir: Path, profile: ClusterConfig, after: Sequence[str], code: Path) -> JobRequest:
    """The job that writes the report. after: ids of the jobs that it follows."""
    cluster = cluster_for(profile.executor)
    small = report_profile(profile, 0 if cluster.waits else profile.time_min * max(1, len(after)))
    return JobRequest(
        name=f"{run_dir.name}-report-{uuid.uuid4().hex[:8]}",
        work=[ReportJob(run_dir=str(run_dir), wait=not cluster.waits)],
        folder=RunDir(run_dir).jobs,
        profile=small,
        setup=shell_lines(small, run_dir, code),
        at_end=command_at_end(run_dir),
        after=after if cluster.waits else [],
        takes_place=False,
    )
