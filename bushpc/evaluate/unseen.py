"""An ensemble on a dataset that none of its members saw: `bushpc test`, on the original scans, with post-processing.

    run | export ─load→ Predictor ─every scan with a lesion→ OUT/per_image.csv ─→ OUT/test.json, means and intervals

In a cross-validation all members but one trained on any scan, so an ensemble is no judge of its own dataset: refused.
"""

from __future__ import annotations

import json
import typing as t
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from bushpc.conditions import Known
from bushpc.config.evaluate import EvaluateConfig
from bushpc.config.places import home
from bushpc.data.external import open_external
from bushpc.data.lineage import Training, of_cell, same_data
from bushpc.errors import ConfigError, DataError
from bushpc.evaluate.evaluate import to_csv
from bushpc.evaluate.predictor import Predictor, load
from bushpc.evaluate.rows import metrics_after, pair_of
from bushpc.evaluate.trained import open_run
from bushpc.files import EXPORT_FILE, read_json, write_atomically
from bushpc.metrics.registry import ALWAYS, METRICS, mask_metrics, on_original
from bushpc.report.stats import intervals
from bushpc.runs.chosen import PLAIN
from bushpc.sample import pixel_size
from bushpc.shards.manifest import Manifest, Record, read_image, read_mask

CSV_FILE, SUMMARY_FILE = "per_image.csv", "test.json"
AFTER = ":chosen"  # ends a column of masks after post-processing; without it they are plain


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What stands behind a model: member → its trainings, folders of the data, how it was evaluated."""

    trainings: Mapping[str, list[Training]]
    folders: list[Path]
    evaluate: EvaluateConfig


def score_unseen(
    model: Path,
    shards: Path,
    out: Path,
    *,
    fold: int | None = None,
    row: str | None = None,
    tta: str | None = None,
    postprocess: bool = True,
    device: str = "auto",
    show: Callable[[int, int, str], None],
    say: Callable[[str], None],
) -> dict[str, t.Any]:
    """Score the mean of the members' probabilities on all scans with a lesion; returns the content of test.json.

    shards: of the dataset. out: a new folder, written when all is done. The rest as `bushpc.load`.
    Raises: DataError for a dataset that a member trained on, or of other classes or channels; ConfigError for `out`
    that is there; otherwise as `bushpc.load`. All before anything is predicted.
    """
    if out.exists():
        raise ConfigError(f"{out} is there: choose a new folder")
    origin = _origin(model, fold, row, say)
    manifest = _unseen(shards, origin)
    predictor = load(model, fold=fold, row=row, device=device, tta=tta, postprocess=postprocess, say=say)
    records = manifest.lesions
    rows = []
    for number, (record, scored) in enumerate(_scored(predictor, shards, records, origin.evaluate)):
        show(number, len(records), "")
        facts = {"key": record.key, "patient": record.patient, "label": record.label, "length_px": record.lesion_length}
        rows.append({**facts, **scored})
    content = _content(predictor, manifest, rows)
    out.mkdir(parents=True)
    write_atomically(out / CSV_FILE, to_csv(rows, tuple(rows[0])))
    write_atomically(out / SUMMARY_FILE, json.dumps(content, indent=1))
    return content


def _origin(model: Path, fold: int | None, row: str | None, say: Callable[[str], None]) -> Origin:
    exported = read_json(model / EXPORT_FILE)
    if exported is not None:
        folds = [each for each in exported.get("folds", []) if fold in (None, each.get("fold"))]
        if any("trained_on" not in each for each in folds):
            raise DataError(f"{model} does not state what its members were trained on: export the run again")
        trainings = {each["name"]: each["trained_on"] for each in folds}
        how = EvaluateConfig(threshold=exported["recipe"]["threshold"])
        return Origin(trainings=trainings, folders=_folders(trainings), evaluate=how)
    run = open_run(model, fold, row, say)
    trainings = {cell.name: of_cell(run.record, cell.name) for cell in run.cells}
    config = run.cells[0].config
    return Origin(trainings=trainings, folders=[config.data.folder, *_folders(trainings)], evaluate=config.evaluate)


def _folders(trainings: Mapping[str, list[Training]]) -> list[Path]:
    """Where the training data usually lie."""
    names = {each["data"] for of_member in trainings.values() for each in of_member if each["data"]}
    return [home() / "shards" / name for name in sorted(names)]


def _unseen(shards: Path, origin: Origin) -> Manifest:
    """The dataset, of which no member may know a scan. Raises: DataError."""
    manifest = Manifest.load(shards)
    saw = [name for name, of_member in origin.trainings.items() if any(same_data(each, manifest) for each in of_member)]
    if saw:
        raise DataError(
            f"{', '.join(saw)} trained on scans of {manifest.dataset}, which an ensemble with them may not judge. The "
            "report of the run judges every scan by the fold that did not train on it; test on another dataset"
        )
    for folder in origin.folders:
        if (folder / "manifest.json").is_file():
            open_external(shards, Manifest.load(folder), given=str(shards))
    if len(manifest.mask_classes) != 1:
        raise DataError(f"{shards} has the mask classes {', '.join(manifest.mask_classes)}; one can be tested")
    if not manifest.lesions:
        raise DataError(f"{shards} has no scan with a lesion, so there is nothing to score masks on")
    return manifest


def _scored(
    predictor: Predictor, shards: Path, records: list[Record], how: EvaluateConfig
) -> Iterator[tuple[Record, dict[str, float]]]:
    names = on_original(dict.fromkeys((*ALWAYS, *how.metrics)))
    for record in records:
        known = _known(predictor, record)
        result = predictor.predict([read_image(shards, record)], [known])[0]
        pair = pair_of(how, record, result.prob_HW, read_mask(shards, record) & 1)
        scored = mask_metrics(pair, names)
        if predictor.rule != PLAIN:
            after = metrics_after(pair, predictor.rule, names)
            scored |= {f"{name}{AFTER}": value for name, value in after.items()}
        yield record, scored


def _known(predictor: Predictor, record: Record) -> Known:
    """What the dataset's table says of a scan; nothing that would take a look at its mask."""
    kinds = [kind for kind in predictor.members[0].conditions if not kind.from_mask]
    values = {kind.name: kind.of(record, np.zeros((1, 1), bool)) for kind in kinds}
    return Known(conditions=values, pixel_mm=pixel_size(record.pixel_mm) if record.pixel_mm else None)


def _content(predictor: Predictor, manifest: Manifest, rows: list[dict[str, t.Any]]) -> dict[str, t.Any]:
    frame = pd.DataFrame(rows)
    columns = [name for name in frame if name.partition(":")[0] in METRICS]
    return {
        "data": manifest.dataset,
        "manifest_sha256": manifest.hash,
        "images": len(rows),
        "patients": int(frame["patient"].nunique()),
        "members": {member.name: member.sha256 for member in predictor.members},
        "tta": predictor.tta,
        "postprocess": predictor.rule.words,
        "grid": "original",
        "metrics": {
            name: {"mean": found.mean, "ci95": found.bounds}
            for name, found in intervals(frame, [name for name in columns if frame[name].notna().any()]).items()
        },
    }
