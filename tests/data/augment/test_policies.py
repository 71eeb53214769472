"""Promises of `augment=`: which policy applies, what old runs keep, and what is rejected before anything is queued."""

from __future__ import annotations

import re

import pytest

from bushpc.config import CellConfig, Composer, compose, config_names
from bushpc.dispatch.grid_file import load_grid
from bushpc.errors import ConfigError

WORDS = ("data=phantom", "cluster=local")
OLD = ("hflip", "rotate", "zoom", "brightness", "contrast", "strength", "variants")


def test_a_model_chooses_a_policy_and_a_word_wins_over_it():
    paper = compose([*WORDS, "model=sam_multitask_small"])
    assert (paper.choices["augment"], paper.augment.method, paper.augment.rotate) == (
        "sam_multitask",
        "torchvision",
        15,
    )
    assert not compose([*WORDS, "model=sam_multitask_small", "augment=none"]).augment.changes
    light = compose([*WORDS, "model=sam_multitask_small", "augment=light"]).augment
    assert (light.method, light.variants, light.strength.benign) == ("one_warp", 4, 0)
    assert not compose([*WORDS, "model=unet_small"]).augment.changes


def test_the_grid_has_a_row_for_every_policy():
    grid = load_grid("augmentation")
    composer = Composer([*grid.base, *WORDS, "model.pretrained=false"])
    assert [composer(row.settings).choices["augment"] for row in grid.rows] == [row.name for row in grid.rows]
    assert {row.name for row in grid.rows} == {*config_names("augment")} - {"sam_multitask"}


def test_a_frozen_config_without_methods_keeps_its_draws_and_its_hash():
    new = compose([*WORDS, "model=unet_small", "augment.hflip=0.5", "augment.method=torchvision"])
    content = new.to_dict()
    content["augment"] = {name: content["augment"][name] for name in OLD}
    old = CellConfig.from_dict(content)
    assert (old.augment.method, old.hash) == ("torchvision", new.hash)
    assert compose([*WORDS, "model=unet_small", "augment.hflip=0.5"]).hash != old.hash
    assert not [key for key in old.settings if key.startswith("augment.") and key.split(".")[1] not in OLD]


def test_without_augmentation_the_hash_knows_of_no_method():
    ways = ([], ["augment=none"], ["augment.method=torchvision"])
    cells = [compose([*WORDS, "model=unet_small", *words]) for words in ways]
    assert len({cell.hash for cell in cells}) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("augment=lite", "unknown augment 'lite'; did you mean 'light'?"),
        ("augment.gama=1", "did you mean 'augment.gamma'?"),
        ("augment.gamma_range=[1.5,0.7]", "must be two numbers from 0.2 to 5, the lower one first"),
        ("augment.gamma_range=[0.7]", "must be two numbers from 0.2 to 5"),
        ("augment.translate_range=[-0.6,0.1]", "must be two numbers from -0.4 to 0.4"),
        ("augment.keep_lesion=0", "must be > 0 and ≤ 1"),
        ("augment.method=torchvision augment.gamma=1", "set augment.method=one_warp"),
        ("augment.method=torchvision augment.where=device", "set augment.method=one_warp"),
        (
            "augment.translate=1 augment.translate_range=[0.3,0.4] augment.depth=1 augment.depth_range=[0.8,1]",
            "move a lesion in the middle of the scan by up to 0.53 of the edge, out of the image",
        ),
    ],
)
def test_a_policy_that_cannot_work_is_rejected_and_the_message_says_what_is_allowed(words, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        compose([*WORDS, "model=unet_small", *words.split()])


def test_kept_features_need_scans_that_the_loader_changes():
    with pytest.raises(ConfigError, match=r"augment.where=device.*set augment.where=workers"):
        compose([*WORDS, "model=sam_multitask", "augment=light", "augment.where=device"])
