"""The rows of the second matrix: what happens, on a real Slurm, while cells run. Each returns what was seen."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tools.baddays.day import Day, Row, full, mount, read_only, unmount
from tools.preemption_matrix import CaseError, attempt_number

# How long whatever is away stays away, seconds: longer than the first pause before a command asks again.
AWAY_S = 8.0
HANG_S = 20.0
SHORTER_S = 5.0
FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"
# Python ends at ALRM, HUP, USR1 and the real-time ones unless a program handles them; PIPE it ignores itself.
SIGNALS = ("HUP", "INT", "QUIT", "USR1", "USR2", "TERM", "KILL", "ALRM", "PIPE", "CHLD", "CONT", "WINCH", "STOP")
TARGETS = ("step", "batch", "all")


# --- Slurm's own daemons -------------------------------------------------------------------------------------------


def controller_away_while_training(day: Day) -> str:
    with day.frozen(), day.site.without("slurmctld"):
        day.status("heartbeats")
        day.thaw()
        step = max(day._steps(), default=0)
        day.until(lambda: max(day._steps(), default=0) > step or day.ended(), "steps without slurmctld")
    return "Steps went on; status showed the heartbeats and said that the queue did not answer."


def controller_away_at_requeue(day: Day) -> str:
    before = attempt_number(day.cell_dir)
    with day.frozen():
        day.cluster.ask("scancel", "--signal=USR2", day.job_id)
        with day.site.without("slurmctld"):
            day.thaw()
            time.sleep(AWAY_S)
    day.until(lambda: attempt_number(day.cell_dir) > before or day.ended(), "the next start")
    return "The batch shell asked until slurmctld was back, and the job came back by itself."


def controller_away_at_submission(day: Day) -> str:
    submitting = InThread(day.submit)
    with day.site.without("slurmctld"):
        submitting.start()
        time.sleep(AWAY_S)
    submitting.join()
    jobs = [job for job in day.cluster.queue() if job.partition("_")[0] == day.job_id.partition("_")[0]]
    if len(day.cluster.queue()) - len(jobs) > 1:  # the report's job
        day.faults.append(f"more jobs than cells: {day.cluster.queue()}")
    day._cancel_report()
    return "The submission waited, and each cell had one job."


def controller_away_at_cancel_and_resume(day: Day) -> str:
    with day.frozen():
        day.thaw()
        with day.site.without("slurmctld"):
            cancelling = day.start("cancel", day.run_dir)
            time.sleep(AWAY_S)
        day.succeed(cancelling.wait_for())
    day.until(lambda: not day.in_queue(), "the job to end")
    with day.site.without("slurmctld"):
        resuming = day.start("resume", day.run_dir)
        time.sleep(AWAY_S)
    day.succeed(resuming.wait_for())
    day.read_jobs()
    day._cancel_report()
    return "Both commands waited for slurmctld and did what they were asked for."


def accounting_away(day: Day) -> str:
    with day.frozen(), day.site.without("slurmdbd"):
        day.status("running")
        day.cluster.ask("scancel", "--signal=USR2", day.job_id)
        day.thaw()
        day.until(lambda: day.in_queue("PENDING") or attempt_number(day.cell_dir) > 0, "the job to go back")
        day.status()
    return "It was stopped, requeued and shown without slurmdbd."


# --- the shared file system ----------------------------------------------------------------------------------------


def broken_disk(how: Callable[[Path], contextlib.AbstractContextManager[None]], when: str) -> Callable[[Day], str]:
    """when: save, requeue or status."""

    def happens(day: Day) -> str:
        with day.frozen(), how(day.disk):
            if when == "requeue":
                day.cluster.ask("scancel", "--signal=USR2", day.job_id)
            if when == "status":
                day.status("1 cell")
            else:
                day.thaw()
                day.until_gone_or(30.0)
        return f"Back {'after the command' if when == 'status' else 'when the job had ended, or after 30 s'}."

    return happens


def stale_mount(day: Day) -> str:
    """The run lies on a bind mount, which goes and comes back."""
    real = day.disk.with_name(day.disk.name + ".real")
    with day.frozen():
        unmount(day.disk)
        day.thaw()
        day.until_gone_or(AWAY_S, files=False)
        mount("--bind", real, day.disk)
    return f"The mount was gone for {AWAY_S:.0f} s, or until the job ended."


def renamed(day: Day) -> str:
    with day.frozen():
        day.move(day.run_dir.with_name(day.run_dir.name + "-moved"))
        day.thaw()
        day.until(lambda: not day.in_queue("RUNNING"), "the job to end")
        day.until(lambda: not day.in_queue("COMPLETING"), "the job to end")
    return "It went on in the folder's new place."


# --- what an administrator and a user do to jobs -------------------------------------------------------------------


def suspended(day: Day) -> str:
    with day.frozen():
        day.cluster.ask("scontrol", "suspend", day.job_id)
        day.thaw()
        time.sleep(SHORTER_S)
        day.cluster.ask("scontrol", "resume", day.job_id)
    return f"Suspended for {SHORTER_S:.0f} s."


def limit_raised(day: Day) -> str:
    with day.frozen():
        day.cluster.ask("scontrol", "update", f"JobId={day.job_id}", "TimeLimit=60")
    return "TimeLimit 30 min → 60 min."


def limit_lowered(day: Day) -> str:
    with day.frozen():
        day.cluster.ask("scontrol", "update", f"JobId={day.job_id}", "TimeLimit=1")
        day.thaw()
        day.until(lambda: day.ended() or not day.in_queue("RUNNING"), "the limit to be heeded")
        with contextlib.suppress(CaseError):  # it may be over
            day.cluster.ask("scontrol", "update", f"JobId={day.job_id}", "TimeLimit=30")
    return "TimeLimit 30 min → 1 min, and 30 min again when it had stopped."


def held(day: Day) -> str:
    with day.frozen():
        day.cluster.ask("scontrol", "requeuehold", day.job_id)
        day.thaw()
        day.until(lambda: day.in_queue("PENDING"), "the job to be held")
        said = day.status("held")
        day.cluster.ask("scontrol", "release", day.job_id)
    return f"Status: {day.line(said, 'queued:')}"


def drained(day: Day) -> str:
    with day.frozen():
        day.cluster.ask("scontrol", "update", "NodeName=n1,n2", "State=DRAIN", "Reason=repair")
        return _waits(day, "update", "NodeName=n1,n2", "State=RESUME")


def reserved(day: Day) -> str:
    with day.frozen():
        words = ("StartTime=now", "Duration=10", "Users=root", "Flags=MAINT,IGNORE_JOBS", "Nodes=ALL")
        day.cluster.ask("scontrol", "create", "reservation", "ReservationName=repair", *words)
        return _waits(day, "delete", "ReservationName=repair")


def _waits(day: Day, *lifted: str) -> str:
    """The job is stopped and has nowhere to go on, until `scontrol` is told `lifted`."""
    try:
        day.cluster.ask("scancel", "--signal=USR2", day.job_id)
        day.thaw()
        day.until(lambda: day.in_queue("PENDING"), "the job to wait")
        time.sleep(SHORTER_S)
        said = day.status("queued")
    finally:
        day.cluster.ask("scontrol", *lifted)
    return f"Status: {day.line(said, 'queued:')}"


def throttled(day: Day) -> str:
    array = day.job_id.partition("_")[0]
    with day.frozen():
        day.cluster.ask("scontrol", "update", f"JobId={array}", "ArrayTaskThrottle=1")
        day.cluster.ask("scancel", "--signal=USR2", day.job_id)
    return "The array's throttle became 1 while two tasks ran, one of which was stopped."


def signalled(name: str, target: str) -> Callable[[Day], str]:
    def happens(day: Day) -> str:
        to = {"step": [f"{day.job_id}.0"], "batch": ["--batch", day.job_id], "all": ["--full", day.job_id]}[target]
        with day.frozen():
            day.cluster.ask("scancel", f"--signal={name}", *to)
            day.thaw()
            if name == "STOP":
                time.sleep(SHORTER_S)
                day.cluster.ask("scancel", "--signal=CONT", *to)
        return f"SIG{name} to {target}."

    return happens


# --- people, clocks and hung ranks ---------------------------------------------------------------------------------


def two_members(day: Day) -> str:
    with day.frozen():
        day.thaw()
        day.succeed(day.bushpc("cancel", day.run_dir))
    day.until(lambda: not day.in_queue(), "the job to end")
    asked = [day.start("resume", day.run_dir, USER=name, LOGNAME=name) for name in ("ada", "grace")]
    ends = [each.wait_for() for each in asked]
    later = [end for end in ends if "another command is submitting" in end.stdout and end.returncode == 2]
    for end in ends:
        if end not in later:
            day.succeed(end)
    day.read_jobs()
    day._cancel_report()
    cells = [job for job, (state, _) in day.cluster.queue().items() if state in ("RUNNING", "PENDING")]
    if len(cells) > 2:  # the cell's and the report's
        day.faults.append(f"two submissions made {cells}")
    return f"Cancelled, then two `bushpc resume` at the same time: one job; {len(later)} told to try again."


def hung(seconds: float) -> Callable[[Day], str]:
    def happens(day: Day) -> str:
        with day.frozen() as ranks:
            for rank in ranks[:-1]:
                os.kill(rank.pid, signal.SIGCONT)
            if seconds < HANG_S:
                time.sleep(seconds)
            else:
                day.until(lambda: not day.in_queue("RUNNING"), "the watchdog")
        return (
            f"Rank {len(ranks) - 1} of {len(ranks)} stood still for {'more' if seconds > HANG_S else 'less'} than "
            f"engine.hang_s={HANG_S:.0f}."
        )

    return happens


def off_by(minutes: str) -> Row:
    clock = [f"export LD_PRELOAD={FAKETIME} FAKETIME={minutes} NO_FAKE_STAT=1 FAKETIME_DONT_FAKE_MONOTONIC=1"]
    only_first = [f'if [ "${{SLURM_RESTART_COUNT:-0}}" = 0 ]; then {clock[0]}; fi']

    def happens(day: Day) -> str:
        with day.frozen():
            day.status("running")
            day.cluster.ask("scancel", "--signal=USR2", day.job_id)
        return "Ranks and batch shell of the first start had that clock, the second start the right one."

    word = "ahead" if minutes.startswith("+") else "behind"
    return Row(part="clock", name=f"clock-5-min-{word}", happens=happens, cluster={"setup": tuple(only_first)})


class InThread(threading.Thread):
    """Keeps what was raised, for `join`."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.work = work
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self.error = error

    def join(self, timeout: float | None = None) -> None:
        super().join(timeout)
        if self.error:
            raise CaseError(f"the submission failed: {self.error}") from self.error


def all_rows() -> list[Row]:
    """Every row once."""
    rows = [
        Row(part="slurmctld", name="slurmctld-away-running", happens=controller_away_while_training),
        Row(part="slurmctld", name="slurmctld-away-requeue", happens=controller_away_at_requeue),
        Row(part="slurmctld", name="slurmctld-away-submit", happens=controller_away_at_submission, submits=True),
        Row(part="slurmctld", name="slurmctld-away-cancel-resume", happens=controller_away_at_cancel_and_resume),
        Row(part="slurmdbd", name="slurmdbd-away", happens=accounting_away, accounting=True),
        *(
            Row(part="disk", name=f"disk-{word}-{when}", happens=broken_disk(how, when), phase=phase, disk=True)
            for word, how in (("full", full), ("read-only", read_only))
            for when, phase in (("save", "save"), ("requeue", "step"), ("status", "step"))
        ),
        Row(part="disk", name="stale-mount", happens=stale_mount, disk=True),
        Row(part="disk", name="run-folder-renamed", happens=renamed),
        Row(part="jobs", name="suspend-resume", happens=suspended),
        Row(part="jobs", name="time-limit-raised", happens=limit_raised),
        Row(part="jobs", name="time-limit-lowered", happens=limit_lowered),
        Row(part="jobs", name="hold-release", happens=held),
        Row(part="jobs", name="drain", happens=drained),
        Row(part="jobs", name="maintenance", happens=reserved),
        Row(part="jobs", name="array-throttle", happens=throttled, cells=2),
        Row(part="people", name="two-members", happens=two_members),
        Row(part="watchdog", name="rank-stopped-longer", happens=hung(2 * HANG_S), ranks=2, engine={"hang_s": HANG_S}),
        Row(part="watchdog", name="rank-stopped-shorter", happens=hung(SHORTER_S), ranks=2, engine={"hang_s": HANG_S}),
    ]
    if Path(FAKETIME).exists():
        rows += [off_by("+5m"), off_by("-5m")]
    rows += [
        Row(part="signals", name=f"signal-{name}-{target}", happens=signalled(name, target))
        for target in TARGETS
        for name in SIGNALS
    ]
    return rows
