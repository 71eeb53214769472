"""Promises of reading pictures: pack and predict see the same grey values, whatever their depth."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from PIL import Image

from bushpc.cli import main
from bushpc.errors import DataError
from bushpc.shards.images import open_picture
from bushpc.shards.manifest import Manifest, read_image, read_mask
from bushpc.shards.pictures import survey

HEIGHT, WIDTH = 40, 60
RAMP = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) / (HEIGHT * WIDTH - 1)  # 0 to 1


def grey(values, low, high):
    """What a viewer shows, worked out here."""
    return np.round(np.clip((values.astype(float) - low) / (high - low), 0, 1) * 255).astype(np.uint8)


@pytest.fixture
def deep_busi(tmp_path):
    """deep_busi(pictures, mask level, mask type) → a folder in BUSI's layout, with images of any depth."""

    def make(images, level=255, dtype=np.uint8):
        folder = tmp_path / "raw" / "benign"
        folder.mkdir(parents=True)
        mask = np.zeros((HEIGHT, WIDTH), dtype)
        mask[5:20, 10:30] = level
        for number, image in enumerate(images, 1):
            Image.fromarray(image).save(folder / f"benign ({number}).png")
            Image.fromarray(mask).save(folder / f"benign ({number})_mask.png")
        return folder.parent

    return make


def pack(raw, out, *words):
    return main(["pack", "data=busi", f"src={raw}", f"out={out}", "excerpt=true", "workers=1", *words])


def packed(out):
    return [read_image(out, record) for record in Manifest.load(out).records]


def test_12_bit_pictures_are_packed_and_predicted_by_the_range_of_their_set(deep_busi, tmp_path, capsys):
    images = [(RAMP * most).astype(np.uint16) for most in (4000, 900, 4095, 2500, 3000, 1500)]
    raw = deep_busi(images)
    assert pack(raw, tmp_path / "out") == 0
    assert "0 to 4095 become black to white" in capsys.readouterr().err
    paths = [raw / "benign" / f"benign ({number}).png" for number in range(1, 7)]
    ranges, warnings = survey(paths)
    assert not warnings
    for image, seen, path in zip(images, packed(tmp_path / "out"), paths, strict=True):
        assert (seen == grey(image, 0, 4095)[..., None]).all()
        assert (open_picture(path, ranges).read(0) == seen).all()


def test_8_bit_values_in_16_bits_are_8_bit_values(deep_busi, tmp_path):
    eight = (RAMP * 250).astype(np.uint8)
    raw = deep_busi([eight.astype(np.uint16)] * 6)
    assert pack(raw, tmp_path / "out") == 0
    assert all((seen == eight[..., None]).all() for seen in packed(tmp_path / "out"))
    assert (open_picture(raw / "benign" / "benign (1).png").read(0) == eight[..., None]).all()


def test_a_range_that_is_hardly_used_is_told_and_can_be_given(deep_busi, tmp_path, capsys):
    image = (RAMP * 4000).astype(np.uint16)
    image[0, 0] = 65535  # a hot pixel
    raw = deep_busi([image] * 6)
    assert pack(raw, tmp_path / "out") == 0
    assert "hardly any is used: 99.9 % of each one's pixels are at or below" in capsys.readouterr().err
    assert pack(raw, tmp_path / "out", "grey_max=4095") == 0  # packed again: the values differ
    assert "hardly any" not in capsys.readouterr().err
    assert (packed(tmp_path / "out")[0] == grey(image, 0, 4095)[..., None]).all()
    assert pack(raw, tmp_path / "out", "grey_max=0") == 2
    assert "it must be a number above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "options", "low", "high", "inverted"),
    [
        (RAMP * 4000, {"photometric": "miniswhite"}, 0, 4095, True),
        (RAMP * 65000, {"photometric": "miniswhite", "compression": "zlib"}, 0, 65535, True),
        (RAMP * 900, {"extratags": [(281, "H", 1, 4095, True)]}, 0, 4095, False),
        (RAMP * 4000, {"extratags": [(280, "H", 1, 100, True), (281, "H", 1, 3000, True)]}, 100, 3000, False),
        (RAMP * 4000, {"byteorder": ">"}, 0, 4095, False),
        (RAMP * 9000, {"imagej": True, "metadata": {"min": 100.0, "max": 5000.0}}, 100, 5000, False),
    ],
)
def test_a_tiffs_own_tags_count(tmp_path, values, options, low, high, inverted):
    values = values.astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values, **options)
    expected = grey(values, low, high)
    assert (open_picture(tmp_path / "a.tif").read(0) == (255 - expected if inverted else expected)[..., None]).all()


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        (RAMP.astype(np.float32), 0, 1),
        ((RAMP * 0.9).astype(np.float32), 0, 1),
        ((RAMP * 255).astype(np.float32), 0, 255),
        ((RAMP * 80 - 80).astype(np.float32), -80, 0),  # decibels
        ((RAMP * 4000 - 2000).astype(np.int16), -2000, 2000),
        ((RAMP * 1e6).astype(np.int32), 0, 1e6),
    ],
)
def test_floats_and_signed_numbers_are_scaled_not_cut(tmp_path, values, low, high):
    tifffile.imwrite(tmp_path / "a.tif", values)
    assert (open_picture(tmp_path / "a.tif").read(0) == grey(values, low, high)[..., None]).all()


@pytest.mark.parametrize("options", [{}, {"compression": "lzw"}, {"byteorder": ">"}])
def test_16_bit_colours_keep_their_low_byte(tmp_path, options):
    values = np.stack([RAMP * 4000, RAMP * 300, RAMP[::-1] * 4095], axis=-1).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", **options)
    assert (open_picture(tmp_path / "a.tif").read(0) == grey(values, 0, 4095)).all()


def test_not_a_number_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.full((4, 4), np.nan, np.float32))
    with pytest.raises(DataError, match="not numbers"):
        open_picture(tmp_path / "a.tif").read(0)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_masks_of_0_and_1_are_read_where_no_mask_has_a_higher_level(deep_busi, tmp_path, capsys, dtype):
    image = (RAMP * 250).astype(np.uint8)
    raw = deep_busi([image] * 6, level=1, dtype=dtype)
    assert pack(raw, tmp_path / "out") == 0
    assert "no mask has a level above 1" in capsys.readouterr().err
    [mask, *_] = [read_mask(tmp_path / "out", record) for record in Manifest.load(tmp_path / "out").records]
    assert mask.sum() == 15 * 20
    assert mask[5:20, 10:30].all()
    assert pack(raw, tmp_path / "out") == 0
    assert "already packed" in capsys.readouterr().err


def test_a_dark_mask_among_bright_ones_is_named_with_its_level_and_how_to_read_it(deep_busi, tmp_path, capsys):
    raw = deep_busi([(RAMP * 250).astype(np.uint8)] * 6)
    dark = np.zeros((HEIGHT, WIDTH), np.uint8)
    dark[1:3, 1:3] = 100
    Image.fromarray(dark).save(raw / "benign" / "benign (2)_mask_1.png")  # a second lesion, lost until now
    assert pack(raw, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "benign (2)_mask_1.png: its highest level is 100, and lesion is 128 and above" in said
    assert pack(raw, tmp_path / "out", "mask_threshold=100") == 0
    areas = [record.lesion_pixels for record in Manifest.load(tmp_path / "out").records]
    assert areas == [300, 304, 300, 300, 300, 300]
