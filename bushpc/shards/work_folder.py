"""The folder `<out>/.packing/`: finished shards survive a kill, and a partial set never has a manifest."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import tarfile
import typing as t
import warnings
from dataclasses import asdict
from pathlib import Path

from bushpc.errors import BushpcWarning, DataError
from bushpc.files import flush_folder, sha256_of, write_atomically
from bushpc.shards import manifest as manifests
from bushpc.shards import sources
from bushpc.shards.card import Card
from bushpc.shards.encode import PACKER_VERSION, Encoded
from bushpc.shards.manifest import Manifest, Record, ShardInfo

WORK_FOLDER = ".packing"
LOCK_FILE = "lock"


@contextlib.contextmanager
def typed_errors(out: Path) -> t.Iterator[None]:
    """Raises: DataError for a file or folder that may not be read or written."""
    try:
        yield
    except OSError as error:
        place = error.filename2 or error.filename or out
        raise DataError(
            f"{place} cannot be read or written ({error.strerror or error}). Change its permissions or make room, or "
            "choose another folder with out=FOLDER."
        ) from error


@contextlib.contextmanager
def locked_work_folder(out: Path) -> t.Iterator[Path]:
    """Lock the work folder for this process; the kernel releases the lock however the process ends."""
    work = out / WORK_FOLDER
    work.mkdir(parents=True, exist_ok=True)
    with (work / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"Another bushpc pack is writing to {out}. Wait until it ends, or choose another folder."
            ) from None
        except OSError as error:  # a file system mounted without locks
            warnings.warn(
                f"{out} cannot be locked ({error}). Do not start a second pack into it.", BushpcWarning, stacklevel=3
            )
        yield work


def discard_other_work(
    work: Path, card: Card, plan: sources.Plan, excerpt: bool, shards: dict[str, list[sources.Item]]
) -> None:
    """Keep what an earlier attempt at exactly this task finished; delete the work of any other task."""
    task = {
        "dataset": card.name,
        "packer_version": PACKER_VERSION,
        "excerpt": excerpt,
        "mask_classes": card.mask_classes,
        "channels": card.channels,
        "sources": dict(sorted(plan.sources.items())),
        "shards": {file: [item.key for item in items] for file, items in shards.items()},
    }
    text = json.dumps(task, indent=1)
    try:
        if (work / "task.json").read_text(encoding="utf-8") == text:
            return
    except (OSError, UnicodeDecodeError):
        pass  # no earlier attempt, or it was killed before it began
    _clear(work)
    write_atomically(work / "task.json", text)


def _clear(work: Path) -> None:
    """Empty the work folder except for the lock file, which this process holds."""
    for path in work.iterdir():
        if path.name != LOCK_FILE:
            path.unlink()


def finished_shard(work: Path, out: Path, file: str) -> tuple[ShardInfo, list[Record]] | None:
    """A shard that an earlier attempt finished: its JSON file exists, and its tar has the hash stated there."""
    try:
        finished = json.loads((work / f"{file}.json").read_text(encoding="utf-8"))
        info = ShardInfo(**finished["info"])
        records = [Record(**record) for record in finished["records"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for folder in (work, out):  # it is already in `out` if the attempt was killed while moving the tars into place
        if (folder / file).exists() and sha256_of(folder / file) == info.sha256:
            return info, records
    return None


def write_shard(work: Path, file: str, samples: list[Encoded]) -> tuple[ShardInfo, list[Record]]:
    path = work / file
    records = write_tar(path, samples)
    info = ShardInfo(file=file, sha256=sha256_of(path), bytes=path.stat().st_size, samples=len(samples))
    content = json.dumps({"info": asdict(info), "records": [asdict(record) for record in records]})
    write_atomically(work / f"{file}.json", content)
    return info, records


def write_tar(path: Path, samples: list[Encoded]) -> list[Record]:
    """Write the samples' tar and flush it; returns their records with its name and the offsets in it."""
    records = []
    with path.open("wb") as stream:
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                key = sample.record.key
                image_offset = _add(tar, stream, f"{key}.image.png", sample.image_png)
                mask_offset = _add(tar, stream, f"{key}.mask.png", sample.mask_png)
                _add(tar, stream, f"{key}.json", sample.json)
                fields = {**asdict(sample.record), "shard": path.name}
                records.append(Record(**{**fields, "image_offset": image_offset, "mask_offset": mask_offset}))
        stream.flush()
        os.fsync(stream.fileno())
    return records


def _add(tar: tarfile.TarFile, stream: t.BinaryIO, name: str, data: bytes) -> int:
    """Append a member whose header depends only on its name and length; returns the offset of its data."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    header.mode = 0o644
    header.mtime = 0
    tar.addfile(header, io.BytesIO(data))
    blocks = -(-len(data) // tarfile.BLOCKSIZE)
    return stream.tell() - blocks * tarfile.BLOCKSIZE


def publish(work: Path, out: Path, manifest: Manifest) -> None:
    """Replace the old shards. The manifest is deleted first and written last, so a partial set never has one."""
    (out / manifests.FILE_NAME).unlink(missing_ok=True)
    files = {shard.file for shard in manifest.shards}
    for stale in [*out.glob("lesion-*.tar"), *out.glob("normal-*.tar")]:
        if stale.name not in files:
            stale.unlink()
    for file in sorted(files):
        if (work / file).exists():
            (work / file).replace(out / file)
    flush_folder(out)
    manifest.save(out)
    _clear(work)
