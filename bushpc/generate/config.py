"""The settings of `bushpc generate`: how many samples, of which population. No torch here, for help and checks."""

from __future__ import annotations

import math
import typing as t

from bushpc.config import Settings, config_class, group, setting
from bushpc.errors import ConfigError


@config_class
class ClassPrior(Settings):
    """The distribution of lesions of one class. The defaults describe benign lesions."""

    aspect: tuple[float, ...] = setting(
        (1.2, 2.2), "Range of the ellipse's longer over its shorter axis: width over height if benign, else inverse."
    )
    sigma: tuple[float, ...] = setting(
        (0.02, 0.12),
        "Range of the elastic deformation (7): standard deviation of its control points, in units of the "
        "ellipse's shorter semi-axis. Small makes smooth edges, large irregular shapes; the paper gives no numbers.",
    )
    heterogeneous: float = setting(
        0.0,
        "Share with heterogeneous echogenicity. 0 (benign) and 1 (malignant) are the paper's prior and all that a "
        "dataset without this attribute teaches a generator; a generator of BrEaST has seen 0.29 and 0.23.",
    )
    unclear: float = setting(
        0.0, "Share with an unclear boundary; BrEaST has 0.27 (benign) and 0.97 (malignant), the prior is 0 and 1."
    )

    def check(self, where: str) -> None:
        """Raises: ConfigError for invalid ranges."""
        _check_range(f"{where}.aspect", self.aspect, 1.0)
        _check_range(f"{where}.sigma", self.sigma, 0.0)
        for name in ("heterogeneous", "unclear"):
            _require(0 <= getattr(self, name) <= 1, f"{where}.{name}={getattr(self, name)}", "a share from 0 to 1")


BENIGN = ClassPrior()
MALIGNANT = ClassPrior(aspect=(1.1, 1.6), sigma=(0.2, 0.35), heterogeneous=1.0, unclear=1.0)


@config_class
class PriorsConfig(Settings):
    """The population of lesions. Ranges are two numbers; draws between them are uniform."""

    prefix: t.ClassVar[str] = "priors."

    malignant_share: float = setting(
        0.5,
        "Share of malignant lesions; all others are benign. The paper gives none; BUSI has 0.32, BrEaST 0.39.",
        ge=0,
        le=1,
    )
    frame_mm: float = setting(
        42.0,
        "Edge of the tissue that a frame shows. BrEaST's median scan is 37 to 42 deep and 47 wide.",
        unit="mm",
        gt=0,
        lt=math.inf,
    )
    sizes_mm: dict[str, tuple[float, ...]] = setting(
        {"small": (5.0, 10.0), "medium": (10.0, 20.0), "large": (20.0, 26.0)},
        "Longest diameter before deformation, by size; sizes are equally frequent. The limits at 10 and 20 are TNM's "
        "(T1b to T1c, T1 to T2); most lesions of BrEaST lie between 6 and 31. The paper gives no numbers.",
        unit="mm",
    )
    benign: ClassPrior = setting(BENIGN, "Benign lesions, wider than tall (6).")
    malignant: ClassPrior = setting(MALIGNANT, "Malignant lesions, taller than wide (6).")

    def __post_init__(self) -> None:
        """Raises: ConfigError if no lesion can be drawn."""
        _require(bool(self.sizes_mm), "priors.sizes_mm={}", "at least one size with its range in millimetres")
        for name, bounds in self.sizes_mm.items():
            _check_range(f"priors.sizes_mm.{name}", bounds, 0.0)
        self.benign.check("priors.benign")
        self.malignant.check("priors.malignant")


@config_class
class GenerateConfig(Settings):
    """What `bushpc generate` draws: `bushpc generate RUN out=FOLDER n=500 priors.malignant_share=0.4`."""

    n: int = setting(1000, "Number of samples. What one shows does not depend on it.", ge=1, le=10**6)
    seed: int = setting(0, "Seed of attributes, masks and noise; the same seed gives the same samples.", ge=0)
    batch_size: int = setting(16, "Images per forward pass of one rank.", unit="images", ge=1, le=10**6)
    priors: PriorsConfig = group(PriorsConfig, "The population of lesions.")

    @property
    def batches(self) -> list[range]:
        """The indices of every batch."""
        return [range(first, min(first + self.batch_size, self.n)) for first in range(0, self.n, self.batch_size)]


def _check_range(name: str, bounds: tuple[float, ...], least: float) -> None:
    """Raises: ConfigError."""
    _require(
        len(bounds) == 2 and least <= bounds[0] <= bounds[1] < math.inf,
        f"{name}={list(bounds)}",
        f"two ascending numbers ≥ {least:g}",
    )


def _require(holds: bool, given: str, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{given}: it must be {allowed}")
