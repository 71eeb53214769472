"""What `bushpc quality` is request, the sets that it compares, and the figures that it finds."""

from __future__ import annotations

import json
import typing as t
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from bushpc.errors import ConfigError, unknown_name
from bushpc.generate.features import FeatureExtractor
from bushpc.metrics.image import Estimate
from bushpc.report.pictures import by_hash
from bushpc.report.stats import Interval
from bushpc.shards.manifest import Manifest, Record

PARTS = ("validation", "all")
SYNTHETIC, HELD_OUT, TRAINING, REAL = "synthetic", "real, held out", "real, training part", "real"
CORRELATION, FEATURES = "correlation", "features"
ALL = "all"  # all labels together


@dataclass(frozen=True, kw_only=True)
class QualityRequest:
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
class ImageSet:
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
    """sets, manifests: by the name of the set. edge: all images were resized to squares of this edge, in pixels.

    images: a row for each generated or held-out image: images (name of the set), key, patient, label. With a training
    part: nearest (the training image with the highest correlation), correlation, mirrored, and copy (whether it is the
    same picture as a training image); with features also near_features and distance. With a segmenter: dice.
    found: the segmenter's masks of some generated images. elsewhere: other datasets that the generator was trained on.
    notes: remarks on the figures.
    """

    request: QualityRequest
    manifests: dict[str, Manifest]
    sets: dict[str, ImageSet]
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
        stated = (record.attributes.get("generator") for record in self.sets[SYNTHETIC].records)
        return sorted({str(generator) for generator in stated if generator})

    def to_json(self) -> str:
        """All figures with their context, without the table of single images."""
        figures = {name: getattr(self, name) for name in ("distances", "nearness", "agreement", "diversity")}
        content = {
            "asked": {
                key: str(value) if isinstance(value, Path) else value for key, value in vars(self.request).items()
            },
            "manifests": {name: manifest.hash for name, manifest in self.manifests.items()},
            "generators": self.generators,
            "elsewhere": self.elsewhere,
            "edge": self.edge,
            "features": self.features and self.features.name,
            "counts": {name: dict(images.labels) for name, images in self.sets.items()},
            "copies": self.copies,
            **{name: [_plain(each) for each in rows] for name, rows in figures.items()},
            "notes": self.notes,
        }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _plain(figure: t.Any) -> dict[str, t.Any]:
    """A figure with its intervals as plain dictionaries, for JSON."""
    return {key: _plain(value) if hasattr(value, "_asdict") else value for key, value in figure._asdict().items()}
