"""What a grid costs the login node: submit, status, cancel and resume of 10, 100 and 1,000 cells on a real Slurm.

    python tools/bench/grid.py [--cells 10 100 1000] [--nodes 16] [--out benchmarks/<date>_grid]

Each command is timed as a user calls it, its start included, on a sandbox whose partitions take no job meanwhile: on a
cluster the nodes' work does not slow the login node either. Then the partitions open, all cells run (trainings that
take no time to start, tests/stand_in), and status and the same command again are timed on the finished grid. The
peers, in the same run: one `sbatch --array` of as many tasks that do nothing, and one `squeue` of them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import typing as t
from collections.abc import Sequence
from pathlib import Path

from common import ROOT, machine, write_result

SANDBOX = [str(ROOT / "tools" / "slurm_sandbox")]
BUSHPC = [sys.executable, "-m", "bushpc.cli"]
COLUMNS = ("submit", "sbatch", "status", "squeue", "cancel", "resume", "all_ran", "status_done", "submit_again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[10, 100, 1000], help="multiples of 5, the folds")
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5, help="of status; the median counts")
    parser.add_argument("--out", type=Path, default=None, help="folder for grid.md and grid.json")
    arguments = parser.parse_args()
    facts = machine()
    with tempfile.TemporaryDirectory(prefix="grid-") as folder:
        where = ["--dir", f"{folder}/slurm"]
        subprocess.run([*SANDBOX, "up", *where, "--nodes", str(arguments.nodes)], check=True)
        try:
            os.environ["SLURM_CONF"] = f"{folder}/slurm/etc/slurm.conf"
            timed([*BUSHPC, "pack", "data=phantom", f"out={folder}/phantom", "count=20", "workers=1"])
            rows = {count: measure(Path(folder), count, arguments.repeats) for count in arguments.cells}
        finally:
            subprocess.run([*SANDBOX, "down", *where], check=True)
    report = to_markdown(rows, facts, arguments.nodes)
    print(report)
    if arguments.out:
        write_result(arguments.out, "grid", report, {"machine": facts, "nodes": arguments.nodes, "seconds": rows})


def measure(folder: Path, count: int, repeats: int) -> dict[str, float]:
    """Seconds of every command on a grid of `count` cells."""
    grid, runs = folder / f"grid{count}.yaml", folder / f"runs{count}"
    lrs = ", ".join(f"{1e-6 * (i + 1):.6f}" for i in range(count // 5))
    grid.write_text(f"base: [model=unet_small, data=phantom]\naxes:\n  train.lr: [{lrs}]\n")
    command = [
        *(*BUSHPC, "grid", f"grid={grid}", "name=run", f"runs_dir={runs}", f"data.root={folder}/phantom"),
        *("cluster=slurm", "cluster.time_min=30", "train.iterations=4", "train.save_every=4", "model.image_size=32"),
        f"cluster.setup=['export PYTHONPATH={ROOT}/tests/stand_in']",
    ]
    run = str(runs / "run")
    partitions("down")
    found = {"submit": timed(command)}
    found["status"] = statistics.median(timed([*BUSHPC, "status", run]) for _ in range(repeats))
    found["squeue"] = statistics.median(timed(["squeue", "--array"]) for _ in range(repeats))
    found["cancel"] = timed([*BUSHPC, "cancel", run])
    found["resume"] = timed([*BUSHPC, "resume", run])
    script = "#!/bin/sh\ntrue\n"
    found["sbatch"] = timed(["sbatch", f"--array=0-{count - 1}", "--output=/dev/null"], script)
    subprocess.run(["scancel", "--name=sbatch"], check=True)
    partitions("up")
    began = time.perf_counter()
    while subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True).stdout.strip():
        time.sleep(1)
    found["all_ran"] = time.perf_counter() - began
    found["status_done"] = statistics.median(timed([*BUSHPC, "status", run]) for _ in range(repeats))
    found["submit_again"] = timed(command)
    return found


def timed(command: Sequence[str], stdin: str = "") -> float:
    """Seconds that a command takes; it must succeed."""
    began = time.perf_counter()
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - began


def partitions(state: str) -> None:
    for name in ("low", "high"):
        subprocess.run(["scontrol", "update", f"partition={name}", f"state={state}"], check=True)


def to_markdown(rows: dict[int, dict[str, float]], facts: dict[str, t.Any], nodes: int) -> str:
    said = {
        "submit": "`bushpc grid`",
        "sbatch": "peer: `sbatch --array` of as many empty tasks",
        "status": "`bushpc status`, all queued",
        "squeue": "peer: `squeue --array`",
        "cancel": "`bushpc cancel`",
        "resume": "`bushpc resume`, all cancelled",
        "all_ran": f"all cells ran, on {nodes} emulated nodes of this one machine",
        "status_done": "`bushpc status`, all done",
        "submit_again": "`bushpc grid` again, all done",
    }
    lines = [f"Seconds by number of cells; {facts['date']}, commit {facts['commit']}.", ""]
    lines += ["| | " + " | ".join(f"{count:,}" for count in rows) + " |", "| --- |" + " ---: |" * len(rows)]
    for name in COLUMNS:
        lines.append(f"| {said[name]} | " + " | ".join(f"{found[name]:.2f}" for found in rows.values()) + " |")
    lines += ["", f"{facts['cpu']}, {facts['cores']} cores, load {facts['load']:.1f} at the start.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
