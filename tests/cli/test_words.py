"""Promises of typed words: a wrong word names the right one, every valid one, and an example that works."""

from __future__ import annotations

from pathlib import Path

import pytest

from bushpc.cli import main
from bushpc.cli.words import NUMBER, PATH, SWITCH, TEXT, WHOLE, Word, Words
from bushpc.errors import ConfigError

WORDS = Words(
    Word("out", PATH, "Folder to write.", required=True, instead_of=("dst",)),
    Word("workers", WHOLE, "Processes.", 2),
    Word("share", NUMBER, "A share.", 0.5),
    Word("excerpt", SWITCH, "Only a part.", False),
    Word("part", TEXT, "Which part.", "all", choices=("all", "validation")),
    Word("data", TEXT, "Datasets.", repeated=True),
    command="bushpc make",
    example="bushpc make out=here",
)


def test_values_have_their_types_and_defaults():
    assert WORDS.read(["out=~/x", "share=1e-2", "data=a", "data=b=c"]) == {
        "out": Path("~/x").expanduser(),
        "workers": 2,
        "share": 0.01,
        "excerpt": False,
        "part": "all",
        "data": ["a", "b=c"],
        "more": {},
    }
    # A text or path is taken as typed, whatever it looks like.
    for text in ("2026_11_30", "71e3442", "010", "12:30", "a b[c]=d#é"):
        assert WORDS.read([f"out={text}"])["out"] == Path(text)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dst=x"], "unknown word 'dst'; did you mean 'out'? Write out=x."),
        (["worker=3", "out=x"], "unknown word 'worker'; did you mean 'workers'? Write workers=3."),
        (["zzz=3", "out=x"], "Words of `bushpc make`: out=, workers=, share=, excerpt=, part=, data=."),
        (["out"], "'out': write key=value. Example: bushpc make out=here"),
        ([], "out= is missing: Folder to write. Example: bushpc make out=here"),
        (["out="], "out= has no value: a path is needed. Example: bushpc make out=here"),
        (["out=x", "out=y"], "out= is given 2 times (x, y): give it once"),
        (["out=x", "workers=1.5"], "workers=1.5: a whole number is needed, for example workers=4"),
        (["out=x", "share=much"], "share=much: a number is needed, for example share=4"),
        (["out=x", "excerpt=yes"], "excerpt=yes: true or false is needed, for example excerpt=true"),
        (["out=x", "part=al"], "unknown part 'al'; did you mean 'all'? Valid: all, validation."),
    ],
)
def test_a_wrong_word_is_refused_with_what_to_write(words, said):
    with pytest.raises(ConfigError) as refused:
        WORDS.read(words)
    assert said in str(refused.value)


def test_pack_names_out_where_a_user_writes_dst(tmp_path, capsys):
    assert main(["pack", "data=phantom", f"dst={tmp_path / 'x'}"]) == 2
    said = capsys.readouterr().err
    assert f"did you mean 'out'? Write out={tmp_path / 'x'}." in said
    assert "data=, src=, out=, workers=, excerpt=, " in said
    assert " count=, " in said
    assert "Example: bushpc pack data=phantom out=shards/phantom" in said


def test_help_shows_every_word_with_default_and_sentence():
    text = "\n".join(WORDS.lines())
    assert "out=                  Folder to write. (required)" in text
    assert "workers=              Processes. (default 2)" in text
    assert "one of all, validation; default all" in text
    assert "may be repeated" in text
