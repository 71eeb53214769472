"""Hybrid attention network: a DenseNet encoder, attention at the bottleneck, enhanced skip connections.

Aslam, Naveed and Ahmed, "Hybrid Attention Network for Accurate Breast Tumor Segmentation in Ultrasound Images".
Equation numbers and symbols are the paper's. The layout (which convolutions, which widths) is worked out from the
parameter counts of its Table 2; `configs/model/hybrid_attention.yaml` has that calculation.

    image ─stem─┬─DB1─┬─DB2─┬─DB3─ conv, conv, SFEB, ConvBlock, TAM
                │     │     └─SFEB──────── up ┘
                │     └─SFEB────────────── up
                └─SFEB──────────────────── up, conv, 1x1 conv, bilinear → logits

Shape suffixes besides those of `bushpc.sample`: h, w a feature map's own height and width; N = h·w its positions;
n attention heads; D the length d_k of a query.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from bushpc import weights
from bushpc.config import WeightFile, config_class, setting
from bushpc.errors import ConfigError
from bushpc.losses.overlap import bce_loss, jaccard_loss
from bushpc.models.backbone import BackboneConfig
from bushpc.models.base import Model
from bushpc.nn.encoder import feature_channels, feature_extractor
from bushpc.sample import Batch, Losses, Prediction

ENCODER_STRIDES = [2, 4, 8, 16]  # of what the encoder gives to the image: three skip connections and the bottleneck


@config_class
class HybridAttentionConfig(BackboneConfig):
    """The paper's values are the defaults. `configs/model/hybrid_attention.yaml` lists what it leaves open."""

    image_size: int = setting(256, "Edge of the square input (4.1).", unit="pixels", ge=1)
    pretrained: bool = setting(
        True,
        "The encoder starts from staged ImageNet weights (3): `bushpc weights pull model=hybrid_attention`.",
    )
    conv_block: bool = setting(True, "Table 2: one more convolution at the bottleneck. Off: no parameters.")
    sfeb: bool = setting(True, "Table 2: spatial feature enhancement on the skip connections. Off: no parameters.")
    tam: bool = setting(True, "Table 2: the transformer attention module at the bottleneck. Off: no parameters.")
    encoder: str = setting(
        "densenet121.tv_in1k",
        "The encoder's name in timm, with features at strides 2, 4, 8 and 16: DenseNet121 (3) with timm's copy of "
        "torchvision's weights.",
    )
    decoder_channels: tuple[int, ...] = setting(
        (256, 256, 128, 64, 64),
        "Channels of bottleneck, three decoder stages, deepest first, and last 3 x 3 convolution. The paper does not "
        "give them; they follow from its parameter counts.",
    )
    sfeb_stride: int = setting(
        1,
        "Stride of the convolution (7); the paper names none, which means 1. Its output is only pooled over the whole "
        "map; 2 takes every second row and column of it and saves a tenth of a training step.",
        ge=1,
        le=2,
    )
    heads: int = setting(
        8, "Heads of (4), which share the bottleneck's positions among them. The paper does not give them.", ge=1
    )
    bce_weight: float = setting(1.0, "Weight of the cross-entropy of (18).", ge=0, lt=math.inf)
    jaccard_weight: float = setting(1.0, "Weight of the Jaccard loss of (18).", ge=0, lt=math.inf)

    def __post_init__(self) -> None:
        """Refuse combinations that cannot be built. Raises: ConfigError."""
        super().__post_init__()
        stride = ENCODER_STRIDES[-1]
        if self.image_size % stride:
            nearest = max(1, round(self.image_size / stride)) * stride
            raise ConfigError(
                f"image_size={self.image_size} is not a multiple of {stride}, the bottleneck's stride; "
                f"the nearest is {nearest}."
            )
        if len(self.decoder_channels) != 5 or min(self.decoder_channels) < 1:
            raise ConfigError(
                f"decoder_channels={list(self.decoder_channels)}; five numbers above 0 are needed: bottleneck, three "
                "stages, last convolution."
            )
        if self.tam and self.decoder_channels[0] % 2:
            raise ConfigError(
                f"decoder_channels={list(self.decoder_channels)}: the first must be even with tam=true, as half of a "
                "position's code tells its row and c' of (5) is c / 2."
            )
        positions = (self.image_size // stride) ** 2
        if self.tam and positions % self.heads:
            raise ConfigError(
                f"heads={self.heads} must divide the bottleneck's {positions} positions, (image_size / {stride})²."
            )
        if self.bce_weight + self.jaccard_weight == 0:
            raise ConfigError("model.bce_weight=0 and model.jaccard_weight=0 leave no loss: set one of them above 0")
        feature_channels(self.encoder, ENCODER_STRIDES)

    @property
    def backbone(self) -> str:
        """The encoder."""
        return self.encoder

    @property
    def least_images(self) -> int:
        """2 with SFEB, which normalises pooled features over the images of a batch, (11) and (13)."""
        return 2 if self.sfeb or self.image_size == ENCODER_STRIDES[-1] else 1

    @property
    def size_stride(self) -> int | None:
        """The bottleneck's stride; with TAM, which has learned positions, image_size alone."""
        return None if self.tam else ENCODER_STRIDES[-1]

    def weight_files(self) -> list[WeightFile]:
        """The encoder's ImageNet weights. Raises: ConfigError when timm has none."""
        return [WeightFile.of_timm(self.encoder)] if self.pretrained else []

    @property
    def blocks(self) -> tuple[type, ...]:
        """Stages of the encoder and the decoder, and what stands at the bottleneck."""
        from timm.models.densenet import DenseBlock
        from timm.models.resnet import BasicBlock, Bottleneck

        return DenseBlock, BasicBlock, Bottleneck, UpBlock, ConvBlock, TAM


class HybridAttention(Model):
    """U-Net-like segmentation network of one mask class; it reads no text."""

    Config = HybridAttentionConfig
    makes = frozenset({"prob_BKHW"})

    config: HybridAttentionConfig

    def __init__(self, config: HybridAttentionConfig, weights_dir: str | None = None) -> None:
        super().__init__(config, weights_dir)
        self.normalize = config.normalize()
        self.encoder, (*skips, deepest) = feature_extractor(config.encoder, ENCODER_STRIDES)
        for file in config.weight_files():
            _load_encoder(self.encoder, weights.load_staged(HybridAttention, file, weights_dir), file)
        c, *stages, last = config.decoder_channels
        size = config.image_size // ENCODER_STRIDES[-1]
        self.bottleneck = nn.Sequential(
            _conv(deepest, c),
            nn.ReLU(inplace=True),
            _conv(c, c),
            *([SFEB(c, config.sfeb_stride)] if config.sfeb else []),
            nn.ReLU(inplace=True),
            *([ConvBlock(c)] if config.conv_block else []),
            *([TAM(c, size, config.heads)] if config.tam else []),
        )
        self.decoder = nn.ModuleList(
            UpBlock(channels, skip, out, SFEB(out, config.sfeb_stride) if config.sfeb else nn.Identity())
            for channels, skip, out in zip([c, *stages], reversed(skips), stages, strict=False)
        )
        self.last = _conv(stages[-1], last)
        self.head = nn.Conv2d(last, 1, kernel_size=1)

    def backbone(self) -> nn.Module:
        """timm's network."""
        return self.encoder

    def cam_layer(self) -> nn.Module:
        """The last decoder stage; behind the convolution that follows it, the map would be the logits themselves."""
        return self.decoder[-1]

    def forward(self, batch: Batch) -> Losses:
        """Cross-entropy and Jaccard loss of the logits, weighted (18); terms "bce" and "jaccard"."""
        logits_BKHW = self._logits(batch)
        bce, jaccard = bce_loss(logits_BKHW, batch.mask_BKHW), jaccard_loss(logits_BKHW, batch.mask_BKHW)
        return Losses(
            total=self.config.bce_weight * bce + self.config.jaccard_weight * jaccard,
            terms={"bce": bce.detach(), "jaccard": jaccard.detach()},
        )

    def predict(self, batch: Batch) -> Prediction:
        """Probabilities in one pass. `Batch.mask_BKHW` is not read."""
        return Prediction(prob_BKHW=self._logits(batch).float().sigmoid())

    def _logits(self, batch: Batch) -> torch.Tensor:
        """B x 1 x H x W, before the sigmoid."""
        *skips, deepest = self.encoder(self.normalize(batch.image_BCHW, self.encoder))
        F_BChw = self.bottleneck(deepest)
        for stage, skip in zip(self.decoder, reversed(skips), strict=True):
            F_BChw = stage(F_BChw, skip)
        return _doubled(self.head(F.relu(self.last(F_BChw), inplace=True)))


class UpBlock(nn.Module):
    """Decoder stage: join what comes from below, at double its size, with the skip connection; refine by a convolution.

    A U-Net concatenates both and convolves; the convolution of a concatenation is the sum of one convolution each.
    Written as that sum, the skip connection has the stage's width where SFEB enhances it, which is what Table 2's
    counts ask for, and what comes from below can be convolved before it grows to four times the pixels.
    """

    def __init__(self, channels: int, skip_channels: int, out_channels: int, sfeb: nn.Module) -> None:
        super().__init__()
        self.from_below = _conv(channels, out_channels, bias=False)
        self.from_skip = _conv(skip_channels, out_channels)
        self.sfeb = sfeb
        self.refine = _conv(out_channels, out_channels)

    def forward(self, F_BChw: torch.Tensor, skip_BCHW: torch.Tensor) -> torch.Tensor:
        """B x channels x h x w and B x skip_channels x 2h x 2w to B x out_channels x 2h x 2w."""
        joined_BCHW = _doubled(self.from_below(F_BChw)) + self.sfeb(self.from_skip(skip_BCHW))
        return F.relu(self.refine(F.relu(joined_BCHW, inplace=True)), inplace=True)


class ConvBlock(nn.Sequential):
    """3 x 3 convolution, batch normalisation, ReLU; shape unchanged. The paper names it in Table 2 alone."""

    def __init__(self, channels: int) -> None:
        super().__init__(_conv(channels, channels), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


class SFEB(nn.Module):
    """Spatial feature enhancement block (6)-(15); shape unchanged.

    (8) and (9) are global, so P_o has no extent, and of the 3 x 3 convolution (11) only the centre meets anything
    but padding, as in Keras with padding="same". Pooling over channels instead, as CBAM does, would keep the extent
    but has 18 c weights where Table 2 counts 18 c². So F_em is one number per image and channel, added to I at
    every position: a global bias per channel, which shifts the threshold of the ReLU that follows.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        local = _conv(channels, channels, stride=stride)
        self.local = nn.Sequential(local, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        self.fuse = nn.Sequential(_conv(2 * channels, channels), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        self.gate = nn.Sequential(nn.Conv2d(channels, channels, kernel_size=1), nn.BatchNorm2d(channels), nn.Sigmoid())

    def forward(self, I_BChw: torch.Tensor) -> torch.Tensor:
        """F (15). Raises: ConfigError when training on a single image, which has no spread to normalise by."""
        if self.training and len(I_BChw) == 1:
            raise ConfigError(
                "SFEB normalises pooled features over the images of a batch, (11) and (13), and a rank got a single "
                "image in one part: use fewer ranks or a smaller train.accumulate, a larger train.batch_size, or "
                "model.sfeb=false."
            )
        I_1 = self.local(I_BChw)  # (7)
        P_o = torch.cat([I_1.amax(dim=(2, 3), keepdim=True), I_1.mean(dim=(2, 3), keepdim=True)], dim=1)  # (8)-(10)
        F_c = self.fuse(P_o)  # (11)
        F_cc = self.gate(I_BChw.mean(dim=(2, 3), keepdim=True))  # (12), (13)
        F_em = F_c * F_cc  # (14)
        enhanced: torch.Tensor = F_em + I_BChw  # (15)
        return enhanced


class TAM(nn.Module):
    """Transformer attention module (3.1): TSA, GSA and the input itself, concatenated; shape unchanged.

    A 1 x 1 convolution takes the three back to c channels, which is the shape that the paper gives of F_out.
    """

    def __init__(self, channels: int, size: int, heads: int) -> None:
        super().__init__()
        self.tsa = TSA(channels, size, heads)
        self.gsa = GSA(channels)
        self.merge = nn.Conv2d(3 * channels, channels, kernel_size=1)

    def forward(self, F_BChw: torch.Tensor) -> torch.Tensor:
        F_out: torch.Tensor = self.merge(torch.cat([self.tsa(F_BChw), self.gsa(F_BChw), F_BChw], dim=1))
        return F_out


class TSA(nn.Module):
    """Transformer self-attention (1)-(4) between channels, with learned positions; shape unchanged.

    Tokens are the c channels, so each head's map A is c x c; the heads share out the positions, row by row, and
    d_k is a head's number of positions. A channel attention does not know positions: half of a position's code
    stands for its row and half for its column, concatenated and added to F.
    """

    def __init__(self, channels: int, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.row = nn.Parameter(0.02 * torch.randn(channels // 2, size, 1))
        self.column = nn.Parameter(0.02 * torch.randn(channels // 2, 1, size))
        self.W_q = nn.Conv2d(channels, channels, kernel_size=1, bias=False)
        self.W_k = nn.Conv2d(channels, channels, kernel_size=1, bias=False)
        self.W_v = nn.Conv2d(channels, channels, kernel_size=1, bias=False)

    def forward(self, F_BChw: torch.Tensor) -> torch.Tensor:
        size = self.row.shape[1]
        position_Chw = torch.cat([self.row.expand(-1, -1, size), self.column.expand(-1, size, -1)])
        F_BChw = F_BChw + position_Chw.to(F_BChw.dtype)
        Q, K, V = (self._by_head(W(F_BChw)) for W in (self.W_q, self.W_k, self.W_v))  # (1), (2), (3)
        A_BnCD = F.scaled_dot_product_attention(Q, K, V)  # (4)
        return A_BnCD.transpose(1, 2).reshape(F_BChw.shape)

    def _by_head(self, map_BChw: torch.Tensor) -> torch.Tensor:
        """B x c x h x w → B x n x c x D, D = h·w / n."""
        return map_BChw.flatten(2).unflatten(2, (self.heads, -1)).transpose(1, 2).contiguous()


class GSA(nn.Module):
    """Global spatial attention (5): every position gathers F^c from all positions; shape unchanged.

    The (h·w) x (h·w) map is never written down: scaled_dot_product_attention folds it into the sum. Its kernels that do
    want values as wide as queries, and c' = c / 2, so F^c goes in as two halves of c' channels under one map; and
    they want each position's numbers side by side in memory, here and in TSA, or it silently writes the map down.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.F_1 = nn.Conv2d(channels, channels // 2, kernel_size=1)
        self.F_2 = nn.Conv2d(channels, channels // 2, kernel_size=1)
        self.F_c = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, F_BChw: torch.Tensor) -> torch.Tensor:
        F_1, F_2, F_c = (_halves(W(F_BChw), F_BChw.shape[1] // 2) for W in (self.F_1, self.F_2, self.F_c))
        gathered = F.scaled_dot_product_attention(F_1.expand_as(F_c), F_2.expand_as(F_c), F_c)
        return gathered.transpose(2, 3).reshape(F_BChw.shape)


def _halves(map_BChw: torch.Tensor, width: int) -> torch.Tensor:
    """B x c x h x w → B x c / width x N x width: what scaled_dot_product_attention takes for heads."""
    return map_BChw.flatten(2).unflatten(1, (-1, width)).transpose(2, 3).contiguous()


def _conv(channels: int, out_channels: int, bias: bool = True, stride: int = 1) -> nn.Conv2d:
    """3 x 3, padded, with He's initialisation: most have no batch normalisation to mend the scale."""
    conv = nn.Conv2d(channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=bias)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _doubled(F_BChw: torch.Tensor) -> torch.Tensor:
    return F.interpolate(F_BChw, scale_factor=2, mode="bilinear", align_corners=False)


def _load_encoder(encoder: nn.Module, state: dict[str, torch.Tensor], file: WeightFile) -> None:
    """Load what `encoder` has of a whole network's `state`. Raises: WeightsError naming what does not fit."""
    # A feature extractor is flat: what is `features.denseblock1` in a DenseNet is its `features_denseblock1`.
    flat = {name.replace("features.", "features_", 1): tensor for name, tensor in state.items()}
    own = encoder.state_dict()
    with weights.fits(HybridAttention, file):
        encoder.load_state_dict({name: tensor for name, tensor in flat.items() if name in own}, strict=True)
