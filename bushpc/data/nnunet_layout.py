"""A fold's images and masks → a raw dataset as nnU-Net wants it, and the split that it has to keep.

    raw/Dataset001_<name>/          imagesTr/<case>_0000.png (RGB), labelsTr/<case>.png (0 and 1), dataset.json
    preprocessed/Dataset001_<name>/ splits_final.json: one split, which is this fold

All at the size at which every model gets them, resized by the same code, so that numbers compare. nnU-Net calls a scan
a case. It takes height and width for the real ones: what is not square is as squeezed as for all other models.
"""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from bushpc.data.cache import Cache
from bushpc.data.loader import FoldData
from bushpc.files import write_atomically

ENDING = ".png"
FAST = 1  # zlib's level: the files are read a few times, and deleted


def dataset_name(data: FoldData) -> str:
    """The folder's name; nnU-Net wants a number in it."""
    return f"Dataset001_{data.manifest.dataset}"


def case_of(key: str) -> str:
    """A sample's name among nnU-Net's files. Only keys of synthetic scans have a slash."""
    return key.replace("/", "__")


def export(data: FoldData, cache: Cache, folder: Path) -> Path:
    """Write the training and the validation part of one mask class below `folder`; returns the raw dataset."""
    name = dataset_name(data)
    raw = folder / "raw" / name
    for part in ("imagesTr", "labelsTr"):
        (raw / part).mkdir(parents=True)
    records = [*data.train, *data.validation]
    cases = [case_of(record.key) for record in records]
    assert len(set(cases)) == len(cases), "a key that only a slash tells from another"
    for record, case in zip(records, cases, strict=True):
        row = cache.rows[record.key]
        Image.fromarray(cache.images_NSSC[row]).save(raw / "imagesTr" / f"{case}_0000{ENDING}", compress_level=FAST)
        Image.fromarray(cache.masks_NSS[row]).save(raw / "labelsTr" / f"{case}{ENDING}", compress_level=FAST)
    described = {
        "channel_names": {str(i): channel for i, channel in enumerate(data.manifest.channels)},
        "labels": {"background": 0, data.manifest.mask_classes[0]: 1},
        "numTraining": len(records),
        "file_ending": ENDING,
        "overwrite_image_reader_writer": "NaturalImage2DIO",
        # Listed, or nnU-Net looks for them with processes that it ends by a signal, which ours do not die of.
        "dataset": {
            case: {"images": [f"imagesTr/{case}_0000{ENDING}"], "label": f"labelsTr/{case}{ENDING}"} for case in cases
        },
    }
    write_atomically(raw / "dataset.json", json.dumps(described, indent=1))
    split = {"train": cases[: len(data.train)], "val": cases[len(data.train) :]}
    (folder / "preprocessed" / name).mkdir(parents=True)
    write_atomically(folder / "preprocessed" / name / "splits_final.json", json.dumps([split], indent=1))
    return raw
