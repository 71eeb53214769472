"""A third backend, for tests: jobs wait in memory until they are told to run, and run in this process.

That it is this short is the point: a backend is one file, and the rest of bushpc needs no other.
"""

from __future__ import annotations

import typing as t
from collections.abc import Callable, Sequence

from bushpc.cluster.base import Cluster
from bushpc.cluster.records import Job, JobRequest, JobState
from bushpc.dispatch.job import CellJob, Task
from bushpc.errors import DispatchError


class InProcess(Cluster):
    """Its queue brings no job back. started, signals: what happened, in order."""

    executor = "in_process"
    waits = True

    def __init__(self) -> None:
        self.reset()

    def reset(self, *, most: int | None = None) -> None:
        """Forget everything. most: jobs that it accepts before it refuses one."""
        self.work: dict[str, Callable[[], t.Any]] = {}
        self.after: dict[str, list[str]] = {}
        self.running: str | None = None
        self.signals: list[tuple[str, str]] = []
        self.submissions: list[JobRequest] = []
        self.most, self.count = most, 0

    def submit(self, request: JobRequest) -> list[Job]:
        self.submissions.append(request)
        jobs = []
        for work in request.work:
            if self.most is not None and self.count >= self.most:
                raise DispatchError("the cluster refused the job: its queue is full")
            self.count += 1
            job_id = str(self.count)
            self.work[job_id], self.after[job_id] = work, list(request.after)
            jobs.append(Job(id=job_id, executor=self.executor, submitted=float(self.count)))
        return jobs

    def states(self, jobs: Sequence[Job]) -> dict[str, JobState]:
        return {
            job.id: JobState(waiting=job.id != self.running, word="RUNNING" if job.id == self.running else "PENDING")
            for job in jobs
            if job.id in self.work
        }

    def signal(self, job: Job, name: str) -> None:
        self.signals.append((job.id, name))

    def cancel(self, jobs: Sequence[Job], *, now: bool = False, waiting_only: bool = False) -> None:
        for job in jobs:
            if job.id == self.running:
                if not waiting_only:
                    self.signal(job, "TERM")
            else:
                self.work.pop(job.id, None)

    def run_next(self) -> BaseException | None:
        """Run the oldest job whose predecessors have ended; returns what ended it, None if it ended well."""
        job_id = next(job_id for job_id in self.work if not set(self.after[job_id]) & self.work.keys())
        self.running, work = job_id, self.work[job_id]
        try:
            if isinstance(work, CellJob):
                work.run(lambda: Task(job_id))
            else:
                work()
        except (Exception, SystemExit) as error:
            return error
        finally:
            self.running = None
            del self.work[job_id]
        return None
