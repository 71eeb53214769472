"""Random changes of image and mask together, keyed by (seed, epoch, sample): the same on any rank or worker."""

from __future__ import annotations

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from bushpc.config import AugmentConfig
from bushpc.dist import keyed_seed


class Augment:
    """Applies `configs/config.yaml: augment` with torchvision's v2 transforms.

    A call draws from torch's CPU generator, seeded from `key` and restored afterwards, so that the trainer's own
    random numbers do not depend on how many samples were loaded in its process.
    """

    def __init__(self, config: AugmentConfig) -> None:
        steps: list[torch.nn.Module] = []
        if config.hflip:
            steps.append(v2.RandomHorizontalFlip(config.hflip))
        if config.rotate or config.zoom:
            steps.append(v2.RandomAffine(config.rotate, scale=(1 - config.zoom, 1 + config.zoom)))
        if config.brightness or config.contrast:
            steps.append(v2.ColorJitter(brightness=config.brightness, contrast=config.contrast))
        self.transform = v2.Compose(steps) if steps else None

    def __call__(
        self, image_CHW: torch.Tensor, mask_1HW: torch.Tensor, key: tuple[int | str, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 image and mask in, uint8 image and mask out, of the same shapes."""
        if self.transform is None:
            return image_CHW, mask_1HW
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed(*key))
            image, mask = self.transform(tv_tensors.Image(image_CHW), tv_tensors.Mask(mask_1HW))
        return image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor)
