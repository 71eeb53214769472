"""Promises of reading images: the pixels that training would see, millimetres where the file knows, typed errors."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import get_decoder
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    UltrasoundImageStorage,
    generate_uid,
)

from bushpc.errors import DataError
from bushpc.sample import PixelSize, pixel_size
from bushpc.shards.card import PROJECT_SHARDS, Card
from bushpc.shards.images import as_rgb, find_images, open_picture
from bushpc.shards.sources import source

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOUR = np.random.default_rng(0).integers(0, 256, (3, 8, 9, 3), dtype=np.uint8)  # three frames


def write_dicom(path: Path, pixels: np.ndarray, photometric: str = "MONOCHROME2", bits: int = 8, **tags) -> Path:
    """An ultrasound image, or a clip if `pixels` has one dimension more."""
    grey = photometric.startswith("MONO")
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = UltrasoundImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1 if grey else 3, photometric
    size = pixels.shape if grey else pixels.shape[:-1]
    if not grey:
        dataset.PlanarConfiguration = 0
    if len(size) == 3:
        dataset.NumberOfFrames = size[0]
    dataset.Rows, dataset.Columns = size[-2:]
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = pixels.itemsize * 8, bits, bits - 1
    dataset.PixelRepresentation = 0
    dataset.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def region(x1: int, y1: int, delta_cm: tuple[float, float], units: int = 3) -> Dataset:
    found = Dataset()
    found.RegionSpatialFormat = 1
    found.RegionLocationMinX0, found.RegionLocationMinY0 = 0, 0
    found.RegionLocationMaxX1, found.RegionLocationMaxY1 = x1, y1
    found.PhysicalUnitsXDirection = found.PhysicalUnitsYDirection = units
    found.PhysicalDeltaX, found.PhysicalDeltaY = delta_cm
    return found


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.PNG"])
def test_lossless_formats_give_the_pixels_that_were_saved(tmp_path, name):
    Image.fromarray(COLOUR[0]).save(tmp_path / name)
    picture = open_picture(tmp_path / name)
    assert (picture.frames, picture.pixel_mm) == (1, None)
    assert (picture.read(0) == COLOUR[0]).all()


def test_grey_palette_and_16_bit_pictures_become_rgb(tmp_path):
    grey = Image.fromarray(RAMP)
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    for name, image in {"grey": grey, "palette": grey.convert("P"), "deep": deep}.items():
        image.save(tmp_path / f"{name}.png")
        assert (open_picture(tmp_path / f"{name}.png").read(0) == RAMP[..., None]).all(), name


def test_what_is_transparent_is_black_as_in_the_packed_data(tmp_path):
    pixels = np.full((4, 4, 4), 200, np.uint8)
    pixels[..., 3] = 255
    pixels[0, :, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    seen = open_picture(tmp_path / "a.png").read(0)
    assert (seen[0] == 0).all()
    assert (seen[1:] == 200).all()


def test_every_page_of_a_tiff_is_a_frame(tmp_path):
    pages = [Image.fromarray(frame) for frame in COLOUR]
    pages[0].save(tmp_path / "a.tiff", save_all=True, append_images=pages[1:])
    picture = open_picture(tmp_path / "a.tiff")
    assert picture.frames == 3
    assert all((picture.read(i) == COLOUR[i]).all() for i in (2, 0, 1))


def test_dicom_is_shown_as_a_viewer_shows_it(tmp_path):
    path = tmp_path / "a.dcm"

    def shown(*args, **tags) -> np.ndarray:
        pixels = open_picture(write_dicom(path, *args, **tags)).read(0)
        assert (pixels[..., 0] == pixels[..., 2]).all()
        return pixels[..., 0]

    assert (shown(RAMP) == RAMP).all()
    assert (shown(RAMP, WindowCenter=128, WindowWidth=256) == RAMP).all()
    assert (shown(RAMP, "MONOCHROME1") == 255 - RAMP).all()
    # A rescaling that changes nothing changes nothing; a window twice as wide as the values halves the contrast.
    some = RAMP // 2 + 20
    assert (shown(some, RescaleSlope=1, RescaleIntercept=0) == some).all()
    assert np.abs(shown(RAMP, WindowCenter=256, WindowWidth=512).astype(int) - RAMP / 2).max() <= 1
    # PS3.3 C.11.2.1.2: for width 101 and centre 100, black up to 49.5 and white from 149.5 on.
    assert (shown(RAMP, WindowCenter=100, WindowWidth=101) == np.round((RAMP - 49.5).clip(0, 100) * 2.55)).all()
    # The window is of rescaled values: 2 v - 10 at v = 80 is 150, white.
    scaled = shown(RAMP, WindowCenter=100, WindowWidth=101, RescaleSlope=2, RescaleIntercept=-10)
    assert (scaled == np.round((2.0 * RAMP - 10 - 49.5).clip(0, 100) * 2.55)).all()
    # 12 bits without a window: all of what is there.
    assert np.abs(shown(RAMP.astype(np.uint16) * 15 + 100, bits=12).astype(int) - RAMP).max() == 0


def test_a_colour_clip_has_its_frames_in_rgb(tmp_path):
    picture = open_picture(write_dicom(tmp_path / "clip.dcm", COLOUR, "RGB"))
    assert picture.frames == 3
    assert all((picture.read(i) == COLOUR[i]).all() for i in range(3))
    whole = Image.fromarray(COLOUR[0]).convert("YCbCr")
    ycc = open_picture(write_dicom(tmp_path / "ycc.dcm", np.asarray(whole), "YBR_FULL")).read(0)
    assert np.abs(ycc.astype(int) - COLOUR[0]).max() <= 3  # both ways round


def test_dicom_tells_the_size_of_a_pixel(tmp_path):
    path = tmp_path / "a.dcm"

    def told(**tags) -> PixelSize | None:
        return open_picture(write_dicom(path, RAMP, **tags)).pixel_mm

    assert told() is None
    assert told(PixelSpacing=[0.2, 0.1]) == (0.1, 0.2)  # row spacing, that is y, comes first
    doppler, tissue = region(15, 15, (0.5, 0.5), units=4), region(15, 15, (0.01, 0.02))
    assert told(SequenceOfUltrasoundRegions=[tissue]) == pytest.approx((0.1, 0.2))
    assert told(SequenceOfUltrasoundRegions=[tissue, region(9, 9, (0.01, 0.02))]) == pytest.approx((0.1, 0.2))
    assert told(SequenceOfUltrasoundRegions=[doppler]) is None


def test_millimetres_come_from_the_region_that_holds_the_mask(tmp_path):
    """Two views of different depth, as dual mode shows them, above a spectrum without centimetres."""
    left, right, spectrum = region(19, 19, (0.01, 0.01)), region(39, 19, (0.02, 0.02)), region(39, 29, (1, 1), units=4)
    right.RegionLocationMinX0, spectrum.RegionLocationMinY0 = 20, 20
    pixels = np.zeros((32, 40), np.uint8)
    path = write_dicom(tmp_path / "a.dcm", pixels, SequenceOfUltrasoundRegions=[right, left, spectrum])
    picture = open_picture(path)
    assert picture.pixel_mm is None

    def size(rows, columns):
        mask = np.zeros(pixels.shape, np.uint8)
        mask[rows, columns] = 1
        return picture.scale.pixel_mm(mask)

    assert size(slice(3, 9), slice(2, 20)) == pytest.approx((0.1, 0.1))
    assert size(slice(3, 9), slice(20, 30)) == pytest.approx((0.2, 0.2))
    assert size(slice(3, 9), slice(10, 30)) is None  # both
    assert size(slice(15, 25), slice(2, 9)) is None  # into the spectrum
    assert size(slice(20, 25), slice(2, 9)) is None
    assert size(slice(30, 32), slice(2, 9)) is None  # outside
    assert "shows 2 views side by side" in "; ".join(picture.notes)


def test_a_picture_that_was_shrunk_after_calibration_has_no_millimetres_and_says_so(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", RAMP, SequenceOfUltrasoundRegions=[region(31, 31, (0.01, 0.01))])
    picture = open_picture(path)
    assert (picture.pixel_mm, picture.scale) == (None, None)
    [note] = picture.notes
    assert "no millimetres: a calibrated region ends at column 31, row 31, but the picture has 16 columns" in note
    example = open_picture(Path(get_testdata_file("examples_palette.dcm")))  # to row 518 of 350
    assert example.scale is None
    assert "row 518" in example.notes[0]


def test_burned_in_text_is_named(tmp_path):
    [note] = open_picture(write_dicom(tmp_path / "a.dcm", RAMP, BurnedInAnnotation="YES")).notes
    assert "burned-in text" in note


def test_segmentations_and_reports_in_a_folder_are_no_pictures(tmp_path):
    write_dicom(tmp_path / "a.dcm", RAMP)
    for name in ("liver_1frame.dcm", "test-SR.dcm", "rtdose_1frame.dcm"):
        shutil.copy(get_testdata_file(name), tmp_path)
    assert find_images(tmp_path) == [tmp_path / "a.dcm"]
    with pytest.raises(DataError, match="holds no picture, but Segmentation Storage"):
        open_picture(tmp_path / "liver_1frame.dcm")


DEEP = (np.arange(64 * 64) % 4096).reshape(64, 64).astype(np.uint16)
COMPRESSED = {
    JPEGLosslessSV1: lambda: imagecodecs.ljpeg_encode(DEEP, bitspersample=12),
    JPEGLSLossless: lambda: imagecodecs.jpegls_encode(DEEP),
    JPEG2000Lossless: lambda: imagecodecs.jpeg2k_encode(DEEP, level=0, codecformat="j2k", bitspersample=12),
    JPEGExtended12Bit: lambda: imagecodecs.jpeg8_encode(DEEP, level=100, bitspersample=12),
}


def compressed(path: Path, syntax) -> Path:
    write_dicom(path, DEEP, bits=12)
    dataset = pydicom.dcmread(path)
    dataset.PixelData = pydicom.encaps.encapsulate([COMPRESSED[syntax]()])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(path)
    return path


@pytest.mark.parametrize("syntax", COMPRESSED, ids=lambda syntax: syntax.name)
def test_compressed_dicom_has_the_pixels_that_went_in(tmp_path, syntax):
    seen = open_picture(compressed(tmp_path / "a.dcm", syntax)).read(0)[..., 0]
    expected = np.round(DEEP / 4095 * 255)
    assert np.abs(seen - expected).max() <= (2 if syntax == JPEGExtended12Bit else 0)


def test_what_cannot_be_decoded_says_what_to_install(tmp_path, monkeypatch):
    path = compressed(tmp_path / "a.dcm", JPEGLosslessSV1)
    monkeypatch.setattr(get_decoder(JPEGLosslessSV1), "_available", {})
    with pytest.raises(DataError, match=r"compression, JPEG Lossless.*pip install 'bushpc\[dicom\]'"):
        open_picture(path).read(0)


def test_a_size_that_no_pixel_has_is_no_size(tmp_path):
    path = tmp_path / "a.dcm"
    for delta in ((0.01, float("nan")), (0.01, float("inf")), (0.01, 1e-30)):
        regions = [region(15, 15, delta)]
        assert open_picture(write_dicom(path, RAMP, SequenceOfUltrasoundRegions=regions)).pixel_mm is None
    assert pixel_size(np.float32(0.5)) == (0.5, 0.5)
    for given in (float("nan"), 0, 1e-200, (0.1, float("inf")), (0.1, 0.1, 0.1)):
        with pytest.raises(DataError, match=r"pixel size .*must be one number"):
            pixel_size(given)


def test_pipes_are_passed_over(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.png")
    assert find_images(tmp_path) == []


def test_dicom_is_known_without_its_suffix_and_what_is_no_image_left_out(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write_dicom(tmp_path / "deep" / "IM000001", RAMP)
    Image.fromarray(RAMP).save(tmp_path / "deep" / "er" / "a.jpg")
    Image.fromarray(RAMP).save(tmp_path / "._a.png", format="PNG")
    (tmp_path / "notes.txt").write_text("x" * 200)
    (tmp_path / "deep" / "round").symlink_to(tmp_path)
    assert find_images(tmp_path) == [tmp_path / "deep" / "IM000001", tmp_path / "deep" / "er" / "a.jpg"]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.bmp", "a.dcm"])
@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
def test_a_damaged_file_is_a_typed_error(tmp_path, name, damage):
    path = tmp_path / name
    if name.endswith("dcm"):
        write_dicom(path, RAMP)
    else:
        Image.fromarray(COLOUR[0]).resize((90, 80)).save(path)
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"no picture at all, whatever it is called", "cut": content[:-100]}[damage])
    with pytest.raises(DataError):
        open_picture(path).read(0)


def test_an_array_that_is_no_picture_is_refused():
    for wrong in (np.zeros((4, 4)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4), np.uint8), np.zeros(4, np.uint8)):
        with pytest.raises(DataError, match="it must be uint8"):
            as_rgb(wrong)


def test_a_raw_image_of_breast_has_the_pixels_that_its_packed_sample_has(real_data):
    breast, card = source("breast"), Card.load(PROJECT_SHARDS / "breast")
    items = breast.plan(real_data / "breast", card).items[:40]
    raw = [real_data / "breast" / card.layout["images"] / f"{item.key}.png" for item in items]
    assert any(Image.open(path).getchannel("A").getextrema()[0] < 255 for path in raw), "none is transparent"
    for path, item in zip(raw, items, strict=True):
        assert (open_picture(path).read(0) == breast.load(item).image_HWC).all(), path.name
