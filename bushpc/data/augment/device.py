"""Changes → pixels of a whole batch, on the device (augment.where=device).

    Batch with changes ─changed→ Batch as the workers would have made it

The same draws and the same steps as in pixels.py; a pixel differs by rounding, so by one grey level at most.
"""

from __future__ import annotations

import functools
import typing as t
from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional as F

from bushpc.data.augment.change import SIGNAL, Change, Window, noise_field, speckle_field
from bushpc.data.augment.kernels import SMOOTH, blur_kernel, kept_rows
from bushpc.data.augment.source import source_of
from bushpc.sample import Batch

UNCHANGED = np.arange(256, dtype=np.uint8)


def changed(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with its changes applied on `device`; as it is where it has none."""
    if batch.changes is None:
        return batch
    channels = batch.image_BCHW.shape[1]
    one = channels > 1 and batch.image_BCHW.stride(1) == 0  # grey scans travel as one channel
    image_BCHW = (batch.image_BCHW[:, :1] if one else batch.image_BCHW).to(device, non_blocking=True)
    mask_BKHW = batch.mask_BKHW.to(device, non_blocking=True)
    image_BCHW, mask_BKHW = apply(batch.changes, image_BCHW, mask_BKHW)
    if one:
        image_BCHW = image_BCHW.expand(-1, channels, -1, -1)
    return replace(batch, image_BCHW=image_BCHW, mask_BKHW=mask_BKHW, changes=None)


def apply(
    changes: t.Sequence[Change], image_BCHW: torch.Tensor, mask_BKHW: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and masks are uint8 before and after, and square."""
    device = image_BCHW.device
    if any(change.table is not None for change in changes):
        tables = np.stack([UNCHANGED if change.table is None else change.table for change in changes])
        levels = image_BCHW.flatten(1).long()
        image_BCHW = torch.from_numpy(tables).to(device).gather(1, levels).view_as(image_BCHW)
    image = image_BCHW.float()
    if any(change.moves for change in changes):
        grid_BHW2 = _grid(changes, image.shape[-1], device)
        image = F.grid_sample(image, grid_BHW2, mode="bilinear", padding_mode="zeros", align_corners=False)
        masks = F.grid_sample(mask_BKHW.float(), grid_BHW2, mode="nearest", padding_mode="zeros", align_corners=False)
        mask_BKHW = masks.to(torch.uint8)
    for i, change in enumerate(changes):
        if change.filters:
            image[i] = _filtered(change, image[i : i + 1])[0]
    return image.round_().clamp_(0, 255).to(torch.uint8), mask_BKHW


def _grid(changes: t.Sequence[Change], edge: int, device: torch.device) -> torch.Tensor:
    """Where each output pixel comes from, in grid_sample's unit: -1 and 1 are the image's outer edges."""
    places = [torch.stack(source_of(change, edge, device), dim=-1) for change in changes]
    return (2 * torch.stack(places) + 1) / edge - 1


def _filtered(change: Change, image_1CHW: torch.Tensor) -> torch.Tensor:
    """As pixels.filtered, step by step."""
    edge, device = image_1CHW.shape[-1], image_1CHW.device
    channels = image_1CHW.shape[1]

    def here(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    if change.shadow is not None:
        down, across = map(here, change.shadow.profiles(edge, edge))
        image_1CHW = image_1CHW * (1 - down[:, None] * across)
    if change.speckle is not None:
        image_1CHW = image_1CHW * (1 + _cut("speckle", change.speckle, edge, device))
    for gain in (
        None if change.gain_H is None else here(change.gain_H)[:, None],
        None if change.gain_W is None else here(change.gain_W)[None],
    ):
        if gain is not None:
            image_1CHW = image_1CHW + gain * (image_1CHW * (1 / SIGNAL)).clamp(max=1)
    if change.noise is not None:
        image_1CHW = image_1CHW + _cut("noise", change.noise, edge, device)
    if change.blur is not None:
        across, down = (here(blur_kernel(sigma)) for sigma in change.blur)
        reach = len(across) // 2, len(across) // 2, len(down) // 2, len(down) // 2
        each = F.pad(image_1CHW, reach, mode="reflect").transpose(0, 1)
        image_1CHW = F.conv2d(F.conv2d(each, across[None, None, None]), down[None, None, :, None]).transpose(0, 1)
    if change.lowres:
        rows = here(kept_rows(edge, change.lowres))
        small = image_1CHW[..., rows, :][..., rows]
        image_1CHW = F.interpolate(small, (edge, edge), mode="bicubic", align_corners=False)
    if change.sharpness != 1:
        smooth = image_1CHW.clone()
        kernel = here(SMOOTH)[None, None].expand(channels, 1, 3, 3)
        smooth[..., 1:-1, 1:-1] = F.conv2d(image_1CHW, kernel, groups=channels)
        image_1CHW = smooth + (image_1CHW - smooth) * change.sharpness
    return image_1CHW


def _cut(kind: str, window: Window, edge: int, device: torch.device) -> torch.Tensor:
    field = _field(kind, edge, device)
    return field[window.top : window.top + edge, window.left : window.left + edge] * window.factor


@functools.lru_cache(maxsize=4)
def _field(kind: str, edge: int, device: torch.device) -> torch.Tensor:
    fields = {"speckle": speckle_field, "noise": noise_field}
    return torch.from_numpy(fields[kind](edge)).to(device)
