"""Settings of text prompts."""

from __future__ import annotations

import typing as t

from bushpc.config.fields import Settings, config_class, setting
from bushpc.errors import ConfigError


@config_class
class PromptingConfig(Settings):
    """How text prompts are made from masks and predictions."""

    prefix: t.ClassVar[str] = "prompting."

    spatial_dropout: float = setting(
        0.3,
        "Share of training samples whose spatial prompt is left out, so that the model also learns the first pass.",
        ge=0,
        le=1,
    )
    size_quantiles: tuple[float, ...] = setting(
        (0.3333, 0.6667), "Lesion-size quantiles of the training part that separate small, medium and large."
    )
    tau: float = setting(
        0.30, "Threshold on the first-pass probability map (paper 2.7).", affects="predictions", gt=0, lt=1
    )

    def __post_init__(self) -> None:
        low_high = self.size_quantiles
        if not (len(low_high) == 2 and 0 < low_high[0] < low_high[1] < 1):
            raise ConfigError(
                f"prompting.size_quantiles={list(low_high)}: must be two rising numbers between 0 and 1, for example "
                "prompting.size_quantiles=[0.3333,0.6667]"
            )
