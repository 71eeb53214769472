"""Valid files, changed, as by a disk, a careless editor or an attacker; the same seed makes the same change."""

from __future__ import annotations

import json
import random
import re
import struct
import typing as t
import zlib
from collections.abc import Callable

from ..test_fuzz import ODD_FILES, ODD_TEXTS, places

HUGE = [0, -1, 1e999, -1e999, 1e-320, 2**31, 2**63, -(2**63), 2**64, 10**30, 10**400]
OTHERS: list[t.Any] = [
    None,
    True,
    "",
    "x",
    [],
    {},
    [[]],
    {"a": {"b": []}},
    [None],
    [1],
    float("nan"),
    *HUGE,
    *ODD_TEXTS,
]
TOKEN = re.compile(rb"[\w.+-]+|[^\w\s]")
Change = Callable[[random.Random, bytes], bytes]


def mutant(content: bytes, seed: str) -> bytes:
    """One to four changes."""
    chance = random.Random(seed)
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        content = chance.choice(CHANGES)(chance, content)
    return repaired(content) if chance.random() < 0.7 else content


def _span(chance: random.Random, content: bytes, most: int = 64) -> tuple[int, int]:
    begin = chance.randrange(len(content) + 1)
    return begin, min(len(content), begin + chance.randrange(1, most))


def cut(chance: random.Random, content: bytes) -> bytes:
    """The end is missing, or a part of the middle."""
    begin, end = _span(chance, content)
    return content[:begin] + (content[end:] if chance.random() < 0.5 else b"")


def flip(chance: random.Random, content: bytes) -> bytes:
    """Some bits, most often near the start, where headers are."""
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 3, 20]) if content else 0):
        changed[int(len(changed) * chance.random() ** chance.choice([1, 4]))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def swap(chance: random.Random, content: bytes) -> bytes:
    """Two parts change their places."""
    (a, b), (c, d) = sorted([_span(chance, content), _span(chance, content)])
    return content if b > c else content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def double(chance: random.Random, content: bytes) -> bytes:
    """A line, or a part, comes twice."""
    begin, end = _span(chance, content, 400)
    end = content.find(b"\n", begin) + 1 or end
    return content[:end] + content[begin:end] + content[end:]


def huge(chance: random.Random, content: bytes) -> bytes:
    """A binary number is at its limit."""
    kind = chance.choice(["<B", "<H", ">H", "<I", ">I", "<Q", ">Q"])
    size = struct.calcsize(kind)
    begin = int(len(content) * chance.random() ** 3)
    value = chance.choice([0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1])
    return content[:begin] + struct.pack(kind, value) + content[begin + size :]


def token(chance: random.Random, content: bytes) -> bytes:
    """A word, number or sign of a text is another, gone, or inside brackets."""
    found = list(TOKEN.finditer(content[:20_000]))
    if not found:
        return content
    at = chance.choice(found)
    value = chance.choice(OTHERS)
    texts = [
        json.dumps(value),
        str(value),
        "",
        f"[{at[0].decode(errors='replace')}]",
        "!!binary x",
        "&a",
        "*a",
        '"',
        ",",
    ]
    return content[: at.start()] + chance.choice(texts).encode(errors="replace") + content[at.end() :]


def document(chance: random.Random, content: bytes) -> bytes:
    """A value of a JSON document, at any depth, is another, gone, or deep inside."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return token(chance, content)
    where = chance.choice(places(found))
    if not where:
        return json.dumps(chance.choice(OTHERS)).encode(errors="replace")
    parent = found
    for key in where[:-1]:
        parent = parent[key]
    if chance.random() < 0.2:
        del parent[where[-1]]
    elif chance.random() < 0.1:
        parent[where[-1]] = [parent[where[-1]]]
    else:
        parent[where[-1]] = chance.choice(OTHERS)
    return json.dumps(found).encode(errors="replace")


def replace(chance: random.Random, content: bytes) -> bytes:
    """All of it is another file; seldom, as a parser only has so many beginnings."""
    return chance.choice(ODD_FILES) if chance.random() < 0.3 else flip(chance, content)


CHANGES: list[Change] = [cut, flip, swap, double, huge, token, token, document, document, document, replace]


def repaired(content: bytes) -> bytes:
    """A PNG with the checksums of what it holds by now: readers see the change behind them."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    made, at = [content[:8]], 8
    while at + 12 <= len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        body = content[at + 4 : at + 8 + length]
        made.append(content[at : at + 4] + body + struct.pack(">I", zlib.crc32(body)))
        at += 12 + length
    return b"".join(made) + content[at:]
