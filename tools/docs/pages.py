"""The pages as sphinx reads them: copies of docs/ and of files beside it, with links that fit the site. A notebook
becomes a page with its text and code.

A folder's README.md becomes its index, and the order of its links is the order in the navigation. So a page that no
README links to is in no table of contents, which sphinx reports.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

# Pages that stand outside docs/ in the repository, and where they are on the site.
ELSEWHERE = {
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "SECURITY.md": "project/security.md",
    "benchmarks/README.md": "project/benchmarks.md",
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def write(root: Path, out: Path, generated: Mapping[str, str]) -> None:
    """Write every page into `out`. generated: text of further pages by their path on the site."""
    sources = {path.relative_to(root).as_posix(): _text(path) for path in _sources(root)}
    places = {name: place_of(name) for name in sources}
    texts = {places[name]: moved(text, name, places) for name, text in sources.items()} | dict(generated)
    texts["reference/index.md"] += _list_of(generated)
    for place, text in texts.items():
        path = out / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + contents(place, text, texts) if path.name == "index.md" else text, encoding="utf-8")
    for picture in [*root.glob("docs/**/*.svg"), *root.glob("docs/**/*.png")]:
        path = out / picture.relative_to(root / "docs")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture.read_bytes())


def _list_of(generated: Mapping[str, str]) -> str:
    """Links to the generated pages that no other generated page links to."""
    tops = [place for place in generated if place.count("/") == 1 or (place.count("/") == 2 and "/index" in place)]
    lines = [
        f"- [{generated[place].partition(chr(10))[0].lstrip('# ')}]({place.removeprefix('reference/')})"
        for place in tops
    ]
    return "\n## From the program itself\n\n" + "\n".join(lines) + "\n"


def _sources(root: Path) -> Iterator[Path]:
    yield from sorted([*root.glob("docs/**/*.md"), *root.glob("docs/**/*.ipynb")])
    yield from (root / name for name in ELSEWHERE if (root / name).exists())


def _text(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = [("".join(cell["source"]), cell["cell_type"]) for cell in json.loads(text)["cells"]]
    return "\n\n".join(source if kind == "markdown" else f"```python\n{source}\n```" for source, kind in cells) + "\n"


def place_of(name: str) -> str:
    """Where a file of the repository is on the site.

    >>> place_of("docs/how-to/README.md")
    'how-to/index.md'
    """
    place = re.sub(r"(^|/)README\.md$", r"\1index.md", name.removeprefix("docs/"))
    return ELSEWHERE.get(name) or re.sub(r"\.ipynb$", ".md", place)


def moved(text: str, name: str, places: Mapping[str, str]) -> str:
    """A page's text with its links as they must be on the site. A file that is no page there is named, not linked."""
    here = posixpath.dirname(place_of(name))

    def link(found: re.Match[str]) -> str:
        picture, words, target = found.groups()
        path, hash_, part = target.partition("#")
        if "://" in target or target.startswith(("#", "mailto:")) or picture:
            return found.group()
        goal = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
        place = places.get(goal) or (place_of(goal) if goal.startswith("docs/") else None)
        if place is None:
            return f"{words} (`{goal}`)"
        return f"[{words}]({posixpath.relpath(place, here or '.')}{hash_}{part})"

    return LINK.sub(link, text)


def contents(place: str, text: str, texts: Mapping[str, str]) -> str:
    """The hidden table of contents of an index: what it links to in its own folder, in the order of its links."""
    here = posixpath.dirname(place)
    linked = [posixpath.normpath(posixpath.join(here, target.partition("#")[0])) for _, _, target in LINK.findall(text)]
    below = [each for each in dict.fromkeys(linked) if each in texts and _belongs(each, here)]
    names = [os.path.relpath(each, here or ".").removesuffix(".md") for each in below]
    return "\n```{toctree}\n:hidden:\n\n" + "\n".join(names) + "\n```\n" if names else ""


def _belongs(place: str, folder: str) -> bool:
    """Whether an index of `folder` lists a page: one of the folder, or the index of a folder in it."""
    parent = posixpath.dirname(place)
    if posixpath.basename(place) == "index.md":
        parent, place = posixpath.dirname(parent), parent
        return parent == folder and place != folder
    return parent == folder
