"""Test-time augmentation: a batch → predictions of its views, each turned back → their mean.

    image ─mirrored, scaled→ view ─model→ map of the view ─back→ map of the image ─┐
                                                                 of every view ────┴mean→ one map

Probabilities are averaged, neither logits nor masks, on the network's own grid (model.image_size): a scaled view's map
comes back to it first. What a model is conditioned on follows the view: a spatial prompt's left and right change places
in a mirror image (`Condition.mirrored`). Never upside down: depth, and shadows below a lesion, have a direction.
"""

from __future__ import annotations

import dataclasses
import typing as t
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from bushpc.conditions import Condition
from bushpc.config import ModelConfig
from bushpc.config.inference import scaled_sizes
from bushpc.models.base import Model
from bushpc.sample import Batch, Prediction


class View(t.NamedTuple):
    """mirrored: left to right. size: edge of the input that the model gets."""

    mirrored: bool
    size: int

    def of(self, batch: Batch, kinds: Sequence[Condition]) -> Batch:
        """The batch as it is seen this way. kinds: of the model."""
        if not self.mirrored and self.size == batch.image_BCHW.shape[-1]:
            return batch
        conditions = dict(batch.conditions)
        for kind in kinds if self.mirrored else ():
            conditions[kind.name] = [kind.mirrored(value) for value in conditions[kind.name]]
        return dataclasses.replace(
            batch,
            image_BCHW=self._turned(resized(batch.image_BCHW, self.size).clamp(0, 1)),
            mask_BKHW=self._turned(F.interpolate(batch.mask_BKHW, (self.size, self.size), mode="nearest-exact")),
            conditions=conditions,
            features=None,  # those that are kept are of the image as it is
        )

    def back(self, made: Prediction, used: dict[str, list[t.Any]], kinds: Sequence[Condition], size: int) -> Prediction:
        """A prediction of the view as one of the image, whose maps have `size` pixels a side. used: its conditions."""
        return dataclasses.replace(
            made,
            prob_BKHW=self._map_back(made.prob_BKHW, size),
            uncertainty_BKHW=self._map_back(made.uncertainty_BKHW, size),
            conditions={
                kind.name: [kind.mirrored(value) if self.mirrored else value for value in used[kind.name]]
                for kind in kinds
            },
        )

    def _map_back(self, map_BKHW: torch.Tensor | None, size: int) -> torch.Tensor | None:
        return None if map_BKHW is None else resized(self._turned(map_BKHW.float()), size).clamp(0, 1)

    def _turned(self, map_BCHW: torch.Tensor) -> torch.Tensor:
        return map_BCHW.flip(-1) if self.mirrored else map_BCHW


def views_of(tta: str, model: ModelConfig) -> list[View]:
    """The views of a test-time augmentation that the model can take, the image as it is first."""
    sizes: tuple[int, ...] = (model.image_size,)
    if tta == "mirror_scale":
        assert model.size_stride is not None, "refuse_tta has asked"
        smaller, own, larger = scaled_sizes(model.image_size, model.size_stride)
        sizes = (own, smaller, larger)
    return [View(mirrored, size) for size in sizes for mirrored in (False, True)[: 1 + (tta != "none")]]


def predict_view(model: Model, batch: Batch, kinds: Sequence[Condition], view: View) -> Prediction:
    """A model's prediction of one view, turned back; with the conditions that it was made with, all kinds of them."""
    seen = view.of(batch, kinds)
    made = model.predict(seen)
    return view.back(made, seen.conditions | (made.conditions or {}), kinds, batch.image_BCHW.shape[-1])


def predict(model: Model, batch: Batch, kinds: Sequence[Condition], views: Sequence[View]) -> Prediction:
    """The mean over the views. Of the image as it is alone, it is the model's own prediction, untouched."""
    if len(views) == 1:
        return model.predict(batch)
    return mean_of([predict_view(model, batch, kinds, view) for view in views])


def mean_of(passes: Sequence[Prediction]) -> Prediction:
    """Of several predictions of a batch; its conditions are those of the first.

    The uncertainty is that of the model's samples over all views: the root of the mean variance within the views and
    the variance between them. Of a model that does not sample there is none.
    """
    prob_PBKHW = _stacked(each.prob_BKHW for each in passes)
    deviation_PBKHW = _stacked(each.uncertainty_BKHW for each in passes)
    class_prob_PBL = _stacked(each.class_prob_BL for each in passes)
    deviation_BKHW = None
    if deviation_PBKHW is not None and prob_PBKHW is not None:
        deviation_BKHW = ((deviation_PBKHW**2).mean(0) + prob_PBKHW.var(0, correction=0)).sqrt()
    return dataclasses.replace(
        passes[0],
        prob_BKHW=None if prob_PBKHW is None else prob_PBKHW.mean(0),
        uncertainty_BKHW=deviation_BKHW,
        class_prob_BL=None if class_prob_PBL is None else class_prob_PBL.mean(0),
    )


def _stacked(parts: t.Iterable[torch.Tensor | None]) -> torch.Tensor | None:
    there = [part.float() for part in parts if part is not None]
    return torch.stack(there) if there else None


def resized(map_BCHW: torch.Tensor, size: int | tuple[int, int]) -> torch.Tensor:
    """Bilinear with antialiasing, as the loader resizes images; the same tensor where the size is the same."""
    height, width = (size, size) if isinstance(size, int) else size
    if map_BCHW.shape[-2:] == (height, width):
        return map_BCHW
    return F.interpolate(map_BCHW, (height, width), mode="bilinear", antialias=True, align_corners=False)
