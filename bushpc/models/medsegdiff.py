"""MedSegDiff: a denoising U-Net whose deepest map learns from an encoder of the image, which reads its noisy maps.

Wu et al., "MedSegDiff: Medical Image Segmentation with Diffusion Probabilistic Model" (MIDL 2023), version 1. Symbols
are the paper's: m_x are the U-Net's maps, m_I those of the image's encoder, A the FF-Parser's attentive map. The noise,
its schedule and the samplers are those of bushpc.nn.diffusion; the U-Net is diffusers' UNet2DModel.

    x_t, image ─→ level ─m_x─→ level ─m_x─→ … ─→ + ─→ middle, decoder ─→ epsilon ─→ x'_0 ─→ … ─→ mask
                           ↓ FF-Parser   ↓           ↑
    image      ─→ level ─m_I · ─→ level ─m_I · ─→ … ─┘

Shape suffixes besides those of `bushpc.sample`: h, w a feature map's own height and width.
"""

from __future__ import annotations

import itertools
import typing as t

import torch
import typing_extensions as te
from torch import nn
from torch.nn import functional as F

from bushpc.config import config_class, setting
from bushpc.errors import ConfigError
from bushpc.models.backbone import BackboneConfig
from bushpc.models.base import Model
from bushpc.models.one_mask import require_multiple
from bushpc.nn.diffusion import Noising, as_prob, check_steps, draw_noise, follow_timesteps, reverse
from bushpc.sample import Batch, Losses, Prediction


@config_class
class MedSegDiffConfig(BackboneConfig):
    """The authors' released configuration is the default, unless a field says otherwise."""

    image_size: int = setting(
        256, "Edge of the square input; a multiple of the deepest level's stride.", unit="pixels", ge=1
    )
    pretrained: bool = setting(False, "The network is trained from scratch.")
    widths: tuple[int, ...] = setting(
        (128, 128, 256, 256, 512, 512),
        "Channels of the levels of U-Net and image encoder, each at half the resolution of the one before.",
    )
    depth: int = setting(2, "Residual blocks per level.", ge=1)
    attention: tuple[int, ...] = setting(
        (4,), "Levels of the U-Net with self-attention, counted from 0; the middle always has it."
    )
    groups: int = setting(32, "Groups of GroupNorm, which divide every width.", ge=1)
    dynamic: bool = setting(
        True,
        "Dynamic conditional encoding: the image's encoder reads the U-Net's maps. false: it reads the image alone.",
    )
    ff_parser: bool = setting(True, "FF-Parser: a learned filter of the maps' frequencies; needs dynamic.")
    timesteps: int = setting(1000, "T.", ge=1)
    beta_schedule: t.Literal["linear", "cosine"] = setting("linear", "Schedule of the noise.")
    scaled_betas: bool | None = setting(
        None,
        "Whether the linear schedule's betas are multiplied by 1000 / T, so that x_T is noise. With another T, null "
        "becomes true when a command is composed; in the frozen config of an earlier version it stands for false.",
        since=5,
    )
    prediction: t.Literal["epsilon", "v"] = setting("epsilon", "What the U-Net predicts; epsilon in the paper.")
    sampler: t.Literal["ddpm", "ddim", "dpm_solver"] = setting(
        "dpm_solver",
        "`ddpm`, `ddim` (eta = 0) or `dpm_solver` (DPM-Solver++ of second order). The paper samples by ddpm; the "
        "authors' code offers DPM-Solver for speed.",
        affects="predictions",
    )
    steps: int = setting(50, "Steps of the sampler. For ddpm and ddim they must divide T.", affects="predictions", ge=1)
    samples: int = setting(
        5,
        "Draws of noise per image; the prediction is their mean, and their deviation the uncertainty. The paper fuses "
        "25 by STAPLE.",
        affects="predictions",
        ge=1,
    )
    sampling_seed: int = setting(
        0, "Seed of that noise, which depends on this and on the sample's key alone.", affects="predictions"
    )

    def __post_init__(self) -> None:
        """Refuse combinations that cannot be built or sampled. Raises: ConfigError."""
        super().__post_init__()
        if self.pretrained:
            raise ConfigError("model.pretrained=true: MedSegDiff is trained from scratch; set model.pretrained=false")
        if len(self.widths) < 2 or any(width < 1 or width % self.groups for width in self.widths):
            raise ConfigError(
                f"model.widths={list(self.widths)}: two or more multiples of model.groups={self.groups} are needed"
            )
        require_multiple(
            self.image_size, 1 << len(self.widths) - 1, f"the stride of the deepest of {len(self.widths)} levels"
        )
        if any(not 0 <= level < len(self.widths) for level in self.attention):
            raise ConfigError(f"model.attention={list(self.attention)}: levels are 0 to {len(self.widths) - 1}")
        if self.ff_parser and not self.dynamic:
            raise ConfigError(
                "model.ff_parser=true with model.dynamic=false: the image's encoder reads no map that could be "
                "filtered; set model.ff_parser=false as well"
            )
        check_steps(self)

    def follow_network(self) -> te.Self:
        """And with betas that follow T."""
        return follow_timesteps(super().follow_network())

    @property
    def needs(self) -> frozenset[str]:
        """Image and mask; the keys for the noise that a prediction draws."""
        return frozenset({"image_BCHW", "mask_BKHW", "keys"})

    @property
    def backbone(self) -> None:
        """There is none."""
        return None

    @property
    def blocks(self) -> tuple[type, ...]:
        """Residual blocks."""
        from diffusers.models.resnet import ResnetBlock2D

        return (ResnetBlock2D,)


class MedSegDiff(Model):
    """Segmentation by denoising; one mask class."""

    Config = MedSegDiffConfig
    makes = frozenset({"prob_BKHW"})

    config: MedSegDiffConfig

    def __init__(self, config: MedSegDiffConfig, weights_dir: str | None = None) -> None:
        super().__init__(config, weights_dir)
        self.normalize = config.normalize()
        self.net = ConditionedUNet(config)
        self.noising = Noising(config)

    def forward(self, batch: Batch) -> Losses:
        """The mean squared error of the predicted noise; term "mse"."""
        x_0 = 2 * batch.mask_BKHW - 1
        # On the CPU, where the schedule is; torch's generator there is seeded by step and rank too.
        t_B = torch.randint(self.config.timesteps, (len(x_0),))
        noise_BKHW = torch.randn_like(x_0)
        x_t = self.noising.noised(x_0, noise_BKHW, t_B)
        target = noise_BKHW if self.config.prediction == "epsilon" else self.noising.velocity(x_0, noise_BKHW, t_B)
        mse = F.mse_loss(self.net(x_t, t_B, self.normalize(batch.image_BCHW, self.net)).float(), target)
        return Losses(total=mse, terms={"mse": mse.detach()})

    def predict(self, batch: Batch) -> Prediction:
        """Probabilities: the mean over `samples`; with several of them their deviation too.

        Each sample's noise is drawn from its key and `sampling_seed`, so it is the same in any batch, on any rank and
        after a resume. `Batch.mask_BKHW` is not read.
        """
        config, net, images = self.config, self.net, batch.image_BCHW
        x_T, generators = draw_noise(config, batch.keys, (1, *images.shape[2:]), images.device)
        image_BCHW = self.normalize(images, net).repeat_interleave(config.samples, dim=0)
        prob = as_prob(reverse(config, self.noising, lambda x, t_1: net(x, t_1, image_BCHW), x_T, generators))
        if config.samples == 1:
            return Prediction(prob_BKHW=prob)
        prob_BnKHW = prob.unflatten(0, (-1, config.samples))
        return Prediction(prob_BKHW=prob_BnKHW.mean(dim=1), uncertainty_BKHW=prob_BnKHW.std(dim=1, correction=0))


class ConditionedUNet(nn.Module):
    """epsilon_theta: the U-Net reads x_t and the image, the encoder the image and the U-Net's maps."""

    def __init__(self, config: MedSegDiffConfig) -> None:
        super().__init__()
        widths = config.widths
        self.unet = build_unet(config)
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            ImageLevel(given, made, config.depth, config.groups, last=made_at == len(widths) - 1)
            for made_at, (given, made) in enumerate(itertools.pairwise((widths[0], *widths)))
        )
        filtered = widths[:-1] if config.ff_parser else ()
        self.parsers = nn.ModuleList(FFParser(c, config.image_size >> i + 1) for i, c in enumerate(filtered))
        self.dynamic = config.dynamic

    def forward(self, x_t: torch.Tensor, t_B: torch.Tensor, image_BCHW: torch.Tensor) -> torch.Tensor:
        """B x 1 x H x W, the image normalised; t_B: B times, or one for all."""
        unet = self.unet
        e_t = unet.time_embedding(unet.time_proj(t_B.to(x_t.device).expand(len(x_t))).to(image_BCHW.dtype))
        m_x = unet.conv_in(torch.cat([image_BCHW, x_t.to(image_BCHW.dtype)], dim=1))
        m_I, skips = self.stem(image_BCHW), (m_x,)
        for level, (down, image_level) in enumerate(zip(unet.down_blocks, self.levels, strict=True)):
            m_x, maps = down(hidden_states=m_x, temb=e_t)
            skips += maps
            m_I = image_level(m_I)
            if self.dynamic and level < len(self.levels) - 1:  # maps at half the level's resolution
                m_I = attentive_fusion(m_I, self.parsers[level](m_x) if self.parsers else m_x)
        x = unet.mid_block(m_x + m_I, e_t)
        for up in unet.up_blocks:
            count = len(up.resnets)
            x = up(x, skips[-count:], e_t)
            skips = skips[:-count]
        return t.cast(torch.Tensor, unet.conv_out(unet.conv_act(unet.conv_norm_out(x))))


class ImageLevel(nn.Module):
    """A level of the image's encoder: residual blocks, then half the resolution but at the last."""

    def __init__(self, given: int, made: int, depth: int, groups: int, *, last: bool) -> None:
        from diffusers.models.resnet import ResnetBlock2D

        super().__init__()
        self.blocks = nn.ModuleList(
            ResnetBlock2D(in_channels=made if i else given, out_channels=made, temb_channels=None, groups=groups)  # type: ignore[arg-type]
            for i in range(depth)
        )
        self.down = nn.Identity() if last else nn.Conv2d(made, made, 3, stride=2, padding=1)

    def forward(self, m_I: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            m_I = block(m_I, None)
        return t.cast(torch.Tensor, self.down(m_I))


class FFParser(nn.Module):
    """A learned complex factor A for every frequency of every channel; shape unchanged."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.A = nn.Parameter(0.02 * torch.randn(channels, size, size // 2 + 1, 2))

    def forward(self, m_x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(m_x.device.type, enabled=False):  # no transform of half-precision numbers
            M = torch.fft.rfft2(m_x.float(), norm="ortho") * torch.view_as_complex(self.A.float())
            return torch.fft.irfft2(M, s=m_x.shape[2:], norm="ortho").to(m_x.dtype)


def attentive_fusion(m_I: torch.Tensor, m_x: torch.Tensor) -> torch.Tensor:
    """LN(m_I) LN(m_x) m_I, each map normalised as a whole; shape unchanged."""
    shape = m_I.shape[1:]
    return F.layer_norm(m_I, shape) * F.layer_norm(m_x, shape) * m_I


def build_unet(config: MedSegDiffConfig) -> t.Any:
    """diffusers' network with the layers of the released one: image and x_t in, one map out."""
    from diffusers import UNet2DModel

    levels = range(len(config.widths))
    down = tuple("AttnDownBlock2D" if level in config.attention else "DownBlock2D" for level in levels)
    up = tuple("AttnUpBlock2D" if level in config.attention else "UpBlock2D" for level in reversed(levels))
    return UNet2DModel(
        sample_size=config.image_size,
        in_channels=4,
        out_channels=1,
        layers_per_block=config.depth,
        block_out_channels=config.widths,
        down_block_types=down,
        up_block_types=up,
        attention_head_dim=None,  # one head
        norm_num_groups=config.groups,
        flip_sin_to_cos=True,
    )
