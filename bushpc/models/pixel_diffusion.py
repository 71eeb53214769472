"""DDPM on pixels, and with the mask as a further channel of its input: segmentation-guided diffusion (SGD).

Ho, Jain and Abbeel 2020; Konz et al., "Anatomically-Controllable Medical Image Generation with Segmentation-Guided
Diffusion Models", MICCAI 2024. Network, noise schedule and samplers are diffusers'.

    scan ─noise of step t→ x_t ─(with the mask)→ UNet ─→ noise;  generation: step after step back
"""

from __future__ import annotations

import typing as t

import torch
from torch.nn import functional as F

from bushpc.conditions import Caption, Condition
from bushpc.config import ModelConfig, config_class, setting
from bushpc.dist import keyed_seed
from bushpc.errors import ConfigError
from bushpc.models.base import Model
from bushpc.models.one_mask import require_multiple
from bushpc.nn.uncompiled import not_compiled
from bushpc.sample import Batch, Losses, Prediction

TIMESTEPS = 1000
SCORE_DRAWS = 4


@config_class
class PixelDiffusionConfig(ModelConfig):
    """Konz et al.'s values are the defaults."""

    image_size: int = setting(256, "Edge of the square images.", unit="pixels", ge=8)
    pretrained: bool = setting(False, "There are no weights to start from.")
    mask: bool = setting(True, "Whether the mask is a channel of the input (SGD); false is a plain DDPM.")
    channels: tuple[int, ...] = setting(
        (128, 128, 256, 256, 512, 512), "Channels of the UNet's levels; the last but one attends."
    )
    layers: int = setting(2, "Blocks of a level.", ge=1)
    groups: int = setting(32, "Groups of GroupNorm.", ge=1)
    steps: int = setting(50, "Steps of DDIM.", affects="predictions", ge=1, le=TIMESTEPS)

    def __post_init__(self) -> None:
        """Raises: ConfigError for sizes that do not divide."""
        super().__post_init__()
        stride = 2 ** (len(self.channels) - 1)
        if len(self.channels) < 2 or any(count % self.groups for count in self.channels):
            raise ConfigError(
                f"model.channels={list(self.channels)}: two or more multiples of model.groups={self.groups} are needed"
            )
        require_multiple(self.image_size, stride, "the UNet's stride")
        if TIMESTEPS % self.steps:
            raise ConfigError(f"model.steps={self.steps}: must divide {TIMESTEPS}")

    @property
    def needs(self) -> frozenset[str]:
        """Image and mask; the keys for the noise that a score draws."""
        return frozenset({"image_BCHW", "mask_BKHW", "keys"})

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Generators are asked with captions, which this one does not read."""
        return (Caption(),)


class PixelDiffusion(Model):
    """One mask class, three channels."""

    Config = PixelDiffusionConfig
    makes = frozenset({"scores"})

    config: PixelDiffusionConfig

    def __init__(self, config: PixelDiffusionConfig, weights_dir: str | None = None) -> None:
        from diffusers import DDIMScheduler
        from diffusers.models.unets.unet_2d import UNet2DModel

        super().__init__(config, weights_dir)
        levels = len(config.channels)
        down = ["DownBlock2D"] * levels
        down[-2] = "AttnDownBlock2D"
        self.unet = UNet2DModel(
            sample_size=config.image_size,
            in_channels=3 + config.mask,
            out_channels=3,
            layers_per_block=config.layers,
            block_out_channels=config.channels,
            norm_num_groups=config.groups,
            down_block_types=tuple(down),
            up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        )
        # clip_sample: pixels end in [-1, 1].
        self.scheduler = DDIMScheduler(num_train_timesteps=TIMESTEPS, timestep_spacing="trailing")

    def forward(self, batch: Batch) -> Losses:
        """Mean squared error of the predicted noise, term "mse"."""
        x_0 = 2 * batch.image_BCHW - 1
        t_B = torch.randint(TIMESTEPS, (len(x_0),))
        noise = torch.randn(x_0.shape, device=x_0.device)
        mse = F.mse_loss(self._noise(x_0, noise, t_B, batch.mask_BKHW), noise)
        return Losses(total=mse, terms={"mse": mse.detach()})

    def predict(self, batch: Batch) -> Prediction:
        """ "denoising_mse" of each held-out scan, with times and noise drawn by its key."""
        x_0 = 2 * batch.image_BCHW - 1
        generators = [torch.Generator().manual_seed(keyed_seed("denoising", key)) for key in batch.keys]
        stretch, errors_B = TIMESTEPS // SCORE_DRAWS, torch.zeros(len(x_0), device=x_0.device)
        for i in range(SCORE_DRAWS):
            t_B = torch.cat([i * stretch + torch.randint(stretch, (1,), generator=each) for each in generators])
            noise = torch.stack([torch.randn(x_0.shape[1:], generator=each) for each in generators]).to(x_0.device)
            errors_B += (self._noise(x_0, noise, t_B, batch.mask_BKHW) - noise).square().mean(dim=(1, 2, 3))
        return Prediction(scores={"denoising_mse": errors_B / SCORE_DRAWS})

    def _noise(self, x_0: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The noise that the network sees in x_t."""
        t_B = t_B.to(x_0.device)
        return self._predicted(self.scheduler.add_noise(x_0, noise, t_B), t_B, mask)

    def _predicted(self, x_t: torch.Tensor, t_B: torch.Tensor, mask_BKHW: torch.Tensor) -> torch.Tensor:
        given = torch.cat([x_t, mask_BKHW.to(x_t.dtype)], dim=1) if self.config.mask else x_t
        predicted: torch.Tensor = self.unet(given, t_B, return_dict=False)[0]
        return predicted.float()

    @not_compiled
    @torch.no_grad()
    def generate(self, mask_BHW: torch.Tensor, captions: list[str], seeds: list[int]) -> torch.Tensor:
        """B images, for SGD by mask: B x 3 x S x S, float32 in [0, 1]. captions: not read."""
        shape, scheduler = (3, self.config.image_size, self.config.image_size), self.scheduler
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        x_t = torch.stack(drawn).to(mask_BHW.device)
        scheduler.set_timesteps(self.config.steps)
        for step in scheduler.timesteps:
            predicted = self._predicted(x_t, t.cast(torch.Tensor, step.to(x_t.device)), mask_BHW[:, None])
            x_t = scheduler.step(predicted, step, x_t, return_dict=False)[0]
        return (x_t / 2 + 0.5).clamp(0, 1)
