"""What a policy does to a scan, for `bushpc shards show --augment`."""

from __future__ import annotations

import typing as t
from types import SimpleNamespace

import numpy as np

from bushpc.config import AugmentConfig, config_names, places
from bushpc.data.augment import Augment
from bushpc.shards.manifest import Record

BITS = 8  # of a mask

Pair = tuple[np.ndarray, np.ndarray]


def policies() -> dict[str, str]:
    """The names that `augment=` takes, each with the first line of its yaml."""
    found = {}
    for name in config_names("augment"):
        path = places.config_file(f"augment/{name}")
        assert path is not None, name
        first = path.read_text().partition("\n")[0]
        found[name] = first.lstrip("# ") if first.startswith("#") else ""
    return found


def draws_of(
    image_HWC: np.ndarray, mask_HW: np.ndarray, config: AugmentConfig, draws: int = 6, seed: int = 0
) -> list[Pair]:
    """Changes of a square scan, uint8, and its mask's bits, as training draws them for a benign scan."""
    augment = Augment(config)
    record = t.cast(Record, SimpleNamespace(key="picture", label="benign"))
    found = []
    for turn in range(draws):
        image = np.ascontiguousarray(image_HWC)
        images, masks, changes = augment.batch([image], [mask_HW], [record], seed, [turn], BITS)
        if changes is not None:
            from bushpc.data.augment import device

            images, masks = device.apply(changes, images, masks)
        bits = (masks[0].numpy() << np.arange(BITS, dtype=np.uint8)[:, None, None]).sum(axis=0, dtype=np.uint8)
        found.append((images[0].permute(1, 2, 0).numpy(), bits))
    return found
