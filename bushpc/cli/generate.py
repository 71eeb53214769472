"""`bushpc generate | quality`: synthetic scans, and what they are worth."""

from __future__ import annotations

import sys
import time
import typing as t
from collections.abc import Mapping, Sequence
from pathlib import Path

from bushpc.cli.command import JSON, Arguments, Command, Group, option, run_folder
from bushpc.cli.data import fold_sources
from bushpc.cli.show import print_json, print_packed, warn, wide_console
from bushpc.cli.words import PATH, SHARDS, TEXT, WHOLE, Word, Words
from bushpc.errors import BushpcError

LAUNCHER_ENDS_RANKS_S = 5.0


def drawn_settings(given: Mapping[str, t.Any]) -> Sequence[Word]:
    """The settings of what is drawn are words, too. `compose_command` reads their values, so they stay text here."""
    import dataclasses

    from bushpc.config import as_word, compose_command, described, flat
    from bushpc.config.read import plain
    from bushpc.generate.config import GenerateConfig

    defaults = flat(plain(dataclasses.asdict(compose_command(GenerateConfig, "generate", []))))
    return [
        Word(each.key, TEXT, each.about.sentence, as_word(defaults[each.key]))
        for each in described(GenerateConfig)
        if each.key in defaults
    ]


GENERATE = Words(
    Word("out", PATH, "Folder for the synthetic shards.", required=True, instead_of=("dst", "dest", "output", "to")),
    Word("fold", WHOLE, "Use the generator of this fold; may be left out if the run has only one."),
    Word("row", TEXT, "Row of a grid."),
    Word("adapter", PATH, "Run folder whose LoRA adapter the generator takes over. It must have the same base."),
    Word("adapter_fold", WHOLE, "Fold of the adapter.", shown="the generator's"),
    Word("adapter_row", TEXT, "Row of the adapter's grid."),
    command="bushpc generate",
    example="bushpc generate runs/generator fold=0 n=500 out=synthetic/fold0",
    more=drawn_settings,
)


def generate(given: Arguments) -> int:
    from bushpc.cluster.base import this_step
    from bushpc.config import compose_command
    from bushpc.dist import World
    from bushpc.generate import generate as room
    from bushpc.generate.config import GenerateConfig
    from bushpc.shards.progress import progress

    source = room.GeneratorSource(
        run_dir=given.run_dir,
        fold=given.fold,
        row=given.row,
        adapter=given.adapter,
        adapter_fold=given.adapter_fold,
        adapter_row=given.adapter_row,
    )
    config = compose_command(GenerateConfig, "generate", [f"{key}={value}" for key, value in given.more.items()])
    if given.check:
        missing = room.check(source, given.out, config)
        print(
            f"{given.out}: {config.n} scans can be made there; {missing} of {len(config.batches)} batches are missing"
        )
        return 0
    world = World.from_environment(this_step())
    try:
        with progress("generate") as show:
            manifest = room.generate(source, given.out, config, world=world, show=show)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    except BushpcError:
        # Rank 0 usually fails with the same error and prints it; the launcher then ends this rank before it does.
        if not world.is_main:
            time.sleep(LAUNCHER_ENDS_RANKS_S)
        raise
    if manifest:
        print_packed(given.out, manifest)
        print(f"contact sheet: {given.out / room.SHEET_FILE}")
    return 0


QUALITY = Words(
    Word("against", SHARDS, "Real dataset, or a folder of its shards.", required=True),
    Word(
        "part",
        TEXT,
        "Which real scans: `all` for a dataset the generator wasn't trained on.",
        "validation",
        choices=("validation", "all"),
    ),
    Word("folds", TEXT, "Which folds.", "frozen", choices=fold_sources),
    Word(
        "fold", WHOLE, "Fold the generator was trained in; its validation part is held out.", shown="as FOLDER states"
    ),
    Word(
        "features", TEXT, "inception (FID and KID), a run folder (Fréchet and kernel distance), or none.", "inception"
    ),
    Word("segmenter", PATH, "Run folder or export that looks for the lesions."),
    Word("weights_dir", PATH, "Where Inception's weights are staged.", shown="weights"),
    Word("device", TEXT, "auto, cpu or cuda.", "auto"),
    Word("out", PATH, "Folder for the page.", shown="runs/quality-<FOLDER>-<against>", instead_of=("dst", "output")),
    command="bushpc quality",
    example="bushpc quality synthetic/fold0 against=busi segmenter=runs/unet",
)


def quality(given: Arguments) -> int:
    from bushpc.config.places import home
    from bushpc.generate.quality import QualityRequest, measure_quality, write
    from bushpc.generate.quality.page import write_page
    from bushpc.generate.quality.tables import make_tables
    from bushpc.report.render import to_rich
    from bushpc.shards.progress import progress

    out = given.out or home() / "runs" / f"quality-{given.synthetic.name}-{given.against.name}"
    request = QualityRequest(
        synthetic=given.synthetic.expanduser(),
        against=given.against,
        part=given.part,
        folds=given.folds,
        fold=given.fold,
        features=given.features,
        segmenter=given.segmenter,
        weights_dir=given.weights_dir or home() / "weights",
        device=given.device,
    )
    with progress("quality") as show:
        found = measure_quality(request, warn, show)
    write(found, out)
    page = write_page(found, out, ["bushpc", "quality", str(given.synthetic), *given.typed])
    if given.json:
        import json

        print_json({"page": page, **json.loads(found.to_json())})
        return 1 if found.copies else 0
    for table in make_tables(found):
        wide_console().print(to_rich(table))
    print(f"page: {page}")
    return 1 if found.copies else 0


GROUP = Group(
    "Synthetic scans",
    70,
    (
        Command(
            name="generate",
            summary="Generate synthetic scans with masks and labels as shards, on any number of ranks.",
            run=generate,
            example=GENERATE.example,
            options=(
                run_folder(help="run folder of a trained generator"),
                option("--check", action="store_true", help="only check run, words and folder; write nothing"),
            ),
            words=GENERATE,
        ),
        Command(
            name="quality",
            summary="Compare synthetic scans with real ones: FID, copies, masks, variety.",
            run=quality,
            example=QUALITY.example,
            options=(
                option("synthetic", type=Path, metavar="FOLDER", help="folder that `bushpc generate` wrote"),
                JSON,
            ),
            words=QUALITY,
            notes=("Exit status 1: a generated image is a copy of a training image.",),
        ),
    ),
)
