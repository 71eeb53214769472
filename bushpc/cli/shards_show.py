"""`bushpc shards show`: packed scans on one page, to look through them."""

from __future__ import annotations

from bushpc.cli.command import Arguments, Command
from bushpc.cli.words import PATH, SHARDS, TEXT, WHOLE, Word, Words

WORDS = Words(
    Word("data", SHARDS, "A dataset or a folder of shards.", required=True, repeated=True),
    Word("out", PATH, "Folder for the page.", shown="runs/show-<data>", instead_of=("dst", "output", "to")),
    Word("folds", TEXT, "Which folds.", "frozen", choices=("frozen", "published", "grouped")),
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


LEAST_EDGE, MOST_EDGE = 32, 4096


def show(given: Arguments) -> None:
    from bushpc.config.places import home
    from bushpc.errors import ConfigError
    from bushpc.files import why_not_writable
    from bushpc.report.audit_gallery import write_scans
    from bushpc.shards.audit import audit
    from bushpc.shards.progress import progress

    names = "-".join(folder.name for folder in given.data)
    out = given.out or home() / "runs" / f"show-{names}"
    if given.edge is not None and not LEAST_EDGE <= given.edge <= MOST_EDGE:
        raise ConfigError(f"edge={given.edge}: it must be a whole number of pixels from {LEAST_EDGE} to {MOST_EDGE}")
    if reason := why_not_writable(out):
        raise ConfigError(f"{reason}. Choose another folder: out=FOLDER")
    with progress(f"audit {names}") as step:
        found = audit(given.data, folds=given.folds, progress=step)
    with progress(f"show {names}") as step:
        command = ["bushpc", "shards", "show", *given.typed]
        page = write_scans(found, out / "index.html", command, edge=given.edge, progress=step)
    print(f"page: {page} ({page.stat().st_size / 1e6:.1f} MB)")


COMMAND = Command(
    name="shards show",
    summary="Show all scans of packed datasets on one page, with masks, filters and the audit's findings.",
    run=show,
    example=WORDS.example,
    words=WORDS,
    notes=("The page is one file: it opens in any browser, without a server and without internet.",),
)
