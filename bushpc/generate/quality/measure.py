"""Sets of images → figures: distances, nearest training images, agreement of masks, diversity."""

from __future__ import annotations

import typing as t
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from bushpc.conditions import Known
from bushpc.data.square import resize
from bushpc.evaluate.predictor import Predictor
from bushpc.generate.features import FeatureExtractor
from bushpc.generate.quality.records import (
    ALL,
    CORRELATION,
    FEATURES,
    HELD_OUT,
    REAL,
    SYNTHETIC,
    TRAINING,
    Agreement,
    Distance,
    Diversity,
    ImageSet,
    Nearness,
)
from bushpc.metrics.image import Estimate, frechet, kernel, mean_pairwise
from bushpc.metrics.mask import MaskPair, dice
from bushpc.report.pictures import by_hash
from bushpc.report.stats import intervals
from bushpc.shards.duplicates import Fingerprint, find_pairs, fingerprint_of, group, local_contrast
from bushpc.shards.manifest import Record, read_image, read_mask
from bushpc.shards.progress import Show

_BATCH = 16  # images per forward pass
_ROWS = 256  # rows of a similarity matrix per step; limits the memory
# Maximum number of images per set for pairwise means, selected by a hash of their keys; more hardly change the mean.
MOST_SSIM, MOST_PAIRED = 20, 500
_SSIM_EDGE = 176  # pixels; the minimum for five scales of an 11-pixel window
_SHOWN = 6  # number of predicted masks to show: so many of the worst, and so many of a random selection


class Observed(t.NamedTuple):
    """What is kept of the images of a set. features_ND: None if no features are requested."""

    fingerprints: list[Fingerprint]
    features_ND: np.ndarray | None


def ticks(progress: Show | None, sets: Sequence[ImageSet]) -> Callable[..., None]:
    """A function to call once for every image of these sets, and with a message for other long operations."""
    total, done = sum(len(of_set.records) for of_set in sets), 0

    def tick(message: str = "") -> None:
        nonlocal done
        done += not message
        if progress:
            progress(done, total, message)

    return tick


def observe(of_set: ImageSet, edge: int, features: FeatureExtractor | None, tick: Callable[..., None]) -> Observed:
    fingerprints: list[Fingerprint] = []
    features_BD = []
    for start in range(0, len(of_set.records), _BATCH):
        images = []
        for record in of_set.records[start : start + _BATCH]:
            images.append(_square(of_set, record, edge))
            fingerprints.append(fingerprint_of(images[-1]))
            tick()
        if features:
            features_BD.append(features.see(images))
    return Observed(fingerprints, np.concatenate(features_BD) if features else None)


def _square(of_set: ImageSet, record: Record, edge: int) -> np.ndarray:
    image_HWC = read_image(of_set.folder, record)
    return resize(image_HWC, np.zeros(image_HWC.shape[:2], np.uint8), edge)[0]


def same_pictures(observed: Mapping[str, Observed]) -> dict[str, list[int]]:
    """By set, the group number of each of its images; all copies of a picture are in one group."""
    fingerprints = [fingerprint for each in observed.values() for fingerprint in each.fingerprints]
    groups = iter(group(len(fingerprints), find_pairs(fingerprints)))
    return {name: [next(groups) for _ in each.fingerprints] for name, each in observed.items()}


def facts_of(name: str, record: Record) -> dict[str, str]:
    return {"images": name, "key": record.key, "patient": record.patient, "label": record.label}


# --- are the sets alike? ----------------------------------------------------------------------------------------


def distances(label: str, sets: Mapping[str, ImageSet], observed: Mapping[str, Observed]) -> Iterator[Distance]:
    """Distances of the generated images; then, for comparison, of equal numbers of generated and training images."""
    own, held_out = sets[SYNTHETIC].places(label), sets[HELD_OUT].places(label)
    compared = [(SYNTHETIC, SYNTHETIC, own)]
    if TRAINING in sets:
        training = sets[TRAINING].places(label)
        if len(training) < len(own):
            compared.append((f"{SYNTHETIC}, as many as training", SYNTHETIC, own[: len(training)]))
        compared.append((TRAINING, TRAINING, training[: len(own)]))
    others = sets[HELD_OUT].patients(held_out)
    other_MD = t.cast(np.ndarray, observed[HELD_OUT].features_ND)[held_out]
    for images, name, places in compared:
        if min(len(places), len(held_out)) < 2:
            continue
        patients = sets[name].patients(places)
        one_ND = t.cast(np.ndarray, observed[name].features_ND)[places]
        yield Distance(
            label=label,
            images=images,
            number=len(places),
            against=len(held_out),
            frechet=frechet(one_ND, other_MD, patients, others),
            kernel=kernel(one_ND, other_MD, patients, others),
        )


# --- are training images copied? --------------------------------------------------------------------------------


def nearest_training_images(
    sets: Mapping[str, ImageSet], observed: Mapping[str, Observed], same: Mapping[str, list[int]]
) -> dict[str, list[t.Any]]:
    """Columns of `Quality.images`: the nearest training image of each generated and each held-out one."""
    training = [record.key for record in sets[TRAINING].records]
    upright_MP, mirrored_MP = (_contrasts(observed[TRAINING].fingerprints, mirrored) for mirrored in (False, True))
    columns: dict[str, list[t.Any]] = {}
    for name in (SYNTHETIC, HELD_OUT):
        one_NP = _contrasts(observed[name].fingerprints)
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
        one_ND, other_MD = observed[name].features_ND, observed[TRAINING].features_ND
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


def _contrasts(fingerprints: Sequence[Fingerprint], mirrored: bool = False) -> np.ndarray:
    """Local contrasts as unit vectors, so that their dot products are correlations."""
    contrast_NHW = local_contrast(np.stack([each.small_HW for each in fingerprints]))
    return (contrast_NHW[:, :, ::-1] if mirrored else contrast_NHW).reshape(len(fingerprints), -1)


def _feature_distances(one_ND: np.ndarray, other_MD: np.ndarray) -> np.ndarray:
    one_ND, other_MD = one_ND.astype(float), other_MD.astype(float)
    squares = (one_ND**2).sum(axis=1)[:, None] + (other_MD**2).sum(axis=1) - 2 * one_ND @ other_MD.T
    return np.sqrt(squares.clip(0))


def nearness(images: pd.DataFrame) -> list[Nearness]:
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


def predicted_masks(
    of_set: ImageSet, records: Sequence[Record], segmenter: Predictor, tick: Callable[..., None]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each image, its own mask and the segmenter's: H x W, 0 or 1, the first class."""
    for start in range(0, len(records), _BATCH):
        some = records[start : start + _BATCH]
        results = segmenter.predict([read_image(of_set.folder, record) for record in some], [Known()] * len(some))
        for record, result in zip(some, results, strict=True):
            tick()
            yield read_mask(of_set.folder, record) & 1, result.mask_HW


def dice_of(mask_HW: np.ndarray, found_HW: np.ndarray) -> float:
    return float(dice(MaskPair(prob=found_HW, mask=mask_HW)))


def images_to_show(images: pd.DataFrame) -> list[int]:
    """Positions of the generated images with the lowest Dice, and of a random selection."""
    rows = images[images["images"] == SYNTHETIC]
    worst = rows["dice"].sort_values(kind="stable").index[:_SHOWN].tolist()
    place = {key: i for i, key in enumerate(rows["key"])}
    return list(dict.fromkeys([*worst, *(place[key] for key in by_hash(place)[:_SHOWN])]))


def agreement(label: str, images: pd.DataFrame) -> Iterator[Agreement]:
    for name in (SYNTHETIC, HELD_OUT):
        rows = images[(images["images"] == name) & ((images["label"] == label) | (label == ALL))].dropna(subset="dice")
        if len(rows):
            mean = intervals(rows, ["dice"])["dice"]
            yield Agreement(label, name, len(rows), mean, float((rows["dice"] == 0).mean()))


# --- are they as diverse? ---------------------------------------------------------------------------------------


def diversity(
    label: str, sets: Mapping[str, ImageSet], observed: Mapping[str, Observed], same: Mapping[str, list[int]]
) -> Iterator[Diversity]:
    real = [of_set for name, of_set in sets.items() if name != SYNTHETIC]
    for title, members in ((SYNTHETIC, [sets[SYNTHETIC]]), (REAL, real)):
        place = {of_set.records[i].key: (of_set, i) for of_set in members for i in of_set.places(label)}
        images = [place[key] for key in by_hash(place)]
        groups = Counter(same[of_set.name][i] for of_set, i in images)
        drawn = images[:MOST_SSIM]
        gray_NSS = np.stack([_square(of_set, of_set.records[i], _SSIM_EDGE).mean(axis=2) for of_set, i in drawn])
        distance = None
        if observed[SYNTHETIC].features_ND is not None:
            paired = images[:MOST_PAIRED]
            features_ND = np.stack([t.cast(np.ndarray, observed[of_set.name].features_ND)[i] for of_set, i in paired])
            distance = _mean(_feature_distances(features_ND, features_ND), paired)
        yield Diversity(
            label=label,
            images=title,
            number=len(images),
            ms_ssim=_mean(_ms_ssim(gray_NSS), drawn),
            distance=distance,
            repeated=sum(count for count in groups.values() if count > 1),
        )


def _mean(value_NN: np.ndarray, images: Sequence[tuple[ImageSet, int]]) -> Estimate | None:
    estimate = mean_pairwise(value_NN, [of_set.records[i].patient for of_set, i in images])
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
