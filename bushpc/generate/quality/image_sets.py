"""Folders of shards → the sets of images that are compared, and the models that may look at them.

Held-out images must be unknown to the generator, to the segmenter and to the model whose features are used; a request
that contradicts what these models were trained on is rejected.
"""

from __future__ import annotations

import dataclasses
import typing as t
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bushpc.data.lineage import GENERATED, Training, of_cell, same_data
from bushpc.errors import ConfigError, DataError
from bushpc.evaluate.predictor import Predictor, choose_device, load
from bushpc.files import EXPORT_FILE, read_json, sha256_of
from bushpc.generate.features import INCEPTION, NONE, FeatureExtractor, inception, of_model
from bushpc.generate.quality.records import HELD_OUT, SYNTHETIC, TRAINING, ImageSet, QualityRequest
from bushpc.runs.layout import RunDir
from bushpc.runs.run_record import RunRecord
from bushpc.shards.manifest import Manifest, Record
from bushpc.shards.split import find_folds, load_folds


def open_manifests(request: QualityRequest) -> tuple[Manifest, Manifest]:
    synthetic, real = Manifest.load(request.synthetic), Manifest.load(request.against)
    if not synthetic.synthetic:
        raise DataError(
            f"{request.synthetic} holds real scans of {synthetic.dataset} (no synthetic: true in its card). Give the "
            "folder that `bushpc generate` wrote first, and the real scans as against=…"
        )
    if real.synthetic:
        raise DataError(f"against={request.against} holds synthetic images. Give the real scans to compare with")
    for manifest, folder in ((synthetic, request.synthetic), (real, request.against)):
        if len(manifest.channels) != 3:
            raise DataError(f"{folder} holds images of {len(manifest.channels)} channels; only three are supported")
    return synthetic, real


def settle_fold(request: QualityRequest, real: Manifest) -> QualityRequest:
    """Fill in the fold in which the generator was trained, as recorded by `bushpc generate`.

    Raises: ConfigError if it is unknown, or if the generator was trained on images that would be held out.
    """
    stated = _trained_on(request)
    trained = [each for each in stated if same_data(each, real)]
    if stated and not trained and request.part != "all":
        raise ConfigError(
            f"against={request.against}: the generator was not trained on this dataset, so it has no training images "
            "to copy and no held-out part. Give part=all to compare with all its images, or set against= to the "
            "generator's training data"
        )
    if request.part == "all":
        if trained:
            raise ConfigError(
                f"part=all: the generator was trained on images of {request.against}, in fold {trained[0]['fold']}. "
                "Leave part=all out, and the images that it has not seen are held out"
            )
        return request
    fold = trained[0]["fold"] if trained and request.fold is None else request.fold
    if fold is None:
        raise ConfigError(
            f"{request.synthetic} does not record in which fold of {request.against} its generator was trained. Give "
            "that fold as fold=K; or give part=all if it was trained on other data"
        )
    folds_sha256 = sha256_of(find_folds(real, request.against, request.folds))
    if trained and any((each["folds_sha256"], each["fold"]) != (folds_sha256, fold) for each in trained):
        raise ConfigError(
            f"folds={request.folds}, fold={fold}: the generator was trained on images of that validation part, in fold "
            f"{trained[0]['fold']} of the folds with SHA-256 {str(trained[0]['folds_sha256'])[:12]} (these have "
            f"{folds_sha256[:12]}). Give the folds= and fold= of its training"
        )
    return dataclasses.replace(request, fold=fold)


def _trained_on(request: QualityRequest) -> list[Training]:
    found: list[Training] = (read_json(request.synthetic / GENERATED) or {}).get("trained_on", [])
    return found


def other_training_data(request: QualityRequest, real: Manifest) -> list[str]:
    others = [each for each in _trained_on(request) if not same_data(each, real)]
    return sorted({each.get("data") or f"the scans of manifest {each['manifest_sha256'][:12]}" for each in others})


def image_sets(request: QualityRequest, synthetic: Manifest, real: Manifest) -> dict[str, ImageSet]:
    held_out, training = real.lesions, []
    if request.fold is not None:
        path = find_folds(real, request.against, request.folds)
        folds = load_folds(path, real.records, real.excerpt)
        held_out = [real.record(key) for key in folds.validation(request.fold)]
        training = [real.record(key) for key in folds.train(request.fold)]
    sets = {
        SYNTHETIC: ImageSet(name=SYNTHETIC, folder=request.synthetic, records=synthetic.lesions),
        HELD_OUT: ImageSet(name=HELD_OUT, folder=request.against, records=held_out),
    }
    if training:
        sets[TRAINING] = ImageSet(name=TRAINING, folder=request.against, records=training)
    for images in sets.values():
        if len(images.records) < 2:
            raise DataError(
                f"{images.folder}: {len(images.records)} scans with a lesion ({images.name}); at least two needed"
            )
    return sets


def feature_extractor(
    request: QualityRequest, synthetic: Manifest, real: Manifest, say: Callable[[str], None]
) -> FeatureExtractor | None:
    if request.features == NONE:
        return None
    device = choose_device(request.device)
    if request.features == INCEPTION:
        return inception(request.weights_dir, device)
    path = Path(request.features).expanduser()
    return of_model(path, _fold_of(path, "features", request, synthetic, real), device, say)


def segmenter(
    request: QualityRequest, synthetic: Manifest, real: Manifest, say: Callable[[str], None]
) -> Predictor | None:
    if request.segmenter is None:
        return None
    fold = _fold_of(request.segmenter, "segmenter", request, synthetic, real)
    return load(request.segmenter, fold=fold, device=request.device, say=say)


def _fold_of(path: Path, word: str, request: QualityRequest, synthetic: Manifest, real: Manifest) -> int | None:
    """The fold whose model to use: the requested one if the run was trained on the same data, else None.

    Raises: ConfigError if that model was trained on images that are held out here, or on the generated ones.
    """
    learnt_from = _trainings(path)
    if any(each["manifest_sha256"] == synthetic.hash for each in learnt_from):
        raise ConfigError(
            f"{word}={path} was trained on these synthetic images, so it knows where their masks are. Use a model "
            "that was trained only on real scans"
        )
    trained = [each for each in learnt_from if same_data(each, real)]
    if not trained:
        return None
    if request.fold is not None:
        own = {"folds_sha256": sha256_of(find_folds(real, request.against, request.folds)), "fold": request.fold}
        if any(own.items() <= each.items() for each in trained):
            return request.fold
    raise ConfigError(
        f"{word}={path} was trained on images of {request.against} that are held out here, so its results on them are "
        f"biased. Use a model of fold={request.fold}, folds={request.folds}, or one that was trained on other data"
    )


def _trainings(path: Path) -> list[dict[str, t.Any]]:
    """The trainings (data, folds and fold) of the models of a run or an export."""
    exported, run = read_json(path / EXPORT_FILE), RunRecord.read(RunDir(path).file)
    if exported:
        return [each for fold in exported.get("folds", []) for each in fold.get("trained_on", [])]
    return [each for cell in run.cells for each in of_cell(run, cell.name)] if run else []


def common_edge(records: Sequence[Record]) -> int:
    """The most frequent edge of generated images. Real ones are resized to such squares, as for the generator."""
    return Counter(max(record.height, record.width) for record in records).most_common(1)[0][0]


def label_notes(sets: Mapping[str, ImageSet]) -> list[str]:
    notes = []
    shares = {
        name: ", ".join(f"{count / len(images.records):.0%} {label}" for label, count in sorted(images.labels.items()))
        for name, images in sets.items()
    }
    if shares[SYNTHETIC] != shares[HELD_OUT]:
        notes.append(
            "The sets differ in their label distribution, which contributes to every distance over all labels: "
            + "; ".join(f"{name}: {share}" for name, share in shares.items())
            + "."
        )
    return notes
