"""mosaicml-streaming's share of tools/bench/loader.py, in its own Python: it wants other versions than bushpc does.

    STREAMING_PYTHON tools/bench/streaming_peer.py SAMPLES WORKERS BATCH SIZE SECONDS

SAMPLES: a folder of <key>.image.png and <key>.mask.png. Prints the rates as one line of JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import typing as t
from importlib.metadata import version
from pathlib import Path

import torch
from common import decoded, first_and_later
from streaming import MDSWriter, StreamingDataset
from torch.utils.data import DataLoader


class Decoded(StreamingDataset):
    size = 0

    def __getitem__(self, at: t.Any) -> tuple[torch.Tensor, torch.Tensor]:
        sample = super().__getitem__(at)
        image_SSC, mask_SS = decoded(sample["image"], sample["mask"], self.size)
        return torch.from_numpy(image_SSC), torch.from_numpy(mask_SS)


def main() -> None:
    samples, workers, batch, size, seconds = sys.argv[1:]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        with MDSWriter(out=folder, columns={"image": "bytes", "mask": "bytes"}) as writer:
            for image in sorted(Path(samples).glob("*.image.png")):
                mask = image.with_name(image.name.replace(".image.", ".mask."))
                writer.write({"image": image.read_bytes(), "mask": mask.read_bytes()})
        Decoded.size = int(size)
        loaders: list[DataLoader[t.Any]] = []

        def epoch() -> int:
            if not loaders:
                data = Decoded(local=folder, shuffle=True, batch_size=int(batch))
                loaders.append(
                    DataLoader(data, int(batch), num_workers=int(workers), persistent_workers=int(workers) > 0)
                )
            return sum(len(images) for images, _ in loaders[0])

        rates = first_and_later(epoch, float(seconds))
    print(json.dumps({**rates, "version": version("mosaicml-streaming")}))


if __name__ == "__main__":
    main()
