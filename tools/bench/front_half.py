"""What submitting, status and start-up cost in two source trees, in one run: 71c433b and this one, turn by turn.

    git worktree add --detach /tmp/base 71c433b
    python tools/bench/front_half.py /tmp/base [OTHER] [--repeats 5] [--out benchmarks/<date>_front_half]

On a sandbox Slurm whose partitions take no job meanwhile. `whole` is the command as a user types it, its start
included. `beyond imports` is the rest of it in a process that has already imported every module that the command
ends up with. Report, audit and the short status read the run folders that 71c433b wrote (tests/compat). The median of
all repeats counts.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import typing as t
from pathlib import Path

from common import ROOT, machine, write_result

SANDBOX = [str(ROOT / "tools" / "slurm_sandbox")]
COMMANDS = ("five folds", "grid", "status", "help", "status of two cells", "report", "audit")
# Imports what an earlier process of the same command had imported in the end, then times the command.
DRIVER = """
import contextlib, importlib, io, json, sys, time
from pathlib import Path
known, words = Path(sys.argv[1]), sys.argv[2:]
modules = json.loads(known.read_text()) if known.exists() else []
for name in modules:
    with contextlib.suppress(Exception):
        importlib.import_module(name)
from bushpc.cli import main
began = time.perf_counter()
with contextlib.redirect_stdout(io.StringIO()) as said:
    try:
        status = main(words)
    except SystemExit as error:
        status = error.code or 0
seconds = time.perf_counter() - began
if not modules:
    known.write_text(json.dumps([name for name in sys.modules if name.partition(".")[0] != "__main__"]))
print(json.dumps({"seconds": seconds, "status": status, "torch": "torch" in sys.modules}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("other", type=Path, nargs="?", default=ROOT)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=list(COMMANDS), choices=COMMANDS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    trees = {commit(tree): tree.resolve() for tree in (arguments.base, arguments.other)}
    facts = machine()
    found: dict[str, dict[str, list[float]]] = {name: {} for name in trees}
    torch: dict[str, dict[str, bool]] = {name: {} for name in trees}
    with tempfile.TemporaryDirectory(prefix="front-half-") as folder:
        where = ["--dir", f"{folder}/slurm"]
        subprocess.run([*SANDBOX, "up", *where, "--nodes", "2"], check=True)
        try:
            os.environ["SLURM_CONF"] = f"{folder}/slurm/etc/slurm.conf"
            for name in ("low", "high"):
                subprocess.run(["scontrol", "update", f"partition={name}", "state=down"], check=True)
            for repeat in range(arguments.repeats):
                for name, tree in trees.items():
                    one_round(
                        Path(folder), name, tree, arguments.cells, repeat, found[name], torch[name], arguments.only
                    )
                    print(f"round {repeat + 1}, {name}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
        finally:
            subprocess.run([*SANDBOX, "down", *where], check=True)
    facts["load at the end"] = os.getloadavg()[0]
    report = to_markdown(found, torch, facts, arguments)
    print(report)
    if arguments.out:
        write_result(arguments.out, "front_half", report, {"machine": facts, "seconds": found, "torch": torch})


def one_round(
    folder: Path,
    name: str,
    tree: Path,
    cells: int,
    repeat: int,
    found: dict[str, list[float]],
    torch: dict[str, bool],
    only: list[str],
) -> None:
    """Every command once in one tree."""
    mine = folder / name
    if not (mine / "phantom").exists():
        mine.mkdir()
        run(tree, [sys.executable, "-m", "bushpc.cli", "pack", "data=phantom", f"out={mine}/phantom", "count=20"])
        unpack(mine)
    runs, grid = mine / f"runs{repeat}", mine / "grid.yaml"
    lrs = ", ".join(f"{1e-6 * (i + 1):.6f}" for i in range(cells // 5))
    grid.write_text(f"base: [model=unet_small, data=phantom]\naxes:\n  train.lr: [{lrs}]\n")
    settings = [f"data.root={mine}/phantom", "cluster=slurm", "cluster.time_min=30", "train.iterations=4"]
    five = ["cv", "model=xbusnet_small", "data=phantom", "name=five", *settings]
    many = ["grid", f"grid={grid}", "name=grid", *settings]
    old = mine / "old"
    timed = {  # as in COMMANDS
        "five folds": (five, True),
        "grid": (many, True),
        "status": (["status", f"{runs}/whole/grid"], False),
        "help": (["--help"], False),
        "status of two cells": (["status", f"{old}/runs/sam"], False),
        "report": (["report", f"{old}/runs/sam"], False),
        "audit": (["audit", f"{old}/runs/text"], False),
    }
    for what in only:
        words, submits = timed[what]
        known = mine / f"modules-{what.replace(' ', '-')}.json"
        if not known.exists():
            driven(tree, known, [*words, f"runs_dir={mine}/first"] if submits else words)
        began, worked = time.perf_counter(), processor_seconds()
        whole = [*words, f"runs_dir={runs}/whole"] if submits else words
        # Status of a run that is not done ends with 1.
        run(tree, [sys.executable, "-m", "bushpc.cli", *whole], allowed=(0,) if submits else (0, 1))
        found.setdefault(f"{what}, whole", []).append(time.perf_counter() - began)
        found.setdefault(f"{what}, whole, processor time", []).append(processor_seconds() - worked)
        said = driven(tree, known, [*words, f"runs_dir={runs}/beyond"] if submits else words)
        found.setdefault(f"{what}, beyond imports", []).append(said["seconds"])
        torch[what] = said["torch"]
    subprocess.run(["scancel", "--state=PENDING", "--partition=low"], check=True)
    subprocess.run(["scancel", "--state=PENDING", "--partition=high"], check=True)
    shutil.rmtree(mine / "first", ignore_errors=True)


def processor_seconds() -> float:
    """Of all commands so far; a busy machine changes it less than the time by the clock."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def driven(tree: Path, known: Path, words: list[str]) -> dict[str, t.Any]:
    return json.loads(run(tree, [sys.executable, "-c", DRIVER, str(known), *words]).splitlines()[-1])


def run(tree: Path, command: list[str], allowed: tuple[int, ...] = (0,)) -> str:
    env = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tree, env=env)
    if done.returncode not in allowed:
        raise SystemExit(f"{tree}: {command[1:]}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def unpack(folder: Path) -> None:
    """The run folders of 71c433b."""
    with tarfile.open(ROOT / "tests" / "compat" / "files.tar.gz") as tar:
        tar.extractall(folder / "old", filter="tar")
    for path in (folder / "old").rglob("*"):
        if path.suffix in (".yaml", ".json", ".jsonl") and path.is_file():
            path.write_text(path.read_text().replace("@HERE@", str(folder / "old")))


def commit(tree: Path) -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True).stdout.strip()


def to_markdown(
    found: dict[str, dict[str, list[float]]],
    torch: dict[str, dict[str, bool]],
    facts: dict[str, t.Any],
    arguments: argparse.Namespace,
) -> str:
    base, other = found
    lines = [
        f"Seconds, median of {arguments.repeats} rounds in turns; {facts['date']}; the grid and its status have "
        f"{arguments.cells:,} cells.",
        "",
        f"| | {base} | {other} | ratio | torch imported |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for name in found[base]:
        before, after = (statistics.median(found[tree][name]) for tree in found)
        what = name.partition(",")[0]
        words = " → ".join("yes" if torch[tree][what] else "no" for tree in found)
        lines.append(f"| {name} | {before:.2f} | {after:.2f} | {after / before:.2f} | {words} |")
    lines += ["", f"{facts['cpu']}, {facts['cores']} cores, Python {facts['python']}, torch {facts['torch']}; load "]
    lines[-1] += f"{facts['load']:.1f} at the start, {facts['load at the end']:.1f} at the end."
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
