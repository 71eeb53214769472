"""What a run says while it runs: metrics.jsonl (curves), state.json (status) and lines in the log."""

from __future__ import annotations

import json
import os
import socket
import time
import typing as t
from pathlib import Path

from bushpc.files import read_json, write_atomically

HEARTBEAT_S = 2.0


class Tracker:
    """Writes for the main rank; on the others every call does nothing.

    metrics.jsonl is appended to, one JSON object a line; after a resume a step may appear twice, the later counts.
    """

    def __init__(self, cell_dir: Path, total: int, active: bool) -> None:
        self.cell_dir, self.total, self.active = cell_dir, total, active
        self._beaten = 0.0
        self._rate: float | None = None
        self._mark: tuple[float, int] | None = None
        self.metric: dict[str, float] = {}
        restarts = (read_json(cell_dir / "state.json") or {}).get("restarts", -1)
        self.restarts = restarts + 1

    def say(self, text: str) -> None:
        """A line in the log."""
        if self.active:
            print(time.strftime("%H:%M:%S"), text, flush=True)

    def phase(self, phase: str, step: int) -> None:
        """Enter `starting`, `training`, `evaluating`, `stopped` or `done`; status shows it."""
        self._beat(phase, step, force=True)

    def train(self, step: int, loss: float, terms: dict[str, float], lr: float) -> None:
        """Log one training step (1-based: the number of steps done)."""
        self._measure_rate(step)
        self.metric = {"loss": loss}
        self._append({"kind": "train", "step": step, "loss": loss, "terms": terms, "lr": lr, "time": time.time()})
        self.say(f"step {step}/{self.total}  loss {loss:.4f}  lr {lr:.2e}" + self._pace(step))

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        """Log a validation during training."""
        self.metric = metrics
        self._append({"kind": "validation", "step": step, **metrics, "time": time.time()})
        self.say(f"step {step}/{self.total}  " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))

    def alive(self, step: int) -> None:
        """Say at most every few seconds that training goes on."""
        self._beat("training", step, force=False)

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
            with (self.cell_dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")

    def _beat(self, phase: str, step: int, force: bool) -> None:
        now = time.monotonic()
        if not self.active or (not force and now - self._beaten < HEARTBEAT_S):
            return
        self._beaten = now
        state = {
            "phase": phase,
            "step": step,
            "total": self.total,
            "metric": self.metric,
            "rate": self._rate,
            "restarts": self.restarts,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.time(),
        }
        write_atomically(self.cell_dir / "state.json", json.dumps(state))
