"""The contract of a kind of condition: a value per sample, in training and under each evaluation variant.

A new kind is one class, here or in its model's file: boxes, points, other sentences. Values are whatever the model
reads; the loader only carries them, in `Batch.conditions[kind.name]`. A value may also be a function of the model's
first prediction, prob_HW → value: the model then predicts twice, see `bushpc.models.xbusnet`.
"""

from __future__ import annotations

import abc
import typing as t
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bushpc.sample import LabelledScan

# A random generator that depends on the run's seed and these words alone.
Draw = Callable[..., np.random.Generator]


class Scan(LabelledScan, t.Protocol):
    """What a kind may read of a sample; a manifest's Record has it."""

    @property
    def attributes(self) -> Mapping[str, t.Any]: ...

    @property
    def lesion_pixels(self) -> int: ...

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...


Shown = Callable[[Scan, np.ndarray], t.Any]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way of giving a model its conditions at evaluation.

    name: its word in `prompts=…` and in the column `prompts` of CSV files. label: its name in tables and legends.
    uses_ground_truth: its conditions come from the mask that is to be predicted; reports mark its figures.
    """

    name: str
    label: str
    uses_ground_truth: bool = False


class Condition(abc.ABC):
    """A kind of condition. Instances are immutable and picklable: worker processes make training values.

    name: its key in `Batch.conditions`. absent: the value of a sample without one. from_mask: whether training values
    depend on the mask, and so on augmentation. column: of per_image.csv, with the values used, and the name under which
    a user states one for a new image; None for neither. note: what a model card says about new images, in sentences.
    """

    name: t.ClassVar[str]
    absent: t.ClassVar[t.Any] = ""
    from_mask: t.ClassVar[bool] = False
    from_pixels: t.ClassVar[bool] = False
    column: t.ClassVar[str | None] = None
    note: t.ClassVar[str] = ""

    def fitted(self, training: Sequence[Scan], prompting: t.Any) -> Condition:
        """This kind with what it takes from a fold's training part and the settings `prompting`. Raises: DataError."""
        return self

    @property
    def is_fitted(self) -> bool:
        """Whether it takes anything from training: then a trained model is not usable without."""
        return type(self).fitted is not Condition.fitted

    def left_out(self, draw: Draw, turn: int, key: str) -> bool:
        """Whether training shows `absent` the `turn`-th time that it draws the sample `key`."""
        return False

    def partner(self, draw: Draw, turn: int, key: str) -> str | None:
        """With `from_pixels`: the training scan that the value of the sample `key` is made of; None for `absent`."""
        return None

    def pictured(self, image_SSC: np.ndarray, mask_SS: np.ndarray) -> t.Any:
        """With `from_pixels`: the value, from the partner's pixels as the cache has them, uint8."""
        raise NotImplementedError

    @abc.abstractmethod
    def of(self, scan: Scan, mask_HW: np.ndarray) -> t.Any:
        """The value in training. mask_HW: bool, all classes united, as augmented; only filled if `from_mask`."""

    @abc.abstractmethod
    def shown(self, variant: str, part: Sequence[Scan], draw: Draw) -> Shown:
        """What gives the values under an evaluation variant. part: the validation part."""

    def written(self, value: t.Any) -> str:
        """A value in the CSV."""
        return str(value)

    # --- new images: `bushpc predict`, exported models ---

    @property
    def user_columns(self) -> tuple[str, ...]:
        """The columns in which a user's table states it."""
        return (self.column,) if self.column else ()

    def from_user(self, given: Mapping[str, str]) -> t.Any | None:
        """The value of a new image from what a user states, column → text; None if that says nothing of this kind.

        Raises: DataError for what cannot be.
        """
        return (given.get(self.column) or None) if self.column else None

    def when_unknown(self) -> t.Any:
        """The value of a new image about which the user states nothing."""
        return self.absent

    def mirrored(self, value: t.Any) -> t.Any:
        """The value for the left-right mirrored image."""
        return value

    def state(self) -> dict[str, t.Any]:
        """What `fitted` took from training, as JSON: part of an export."""
        return {}

    def restored(self, state: Mapping[str, t.Any]) -> Condition:
        """This kind with the `state` of an export."""
        return self
