"""`bushpc shards show --augment`: what each named policy of `augment=` does to scans of a dataset.

a few scans ─resized as for training→ draws of each policy → gallery, in the order of the policies
"""

from __future__ import annotations

import typing as t
from collections.abc import Sequence
from pathlib import Path

from bushpc.errors import DataError

if t.TYPE_CHECKING:
    from bushpc.report.gallery import ImageAndMask, Row
    from bushpc.shards.manifest import Manifest, Record
    from bushpc.shards.progress import Show

SCANS, DRAWS = 3, 7  # with the scan itself, 8 pictures a policy and scan
EDGE = 352  # pixels, as most of the papers' networks see scans
UNCHANGED = "none"


def write_augment_page(folder: Path, page: Path, command: Sequence[str], progress: Show | None = None) -> Path:
    """Write `page`. Raises: DataError for data that are not packed or cannot be read; OSError."""
    from bushpc.data.augment.picture import policies
    from bushpc.report.gallery import write_gallery
    from bushpc.shards.manifest import Manifest

    manifest = Manifest.load(folder)
    chosen = _scans(manifest)
    told = policies()
    names = sorted(told, key=lambda name: (name != UNCHANGED, name))
    rows = []
    for done, name in enumerate(names, 1):
        rows += [row for record in chosen for row in _rows(name, folder, record)]
        if progress:
            progress(done, len(names))
    return write_gallery(
        page,
        rows,
        title=f"Augmentation of {manifest.dataset}",
        kicker=f"What the policies of augment= do: {', '.join(names)}",
        command=command,
        filters=["policy", "scan", "label"],
        classes=manifest.mask_classes,
        remarks=[
            *(f"{name}: {_sentence(told[name])}" for name in names if told[name]),
            f"Pictures are as a network gets them, squeezed to {EDGE} x {EDGE} pixels: {len(chosen)} scans and "
            f"{DRAWS} draws of each.",
        ],
        edge=EDGE,
    )


def _sentence(line: str) -> str:
    """The whole sentences of a line of a comment, which may end in the middle of one."""
    return line if line.endswith(".") else f"{line.rpartition('. ')[0] or line.rstrip(':')}."


def _scans(manifest: Manifest) -> list[Record]:
    """The first lesions, of as many labels as there are. Raises: DataError if there is none."""
    first = {record.label: record for record in reversed(manifest.lesions)}
    if not first:
        raise DataError(f"{manifest.dataset} has no scan with a lesion, so there is no outline to follow")
    others = [record for record in manifest.lesions if record is not first[record.label]]
    return [*first.values(), *others][:SCANS]


def _rows(policy: str, folder: Path, record: Record) -> list[Row]:
    """The scan itself, then its draws."""
    from bushpc.config import compose
    from bushpc.data.augment.picture import draws_of
    from bushpc.data.square import decode
    from bushpc.report.gallery import Row

    config = compose([f"augment={policy}", "model=unet", "data=phantom"]).augment
    image_HWC, mask_HW = decode(folder, record, EDGE)
    pairs: list[ImageAndMask] = [(image_HWC, mask_HW)]
    if policy != UNCHANGED:
        pairs += draws_of(image_HWC, mask_HW, config, DRAWS)
    return [
        Row(
            id=f"{policy}/{record.key}/{draw}",
            key=f"{policy} {draw}" if draw else f"{policy}: the scan",
            load=lambda pair=pair: pair,  # type: ignore[misc]
            fields={"policy": policy, "scan": record.key, "label": record.label, "draw": draw},
        )
        for draw, pair in enumerate(pairs)
    ]
