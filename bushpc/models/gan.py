"""GAN, CGAN and DCGAN with mask conditioning, as the tumor generation paper's Table 1 compares them.

Goodfellow et al. 2014 (fully connected), Mirza and Osindero 2014 (and the label), Radford et al. 2016 (convolutions).
The paper says only that all were reimplemented "with mask conditioning"; sizes and losses here are those of these
publications, with the non-saturating loss.

    noise, mask, label ─G→ image ─┐
    scan, mask, label ────────────┴─D→ logit

Both players are trained in one step of the common loop: the generator's loss sees D through detached weights, so each
player's gradients are of its own loss alone.
"""

from __future__ import annotations

import itertools
import typing as t

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from bushpc.conditions import Caption, Condition
from bushpc.config import ModelConfig, config_class, setting
from bushpc.errors import ConfigError
from bushpc.models.base import Model
from bushpc.nn.uncompiled import not_compiled
from bushpc.sample import Batch, Losses, Prediction

SMALLEST = 4  # edge of DCGAN's deepest map
LABELS = 2


@config_class
class GanConfig(ModelConfig):
    """Settings of the three."""

    image_size: int = setting(64, "Edge of the square images; a power of two from 8 on.", unit="pixels", ge=8)
    pretrained: bool = setting(False, "There are no weights to start from.")
    kind: t.Literal["gan", "cgan", "dcgan"] = setting("dcgan", "gan, cgan (also conditioned on the label) or dcgan.")
    width: int = setting(64, "Channels of dcgan's largest map; of the others a hidden layer has 8 times as many.", ge=1)
    noise: int = setting(100, "Values of the noise (Radford et al.).", ge=1)

    def __post_init__(self) -> None:
        """Raises: ConfigError for an edge that the convolutions cannot reach."""
        super().__post_init__()
        if self.image_size & (self.image_size - 1):
            nearest = 2 ** round(torch.tensor(float(self.image_size)).log2().item())
            raise ConfigError(f"model.image_size={self.image_size}: must be a power of two, such as {nearest}")

    @property
    def needs(self) -> frozenset[str]:
        """Image, mask and label."""
        return frozenset({"image_BCHW", "mask_BKHW", "label_B"})

    @property
    def needs_every_label(self) -> bool:
        """The label is an input of cgan's networks."""
        return self.kind == "cgan"

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Generators are asked with captions; of these cgan reads the label, the others nothing."""
        return (Caption(),)


class Gan(Model):
    """A generator G and a discriminator D."""

    Config = GanConfig
    makes = frozenset({"scores"})

    config: GanConfig

    def __init__(self, config: GanConfig, weights_dir: str | None = None) -> None:
        super().__init__(config, weights_dir)
        labels = LABELS if config.kind == "cgan" else 0
        if config.kind == "dcgan":
            self.generator: nn.Module = DcGenerator(config)
            self.discriminator: nn.Module = DcDiscriminator(config)
        else:
            self.generator = MlpGenerator(config, labels)
            self.discriminator = MlpDiscriminator(config, labels)

    def forward(self, batch: Batch) -> Losses:
        """Terms "d" (real against generated) and "g" (generated taken for real); total is their sum."""
        real_BCHW, mask_BKHW, label_B = 2 * batch.image_BCHW - 1, batch.mask_BKHW, batch.label_B.clamp(0, LABELS - 1)
        z = torch.randn(len(real_BCHW), self.config.noise, device=real_BCHW.device)
        fake_BCHW = self.generator(z, mask_BKHW, label_B)
        real_B = self.discriminator(real_BCHW, mask_BKHW, label_B)
        fake_B = self.discriminator(fake_BCHW.detach(), mask_BKHW, label_B)
        d = F.softplus(-real_B).mean() + F.softplus(fake_B).mean()
        fixed = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        g = F.softplus(-functional_call(self.discriminator, fixed, (fake_BCHW, mask_BKHW, label_B))).mean()
        return Losses(total=d + g, terms={"d": d.detach(), "g": g.detach()})

    def predict(self, batch: Batch) -> Prediction:
        """ "discriminator_prob": how probable D finds it that a held-out scan is real."""
        logit_B = self.discriminator(2 * batch.image_BCHW - 1, batch.mask_BKHW, batch.label_B.clamp(0, LABELS - 1))
        return Prediction(scores={"discriminator_prob": logit_B.float().sigmoid()})

    @not_compiled
    @torch.no_grad()
    def generate(self, mask_BHW: torch.Tensor, captions: list[str], seeds: list[int]) -> torch.Tensor:
        """B images by mask, and for cgan by the caption's label: B x 3 x S x S, float32 in [0, 1]."""
        drawn = [torch.randn(self.config.noise, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        label_B = torch.tensor(["malignant" in caption for caption in captions], device=mask_BHW.device).long()
        image_BCHW: torch.Tensor = self.generator(torch.stack(drawn).to(mask_BHW.device), mask_BHW[:, None], label_B)
        return (image_BCHW.float() / 2 + 0.5).clamp(0, 1)


class MlpGenerator(nn.Module):
    """Two hidden layers on noise, mask and label."""

    def __init__(self, config: GanConfig, labels: int) -> None:
        super().__init__()
        self.labels, self.size, hidden = labels, config.image_size, 8 * config.width
        self.net = nn.Sequential(
            nn.Linear(config.noise + self.size**2 + labels, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 3 * self.size**2),
            nn.Tanh(),
        )

    def forward(self, z: torch.Tensor, mask_BKHW: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
        """B x 3 x S x S in [-1, 1]."""
        values = self.net(torch.cat([z, mask_BKHW.flatten(1), *one_hot(label_B, self.labels)], dim=1))
        return values.unflatten(1, (3, self.size, self.size))  # type: ignore[no-any-return]


class MlpDiscriminator(nn.Module):
    """Two hidden layers on image, mask and label."""

    def __init__(self, config: GanConfig, labels: int) -> None:
        super().__init__()
        self.labels, hidden = labels, 8 * config.width
        self.net = nn.Sequential(
            nn.Linear(4 * config.image_size**2 + labels, hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, 1),
        )

    def forward(self, image_BCHW: torch.Tensor, mask_BKHW: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
        """B logits."""
        given = [image_BCHW.flatten(1), mask_BKHW.flatten(1), *one_hot(label_B, self.labels)]
        return self.net(torch.cat(given, dim=1))[:, 0]  # type: ignore[no-any-return]


class DcGenerator(nn.Module):
    """Radford et al.'s transposed convolutions; the mask, at each stage's size, is one more channel."""

    def __init__(self, config: GanConfig) -> None:
        super().__init__()
        channels = [config.width * 2**k for k in reversed(range(_stages(config)))]
        self.first = nn.ConvTranspose2d(config.noise, channels[0], SMALLEST)
        ins, outs = channels, [*channels[1:], 3]
        self.norms = nn.ModuleList(nn.BatchNorm2d(count) for count in ins)
        self.ups = nn.ModuleList(nn.ConvTranspose2d(i + 1, o, 4, 2, 1) for i, o in zip(ins, outs, strict=True))

    def forward(self, z: torch.Tensor, mask_BKHW: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
        """B x 3 x S x S in [-1, 1]; the label is not read."""
        x = self.first(z[:, :, None, None])
        for norm, up in zip(self.norms, self.ups, strict=True):
            x = norm(x).relu()
            mask = F.adaptive_avg_pool2d(mask_BKHW, x.shape[-2:]).to(x.dtype)
            x = up(torch.cat([x, mask], dim=1))
        return x.tanh()


class DcDiscriminator(nn.Module):
    """Strided convolutions of image and mask, as many as the generator has stages.

    Without normalisation, so that each logit is of its own image alone.
    """

    def __init__(self, config: GanConfig) -> None:
        super().__init__()
        channels = [4, *(config.width * 2**k for k in range(_stages(config)))]
        layers: list[nn.Module] = []
        for i, o in itertools.pairwise(channels):
            layers += [nn.Conv2d(i, o, 4, 2, 1), nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*layers, nn.Conv2d(channels[-1], 1, SMALLEST))

    def forward(self, image_BCHW: torch.Tensor, mask_BKHW: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
        """B logits; the label is not read."""
        return self.net(torch.cat([image_BCHW, mask_BKHW], dim=1))[:, 0, 0, 0]  # type: ignore[no-any-return]


def one_hot(label_B: torch.Tensor, labels: int) -> list[torch.Tensor]:
    """The label as an input; none without labels."""
    return [F.one_hot(label_B, labels).float()] if labels else []


def _stages(config: GanConfig) -> int:
    """Doublings from SMALLEST to the image."""
    return (config.image_size // SMALLEST).bit_length() - 1
