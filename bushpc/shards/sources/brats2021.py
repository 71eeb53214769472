"""BraTS 2021 (Baid et al. 2021): four MRI sequences of a brain with a glioma → axial slices with four channels.

    BraTS2021_00000/BraTS2021_00000_{flair,t1,t1ce,t2,seg}.nii.gz ─chosen slices→ BraTS2021_00000_z070 …
    BraTS-GLI-00000-000/BraTS-GLI-00000-000-{t2f,t1n,t1c,t2w,seg}.nii.gz, as from 2023 on

shards/brats2021/card.yaml lists the oddities of the published files, how they are handled, and which slices are
chosen (`notes`). Volumes are (rows, columns, slices), suffix _HWZ, in radiological orientation.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import typing as t
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bushpc.errors import ConfigError, DataError
from bushpc.sample import UNLABELLED, Sample
from bushpc.shards import readers, tree
from bushpc.shards.sources import Item, Plan

if t.TYPE_CHECKING:
    from bushpc.shards.card import Card


class Edition(t.NamedTuple):
    """How an edition of the challenge names and codes its cases.

    case: a case's name, its group the patient. joint: between case and sequence. sequences: by the card's channels.
    enhancing: the segmentation's value of enhancing tumour; 1 is necrotic core and 2 edema in all of them (Baid et al.
    2021, section 2.3).
    """

    title: str
    case: re.Pattern[str]
    joint: str
    sequences: dict[str, str]
    enhancing: int

    @property
    def classes(self) -> tuple[tuple[int, ...], ...]:
        """The values that form each of the card's mask_classes, in its order."""
        return (self.enhancing,), (1, self.enhancing), (1, 2, self.enhancing)

    def file(self, case: str, what: str) -> str:
        """case: its folder, relative to the raw folder."""
        return f"{case}/{Path(case).name}{self.joint}{self.sequences.get(what, what)}.nii.gz"


NEW_NAMES = {"flair": "t2f", "t1": "t1n", "t1ce": "t1c", "t2": "t2w"}
EDITIONS = (
    Edition("BraTS 2021", re.compile(r"(BraTS2021_\d+)"), "_", {}, 4),
    Edition("BraTS 2023", re.compile(r"(BraTS-GLI-\d+)-\d+"), "-", NEW_NAMES, 3),  # the last number is the visit
)
# Percentiles of a sequence's values in the brain, mapped to 1 and 255. Without clipping, a few bright vessels would
# leave all tissue dark.
MOST_VOXELS = 1 << 28  # a header may promise any number, and BraTS has 9 million
PERCENTILES = (0.5, 99.5)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Location of one slice: the case's folder below `folder`, the channels' names, and the index along the z axis."""

    folder: Path
    case: str
    channels: tuple[str, ...]
    z: int


class Sequence(t.NamedTuple):
    """An MRI sequence of a case: its voxels, 0 outside the brain, and the values that map to 1 and 255."""

    values_HWZ: np.ndarray
    low: float
    high: float

    def slice(self, z: int) -> np.ndarray:
        """uint8 (H, W): 0 outside the brain, 1 to 255 inside."""
        values_HW = self.values_HWZ[..., z]
        share_HW = np.clip((values_HW - self.low) / (self.high - self.low), 0, 1)
        return np.where(values_HW != 0, np.round(1 + 254 * share_HW), 0).astype(np.uint8)


class Volume(t.NamedTuple):
    """Voxels, the patient's right at the left and the front at the top; and the edge length of a slice's pixels."""

    values_HWZ: np.ndarray
    pixel_mm: float | None


def plan(folder: Path | None, card: Card, *, excerpt: bool = False) -> Plan:
    """List the slices that the card's parameters select. Reads every segmentation to do so.

    Raises: ConfigError for invalid parameters; DataError naming missing and unreadable files.
    """
    assert folder is not None, "the packer refuses a missing src for a dataset that is downloaded"
    every, least = card.parameters["every"], card.parameters["least_pixels"]
    if not all(isinstance(number, int) and number >= 1 for number in (every, least)):
        raise ConfigError(f"brats2021 every={every} least_pixels={least}: both must be whole numbers ≥ 1.")
    found = [path for path in tree.glob(folder, "**/BraTS*") if path.is_dir() and _edition(path.name)]
    cases = [path.relative_to(folder).as_posix() for path in sorted(found, key=lambda path: path.name)]
    editions = {edition.title for case in cases if (edition := _edition(case))}
    if len(editions) > 1:
        raise DataError(
            f"{folder} holds cases of {' and '.join(sorted(editions))}, which are the same patients under other names: "
            "give a folder with one edition."
        )
    files = {case: [_file(case, what) for what in (*card.channels, "seg")] for case in cases}
    problems = [fault for names in files.values() for fault in readers.missing_files(folder, names)]
    if problems and all("seg.nii" in fault for fault in problems):
        problems.append("the challenge's validation cases have no segmentation: only the training cases can be packed")
    readers.raise_if_any(folder, problems)
    _case.cache_clear()  # the files may have changed since this process read them
    items = []
    for case in cases:
        tumor_Z = np.count_nonzero(_segmentation(folder, case).values_HWZ, axis=(0, 1))
        for z in range(0, len(tumor_Z), int(every)):
            if tumor_Z[z] >= least:
                recipe = Slice(folder=folder, case=case, channels=tuple(card.channels), z=z)
                items.append(Item(key=f"{Path(case).name}_z{z:03d}", label=UNLABELLED, recipe=recipe))
    hashes = readers.hash_files(folder, [name for names in files.values() for name in names])
    parameters = hashlib.sha256(json.dumps(card.parameters, sort_keys=True).encode()).hexdigest()
    return Plan(items, {**hashes, "parameters": parameters})


def load(item: Item) -> Sample:
    """One slice of all sequences. Raises: DataError naming the file."""
    place: Slice = item.recipe
    sequences, segmentation = _case(place.folder, place.case, place.channels)
    mask_HW = np.zeros(segmentation.values_HWZ.shape[:2], np.uint8)
    for bit, values in enumerate(_of(place.case).classes):
        mask_HW |= np.isin(segmentation.values_HWZ[..., place.z], values).astype(np.uint8) << np.uint8(bit)
    return Sample(
        key=item.key,
        patient=_patient(place.case),
        label=item.label,
        image_HWC=np.stack([sequence.slice(place.z) for sequence in sequences], axis=-1),
        mask_HW=mask_HW,
        attributes={"slice": float(place.z)},
        pixel_mm=segmentation.pixel_mm,
        sources=tuple(_file(place.case, what) for what in (*place.channels, "seg")),
    )


@functools.lru_cache(maxsize=1)  # slices of a case come in a row, and reading the case takes most of the time
def _case(folder: Path, case: str, channels: tuple[str, ...]) -> tuple[list[Sequence], Volume]:
    """A whole case: its sequences in channel order, and its segmentation."""
    segmentation = _segmentation(folder, case)
    sequences = []
    for what in channels:
        name = _file(case, what)
        values_HWZ = _volume(folder, name).values_HWZ
        if values_HWZ.shape != segmentation.values_HWZ.shape:
            raise DataError(
                f"{folder / name} has {values_HWZ.shape} voxels, its segmentation {_file(case, 'seg')} "
                f"has {segmentation.values_HWZ.shape}."
            )
        brain = values_HWZ[values_HWZ != 0]  # the published volumes are skull-stripped
        low, high = np.percentile(brain, PERCENTILES).tolist() if brain.size else (0.0, 0.0)
        if not high > low:
            raise DataError(f"{folder / name} contains no brain: all its voxels have the same value.")
        sequences.append(Sequence(values_HWZ, low, high))
    return sequences, segmentation


def _segmentation(folder: Path, case: str) -> Volume:
    name = _file(case, "seg")
    volume = _volume(folder, name)
    edition = _of(case)
    known = (0, 1, 2, edition.enhancing)
    if strange := np.unique(volume.values_HWZ[~np.isin(volume.values_HWZ, known)]).tolist():
        shown = ", ".join(f"{value:g}" for value in strange[: readers.MOST_SHOWN])
        raise DataError(
            f"{folder / name} has voxels of value {shown}; {edition.title} uses only 0, 1, 2 and {edition.enhancing}."
        )
    return volume


def _volume(folder: Path, name: str) -> Volume:
    """Read a NIfTI file and bring it to radiological orientation. Raises: DataError naming the file."""
    import nibabel  # imported here because only this dataset needs it

    path = folder / name
    try:
        image = nibabel.as_closest_canonical(nibabel.load(path))  # x to the right, y to the front, z upwards
        if math.prod(image.shape) > MOST_VOXELS:
            raise ValueError(f"{image.shape} voxels")
        values_XYZ = np.asarray(image.dataobj, dtype=np.float32)
        width_mm, height_mm, *_ = (float(edge) for edge in image.header.get_zooms())
    except Exception as error:  # nibabel lets any error from header parsing and gzip through
        raise DataError(f"{path} is not a readable NIfTI volume ({type(error).__name__}: {error}).") from error
    if values_XYZ.ndim != 3 or not np.isfinite(values_XYZ).all():
        raise DataError(f"{path} must hold a 3-D volume of finite numbers; its shape is {values_XYZ.shape}.")
    square = abs(width_mm - height_mm) < 1e-3 * width_mm
    return Volume(values_XYZ[::-1, ::-1].transpose(1, 0, 2), round(width_mm, 6) if square else None)


def _edition(case: str) -> Edition | None:
    return next((edition for edition in EDITIONS if edition.case.fullmatch(Path(case).name)), None)


def _of(case: str) -> Edition:
    edition = _edition(case)
    assert edition is not None, case
    return edition


def _patient(case: str) -> str:
    match = _of(case).case.fullmatch(Path(case).name)
    assert match is not None, case
    return match[1]


def _file(case: str, what: str) -> str:
    return _of(case).file(case, what)
