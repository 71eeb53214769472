"""A training that takes no seconds to start: in a job, this takes the place of the modules that import torch.

Every Python that finds this folder in PYTHONPATH runs it. Jobs, shells, ranks, signals, files and ledger are real. With
STAND_IN=faulty in the environment it leaves at a stop signal without saving, and each start changes the weights. Each
start appends to `share.jsonl` of its cell what it has of its node.
"""

import json
import os
import sys
import time
import types
from pathlib import Path
from types import SimpleNamespace

STEP_S = 0.05


def run_cell(cell_dir, world, stop):
    cell_dir = Path(cell_dir)
    import numpy as np
    import yaml
    from safetensors.numpy import load_file

    from bushpc.cluster.base import this_job
    from bushpc.runs.lease import Lease
    from bushpc.train.ledger import Ledger
    from bushpc.train.track import Tracker

    config = yaml.safe_load((cell_dir / "config.yaml").read_text())
    iterations, size = config["train"]["iterations"], config["train"]["batch_size"]
    rows = [line.split(",") for line in (cell_dir.parent.parent / "folds.csv").read_text().split()]
    fold, key, label = (rows[0].index(column) for column in ("fold", "key", "label"))
    lesions = [row for row in rows[1:] if row[label] != "normal"]
    keys = [row[key] for row in lesions if int(row[fold]) != config["fold"]]
    job = this_job()  # None in a process of cluster=local
    share = {"job": job and job.id, "node": job and job.node, "cores": sorted(os.sched_getaffinity(0))}
    share |= {"local_rank": world.local_rank, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES", "")}
    with (cell_dir / "share.jsonl").open("a") as file:
        file.write(json.dumps(share) + "\n")
    if (cell_dir / "fails").exists():
        raise RuntimeError("told to fail")
    with Lease(cell_dir, job=this_job()):
        tracker = Tracker(cell_dir, iterations, active=True)
        sealed = sorted((cell_dir / "checkpoints").glob("step_*"))
        start = int(sealed[-1].name[5:]) if sealed else 0
        weight = load_file(sealed[-1] / "model.safetensors")["weight"] if sealed else np.ones(3)
        faulty = os.environ.get("STAND_IN") == "faulty"
        if faulty:
            weight = weight + tracker.attempt
        tracker.resumed(start)
        tracker.phase("training", start)
        with Ledger(cell_dir, world, tracker.attempt, start) as ledger:
            for step in range(start, iterations):
                with tracker.spending("step"):
                    time.sleep(STEP_S)
                    weight = weight * 0.9 + step
                positions = [divmod(p, len(keys)) for p in range(step * size, (step + 1) * size)]
                ledger.note(step, [keys[place] for _, place in positions], [epoch for epoch, _ in positions])
                done = step + 1
                tracker.train(done, 0.0, {}, 0.0)
                tracker.alive(done)
                due = done % config["train"]["save_every"] == 0 or done == iterations
                if (due and not stop) or (stop and not faulty):
                    ledger.flush()
                    save(cell_dir / "checkpoints", done, weight)
                if stop:
                    tracker.phase("stopped", done)
                    return SimpleNamespace(step=done, signal_name=stop.signal_name)
        tracker.phase("evaluating", iterations)
        validated = [row[key] for row in lesions if int(row[fold]) == config["fold"]]
        (cell_dir / "per_image.csv").write_text(
            per_image(validated, config["fold"], config["evaluate"].get("metrics", []))
        )
        (cell_dir / "DONE").write_text(json.dumps({"step": iterations}))
        tracker.phase("done", iterations)
    return None


def per_image(keys, fold, asked):
    """Results that a report can be made of, with a column for every metric that is asked for."""
    more = [name for name in asked if name not in ("dice", "iou", "fpr", "fnr") and not name.startswith("label_")]
    labels = ["prob_benign", "prob_malignant", "prob_normal"] if any("label_" in name for name in asked) else []
    head = "key,patient,label,fold,prompts,dice,iou,fpr,fnr,tp,fp,fn,tn,length_px,spatial_prompt,attribute_prompt"
    after = ",".join(["0.8,0.7,0.1,0.1,8,1,1,90,40,,", *["0.5"] * len(more), *["0.6", "0.3", "0.1"][: len(labels)]])
    return "".join(
        [",".join([head, *more, *labels]) + "\n", *(f"{key},{key},benign,{fold},none,{after}\n" for key in keys)]
    )


def save(folder, step, weight):
    from safetensors.numpy import save_file

    aside = folder / f".step_{step:08d}"
    aside.mkdir(parents=True)
    save_file({"weight": weight}, aside / "model.safetensors")
    (aside / "meta.json").write_text(json.dumps({"save_s": 0.0, "step_s": STEP_S}))
    (aside / "seal.json").write_text("{}")
    aside.rename(folder / f"step_{step:08d}")


def is_a_rank():
    words = Path("/proc/self/cmdline").read_bytes().split(b"\0")
    return b"submitit.core._submit" in words and {"SLURM_PROCID", "SUBMITIT_LOCAL_GLOBALID"} & os.environ.keys()


if is_a_rank():
    run, dist = types.ModuleType("bushpc.cell"), types.ModuleType("bushpc.dist")
    run.run_cell, dist.meet = run_cell, lambda *args: None
    dist.World = lambda rank, size, local_rank: types.SimpleNamespace(
        rank=rank, size=size, local_rank=local_rank, is_main=rank == 0
    )
    sys.modules.update({"bushpc.cell": run, "bushpc.dist": dist})
