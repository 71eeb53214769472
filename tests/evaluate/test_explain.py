"""Promises of Grad-CAM: a map is what the formula gives, of images that no score chose, and none can end a run."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bushpc.cell import build_model
from bushpc.conditions.sentences import FirstPass
from bushpc.config import CellConfig, ModelConfig
from bushpc.data.batches import validation_batches
from bushpc.data.loader import FoldData
from bushpc.dist import World
from bushpc.evaluate.evaluate import Evaluation, Predicting
from bushpc.evaluate.explain import chosen, explain, grad_cam
from bushpc.models.base import Model
from bushpc.models.baselines import UNet
from bushpc.models.xbusnet import XBusNet
from bushpc.sample import Batch, Prediction


class OneConv(Model):
    """Channels of the image itself as features A, and a 1 x 1 convolution with weights w and bias b as the head."""

    def __init__(self, w: list[float], b: float) -> None:
        super().__init__(ModelConfig(image_size=8, pretrained=False))
        self.channels, self.head = nn.Identity(), nn.Conv2d(3, 1, 1)
        self.head.weight.data = torch.tensor(w).reshape(1, 3, 1, 1)
        self.head.bias.data.fill_(b)

    def cam_layer(self) -> nn.Module:
        return self.channels

    def predict(self, batch: Batch) -> Prediction:
        return Prediction(prob_BKHW=self.head(self.channels(batch.image_BCHW)).sigmoid())


def batch_of(image_1CHW: torch.Tensor) -> Batch:
    empty = torch.zeros(1, 1, *image_1CHW.shape[-2:])
    return Batch(
        keys=["a"], epochs=[0], image_BCHW=image_1CHW, mask_BKHW=empty, label_B=torch.zeros(1, dtype=torch.int64),
        conditions={"spatial_prompts": [""], "attribute_prompts": [""], "captions": [""]},
    )  # fmt: skip


@pytest.mark.parametrize("b", [-0.4, -9.0])
def test_a_map_is_the_closed_form_of_one_convolution(b):
    """The gradient of the summed logits is w_k inside the mask: a_k = w_k |M| / HW, and the map is ReLU(w · A) to
    scale, also with b = -9, where no pixel is predicted and M is the whole map."""
    w = [1.5, -2.0, 0.5]
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    model = OneConv(w, b).eval()
    expected = (image[0] * torch.tensor(w).reshape(3, 1, 1)).sum(0).relu()
    assert ((expected + b).sigmoid() >= 0.5).any() == (b == -0.4)
    cam = grad_cam(model, model.cam_layer(), batch_of(image), 0.5, contextlib.nullcontext)
    np.testing.assert_allclose(cam, expected / expected.max(), atol=1e-5)


@pytest.mark.parametrize("model_name", ["xbusnet_small", "unet_small", "hybrid_attention_small"])
def test_a_map_is_what_captum_makes_of_the_same_layer_and_target(opened, monkeypatch, model_name):
    from captum.attr import LayerGradCam

    cell, model, data, _ = opened(f"model={model_name}", "model.image_size=64")
    [batch] = validation_batches(cell, data, cell.variants[0].name, World(), chosen(data.validation, 1))
    batch = batch.to(torch.device("cpu"))
    made = grad_cam(model, model.cam_layer(), batch, 0.5, contextlib.nullcontext)

    def by_captum(target, layer, image_BCHW):
        return LayerGradCam(target, layer).attribute(image_BCHW, relu_attributions=True).detach()

    monkeypatch.setattr("bushpc.evaluate.explain._layer_cam", by_captum)
    expected = grad_cam(model, model.cam_layer(), batch, 0.5, contextlib.nullcontext)
    assert expected.max() == 1
    np.testing.assert_allclose(made, expected, atol=1e-6)


def test_a_map_that_nothing_speaks_for_is_black():
    model = OneConv([-1.0, -1.0, -1.0], 2.0).eval()
    cam = grad_cam(model, model.cam_layer(), batch_of(torch.full((1, 3, 8, 8), 0.5)), 0.5, contextlib.nullcontext)
    assert not cam.any()


@pytest.fixture
def opened(make_cell):
    def make(*overrides: str):
        cell_dir = make_cell("explained", *overrides)
        cell = CellConfig.load(cell_dir / "config.yaml")
        data = FoldData.open(cell, 0, cell_dir.parent.parent / "folds.csv")
        return cell, build_model(cell).eval(), data, cell_dir

    return make


def how() -> Predicting:
    cpu = torch.device("cpu")
    return Predicting(device=cpu, autocast=contextlib.nullcontext, stop=lambda: False, alive=lambda _: None)


def pictures(cell_dir):
    return {path.stem: np.asarray(Image.open(path)) for path in (cell_dir / "explain").iterdir()}


@pytest.mark.parametrize("overrides", [["model=xbusnet_small"], ["model=unet_small"], ["model.gfe=false"]])
def test_every_model_shows_the_same_images_at_the_networks_size(opened, overrides):
    cell, model, data, cell_dir = opened(*overrides, "evaluate.explain=3", "model.image_size=64")
    said: list[str] = []
    explain(Evaluation(cell, model, data, how(), World(), said.append), cell_dir / "explain")
    maps = pictures(cell_dir)
    assert set(maps) == {record.key for record in chosen(data.validation, 3)}
    assert all(picture.shape == (64, 64) and picture.dtype == np.uint8 for picture in maps.values())
    assert said == []
    assert all(parameter.grad is None for parameter in model.parameters())


def test_images_are_chosen_by_key_among_those_with_a_lesion(opened):
    _, _, data, _ = opened()
    without = [dataclasses.replace(record, lesion_pixels=0) for record in data.validation[:1]]
    part = without + data.validation[1:]
    assert chosen(part, 2) == chosen(part[::-1], 2) == chosen(part, 99)[:2]
    assert without[0] not in chosen(part, 99)


def test_xbusnets_map_is_of_the_second_pass(opened, monkeypatch):
    """The first pass gives a proposal and from it a sentence; the map explains what that sentence led to."""
    cell, model, data, cell_dir = opened("prompting.tau=0.01")
    handed = []
    predict = XBusNet.predict

    def listens(self, batch):
        prediction = predict(self, batch)
        handed.append((batch.conditions["spatial_prompts"], prediction.conditions["spatial_prompts"]))
        return prediction

    monkeypatch.setattr(XBusNet, "predict", listens)
    explain(Evaluation(cell, model, data, how(), World(), print), cell_dir / "explain")
    for (before, used), (given, _) in zip(handed[::2], handed[1::2], strict=True):
        assert isinstance(before[0], FirstPass)
        assert given == used != [""]


def test_what_cannot_be_explained_is_said_and_ends_nothing(opened, monkeypatch):
    cell, model, data, cell_dir = opened("model=unet_small", "model.image_size=64")
    said: list[str] = []
    monkeypatch.setattr(UNet, "cam_layer", lambda self: nn.Identity())
    explain(Evaluation(cell, model, data, how(), World(), said.append), cell_dir / "explain")
    assert [line.partition(":")[0] for line in said] == [
        f"no Grad-CAM map of {record.key}" for record in chosen(data.validation, cell.evaluate.explain)
    ]
    monkeypatch.setattr(UNet, "cam_layer", Model.cam_layer)
    explain(Evaluation(cell, model, data, how(), World(), said.append), cell_dir / "explain")
    assert said[-1] == "no Grad-CAM maps: UNet.cam_layer names no layer"
    assert pictures(cell_dir) == {}
