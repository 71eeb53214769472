"""The manifest describes a packed dataset, sample by sample and shard by shard. Everything downstream reads it.

    shards/<name>/
      card.yaml                 where to get it, licence, layout, expected counts (committed)
      folds.csv                 frozen folds (committed for public datasets)
      lesion-000000.tar …       WebDataset tars: <key>.image.png, <key>.mask.png (bit k is class k), <key>.json
      normal-000000.tar …       scans without a lesion, kept apart
      manifest.json             written last, so its presence means that the dataset is complete

Samples are read by offset, so each tar serves as a random-access file; the webdataset library can still stream it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import typing as t
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from types import UnionType

import numpy as np
from PIL import Image

from bushpc.config import freeze, places
from bushpc.errors import DataError
from bushpc.files import sha256_of, write_atomically

FILE_NAME = "manifest.json"
# What Pillow raises for damaged PNG data, and for images so large that it suspects a decompression bomb.
PNG_FAILS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
Built = t.TypeVar("Built")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One packed sample: its metadata, and the position of its bytes.

    key, patient, label, attributes, pixel_mm: as in `bushpc.sample.Sample`.
    height, width: original size in pixels.
    lesion_pixels: area of the union of all mask classes in original pixels; 0 for a normal scan.
    lesion_length: longest side of the union's bounding box in original pixels; 0 for a normal scan.
    shard: file name of the tar.
    image_offset, image_bytes, mask_offset, mask_bytes: position (from the tar's start) and size of the PNGs, in bytes.
    """

    key: str
    patient: str
    label: str
    attributes: dict[str, str | float | None]
    pixel_mm: float | None
    height: int
    width: int
    lesion_pixels: int
    lesion_length: int
    shard: str
    image_offset: int
    image_bytes: int
    mask_offset: int
    mask_bytes: int


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One tar: its name, SHA-256 as hex, size in bytes and number of samples."""

    file: str
    sha256: str
    bytes: int
    samples: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a packed dataset except its pixels.

    dataset: name of the source, as in `data=<name>`.
    packer_version: version of the code that wrote the tars; a different version packs again.
    excerpt: the user declared the raw folder a part of the dataset; its results don't hold for the whole dataset.
    synthetic: as in the card: a trained generator made the images; they may train, but are never part of a fold.
    mask_classes, channels: as in the card: names of the masks' bits and of the images' channels.
    sources: SHA-256 as hex of every raw file, by its path relative to the raw folder.
    records: lesions first, then normals; by key within each.
    """

    dataset: str
    packer_version: int
    excerpt: bool
    synthetic: bool = False
    mask_classes: list[str] = field(default_factory=lambda: ["lesion"])
    channels: list[str] = field(default_factory=lambda: ["red", "green", "blue"])
    shards: list[ShardInfo] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read `folder`/manifest.json. Raises: DataError if it is missing or damaged."""
        path = Path(folder) / FILE_NAME
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise DataError(_why_missing(path)) from None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read ({error}).{_repack(path)}") from error
        try:
            content = freeze.MANIFEST.read(json.loads(text), str(path))
            stated = content.pop("hash")
            content.setdefault("synthetic", False)
            content["shards"] = [_build(ShardInfo, shard) for shard in content["shards"]]
            content["records"] = [_build(Record, record) for record in content["records"]]
            manifest = _build(cls, content)
            _check_file_names(manifest)
            computed = manifest.hash
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{path} is damaged or was written by another version of bushpc ({error}).{_repack(path)}"
            ) from error
        if computed != stated:
            raise DataError(f"{path} is damaged: its content does not match its hash.{_repack(path)}")
        return manifest

    def save(self, folder: str | Path) -> None:
        """Write `folder`/manifest.json atomically; the same manifest always gives the same bytes."""
        content = {**self._content(), "hash": self.hash, "format": freeze.MANIFEST.number}
        text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        write_atomically(Path(folder) / FILE_NAME, text)

    @cached_property
    def hash(self) -> str:
        """SHA-256 as hex over the whole content including the tars' hashes: the identity of the packed data."""
        text = json.dumps(self._content(), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def _content(self) -> dict[str, t.Any]:
        """What is saved and hashed. Real data have no `synthetic` key, so the hash of older manifests stays valid."""
        content = asdict(self)
        if not self.synthetic:
            del content["synthetic"]
        return content

    @property
    def lesions(self) -> list[Record]:
        """The records of scans with a lesion: all except the normal ones."""
        return [record for record in self.records if record.label != "normal"]

    def record(self, key: str) -> Record:
        """The record of one sample. Raises: DataError for an unknown key."""
        try:
            return self._by_key[key]
        except KeyError:
            raise DataError(
                f"{self.dataset} has no sample '{key}': it has {len(self.records)} samples, "
                f"from '{self.records[0].key}' to '{self.records[-1].key}'."
                if self.records
                else f"{self.dataset} has no samples."
            ) from None

    @cached_property
    def _by_key(self) -> dict[str, Record]:
        return {record.key: record for record in self.records}


def read_image(folder: str | Path, record: Record) -> np.ndarray:
    """The image of `record`: uint8, (height, width, channels), RGB if three. Raises: DataError naming tar and key."""
    return decode_image(read_image_png(folder, record), record, Path(folder) / record.shard)


def read_image_png(folder: str | Path, record: Record) -> bytes:
    """The image of `record` as it was packed: one channel if its three are equal. Raises: DataError."""
    return _read(Path(folder) / record.shard, record, "image", record.image_offset, record.image_bytes)


def read_mask(folder: str | Path, record: Record) -> np.ndarray:
    """The mask of `record`: uint8, (height, width), bit k is class k. Raises: DataError naming tar and key."""
    path = Path(folder) / record.shard
    return decode_mask(_read(path, record, "mask", record.mask_offset, record.mask_bytes), record, path)


def decode_image(png: bytes, record: Record, shard: Path) -> np.ndarray:
    """Like `read_image`, but from bytes already in memory. shard: only named in errors."""
    return _pixels(png, record, "image", shard)


def decode_mask(png: bytes, record: Record, shard: Path) -> np.ndarray:
    """Like `read_mask`, but from bytes already in memory. shard: only named in errors."""
    return _pixels(png, record, "mask", shard)


def verify(folder: str | Path, manifest: Manifest, deep: bool = False) -> None:
    """Compare the tars in `folder` with the manifest: presence and size, with `deep` also the SHA-256.

    Raises: DataError naming every tar that is missing, truncated or altered.
    """
    folder = Path(folder)
    bad = [f"{shard.file}: {fault}" for shard in manifest.shards if (fault := _fault(folder, shard, deep))]
    if bad:
        raise DataError(
            f"{len(bad)} of {len(manifest.shards)} shards in {folder} do not match the manifest:\n  "
            + "\n  ".join(bad)
            + _repack(folder / FILE_NAME)
        )


def _read(path: Path, record: Record, what: str, offset: int, length: int) -> bytes:
    where = f"{what} of '{record.key}' in {path}"
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if offset < 0 or length < 0 or offset + length > size:  # checked before memory is allocated
                raise DataError(
                    f"The {where} is cut off: {length} bytes expected at byte {offset}, but the file has {size}."
                    + _repack(path)
                )
            file.seek(offset)
            return file.read(length)
    except (OSError, ValueError) as error:
        raise DataError(f"The {where} cannot be read ({error}).{_repack(path)}") from error


def _pixels(png: bytes, record: Record, what: t.Literal["image", "mask"], path: Path) -> np.ndarray:
    where = f"{what} of '{record.key}' in {path}"
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            if image.size != (record.width, record.height):  # checked before memory is allocated for the pixels
                raise DataError(
                    f"The {where} has {image.width}x{image.height} pixels, "
                    f"the manifest says {record.width}x{record.height}.{_repack(path)}"
                )
            # Four channels are stored as RGBA; three equal channels are stored as one.
            mode = "L" if what == "mask" else image.mode if image.mode == "RGBA" else "RGB"
            return np.array(image.convert(mode))  # a writable copy, so torch can use its memory
    except PNG_FAILS as error:
        raise DataError(f"The {where} is not a readable PNG ({error}).{_repack(path)}") from error


def _fault(folder: Path, shard: ShardInfo, deep: bool) -> str | None:
    path = folder / shard.file
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            return f"{size} bytes instead of {shard.bytes}"
        if deep and sha256_of(path) != shard.sha256:
            return "content altered (its SHA-256 differs)"
    except FileNotFoundError:
        return "missing"
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"
    return None


@cache
def _json_types(cls: type) -> dict[str, tuple[type, ...]]:
    """The JSON types allowed for each field of a dataclass."""
    types = {}
    for name, hint in t.get_type_hints(cls).items():
        options = t.get_args(hint) if isinstance(hint, UnionType) else (hint,)
        plain = tuple(t.get_origin(option) or option for option in options)
        types[name] = (*plain, int) if float in plain else plain
    return types


def _build(cls: type[Built], content: t.Any) -> Built:
    """`cls(**content)`. Raises: TypeError, also for a missing field or a value of the wrong type."""
    if missing := _json_types(cls).keys() - content.keys():  # type: ignore[arg-type]
        raise TypeError(f"missing: {', '.join(sorted(missing))}")
    built = cls(**content)
    for name, allowed in _json_types(cls).items():  # type: ignore[arg-type]
        given = type(getattr(built, name))
        if given not in allowed:
            raise TypeError(f"{name} is a {given.__name__}, not a {' or '.join(kind.__name__ for kind in allowed)}")
    return built


def _check_file_names(manifest: Manifest) -> None:
    """Raises: ValueError if a shard is not a plain file name, or a record names a shard that the manifest lacks."""
    files = {shard.file for shard in manifest.shards}
    elsewhere = [file for file in files if file != Path(file).name or "\0" in file]
    unknown = {record.shard for record in manifest.records} - files
    if strange := sorted([*elsewhere, *unknown]):
        raise ValueError(f"invalid shard name {strange[0]!r}")


def _why_missing(path: Path) -> str:
    folder = path.parent
    if not folder.exists():
        return f"{path} does not exist: there is no folder {folder}, so this dataset is not packed yet.{_repack(path)}"
    if any((folder / ".packing").glob("*.json")):
        return (
            f"{path} does not exist: packing was interrupted, so this dataset is not packed yet. The same command "
            f"continues; finished shards are kept.{_repack(path)}"
        )
    return f"{path} does not exist: this dataset is not packed yet.{_repack(path)}"


def _repack(path: Path) -> str:
    folder = path.parent
    known = (places.shipped_shards() / folder.name).is_dir()
    usual = known and folder.absolute() == (places.home() / "shards" / folder.name).absolute()
    words = f"data={folder.name if known else 'NAME'} src=FOLDER" + ("" if usual else f" out={folder}")
    return f"\nRun: bushpc pack {words}   (src is the publisher's folder; a synthetic dataset takes none)"
