"""Promises of `bushpc shards list`: every card is there, and what lies packed is held against its manifest."""

from __future__ import annotations

import io
import json

import pytest

from bushpc.cli import main
from bushpc.shards import listing, sources
from bushpc.shards.card import PROJECT_SHARDS, Card
from bushpc.shards.write import pack


@pytest.fixture
def shards(tmp_path):
    """A shards folder in which the phantom is packed."""
    pack("phantom", None, tmp_path / "phantom", parameters={"count": 3, "normals": 1, "height": 64, "width": 80})
    return tmp_path


def entry(shards, name="phantom", **options):
    return {entry.name: entry for entry in listing.list_datasets(shards, **options)}[name]


def test_every_dataset_is_listed_as_its_card_says(shards):
    entries = listing.list_datasets(shards)
    assert [entry.name for entry in entries] == sources.names()
    for entry in entries:
        card = Card.load(PROJECT_SHARDS / entry.name)
        assert (entry.title, entry.licence, entry.where, entry.counts) == (
            card.title, card.licence, card.where, card.counts,
        )  # fmt: skip
        assert entry.verified == card.verified
        assert entry.packed == ("whole" if entry.name == "phantom" else "no")


def test_what_is_packed_has_its_counts_and_hash(shards):
    packed = entry(shards)
    assert sum(packed.scans.values()) == 4
    assert packed.scans["normal"] == 1
    assert f"manifest {packed.manifest[:12]}" in listing.plain_lines(packed)


def test_damage_is_seen_by_size_at_once_and_by_content_when_asked(shards):
    tar = shards / "phantom" / "lesion-000000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert entry(shards).packed == "whole"
    damaged = entry(shards, deep=True)
    assert damaged.packed == "damaged"
    assert "lesion-000000.tar: content altered" in listing.plain_lines(damaged)
    tar.write_bytes(whole[:-512])
    assert entry(shards).packed == "damaged"


def test_the_command_lists_lines_in_a_log_and_json_for_machines(capsys):
    main(["shards", "list"])
    said = capsys.readouterr().out
    assert "busi: BUSI" in said
    assert "437 benign, 210 malignant, 133 normal" in said
    main(["shards", "list", "--json"])
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert list(entries) == sources.names()
    assert entries["breast"]["verified"] is True
    assert entries["busi"]["verified"] is False


def test_the_table_holds_every_fact_on_a_terminal(shards):
    from rich.console import Console

    console = Console(width=160, record=True, file=io.StringIO())
    console.print(listing.listing_table(listing.list_datasets(shards)))
    said = console.export_text()
    assert "bus_uclm" in said
    assert "CC BY 4.0" in said
    assert "synthetic" in said
