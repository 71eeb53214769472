"""Random augmentation of image and mask, keyed by (seed, sample, turn): the same on any rank or worker."""

from __future__ import annotations

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from bushpc.config import AugmentConfig
from bushpc.dist import keyed_seed
from bushpc.sample import LABELS
from bushpc.shards.manifest import Record


class Augment:
    """Applies the `augment` settings with torchvision's v2 transforms; `strength` scales them by label.

    A call draws from torch's CPU generator, seeded by sample and turn and restored afterwards, so the trainer's own
    random numbers do not depend on how many samples its process loads.
    """

    def __init__(self, config: AugmentConfig) -> None:
        self.variants = config.variants
        self._by_label = {label: _transform(config, getattr(config.strength, label)) for label in LABELS}

    def variant(self, turn: int) -> int:
        """The variant of a sample that was drawn `turn` times before."""
        return turn % self.variants if self.variants else turn

    def __call__(
        self, image_CHW: torch.Tensor, mask_KHW: torch.Tensor, record: Record, seed: int, turn: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment image and mask; both are uint8 and keep their shapes."""
        transform = self._by_label[record.label if record.label in LABELS else "benign"]
        if transform is None:
            return image_CHW, mask_KHW
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed(seed, "augment", self.variant(turn), record.key))
            image, mask = transform(tv_tensors.Image(image_CHW), tv_tensors.Mask(mask_KHW))
        return image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor)


def _transform(config: AugmentConfig, strength: float) -> v2.Compose | None:
    """All transforms at a fraction of their full strength; None if none is left."""
    steps: list[torch.nn.Module] = []
    if config.hflip * strength:
        steps.append(v2.RandomHorizontalFlip(config.hflip * strength))
    if (config.rotate or config.zoom) and strength:
        zoom = config.zoom * strength
        steps.append(v2.RandomAffine(config.rotate * strength, scale=(1 - zoom, 1 + zoom)))
    if (config.brightness or config.contrast) and strength:
        steps.append(v2.ColorJitter(brightness=config.brightness * strength, contrast=config.contrast * strength))
    return v2.Compose(steps) if steps else None
