"""`python -m tools.docs.pictures`: the pictures in docs/pictures, made anew from synthetic scans.

    phantom ─train two small networks→ runs ─bushpc report, compare, shards audit, shards show→ pages ─chromium→ PNG
                                            ├─bushpc predict --overlay→ PNG
                                            └─bushpc status→ SVG by rich

It takes some minutes and needs chromium. docs/pictures/made.json holds the hash of the files that decide what a picture
shows; `--check` compares them, and tools/release.sh refuses to release with pictures that are out of date.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "pictures"
NOTE = FOLDER / "made.json"
PAGES = "bushpc/report/templates/style.css"
# Picture → the files that decide what it shows.
SOURCES = {
    "report.png": (PAGES, "bushpc/report/templates/report.html.j2", "bushpc/report/conclusion.py"),
    "comparison.png": (PAGES, "bushpc/report/templates/report.html.j2", "bushpc/report/drawing.py"),
    "audit.png": (PAGES, "bushpc/report/templates/audit.html.j2"),
    "gallery.png": ("bushpc/report/templates/gallery.html.j2", "bushpc/report/templates/gallery.css"),
    "overlays.png": ("bushpc/evaluate/predict_output.py",),
    "status.svg": ("bushpc/dispatch/status_table.py",),
}
MODELS = ("unet_small", "hybrid_attention_small")
STEPS = 60
COLOURS = 96  # of a picture's palette: a third of the bytes of the full one, and no difference to the eye


def main() -> int:
    given = argparse.ArgumentParser(prog="python -m tools.docs.pictures", description=__doc__)
    given.add_argument("--check", action="store_true", help="only say which pictures are out of date; exit status 1")
    given.add_argument("--work", type=Path, help="keep the runs here, to continue or look at them")
    words = given.parse_args()
    if words.check:
        old = outdated()
        for name in old:
            print(f"docs/pictures/{name} is out of date: python -m tools.docs.pictures", file=sys.stderr)
        return 1 if old else 0
    with tempfile.TemporaryDirectory() as temporary:
        make((words.work or Path(temporary)).resolve())
    NOTE.write_text(json.dumps({name: _hash(name) for name in SOURCES}, indent=1) + "\n")
    return 0


def outdated() -> list[str]:
    """Pictures whose sources have changed since they were made, or that are missing."""
    made = json.loads(NOTE.read_text()) if NOTE.exists() else {}
    return [name for name in SOURCES if made.get(name) != _hash(name) or not (FOLDER / name).exists()]


def _hash(name: str) -> str:
    return hashlib.sha256(b"".join((ROOT / source).read_bytes() for source in SOURCES[name])).hexdigest()


def make(work: Path) -> None:
    """Train in `work`, and write every picture."""
    import bushpc
    from bushpc.shards.split import make_folds, write_folds

    FOLDER.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    os.chdir(work)  # so that no page names a folder of this machine
    shards = bushpc.pack("phantom", "shards/phantom", count=24)
    records = shards.manifest.records
    write_folds(shards.folder / "folds.csv", records, make_folds(records, k=2))
    for model in MODELS:
        for fold in (0, 1):
            if (model, fold) == (MODELS[1], 1):
                _status(Path("runs") / model)
            bushpc.train_cell(
                *(f"model={model}", "data=phantom", "data.root=shards/phantom", "cluster=local", "runs_dir=runs"),
                *(f"name={model}", f"fold={fold}", f"train.iterations={STEPS}", "model.image_size=64"),
            )
    first, second = (f"runs/{model}" for model in MODELS)
    _bushpc("report", first)
    _shot(Path(first) / "report" / "index.html", "report.png", 1280, 900)
    _bushpc("compare", first, second, "--out", "compare")
    _shot(Path("compare") / "index.html", "comparison.png", 1280, 900)
    _bushpc("shards", "audit", "data=shards/phantom", "out=audit")
    _shot(Path("audit") / "index.html", "audit.png", 1280, 800)
    _bushpc("shards", "show", "data=shards/phantom", "out=gallery")
    _shot(Path("gallery") / "index.html", "gallery.png", 1280, 800)
    _overlays(shards, first)


def _bushpc(*words: str) -> None:
    from bushpc.cli import main as command

    status = command(list(words))
    if status not in (None, 0, 1):
        raise SystemExit(f"bushpc {' '.join(words)} ended with {status}")


def _status(run: Path) -> None:
    from rich.console import Console

    from bushpc.dispatch.status import read_status
    from bushpc.dispatch.status_table import status_table

    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=88, file=nowhere)
        found = read_status(run)  # its logs would be where this script's output goes
        found = replace(found, cells=[replace(cell, log="") for cell in found.cells])
        console.print(status_table(found, console.width))
    svg = console.export_svg(title=f"bushpc status {run}")
    # rich has it load a font from the network; the fonts that it names after that are there everywhere.
    (FOLDER / "status.svg").write_text(re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL), encoding="utf-8")


def _overlays(shards: object, run: str) -> None:
    """Three scans with the contours that `bushpc predict --overlay` draws, side by side."""
    from bushpc.api import Shards

    assert isinstance(shards, Shards)
    scans = Path("scans")
    scans.mkdir(exist_ok=True)
    for record in shards.manifest.lesions[:3]:
        Image.fromarray(shards.image(record)).save(scans / f"{record.key}.png")
    _bushpc("predict", run, str(scans), "masks", "--overlay")
    pictures = [Image.open(path).convert("RGB") for path in sorted(Path("masks/overlays").glob("*.png"))]
    row = Image.new("RGB", (sum(each.width for each in pictures), max(each.height for each in pictures)))
    left = 0
    for each in pictures:
        row.paste(each, (left, 0))
        left += each.width
    _save(row, "overlays.png")


def _shot(page: Path, name: str, width: int, height: int) -> None:
    """The top of a page as Chromium shows it."""
    raw = Path(name).absolute()
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--window-size={width},{height}", f"--screenshot={raw}", page.absolute().as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120, env={**os.environ, "TZ": "UTC"})
    with Image.open(raw) as picture:
        _save(picture.convert("RGB"), name)


def _save(picture: Image.Image, name: str) -> None:
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(FOLDER / name, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
