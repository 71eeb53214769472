"""OASBUD (Piotrzkowska-Wróblewska et al. 2017): raw radio-frequency echoes of 100 lesions, two scans of each.

    OASBUD.mat, data[i] ─rf1, rf2 → envelope → decibels, square pixels→ images      roi1, roi2 → masks

shards/oasbud/card.yaml lists the oddities of the published file and how they are handled (`notes`).
"""

from __future__ import annotations

import functools
import math
import typing as t
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bushpc.errors import ConfigError, DataError
from bushpc.sample import Sample
from bushpc.shards import readers
from bushpc.shards.sources import Item, Plan

if t.TYPE_CHECKING:
    from bushpc.shards.card import Card

FIELDS = ("id", "rf1", "rf2", "roi1", "roi2", "birads", "class")
LABELS = ("benign", "malignant")  # by the field `class`
SCANS = (1, 2)  # of each lesion, at right angles
SOUND_MM_PER_S, SAMPLES_PER_S = 1540e3, 40e6
WIDTH_MM = 38.0  # of the probe L14-5/38, whose lines are side by side


@dataclass(frozen=True, kw_only=True)
class Echoes:
    """A scan: where its echoes are, and how they are shown.

    lesion, scan: of `data`, from 0, and 1 or 2.
    """

    file: Path
    lesion: int
    scan: int
    patient: str
    birads: str | None
    dynamic_range_db: float


def plan(folder: Path | None, card: Card, *, excerpt: bool = False) -> Plan:
    """Read what is known of the lesions; the file holds it beside the echoes.

    Raises: DataError naming the file, or every lesion with a missing or invalid field; ConfigError for a range of 0 dB.
    """
    assert folder is not None, "the packer refuses a missing src for a dataset that is downloaded"
    name, dynamic_range_db = card.layout["file"], card.parameters["dynamic_range_db"]
    if not 0 < dynamic_range_db < math.inf:
        raise ConfigError(f"dynamic_range_db={dynamic_range_db}: it must be > 0; 40 to 70 decibels are usual.")
    items, problems = [], []
    for index, lesion in enumerate(_lesions(folder / name)):
        where = f"{name}, data({index + 1})"
        if missing := [field for field in FIELDS if field not in lesion]:
            problems.append(f"{where} lacks {', '.join(missing)}")
            continue
        if lesion["class"] not in (0, 1):
            problems.append(f"{where}: class is {lesion['class']}; allowed: 0 (benign) and 1 (malignant)")
            continue
        for scan in SCANS:
            rf, roi = np.shape(lesion[f"rf{scan}"]), np.shape(lesion[f"roi{scan}"])
            if len(rf) != 2 or rf != roi:
                problems.append(f"{where}: rf{scan} has the shape {rf} and roi{scan} {roi}; they must be equal, in 2D")
            recipe = Echoes(
                file=folder / name,
                lesion=index,
                scan=scan,
                patient=f"oasbud_{lesion['id']}",
                birads=str(lesion["birads"]).strip() or None,
                dynamic_range_db=dynamic_range_db,
            )
            items.append(Item(key=f"oasbud_{index + 1:03d}_{scan}", label=LABELS[lesion["class"]], recipe=recipe))
    readers.raise_if_any(folder, problems)
    return Plan(items, readers.hash_files(folder, [name]))


def load(item: Item) -> Sample:
    """Make the picture of a scan, with square pixels. Raises: DataError naming the lesion."""
    echoes: Echoes = item.recipe
    lesion = _lesions(echoes.file)[echoes.lesion]
    rf_ZX, roi_ZX = lesion[f"rf{echoes.scan}"], lesion[f"roi{echoes.scan}"]
    pixel_mm = WIDTH_MM / rf_ZX.shape[1]
    height = round(rf_ZX.shape[0] * SOUND_MM_PER_S / (2 * SAMPLES_PER_S) / pixel_mm)
    envelope_HW = _resized(envelope(rf_ZX), height)
    if height < 1 or not np.isfinite(envelope_HW).all() or not envelope_HW.any():
        raise DataError(f"{echoes.file}, data({echoes.lesion + 1}): rf{echoes.scan} holds no echoes.")
    grey_HW = b_mode(envelope_HW, echoes.dynamic_range_db)
    return Sample(
        key=item.key,
        patient=echoes.patient,
        label=item.label,
        image_HWC=np.repeat(grey_HW[..., None], 3, axis=2),
        mask_HW=(_resized((np.asarray(roi_ZX) > 0).astype(np.float32), height) >= 1 / 2).astype(np.uint8),
        attributes={"birads": echoes.birads},
        pixel_mm=pixel_mm,
        sources=(echoes.file.name,),
    )


def envelope(rf_ZX: np.ndarray) -> np.ndarray:
    """The strength of the echoes along each line: the analytic signal's magnitude."""
    from scipy.signal import hilbert  # imported here because packing other datasets doesn't need it

    return np.abs(hilbert(np.asarray(rf_ZX, np.float64), axis=0))


def b_mode(envelope_HW: np.ndarray, dynamic_range_db: float) -> np.ndarray:
    """Decibels below the strongest echo as uint8: that one is white, `dynamic_range_db` below it and less is black."""
    level_db_HW = 20 * np.log10(np.maximum(envelope_HW / envelope_HW.max(), 1e-12))
    return np.round(255 * np.clip(1 + level_db_HW / dynamic_range_db, 0, 1)).astype(np.uint8)


def _resized(values_ZX: np.ndarray, height: int) -> np.ndarray:
    """Averages along the lines: four samples or so fall on one pixel."""
    import cv2

    return cv2.resize(np.asarray(values_ZX, np.float32), (values_ZX.shape[1], height), interpolation=cv2.INTER_AREA)


def _lesions(file: Path) -> list[dict[str, t.Any]]:
    """The entries of `data`. Raises: DataError naming the file."""
    try:
        stamp = file.stat().st_mtime_ns
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.") from error
    return _read(file, stamp)


@functools.lru_cache(maxsize=1)  # a variable of a .mat file can only be read whole, and `load` gets one scan at a time
def _read(file: Path, stamp: int) -> list[dict[str, t.Any]]:
    from scipy.io import loadmat

    try:
        lesions = loadmat(file, variable_names=["data"], simplify_cells=True)["data"]
    except KeyError:
        raise DataError(f"{file} has no variable 'data': it must be the publisher's OASBUD.mat.") from None
    except Exception as error:  # scipy lets any error of its parsers through
        raise DataError(f"{file} is not a readable MATLAB file ({type(error).__name__}: {error}).") from error
    lesions = [lesions] if isinstance(lesions, dict) else list(np.atleast_1d(lesions))
    if not all(isinstance(lesion, dict) for lesion in lesions):
        raise DataError(f"{file}: 'data' must be a struct with the fields {', '.join(FIELDS)}.")
    return lesions
