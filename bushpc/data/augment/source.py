"""Where each output pixel of a change comes from: the same numbers for a worker's warp and the device's."""

from __future__ import annotations

import math

import torch

from bushpc.data.augment.change import Change, basis, fan_radius


def source_of(change: Change, edge: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """x and y of the source for every output pixel, float32: elastic deformation, fan and affine map in one."""
    at = torch.arange(edge, dtype=torch.float32, device=device)
    x, y = at[None, :].expand(edge, edge), at[:, None].expand(edge, edge)
    if change.nodes_2NN is not None:
        nodes_2NN = torch.from_numpy(change.nodes_2NN).to(device)
        weights = torch.from_numpy(basis(edge, nodes_2NN.shape[1])).to(device)
        across, down = weights @ nodes_2NN @ weights.T
        x, y = x + across, y + down
    if change.fan:
        probe, depth = fan_radius(change.fan, edge)
        across, down = x + (0.5 - edge / 2), y + (0.5 + probe * math.cos(change.fan))
        x = torch.atan2(across, down) * (edge / 2 / change.fan) + (edge / 2 - 0.5)
        y = (torch.hypot(across, down) - probe) * (edge / depth) - 0.5
    if change.source is not None:
        a, b, c, d, e, f = change.source
        x, y = a * x + b * y + c, d * x + e * y + f
    return x, y
