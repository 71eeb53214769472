"""Quality of generated images, measured before anything is trained on them.

    synthetic shards, real shards → thumbnails, features, predicted masks → figures → terminal, CSV, JSON, page

It answers four questions, each with the corresponding figure for real images. Are the distributions similar (FID,
KID)? Are training images copied (nearest neighbours)? Is the lesion where the mask says (a segmenter trained on real
images)? Are the images as diverse as real ones? The real images are held out from the generator: with
`part=validation`, they are the validation part of the fold in which it was trained.
"""

from __future__ import annotations

import dataclasses
import json
import typing as t
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from bushpc.conditions import Known
from bushpc.data.cache import resize
from bushpc.data.lineage import GENERATED, Training, of_cell, same_data
from bushpc.errors import ConfigError, DataError, unknown_name
from bushpc.evaluate.predictor import Predictor, choose_device, load
from bushpc.files import EXPORT_FILE, read_json, sha256_of, write_atomically
from bushpc.generate.features import INCEPTION, NONE, FeatureExtractor, inception, of_model
from bushpc.metrics.image import Estimate, frechet, kernel, mean_pairwise
from bushpc.metrics.mask import MaskPair, dice
from bushpc.report.pictures import by_hash
from bushpc.report.stats import Interval, intervals
from bushpc.runs.layout import RunDir
from bushpc.runs.records import RunRecord
from bushpc.shards.duplicates import Fingerprint, find_pairs, fingerprint_of, group, local_contrast
from bushpc.shards.manifest import Manifest, Record, read_image, read_mask
from bushpc.shards.progress import Show
from bushpc.shards.split import find_folds, load_folds

PARTS = ("validation", "all")
SYNTHETIC, HELD_OUT, TRAINING, REAL = "synthetic", "real, held out", "real, training part", "real"
CORRELATION, FEATURES = "correlation", "features"
ALL = "all"  # all labels together

_BATCH = 16  # images per forward pass
_ROWS = 256  # rows of a similarity matrix per step; limits the memory
# Maximum number of images per set for pairwise means, selected by a hash of their keys; more hardly change the mean.
MOST_SSIM, MOST_PAIRED = 20, 500
_SSIM_EDGE = 176  # pixels; the minimum for five scales of an 11-pixel window
_SHOWN = 6  # number of predicted masks to show: so many of the worst, and so many of a random selection


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The request: what to compare, and how.

    synthetic, against: folders of generated and real shards. part: which real images are held out; `all` for a dataset
    that the generator was not trained on. folds, fold: for `part=validation`; fold None is the fold of the generator's
    training, if `synthetic` states it. features: `inception`, a run folder or `none`. segmenter: run folder, exported
    model or None. weights_dir: where Inception's file is staged. device: auto, cpu or cuda.
    """

    synthetic: Path
    against: Path
    part: str
    folds: str
    fold: int | None
    features: str
    segmenter: Path | None
    weights_dir: Path
    device: str

    def __post_init__(self) -> None:
        """Raises: ConfigError for contradictory settings."""
        if self.part not in PARTS:
            raise ConfigError(unknown_name("part", self.part, PARTS))
        if self.part == "all" and self.fold is not None:
            raise ConfigError(f"part=all, fold={self.fold}: part=all uses no fold; leave one of the two out")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the compared sets. name: SYNTHETIC, HELD_OUT or TRAINING. records: scans with a lesion."""

    name: str
    folder: Path
    records: list[Record]

    @property
    def labels(self) -> Counter[str]:
        """Number of images by label."""
        return Counter(record.label for record in self.records)

    def places(self, label: str) -> list[int]:
        """Positions of the records with a label (or of all), in a pseudo-random order."""
        place = {record.key: i for i, record in enumerate(self.records) if label in (ALL, record.label)}
        return [place[key] for key in by_hash(place)]

    def patients(self, places: Sequence[int]) -> list[str]:
        """The patients of the records at these positions."""
        return [self.records[i].patient for i in places]


class Distance(t.NamedTuple):
    """Distance between images of a label and the held-out ones. number, against: number of images of each."""

    label: str
    images: str
    number: int
    against: int
    frechet: Estimate
    kernel: Estimate


class Nearness(t.NamedTuple):
    """How close the images of a set are to their nearest training images.

    by: CORRELATION (high is close) or FEATURES (a distance). median, twentieth, nearest: of the values of all images,
    the median, the 5 % quantile from the close end, and the closest. copies: images that are the same picture as a
    training image. beyond: generated images closer to a training image than any held-out image is. p: probability of at
    least as many by chance. beyond and p are None for the held-out images.
    """

    by: str
    images: str
    number: int
    median: float
    twentieth: float
    nearest: float
    copies: int
    beyond: int | None
    p: float | None


class Agreement(t.NamedTuple):
    """Dice of a segmenter's masks with the images' own masks. missed: share without any overlap."""

    label: str
    images: str
    number: int
    dice: Interval
    missed: float


class Diversity(t.NamedTuple):
    """How much the images of a set differ, averaged over pairs of patients; None if there are no pairs.

    ms_ssim: similarity, 1 if all are the same picture. distance: of features. repeated: images that are the same
    picture as another image of the set.
    """

    label: str
    images: str
    number: int
    ms_ssim: Estimate | None
    distance: Estimate | None
    repeated: int


@dataclass(frozen=True, kw_only=True)
class Quality:
    """parts, manifests: by the part's name. edge: all images were resized to squares of this edge, in pixels.

    images: a row for each generated or held-out image: images (name of the part), key, patient, label. With a training
    part: nearest (the training image with the highest correlation), correlation, mirrored, and copy (whether it is the
    same picture as a training image); with features also near_features and distance. With a segmenter: dice.
    found: the segmenter's masks of some generated images. elsewhere: other datasets that the generator was trained on.
    notes: remarks on the figures.
    """

    asked: Asked
    manifests: dict[str, Manifest]
    parts: dict[str, Part]
    edge: int
    features: FeatureExtractor | None
    distances: list[Distance]
    nearness: list[Nearness]
    agreement: list[Agreement]
    diversity: list[Diversity]
    images: pd.DataFrame
    found: dict[str, np.ndarray]
    elsewhere: list[str]
    notes: list[str]

    @property
    def copies(self) -> int:
        """Number of generated images that are copies of training images."""
        return max((each.copies for each in self.nearness if each.images == SYNTHETIC), default=0)

    @property
    def generators(self) -> list[str]:
        """Hashes of the images' generators, from their samples' attributes."""
        stated = (record.attributes.get("generator") for record in self.parts[SYNTHETIC].records)
        return sorted({str(generator) for generator in stated if generator})

    def to_json(self) -> str:
        """All figures with their context, without the table of single images."""
        figures = {name: getattr(self, name) for name in ("distances", "nearness", "agreement", "diversity")}
        content = {
            "asked": {key: str(value) if isinstance(value, Path) else value for key, value in vars(self.asked).items()},
            "manifests": {name: manifest.hash for name, manifest in self.manifests.items()},
            "generators": self.generators,
            "elsewhere": self.elsewhere,
            "edge": self.edge,
            "features": self.features and self.features.name,
            "counts": {name: dict(part.labels) for name, part in self.parts.items()},
            "copies": self.copies,
            **{name: [_plain(each) for each in rows] for name, rows in figures.items()},
            "notes": self.notes,
        }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def judge(asked: Asked, say: Callable[[str], None], progress: Show | None = None) -> Quality:
    """Compare the sets. say: receives messages for the user.

    Raises: ConfigError if they cannot be compared, WeightsError if Inception's file is missing, DataError for shards
    that cannot be read, and what `bushpc.load` raises.
    """
    synthetic, real = _open(asked)
    asked = _settle_fold(asked, real)
    parts = _parts(asked, synthetic, real)
    manifests = {name: synthetic if name == SYNTHETIC else real for name in parts}
    features, segmenter = _features(asked, synthetic, real, say), _segmenter(asked, synthetic, real, say)
    tested = [parts[SYNTHETIC], parts[HELD_OUT]]
    tick = _ticks(progress, [*parts.values(), *(tested if segmenter else [])])
    edge = _edge(parts[SYNTHETIC].records)
    seen = {name: _look(part, edge, features, tick) for name, part in parts.items()}
    same = _same_pictures(seen)
    images = pd.DataFrame([_facts(part.name, record) for part in tested for record in part.records])
    if TRAINING in parts:
        images = images.assign(**_nearest(parts, seen, same))
    found: dict[str, np.ndarray] = {}
    if segmenter:
        images["dice"] = [_dice(*masks) for part in tested for masks in _masks(part, part.records, segmenter, tick)]
        shown = [parts[SYNTHETIC].records[i] for i in _to_show(images)]
        masks = _masks(parts[SYNTHETIC], shown, segmenter, lambda: None)
        found = {record.key: found_HW for record, (_, found_HW) in zip(shown, masks, strict=True)}
    tick("comparing the images")
    labels = [ALL, *sorted(parts[SYNTHETIC].labels.keys() & parts[HELD_OUT].labels.keys())]
    return Quality(
        asked=asked,
        manifests=manifests,
        parts=parts,
        edge=edge,
        features=features,
        distances=[each for label in labels for each in _distances(label, parts, seen)] if features else [],
        nearness=_nearness(images),
        agreement=[each for label in labels for each in _agreement(label, images)] if segmenter else [],
        diversity=[each for label in labels for each in _diversity(label, parts, seen, same)],
        images=images,
        found=found,
        elsewhere=_elsewhere(asked, real),
        notes=_notes(parts),
    )


def write(quality: Quality, folder: Path) -> None:
    """Write `folder`/images.csv and quality.json, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "images.csv", quality.images.to_csv(index=False, lineterminator="\n"))
    write_atomically(folder / "quality.json", quality.to_json())


def _plain(figure: t.Any) -> dict[str, t.Any]:
    """A figure with its intervals as plain dictionaries, for JSON."""
    return {key: _plain(value) if hasattr(value, "_asdict") else value for key, value in figure._asdict().items()}


# --- what is compared -------------------------------------------------------------------------------------------


def _open(asked: Asked) -> tuple[Manifest, Manifest]:
    synthetic, real = Manifest.load(asked.synthetic), Manifest.load(asked.against)
    if not synthetic.synthetic:
        raise DataError(
            f"{asked.synthetic} holds real scans of {synthetic.dataset} (no synthetic: true in its card). Give the "
            "folder that `bushpc generate` wrote first, and the real scans as against=…"
        )
    if real.synthetic:
        raise DataError(f"against={asked.against} holds synthetic images. Give the real scans to compare with")
    for manifest, folder in ((synthetic, asked.synthetic), (real, asked.against)):
        if len(manifest.channels) != 3:
            raise DataError(f"{folder} holds images of {len(manifest.channels)} channels; only three are supported")
    return synthetic, real


def _settle_fold(asked: Asked, real: Manifest) -> Asked:
    """Fill in the fold in which the generator was trained, as recorded by `bushpc generate`.

    Raises: ConfigError if it is unknown, or if the generator was trained on images that would be held out.
    """
    stated = _stated(asked)
    trained = [each for each in stated if same_data(each, real)]
    if stated and not trained and asked.part != "all":
        raise ConfigError(
            f"against={asked.against}: the generator was not trained on this dataset, so it has no training images to "
            "copy and no held-out part. Give part=all to compare with all its images, or set against= to the "
            "generator's training data"
        )
    if asked.part == "all":
        if trained:
            raise ConfigError(
                f"part=all: the generator was trained on images of {asked.against}, in fold {trained[0]['fold']}. "
                "Leave part=all out, and the images that it has not seen are held out"
            )
        return asked
    fold = trained[0]["fold"] if trained and asked.fold is None else asked.fold
    if fold is None:
        raise ConfigError(
            f"{asked.synthetic} does not record in which fold of {asked.against} its generator was trained. Give that "
            "fold as fold=K; or give part=all if it was trained on other data"
        )
    folds_sha256 = sha256_of(find_folds(real, asked.against, asked.folds))
    if trained and any((each["folds_sha256"], each["fold"]) != (folds_sha256, fold) for each in trained):
        raise ConfigError(
            f"folds={asked.folds}, fold={fold}: the generator was trained on images of that validation part, in fold "
            f"{trained[0]['fold']} of the folds with SHA-256 {str(trained[0]['folds_sha256'])[:12]} (these have "
            f"{folds_sha256[:12]}). Give the folds= and fold= of its training"
        )
    return dataclasses.replace(asked, fold=fold)


def _stated(asked: Asked) -> list[Training]:
    found: list[Training] = (read_json(asked.synthetic / GENERATED) or {}).get("trained_on", [])
    return found


def _elsewhere(asked: Asked, real: Manifest) -> list[str]:
    others = [each for each in _stated(asked) if not same_data(each, real)]
    return sorted({each.get("data") or f"the scans of manifest {each['manifest_sha256'][:12]}" for each in others})


def _parts(asked: Asked, synthetic: Manifest, real: Manifest) -> dict[str, Part]:
    held_out, training = real.lesions, []
    if asked.fold is not None:
        path = find_folds(real, asked.against, asked.folds)
        folds = load_folds(path, real.records, real.excerpt)
        held_out = [real.record(key) for key in folds.validation(asked.fold)]
        training = [real.record(key) for key in folds.train(asked.fold)]
    parts = {
        SYNTHETIC: Part(name=SYNTHETIC, folder=asked.synthetic, records=synthetic.lesions),
        HELD_OUT: Part(name=HELD_OUT, folder=asked.against, records=held_out),
    }
    if training:
        parts[TRAINING] = Part(name=TRAINING, folder=asked.against, records=training)
    for part in parts.values():
        if len(part.records) < 2:
            raise DataError(
                f"{part.folder}: {len(part.records)} scans with a lesion ({part.name}); at least two needed"
            )
    return parts


def _features(asked: Asked, synthetic: Manifest, real: Manifest, say: Callable[[str], None]) -> FeatureExtractor | None:
    if asked.features == NONE:
        return None
    device = choose_device(asked.device)
    if asked.features == INCEPTION:
        return inception(asked.weights_dir, device)
    path = Path(asked.features).expanduser()
    return of_model(path, _fold_of(path, "features", asked, synthetic, real), device, say)


def _segmenter(asked: Asked, synthetic: Manifest, real: Manifest, say: Callable[[str], None]) -> Predictor | None:
    if asked.segmenter is None:
        return None
    fold = _fold_of(asked.segmenter, "segmenter", asked, synthetic, real)
    return load(asked.segmenter, fold=fold, device=asked.device, say=say)


def _fold_of(path: Path, word: str, asked: Asked, synthetic: Manifest, real: Manifest) -> int | None:
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
    if asked.fold is not None:
        own = {"folds_sha256": sha256_of(find_folds(real, asked.against, asked.folds)), "fold": asked.fold}
        if any(own.items() <= each.items() for each in trained):
            return asked.fold
    raise ConfigError(
        f"{word}={path} was trained on images of {asked.against} that are held out here, so its results on them are "
        f"biased. Use a model of fold={asked.fold}, folds={asked.folds}, or one that was trained on other data"
    )


def _trainings(path: Path) -> list[dict[str, t.Any]]:
    """The trainings (data, folds and fold) of the models of a run or an export."""
    exported, run = read_json(path / EXPORT_FILE), RunRecord.read(RunDir(path).file)
    if exported:
        return [each for fold in exported.get("folds", []) for each in fold.get("trained_on", [])]
    return [each for cell in run.cells for each in of_cell(run, cell.name)] if run else []


def _edge(records: Sequence[Record]) -> int:
    """The most frequent edge of generated images. Real ones are resized to such squares, as for the generator."""
    return Counter(max(record.height, record.width) for record in records).most_common(1)[0][0]


def _notes(parts: Mapping[str, Part]) -> list[str]:
    notes = []
    shares = {
        name: ", ".join(f"{count / len(part.records):.0%} {label}" for label, count in sorted(part.labels.items()))
        for name, part in parts.items()
    }
    if shares[SYNTHETIC] != shares[HELD_OUT]:
        notes.append(
            "The sets differ in their label distribution, which contributes to every distance over all labels: "
            + "; ".join(f"{name}: {share}" for name, share in shares.items())
            + "."
        )
    return notes


# --- one pass over all images -----------------------------------------------------------------------------------


class _Seen(t.NamedTuple):
    """What is kept of the images of a part. features_ND: None if no features are requested."""

    looks: list[Fingerprint]
    features_ND: np.ndarray | None


def _ticks(progress: Show | None, parts: Sequence[Part]) -> Callable[..., None]:
    """A function to call once for every image of these parts, and with a message for other long operations."""
    total, done = sum(len(part.records) for part in parts), 0

    def tick(message: str = "") -> None:
        nonlocal done
        done += not message
        if progress:
            progress(done, total, message)

    return tick


def _look(part: Part, edge: int, features: FeatureExtractor | None, tick: Callable[..., None]) -> _Seen:
    looks: list[Fingerprint] = []
    features_BD = []
    for start in range(0, len(part.records), _BATCH):
        images = []
        for record in part.records[start : start + _BATCH]:
            images.append(_square(part, record, edge))
            looks.append(fingerprint_of(images[-1]))
            tick()
        if features:
            features_BD.append(features.see(images))
    return _Seen(looks, np.concatenate(features_BD) if features else None)


def _square(part: Part, record: Record, edge: int) -> np.ndarray:
    image_HWC = read_image(part.folder, record)
    return resize(image_HWC, np.zeros(image_HWC.shape[:2], np.uint8), edge)[0]


def _same_pictures(seen: Mapping[str, _Seen]) -> dict[str, list[int]]:
    """By part, the group number of each of its images; all copies of a picture are in one group."""
    looks = [look for each in seen.values() for look in each.looks]
    groups = iter(group(len(looks), find_pairs(looks)))
    return {name: [next(groups) for _ in each.looks] for name, each in seen.items()}


def _facts(name: str, record: Record) -> dict[str, str]:
    return {"images": name, "key": record.key, "patient": record.patient, "label": record.label}


# --- are the sets alike? ----------------------------------------------------------------------------------------


def _distances(label: str, parts: Mapping[str, Part], seen: Mapping[str, _Seen]) -> Iterator[Distance]:
    """Distances of the generated images; then, for comparison, of equal numbers of generated and training images."""
    own, held_out = parts[SYNTHETIC].places(label), parts[HELD_OUT].places(label)
    sets = [(SYNTHETIC, SYNTHETIC, own)]
    if TRAINING in parts:
        training = parts[TRAINING].places(label)
        if len(training) < len(own):
            sets.append((f"{SYNTHETIC}, as many as training", SYNTHETIC, own[: len(training)]))
        sets.append((TRAINING, TRAINING, training[: len(own)]))
    others = parts[HELD_OUT].patients(held_out)
    other_MD = t.cast(np.ndarray, seen[HELD_OUT].features_ND)[held_out]
    for images, name, places in sets:
        if min(len(places), len(held_out)) < 2:
            continue
        patients = parts[name].patients(places)
        one_ND = t.cast(np.ndarray, seen[name].features_ND)[places]
        yield Distance(
            label=label,
            images=images,
            number=len(places),
            against=len(held_out),
            frechet=frechet(one_ND, other_MD, patients, others),
            kernel=kernel(one_ND, other_MD, patients, others),
        )


# --- are training images copied? --------------------------------------------------------------------------------


def _nearest(
    parts: Mapping[str, Part], seen: Mapping[str, _Seen], same: Mapping[str, list[int]]
) -> dict[str, list[t.Any]]:
    """Columns of `Quality.images`: the nearest training image of each generated and each held-out one."""
    training = [record.key for record in parts[TRAINING].records]
    upright_MP, mirrored_MP = (_contrasts(seen[TRAINING].looks, mirrored) for mirrored in (False, True))
    columns: dict[str, list[t.Any]] = {}
    for name in (SYNTHETIC, HELD_OUT):
        one_NP = _contrasts(seen[name].looks)
        upright, mirrored = (_best(one_NP, other_MP, np.matmul) for other_MP in (upright_MP.T, mirrored_MP.T))
        is_mirrored = mirrored.value > upright.value
        place = np.where(is_mirrored, mirrored.place, upright.place)
        copied = set(same[TRAINING])
        found: dict[str, list[t.Any]] = {
            "nearest": [training[i] for i in place],
            "correlation": np.maximum(upright.value, mirrored.value).round(4).tolist(),
            "mirrored": is_mirrored.tolist(),
            "copy": [number in copied for number in same[name]],
        }
        one_ND, other_MD = seen[name].features_ND, seen[TRAINING].features_ND
        if one_ND is not None and other_MD is not None:
            near = _best(one_ND, other_MD, lambda one, other: -_feature_distances(one, other))
            found |= {"near_features": [training[i] for i in near.place], "distance": (-near.value).tolist()}
        for column, values in found.items():
            columns.setdefault(column, []).extend(values)
    return columns


class _Best(t.NamedTuple):
    """For each image, the position and similarity of the most similar other image."""

    place: np.ndarray
    value: np.ndarray


def _best(one: np.ndarray, other: np.ndarray, likeness: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> _Best:
    places, values = [], []
    for start in range(0, len(one), _ROWS):
        alike = likeness(one[start : start + _ROWS], other)
        places.append(alike.argmax(axis=1))
        values.append(alike.max(axis=1))
    return _Best(np.concatenate(places), np.concatenate(values))


def _contrasts(looks: Sequence[Fingerprint], mirrored: bool = False) -> np.ndarray:
    """Local contrasts as unit vectors, so that their dot products are correlations."""
    contrast_NHW = local_contrast(np.stack([look.small_HW for look in looks]))
    return (contrast_NHW[:, :, ::-1] if mirrored else contrast_NHW).reshape(len(looks), -1)


def _feature_distances(one_ND: np.ndarray, other_MD: np.ndarray) -> np.ndarray:
    one_ND, other_MD = one_ND.astype(float), other_MD.astype(float)
    squares = (one_ND**2).sum(axis=1)[:, None] + (other_MD**2).sum(axis=1) - 2 * one_ND @ other_MD.T
    return np.sqrt(squares.clip(0))


def _nearness(images: pd.DataFrame) -> list[Nearness]:
    found = []
    for by, column, sign in ((CORRELATION, "correlation", -1), (FEATURES, "distance", 1)):
        if column not in images:
            continue
        far = {name: sign * rows[column].to_numpy(float) for name, rows in images.groupby("images")}
        own, held_out = far[SYNTHETIC], far[HELD_OUT]
        beyond = int((own < held_out.min()).sum())
        tested = {SYNTHETIC: (beyond, _p_of_extremes(beyond, len(own), len(held_out))), HELD_OUT: (None, None)}
        for name, test in tested.items():
            median, twentieth, nearest = (sign * float(np.quantile(far[name], q)) for q in (0.5, 0.05, 0))
            copies = int(images.loc[images["images"] == name, "copy"].sum())
            found.append(Nearness(by, name, len(far[name]), median, twentieth, nearest, copies, *test))
    return found


def _p_of_extremes(beyond: int, one: int, other: int) -> float:
    """Probability that the `beyond` most extreme of one + other exchangeable values are all in `one` (Rosenbaum 1954).

    Medians are not suitable: images that resemble no training image can still be slightly closer overall, and a few
    copies do not move a median.
    """
    rank = np.arange(beyond)
    return float(np.prod((one - rank) / (one + other - rank)))


# --- is the lesion where the mask says? -------------------------------------------------------------------------


def _masks(
    part: Part, records: Sequence[Record], segmenter: Predictor, tick: Callable[..., None]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each image, its own mask and the segmenter's: H x W, 0 or 1, the first class."""
    for start in range(0, len(records), _BATCH):
        some = records[start : start + _BATCH]
        results = segmenter.predict([read_image(part.folder, record) for record in some], [Known()] * len(some))
        for record, result in zip(some, results, strict=True):
            tick()
            yield read_mask(part.folder, record) & 1, result.mask_HW


def _dice(mask_HW: np.ndarray, found_HW: np.ndarray) -> float:
    return float(dice(MaskPair(prob=found_HW, mask=mask_HW)))


def _to_show(images: pd.DataFrame) -> list[int]:
    """Positions of the generated images with the lowest Dice, and of a random selection."""
    rows = images[images["images"] == SYNTHETIC]
    worst = rows["dice"].sort_values(kind="stable").index[:_SHOWN].tolist()
    place = {key: i for i, key in enumerate(rows["key"])}
    return list(dict.fromkeys([*worst, *(place[key] for key in by_hash(place)[:_SHOWN])]))


def _agreement(label: str, images: pd.DataFrame) -> Iterator[Agreement]:
    for name in (SYNTHETIC, HELD_OUT):
        rows = images[(images["images"] == name) & ((images["label"] == label) | (label == ALL))].dropna(subset="dice")
        if len(rows):
            mean = intervals(rows, ["dice"])["dice"]
            yield Agreement(label, name, len(rows), mean, float((rows["dice"] == 0).mean()))


# --- are they as diverse? ---------------------------------------------------------------------------------------


def _diversity(
    label: str, parts: Mapping[str, Part], seen: Mapping[str, _Seen], same: Mapping[str, list[int]]
) -> Iterator[Diversity]:
    real = [part for name, part in parts.items() if name != SYNTHETIC]
    for title, members in ((SYNTHETIC, [parts[SYNTHETIC]]), (REAL, real)):
        place = {part.records[i].key: (part, i) for part in members for i in part.places(label)}
        images = [place[key] for key in by_hash(place)]
        groups = Counter(same[part.name][i] for part, i in images)
        drawn = images[:MOST_SSIM]
        gray_NSS = np.stack([_square(part, part.records[i], _SSIM_EDGE).mean(axis=2) for part, i in drawn])
        distance = None
        if seen[SYNTHETIC].features_ND is not None:
            paired = images[:MOST_PAIRED]
            features_ND = np.stack([t.cast(np.ndarray, seen[part.name].features_ND)[i] for part, i in paired])
            distance = _mean(_feature_distances(features_ND, features_ND), paired)
        yield Diversity(
            label=label,
            images=title,
            number=len(images),
            ms_ssim=_mean(_ms_ssim(gray_NSS), drawn),
            distance=distance,
            repeated=sum(count for count in groups.values() if count > 1),
        )


def _mean(value_NN: np.ndarray, images: Sequence[tuple[Part, int]]) -> Estimate | None:
    estimate = mean_pairwise(value_NN, [part.records[i].patient for part, i in images])
    return None if np.isnan(estimate.value) else estimate


def _ms_ssim(gray_NSS: np.ndarray) -> np.ndarray:
    """Multi-scale structural similarity (Wang et al. 2003) of every pair of images in 0 to 255, by torchmetrics."""
    import torch
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    gray_N1SS = torch.from_numpy(gray_NSS / 255).float()[:, None]
    similarity_NN = np.ones((len(gray_NSS), len(gray_NSS)))
    for i in range(len(gray_NSS) - 1):
        others = gray_N1SS[i + 1 :]
        one = gray_N1SS[i].expand_as(others)
        values = multiscale_structural_similarity_index_measure(one, others, data_range=1.0, reduction="none")
        similarity_NN[i, i + 1 :] = similarity_NN[i + 1 :, i] = values.numpy()
    return similarity_NN
