"""BUSSAM: SAM's own prompt encoder is the reference; the place is read, and peeks at the mask only as `oracle`."""

import numpy as np
import pytest
import torch

from bushpc.conditions.places import FirstPlace, PlacePrompt, box_of, point_of
from bushpc.config import compose
from bushpc.errors import ConfigError, DataError
from bushpc.models.bussam import Bussam

PLACES = {"point": [(0.25, 0.5), (0.6, 0.7)], "box": [(0.1, 0.2, 0.5, 0.6), (0.3, 0.3, 0.9, 0.8)]}


def build(**words):
    given = [f"model.{name}={value}" for name, value in words.items()]
    return Bussam(compose(["model=bussam_small", "model.image_size=32", "model.window=3", *given]).model)


@pytest.mark.parametrize("kind", PLACES)
def test_a_place_is_embedded_as_sam_does_and_every_trained_parameter_learns(kind, make_batch):
    model, places = build(prompt=kind), PLACES[kind]
    tokens, dense = model._prompted(places, torch.device("cpu"))
    pixels = torch.tensor(places)[:, None] * 32 - 0.5  # SAM's code takes whole pixels, and adds a half
    model.prompts.mask_embed = None
    if kind == "point":
        expected, theirs = model.prompts(pixels[:, None], torch.ones(2, 1, 1), None, None)
    else:
        expected, theirs = model.prompts(None, None, pixels, None)
    torch.testing.assert_close(tokens, expected)
    torch.testing.assert_close(dense, theirs)
    batch = make_batch(32, 2, conditions={"place_prompts": places})
    model.train()(batch).total.backward()
    model.zero_grad()
    with torch.no_grad():
        for adapter in (model.entry, *(crossing.adapter for crossing in model.crossings.values())):
            adapter.up.weight.fill_(0.01)  # they start at zero, behind which there is no gradient
    model(batch).total.backward()
    assert [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None] == []


def test_the_first_pass_asks_at_its_own_prediction_and_the_mask_is_not_read(make_batch):
    model = build().eval()
    given = {"place_prompts": [FirstPlace(kind="point", tau=0.0), ()]}
    with torch.no_grad():
        first = model.predict(make_batch(32, 2, conditions={"place_prompts": [(), ()]}))
        made = model.predict(make_batch(32, 2, conditions=given))
        other = model.predict(make_batch(32, 2, conditions=given, mask_BKHW=torch.ones(2, 1, 32, 32)))
    everywhere = point_of(np.ones((32, 32), dtype=bool))  # a threshold of 0 takes in every pixel
    assert made.conditions["place_prompts"] == [everywhere, ()]
    assert not torch.equal(made.prob_BKHW[0], first.prob_BKHW[0])
    torch.testing.assert_close(made.prob_BKHW, other.prob_BKHW, rtol=0, atol=0)


def test_places_of_a_mask_by_hand_and_mirrored():
    mask = np.zeros((10, 20), dtype=bool)
    mask[2:5, 4:9] = True
    assert box_of(mask) == (0.2, 0.2, 0.45, 0.5)
    assert point_of(mask) == (5.5 / 20, 3.5 / 10)  # the middle row is 2 pixels from every edge but the sides
    assert point_of(np.zeros((4, 4), dtype=bool)) == box_of(np.zeros((4, 4), dtype=bool)) == ()
    for kind, of in (("point", point_of), ("box", box_of)):
        flipped = PlacePrompt(kind=kind).mirrored(of(mask))
        expected = box_of(mask[:, ::-1]) if kind == "box" else (1 - 5.5 / 20, 3.5 / 10)
        assert flipped == pytest.approx(expected)


def test_only_oracle_is_declared_to_use_the_ground_truth_and_does(make_batch):
    kind = PlacePrompt(kind="box")
    mask = np.eye(8, dtype=bool)
    assert {v.name: v.uses_ground_truth for v in build().config.variants} == {
        "first_pass": False, "oracle": True, "none": False
    }  # fmt: skip
    values = {v: kind.shown(v, [], None)(None, mask) for v in ("first_pass", "oracle", "none")}
    assert values["oracle"] == (0, 0, 1, 1)
    assert values["none"] == ()
    assert values["first_pass"] == FirstPlace(kind="box", tau=0.5)


@pytest.mark.parametrize("text", ["0.1 0.2", "0.5 0.2 0.1 0.6", "a b c d", "0 0 1 2"])
def test_a_box_that_cannot_be_is_refused(text):
    with pytest.raises(DataError, match="left top right bottom"):
        PlacePrompt(kind="box").from_user({"place_prompt": text})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.cross_blocks=[9]"], "model.cross_blocks"),
        (["model.dice_weight=0", "model.bce_weight=0"], "leave no loss"),
        (["model.neck=60"], "no multiple of 4 x"),
    ],
)
def test_what_cannot_be_built_is_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        compose(["model=bussam_small", *words])
