"""Settings of augmentation: which random changes a training scan gets, how often and how strong.

`configs/augment/*.yaml` are named policies (`augment=light`); a word such as `augment.gamma=0.3` adds to one.

NAME is a probability and NAME_range what is drawn from, both at a scan's full strength. Five settings are older than
that: `hflip` is a probability, and `rotate`, `zoom`, `brightness` and `contrast` are the largest change, drawn with
probability NAME_p.
"""

from __future__ import annotations

import typing as t

from bushpc.config.fields import Settings, config_class, group, setting
from bushpc.errors import ConfigError

# What torchvision's transforms do; everything else needs method=one_warp.
OLDEST = ("hflip", "rotate", "zoom", "brightness", "contrast")
# Changes that are drawn with the probability of this name, and lowest and highest number that its range may have.
RANGES: dict[str, tuple[float, float]] = {
    "view": (0.5, 2.0),
    "shear": (-45.0, 45.0),
    "translate": (-0.4, 0.4),
    "depth": (0.5, 1.0),
    "fan": (1.0, 29.0),
    "elastic": (0.0, 0.4),
    "noise": (0.0, 1.0),
    "blur": (0.1, 5.0),
    "lowres": (0.1, 1.0),
    "gamma": (0.2, 5.0),
    "gamma_inverted": (0.2, 5.0),
    "gain": (0.0, 3.0),
    "speckle": (0.0, 1.0),
    "time_gain": (0.0, 20.0),
    "lateral_gain": (0.0, 20.0),
    "shadow": (0.0, 1.0),
}
Method = t.Literal["torchvision", "one_warp"]


@config_class
class StrengthConfig(Settings):
    """Share of the augmentation that scans of each label get."""

    prefix: t.ClassVar[str] = "augment.strength."

    benign: float = setting(1.0, "For benign scans and scans without a label; 0 leaves them unchanged.", ge=0, le=1)
    malignant: float = setting(1.0, "For malignant scans; 0 leaves them unchanged.", ge=0, le=1)
    normal: float = setting(1.0, "For normal scans; 0 leaves them unchanged.", ge=0, le=1)


def _p(default: float, sentence: str) -> t.Any:
    return setting(default, sentence, ge=0, le=1, since=3)


def _range(low: float, high: float, sentence: str, unit: str = "") -> t.Any:
    return setting((low, high), sentence, unit=unit, since=3)


@config_class
class AugmentConfig(Settings):
    """Random changes of training scans."""

    prefix: t.ClassVar[str] = "augment."

    hflip: float = setting(0.0, "Probability of a left-right flip.", ge=0, le=1)
    rotate: float = setting(0.0, "Largest rotation in either direction.", unit="degrees", ge=0, le=180)
    zoom: float = setting(0.0, "Largest relative zoom in either direction.", ge=0, lt=1)
    brightness: float = setting(0.0, "Largest relative change of brightness.", ge=0, le=1)
    contrast: float = setting(0.0, "Largest relative change of contrast.", ge=0, le=1)
    strength: StrengthConfig = group(
        StrengthConfig,
        "Share of all these changes per label, so that rare labels can be changed more than common ones.",
    )
    variants: int = setting(
        0,
        "Number of fixed changes per sample, used in turn, so that a frozen encoder's outputs can be stored; 0 draws a "
        "new change every time.",
        ge=0,
    )
    method: Method = setting(
        "torchvision",
        "one_warp composes all movements into one interpolation and all changes of grey levels into one table. "
        "torchvision, one transform after the other to the nearest pixel, is how bushpc augmented before it had "
        "policies: runs of that time continue with it. A new run that states neither gets one_warp.",
        since=3,
    )
    where: t.Literal["workers", "device"] = setting(
        "workers",
        "workers changes scans in the loader's processes, one by one; device changes whole batches on the GPU. The "
        "draws are the same, and pixels differ by a grey level at most.",
        since=3,
    )
    keep_lesion: float = setting(
        0.9,
        "Smallest share of a lesion that stays in the image. Movements that keep less are drawn again, up to 20 times; "
        "after that the scan is only flipped.",
        gt=0,
        le=1,
        since=3,
    )

    vflip: float = _p(0.0, "Probability of an upside-down flip. Depth, shadows and enhancement then point upwards.")
    rotate_p: float = _p(1.0, "Probability of a rotation by up to augment.rotate.")
    zoom_p: float = _p(1.0, "Probability of a zoom by up to augment.zoom.")
    view: float = _p(0.0, "Probability of showing more or less of the scan, as nnU-Net scales.")
    view_range: tuple[float, ...] = _range(0.7, 1.4, "Edge of what is shown, as a share of the scan's edge.")
    shear: float = _p(0.0, "Probability of a shear, horizontal or vertical.")
    shear_range: tuple[float, ...] = _range(-10.0, 10.0, "Angle of the shear.", "degrees")
    translate: float = _p(0.0, "Probability of a shift in both directions.")
    translate_range: tuple[float, ...] = _range(-0.1, 0.1, "Shift in each direction, as a share of the edge.")
    depth: float = _p(
        0.0, "Probability of a smaller depth setting: the deepest rows are cut off, and the rest is enlarged."
    )
    depth_range: tuple[float, ...] = _range(0.7, 1.0, "Share of the depth that remains.")
    fan: float = _p(0.0, "Probability of the fan-shaped image of a curved probe: beams spread with depth.")
    fan_range: tuple[float, ...] = _range(5.0, 25.0, "Angle of the outermost beam.", "degrees")
    elastic: float = _p(0.0, "Probability of an elastic deformation, which keeps the image's edges where they are.")
    elastic_range: tuple[float, ...] = _range(
        0.1,
        0.35,
        "Largest displacement, as a share of the distance between control points; up to 0.4 nothing folds over.",
    )
    elastic_points: int = setting(5, "Movable control points per direction.", ge=2, le=32, since=3)

    brightness_p: float = _p(1.0, "Probability of a change of brightness by up to augment.brightness.")
    contrast_p: float = _p(1.0, "Probability of a change of contrast by up to augment.contrast.")
    gain: float = _p(0.0, "Probability of multiplying the distance from the mean grey: nnU-Net's brightness.")
    gain_range: tuple[float, ...] = _range(0.75, 1.25, "Factor of gain; as likely below 1 as above.")
    gamma: float = _p(0.0, "Probability of a gamma curve that keeps mean and standard deviation.")
    gamma_range: tuple[float, ...] = _range(0.7, 1.5, "Exponent of gamma; as likely below 1 as above.")
    gamma_inverted: float = _p(0.0, "Probability of a gamma curve of the inverted scan, as nnU-Net's.")
    gamma_inverted_range: tuple[float, ...] = _range(0.7, 1.5, "Exponent of gamma_inverted.")
    noise: float = _p(0.0, "Probability of Gaussian noise.")
    noise_range: tuple[float, ...] = _range(0.0, 0.1, "Variance of the noise, as a share of the scan's variance.")
    blur: float = _p(0.0, "Probability of a Gaussian blur.")
    blur_range: tuple[float, ...] = _range(
        0.5, 1.0, "Standard deviation of the blur, drawn per direction.", "pixels of the network's image"
    )
    lowres: float = _p(0.0, "Probability of a lower resolution: to the nearest pixel down, bicubic up.")
    lowres_range: tuple[float, ...] = _range(0.5, 1.0, "Lower resolution, as a share of the image's.")
    trivial: float = _p(
        0.0,
        "Probability of one change of TrivialAugment's wide set, of a strength drawn evenly: identity, shear, shift, "
        "rotation, brightness, contrast, sharpness, posterise, solarise, autocontrast, equalise; not colour.",
    )
    speckle: float = _p(0.0, "Probability of more speckle: multiplicative noise with grains wider than high.")
    speckle_range: tuple[float, ...] = _range(0.03, 0.15, "Standard deviation of the speckle's factor.")
    time_gain: float = _p(0.0, "Probability of a time-gain curve: gain that varies smoothly with depth.")
    time_gain_range: tuple[float, ...] = _range(1.0, 6.0, "Largest gain of the curve; 60 dB are all levels.", "dB")
    lateral_gain: float = _p(0.0, "Probability of a gain that varies smoothly from left to right.")
    lateral_gain_range: tuple[float, ...] = _range(1.0, 4.0, "Largest lateral gain.", "dB")
    shadow: float = _p(0.0, "Probability of an acoustic shadow: a soft dark band from some depth downwards.")
    shadow_range: tuple[float, ...] = _range(0.3, 0.8, "Share of the signal that the shadow takes.")

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn or done. Raises: ConfigError."""
        for name, (least, most) in RANGES.items():
            given = getattr(self, f"{name}_range")
            if len(given) != 2 or not least <= given[0] <= given[1] <= most:
                usual = ",".join(f"{value:g}" for value in self.default(f"{name}_range"))
                raise ConfigError(
                    f"augment.{name}_range={[*given]}: must be two numbers from {least:g} to {most:g}, the lower one "
                    f"first; for example augment.{name}_range=[{usual}]"
                )
        if self.method == "torchvision":
            self._require_oldest()
        self._require_lesions_inside()

    def _require_oldest(self) -> None:
        more = [name for name in (*RANGES, "vflip", "trivial") if getattr(self, name)]
        more += [f"{name}_p" for name in OLDEST[1:] if getattr(self, f"{name}_p") != 1]
        more += ["where"] if self.where == "device" else []
        if more:
            raise ConfigError(
                f"augment.{more[0]}={getattr(self, more[0])} with augment.method=torchvision, which knows "
                f"{', '.join(OLDEST)} alone, in the loader's processes: set augment.method=one_warp"
            )

    def _require_lesions_inside(self) -> None:
        """The middle of a scan stays in the image, whatever is drawn: redraws for lesions there would be in vain."""
        shift = max(map(abs, self.translate_range)) if self.translate else 0.0
        depth = (1 / self.depth_range[0] - 1) / 2 if self.depth else 0.0
        enlarged = (1 / self.view_range[0] if self.view else 1.0) * (1 + self.zoom)
        if shift + depth * enlarged >= 0.5:
            raise ConfigError(
                f"augment.translate_range={[*self.translate_range]}, augment.depth_range={[*self.depth_range]}, "
                f"augment.view_range={[*self.view_range]} and augment.zoom={self.zoom:g} together move a lesion in the "
                f"middle of the scan by up to {shift + depth * enlarged:.2f} of the edge, out of the image; allowed: "
                "below 0.5. Shift or enlarge less, or keep more of the depth"
            )

    @property
    def changes(self) -> bool:
        """Whether scans of any label are changed at all."""
        strongest = max(self.strength.benign, self.strength.malignant, self.strength.normal)
        oldest = (self.hflip, *(getattr(self, name) * getattr(self, f"{name}_p") for name in OLDEST[1:]))
        return bool(strongest * max(*oldest, self.vflip, self.trivial, *(getattr(self, name) for name in RANGES)))
