"""`bushpc shards show`: packed scans on one page, to look through them."""

from __future__ import annotations

import typing as t
from pathlib import Path

from bushpc.cli.command import Arguments, Command, option
from bushpc.cli.words import PATH, SHARDS, TEXT, WHOLE, Word, Words
from bushpc.runs.layout import RunDir

if t.TYPE_CHECKING:
    from bushpc.report.run_gallery import RunResults

WORDS = Words(
    Word("data", SHARDS, "A dataset or a folder of shards.", repeated=True),
    Word("run", PATH, "A run folder instead of data=: its scans and folds, with Dice and predicted outlines."),
    Word("out", PATH, "Folder for the page.", shown="runs/show-<data or run>", instead_of=("dst", "output", "to")),
    Word("folds", TEXT, "Which folds of data=.", shown="frozen", choices=("frozen", "published", "grouped")),
    Word(
        "edge",
        WHOLE,
        "Longer side of the pictures in pixels.",
        shown="the largest from 96 to 1024 with which the page stays below 48 MB",
        instead_of=("size", "pixels"),
    ),
    command="bushpc shards show",
    example="bushpc shards show data=breast",
)


AUGMENT = "bushpc shards show data=breast --augment"
LEAST_EDGE, MOST_EDGE = 32, 4096


def show(given: Arguments) -> None:
    from bushpc.cli.shards_show_augment import write_augment_page
    from bushpc.config.places import home
    from bushpc.errors import ConfigError
    from bushpc.files import why_not_writable
    from bushpc.report.audit_gallery import write_scans
    from bushpc.shards.audit import audit
    from bushpc.shards.progress import progress

    _check(given)
    folders = given.data
    names = "-".join(folder.name for folder in folders) or given.run.resolve().name
    out = given.out or home() / "runs" / f"{'augment' if given.augment else 'show'}-{names}"
    if reason := why_not_writable(out):
        raise ConfigError(f"{reason}. Choose another folder: out=FOLDER")
    if given.augment:
        with progress(f"augment {names}") as step:
            command = ["bushpc", "shards", "show", *given.typed, "--augment"]
            print(f"page: {write_augment_page(folders[0], out / 'index.html', command, step)}")
        return
    results, folds = None, given.folds or "frozen"
    if given.run:
        results, folder, folds = _results(given.run)
        folders = [folder]
    with progress(f"audit {names}") as step:
        found = audit(folders, folds=folds, progress=step)
    with progress(f"show {names}") as step:
        command = ["bushpc", "shards", "show", *given.typed]
        page = write_scans(found, out / "index.html", command, results=results, edge=given.edge, progress=step)
    print(f"page: {page} ({page.stat().st_size / 1e6:.1f} MB)")


def _check(given: Arguments) -> None:
    """Raises: ConfigError for words that don't go together."""
    from bushpc.errors import ConfigError

    if bool(given.data) == bool(given.run):
        raise ConfigError(f"give either data= (a dataset) or run= (a run folder). Example: {WORDS.example}")
    if given.run and given.folds:
        raise ConfigError(f"folds={given.folds}: a run has its own folds. Leave folds= out")
    if given.augment and (given.run or given.folds or given.edge or len(given.data) > 1):
        raise ConfigError(f"--augment shows one dataset: give data= once, and out= if you like. Example: {AUGMENT}")
    if runs := [folder for folder in given.data if RunDir(folder).file.exists()]:
        raise ConfigError(f"data={runs[0]} is a run folder. Write run={runs[0]} to see its scans and predictions")
    if given.edge is not None and not LEAST_EDGE <= given.edge <= MOST_EDGE:
        raise ConfigError(f"edge={given.edge}: it must be a whole number of pixels from {LEAST_EDGE} to {MOST_EDGE}")


def _results(path: Path) -> tuple[RunResults, Path, str]:
    """A run's results, its folder of shards and its kind of folds. Raises: DataError."""
    from bushpc.errors import DataError
    from bushpc.report.pictures import open_shards
    from bushpc.report.read_run import read_run
    from bushpc.report.run_gallery import results_of

    run = read_run(path)
    shards = open_shards(run)
    if shards.manifest is None:
        raise DataError(shards.problem)
    return results_of(run, len(shards.manifest.mask_classes)), shards.folder, run.record.folds.source or "frozen"


COMMAND = Command(
    name="shards show",
    summary="Show all scans of packed datasets on one page, with masks, filters and the audit's findings.",
    run=show,
    example=WORDS.example,
    words=WORDS,
    options=(option("--augment", action="store_true", help="show what each policy of augment= does to a few scans"),),
    notes=("The page is one file: it opens in any browser, without a server and without internet.",),
)
