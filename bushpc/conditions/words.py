"""What a user may state in words about a new image: descriptors of the BI-RADS lexicon, sentences of bounded length.

Descriptors are worded as BrEaST has them, on which the models train; a sentence is read by CLIP's text encoder, which
drops whatever follows its 77th token.
"""

from __future__ import annotations

import functools
import re
import typing as t

from bushpc.errors import DataError, unknown_name

CATEGORIES = ("0", "1", "2", "3", "4", "4a", "4b", "4c", "5", "6")
SHAPES = ("oval", "round", "irregular")
CIRCUMSCRIBED, NOT_CIRCUMSCRIBED = "circumscribed", "not circumscribed"
MARGIN_KINDS = ("angular", "indistinct", "microlobulated", "spiculated")
NO_VALUE = ("", "not available", "not applicable", "n/a", "na", "nan")
MOST_TOKENS = 77  # of CLIP's text encoder, with the one that begins and the one that ends a sentence


def descriptor(column: str, given: str) -> str | None:
    """The value of `shape`, `margin` or `birads` as in training; None if the cell states nothing.

    >>> descriptor("birads", "BI-RADS 4A"), descriptor("margin", "Not circumscribed - angular & indistinct")
    ('4a', 'not circumscribed - angular&indistinct')

    Raises: DataError for any other word.
    """
    text = " ".join(given.lower().split())
    return None if text in NO_VALUE else _OF[column](text, given)


def _shape(text: str, given: str) -> str:
    return _one_of("shape", text, given, SHAPES)


def _birads(text: str, given: str) -> str:
    # A program that read the column as numbers writes 4.0.
    number = re.sub(r"^bi-?rads\s*|\.0$", "", text)
    return _one_of("birads", number, given, CATEGORIES)


def _margin(text: str, given: str) -> str:
    said = re.match(r"(not circumscribed|circumscribed)?\W*(?:and )?(.*)", text)
    assert said is not None, "every part may be empty"
    words = (CIRCUMSCRIBED, NOT_CIRCUMSCRIBED, *MARGIN_KINDS)
    kinds = [_one_of("margin", kind, given, words) for kind in _parts(said[2])]
    if kinds and CIRCUMSCRIBED in (said[1], *kinds):
        raise DataError(f"margin '{given}': a circumscribed margin has no kinds; they belong to '{NOT_CIRCUMSCRIBED}'")
    if not kinds:
        return said[1]
    return f"{NOT_CIRCUMSCRIBED} - {'&'.join(kinds)}"


def _parts(text: str) -> list[str]:
    return [part for part in re.split(r"\s*(?:[&,;/+]|\band\b)\s*", text) if part]


def _one_of(column: str, text: str, given: str, words: t.Sequence[str]) -> str:
    if text not in words:
        then = "Other words go into the column attribute_prompt, as a whole sentence."
        raise DataError(unknown_name(f"word of {column}", given, words, then))
    return text


_OF = {"shape": _shape, "margin": _margin, "birads": _birads}


def refuse_long(sentence: str, where: str) -> str:
    """The sentence. where: whose it is, for the message. Raises: DataError if the text encoder would miss its end."""
    # A token has at least one character, so most sentences need no count.
    if len(sentence) <= MOST_TOKENS - 2 or (tokens := count_tokens(sentence)) <= MOST_TOKENS:
        return sentence
    raise DataError(
        f"{where} has {tokens} tokens, and the text encoder reads {MOST_TOKENS} (with one each for start and end): "
        f"shorten it. It begins '{sentence[:40]}…'"
    )


def count_tokens(sentence: str) -> int:
    """Tokens of CLIP's text encoder, with start and end."""
    return len(_tokenizer().encode(sentence)) + 2


@functools.cache
def _tokenizer() -> t.Any:
    from open_clip.tokenizer import SimpleTokenizer  # takes seconds to import

    return SimpleTokenizer()
