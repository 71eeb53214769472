"""Images per second of the first and of later epochs: bushpc's loader, three other loaders, and plain copying.

    python tools/bench/loader.py [--streaming-python PYTHON] [--out benchmarks/<date>_loader]

The data are BrEaST's lesions where BUSHPC_DATA is set, else the phantom's, packed into a temporary folder. Every
method runs in a separate process, in turns; the median of the ratios within each turn counts, so that other load
on the machine affects both sides. What a method has to start
(cache, worker processes) counts to its first epoch; files are in the page cache for all of them. How to get a Python
with mosaicml-streaming: tools/bench/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
import typing as t
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from common import ROOT, decoded, first_and_later, machine, write_result
from torch.utils.data import DataLoader, Dataset

from bushpc.config import CellConfig, compose
from bushpc.data.batches import training_batches
from bushpc.data.cache import open_cache
from bushpc.data.loader import FoldData
from bushpc.dist import World
from bushpc.shards.manifest import verify
from bushpc.shards.write import pack

LIGHT = ("augment.hflip=0.5", "augment.rotate=15", "augment.zoom=0.1", "augment.brightness=0.2", "augment.contrast=0.2")
BEFORE, NOW, ALBUMENTATIONS = "bushpc, augmented by torchvision", "bushpc, augmented", "albumentations over arrays"
ENDLESS = 10**9
Rates = dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """One way to load the same images. delivers: what a consumer gets. measure: its rates, from a fresh start."""

    delivers: str
    measure: Callable[[], Rates]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=352)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="how long later epochs are repeated in each repeat")
    parser.add_argument("--streaming-python", type=Path, default=None, help="a Python that has mosaicml-streaming")
    parser.add_argument("--out", type=Path, default=None, help="folder for loader.md and loader.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments)
        ways = bench.ways()
        rates: dict[str, list[Rates]] = {name: [] for name in ways}
        for _ in range(arguments.repeats):
            for name, way in ways.items():
                rates[name].append(way.measure())
        result = {
            "machine": machine(),
            "data": bench.manifest.dataset,
            "images": bench.images,
            "asked": {key: value for key, value in vars(arguments).items() if isinstance(value, int | float)},
            "missing": bench.missing,
            "ways": {
                name: {
                    "delivers": way.delivers,
                    "first": statistics.median(rate["first"] for rate in rates[name]),
                    "later": statistics.median(rate["later"] for rate in rates[name]),
                    "all": rates[name],
                }
                for name, way in ways.items()
            },
        }
    report = table(result)
    print(report)
    if arguments.out:
        write_result(arguments.out, "loader", report, result)


class Bench:
    """The packed dataset, the same samples as single files, and the ways to load them."""

    def __init__(self, folder: Path, asked: argparse.Namespace) -> None:
        self.folder, self.asked = folder, asked
        self.shards, self.files = folder / "shards", folder / "files"
        real = os.environ.get("BUSHPC_DATA")
        cpus = len(os.sched_getaffinity(0))
        name, source = ("breast", Path(real) / "breast") if real else ("phantom", None)
        self.manifest = pack(name, source, self.shards, workers=cpus)
        verify(self.shards, self.manifest, deep=True)  # reads every byte, as packing wrote it: all in the page cache
        self.images = len(self.manifest.lesions)
        self.files.mkdir()
        for record in self.manifest.lesions:
            tar = (self.shards / record.shard).read_bytes()
            for what, offset, length in (
                ("image", record.image_offset, record.image_bytes),
                ("mask", record.mask_offset, record.mask_bytes),
            ):
                (self.files / f"{record.key}.{what}.png").write_bytes(tar[offset : offset + length])
        self.missing: dict[str, str] = {}

    def ways(self) -> dict[str, Way]:
        whole = "Batch: uint8 (float32 on the device), labels, prompts; global shuffle"
        arrays = "uint8 arrays"
        # Neighbours are the ones whose ratio matters most: the less time between them, the more alike their machine.
        ways = {
            "memory copy": Way(delivers=f"{arrays}, copied from decoded ones", measure=self.in_child(self.copy)),
            "bushpc": Way(delivers=whole, measure=self.in_child(self.ours("model=unet"))),
            "webdataset": Way(
                delivers=f"{arrays}; shards and a buffer shuffled", measure=self.in_child(self.webdataset)
            ),
            "torch DataLoader, PNG files": Way(
                delivers=f"{arrays}; global shuffle", measure=self.in_child(self.torch_files)
            ),
            "bushpc, text model": Way(
                delivers=f"{whole}; spatial prompts drawn", measure=self.in_child(self.ours("model=xbusnet"))
            ),
            BEFORE: Way(
                delivers=f"{whole}; flip, affine, brightness, contrast",
                measure=self.in_child(self.ours("model=unet", "augment.method=torchvision", *LIGHT)),
            ),
            NOW: Way(
                delivers=f"{whole}; flip, affine, brightness, contrast",
                measure=self.in_child(self.ours("model=unet", *LIGHT)),
            ),
        }
        if importlib.util.find_spec("albumentations"):
            ways[ALBUMENTATIONS] = Way(
                delivers=f"{arrays}; flip, affine, brightness, contrast; global shuffle",
                measure=self.in_child(self.albumentations),
            )
        else:
            self.missing[ALBUMENTATIONS] = "not measured: albumentations cannot be imported"
        try:
            self.mosaicml()
        except (OSError, subprocess.SubprocessError) as error:
            self.missing["mosaicml-streaming"] = f"{error} {getattr(error, 'stderr', None) or ''}".strip()
        else:
            mosaicml = Way(delivers=f"{arrays}; its default shuffle", measure=self.mosaicml)
            ways = {"mosaicml-streaming": mosaicml, **ways}  # next to bushpc's first epoch
        return ways

    def in_child(self, start: Callable[[], Callable[[], int]]) -> Callable[[], Rates]:
        """Measure in a forked process: nobody meets what another left open."""

        def work(pipe: t.Any) -> None:
            pipe.send(first_and_later(start(), self.asked.seconds))

        def measure() -> Rates:
            ours, theirs = multiprocessing.Pipe(duplex=False)
            child = multiprocessing.get_context("fork").Process(target=work, args=(theirs,))
            child.start()
            theirs.close()
            rates: Rates = ours.recv()
            child.join()
            return rates

        return measure

    def ours(self, *words: str) -> Callable[[], Callable[[], int]]:
        """training_batches as a run calls it, with all lesions as the training part."""
        cell = self.cell(*words)
        lesions = self.manifest.lesions
        data = FoldData(
            manifest=self.manifest,
            folder=self.shards,
            train=lesions,
            repeats=[1] * len(lesions),
            holdout=[],
            validation=[],
            conditions=tuple(kind.fitted(lesions, cell.prompting) for kind in cell.model.conditions),
        )

        def start() -> Callable[[], int]:
            caches = tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
            here = dataclasses.replace(cell, loader=dataclasses.replace(cell.loader, cache_dir=caches))
            batches: list[Iterator[t.Any]] = []

            def epoch() -> int:
                if not batches:
                    batches.append(training_batches(here, data, World(), 0))
                    shutil.rmtree(caches)  # what is open stays; nothing is left behind
                return sum(len(batch.keys) for batch in islice(batches[0], -(-self.images // self.asked.batch)))

            return epoch

        return start

    def cell(self, *words: str) -> CellConfig:
        return compose(
            [
                *(
                    f"data={self.manifest.dataset}",
                    f"data.root={self.shards}",
                    "cluster=local",
                    "model.pretrained=false",
                ),
                *(f"model.image_size={self.asked.size}", f"train.batch_size={self.asked.batch}"),
                *(f"train.iterations={ENDLESS}", f"loader.workers={self.asked.workers}"),
                *("augment.hflip=0", "augment.rotate=0", "augment.zoom=0", "augment.brightness=0"),
                *("augment.contrast=0", *words),
            ]
        )

    def webdataset(self) -> Callable[[], int]:
        import webdataset as wds

        def pixels(sample: dict[str, t.Any]) -> tuple[np.ndarray, np.ndarray]:
            return decoded(sample["image.png"], sample["mask.png"], self.asked.size)

        tars = [str(path) for path in sorted(self.shards.glob("lesion-*.tar"))]
        samples = wds.WebDataset(tars, shardshuffle=len(tars), empty_check=False).shuffle(64).map(pixels)
        return self.loaded(samples.batched(self.asked.batch), batch_size=None)

    def torch_files(self) -> Callable[[], int]:
        return self.loaded(
            _Files(sorted(self.files.glob("*.image.png")), self.asked.size), self.asked.batch, shuffle=True
        )

    def albumentations(self) -> Callable[[], int]:
        """Its transforms in a DataLoader over pictures that are decoded and resized already, one thread a worker."""
        import albumentations as A
        import cv2

        cv2.setNumThreads(1)
        change = A.Compose(
            [
                A.HorizontalFlip(p=0.5),
                A.Affine(rotate=(-15, 15), scale=(0.9, 1.1), interpolation=cv2.INTER_LINEAR, p=1),
                A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=1),
            ]
        )
        return self.loaded(_Changed(*self.arrays(), change), self.asked.batch, shuffle=True)

    def loaded(self, data: t.Any, batch_size: int | None, **how: t.Any) -> Callable[[], int]:
        """A DataLoader, whose workers start with the first epoch and stay."""
        workers = self.asked.workers
        loader = DataLoader(data, batch_size, num_workers=workers, persistent_workers=workers > 0, **how)
        return lambda: sum(len(images) for images, _ in loader)

    def copy(self) -> Callable[[], int]:
        """What remains if nothing but the bytes of each batch has to be moved."""
        images_NSSC, masks_NSS = self.arrays()
        rng = np.random.default_rng(0)

        def epoch() -> int:
            order, done = rng.permutation(self.images), 0
            for first in range(0, self.images, self.asked.batch):
                rows = order[first : first + self.asked.batch]
                batch = images_NSSC[rows], masks_NSS[rows]
                done += len(batch[0])
            return done

        return epoch

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """All images and masks, decoded and resized, in memory."""
        cell = self.cell("model=unet")
        with tempfile.TemporaryDirectory() as caches:
            loader = dataclasses.replace(cell.loader, cache_dir=caches)
            cache = open_cache(self.manifest, self.shards, self.asked.size, loader, log=lambda text: None)
            return np.array(cache.images_NSSC), np.array(cache.masks_NSS)

    def mosaicml(self) -> Rates:
        """Raises: OSError, SubprocessError where it cannot be had."""
        if not self.asked.streaming_python:
            raise FileNotFoundError("not measured: no --streaming-python given")
        asked = (self.asked.workers, self.asked.batch, self.asked.size, self.asked.seconds)
        command = [self.asked.streaming_python, Path(__file__).with_name("streaming_peer.py"), self.files, *asked]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            list(map(str, command)), env=environment, capture_output=True, text=True, check=True, timeout=600
        )
        rates: Rates = json.loads(done.stdout.splitlines()[-1])
        return rates


class _Files(Dataset[t.Any]):
    """Image and mask files, as a training script without shards would read them."""

    def __init__(self, images: list[Path], size: int) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.images[i]
        mask = image.with_name(image.name.replace(".image.", ".mask."))
        image_SSC, mask_SS = decoded(image.read_bytes(), mask.read_bytes(), self.size)
        return torch.from_numpy(image_SSC), torch.from_numpy(mask_SS)


class _Changed(Dataset[t.Any]):
    """Arrays through a transform of albumentations."""

    def __init__(self, images_NSSC: np.ndarray, masks_NSS: np.ndarray, change: t.Any) -> None:
        self.images_NSSC, self.masks_NSS, self.change = images_NSSC, masks_NSS, change

    def __len__(self) -> int:
        return len(self.images_NSSC)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        changed = self.change(image=self.images_NSSC[i], mask=self.masks_NSS[i])
        return torch.from_numpy(changed["image"]), torch.from_numpy(changed["mask"])


def table(result: dict[str, t.Any]) -> str:
    """Markdown."""
    ways, asked, facts = result["ways"], result["asked"], result["machine"]

    def ratio(epoch: str, name: str, to: str) -> float:
        turns = zip(ways[name]["all"], ways[to]["all"], strict=True)
        return statistics.median(one[epoch] / other[epoch] for one, other in turns)

    peers = [name for name in ways if not name.startswith(("bushpc", "memory", "albumentations"))]
    augmented_peer = []
    if ALBUMENTATIONS in ways:
        found = ratio("later", NOW, ALBUMENTATIONS)
        augmented_peer = [f"- Augmented epochs / albumentations': {found:.1f} (wanted: 1.5 or more)"]
    best = max(peers, key=lambda name: ways[name]["first"])
    lines = [
        f"{result['images']} lesions of {result['data']} at {asked['size']} x {asked['size']}, image and mask, batches "
        f"of {asked['batch']}, {asked['workers']} workers; images per second, median of {asked['repeats']} repeats "
        "in turn.",
        "",
        ", ".join(f"{name} {value}" for name, value in facts.items()),
        "",
        "| way | first epoch | later epochs | later / webdataset | later / copy | delivers |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, way in ways.items():
        first = f"{way['first']:.0f}" if name != "memory copy" else ""
        ratios = f"{ratio('later', name, 'webdataset'):.1f} | {ratio('later', name, 'memory copy'):.3f}"
        lines.append(f"| {name} | {first} | {way['later']:.0f} | {ratios} | {way['delivers']} |")
    lines += [f"| {name} | | | | | {reason.splitlines()[-1]} |" for name, reason in result["missing"].items()]
    lines += [
        "",
        f"- First epoch / best peer's ({best}): {ratio('first', 'bushpc', best):.2f} (wanted: 1 or more)",
        f"- Later epochs / webdataset: {ratio('later', 'bushpc', 'webdataset'):.0f} (wanted: 10 or more)",
        f"- Later epochs / memory copy: {ratio('later', 'bushpc', 'memory copy'):.2f} (wanted: more than 0.5)",
        f"- Augmented epochs / by torchvision, as before: {ratio('later', NOW, BEFORE):.1f} (wanted: 10 or more)",
        *augmented_peer,
        "",
        "Without augmentation bushpc's batches are copied out of the node's cache in the training process, whatever "
        "loader.workers says.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
