"""Whether two states of the source train the same weights and write the same metrics, bit for bit.

    tools/same_weights BASE [OTHER] [--out FOLDER] [--only FAMILY …]

BASE, OTHER: source trees (`git worktree add --detach /tmp/base 71c433b`); without OTHER, this one. In one run, on one
thread, each trains one small cell per model family on the same phantom; all tensors of the last checkpoint and every
column of per_image.csv that both have are compared. Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMON = (
    *("data=phantom", "cluster=local", "fold=0", "train.save_every=4", "train.log_every=1", "train.batch_size=4"),
    *("train.warmup=1", "train.track=[]", "evaluate.explain=0"),
)
FAMILIES = {
    # Without a mirror image, which is drawn in another way since augment.method=one_warp.
    "xbusnet": ("model=xbusnet_small", "model.image_size=64", "train.iterations=8", "augment.hflip=0"),
    "vit_diffusion": ("model=vit_diffusion_small", "model.image_size=32", "train.iterations=6", "train.ema=0.9"),
    "sam_multitask": ("model=sam_multitask_small", "model.image_size=48", "model.window=3", "train.epochs=2"),
    "hybrid_attention": ("model=hybrid_attention_small", "model.image_size=64", "train.iterations=6"),
    "tumor_generator": ("model=tumor_generator_small", "model.image_size=32", "train.iterations=6", "model.steps=2"),
}
# Runs in a source tree of any age: it uses only what all of them have under one of their names.
CHILD = """
import sys, warnings
from pathlib import Path
import torch
torch.set_num_threads(1)
from bushpc.config import compose
import dataclasses
from bushpc.dist import World
try:
    from bushpc.cell import run_cell
except ImportError:
    from bushpc.run import run_cell
folder = Path(sys.argv[1])
cell = compose(sys.argv[2:])
folder.mkdir(parents=True)
(folder / "config.yaml").write_text(dataclasses.replace(cell, fold=0, name=folder.parent.parent.name).to_yaml())
(folder.parents[1] / "folds.csv").write_text((cell.data.folder / "folds.csv").read_text())
assert run_cell(folder, World()) is None
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("other", type=Path, nargs="?", default=ROOT)
    parser.add_argument("--only", nargs="+", default=list(FAMILIES), choices=FAMILIES, metavar="FAMILY")
    parser.add_argument("--out", type=Path, help="folder for same_weights.md and same_weights.json")
    arguments = parser.parse_args()
    trees = {"base": arguments.base.resolve(), "other": arguments.other.resolve()}
    here = Path(tempfile.mkdtemp(prefix="same-weights-"))
    run_python(trees["base"], "-m", "bushpc.cli", "pack", "data=phantom", f"out={here}/data", "count=20", "workers=1")
    found = {family: compare(here, trees, family) for family in arguments.only}
    report = to_markdown(found, trees)
    print(report)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "same_weights.md").write_text(report)
        (arguments.out / "same_weights.json").write_text(json.dumps(found, indent=1) + "\n")
    shutil.rmtree(here)
    return 0 if all(not result["differs"] for result in found.values()) else 1


def compare(here: Path, trees: dict[str, Path], family: str) -> dict[str, object]:
    began = time.perf_counter()
    folders = {}

    def train(name: str) -> None:
        folder = here / name / family / "cells" / "fold0"
        # The features of a frozen part are kept for later runs: each tree computes its own.
        data = here / f"data-{name}"
        if not data.exists():
            shutil.copytree(here / "data", data)
        where = (f"data.root={data}", f"runs_dir={here}/{name}", f"loader.cache_dir={here}/cache-{name}")
        run_python(trees[name], "-c", CHILD, str(folder), *COMMON, *FAMILIES[family], *where)
        folders[name] = folder

    for name in trees:
        train(name)
    differs, tensors, values = different(folders["base"], folders["other"])
    return {
        "tensors": tensors,
        "values": values,
        "differs": differs,
        "settings": FAMILIES[family],
        "seconds": time.perf_counter() - began,
    }


def different(base: Path, other: Path) -> tuple[list[str], int, int]:
    """What differs, in words; how many tensors and how many values of per_image.csv were compared."""
    import torch
    from safetensors.torch import load_file

    differs, tensors, values = [], 0, 0
    newest = [max((folder / "checkpoints").glob("step_*")) for folder in (base, other)]
    if newest[0].name != newest[1].name:
        return [f"{newest[0].name} and {newest[1].name}"], 0, 0
    parts = [{path.name for path in folder.glob("*.safetensors")} for folder in newest]
    if parts[0] != parts[1]:
        differs.append(f"files {sorted(parts[0])} and {sorted(parts[1])}")
    for part in sorted(parts[0] & parts[1]):
        ours, theirs = (load_file(folder / part) for folder in newest)
        if ours.keys() != theirs.keys():
            differs.append(f"{part}: names {sorted(ours.keys() ^ theirs.keys())}")
        for name in sorted(ours.keys() & theirs.keys()):
            tensors += 1
            if not torch.equal(ours[name], theirs[name]):
                differs.append(f"{part}: {name} by {float((ours[name].double() - theirs[name].double()).abs().max())}")
    rows = []
    for folder in (base, other):
        with (folder / "per_image.csv").open(newline="") as file:
            rows.append(list(csv.DictReader(file)))
    if len(rows[0]) != len(rows[1]) or rows[0][0].keys() - rows[1][0].keys():
        differs.append(f"per_image.csv: {len(rows[0])} and {len(rows[1])} rows; {list(rows[0][0])}, {list(rows[1][0])}")
    for ours, theirs in zip(*rows, strict=False):
        for column in ours.keys() & theirs.keys():
            values += 1
            if ours[column] != theirs[column]:
                differs.append(f"per_image.csv: {ours['key']} {column}: {ours[column]} and {theirs[column]}")
    return differs, tensors, values


def run_python(tree: Path, *words: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *words], cwd=tree, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{tree}: {words[1:]}: {done.stdout[-1500:]}{done.stderr[-3000:]}")


def to_markdown(found: dict[str, dict[str, object]], trees: dict[str, Path]) -> str:
    commits = {name: commit(tree) for name, tree in trees.items()}
    lines = [
        f"# Weights of {commits['other']} compared with {commits['base']}",
        "",
        f"{time.strftime('%Y-%m-%d')}, {cpu()}, one thread, by `tools/same_weights`. Cells on the phantom, as long as",
        "the settings in same_weights.json say; compared bit for bit: all tensors of the last checkpoint (weights,",
        "buffers, optimizer, average) and all values of per_image.csv.",
        "",
        "| model | tensors | values | differ |",
        "| --- | ---: | ---: | --- |",
    ]
    for family, result in found.items():
        differs = result["differs"]
        assert isinstance(differs, list)
        words = f"{len(differs)}: {'; '.join(differs[:3])}" if differs else "none"
        lines.append(f"| {family} | {result['tensors']} | {result['values']} | {words} |")
    return "\n".join(lines) + "\n"


def commit(tree: Path) -> str:
    words: Callable[..., str] = lambda *command: subprocess.run(  # noqa: E731
        ["git", *command], cwd=tree, capture_output=True, text=True
    ).stdout.strip()
    dirty = words("status", "--porcelain", "--untracked-files=no", "--", "bushpc", "configs")
    return words("rev-parse", "--short", "HEAD") + (" with changes" if dirty else "")


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


if __name__ == "__main__":
    sys.exit(main())
