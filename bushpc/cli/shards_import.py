"""`bushpc shards import`: a cohort of the user's own → shards, without code; corrected masks → packed shards."""

from __future__ import annotations

import os
import typing as t
from pathlib import Path

from bushpc.cli.command import Arguments, Command, option
from bushpc.cli.show import print_packed, warn
from bushpc.cli.words import NUMBER, PATH, SWITCH, TEXT, WHOLE, Word, Words
from bushpc.errors import ConfigError

if t.TYPE_CHECKING:
    from bushpc.shards.exchange.settings import ImportSettings
    from bushpc.shards.exchange.take_in import Examined

KINDS = ("folder", "nnunet", "coco", "dicom")
ABOUT = ("title", "what", "licence", "citation", "where")
EXAMPLE = "bushpc shards import data=mine src=/data/mine table=list.csv patients=case label=diagnosis dry_run=true"

WORDS = Words(
    Word("data", TEXT, "Name of the new dataset, then used as data=NAME.", required=True, instead_of=("name",)),
    Word("src", PATH, "The raw folder.", instead_of=("source", "from", "folder", "raw", "input")),
    Word("out", PATH, "Folder for the shards.", shown="shards/<data>", instead_of=("dst", "dest", "to", "output")),
    Word("kind", TEXT, "Layout of the raw folder.", choices=KINDS, shown="found", instead_of=("format", "layout")),
    Word("card", PATH, "A card.yaml that an earlier import or dry run wrote; words change what it says."),
    Word("dry_run", SWITCH, "Write a page with counts, problems and pictures, and pack nothing.", False),
    Word("images", TEXT, "Folder of the images, inside src.", shown="found", instead_of=("image_dir", "image_folder")),
    Word(
        "masks",
        TEXT,
        "Folder of the masks, or a pattern such as masks/{name}_seg*.png with the image's {name}.",
        shown="found",
        instead_of=("mask_dir", "labels_dir"),
    ),
    Word("annotations", TEXT, "The COCO file, inside src.", shown="found"),
    Word("table", TEXT, "CSV or .xlsx with a row per image, inside src.", instead_of=("csv", "sheet", "spreadsheet")),
    Word("image", TEXT, "Column that names the image.", shown="found", instead_of=("image_column",)),
    Word("mask", TEXT, "Column that names the mask; several names are separated by ;.", instead_of=("mask_column",)),
    Word(
        "patients",
        TEXT,
        "Where the patient is stated: a column, folder (that the image lies in), name:REGEX (first group of the "
        "image's name), or none if patients are not known.",
        shown="as the format states",
        instead_of=("patient", "patient_id", "patient_column"),
    ),
    Word(
        "label",
        TEXT,
        "Where the label is stated: a column, folder, or name:REGEX.",
        shown="as the format states",
        instead_of=("label_column", "diagnosis"),
    ),
    Word("labels", TEXT, "What the data's labels mean, such as B:benign,M:malignant,0:normal,?:unlabelled."),
    Word(
        "attributes",
        TEXT,
        "Columns to import as attributes, such as Form:shape,BIRADS; or all, or none.",
        shown="columns called like a clinical descriptor",
    ),
    Word("classes", TEXT, "Mask classes and levels: lesion:1,shadow:2.", shown="one"),
    Word(
        "pixel_mm", TEXT, "Column with the edge of a pixel in millimetres, or one number for all.", instead_of=("mm",)
    ),
    Word("fold", TEXT, "Column with the fold, from 0, for folds=published."),
    Word("without_mask", TEXT, "What an image without a mask is.", "problem", choices=("problem", "normal")),
    Word("skip_incomplete", SWITCH, "Leave out images without a row or mask and rows without an image.", False),
    Word("grey_max", NUMBER, "Value of white in 16-bit and float pictures.", shown="found as by bushpc pack"),
    Word("mask_threshold", WHOLE, "Least level of a lesion in a mask.", shown="128; 1 if no mask has a level above 1"),
    *(Word(name, TEXT, f"The card's {name}.") for name in ABOUT),
    Word("workers", WHOLE, "Processes that decode and encode.", shown="all cores", instead_of=("num_workers", "jobs")),
    Word("by", TEXT, "With --corrections: who corrected the masks.", instead_of=("who", "author", "reader")),
    command="bushpc shards import",
    example=EXAMPLE,
)
_MAPPED = (
    *("kind", "images", "masks", "annotations", "table", "image", "mask", "patients", "label", "labels"),
    *("attributes", "classes", "pixel_mm", "fold", "without_mask", "skip_incomplete", "grey_max", "mask_threshold"),
)


def import_shards(given: Arguments) -> int:
    if given.corrections is not None:
        return _correct(given)
    from bushpc.config.places import home
    from bushpc.shards.exchange.take_in import check_name, examine, take_in, write_config
    from bushpc.shards.progress import progress
    from bushpc.shards.split import ensure_folds

    if given.src is None:
        raise ConfigError(f"src= is missing: the raw folder. Example: {EXAMPLE}")
    check_name(given.data)
    workers = len(os.sched_getaffinity(0)) if given.workers is None else given.workers
    if workers < 1:
        raise ConfigError(f"workers={workers} must be ≥ 1.")
    settings, about = _settings(given)
    with progress(f"look at {given.data}") as show:
        examined = examine(given.data, given.src, settings, about, workers=workers, progress=show)
    if given.dry_run:
        return _dry_run(given, examined)
    out = given.out or home() / "shards" / given.data
    with progress(f"import {given.data}") as show:
        manifest = take_in(examined, out, workers=workers, progress=show)
    print_packed(out, manifest)
    for note in examined.card.notes:
        warn(note)
    folds = ensure_folds(out, manifest)
    config = write_config(given.data, out)
    print(f"folds: {folds}" if folds else "No folds were drawn: there are fewer patients with a lesion than folds.")
    print(f"card: {out / 'card.yaml'} (repeats this import: card=…); data={given.data} is known from {config}")
    print(f"next: bushpc shards audit data={given.data}")
    return 0


def _settings(given: Arguments) -> tuple[ImportSettings, dict[str, str]]:
    """What the card says, changed by the words."""
    from bushpc.shards.card import Card
    from bushpc.shards.exchange.cohort import kind_of
    from bushpc.shards.exchange.settings import ALL, NONE, ImportSettings, pairs

    typed = {word.partition("=")[0] for word in given.typed}
    values: dict[str, t.Any] = {}
    about: dict[str, str] = {}
    if given.card is not None:
        folder = given.card if given.card.is_dir() else given.card.parent
        if not (folder / "card.yaml").is_file():
            raise ConfigError(f"card={given.card}: there is no card.yaml. A dry run writes one.")
        card = Card.load(folder)
        values = ImportSettings.of_card(card.imported, folder / "card.yaml").to_card()
        about = {name: getattr(card, name) for name in ABOUT}
    about |= {name: getattr(given, name) for name in ABOUT if name in typed}
    for name in _MAPPED:
        if name in typed:
            values[name] = getattr(given, name)
    if "labels" in typed:
        values["labels"] = pairs("labels", given.labels, "labels=B:benign,M:malignant")
    if "attributes" in typed:
        values["attributes"] = {} if given.attributes == NONE else {ALL: ALL}
        if given.attributes not in (ALL, NONE):
            parts = [part.strip() for part in given.attributes.split(",")]
            named = ",".join(part if ":" in part else f"{part}:{part.lower().replace(' ', '_')}" for part in parts)
            values["attributes"] = pairs("attributes", named, "attributes=Form:shape,BIRADS")
    if "classes" in typed:
        levels = pairs("classes", given.classes, "classes=lesion:1,shadow:2")
        if not all(level.isdecimal() for level in levels.values()):
            raise ConfigError(f"classes={given.classes}: levels are whole numbers. Example: classes=lesion:1,shadow:2")
        values["classes"] = {name: int(level) for name, level in levels.items()}
    if "kind" not in values:
        if not given.src.is_dir():
            raise ConfigError(f"src={given.src} is not a folder.")
        values["kind"] = kind_of(given.src)
    return ImportSettings(**values), about


def _dry_run(given: Arguments, examined: Examined) -> int:
    """The page and the card, beside the runs. Exit status 1: there are problems."""
    from bushpc.config.places import home
    from bushpc.report.import_page import write_page
    from bushpc.shards import readers, work_folder

    folder = given.out or home() / "runs" / f"import-{given.data}"
    readers.raise_if_any(given.src, examined.problems if not examined.looks else [])  # there is nothing to show
    with work_folder.typed_errors(folder):
        page = write_page(examined, folder, ["bushpc", "shards", "import", *given.typed])
        examined.card.save(folder)
    counts = ", ".join(f"{count} {label}" for label, count in examined.labels.items()) or "no scans"
    patients = "patients not known" if examined.patients is None else f"{examined.patients} patients"
    print(f"dry run: {counts}; {patients}; {len(examined.problems)} problems. Nothing was packed.")
    for note in examined.card.notes:
        warn(note)
    for problem in examined.problems[:20]:
        print(f"  problem: {problem}")
    if len(examined.problems) > 20:
        print(f"  … and {len(examined.problems) - 20} more, on the page")
    print(f"page: {page}")
    print(
        f"card: {folder / 'card.yaml'}; pack with: bushpc shards import data={given.data} src={given.src} card={folder}"
    )
    return 1 if examined.problems else 0


def _correct(given: Arguments) -> int:
    from bushpc.config import shards_folder
    from bushpc.shards.exchange.corrections import correct

    unused = sorted({word.partition("=")[0] for word in given.typed} - {"data", "by"})
    if unused:
        raise ConfigError(f"--corrections takes data= and by=, not {', '.join(f'{name}=' for name in unused)}.")
    if given.by is None:
        raise ConfigError("by= is missing: who corrected the masks is noted beside them. Example: by='A. Reader'")
    folder = shards_folder(given.data)
    done = correct(folder, given.corrections, given.by)
    counts = f"{len(done.changed)} masks replaced, {len(done.same)} were already so"
    print(f"{folder}: {counts}; manifest {done.manifest_hash[:12]}")
    print(f"who and when: {done.log}")
    return 0


COMMAND = Command(
    name="shards import",
    summary="Pack a cohort of your own: folders of images and masks, nnU-Net, COCO, DICOM with SEG.",
    run=import_shards,
    example=EXAMPLE,
    words=WORDS,
    options=(
        option(
            "--corrections",
            type=Path,
            metavar="FOLDER",
            help="replace masks of the packed dataset data= by FOLDER/<key>.png, and note who (by=) and when",
        ),
    ),
    notes=(
        "Look first: dry_run=true writes a page with counts, problems and outlined pictures, and a card that repeats "
        "the import (card=FOLDER).",
        "All scans are checked before anything is written. Exit status 1: a dry run has problems.",
    ),
)
