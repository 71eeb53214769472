"""Random changes of training scans, keyed by (seed, sample, turn): the same on any rank, worker and device.

    pixels, Record ─Scan→ facts ─draw.py→ Change ─pixels.py | device.py→ pixels

augment.method=torchvision goes another way: one_by_one.py.
"""

from __future__ import annotations

import typing as t

import numpy as np
import torch

from bushpc.config import AugmentConfig
from bushpc.data.augment.change import Change
from bushpc.data.augment.draw import Draw
from bushpc.data.augment.scan import Scan
from bushpc.dist import keyed_seed
from bushpc.sample import LABELS
from bushpc.shards.manifest import Record

# Facts of so many scans are kept, about 1.5 kB each; those of further ones are found again each time.
MOST_KEPT = 20_000


Arrays = np.ndarray | t.Sequence[np.ndarray]


class Augment:
    """Applies the `augment` settings; `strength` scales them by label. Nobody else's random numbers are touched."""

    def __init__(self, config: AugmentConfig) -> None:
        self.variants, self.on_device = config.variants, config.where == "device"
        strengths = {label: getattr(config.strength, label) for label in LABELS}
        self._draws = {label: Draw(config, strength) for label, strength in strengths.items()}
        self._one_by_one: dict[str, t.Any] | None = None
        if config.method == "torchvision":
            from bushpc.data.augment.one_by_one import OneByOne

            self._one_by_one = {label: OneByOne(config, strength) for label, strength in strengths.items()}
        self._scans: dict[str, Scan] = {}

    def variant(self, turn: int) -> int:
        """The variant of a sample that was drawn `turn` times before."""
        return turn % self.variants if self.variants else turn

    def __call__(
        self, image_CHW: torch.Tensor, mask_KHW: torch.Tensor, record: Record, seed: int, turn: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment image and mask; both are uint8 and keep their shapes. The reference for batches."""
        bits = torch.arange(len(mask_KHW), dtype=torch.uint8)[:, None, None]
        packed_HW = (mask_KHW << bits).sum(0, dtype=torch.uint8).numpy()
        image_HWC = image_CHW.permute(1, 2, 0).numpy()
        images, masks, _ = self.batch([image_HWC], [packed_HW], [record], seed, [turn], len(mask_KHW))
        return images[0], masks[0]

    def batch(
        self,
        images: Arrays,
        masks: Arrays,
        records: t.Sequence[Record],
        seed: int,
        turns: t.Sequence[int],
        mask_classes: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor, list[Change] | None]:
        """images: S x S x C; masks: S x S bits; uint8. → image_BCHW, mask_BKHW, and what is left to the device.

        A batch of grey scans has one channel in memory, and C by its shape. With augment.where=device nothing is
        changed yet.
        """
        if self._one_by_one:
            return *self._each_by_itself(images, masks, records, seed, turns, mask_classes), None
        import cv2  # here: OpenCV takes a moment to import

        from bushpc.data.augment import pixels

        scans = [self._scan(*of) for of in zip(images, masks, records, strict=True)]
        drawn = [self._drawn(*of, seed) for of in zip(scans, images, records, turns, strict=True)]
        grey = all(scan.grey for scan in scans)
        *size, channels = images[0].shape
        out = np.empty((len(drawn), *size, *(() if grey else (channels,))), np.uint8)
        out_masks = np.empty((len(drawn), *size), np.uint8)
        for i, (scan, change, image, mask_SS) in enumerate(zip(scans, drawn, images, masks, strict=True)):
            there = pixels.first_channel(image) if scan.grey else image
            if not self.on_device:
                there, mask_SS = pixels.apply(change, there, mask_SS)
            out[i] = cv2.merge([there] * channels) if scan.grey and not grey else there
            out_masks[i] = mask_SS
        image_B = torch.from_numpy(out)
        image_BCHW = image_B[:, None].expand(-1, channels, -1, -1) if grey else image_B.permute(0, 3, 1, 2)
        mask_BKHW = mask_planes(torch.from_numpy(out_masks), mask_classes)
        return image_BCHW, mask_BKHW, drawn if self.on_device else None

    def _each_by_itself(
        self,
        images: Arrays,
        masks: Arrays,
        records: t.Sequence[Record],
        seed: int,
        turns: t.Sequence[int],
        mask_classes: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """augment.method=torchvision."""
        assert self._one_by_one is not None
        changed = [
            self._one_by_one[_label(record)](
                torch.tensor(image).permute(2, 0, 1).contiguous(),
                mask_planes(torch.tensor(mask)[None], mask_classes)[0],
                self._seed(record, seed, turn),
            )
            for image, mask, record, turn in zip(images, masks, records, turns, strict=True)
        ]
        return torch.stack([image for image, _ in changed]), torch.stack([mask for _, mask in changed])

    def change(self, image_SSC: np.ndarray, mask_SS: np.ndarray, record: Record, seed: int, turn: int) -> Change:
        """What a scan gets at this turn. augment.method=one_warp."""
        return self._drawn(self._scan(image_SSC, mask_SS, record), image_SSC, record, turn, seed)

    def _drawn(self, scan: Scan, image: np.ndarray, record: Record, turn: int, seed: int) -> Change:
        draw = self._draws[_label(record)]
        if not draw.strength:
            return Change()
        return draw(np.random.default_rng(self._seed(record, seed, turn)), scan, image.shape[0])

    def _seed(self, record: Record, seed: int, turn: int) -> int:
        return keyed_seed(seed, "augment", self.variant(turn), record.key)

    def _scan(self, image_SSC: np.ndarray, mask_SS: np.ndarray, record: Record) -> Scan:
        scan = self._scans.get(record.key)
        if scan is None:
            scan = Scan.of(image_SSC, mask_SS)
            if len(self._scans) < MOST_KEPT:
                self._scans[record.key] = scan
        return scan


def mask_planes(mask_BHW: torch.Tensor, classes: int) -> torch.Tensor:
    """uint8 masks with a bit a class (B, H, W) → a plane of 0 and 1 a class (B, K, H, W)."""
    if classes == 1:
        return mask_BHW[:, None]
    return mask_BHW[:, None] >> torch.arange(classes, dtype=torch.uint8)[:, None, None] & 1


def _label(record: Record) -> str:
    return record.label if record.label in LABELS else "benign"
