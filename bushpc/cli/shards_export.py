"""`bushpc shards export`: a packed dataset in formats that others read."""

from __future__ import annotations

from bushpc.cli.command import Arguments, Command
from bushpc.cli.words import PATH, SHARDS, TEXT, Word, Words

FORMATS = ("nnunet", "coco")
WORDS = Words(
    Word("data", SHARDS, "A dataset or a folder of shards.", required=True),
    Word(
        "format", TEXT, "nnU-Net's raw format, or COCO JSON.", required=True, choices=FORMATS, instead_of=("as", "to")
    ),
    Word("out", PATH, "A new folder.", required=True, instead_of=("dst", "output", "folder")),
    Word(
        "folds",
        TEXT,
        "Which folds go along.",
        choices=("frozen", "published", "grouped"),
        shown="frozen, where there are any",
    ),
    command="bushpc shards export",
    example="bushpc shards export data=breast format=nnunet out=breast-nnunet",
)


def export_shards(given: Arguments) -> None:
    from bushpc.shards.exchange.export import export
    from bushpc.shards.progress import progress

    with progress(f"export {given.data.name}") as show:
        done = export(given.data, given.out, given.format, folds=given.folds, show=show)
    print(f"{given.out}: {done.scans} scans, {f'{done.folds} folds' if done.folds else f'no folds: {done.why}'}")
    if done.folds and done.unassigned:
        print(f"{done.unassigned} scans have no fold, as the fold file leaves them out")
    if given.format == "nnunet":
        print(f"export nnUNet_raw={given.out / 'raw'} nnUNet_preprocessed={given.out / 'preprocessed'}")


COMMAND = Command(
    name="shards export",
    summary="Write a packed dataset as nnU-Net raw data or COCO JSON.",
    run=export_shards,
    example=WORDS.example,
    words=WORDS,
    notes=(
        "nnunet: images, labels, dataset.json, cases.csv and splits_final.json with the dataset's folds. "
        "coco: images and annotations.json, masks in run-length encoding.",
    ),
)
