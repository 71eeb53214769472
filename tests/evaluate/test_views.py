"""Test-time augmentation: what each view sees, how it comes back, and who may have it."""

from __future__ import annotations

import dataclasses
import typing as t

import pytest
import torch
from torch.nn import functional as F

from bushpc.conditions.sentences import FirstPass, SizeBins, SpatialPrompt
from bushpc.config import ModelConfig, compose, config_class
from bushpc.config.inference import scaled_sizes
from bushpc.errors import ConfigError
from bushpc.evaluate.views import mean_of, predict, views_of
from bushpc.models.base import Model
from bushpc.sample import Batch, Prediction

SIZE = 32
BINS = SizeBins(low=0.1, high=0.3)
SENTENCE = "a small lesion in the upper inner quadrant"


@config_class
class FreeConfig(ModelConfig):
    """Of a network that reads images of any even size."""

    @property
    def size_stride(self) -> int:
        return 2


class Listening(Model):
    """Predicts what `rule` says, and keeps the batches that it saw."""

    Config = FreeConfig
    makes = frozenset({"prob_BKHW"})

    def __init__(self, rule: t.Callable[[Batch], torch.Tensor]) -> None:
        super().__init__(FreeConfig(image_size=SIZE, pretrained=False))
        self.rule, self.seen = rule, []

    def predict(self, batch: Batch) -> Prediction:
        self.seen.append(batch)
        return Prediction(prob_BKHW=self.rule(batch), conditions=batch.conditions)


@pytest.fixture
def batch() -> Batch:
    image_BCHW = F.interpolate(torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), (SIZE, SIZE))
    zeros = torch.zeros(2, 1, SIZE, SIZE)
    return Batch(keys=["a", "b"], epochs=[0, 0], image_BCHW=image_BCHW, mask_BKHW=zeros, label_B=torch.zeros(2).long())


def run(model: Listening, batch: Batch, tta: str, kinds: t.Sequence[t.Any] = ()) -> Prediction:
    return predict(model, batch, kinds, views_of(tta, model.config))


def test_without_it_the_prediction_is_the_models_own(batch) -> None:
    model = Listening(lambda seen: seen.image_BCHW[:, :1])
    assert run(model, batch, "none").prob_BKHW.data_ptr() == batch.image_BCHW.data_ptr()
    assert [seen is batch for seen in model.seen] == [True]


def test_maps_come_back_to_their_place(batch) -> None:
    """A network that only copies its input gives the input back, to the pixel where nothing is scaled."""
    model = Listening(lambda seen: seen.image_BCHW[:, :1])
    assert torch.equal(run(model, batch, "mirror").prob_BKHW, batch.image_BCHW[:, :1])
    scaled = run(model, batch, "mirror_scale").prob_BKHW
    assert [seen.image_BCHW.shape[-1] for seen in model.seen[2:]] == [32, 32, 24, 24, 40, 40]
    inside = F.max_pool2d((scaled - batch.image_BCHW[:, :1]).abs(), 1)[..., 3:-3:8, 3:-3:8]
    assert float(inside.max()) < 0.05  # in the middle of even squares


def test_probabilities_are_averaged(batch) -> None:
    """A network that sees a lesion on the left of whatever it is shown: half of one on either side."""

    def on_the_left(seen: Batch) -> torch.Tensor:
        prob = torch.zeros_like(seen.image_BCHW[:, :1])
        prob[..., : prob.shape[-1] // 2] = 0.8
        return prob

    found = run(Listening(on_the_left), batch, "mirror").prob_BKHW
    assert torch.equal(found, torch.full_like(found, 0.4))


def test_words_for_left_and_right_change_places_in_the_mirror_and_back(batch) -> None:
    kind = SpatialPrompt(bins=BINS)
    later = FirstPass(bins=BINS, tau=0.5)
    given = dataclasses.replace(batch, conditions={"spatial_prompts": [SENTENCE, later]})
    model = Listening(lambda seen: seen.image_BCHW[:, :1])
    made = run(model, given, "mirror", [kind])
    straight, mirrored = (seen.conditions["spatial_prompts"] for seen in model.seen)
    assert straight == [SENTENCE, later]
    assert mirrored == [SENTENCE.replace("inner", "outer"), later]
    assert made.conditions["spatial_prompts"] == [SENTENCE, later]


def test_kept_features_of_the_image_are_not_those_of_its_mirror_image(batch) -> None:
    model = Listening(lambda seen: seen.image_BCHW[:, :1])
    run(model, dataclasses.replace(batch, features={"tokens": torch.zeros(2, 1)}), "mirror")
    assert [seen.features is None for seen in model.seen] == [False, True]


def test_the_uncertainty_of_samples_covers_the_views() -> None:
    """Two views of two samples each: 0, 0.4 and 0.6, 1 have the mean 0.5 and, as four samples, this deviation."""
    samples = torch.tensor([0.0, 0.4, 0.6, 1.0])
    passes = [
        Prediction(prob_BKHW=two.mean().reshape(1, 1, 1, 1), uncertainty_BKHW=two.std(correction=0).reshape(1, 1, 1, 1))
        for two in (samples[:2], samples[2:])
    ]
    mean = mean_of(passes)
    assert float(mean.prob_BKHW) == pytest.approx(0.5)
    assert float(mean.uncertainty_BKHW) == pytest.approx(float(samples.std(correction=0)))


def test_sizes_are_multiples_of_the_stride_and_differ() -> None:
    assert scaled_sizes(352, 32) == (256, 352, 448)
    assert scaled_sizes(64, 32) == (32, 64, 96)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model=xbusnet", "evaluate.tta=mirror_scale"], "XBusNet reads images of 352 pixels a side alone; use mirror"),
        (["model=vit_diffusion", "evaluate.tta=mirror_scale"], "VitDiffusion reads images of 256 pixels a side alone"),
        (["model=nnunet", "evaluate.tta=mirror"], "averages over mirror images by itself"),
        (["model=tumor_generator", "evaluate.tta=mirror"], "predicts neither masks nor labels"),
        (["model=unet", "model.image_size=32", "evaluate.tta=mirror_scale"], "has no smaller multiple of 32"),
        (["model=unet", "evaluate.tta=flip"], "evaluate.tta"),
    ],
)
def test_a_model_that_cannot_says_so_when_the_command_is_composed(words, expected) -> None:
    with pytest.raises(ConfigError, match=expected):
        compose([*words, "data=breast", "cluster=local"])


@pytest.mark.parametrize(
    "words",
    [
        ["model=xbusnet", "evaluate.tta=mirror"],
        ["model=unet", "evaluate.tta=mirror_scale"],
        ["model=vit_diffusion", "model.inference=generative", "evaluate.tta=mirror"],
    ],
)
def test_a_model_that_can_is_composed(words) -> None:
    assert compose([*words, "data=breast", "cluster=local"]).evaluate.tta == words[-1].partition("=")[2]


def test_off_it_changes_no_hash() -> None:
    plain = compose(["model=unet", "data=breast", "cluster=local"])
    off = compose(["model=unet", "data=breast", "cluster=local", "evaluate.tta=none", "evaluate.resolution=network"])
    assert off.hash == plain.hash
    assert not {"evaluate.tta", "evaluate.resolution"} & set(plain.settings)
