"""The vocabulary every room shares: what flows from the raw folder to the prediction.

    raw folder → Sample → shards → Batch → Losses (training) | Prediction (evaluation)

Shape suffixes: B batch, C channels, H height, W width, K mask classes. A name such as `image_BCHW` is
its own documentation.
"""

from __future__ import annotations

import numbers
import typing as t
from dataclasses import dataclass, field, replace

import numpy as np

from bushpc.errors import DataError

if t.TYPE_CHECKING:  # torch takes seconds to import, and packing and dispatch do without it
    import torch

LABELS = ("benign", "malignant", "normal")
# Of every scan with a lesion in a dataset whose publisher gives no labels; -1 in a batch.
UNLABELLED = "unlabelled"
# Plausible range for the edge of an ultrasound pixel, in millimetres.
LEAST_MM, MOST_MM = 1e-4, 100.0


def label_index(label: str) -> int:
    """Where `label` stands in LABELS; -1 for UNLABELLED."""
    return -1 if label == UNLABELLED else LABELS.index(label)


class PixelSize(t.NamedTuple):
    """Width and height of one pixel in millimetres."""

    x: float
    y: float


class Region(t.NamedTuple):
    """A rectangle of an image, corners included, with its pixel size; None where it is not known."""

    left: int
    top: int
    right: int
    bottom: int
    pixel_mm: PixelSize | None

    @property
    def area(self) -> int:
        return (self.right - self.left + 1) * (self.bottom - self.top + 1)


class Regions(tuple[Region, ...]):
    """The regions of an image that may differ in scale: dual views, an enlarged inset, a Doppler spectrum."""

    def pixel_mm(self, mask_HW: np.ndarray) -> PixelSize | None:
        """The scale where the mask lies; None if it spans several, or pixels outside every calibrated region.

        Of overlapping regions, the smaller one lies on top. An empty mask has the scale that all regions share.
        """
        number_HW = np.full(mask_HW.shape, -1)
        regions = sorted(self, key=lambda region: (-region.area, region.pixel_mm is not None))
        for number, region in enumerate(regions):
            number_HW[max(region.top, 0) : region.bottom + 1, max(region.left, 0) : region.right + 1] = number
        lesion = mask_HW > 0
        under = np.unique(number_HW[lesion]).tolist() if lesion.any() else range(len(regions))
        sizes = {regions[number].pixel_mm if number >= 0 else None for number in under}
        return sizes.pop() if len(sizes) == 1 else None


def is_plausible(side_mm: float) -> bool:
    """Whether a pixel of an ultrasound image can have such an edge."""
    return LEAST_MM <= side_mm <= MOST_MM


def pixel_size(given: float | t.Sequence[float]) -> PixelSize:
    """The pixel size from one number for square pixels, or from (x, y), in mm. Raises: DataError if implausible."""
    sides = [float(side) for side in ((given, given) if isinstance(given, numbers.Real) else t.cast(t.Any, given))]
    if len(sides) != 2 or not all(is_plausible(side) for side in sides):
        raise DataError(
            f"pixel size {given}: it must be one number of millimetres from {LEAST_MM} to {MOST_MM:g}, or two (x and y)"
        )
    return PixelSize(sides[0], sides[1])


class LabelledScan(t.Protocol):
    """What tells samples apart and divides them into folds: a manifest's Record has it, and a row of folds.csv."""

    @property
    def key(self) -> str: ...

    @property
    def patient(self) -> str: ...

    @property
    def label(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One scan as its publisher means it, with every oddity of the publisher's files already resolved.

    image_HWC: uint8 at its original size, channels as the card names them: three, RGB as a rule, or four.
    mask_HW: uint8, same height and width; bit k is set inside of the card's mask class k, so classes may overlap. With
        one class 1 inside the lesion and 0 elsewhere; all zero for a normal scan.
    label: one of LABELS, or UNLABELLED.
    attributes: clinical descriptors by snake_case name (`shape`, `margin`, `birads`, `echogenicity` …);
        a missing value is None, never an empty string.
    pixel_mm: edge of one pixel in millimetres, or None where the publisher does not say.
    sources: the raw files it was read from, relative to the raw folder.
    """

    key: str
    patient: str
    label: str
    image_HWC: np.ndarray
    mask_HW: np.ndarray
    attributes: dict[str, str | float | None] = field(default_factory=dict)
    pixel_mm: float | None = None
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a model sees. A model names the fields it reads in `Config.needs`.

    keys: B sample keys.
    epochs: B numbers: for which pass over the training part each sample was drawn; 0 at evaluation.
    image_BCHW: float32 in [0, 1], the dataset's channels; models normalise for their own backbone. The loader gives
        uint8 up to 255 instead, a quarter of the bytes: `to` makes it what models get, on their device.
    mask_BKHW: float32, 0 or 1, a plane for each of the dataset's mask classes; from the loader uint8.
    label_B: int64, index into LABELS; -1 where the dataset has no labels.
    conditions: name → B values of what the model is conditioned on (`bushpc.conditions`): sentences, captions, boxes …
        A value may be a function prob_HW → value, of the model's own first prediction: the model predicts, asks it, and
        predicts again.
    features: what `Model.features` makes of the images, name → B x …, where it was computed before and kept.
    changes: B changes of image and mask that the device is still to apply (`bushpc.data.augment.device`).
    """

    keys: list[str]
    epochs: list[int]
    image_BCHW: torch.Tensor
    mask_BKHW: torch.Tensor
    label_B: torch.Tensor
    conditions: dict[str, list[t.Any]] = field(default_factory=dict)
    features: dict[str, torch.Tensor] | None = None
    changes: list[t.Any] | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`, as models get it: image and mask in float32."""
        return replace(
            self,
            image_BCHW=_image_on(self.image_BCHW, device),
            mask_BKHW=_as_float(self.mask_BKHW.to(device, non_blocking=True), whole=1),
            label_B=self.label_B.to(device, non_blocking=True),
            features=self._of_features(lambda value: value.to(device, non_blocking=True)),
        )

    def split(self, parts: int) -> list[Batch]:
        """The batch in `parts` equal parts, in order. The number of samples is a multiple of `parts`."""
        size, rest = divmod(len(self.keys), parts)
        assert rest == 0, f"{len(self.keys)} samples in {parts} parts"
        if parts == 1:
            return [self]
        per_sample = ("keys", "epochs", "image_BCHW", "mask_BKHW", "label_B")
        return [
            replace(
                self,
                **{name: getattr(self, name)[part] for name in per_sample},
                conditions={name: values[part] for name, values in self.conditions.items()},
                changes=self.changes and self.changes[part],
                features=self._of_features(lambda value, part=part: value[part]),  # type: ignore[misc]
            )
            for part in (slice(i * size, (i + 1) * size) for i in range(parts))
        ]

    def _of_features(self, change: t.Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor] | None:
        return self.features and {name: change(value) for name, value in self.features.items()}

    def channels_last(self) -> Batch:
        """The same batch with its images stored as NHWC."""
        import torch

        return replace(self, image_BCHW=self.image_BCHW.contiguous(memory_format=torch.channels_last))


def _image_on(image_BCHW: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """As float32 on `device`. Grey scans that are one channel in memory travel as one."""
    channels = image_BCHW.shape[1]
    if channels == 1 or image_BCHW.stride(1):
        return _as_float(image_BCHW.to(device, non_blocking=True), whole=255)
    grey_B1HW = _as_float(image_BCHW[:, :1].to(device, non_blocking=True), whole=255)
    return grey_B1HW.expand(-1, channels, -1, -1).contiguous()


def _as_float(pixels_BCHW: torch.Tensor, whole: int) -> torch.Tensor:
    """uint8 from 0 to `whole` as float32 from 0 to 1, in memory as BCHW; what is float already stays as it is."""
    import torch

    if pixels_BCHW.is_floating_point():
        return pixels_BCHW
    floats_BCHW = pixels_BCHW.to(torch.float32, memory_format=torch.contiguous_format)
    return floats_BCHW if whole == 1 else floats_BCHW.div_(whole)


class Losses(t.NamedTuple):
    """What `Model.forward` returns: a pytree of tensors, so DDP and DeepSpeed can find the graph in it.

    total: scalar, the weighted sum that is differentiated, a mean over the batch's samples.
    terms: every named, unweighted term, detached, for the log.
    """

    total: torch.Tensor
    terms: dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What `Model.predict` returns. A field that the model does not make is None.

    prob_BKHW: float32 in [0, 1], at the batch's own height and width.
    uncertainty_BKHW: of models that sample: standard deviation of the samples whose mean prob_BKHW is.
    class_prob_BL: float32, B x number of labels, rows sum to 1.
    scores: figures that the model itself computes of each image, B each, by the name of an image metric.
    conditions: name → values that were really used (those of the second pass where there was one).
    """

    prob_BKHW: torch.Tensor | None = None
    uncertainty_BKHW: torch.Tensor | None = None
    class_prob_BL: torch.Tensor | None = None
    scores: dict[str, torch.Tensor] | None = None
    conditions: dict[str, list[t.Any]] | None = None
