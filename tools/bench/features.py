"""What cached features of a frozen encoder save: an epoch with them, compared with one that runs the encoder.

    python tools/bench/features.py [--images 4] [--epochs 3] [--out benchmarks/<date>_sam_features] [KEY=VALUE ...]

SAM multi-task as its yaml has it, full size and random weights, on the phantom, with either decoder. Batches come
from bushpc's loader and go through its engine, forward, backward and optimizer; checkpoints and the log are left out,
as they cost both the same. Times are of the processor, over all threads: other work on the machine hardly changes them.
Words are overrides, such as model.image_size=512.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import tempfile
import time
import typing as t
from pathlib import Path

from common import machine, write_result

from bushpc.cell import build_model
from bushpc.cli import main as bushpc
from bushpc.config import CellConfig, compose
from bushpc.data.batches import training_batches
from bushpc.data.cache import open_cache
from bushpc.data.features import compute_features
from bushpc.data.loader import FoldData
from bushpc.dist import World
from bushpc.sample import LABELS
from bushpc.train.engine import Engine, start_ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4, help="training images of an epoch, which is one batch")
    parser.add_argument("--epochs", type=int, default=3, help="timed epochs with features; without, one")
    parser.add_argument("--out", type=Path, default=None, help="folder for features.md and features.json")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    facts = machine()
    folder = Path(tempfile.mkdtemp())
    try:
        assert bushpc(["pack", "data=phantom", f"out={folder / 'phantom'}", "count=24", "workers=1"]) == 0
        rows = [measure(folder, decoder, arguments) for decoder in ("sd", "unet")]
    finally:
        shutil.rmtree(folder)
    result = {"overrides": arguments.overrides, "images": arguments.images, "decoders": rows, "machine": facts}
    report = table(result)
    print(report)
    if arguments.out:
        write_result(arguments.out, "features", report, result)


def measure(folder: Path, decoder: str, arguments: argparse.Namespace) -> dict[str, t.Any]:
    """Processor seconds of an epoch both ways, of computing the features, and their bytes."""
    cell = dataclasses.replace(
        compose(
            [
                *("model=sam_multitask", "data=phantom", "engine=cpu", "model.pretrained=false"),
                *(f"data.root={folder / 'phantom'}", f"runs_dir={folder}", f"loader.cache_dir={folder / 'cache'}"),
                *(f"model.decoder={decoder}", *(f"augment.strength.{label}=0" for label in LABELS)),
                *("train.epochs=null", "train.balance=false", f"train.batch_size={arguments.images}"),
                *(f"train.iterations={arguments.epochs + 1}", f"evaluate.batch_size={arguments.images}"),
                *arguments.overrides,
            ]
        ),
        fold=0,
    )
    data = FoldData.open(cell, 0, folder / "phantom" / "folds.csv")
    # A few images are an epoch here; the features of a whole group would be computed, so they are all of the data.
    records = data.train[: arguments.images]
    manifest = dataclasses.replace(data.manifest, records=records)
    data = dataclasses.replace(data, manifest=manifest, train=records, validation=records, repeats=[1] * len(records))
    start_ranks(cell, World())
    open_cache(manifest, data.folder, cell.model.image_size, cell.loader)
    engine = Engine(cell, World(), build_model(cell))
    without = epochs(cell, engine, data, 1)
    began = time.process_time()
    features = compute_features(cell, engine.model, data, engine.device, engine.autocast)
    computing = time.process_time() - began
    kept = epochs(cell, engine, dataclasses.replace(data, features=features), arguments.epochs)
    size = sum(path.stat().st_size for path in features.plain.glob("*.safetensors"))
    return {
        "decoder": decoder,
        "image_size": cell.model.image_size,
        "precision": cell.engine.precision,
        "encoder_s": statistics.median(without),
        "features_s": statistics.median(kept),
        "ratio": statistics.median(without) / statistics.median(kept),
        "computing_s": computing,
        "mb_per_image": size / len(records) / 1e6,
    }


def epochs(cell: CellConfig, engine: Engine, data: FoldData, timed: int) -> list[float]:
    """Processor seconds of each of `timed` epochs, after one that is not counted where there are several."""
    engine.train()
    seconds = []
    batches = training_batches(cell, data, World(), 0)
    for epoch in range(timed + (timed > 1)):
        began = time.process_time()
        engine.losses(next(batches))
        engine.update(cell.train.lr)
        if epoch or timed == 1:
            seconds.append(time.process_time() - began)
    batches.close()
    return seconds


def table(result: dict[str, t.Any]) -> str:
    """Markdown."""
    rows = [
        f"| {row['decoder']} | {row['encoder_s']:.1f} | {row['features_s']:.2f} | {row['ratio']:.1f} | "
        f"{row['computing_s']:.1f} | {row['mb_per_image']:.1f} |"
        for row in result["decoders"]
    ]
    first = result["decoders"][0]
    facts = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    return "\n".join(
        [
            f"SAM multi-task, frozen ViT-B, {first['image_size']} x {first['image_size']}, {first['precision']} on "
            f"the CPU, {result['images']} image(s) an epoch, processor seconds; "
            f"overrides: {' '.join(result['overrides']) or 'none'}.",
            "",
            "| decoder | epoch with the encoder, s | epoch with kept features, s | ratio | computing them once, s "
            "| MB per image |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            f"Machine: {facts}.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
