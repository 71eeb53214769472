"""Settings of models whose encoder can be exchanged: the input's normalisation follows from the chosen network."""

from __future__ import annotations

import dataclasses
import math
import typing as t

import typing_extensions as te

from bushpc.config import ModelConfig, config_class, setting
from bushpc.errors import ConfigError
from bushpc.nn.normalize import Normalize
from bushpc.nn.pretrained import IMAGENET, Colour, normalisation

# timm's smallest network, which the small configs train from scratch as every earlier run of them did.
SMALL = "test_resnet"


@config_class
class BackboneConfig(ModelConfig):
    """A model with an encoder from a library. usual: the mean and deviation where `mean` and `std` are null."""

    usual: t.ClassVar[tuple[Colour, Colour]] = IMAGENET

    mean: tuple[float, ...] | None = setting(
        None,
        "Mean of red, green and blue, in [0, 1], that the encoder's input is normalised with. Composition takes it "
        "from what the library states of the chosen encoder; null is what that model's default encoder has.",
        since=3,
    )
    std: tuple[float, ...] | None = setting(None, "Standard deviation; see mean.", since=3)

    def __post_init__(self) -> None:
        """Refuse numbers that no image can be normalised with. Raises: ConfigError."""
        super().__post_init__()
        given = {"mean": self.mean, "std": self.std}
        for name, numbers in given.items():
            fits = numbers is None or (len(numbers) == 3 and all(map(math.isfinite, numbers)))
            if not fits or (name == "std" and numbers is not None and min(numbers) <= 0):
                raise ConfigError(
                    f"model.{name}={list(numbers or ())}: three numbers are needed, of red, green and blue in [0, 1]"
                    + ", above 0" * (name == "std")
                )
        if (self.mean is None) != (self.std is None):
            raise ConfigError("model.mean and model.std belong together: give both, or neither")

    def follow_network(self) -> te.Self:
        """With the numbers of the chosen encoder, where none are given and they are not the usual ones."""
        if self.mean is not None or self.backbone is None or (self.backbone == SMALL and not self.pretrained):
            return self
        mean, std = self.stated(self.backbone)
        return self if (mean, std) == self.usual else dataclasses.replace(self, mean=mean, std=std)

    @property
    def backbone(self) -> str | None:
        """The encoder's name in its library; None where none is built."""
        raise NotImplementedError

    def stated(self, backbone: str) -> tuple[Colour, Colour]:
        """Mean and deviation that the library states of an encoder. Raises: ConfigError."""
        return normalisation(backbone)

    def normalize(self, channels: int = 3) -> Normalize:
        """The module that does it. Further channels repeat red, green and blue, as timm repeats its filters."""
        mean, std = (self.mean, self.std) if self.mean and self.std else self.usual
        if channels == 1:
            return Normalize([sum(mean) / 3], [sum(std) / 3])
        return Normalize([mean[i % 3] for i in range(channels)], [std[i % 3] for i in range(channels)])
