"""Recall of the audit on planted copies of real scans, and everything that it takes for a pair among the real ones.

python recall.py SHARDS [COUNT]      COUNT copies of each kind, 200 by default; from randomly drawn scans, seed 1
"""

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from bushpc.shards.duplicates import LEAST_CORRELATION, find_pairs, fingerprint_of
from bushpc.shards.manifest import Manifest, read_image

rng = np.random.default_rng(1)


def crop(image, share, sides=1):
    height, width = image.shape[:2]
    for axis in rng.permutation(2)[:sides]:
        cut = round(share() * (height, width)[axis])
        keep = slice(cut, None) if rng.integers(2) else slice(None, (height, width)[axis] - cut)
        image = image[keep] if axis == 0 else image[:, keep]
    return image


def calipers(image, count=4):
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    for _ in range(count):
        x, y = rng.integers(10, image.shape[1] - 10), rng.integers(10, image.shape[0] - 10)
        draw.line((x - 6, y, x + 6, y), fill=(255,) * 3, width=2)
        draw.line((x, y - 6, x, y + 6), fill=(255,) * 3, width=2)
    return np.asarray(picture)


def text(image):
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    for _ in range(3):
        place = rng.integers(2, image.shape[1] // 2), rng.integers(2, image.shape[0] - 14)
        draw.text((int(place[0]), int(place[1])), "LT BREAST 3H RAD", fill=(255,) * 3)
    return np.asarray(picture)


def gain(image):
    return (image * rng.uniform(0.6, 1.5) + rng.integers(-20, 20)).clip(0, 255).astype(np.uint8)


def gamma(image):
    return (255 * (image / 255) ** rng.uniform(0.5, 1.8)).round().astype(np.uint8)


def rescale(image):
    factor = rng.uniform(0.4, 1.6)
    size = int(image.shape[1] * factor), int(image.shape[0] * factor)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def jpeg(image):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=60)
    return np.asarray(Image.open(stream))


def exactly(share):
    return lambda: share


def to_35():
    return rng.uniform(0.05, 0.35)


def to_20():
    return rng.uniform(0.05, 0.2)


KINDS = {
    "cropped by 10 %": lambda image: crop(image, exactly(0.10)),
    "cropped by 20 %": lambda image: crop(image, exactly(0.20)),
    "cropped by 29 %": lambda image: crop(image, exactly(0.29)),
    "cropped by 35 %": lambda image: crop(image, exactly(0.35)),
    "cropped by 5 to 35 %": lambda image: crop(image, to_35),
    "cropped on two sides by 5 to 20 % each": lambda image: crop(image, to_20, sides=2),
    "calipers": calipers,
    "text": text,
    "gain": gain,
    "gamma": gamma,
    "mirrored": lambda image: image[:, ::-1],
    "rescaled": rescale,
    "JPEG": jpeg,
    "mirrored, cropped by 5 to 35 %": lambda image: crop(image[:, ::-1], to_35),
    "cropped by 5 to 35 %, calipers, gain, rescaled": lambda image: rescale(gain(calipers(crop(image, to_35)))),
    "mirrored, cropped, calipers, text, gamma, rescaled, JPEG": lambda image: jpeg(
        rescale(gamma(text(calipers(crop(image[:, ::-1], to_35), 2))))
    ),
}


def main(folder: Path, count: int) -> None:
    manifest = Manifest.load(folder)
    records = manifest.records
    real = [fingerprint_of(read_image(folder, record)) for record in records]
    print(
        f"{manifest.dataset}: {len(real)} scans, {len(real) * (len(real) - 1) // 2:,} pairs, least {LEAST_CORRELATION}"
    )
    for pair in find_pairs(real):
        one, other = records[pair.first], records[pair.second]
        whose = "one patient" if one.patient == other.patient else "two patients"
        print(f"  pair {one.key} {other.key} ({whose}) {pair.correlation}{' identical' * pair.identical}")
    for kind, change in KINDS.items():
        chosen = rng.choice(len(real), min(count, len(real)), replace=False)
        copies = [
            fingerprint_of(np.ascontiguousarray(change(read_image(folder, records[number])))) for number in chosen
        ]
        # The copies lie among the scans that they were not made of, too, so false pairs would show.
        found = {(pair.first, pair.second) for pair in find_pairs([*real, *copies])}
        hits = sum((int(number), len(real) + place) in found for place, number in enumerate(chosen))
        known = {(int(number), len(real) + place) for place, number in enumerate(chosen)}
        more = [pair for pair in found - known if pair[1] >= len(real)]
        print(f"  {kind}: {hits} of {len(copies)}; other pairs with a copy: {len(more)}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 200)
