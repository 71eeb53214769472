"""What a grid's generators do after their training: generate scans, which are then measured. Each is a cell."""

from __future__ import annotations

import typing as t

from bushpc.config.fields import Settings, config_class, setting

Work = t.Literal["train", "generate", "quality"]


@config_class
class SynthesisConfig(Settings):
    """Cells that follow the training of a generator, in each fold: `generate`, then `quality`."""

    prefix: t.ClassVar[str] = "synthesis."

    n: int = setting(
        0,
        "Scans that each generator of a grid or cross-validation generates after its training, in a cell of its own; "
        "another cell then measures them. 0 adds no such cells.",
        affects="evaluation",
        unit="scans",
        ge=0,
        le=10**6,
        since=4,
    )
    batch_size: int = setting(
        16, "Scans generated at a time.", affects="evaluation", unit="images", ge=1, le=10**6, since=4
    )
    features: str = setting(
        "inception",
        "Features in which generated and held-out real scans are compared: inception (FID and KID), none, or a run "
        "folder (Fréchet and kernel distance in that model's features, which are not FID and KID). Where Inception's "
        "weights are not staged, the report says that FID is left out.",
        affects="evaluation",
        since=4,
    )
