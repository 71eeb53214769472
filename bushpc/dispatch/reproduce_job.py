"""What goes on with a paper's steps when the jobs of those before have ended: the same command, as a small job.

steps whose jobs are queued ─follow→ a job after them: `bushpc reproduce PAPER` ─→ the next steps, at last the page
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence

from bushpc.cluster.base import cluster_for, job_states, this_job
from bushpc.config import compose
from bushpc.dispatch.cpu_job import request_of
from bushpc.dispatch.jobs import note_of
from bushpc.dispatch.reproduce import Found, Paper
from bushpc.dispatch.status import job_of, read_job, read_status
from bushpc.errors import DispatchError
from bushpc.runs.layout import RunDir

POLL_S = 2.0


def follow(paper: Paper, found: Sequence[Found], *, partly: bool) -> str:
    """Submit the command once more, after the jobs of all steps that are live. Returns a sentence about it."""
    live = [each for each in found if each.state == "live"]
    again = "run the same command again when they have ended"
    if not live:
        return "no step's jobs are queued or running: look at the runs above, then run the same command again"
    profile = compose([word for word in paper.words if word.startswith("cluster")]).cluster
    cluster = cluster_for(profile.executor)
    folder = paper.runs_dir / f"reproduce-{paper.name}"
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "job.json"
    old, ours = read_job(note), this_job()
    if old and (ours is None or ours.queue_id != old.job_id) and old.job_id in job_states([job_of(old)]):
        return f"job {old.job_id} goes on when they have ended"
    words = ["reproduce", paper.given, *paper.words, *(["--partly"] if partly else [])]
    if not cluster.waits:
        words.append("--wait")
    minutes = profile.report_time_min + (0 if cluster.waits else profile.time_min * sum(each.cells for each in live))
    request = request_of(words, profile, paper.runs_dir, cores=1, minutes=minutes)
    after = _job_ids(paper, live) if cluster.waits else []
    try:
        [job] = cluster.submit(dataclasses.replace(request, folder=folder / "jobs", after=after))
    except DispatchError as error:
        return f"{error}; {again}"
    note_of(job, job.submitted).write(note)
    return f"job {job.id} goes on when they have ended (log: {job.log})"


def wait_for(paper: Paper) -> None:
    """Return when no step has a live cell or report job."""
    while any(_is_live(paper, step.name) for step in paper.steps):
        time.sleep(POLL_S)


def _is_live(paper: Paper, step: str) -> bool:
    run = RunDir(paper.run_dir(step))
    if not run.file.exists():
        return False
    status = read_status(run.path)
    return status.report_live or any(cell.live for cell in status.cells)


def _job_ids(paper: Paper, live: Sequence[Found]) -> list[str]:
    """Of the cells and reports of live steps."""
    found: dict[str, None] = {}
    for each in live:
        run = RunDir(paper.run_dir(each.step.name))
        with contextlib.suppress(DispatchError):
            found |= {cell.job_id: None for cell in read_status(run.path).cells if cell.live}
        report = read_job(run.report_job)
        if report and report.job_id in job_states([job_of(report)]):
            found[report.job_id] = None
    return list(found)
