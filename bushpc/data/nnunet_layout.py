"""A fold's images and masks → a raw dataset in nnU-Net's format, and the split that it must use.

    raw/Dataset001_<name>/          imagesTr/<case>_0000.png (RGB), labelsTr/<case>.png (0 and 1), dataset.json
    preprocessed/Dataset001_<name>/ splits_final.json: one split, which is this fold

nnU-Net reads the scans that dataset.json lists. It plans on the fold's real training scans, so that runs with different
synthetic scans get the same batch size, patch and network; then it preprocesses all training and validation scans.

All images are resized to the size that every model gets, by the same code, so that results are comparable. As for all
other models, images that are not square are squeezed; nnU-Net is not told. nnU-Net calls a scan a case.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from bushpc.data.cache import Cache, DecodingStopped
from bushpc.data.loader import FoldData
from bushpc.data.mixture import PREFIX
from bushpc.files import write_atomically
from bushpc.shards.exchange.packed import case_of
from bushpc.shards.exchange.to_nnunet import ENDING, dataset_name, describe
from bushpc.shards.manifest import Record

FAST = 1  # zlib level: the files are read a few times and then deleted


def real_training_part(data: FoldData, normals: bool) -> list[Record]:
    """The fold's real scans outside the validation part. normals: include normal scans."""
    validated = {record.key for record in data.validation}
    wanted = data.manifest.records if normals else data.manifest.lesions
    return [r for r in wanted if not r.key.startswith(PREFIX) and r.key not in validated]


def export(
    data: FoldData,
    planned: Sequence[Record],
    cache: Cache,
    folder: Path,
    keep_going: Callable[[], bool] = lambda: True,
) -> Path:
    """Write all scans with one mask class, and the split, to `folder`; returns the raw dataset, which lists `planned`.

    planned: the scans that nnU-Net plans on. keep_going: called before each scan. Raises: DecodingStopped if it returns
    False.
    """
    name = dataset_name(data.manifest.dataset)
    raw = folder / "raw" / name
    for part in ("imagesTr", "labelsTr"):
        (raw / part).mkdir(parents=True)
    records = {record.key: record for record in (*data.train, *data.validation, *planned)}
    assert len({case_of(key) for key in records}) == len(records), "two keys differ only by a slash"
    for key in records:
        if not keep_going():
            raise DecodingStopped
        row, case = cache.rows[key], case_of(key)
        Image.fromarray(cache.images_NSSC[row]).save(raw / "imagesTr" / f"{case}_0000{ENDING}", compress_level=FAST)
        Image.fromarray(cache.masks_NSS[row]).save(raw / "labelsTr" / f"{case}{ENDING}", compress_level=FAST)
    list_scans(raw, data, planned)
    (folder / "preprocessed" / name).mkdir(parents=True)
    write_atomically(folder / "preprocessed" / name / "splits_final.json", json.dumps([split(data)], indent=1))
    return raw


def split(data: FoldData) -> dict[str, list[str]]:
    """The fold with nnU-Net's names."""
    return {
        part: [case_of(r.key) for r in records] for part, records in (("train", data.train), ("val", data.validation))
    }


def list_scans(dataset: Path, data: FoldData, records: Sequence[Record]) -> None:
    """Write a dataset.json to `dataset` (raw or preprocessed) that lists only these scans for nnU-Net."""
    cases = [case_of(record.key) for record in records]
    # List the files; otherwise nnU-Net finds them with processes that it ends by a signal, which ours ignore.
    files = {case: {"images": [f"imagesTr/{case}_0000{ENDING}"], "label": f"labelsTr/{case}{ENDING}"} for case in cases}
    text = describe(data.manifest.channels, {data.manifest.mask_classes[0]: 1}, len(cases), {"dataset": files})
    write_atomically(dataset / "dataset.json", text)
