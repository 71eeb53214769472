"""Checkpoints → CSV of other datasets: every scan of each that `evaluate.external` names, once per fold's model.

Nobody trained on them or chose anything by them, so that each model of a run is scored on the whole of each.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bushpc.data.cache import DecodingStopped, open_cache
from bushpc.data.loader import FoldData
from bushpc.dist import any_rank, from_main, gather
from bushpc.evaluate.evaluate import Evaluation, summary_line, to_csv
from bushpc.evaluate.journal import Journal
from bushpc.files import write_atomically
from bushpc.runs.layout import CellDir
from bushpc.shards.manifest import Manifest


def external_part(folder: Path, data: FoldData, normals: bool) -> FoldData:
    """All of the dataset in `folder` to be scored. data: of the fold whose model it is. normals: with normal scans."""
    manifest = Manifest.load(folder)  # the login node has asked whether it may be a test set, with cards that are there
    part = manifest.records if normals else manifest.lesions
    return replace(
        data, manifest=manifest, folder=folder, train=[], repeats=[], holdout=[], validation=part, features=None
    )


def evaluate_external(at: Evaluation, cell_dir: CellDir, step: int) -> bool:
    """Write external/<dataset>.csv of each dataset, in the form of per_image.csv, under the headline prompt source.

    step: of the weights. Returns False where a stop signal came: a later call goes on there.
    """
    how, world, say, source = at.how, at.world, at.say, at.cell.variants[0].name
    # They lie in folders, whatever the cell's own data do.
    cell = replace(at.cell, data=replace(at.cell.data, stream=None))
    for name, folder in zip(cell.evaluate.external_names, map(Path, cell.evaluate.external), strict=True):
        there = external_part(folder, at.data, cell.data.normals)
        try:
            open_cache(
                *(there.manifest, folder, cell.model.image_size, cell.loader),
                keep_going=lambda: not how.stop(),
                log=say,
            )
        except DecodingStopped:
            assert how.stop(), "nothing else ends the decoding"
        if any_rank(how.stop())[0]:
            return False
        weights = f"{cell.hash} {step} {there.manifest.hash}"
        journal = Journal(cell_dir, f"{cell_dir.external.name}-{name}-{source}", world.rank, weights)
        done = from_main(journal.read() if world.is_main else {})
        mine = replace(at, cell=cell, data=there).lines(source, done, journal=journal)
        if mine is None:
            return False
        lines = done | {line["row"]["key"]: line for line in gather(mine)}
        rows = [lines[key]["row"] for key in sorted(lines)]
        if world.is_main:
            cell_dir.external.mkdir(exist_ok=True)
            write_atomically(cell_dir.external_csv(name), to_csv(rows, tuple(rows[0])))
        say(f"evaluated all {len(rows)} images of {name} with prompts={source}: {summary_line(rows)}")
    return True
