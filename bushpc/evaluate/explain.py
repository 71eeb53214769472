"""Checkpoints → Grad-CAM maps of a few validation images, as in XBusNet's Figure 3: which places spoke for the mask.

Selvaraju et al. 2017, carried over to segmentation as in Vinogradova et al. 2020 (Seg-Grad-CAM): what is explained is
the sum of the logits inside the predicted mask; of models that make none, the most probable label. A view of the model,
no proof of anything (XBusNet 3.3).
"""

from __future__ import annotations

import hashlib
import typing as t
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from bushpc.data.batches import validation_batches
from bushpc.dist import World
from bushpc.evaluate.evaluate import Evaluation, save_probability
from bushpc.models.base import Model
from bushpc.sample import Batch, Prediction
from bushpc.shards.manifest import Record


def explain(at: Evaluation, folder: Path) -> None:
    """Write <folder>/<key>.png, 8-bit gray at network resolution, for `evaluate.explain` images; headline prompts.

    One rank does it alone. The maps are an extra: where one cannot be made the log says why, and the run goes on.
    """
    cell, model, how, say = at.cell, at.model, at.how, at.say
    if not cell.evaluate.explain:
        return
    layer = model.cam_layer()
    if layer is None:
        say(f"no Grad-CAM maps: {type(model).__name__}.cam_layer names no layer")
        return
    for record in chosen(at.data.validation, cell.evaluate.explain):
        how.alive(f"Grad-CAM of {record.key}")
        try:
            folder.mkdir(exist_ok=True)
            # One at a time: the backward pass keeps what a forward pass alone would not.
            for batch in validation_batches(cell, at.data, cell.variants[0].name, World(), [record]):
                cam_HW = grad_cam(model, layer, batch.to(how.device), cell.evaluate.threshold, how.autocast)
                save_probability(cam_HW, folder / f"{record.key}.png")
        except Exception as error:  # a full GPU, a layer that the model did not use, a full disk: no map is worth a run
            say(f"no Grad-CAM map of {record.key}: {type(error).__name__}: {error}; the run goes on without")


def chosen(part: list[Record], count: int) -> list[Record]:
    """`count` images with a lesion, by a hash of their keys: the same for every model, whatever it made of them."""
    lesions = [record for record in part if record.lesion_pixels]
    return sorted(lesions, key=lambda record: hashlib.sha256(record.key.encode()).digest())[:count]


def grad_cam(
    model: Model,
    layer: nn.Module,
    batch: Batch,
    threshold: float,
    autocast: t.Callable[[], t.ContextManager[t.Any]],
) -> np.ndarray:
    """The map of a batch of one image, H x W float32 in [0, 1], 1 at its greatest; all 0 where nothing spoke for it.

    ReLU(sum over k of a_k A_k), with A the output of `layer` and a_k the mean gradient of the target over A's places.
    The target is the sum of the logits where the predicted probability reaches `threshold`; of all, where none does. Of
    a model without masks it is the logit of the most probable label.
    """
    with torch.no_grad(), autocast():
        prediction = model.predict(batch)
    prob = _explained(prediction)
    inside = prob == prob.amax() if prediction.prob_BKHW is None else prob >= threshold
    if not inside.any():
        inside = torch.ones_like(inside)
    # The second pass alone, with the conditions that it used: those are found without gradients.
    batch = replace(batch, conditions=batch.conditions | (prediction.conditions or {}))

    def target(image_BCHW: torch.Tensor) -> torch.Tensor:
        with autocast():
            prob = _explained(model.predict(replace(batch, image_BCHW=image_BCHW)))
        # Back to logits: a certain pixel's probability hardly has a gradient.
        logits = torch.logit(prob.float(), eps=torch.finfo(torch.float32).eps)
        return (logits * inside).flatten(1).sum(dim=1)

    image_BCHW = batch.image_BCHW.clone().requires_grad_()
    cam_B1hw = _layer_cam(target, layer, image_BCHW).float()
    cam_HW = F.interpolate(cam_B1hw, size=image_BCHW.shape[-2:], mode="bilinear", align_corners=False)[0, 0]
    return (cam_HW / cam_HW.max().clamp_min(torch.finfo(torch.float32).tiny)).cpu().numpy()


def _layer_cam(
    target: t.Callable[[torch.Tensor], torch.Tensor], layer: nn.Module, image_BCHW: torch.Tensor
) -> torch.Tensor:
    """ReLU(sum over k of a_k A_k) as B x 1 x h x w; of a layer that is passed several times, the last time's.

    captum's LayerGradCam gives the same, as the tests hold, and takes 1.5 s of every cell to import.
    """
    outputs: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda _module, _given, output: outputs.append(output))
    try:
        target_B = target(image_BCHW)
    finally:
        hook.remove()
    if not outputs:
        raise ValueError("the model did not use the layer that its cam_layer names")
    places_BKhw = outputs[-1]
    [gradient_BKhw] = torch.autograd.grad(target_B.sum(), [places_BKhw])
    weight_BK11 = gradient_BKhw.mean(dim=(2, 3), keepdim=True)
    return (weight_BK11 * places_BKhw.detach()).sum(dim=1, keepdim=True).relu()


def _explained(prediction: Prediction) -> torch.Tensor:
    """B x K x H x W probabilities of the mask, or B x L of the labels."""
    found = prediction.class_prob_BL if prediction.prob_BKHW is None else prediction.prob_BKHW
    assert found is not None, "only models that make one of them name a layer"
    return found
