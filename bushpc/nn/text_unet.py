"""Blocks of XBusNet's local branch: a U-Net with transformer blocks, whose channels follow a sentence.

`bushpc.models.xbusnet` builds them as the paper's section 2 has them, `bushpc.models.xbusnet_released` as the authors'
code does.
"""

from __future__ import annotations

import torch
from torch import nn

from bushpc.nn.conv import ConvPair

ENCODER_STRIDES = [2, 4, 8, 16, 32]  # of enc1 to enc5 to the image; skip connections fit if the last divides it


class SFA(nn.Module):
    """Semantic feature adjustment, section 2.9: channels scaled and shifted by what a sentence says.

    width: of the hidden layer; None is text_dim.
    neutral: the last layer starts at zero, so gamma = beta = 0 and F_out = F: training starts from the network
        without text and takes up the sentence as far as it helps, instead of from randomly scaled features.
    """

    def __init__(self, channels: int, text_dim: int, *, width: int | None = None, neutral: bool = True) -> None:
        super().__init__()
        width = width or text_dim
        first, last = nn.Linear(text_dim, width), nn.Linear(width, 2 * channels)
        if neutral:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(first, nn.ReLU(), last)

    def forward(self, F_BChw: torch.Tensor, e_BE: torch.Tensor) -> torch.Tensor:
        """F_out (15), of the shape of F_BChw; e_BE (B x E) is cast to its type."""
        z = self.mlp(e_BE.to(F_BChw.dtype))  # (14)
        gamma, beta = z[:, :, None, None].chunk(2, dim=1)
        F_out: torch.Tensor = gamma * F_BChw + beta + F_BChw  # (13), (15)
        return F_out


class TransformerBlock(nn.Module):
    """TrEnc of (10): a transformer layer over the positions of a feature map, shape unchanged.

    pre_norm: with GELU and its norms before attention and MLP; otherwise torch's default layer, with ReLU and norms
        behind them. dropout: of attention, MLP and both sums.
    """

    def __init__(self, channels: int, heads: int, *, pre_norm: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            channels,
            heads,
            4 * channels,
            dropout=dropout,
            activation="gelu" if pre_norm else "relu",
            batch_first=True,
            norm_first=pre_norm,
        )

    def forward(self, F_BChw: torch.Tensor) -> torch.Tensor:
        tokens_BNC = F_BChw.flatten(2).transpose(1, 2)
        attended_BNC: torch.Tensor = self.layer(tokens_BNC)
        return attended_BNC.transpose(1, 2).reshape(F_BChw.shape)


class UpBlock(nn.Module):
    """U-Net decoder step: double the size, join the skip connection, two 3 x 3 convolutions.

    bias: of the convolutions, which batch normalisation takes away again.
    """

    def __init__(self, channels: int, skip_channels: int, out_channels: int, *, bias: bool = False) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, out_channels, kernel_size=2, stride=2)
        self.merge = ConvPair(out_channels + skip_channels, out_channels, out_channels, bias=bias)

    def forward(self, F_BChw: torch.Tensor, skip_BCHW: torch.Tensor) -> torch.Tensor:
        merged: torch.Tensor = self.merge(torch.cat([skip_BCHW, self.up(F_BChw)], dim=1))
        return merged
