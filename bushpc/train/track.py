"""Progress of a running cell: metrics.jsonl (curves), state.json (heartbeat), attempts.jsonl, and lines in the log.

A failed write never ends a run: it is reported once and skipped.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import typing as t
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from bushpc.cluster.base import this_job
from bushpc.process import process_start
from bushpc.runs.goodput import SPENDINGS, Attempt, read_attempts, read_note
from bushpc.runs.layout import CellDir
from bushpc.runs.records import Heartbeat
from bushpc.train.energy import EnergyMeter
from bushpc.train.mirrors import Mirrors

HEARTBEAT_S = 2.0
ENDS = ("stopped", "done")


class Tracker:
    """Writes on the main rank; on other ranks every call does nothing.

    metrics.jsonl has one JSON object per line; after a resume a step may appear twice, and the later line counts.
    The heartbeat contains this attempt and where its time went, so a killed attempt leaves its record too: the next
    attempt moves it to attempts.jsonl, which has one line per attempt.

    ranks, gpus: of this attempt, summed over nodes. mirrors: experiment trackers that also receive the curves.
    """

    def __init__(
        self,
        cell_dir: Path | CellDir,
        total: int,
        active: bool,
        *,
        ranks: int = 1,
        gpus: int = 0,
        mirrors: Mirrors | None = None,
    ) -> None:
        self.cell_dir, self.total, self.active = CellDir(cell_dir), total, active
        self._mirrors = mirrors if active else None
        self.metric: dict[str, float] = {}
        self._phase, self._step, self._from_step, self._end = "starting", 0, 0, ""
        self._beaten = 0.0
        self._rate: float | None = None
        self._mark: tuple[float, int] | None = None
        self._mute = False
        self._energy = EnergyMeter(gpus if active else 0)
        self._job = this_job()
        self._attempt = self._begin(ranks, gpus)
        self._clock = _Clock(max(0.0, time.time() - self._attempt.began))
        self._spendings = {cause: _Spending(self._clock, cause) for cause in SPENDINGS}

    @property
    def attempt(self) -> int:
        """Number of earlier starts of the cell; only the active tracker knows it."""
        return self._attempt.number

    def spending(self, cause: str) -> contextlib.AbstractContextManager[None]:
        """Charge the enclosed time to `cause`, one of SPENDINGS. Nested contexts charge only the inner cause."""
        return self._spendings[cause]

    def resumed(self, step: int) -> None:
        """Record that training resumes after `step` steps."""
        self._from_step = self._step = step
        self._beat(force=True)

    def say(self, text: str) -> None:
        """Write a line to the log."""
        if self.active:
            with contextlib.suppress(OSError):  # a full disk under the log
                print(time.strftime("%H:%M:%S"), text, flush=True)

    def phase(self, phase: str, step: int) -> None:
        """Enter `starting`, `training`, `evaluating`, `stopped` or `done` (shown by status). The last two are final."""
        self._phase, self._step = phase, step
        if phase != "starting":
            self._clock.started()
        self._end = phase if phase in ENDS else ""
        self._beat(force=True)
        if self._end and self.active:
            self._try(lambda: _record(self.cell_dir, self._account()))
        if self._end and self._mirrors:
            self._mirrors.close(self.say)

    def train(self, step: int, loss: float, terms: dict[str, float], lr: float) -> None:
        """Log one training step (1-based: the number of steps done)."""
        self._measure_rate(step)
        self.metric = {"loss": loss}
        self._append({"kind": "train", "step": step, "loss": loss, "terms": terms, "lr": lr, "time": time.time()})
        self._mirror(step, "train", {"loss": loss, **terms, "lr": lr})
        self.say(f"step {step}/{self.total}  loss {loss:.4f}  lr {lr:.2e}" + self._pace(step))

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        """Log a validation during training."""
        self.metric = metrics
        self._append({"kind": "validation", "step": step, **metrics, "time": time.time()})
        self._mirror(step, "validation", metrics)
        self.say(f"step {step}/{self.total}  " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))

    def tuning(self, step: int, loss: float, follows: str | None) -> None:
        """Log the loss on the tuning part, and the schedule's reaction."""
        self._append({"kind": "tuning", "step": step, "loss": loss, "time": time.time()})
        self._mirror(step, "tuning", {"loss": loss})
        self.say(f"step {step}/{self.total}  loss on held-out training samples {loss:.4f}")
        if follows:
            self.say(follows)

    def alive(self, step: int | None = None) -> None:
        """Update the heartbeat, at most every few seconds. step: steps done, if that changed."""
        self._step = self._step if step is None else step
        self._beat(force=False)

    def _begin(self, ranks: int, gpus: int) -> Attempt:
        """Start this attempt's record, and move the previous attempt's to attempts.jsonl if it is not there yet."""
        attempts = read_attempts(self.cell_dir) if self.active else []
        if attempts:
            self._try(lambda: _record(self.cell_dir, attempts[-1]))
        now = time.time()
        job = read_note(self.cell_dir.job_note)
        submitted = job["submitted"] if isinstance(job.get("submitted"), (int, float)) else now
        earliest = attempts[-1].last_sign if attempts else 0.0
        return Attempt(
            number=self._next_number(attempts),
            job=self._job.id if self._job else "",
            restart=self._job.restarts if self._job else 0,
            host=socket.gethostname(),
            pid=os.getpid(),
            ranks=ranks,
            gpus=gpus,
            submitted=submitted,
            began=_began(now, submitted, earliest, self._job.started if self._job else 0),
            from_step=0,
            step=0,
            seconds=dict.fromkeys(SPENDINGS, 0.0),
            end="",
        )

    def _next_number(self, attempts: list[Attempt]) -> int:
        """A number that no earlier attempt had: the ledger identifies attempts by it."""
        number = attempts[-1].number + 1 if attempts else 0
        if not self.active or Attempt.parse(read_note(self.cell_dir.heartbeat).get("attempt")):
            return number
        # An unreadable heartbeat belongs to an attempt that is recorded nowhere else.
        return number + self.cell_dir.heartbeat.exists()

    def _account(self) -> Attempt:
        seconds = {cause: round(spent, 3) for cause, spent in self._clock.settle().items()}
        # A step behind where training began can only be the 0 of a phase before it did.
        step = max(self._from_step, self._step)
        return replace(
            self._attempt,
            from_step=self._from_step,
            step=step,
            seconds=seconds,
            end=self._end,
            energy_j=self._energy.joules(),
        )

    def _measure_rate(self, step: int) -> None:
        now = time.monotonic()
        if self._mark and step > self._mark[1]:
            self._rate = (step - self._mark[1]) / (now - self._mark[0])
        self._mark = (now, step)

    def _pace(self, step: int) -> str:
        if not self._rate:
            return ""
        left = int((self.total - step) / self._rate)
        return f"  {self._rate:.2f} it/s  {left // 60}:{left % 60:02d} left"

    def _append(self, line: dict[str, t.Any]) -> None:
        if self.active:
            self._try(lambda: _append_line(self.cell_dir.metrics, json.dumps(line)))

    def _mirror(self, step: int, kind: str, values: dict[str, float]) -> None:
        if self._mirrors:
            named = {f"{kind}/{name}": value for name, value in values.items()}
            self._mirrors.log(step, named, self._from_step, self.say)

    def _beat(self, force: bool) -> None:
        now = time.monotonic()
        if not self.active or (not force and now - self._beaten < HEARTBEAT_S):
            return
        self._beaten = now
        state = Heartbeat(
            phase=self._phase,
            step=self._step,
            total=self.total,
            metric=self.metric,
            rate=self._rate,
            restarts=self._attempt.number,
            host=self._attempt.host,
            node=(self._job and self._job.node) or self._attempt.host,  # as the cluster calls it
            pid=self._attempt.pid,
            time=time.time(),
            attempt=asdict(self._account()),
        )
        self._try(lambda: self._write_state(state, durable=force))

    def _write_state(self, state: Heartbeat, durable: bool) -> None:
        path = self.cell_dir.heartbeat
        if durable:
            state.write(path)
            return
        # No fsync: on a busy file server it takes longer than a step, and the next heartbeat is 2 s away.
        aside = path.with_name(f".{path.name}.{self._attempt.host}.{self._attempt.pid}")
        aside.write_text(state.to_json())
        aside.replace(path)

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
            self._mute = False
        except OSError as error:
            if not self._mute:
                self.say(f"status and curves cannot be written ({error}); the run continues without them")
            self._mute = True


class _Clock:
    """Charges every moment to one cause, beginning with `spent` seconds of start. A switch takes under 1 µs."""

    def __init__(self, spent: float) -> None:
        self.seconds = dict.fromkeys(SPENDINGS, 0.0) | {"start": spent}
        self._causes = ["start"]
        self._mark = time.monotonic()

    def settle(self) -> dict[str, float]:
        """Charge the time since the last switch, and return seconds by cause."""
        now = time.monotonic()
        self.seconds[self._causes[-1]] += now - self._mark
        self._mark = now
        return self.seconds

    def started(self) -> None:
        """From now on, charge time without another cause to `other` instead of `start`."""
        self.settle()
        self._causes[0] = "other"

    def push(self, cause: str) -> None:
        self.settle()
        self._causes.append(cause)

    def pop(self) -> None:
        self.settle()
        self._causes.pop()


class _Spending(contextlib.AbstractContextManager[None]):
    """The context manager of one cause; it has no state, so it is reentrant."""

    def __init__(self, clock: _Clock, cause: str) -> None:
        self._clock, self._cause = clock, cause

    def __enter__(self) -> None:
        self._clock.push(self._cause)

    def __exit__(self, *exc: object) -> None:
        self._clock.pop()


def _began(now: float, submitted: float, earliest: float, job: float) -> float:
    """Start of this attempt's job (`job`) if that was started for it, else of its process; never before `earliest`."""
    ticks = process_start(os.getpid())
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK") if ticks else 0.0
    process = min(now, now - age)
    # An allocation older than the submission, or one with an earlier attempt in it, was not started for this one.
    began = job if max(submitted, earliest) <= job <= process else process
    return min(now, max(began, earliest))


def _record(cell_dir: CellDir, attempt: Attempt) -> None:
    """Append an attempt to attempts.jsonl, unless it is already there."""
    if all(there.number != attempt.number for there in read_attempts(cell_dir, Heartbeat())):
        _append_line(cell_dir.attempts, attempt.to_json())


def _append_line(path: Path, line: str) -> None:
    """Append a line, starting a new one if the file ends in a truncated line."""
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        whole = file.read(1) in (b"", b"\n")
        file.write(("" if whole else "\n").encode() + line.encode() + b"\n")
