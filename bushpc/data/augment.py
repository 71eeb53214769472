"""Random changes of image and mask together, keyed by (seed, sample, turn): the same on any rank or worker."""

from __future__ import annotations

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from bushpc.config import AugmentConfig
from bushpc.dist import keyed_seed
from bushpc.sample import LABELS
from bushpc.shards.manifest import Record


class Augment:
    """Applies `configs/config.yaml: augment` with torchvision's v2 transforms, by label as strong as `strength` says.

    A call draws from torch's CPU generator, seeded from its sample and turn and restored afterwards, so that the
    trainer's own random numbers do not depend on how many samples were loaded in its process.
    """

    def __init__(self, config: AugmentConfig) -> None:
        self.variants = config.variants
        self._by_label = {label: _transform(config, getattr(config.strength, label)) for label in LABELS}

    def variant(self, turn: int) -> int:
        """Which of a sample's changes it gets when it was drawn `turn` times before."""
        return turn % self.variants if self.variants else turn

    def __call__(
        self, image_CHW: torch.Tensor, mask_KHW: torch.Tensor, record: Record, seed: int, turn: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 image and mask in, uint8 image and mask out, of the same shapes."""
        transform = self._by_label[record.label if record.label in LABELS else "benign"]
        if transform is None:
            return image_CHW, mask_KHW
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed(seed, "augment", self.variant(turn), record.key))
            image, mask = transform(tv_tensors.Image(image_CHW), tv_tensors.Mask(mask_KHW))
        return image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor)


def _transform(config: AugmentConfig, strength: float) -> v2.Compose | None:
    """All changes at a share of their full strength; None where nothing is left of them."""
    steps: list[torch.nn.Module] = []
    if config.hflip * strength:
        steps.append(v2.RandomHorizontalFlip(config.hflip * strength))
    if (config.rotate or config.zoom) and strength:
        zoom = config.zoom * strength
        steps.append(v2.RandomAffine(config.rotate * strength, scale=(1 - zoom, 1 + zoom)))
    if (config.brightness or config.contrast) and strength:
        steps.append(v2.ColorJitter(brightness=config.brightness * strength, contrast=config.contrast * strength))
    return v2.Compose(steps) if steps else None
