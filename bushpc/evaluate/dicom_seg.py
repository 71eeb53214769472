"""A predicted mask → DICOM SEG, which refers to the image that it was made of: `bushpc predict --as dicom-seg`.

Ultrasound images have no Frame of Reference, so only the referenced frame says where a mask belongs: every frame of a
clip has its own SEG. UIDs follow from the source, the model and its settings: the same prediction is the same object.
The standard has pixel sizes of a SEG only within a Frame of Reference; those of the image it refers to hold.
"""

from __future__ import annotations

import copy
import hashlib
import io
import typing as t
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from bushpc.errors import ConfigError, DataError
from bushpc.evaluate.predictor import Predictor
from bushpc.shards.images import is_dicom

if t.TYPE_CHECKING:
    from pydicom import Dataset

NEEDED = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
# DICOM requires them, empty if unknown; anonymised images often lack some.
MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("AccessionNumber", "StudyID", "StudyDate", "StudyTime"),
)
SERIES_FROM = 1000  # added to the source's series number
MOST_SHOWN = 3
WEIGHTS = 16  # characters of the weights' hash


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """Who made a segmentation: model class, version of bushpc, hash of the weights, and how they were used."""

    name: str
    bushpc: str
    weights: str
    parameters: dict[str, str]

    @classmethod
    def of(cls, predictor: Predictor) -> Algorithm:
        members = predictor.members
        digest = hashlib.sha256(" ".join(member.sha256 for member in members).encode()).hexdigest()
        return cls(
            name=f"bushpc {type(members[0].model).__name__}",
            bushpc=version("bushpc"),
            weights=digest[:WEIGHTS],
            parameters={
                "folds": " ".join(member.name for member in members),
                "threshold": f"{predictor.recipe.threshold:g}",
                "mirrored": "yes" if predictor.tta != "none" else "no",
                "postprocess": predictor.rule.words,
            },
        )

    @property
    def version(self) -> str:
        return f"{self.bushpc}, weights {self.weights}"


def require(files: Iterable[Path]) -> None:
    """Raises: ConfigError without highdicom, and for inputs that are no DICOM."""
    if find_spec("highdicom") is None:
        raise ConfigError(
            "--as dicom-seg needs highdicom: pip install -c constraints.txt -e '.[exchange]', or leave it out"
        )
    others = [path.name for path in files if not is_dicom(path)]
    if others:
        more = f" and {len(others) - MOST_SHOWN} more" if len(others) > MOST_SHOWN else ""
        raise ConfigError(
            f"--as dicom-seg: a DICOM SEG refers to the DICOM image it belongs to, and {', '.join(others[:MOST_SHOWN])}"
            f"{more} are none. Give DICOM files alone, or take --as nifti"
        )


def check_source(path: Path) -> None:
    """Raises: DataError for a DICOM file without the UIDs that a SEG refers to."""
    source = _header(path)
    lacking = [name for name in NEEDED if not source.get(name)]
    if lacking:
        raise DataError(
            f"no DICOM SEG can refer to it: it has no {', '.join(lacking)}; leave --as dicom-seg out for it"
        )


def segment(path: Path, frame: int, frames: int, mask_HW: np.ndarray, algorithm: Algorithm) -> bytes:
    """The DICOM file of one frame's mask. Raises: DataError where highdicom cannot write one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about patients' names that have one part
            dataset = _segmentation(_header(path), frame, frames, mask_HW, algorithm)
        buffer = io.BytesIO()
        dataset.save_as(buffer)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise DataError(f"highdicom writes no DICOM SEG for it ({' '.join(str(error).split())})") from error
    return buffer.getvalue()


def _header(path: Path) -> Dataset:
    import pydicom

    return pydicom.dcmread(path, stop_before_pixels=True)


def _segmentation(source: Dataset, frame: int, frames: int, mask_HW: np.ndarray, algorithm: Algorithm) -> Dataset:
    import highdicom as hd
    from pydicom.sr.codedict import codes
    from pydicom.uid import UltrasoundImageStorage, generate_uid

    for name in MAY_BE_EMPTY:
        if name not in source:
            setattr(source, name, None)
    class_, several = source.SOPClassUID, "NumberOfFrames" in source
    if several:  # highdicom takes a frame of a clip for a single image only; what it is of, is put right below
        source.SOPClassUID = UltrasoundImageStorage
        del source.NumberOfFrames
    made_with = [algorithm.name, algorithm.version, str(algorithm.parameters)]
    identification = hd.AlgorithmIdentificationSequence(
        name=algorithm.name,
        version=algorithm.version,
        family=codes.cid7162.ArtificialIntelligence,
        parameters=algorithm.parameters,
    )
    lesion = hd.seg.SegmentDescription(
        segment_number=1,
        segment_label="Lesion",
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.Lesion,
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=identification,
    )
    dataset = hd.seg.Segmentation(
        source_images=[source],
        pixel_array=mask_HW.astype(np.uint8),
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[lesion],
        series_instance_uid=generate_uid(entropy_srcs=[source.SeriesInstanceUID, *made_with]),
        series_number=SERIES_FROM + int(source.get("SeriesNumber") or 0),
        sop_instance_uid=generate_uid(entropy_srcs=[source.SOPInstanceUID, str(frame), *made_with]),
        instance_number=frame + 1 if frames > 1 else int(source.get("InstanceNumber") or 1),
        manufacturer="bushpc",
        manufacturer_model_name=algorithm.name,
        software_versions=algorithm.bushpc,
        device_serial_number=algorithm.weights,
        content_label="LESION",
        content_description="Lesion",
        omit_empty_frames=False,
    )
    # DICOM requires both, empty if unknown, and highdicom leaves them out.
    dataset.PatientOrientation = source.get("PatientOrientation")
    if "ContentCreatorName" not in dataset:
        dataset.ContentCreatorName = None
    if several:
        _refer_to_frame(dataset, class_, frame + 1)
    return dataset


def _refer_to_frame(dataset: Dataset, class_: str, number: int) -> None:
    """Make all references to the source's single frame references to one of its frames, counted from 1."""
    for series in dataset.ReferencedSeriesSequence:
        series.ReferencedInstanceSequence[0].ReferencedSOPClassUID = class_
    [derivation] = dataset.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence
    reference = copy.deepcopy(derivation.SourceImageSequence[0])  # highdicom uses one object for both
    reference.ReferencedSOPClassUID, reference.ReferencedFrameNumber = class_, number
    derivation.SourceImageSequence = [reference]
