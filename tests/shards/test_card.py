"""Promises of cards: every dataset has one, and one that is wrong says where."""

from __future__ import annotations

import pytest
import yaml

from bushpc.errors import ConfigError, DataError
from bushpc.shards import sources
from bushpc.shards.card import PROJECT_SHARDS, Card


@pytest.mark.parametrize("name", sources.names())
def test_every_source_has_a_card_that_names_licence_and_citation(name):
    card = Card.load(PROJECT_SHARDS / name)
    assert card.name == name
    assert card.licence
    assert card.citation


def test_every_card_has_a_source():
    assert {path.parent.name for path in PROJECT_SHARDS.glob("*/card.yaml")} == set(sources.names())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"licence": None}, "'licence' must be a str, not NoneType"),
        ({"licens": "MIT"}, "unknown key 'licens'; did you mean 'licence'"),
        ({"counts": {"benin": 3}}, "unknown label 'benin'; did you mean 'benign'"),
        ({"columns": "Shape"}, "'columns' must be a list, not str"),
    ],
)
def test_a_wrong_card_says_where(tmp_path, change, message):
    content = yaml.safe_load((PROJECT_SHARDS / "breast" / "card.yaml").read_text())
    (tmp_path / "card.yaml").write_text(yaml.safe_dump({**content, **change}))
    with pytest.raises(DataError, match=message):
        Card.load(tmp_path)


def test_a_card_that_lacks_a_key_or_is_no_yaml_is_named(tmp_path):
    (tmp_path / "card.yaml").write_text("name: breast\ntitle: BrEaST\n")
    with pytest.raises(DataError, match=r"card\.yaml lacks 'what'"):
        Card.load(tmp_path)
    (tmp_path / "card.yaml").write_text("name: [breast\n")
    with pytest.raises(DataError, match="cannot be read as yaml"):
        Card.load(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        Card.load(tmp_path / "nowhere")


def test_parameters_are_overridden_by_name_and_with_numbers_only():
    card = Card.load(PROJECT_SHARDS / "phantom")
    assert card.override({"count": 7}).parameters == {**card.parameters, "count": 7}
    with pytest.raises(ConfigError, match="must be a number, such as 120"):
        card.override({"count": "many"})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="unknown parameter of breast 'count'"):
        Card.load(PROJECT_SHARDS / "breast").override({"count": 7})
