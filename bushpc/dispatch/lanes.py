"""Packs → jobs: a job for each, or, where a site takes fewer, jobs that work on one pack after the other ("lanes").

    packs, what the site allows, cluster.submit_window ─choose→ how many jobs, who writes the report ─deal→ lanes

What a lane does is in turns.py.
"""

from __future__ import annotations

import typing as t
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bushpc.errors import DispatchError

if t.TYPE_CHECKING:
    from bushpc.cluster.records import Limits
    from bushpc.config import ClusterConfig

Pack = Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Way:
    """How the packs of a submission become jobs.

    jobs: per profile; fewer than packs where they are lanes; a profile without any has to wait for another submission.
    lanes: whether jobs ask for their packs. report: who writes the report: `job`, `last_cell` or `login`. at_once: jobs
    of one submission to the cluster; None without a limit. said: what to tell about it.
    """

    jobs: Mapping[ClusterConfig, int]
    lanes: bool = False
    report: str = "job"
    at_once: int | None = None
    said: Sequence[str] = ()

    @property
    def lanes_report(self) -> str:
        """Who writes the report where the site has no room for a job that does."""
        return "last_cell" if self.report == "job" else self.report


def choose(
    packs: Mapping[ClusterConfig, Sequence[Pack]],
    limits: Limits,
    *,
    report: str,
    window: int | None,
    live: int = 0,
    elsewhere: bool = False,
) -> Way:
    """A job per pack where the site and `cluster.submit_window` have room for all of them and the report job; else
    lanes.

    live: jobs of this run in the queue already, which the window counts. elsewhere: the limits do not count the report
    job. Raises: DispatchError where there is no room.
    """
    count = sum(map(len, packs.values()))
    room, why = limits.room, limits.why
    if window is not None and (room is None or window - live < room):
        room, why = max(0, window - live), f"cluster.submit_window={window}, {live} of them taken"
        elsewhere = False
    at_once, few = limits.jobs_at_once, []
    if limits.running is not None and limits.running < min(count, count if room is None else room):
        few = [f"at most {limits.running} of them run at a time ({limits.why_running})"]
    if room is None or count + (report == "job" and not elsewhere) <= room:
        jobs = {profile: len(some) for profile, some in packs.items()}
        return Way(jobs=jobs, lanes=report == "last_cell", report=report, at_once=at_once, said=few)
    if room == 0:
        raise DispatchError(
            f"no room for a job: {why}. Nothing was submitted; run the same command again when some have ended"
        )
    jobs = share_out(room, {profile: len(some) for profile, some in packs.items()})
    cells = {profile: sum(map(len, packs[profile])) for profile in packs}
    taken = sum(cells[profile] for profile in jobs)
    said = [f"{counted(taken, 'cell')} in {counted(sum(jobs.values()), 'job')}: {why}", *few]
    if len(jobs) < len(packs):
        said.append(
            f"{counted(sum(cells.values()) - taken, 'cell')} need jobs with other resources, for which there is no "
            "room now: run the same command again when some jobs have ended"
        )
    return Way(jobs=jobs, lanes=True, report="last_cell" if report == "job" else report, at_once=at_once, said=said)


def share_out(room: int, packs: Mapping[ClusterConfig, int]) -> dict[ClusterConfig, int]:
    """Jobs for each profile, at most `room` together, so that the longest lane is as short as it can be.

    Those that come first get one where there is no room for all profiles.
    """
    jobs = dict.fromkeys(list(packs)[:room], 1)
    for _ in range(room - len(jobs)):
        longest = max(jobs, key=lambda profile: packs[profile] / jobs[profile])
        if jobs[longest] == packs[longest]:
            break
        jobs[longest] += 1
    return jobs


def deal(packs: Sequence[Pack], jobs: int) -> list[list[Pack]]:
    """Packs over jobs, one each in turn, so that early cells are early.

    >>> deal([["a"], ["b"], ["c"], ["d"], ["e"]], 2)
    [[['a'], ['c'], ['e']], [['b'], ['d']]]
    """
    return [list(packs[number::jobs]) for number in range(min(jobs, len(packs)))]


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
