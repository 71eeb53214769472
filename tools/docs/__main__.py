"""`python -m tools.docs [OUT]`: write the pages, then the site; any warning, such as a dead link, is an error."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main(out: Path) -> int:
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


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "docs"))
