"""A cohort as DICOM images with DICOM SEG masks, in folders of any depth and files of any name.

images by SOP Instance UID + segmentations that refer to them → scans, one per image or segmented frame of a clip

Patients are DICOM's Patient IDs, unless the user says otherwise. Segments of one name are one mask class.
"""

from __future__ import annotations

import re
import typing as t
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bushpc.errors import DataError
from bushpc.shards import images, readers, tree
from bushpc.shards.card import MOST_MASK_CLASSES
from bushpc.shards.exchange.scans import Cohort, Found, class_names, image_label, stem
from bushpc.shards.exchange.settings import ImportSettings

if t.TYPE_CHECKING:
    from pydicom import Dataset

SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")  # and the newer label maps


class Plane(t.NamedTuple):
    """One segment of one picture. level: its value in a label map; None where each segment has frames of its own."""

    file: str
    frame: int
    level: int | None
    mask_class: int


@dataclass(frozen=True, kw_only=True)
class SegMask:
    """The segments of a picture; none is an empty mask."""

    planes: tuple[Plane, ...]
    files: tuple[str, ...]

    def read(self, folder: Path, image: str, height: int, width: int, *, lesion: bool) -> np.ndarray:
        mask_HW = np.zeros((height, width), np.uint8)
        for plane in self.planes:
            plane_HW = _plane(folder, plane)
            readers.check_size(image, (height, width), plane.file, plane_HW)
            mask_HW |= plane_HW << plane.mask_class
        return mask_HW

    def is_empty(self, folder: Path) -> bool:
        return not any(_plane(folder, plane).any() for plane in self.planes)


class _Header(t.NamedTuple):
    """An image's header."""

    file: str
    patient: str
    frames: int
    rows: int
    columns: int


@dataclass(kw_only=True)
class _Segmented:
    """What the segmentations say of one picture (an image's UID and frame)."""

    planes: list[tuple[str, int, int | None, str]] = field(default_factory=list)
    files: set[str] = field(default_factory=set)


def find(folder: Path, settings: ImportSettings) -> Cohort:
    """The images and frames with a mask. Raises: DataError if there are no DICOM images."""
    cohort = Cohort(scans=[])
    headers, segmentations = _headers(folder, cohort)
    if not headers:
        raise DataError(f"{folder} holds no DICOM images.")
    segmented: dict[tuple[str, int], _Segmented] = defaultdict(_Segmented)
    for file, dataset in segmentations:
        try:
            _add(file, dataset, headers, segmented, cohort)
        except Exception as error:  # an element is missing, or cannot be decoded, which happens when it is asked for
            cohort.problems.append(f"{file} is not a readable DICOM SEG ({type(error).__name__}: {error})")
    names = list(dict.fromkeys(plane[3] for each in segmented.values() for plane in each.planes))
    if settings.classes:
        names = [name for name in names if name in settings.classes]
    labels = image_label(names, settings)
    cohort.mask_classes = ["lesion"] if labels or not names else class_names(names)
    if len(cohort.mask_classes) > MOST_MASK_CLASSES:
        raise DataError(
            f"the segmentations have {len(names)} classes ({', '.join(names[:10])}, …); allowed: 1 to "
            f"{MOST_MASK_CLASSES}. Choose some with classes=NAME:1,NAME:2"
        )
    order = {name: 0 if labels else k for k, name in enumerate(names)}
    for uid, header in headers.items():
        for frame in _frames(uid, header, segmented, cohort, settings):
            found = segmented.get((uid, frame))
            cohort.scans.append(_scan(header, frame, found, order, labels, cohort))
    if labels:
        meaning = ", ".join(f"{name} is {label}" for name, label in labels.items())
        cohort.notes.append(f"segments are taken as labels of the images: {meaning}")
    return cohort


def _headers(folder: Path, cohort: Cohort) -> tuple[dict[str, _Header], list[tuple[str, Dataset]]]:
    """Images by UID, and segmentations. What cannot be read is a problem; other DICOM objects are counted."""
    import pydicom

    headers: dict[str, _Header] = {}
    segmentations: list[tuple[str, Dataset]] = []
    others = 0
    for path in tree.glob(folder, "**/*"):
        if path.is_dir() or not images.is_dicom(path):
            continue
        file = path.relative_to(folder).as_posix()
        try:
            dataset = pydicom.dcmread(path, stop_before_pixels=True)
            uid, kind = str(dataset.SOPInstanceUID), str(dataset.SOPClassUID)
        except Exception as error:  # pydicom lets any error of parsing through
            cohort.problems.append(f"{file} is not readable DICOM ({type(error).__name__}: {error})")
            continue
        if kind in SEGMENTATIONS:
            segmentations.append((file, dataset))
        elif not images.holds_image(dataset.SOPClassUID):
            others += 1
        elif uid in headers:
            cohort.problems.append(f"{file} and {headers[uid].file} are one image (SOP Instance UID {uid})")
        else:
            try:
                images.check_dicom_size(dataset)
                frames = int(dataset.get("NumberOfFrames") or 1)
                size = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
                headers[uid] = _Header(file, str(dataset.get("PatientID") or "").strip(), frames, *size)
            except Exception as error:  # an element is decoded when it is asked for
                cohort.problems.append(f"{file} is not readable DICOM ({type(error).__name__}: {error})")
    if others:
        cohort.notes.append(f"{others} DICOM files are neither images nor segmentations and are left out")
    return headers, segmentations


def _add(
    file: str,
    dataset: Dataset,
    headers: dict[str, _Header],
    segmented: dict[tuple[str, int], _Segmented],
    cohort: Cohort,
) -> None:
    """Note which of a segmentation's frames and segments belong to which picture."""
    names = {int(each.SegmentNumber): _class_of(each, cohort, file) for each in dataset.get("SegmentSequence") or ()}
    referred = _referred(dataset)
    map_of_labels = str(dataset.get("SegmentationType") or "") == "LABELMAP"
    size = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
    for uid in referred & headers.keys():  # an image that is referred to and has no segment has an empty mask
        if headers[uid].frames == 1:
            segmented[uid, 0].files.add(file)
    for number, group in enumerate(dataset.get("PerFrameFunctionalGroupsSequence") or [dataset]):
        sources = list(_sources(group)) or [(uid, 1) for uid in referred]
        where = f"{file}, frame {number + 1}"
        if len(sources) != 1:
            cohort.problems.append(
                f"{where} refers to {len(sources)} images, so it is unclear which one it segments"
                if sources
                else f"{where} does not say which image it segments"
            )
            continue
        uid, frame = sources[0]
        header = headers.get(uid)
        if header is None or not 1 <= frame <= header.frames:
            what = "an image that is not in the folder" if header is None else f"frame {frame} of {header.file}"
            cohort.problems.append(f"{where} refers to {what} (SOP Instance UID {uid})")
            continue
        if size != (header.rows, header.columns):
            cohort.problems.append(
                f"{header.file} has {header.columns}x{header.rows} pixels, its mask {file} has {size[1]}x{size[0]}"
            )
            continue
        picture = segmented[uid, frame - 1]
        for segment in names if map_of_labels else [_segment(group, dataset)]:
            if segment not in names:
                cohort.problems.append(f"{where} is of segment {segment}, which the file does not describe")
                continue
            level = segment if map_of_labels else None
            if others := {each[0] for each in picture.planes if each[3] == names[segment]} - {file}:
                cohort.problems.append(
                    f"{file} and {min(others)} both segment {names[segment]} in {header.file}: keep one of them"
                )
            picture.planes.append((file, number, level, names[segment]))
            picture.files.add(file)


def _class_of(segment: Dataset, cohort: Cohort, file: str) -> str:
    """A segment's label; numbers at its end count instances: `Lesion 1` and `Lesion 2` are one class."""
    label = str(segment.get("SegmentLabel") or "lesion").strip()
    name = re.sub(r"[\s_#-]*\d+$", "", label) or label
    if name != label:
        note = "segments that differ by a number at the end, such as 'Lesion 1', are united as one class"
        if note not in cohort.notes:
            cohort.notes.append(note)
    return name


def _referred(dataset: Dataset) -> set[str]:
    """UIDs of all images that a segmentation says it refers to."""
    return {
        str(instance.ReferencedSOPInstanceUID)
        for series in dataset.get("ReferencedSeriesSequence") or ()
        for instance in series.get("ReferencedInstanceSequence") or ()
    }


def _sources(group: Dataset) -> Iterator[tuple[str, int]]:
    """UID and frame number of the images that a frame of a segmentation was made from."""
    for derivation in group.get("DerivationImageSequence") or ():
        for source in derivation.get("SourceImageSequence") or ():
            numbers = source.get("ReferencedFrameNumber") or 1
            for number in [numbers] if isinstance(numbers, int | str) else list(numbers):
                yield str(source.ReferencedSOPInstanceUID), int(number)


def _segment(group: Dataset, dataset: Dataset) -> int:
    """The number of the segment that a frame shows; 0 where it is not stated."""
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [None])[0]
    for place in (group, shared):
        if place is not None and (found := place.get("SegmentIdentificationSequence")):
            return int(found[0].ReferencedSegmentNumber)
    return 0


def _frames(
    uid: str,
    header: _Header,
    segmented: dict[tuple[str, int], _Segmented],
    cohort: Cohort,
    settings: ImportSettings,
) -> list[int]:
    """The frames of an image that are scans: its only one, or those of a clip that have a mask."""
    if header.frames == 1:
        return [0]
    frames = [frame for frame in range(header.frames) if (uid, frame) in segmented]
    if not frames:
        cohort.incomplete(f"{header.file} is a clip of {header.frames} frames, none of which has a mask", settings)
    elif len(frames) < header.frames:
        cohort.notes.append(f"{header.file}: {len(frames)} of {header.frames} frames have a mask and are imported")
    return frames


def _scan(
    header: _Header,
    frame: int,
    found: _Segmented | None,
    order: dict[str, int],
    labels: dict[str, str] | None,
    cohort: Cohort,
) -> Found:
    name = stem(header.file) + (f"-f{frame:04d}" if header.frames > 1 else "")
    given: dict[str, t.Any] = {"patient": header.patient}
    mask = None
    if found is not None:
        planes = [plane for plane in found.planes if plane[3] in order]
        mask = SegMask(
            planes=tuple(Plane(file, number, level, order[name]) for file, number, level, name in planes),
            files=tuple(sorted(found.files)),
        )
        said = {labels[plane[3]] for plane in planes} if labels else set()
        if len(said) > 1:
            cohort.problems.append(f"{header.file} has segments of {' and '.join(sorted(said))}, but needs one label")
        elif said:
            given["label"] = said.pop()
    return Found(name=name, image=header.file, frame=frame, mask=mask, looked_for="a DICOM SEG", given=given)


def _plane(folder: Path, plane: Plane) -> np.ndarray:
    """A frame of a segmentation as uint8 0 or 1. At least half of the largest fraction counts as lesion."""
    import pydicom
    from pydicom.pixels.utils import pixel_array

    path = folder / plane.file
    try:
        dataset = pydicom.dcmread(path)
        images.check_dicom_size(dataset)
        values_HW = pixel_array(dataset, index=plane.frame)
        if plane.level is not None:
            return (values_HW == plane.level).astype(np.uint8)
        fraction = dataset.get("MaximumFractionalValue") if dataset.SegmentationType == "FRACTIONAL" else None
        return (2 * values_HW.astype(np.int64) >= int(fraction or 1)).astype(np.uint8)
    except Exception as error:  # pydicom lets any error of parsing through
        raise DataError(f"{path} is not a readable DICOM SEG ({type(error).__name__}: {error})") from error
