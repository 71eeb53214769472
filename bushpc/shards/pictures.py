"""One reader of pictures for `bushpc pack` and `bushpc predict`: a picture of any depth → uint8 RGB.

    files ─survey→ the set's ranges ─read(file, ranges)→ image_HWC

8-bit pictures keep their values. Deeper ones (16-bit and 32-bit integers, floats) have no fixed white, and a range
taken from each file would change the brightness from one scan to the next. So a set of files has one range for its
integers and one for its floats:

1. what the user gives (`grey_max=`), else
2. what the files' tags state (BitsPerSample below 16, Min- and MaxSampleValue, ImageJ's min and max, PNG's sBIT): the
   widest range of the set, else
3. from 0 to the smallest full scale (1 for floats, then 8, 10, 12, 14 or 16 bits) that holds the set's largest value;
   from the smallest to the largest value where some are negative or exceed 16 bits.
"""

from __future__ import annotations

import io
import math
import re
import sys
import typing as t
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from bushpc.errors import ConfigError, DataError

FULL_SCALES = (255, 1023, 4095, 16383, 65535)
Kind = t.Literal["integer", "float"]
Source = Path | io.BytesIO
HARDLY_ANY = 1 / 8  # of a range: 8-bit values read as 12 bits use a sixteenth, dark scans use more
NEARLY_ALL = 99.9  # per cent of the pixels; a few bright ones (text, a hot pixel) don't make a range used
_PHOTOMETRIC, _BITS, _DESCRIPTION, _MIN_IS_WHITE = 262, 258, 270, 0
_STATED_TAGS = ((340, 341), (280, 281))  # SMin- and SMaxSampleValue, Min- and MaxSampleValue
_IMAGEJ = re.compile(r"^(min|max)=([-+.\deE]+)\s*$", re.MULTILINE)


class Range(t.NamedTuple):
    """The values that become black and white."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


Ranges = dict[Kind, Range]


@dataclass(frozen=True, kw_only=True)
class _Deep:
    """A picture of more than 8 bits as stored: values_HWC has 1, 3 or 4 channels. stated: by its tags."""

    kind: Kind
    values_HWC: np.ndarray
    stated: Range | None
    white_is_0: bool


@dataclass(kw_only=True)
class _Seen:
    """What a survey saw of one kind of pictures. used: the value that nearly all pixels of each stay below."""

    stated: list[Range | None] = field(default_factory=list)
    least: float = math.inf
    most: float = -math.inf
    used: float = -math.inf

    def add(self, picture: _Deep) -> None:
        values = picture.values_HWC[..., :3]
        self.stated.append(picture.stated)
        self.least, self.most = min(self.least, float(values.min())), max(self.most, float(values.max()))
        self.used = max(self.used, float(np.percentile(values, NEARLY_ALL)))

    def range(self, kind: Kind) -> Range:
        stated = [range_ for range_ in self.stated if range_]
        if len(stated) == len(self.stated):
            return Range(min(range_.low for range_ in stated), max(range_.high for range_ in stated))
        if self.least < 0 or self.most > FULL_SCALES[-1]:
            return Range(self.least, self.most)
        most = max([self.most, *(range_.high for range_ in stated)])
        scales = (1, *FULL_SCALES) if kind == "float" else FULL_SCALES
        return Range(0, next((scale for scale in scales if most <= scale), most))


def given(grey_max: float) -> Ranges:
    """The ranges of a user who states the value of white."""
    if not 0 < grey_max < math.inf:
        raise ConfigError(f"the grey value of white is {grey_max:g}; it must be a number above 0, such as 4095")
    return {"integer": Range(0, grey_max), "float": Range(0, grey_max)}


def survey(paths: Iterable[Path], grey_max: float | None = None) -> tuple[Ranges, list[str]]:
    """The ranges of a set of pictures, empty if all have 8 bits; and warnings where hardly any of one is used.

    Decodes deep pictures only. Files that Pillow cannot read are left to whoever reads them.
    """
    stated = given(grey_max) if grey_max is not None else {}
    seen: dict[Kind, _Seen] = {}
    for path in paths:
        try:
            with Image.open(path) as image:
                frames = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
                deep = _kind(image) is not None
            for frame in range(frames * deep):
                picture = _decode(path, frame, None, False)
                assert isinstance(picture, _Deep), path
                seen.setdefault(picture.kind, _Seen()).add(picture)
        except Exception:  # damaged, or no picture; Pillow lets any error through
            continue
    ranges, warnings = {}, []
    for kind, each in seen.items():
        ranges[kind] = range_ = stated.get(kind) or each.range(kind)
        if each.used - range_.low < HARDLY_ANY * (range_.high - range_.low):
            warnings.append(
                f"of the {kind} pictures' range, {range_}, hardly any is used: {NEARLY_ALL} % of each one's pixels are "
                f"at or below {each.used:g}, so they come out dark"
            )
    return ranges, warnings


def read(
    source: Source,
    ranges: Ranges | None = None,
    *,
    frame: int = 0,
    formats: tuple[str, ...] | None = None,
    upright: bool = False,
) -> np.ndarray:
    """A picture as uint8 RGB, (H, W, 3). Transparent pixels become black, like a scanner's screen.

    ranges: from `survey`; a deep picture without one is a set of its own. upright: obey the EXIF orientation.
    Raises: DataError for pixels that are not numbers; whatever Pillow raises for a damaged file.
    """
    picture = _decode(source, frame, formats, upright)
    return picture if isinstance(picture, np.ndarray) else _scaled(picture, ranges)


def of_image(image: Image.Image) -> np.ndarray:
    """Like `read`, for a picture that Pillow has opened already. A deep one is a set of its own."""
    kind = _kind(image, colours=False)
    return _composited(image) if kind is None else _scaled(_deep_grey(image, kind), None)


def read_levels(source: Source) -> np.ndarray:
    """A mask's levels as uint8 RGB, (H, W, 3): as stored, but at most 255; a float mask of 0 to 1 times 255."""
    picture = _decode(source, 0, None, False)
    if isinstance(picture, np.ndarray):
        return picture
    values = picture.values_HWC[..., :3].astype(np.float64)
    if picture.white_is_0:
        values = FULL_SCALES[-1] - values
    if picture.kind == "float" and values.max() <= 1:
        values = np.round(values * 255)
    return np.broadcast_to(values.clip(0, 255).astype(np.uint8), (*values.shape[:2], 3))


def _scaled(picture: _Deep, ranges: Ranges | None) -> np.ndarray:
    range_ = (ranges or {}).get(picture.kind)
    if range_ is None:
        alone = _Seen()
        alone.add(picture)
        range_ = alone.range(picture.kind)
    values = picture.values_HWC
    share = (values[..., :3].astype(np.float64) - range_.low) / max(range_.high - range_.low, 1e-300)
    grey = np.round(share.clip(0, 1) * 255).astype(np.uint8)
    grey = 255 - grey if picture.white_is_0 else grey
    if values.shape[2] == 4:
        return _composited(Image.fromarray(np.dstack([grey, (values[..., 3] // 257).astype(np.uint8)])))
    return np.repeat(grey, 3, axis=2) if grey.shape[2] == 1 else grey


def _composited(image: Image.Image) -> np.ndarray:
    if not image.has_transparency_data:
        return np.array(image.convert("RGB"))
    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
    return np.array(Image.alpha_composite(black, image.convert("RGBA")).convert("RGB"))  # writable: torch uses it


# --- what Pillow makes of deep pictures -------------------------------------------------------------------------


def _decode(source: Source, frame: int, formats: tuple[str, ...] | None, upright: bool) -> np.ndarray | _Deep:
    with _open(source, frame, formats) as image:
        kind = _kind(image)
        if kind is None:
            return _composited(ImageOps.exif_transpose(image) if upright else image)
        tile = t.cast(t.Any, image).tile[0]
        raw = tile.args if isinstance(tile.args, str) else tile.args[0]
        if not _sixteen_bit_colours(image):
            picture = _deep_grey(image, kind)
        elif raw.startswith("LA"):  # Pillow has no way to the low bytes of grey with opacity
            values_HWC = np.asarray(image).astype(np.uint16) * 257
            picture = _Deep(kind=kind, values_HWC=values_HWC, stated=None, white_is_0=False)
        else:
            # Pillow keeps the high byte of every colour. Read in the other byte order, the file gives the low bytes.
            little = raw.endswith("L") or (raw.endswith("N") and sys.byteorder == "little")
            other = raw[:-1] + ("B" if little else "L")
            stated = _stated(image)
            high_HWC = np.asarray(image).astype(np.uint16)
            with _open(source, frame, formats) as again:
                t.cast(t.Any, again).tile = [
                    each._replace(args=other if isinstance(each.args, str) else (other, *each.args[1:]))
                    for each in t.cast(t.Any, again).tile
                ]
                values_HWC = high_HWC << 8 | np.asarray(again)
            picture = _Deep(kind=kind, values_HWC=values_HWC, stated=_fitting(stated, values_HWC), white_is_0=False)
        turned = _turned(picture.values_HWC, image.getexif().get(0x0112, 1)) if upright else picture.values_HWC
    return _Deep(kind=kind, values_HWC=turned, stated=picture.stated, white_is_0=picture.white_is_0)


def _open(source: Source, frame: int, formats: tuple[str, ...] | None) -> Image.Image:
    if isinstance(source, io.BytesIO):
        source.seek(0)
    image = Image.open(source, formats=formats)
    if frame:
        image.seek(frame)
    return image


def _kind(image: Image.Image, colours: bool = True) -> Kind | None:
    """Whether a picture is deep, and of which kind; None for 8 bits. colours: it is not decoded yet."""
    if image.mode == "F":
        return "float"
    return "integer" if image.mode.startswith("I") or (colours and _sixteen_bit_colours(image)) else None


def _sixteen_bit_colours(image: Image.Image) -> bool:
    tiles = getattr(image, "tile", None)
    if not tiles or image.mode not in ("RGB", "RGBA"):
        return False
    args = tiles[0].args
    raw = args if isinstance(args, str) else args[0] if args else ""
    return isinstance(raw, str) and ";16" in raw


def _deep_grey(image: Image.Image, kind: Kind) -> _Deep:
    tags = getattr(image, "tag_v2", {})
    stated = _stated(image)
    values_HWC = np.asarray(image)[..., None]
    if kind == "float" and not np.isfinite(values_HWC).all():
        raise DataError("some of its pixels are not numbers (NaN or infinite)")
    white_is_0 = tags.get(_PHOTOMETRIC) == _MIN_IS_WHITE  # Pillow inverts pictures of 8 bits only
    return _Deep(kind=kind, values_HWC=values_HWC, stated=_fitting(stated, values_HWC), white_is_0=white_is_0)


def _fitting(stated: Range | int | None, values_HWC: np.ndarray) -> Range | None:
    """The stated range. A number of bits can also mean that the values were scaled up to 16 of them."""
    if not isinstance(stated, int):
        return stated
    return Range(0, 2**stated - 1 if values_HWC.max() < 2**stated else FULL_SCALES[-1])


def _stated(image: Image.Image) -> Range | int | None:
    """The range, or the number of bits, that the file's tags state."""
    if image.format == "PNG":
        return _significant_bits(image)
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return None
    text = str(tags.get(_DESCRIPTION, ""))
    shown = dict(_IMAGEJ.findall(text)) if text.startswith("ImageJ") else {}
    if {"min", "max"} <= shown.keys() and float(shown["max"]) > float(shown["min"]):
        return Range(float(shown["min"]), float(shown["max"]))
    for low, high in _STATED_TAGS:
        if high in tags:
            least, most = (min(_numbers(tags.get(low, 0))), max(_numbers(tags[high])))
            if most > least:
                return Range(least, most)
    bits = max(_numbers(tags.get(_BITS, 0)))
    return int(bits) if 8 < bits < 16 else None


def _numbers(value: t.Any) -> list[float]:
    return [float(number) for number in (value if isinstance(value, tuple) else (value,))]


def _significant_bits(image: Image.Image) -> int | None:
    """A PNG's sBIT chunk, which Pillow passes over."""
    stream = t.cast(t.Any, image).fp
    if stream is None:
        return None
    here = stream.tell()
    try:
        stream.seek(8)
        while len(head := stream.read(8)) == 8 and head[4:] != b"IDAT":
            length = int.from_bytes(head[:4], "big")
            if head[4:] == b"sBIT" and 0 < length <= 4:
                return max(stream.read(length)[: 3 if length > 2 else 1])
            stream.seek(length + 4, io.SEEK_CUR)
    finally:
        stream.seek(here)
    return None


def _turned(values_HWC: np.ndarray, orientation: int) -> np.ndarray:
    """Upright by the EXIF orientation, as `ImageOps.exif_transpose` does."""
    if orientation in (5, 6, 7, 8):
        values_HWC = values_HWC.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        values_HWC = values_HWC[::-1]
    if orientation in (2, 3, 6, 7):
        values_HWC = values_HWC[:, ::-1]
    return values_HWC
