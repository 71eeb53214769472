"""`python -m tools.docs [OUT]`: check the prose, write the pages, then the site.

Any fault is an error, and so is any warning, such as a dead link. Pictures that are out of date are only named.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main(out: Path) -> int:
    from tools.docs import pictures, prose

    wrong = prose.faults({path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in _prose()})
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 1
    if old := pictures.outdated():
        print(f"pictures that are out of date: {', '.join(old)}; python -m tools.docs.pictures makes them")
    if sys.version_info < (3, 11):
        print("the site is not built: sphinx needs Python 3.11 or later")
        return 0
    from sphinx.cmd.build import build_main

    from tools.docs import api, pages, reference

    source, site = out / "pages", out / "site"
    for folder in (source, site):
        shutil.rmtree(folder, ignore_errors=True)
    source.mkdir(parents=True)
    generated = {**reference.pages(), **api.pages()}
    pages.write(ROOT, source, generated)
    shutil.copy(Path(__file__).with_name("conf.py"), source)
    shutil.copytree(Path(__file__).with_name("static"), source / "static")
    strict = ["-q", "-W", "--keep-going", "-b", "html"]
    status = int(build_main([*strict, "-d", str(out / "doctrees"), str(source), str(site)]))
    if status == 0:
        print(f"{len(list(source.rglob('*.md')))} pages: {site / 'index.html'}")
    return status


def _prose() -> list[Path]:
    """Pages that people read from top to bottom; not the changes, which are notes, nor measured numbers."""
    return [
        *sorted(ROOT.glob("docs/**/*.md")),
        *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
    ]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "docs"))
