"""What a large run costs at the queue: submitting it, its status and resuming half of it, as arrays and as lanes.

    python tools/bench/job_queue.py [--cells 1000 10000] [--window 100] [--out benchmarks/<date>_queue]

A sandbox Slurm whose partitions take no job meanwhile; cells are never trained. Half of them are then written off as
done, the jobs are cancelled, and the rest is resumed. Times are of whole commands as a user types them: by the clock,
and of the processor, which a busy machine changes less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import typing as t
from pathlib import Path

from common import ROOT, machine, write_result

SANDBOX = [str(ROOT / "tools" / "slurm_sandbox")]
STEPS = ("submit", "status", "cancel", "resume half")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--window", type=int, default=100)
    parser.add_argument("--ways", nargs="+", default=["arrays", "lanes"], choices=("arrays", "lanes"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    facts, found = machine(), {}
    for cells in arguments.cells:
        for way in arguments.ways:
            settings = [f"cluster.submit_window={arguments.window}"] if way == "lanes" else []
            with tempfile.TemporaryDirectory(prefix="queue-") as folder:
                found[f"{cells} as {way}"] = one_run(Path(folder), cells, settings)
                print(cells, way, found[f"{cells} as {way}"], f"load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    facts["load at the end"] = os.getloadavg()[0]
    report = to_markdown(found, facts, arguments.window)
    print(report)
    if arguments.out:
        write_result(arguments.out, "queue", report, {"machine": facts, "found": found})


def one_run(folder: Path, cells: int, settings: list[str]) -> dict[str, t.Any]:
    """Every step, on a new sandbox."""
    where = ["--dir", f"{folder}/slurm"]
    subprocess.run([*SANDBOX, "up", *where, "--nodes", "8", "--like", "job-count=50000"], check=True)
    try:
        os.environ["SLURM_CONF"] = f"{folder}/slurm/etc/slurm.conf"
        for name in ("low", "high"):
            subprocess.run(["scontrol", "update", f"partition={name}", "state=down"], check=True)
        bushpc("pack", "data=phantom", f"out={folder}/phantom", "count=20")
        grid = folder / "grid.yaml"
        lrs = ", ".join(f"{1e-6 * (i + 1):.6f}" for i in range(cells // 5))
        grid.write_text(f"base: [model=unet_small, data=phantom]\naxes:\n  train.lr: [{lrs}]\n")
        words = ["grid", f"grid={grid}", "name=grid", f"data.root={folder}/phantom", f"runs_dir={folder}/runs"]
        words += ["cluster=slurm", "cluster.time_min=30", "train.iterations=4", *settings]
        run_dir, times = folder / "runs" / "grid", dict[str, t.Any]()
        times["submit"] = bushpc(*words)
        queue = subprocess.run(["squeue", "--noheader", "--array"], capture_output=True, text=True, check=True)
        times["jobs in the queue"] = len(queue.stdout.splitlines())
        times["status"] = min(bushpc("status", str(run_dir)) for _ in range(3))
        for number, cell in enumerate(sorted((run_dir / "cells").iterdir())):
            if number % 2:
                (cell / "DONE").write_text(json.dumps({"step": 4}))
        times["cancel"] = bushpc("cancel", str(run_dir))
        times["resume half"] = bushpc("resume", str(run_dir))
        return times
    finally:
        subprocess.run([*SANDBOX, "down", *where], check=True)


def bushpc(*words: str) -> tuple[float, float]:
    """Seconds that a command takes, by the clock and of the processor."""
    command, env = [sys.executable, "-m", "bushpc.cli", *words], {**os.environ, "PYTHONPATH": str(ROOT)}
    began, worked = time.perf_counter(), processor_seconds()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    if done.returncode:
        raise SystemExit(f"{words}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    took = time.perf_counter() - began, processor_seconds() - worked
    print(words[0], took, file=sys.stderr)
    return took


def processor_seconds() -> float:
    """Of all commands so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def to_markdown(found: dict[str, dict[str, t.Any]], facts: dict[str, t.Any], window: int) -> str:
    lines = [
        f"Seconds of whole commands by the clock (of the processor); {facts['date']}, {facts['commit']}; lanes with "
        f"cluster.submit_window={window}. Status is the best of three.",
        "",
        f"| | {' | '.join(found)} |",
        f"| --- |{' ---: |' * len(found)}",
        f"| jobs in the queue | {' | '.join(str(times['jobs in the queue']) for times in found.values())} |",
    ]
    for step in STEPS:
        values = (f"{times[step][0]:.1f} ({times[step][1]:.1f})" for times in found.values())
        lines.append(f"| {step} | {' | '.join(values)} |")
    lines += ["", f"{facts['cpu']}, {facts['cores']} cores, Python {facts['python']}; load {facts['load']:.1f} at the "]
    lines[-1] += f"start, {facts['load at the end']:.1f} at the end."
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
