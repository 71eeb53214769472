"""Corrected masks come back: they replace the masks of a packed dataset, and who did it and when is noted.

shards + FOLDER/<key>.png ─correct→ tars with those keys, under new names → manifest.json, in one step → old tars gone

The manifest names the tars, so readers see the old dataset or the new one, never a mixture. `corrections.csv` beside
the shards lists every replaced mask.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import re
import tarfile
import time
import typing as t
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from bushpc.errors import ConfigError, DataError
from bushpc.files import sha256_of, write_atomically
from bushpc.metrics.mask import lesion_length
from bushpc.shards import encode, readers, tree, work_folder, write
from bushpc.shards import manifest as manifests
from bushpc.shards.manifest import Manifest, Record, ShardInfo

LOG = write.CORRECTIONS
COLUMNS = (
    "key",
    "by",
    "when",
    "file",
    "pixels_before",
    "pixels_after",
    "pixels_changed",
    "before_sha256",
    "after_sha256",
)


@dataclass(frozen=True, kw_only=True)
class Corrected:
    """changed, same: keys of masks that were replaced, and of those that were already so."""

    changed: list[str]
    same: list[str]
    manifest_hash: str
    log: Path


class _New(t.NamedTuple):
    """A corrected mask. old_HW: the packed one."""

    file: str
    mask_HW: np.ndarray
    old_HW: np.ndarray


def correct(folder: Path, corrections: Path, by: str, *, when: str | None = None) -> Corrected:
    """Replace masks of the dataset packed in `folder` by the pictures in `corrections`, whose names are keys.

    Raises: DataError for a picture of no key, of another size, or that contradicts its scan's label; nothing is then
    changed. ConfigError for an empty name.
    """
    if not by.strip() or not by.isprintable():
        raise ConfigError(f"by={by!r}: give the name of whoever corrected the masks.")
    manifest = Manifest.load(folder)
    manifests.verify(folder, manifest)
    new = _read(folder, manifest, corrections)
    changed = {key: one for key, one in new.items() if not np.array_equal(one.mask_HW, one.old_HW)}
    log = folder / LOG
    if changed:
        noted = {"by": by.strip(), "when": when or time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        with work_folder.typed_errors(folder), work_folder.locked_work_folder(folder):
            manifest = _rewrite(folder, manifest, changed, corrections, noted)
    return Corrected(
        changed=sorted(changed),
        same=sorted(new.keys() - changed.keys()),
        manifest_hash=manifest.hash,
        log=log,
    )


def _read(folder: Path, manifest: Manifest, corrections: Path) -> dict[str, _New]:
    """The corrected masks by key. All problems are listed at once."""
    if not corrections.is_dir():
        raise DataError(f"--corrections {corrections} is not a folder.")
    files = [
        path.relative_to(corrections).as_posix()
        for path in tree.glob(corrections, "**/*")
        if path.suffix.lower() in (".png", ".tif", ".tiff", ".bmp") and not path.is_dir()
    ]
    if not files:
        raise DataError(
            f"{corrections} holds no masks: they must be called <key>.png, such as {_example(manifest)}.png."
        )
    records = {record.key: record for record in manifest.records}
    found: dict[str, _New] = {}
    problems = []
    for file in files:
        key = _key(file, records)
        if key is None:
            problems.append(f"{file}: {manifest.dataset} has no scan '{PurePosixPath(file).stem}'")
        elif key in found:
            problems.append(f"{file} and {found[key].file} are both masks of {key}")
        else:
            try:
                mask_HW = _mask(corrections, file, manifest, records[key])
                found[key] = _New(file, mask_HW, manifests.read_mask(folder, records[key]))
            except DataError as error:
                problems.append(str(error))
    readers.raise_if_any(corrections, problems)
    return found


def _key(file: str, records: t.Mapping[str, Record]) -> str | None:
    """The key that a file is called after, alone or with its folders, or with a mark such as `_mask`."""
    name = PurePosixPath(file).stem
    forms = (name, file.rpartition(".")[0], re.sub(r"_(mask|seg|tumor|lesion)$", "", name))
    return next((form for form in forms if form in records), None)


def _mask(corrections: Path, file: str, manifest: Manifest, record: Record) -> np.ndarray:
    """One class: half bright and above. Several: the value of a pixel is its bits, as packed and as exported."""
    if len(manifest.mask_classes) == 1:
        levels_HW = readers.read_mask_levels(corrections, file)
        least = 1 if levels_HW.max(initial=0) == 1 else readers.HALF  # 0 and 1, as in nnU-Net, or 0 and 255
        mask_HW = (levels_HW >= least).astype(np.uint8)
    else:
        mask_HW = readers.read_levels(corrections, file, range(1 << len(manifest.mask_classes)))
    readers.check_size(record.key, (record.height, record.width), file, mask_HW)
    if mask_HW.any() == (record.label == "normal"):
        normal = "is normal, and its corrected mask has lesion pixels"
        what = normal if mask_HW.any() else "has a lesion, and its corrected mask is empty"
        raise DataError(f"{file}: {record.key} {what}. Labels are corrected in the raw data: import or pack it again")
    return mask_HW


def _example(manifest: Manifest) -> str:
    return manifest.records[0].key if manifest.records else "case001"


def _rewrite(
    folder: Path, manifest: Manifest, changed: t.Mapping[str, _New], corrections: Path, noted: dict[str, str]
) -> Manifest:
    """Write the tars anew that hold changed masks; the manifest then names them instead of the old ones."""
    old_files = {manifest.record(key).shard for key in changed}
    new_files: dict[str, ShardInfo] = {}
    new_records: dict[str, Record] = {}
    names = {shard.file for shard in manifest.shards}
    try:
        for file in sorted(old_files):
            name = _free_name(folder, file, names)
            names.add(name)
            records = [record for record in manifest.records if record.shard == file]
            new_files[file], written = _rewrite_tar(folder, file, name, records, changed, noted)
            new_records |= {record.key: record for record in written}
        sources = {f"corrections/{one.file}": sha256_of(corrections / one.file) for one in changed.values()}
        new = dataclasses.replace(
            manifest,
            shards=[new_files.get(shard.file, shard) for shard in manifest.shards],
            sources=dict(sorted({**manifest.sources, **sources}.items())),
            records=[new_records.get(record.key, record) for record in manifest.records],
        )
        _note(folder / LOG, changed, noted)
        new.save(folder)
    except BaseException:
        for info in new_files.values():
            (folder / info.file).unlink(missing_ok=True)
        raise
    for file in old_files:
        (folder / file).unlink()
    return new


def _free_name(folder: Path, file: str, taken: set[str]) -> str:
    """`lesion-000000.tar` → `lesion-000000-c1.tar`, then -c2 …; readers of the old manifest keep the old file."""
    base = re.sub(r"(-c\d+)?\.tar$", "", file)
    names = (f"{base}-c{number}.tar" for number in itertools.count(1))
    return next(name for name in names if name not in taken and not (folder / name).exists())


def _rewrite_tar(
    folder: Path,
    file: str,
    name: str,
    records: list[Record],
    changed: t.Mapping[str, _New],
    noted: dict[str, str],
) -> tuple[ShardInfo, list[Record]]:
    """Copy a tar member by member; masks that changed, and the notes in their JSON, are new."""
    samples = []
    by_key = {record.key: record for record in records}
    with tarfile.open(folder / file) as tar:
        for key in dict.fromkeys(member.name.partition(".")[0] for member in tar):
            parts = {part: _member(tar, f"{key}.{part}") for part in ("image.png", "mask.png", "json")}
            record = by_key[key]
            if key in changed:
                mask_HW = changed[key].mask_HW
                parts["mask.png"] = encode.png(mask_HW)
                described = json.loads(parts["json"])
                described.setdefault("corrections", []).append(noted)
                parts["json"] = json.dumps(described, indent=1, sort_keys=True, ensure_ascii=False).encode()
                record = dataclasses.replace(
                    record,
                    lesion_pixels=int(np.count_nonzero(mask_HW)),
                    lesion_length=lesion_length(mask_HW),
                    mask_bytes=len(parts["mask.png"]),
                )
            samples.append(
                encode.Encoded(
                    record=record, image_png=parts["image.png"], mask_png=parts["mask.png"], json=parts["json"]
                )
            )
    records = work_folder.write_tar(folder / name, samples)
    path = folder / name
    return ShardInfo(file=name, sha256=sha256_of(path), bytes=path.stat().st_size, samples=len(samples)), records


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    stream = tar.extractfile(name)
    assert stream is not None, name
    return stream.read()


def _note(path: Path, changed: t.Mapping[str, _New], noted: dict[str, str]) -> None:
    """Add a row per replaced mask."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if path.exists():
        text.write(path.read_text(encoding="utf-8"))
    else:
        writer.writeheader()
    for key, one in sorted(changed.items()):
        writer.writerow(
            {
                "key": key,
                **noted,
                "file": one.file,
                "pixels_before": int(np.count_nonzero(one.old_HW)),
                "pixels_after": int(np.count_nonzero(one.mask_HW)),
                "pixels_changed": int(np.count_nonzero(one.old_HW != one.mask_HW)),
                "before_sha256": hashlib.sha256(one.old_HW.tobytes()).hexdigest(),
                "after_sha256": hashlib.sha256(one.mask_HW.tobytes()).hexdigest(),
            }
        )
    write_atomically(path, text.getvalue())
