"""A model conditioned on boxes needs its file and a kind of condition; loader, evaluator and CSV stay as they are."""

from __future__ import annotations

import csv
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from bushpc.cell import build_model
from bushpc.conditions import Condition, Variant
from bushpc.config import CellConfig, ModelConfig, compose, config_class
from bushpc.data.batches import training_batches
from bushpc.data.loader import FoldData
from bushpc.dist import World
from bushpc.errors import ConfigError
from bushpc.evaluate.evaluate import Evaluation, Predicting, evaluate
from bushpc.evaluate.predict import Wanted, predict_files
from bushpc.evaluate.predictor import Member, Predictor, Recipe
from bushpc.losses.overlap import overlap_losses
from bushpc.models.base import Model
from bushpc.runs.layout import CellDir
from bushpc.sample import Prediction


class Box(Condition):
    """Left, top, right, bottom of the lesion in shares of the image's edge; all of it where nothing is known."""

    name = "boxes"
    absent = (0.0, 0.0, 1.0, 1.0)
    from_mask = True
    column = "box"

    def of(self, scan, mask_HW):
        rows, columns = np.nonzero(mask_HW)
        height, width = mask_HW.shape
        if not len(rows):
            return self.absent
        return columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height

    def shown(self, variant, part, draw):
        return self.of if variant == "box_of_mask" else lambda scan, mask_HW: self.absent

    def written(self, value):
        return " ".join(f"{edge:.3f}" for edge in value)

    def from_user(self, given):
        return tuple(map(float, given["box"].split())) if given.get("box") else None

    def mirrored(self, value):
        left, top, right, bottom = value
        return 1 - right, top, 1 - left, bottom


@config_class
class InBoxConfig(ModelConfig):
    @property
    def conditions(self):
        return (Box(),)

    @property
    def variants(self):
        return (
            Variant(name="whole_image", label="the whole image"),
            Variant(name="box_of_mask", label="the lesion's box (uses the ground-truth mask)", uses_ground_truth=True),
        )


class InBox(Model):
    """Everything inside of the box is lesion."""

    Config = InBoxConfig
    makes = frozenset({"prob_BKHW"})

    def __init__(self, config, weights_dir=None):
        super().__init__(config, weights_dir)
        self.gain = torch.nn.Parameter(torch.ones(()))

    def inside(self, batch):
        maps = torch.zeros_like(batch.image_BCHW[:, :1])
        size = maps.shape[-1]
        for map_1HW, box in zip(maps, batch.conditions["boxes"], strict=True):
            left, top, right, bottom = (round(float(edge) * size) for edge in box)
            map_1HW[:, top:bottom, left:right] = 1
        return maps

    def forward(self, batch):
        logits_BKHW = self.gain * (2 * self.inside(batch) - 1)
        return overlap_losses(logits_BKHW, batch.mask_BKHW, dice_weight=1.0, bce_weight=1.0)

    def predict(self, batch):
        return Prediction(prob_BKHW=self.inside(batch))


@pytest.fixture
def cell(make_cell):
    folder = make_cell("boxes", "model=unet_small", "also_prompts=[none]")
    frozen = CellConfig.load(folder / "config.yaml")
    words = {"prompts": "box_of_mask", "also_prompts": ("whole_image",)}
    return folder, dataclasses.replace(
        frozen, model_class=InBox, model=InBoxConfig(image_size=64, pretrained=False), **words
    )


def test_a_model_conditioned_on_boxes_is_trained_and_evaluated_by_what_is_there(cell):
    folder, config = cell
    data = FoldData.open(config, 0, folder.parent.parent / "folds.csv")
    batch = next(training_batches(config, data, World(), 0)).to("cpu")
    model = build_model(config)
    boxed = model.predict(batch).prob_BKHW
    assert ((boxed >= batch.mask_BKHW).all(), bool((boxed < 1).any())) == (True, True)
    assert model(batch).total.requires_grad

    how = Predicting(device=torch.device("cpu"), autocast=torch.no_grad, stop=lambda: False, alive=lambda where: None)
    assert evaluate(Evaluation(config, model, data, how, World(), print), CellDir(folder), 1)
    with (folder / "per_image.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    by_variant = {name: [row for row in rows if row["prompts"] == name] for name in ("box_of_mask", "whole_image")}
    assert {row["box"] for row in by_variant["whole_image"]} == {"0.000 0.000 1.000 1.000"}
    assert all(row["box"] != "0.000 0.000 1.000 1.000" for row in by_variant["box_of_mask"])
    dice = {name: np.mean([float(row["dice"]) for row in part]) for name, part in by_variant.items()}
    assert dice["box_of_mask"] > 0.6 > dice["whole_image"]


def test_a_new_image_is_predicted_with_the_box_that_its_table_states(cell, tmp_path):
    _, config = cell
    recipe = Recipe(threshold=0.5, device="cpu", precision="fp32", batch_size=2)
    member = Member(name="fold0", model=build_model(config), conditions=config.model.conditions, sha256="")
    predictor = Predictor([member], recipe, device="cpu", tta=True)
    pixels = np.zeros((64, 64, 3), np.uint8)
    boxed, whole = predictor(pixels, box="0.25 0.5 0.5 1"), predictor(pixels)
    assert boxed.mask_HW[32:, 16:32].all()
    assert (boxed.area_px, whole.area_px) == (16 * 32, 64 * 64)
    assert boxed.conditions == {"box": ["0.250 0.500 0.500 1.000"]}
    with pytest.raises(ConfigError, match="did you mean 'box'"):
        predictor(pixels, bx="0 0 1 1")

    (tmp_path / "known.csv").write_text("file,box\na.png,0.25 0.5 0.5 1\n")
    Image.fromarray(pixels).save(tmp_path / "a.png")
    wanted = Wanted(prompts=tmp_path / "known.csv")
    predict_files(predictor, tmp_path / "a.png", tmp_path / "out", wanted, lambda done, count, line: None)
    assert (np.asarray(Image.open(tmp_path / "out" / "masks" / "a.png")) == boxed.mask_HW * 255).all()


def test_variants_are_the_models_own_and_others_become_its_first(cell):
    _, config = cell
    assert [variant.name for variant in config.variants] == ["box_of_mask", "whole_image"]
    asked = dataclasses.replace(config, prompts="first_pass", also_prompts=("oracle", "box_of_mask"))
    assert [variant.name for variant in asked.variants] == ["whole_image", "box_of_mask"]
    with pytest.raises(ConfigError, match="box_of_mask"):
        dataclasses.replace(config, prompts="box_of_masc")
    with pytest.raises(ConfigError, match="prompt source"):  # of another model
        compose(["model=unet_small", "prompts=box_of_mask"])
