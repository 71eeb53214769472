"""Plain English: `python -m tools.docs` refuses pages with words of words.csv, and sentences that are too long.

Code, tables and addresses are left out. vale is not used: its packages fetch a program when they are first run.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

LONGEST = 45  # words of a sentence
WORDS = Path(__file__).with_name("words.csv")


def faults(pages: Mapping[str, str]) -> list[str]:
    """What to change in the Markdown pages, by name → text: a line per fault."""
    with WORDS.open(encoding="utf-8", newline="") as file:
        rules = [(re.compile(rf"\b{row['instead of']}\b", re.IGNORECASE), row["write"]) for row in csv.DictReader(file)]
    found = []
    for name, text in pages.items():
        for sentence in sentences(text):
            start = " ".join(sentence.split()[:6])
            for pattern, better in rules:
                if bad := pattern.search(sentence):
                    found.append(f"{name}: '{bad.group()}' in '{start} …': write {better}")
            if len(sentence.split()) > LONGEST:
                found.append(f"{name}: a sentence of {len(sentence.split())} words, '{start} …': at most {LONGEST}")
    return found


def sentences(text: str) -> Iterator[str]:
    """The prose of a page, a sentence at a time.

    >>> list(sentences("# Title\\n\\nOne `a.b` two. Three\\nfour.\\n\\n```\\ncode. x\\n```\\n"))
    ['One CODE two.', 'Three four.']
    """
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"`[^`\n]+`", "CODE", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text):
        if not paragraph.lstrip().startswith(("|", "#", "    ")):
            yield from (each for each in re.split(r"(?<=[.!?:;])\s+", " ".join(paragraph.split())) if each)
