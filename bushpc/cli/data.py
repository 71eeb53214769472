"""`bushpc pack` and `bushpc shards`: raw folder → shards; what is there, and is it sound."""

from __future__ import annotations

import os
import typing as t
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from bushpc.cli import shards_export, shards_import, shards_show
from bushpc.cli.command import CONTINUE, JSON, Arguments, Command, Group, option
from bushpc.cli.show import print_json, print_packed, wide_console
from bushpc.cli.words import NUMBER, PATH, SHARDS, SWITCH, TEXT, WHOLE, Word, Words

if t.TYPE_CHECKING:
    from bushpc.shards.manifest import Manifest


def datasets() -> list[str]:
    from bushpc.config import config_names

    return config_names("data")


def paper_splits() -> list[str]:
    from bushpc.config.paper_splits import SOURCES

    return list(SOURCES)


def fold_sources() -> list[str]:
    from bushpc.shards.split import FILE_BY_SOURCE

    return list(FILE_BY_SOURCE)


def card_parameters(given: Mapping[str, t.Any]) -> Sequence[Word]:
    """The parameters of a synthetic dataset's card are words, too: `bushpc pack data=phantom count=50`."""
    from bushpc.shards.card import Card

    if "data" not in given:
        return ()
    card = Card.find(given["data"], _out(given["data"], given.get("out")))
    return [Word(name, NUMBER, "Parameter of the dataset's card.", value) for name, value in card.parameters.items()]


PACK = Words(
    Word("data", TEXT, "The dataset; `bushpc shards list` shows all.", required=True, choices=datasets),
    Word(
        "src",
        PATH,
        "Raw folder, as the publisher ships it. Synthetic datasets need none.",
        instead_of=("source", "from", "folder", "raw", "input"),
    ),
    Word(
        "out",
        PATH,
        "Folder for the shards.",
        shown="shards/<data>",
        instead_of=("dst", "dest", "destination", "to", "output", "target"),
    ),
    Word("workers", WHOLE, "Processes that decode and encode.", shown="all cores", instead_of=("num_workers", "jobs")),
    Word("excerpt", SWITCH, "Pack a part of the dataset; counts aren't compared with the card.", False),
    Word(
        "grey_max",
        NUMBER,
        "Value of white in 16-bit and float pictures.",
        shown="what their tags state, else the smallest full scale that holds their largest value",
        instead_of=("max", "white"),
    ),
    Word(
        "mask_threshold",
        WHOLE,
        "Least level of a lesion in a mask.",
        shown="128; 1 if no mask has a level above 1",
        instead_of=("threshold",),
    ),
    command="bushpc pack",
    example="bushpc pack data=phantom out=shards/phantom",
    more=card_parameters,
    rest="A synthetic dataset also takes its card's parameters: data=phantom takes count=, seed=, height= and more.",
)


def pack(given: Arguments) -> None:
    from bushpc.shards import write
    from bushpc.shards.progress import progress
    from bushpc.shards.split import ensure_folds

    out = _out(given.data, given.out)
    workers = len(os.sched_getaffinity(0)) if given.workers is None else given.workers
    with progress(f"pack {given.data}") as show:
        manifest = write.pack(
            given.data,
            given.src,
            out,
            excerpt=given.excerpt,
            workers=workers,
            progress=show,
            parameters=given.more,
            grey_max=given.grey_max,
            mask_threshold=given.mask_threshold,
        )
    print_packed(out, manifest)
    if not manifest.synthetic and ensure_folds(out, manifest) is None:
        print(
            "No folds were drawn, as there are fewer patients with a lesion than folds. These scans can be audited, "
            "predicted and used for an external test, but not cross-validated."
        )


def _out(data: str, out: Path | None) -> Path:
    from bushpc.config.places import home

    return out or home() / "shards" / data


def list_shards(given: Arguments) -> int:
    from bushpc.shards.listing import list_datasets, listing_table, plain_lines, to_json

    console = wide_console()
    entries = list_datasets(deep=given.deep)
    if given.json:
        print(to_json(entries))
    elif console.is_terminal:
        console.print(listing_table(entries))
    else:
        print("\n".join(plain_lines(entry) for entry in entries))
    return 1 if any(entry.packed == "damaged" for entry in entries) else 0


def _folds(default: str = "frozen") -> Word:
    return Word("folds", TEXT, "Which folds.", default, choices=fold_sources)


AUDIT = Words(
    Word(
        "data",
        SHARDS,
        "A dataset or a folder of shards. Several are compared with each other.",
        required=True,
        repeated=True,
    ),
    Word("out", PATH, "Folder for the page and lists.", shown="runs/audit-<data>", instead_of=("dst", "output", "to")),
    _folds(),
    Word(
        "least_correlation",
        NUMBER,
        "Two images count as the same picture from this correlation on. Unrelated images lie below 0.85, copies above.",
        shown="0.85",
    ),
    Word(
        "gallery",
        TEXT,
        "Scans of gallery.html, to which the page links. All scans nearly double the time.",
        "findings",
        choices=("findings", "all", "none"),
    ),
    command="bushpc shards audit",
    example="bushpc shards audit data=breast data=bus_bra",
)


def audit_shards(given: Arguments) -> int:
    from bushpc.config.places import home
    from bushpc.report.audit_gallery import write_scans
    from bushpc.report.audit_page import write_page
    from bushpc.shards.audit import audit, summary
    from bushpc.shards.audit_findings import write
    from bushpc.shards.duplicates import LEAST_CORRELATION
    from bushpc.shards.progress import progress

    names = "-".join(folder.name for folder in given.data)
    out = given.out or home() / "runs" / f"audit-{names}"
    least = LEAST_CORRELATION if given.least_correlation is None else given.least_correlation
    with progress(f"audit {names}") as show:
        found = audit(given.data, folds=given.folds, least_correlation=least, progress=show)
    write(found, out)
    command, gallery = ["bushpc", "shards", "audit", *given.typed], ""
    some = any(finding.key or finding.patient for finding in found.findings) or bool(found.twins)
    if given.gallery == "all" or (given.gallery == "findings" and some):
        with progress(f"show {names}") as show:
            links = {f"Audit of {' and '.join(packed.name for packed in found.datasets)}": "index.html"}
            only = given.gallery == "findings"
            page = out / "gallery.html"
            gallery = write_scans(found, page, command, only_findings=only, links=links, progress=show).name
    page = write_page(found, out, command, gallery)
    if given.json:
        import json

        print_json({"page": page, **json.loads(found.to_json())})
        return 1 if found.grave else 0
    wide_console().print(summary(found))
    print(f"page: {page}")
    return 1 if found.grave else 0


FOLDS = Words(
    Word("data", SHARDS, "A dataset or a folder of shards.", required=True),
    Word("duplicates", TEXT, "Near duplicates: `group` keeps them in one fold.", shown="none", choices=("group",)),
    Word("split", TEXT, "Draw a paper's single split instead, as the paper did not publish it.", choices=paper_splits),
    command="bushpc shards folds",
    example="bushpc shards folds data=busi duplicates=group",
)


def draw_folds(given: Arguments) -> None:
    """Draw folds with seed 0: patients who share a picture count as one patient, or a paper's single split."""
    from bushpc.errors import ConfigError
    from bushpc.shards.audit import find_duplicates
    from bushpc.shards.duplicates import tie_patients
    from bushpc.shards.manifest import Manifest
    from bushpc.shards.progress import progress
    from bushpc.shards.split import FILE_BY_SOURCE, freeze_folds, make_folds, refuse_synthetic

    folder = given.data
    manifest = Manifest.load(folder)
    refuse_synthetic(manifest, folder)
    if (given.duplicates is None) == (given.split is None):
        raise ConfigError(f"give one of duplicates=group and split=, such as {FOLDS.example}")
    if given.split:
        _draw_split(folder, manifest, given.split)
        return
    with progress(f"compare {manifest.dataset}") as show:
        pairs = find_duplicates(folder, manifest, show)
    tied = tie_patients(manifest.records, pairs)
    path = folder / FILE_BY_SOURCE["grouped"]
    freeze_folds(path, manifest.records, make_folds(tied))
    patients, groups = ({record.patient for record in records} for records in (manifest.records, tied))
    print(f"{path}: {len(pairs)} pairs are one picture, so {len(patients)} patients count as {len(groups)}")
    print("train on them with folds=grouped")


def _draw_split(folder: Path, manifest: Manifest, source: str) -> None:
    from bushpc.config.paper_splits import split_of
    from bushpc.shards.paper_split import ensure_split
    from bushpc.shards.split import FILE_BY_SOURCE, fold_word, read_fold_numbers

    split = split_of(source, manifest.dataset)
    assert split is not None, "it is one of the choices"
    ensure_split(manifest, folder, source, normals=True)
    path = folder / FILE_BY_SOURCE[source]
    counts = Counter(fold_word(fold) for fold in read_fold_numbers(path).values())
    print(f"{path}: train {counts['train']}, tune {counts['tune']}, test {counts['0']}. {split.sentence}")
    print(f"train on it with folds={source}" + (" data.normals=true" if split.normals else ""))


GROUP = Group(
    "Data",
    10,
    (
        Command(
            name="pack",
            summary="Pack a raw dataset folder into shards.",
            after_interrupt=CONTINUE,
            run=pack,
            example=PACK.example,
            words=PACK,
            notes=(
                "The folder must have the layout that its publisher ships; the message names the missing file or wrong "
                "count otherwise. Run it again after an interruption: finished shards are kept.",
                "For a real dataset: bushpc pack data=breast src=/path/to/BrEaST",
            ),
        ),
        shards_import.COMMAND,
        Command(
            name="shards list",
            summary="List all datasets: content, licence, download page, and whether they are packed here.",
            run=list_shards,
            example="bushpc shards list",
            options=(
                JSON,
                option("--deep", action="store_true", help="hash every packed tar instead of comparing its size"),
            ),
            notes=("Exit status 1: a packed dataset is damaged.",),
        ),
        Command(
            name="shards audit",
            summary="Search packed datasets for duplicates, leaks between folds and bad masks.",
            run=audit_shards,
            example=AUDIT.example,
            words=AUDIT,
            options=(JSON,),
            notes=("Exit status 1: something serious was found.",),
        ),
        Command(
            name="shards folds",
            summary="Draw folds in which near duplicates stay together, or the single split of a paper.",
            run=draw_folds,
            example=FOLDS.example,
            words=FOLDS,
        ),
        shards_show.COMMAND,
        shards_export.COMMAND,
    ),
)
