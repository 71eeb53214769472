"""Promises of two small texts: a size never reads as zero, and Ctrl-C speaks of what the command itself started."""

import dataclasses

import pytest

from bushpc.cli import app, main
from bushpc.files import size_text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (3_000, "3 kB"), (9_900_000, "9.9 MB"), (1_250_000_000, "1.25 GB")],
)
def test_a_size_is_shown_in_the_unit_that_fits_it(count, text):
    assert size_text(count) == text


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("pack", "interrupted; run the same command again to continue"),
        ("cv", "interrupted; submitted jobs continue (`bushpc status RUN`)"),
        ("config", "interrupted"),
    ],
)
def test_ctrl_c_says_what_goes_on_or_what_to_do(command, text, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    given = dataclasses.replace(app.commands()[command], run=interrupted)
    monkeypatch.setattr(app, "commands", lambda: {command: given})
    assert main([command, *(["data=phantom"] if command == "pack" else [])]) == 130
    assert capsys.readouterr().err.strip() == text
