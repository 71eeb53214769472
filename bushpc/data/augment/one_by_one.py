"""augment.method=torchvision: torchvision's v2 transforms one after the other, as every run before November 2026.

Kept so that those runs continue with the same pixels. Nothing is added here.
"""

from __future__ import annotations

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from bushpc.config import AugmentConfig

Pair = tuple[torch.Tensor, torch.Tensor]


class OneByOne:
    """The `augment` settings at a fraction `strength` of their full strength.

    A call draws from torch's CPU generator, seeded by sample and turn and restored afterwards, so the trainer's own
    random numbers do not depend on how many samples its process loads.
    """

    def __init__(self, config: AugmentConfig, strength: float) -> None:
        steps: list[torch.nn.Module] = []
        if config.hflip * strength:
            steps.append(v2.RandomHorizontalFlip(config.hflip * strength))
        if (config.rotate or config.zoom) and strength:
            zoom = config.zoom * strength
            steps.append(v2.RandomAffine(config.rotate * strength, scale=(1 - zoom, 1 + zoom)))
        if (config.brightness or config.contrast) and strength:
            steps.append(v2.ColorJitter(brightness=config.brightness * strength, contrast=config.contrast * strength))
        self.transform = v2.Compose(steps) if steps else None

    def __call__(self, image_CHW: torch.Tensor, mask_KHW: torch.Tensor, seed: int) -> Pair:
        """uint8 both. seed: of this sample and turn."""
        if self.transform is None:
            return image_CHW, mask_KHW
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            image, mask = self.transform(tv_tensors.Image(image_CHW), tv_tensors.Mask(mask_KHW))
        return image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor)
