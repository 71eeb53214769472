"""Promises of OASBUD: echoes become B-mode images with square pixels of a known size, checked against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.io import savemat

from bushpc.errors import ConfigError, DataError
from bushpc.shards.manifest import read_image, read_mask
from bushpc.shards.sources import oasbud

LINES, SAMPLES = 64, 1000
PIXEL_MM = 38 / LINES
HEIGHT = round(SAMPLES * 1540e3 / (2 * 40e6) / PIXEL_MM)  # 19.25 mm: 32 pixels
FIELDS = ("id", "rf1", "rf2", "roi1", "roi2", "birads", "class")


def echoes(decibels: float) -> np.ndarray:
    """5 MHz, sampled at 40 MHz: the left half at full strength, the right half weaker by `decibels`."""
    wave_Z = 8000 * np.sin(2 * np.pi * 5 / 40 * np.arange(SAMPLES))
    strength_X = np.where(np.arange(LINES) < LINES // 2, 1.0, 10 ** (-decibels / 20))
    return np.round(np.outer(wave_Z, strength_X)).astype(np.int16)


@pytest.fixture
def raw(raw_of):
    raw = raw_of("oasbud")
    roi = np.zeros((SAMPLES, LINES), np.uint8)
    roi[250:500, 16:32] = 1
    kinds = [(3, "4a", 1), (3, "3", 0), (5, "5", 1)]  # two lesions of one woman
    raw.lesions = [
        dict(zip(FIELDS, (woman, echoes(15), echoes(60), roi, roi, birads, kind), strict=True))
        for woman, birads, kind in kinds
    ]
    raw.save = lambda: savemat(raw.folder / "OASBUD.mat", {"data": struct(raw.lesions)})
    raw.save()
    return raw


def struct(lesions: list[dict]) -> np.ndarray:
    array = np.empty((1, len(lesions)), dtype=[(field, object) for field in lesions[0]])
    for index, lesion in enumerate(lesions):
        for field, value in lesion.items():
            array[0, index][field] = value
    return array


COUNTS = {"benign": 2, "malignant": 4}


def test_two_scans_of_a_lesion_share_label_and_patient(raw):
    rows = [(record.key, record.label, record.patient) for record in raw.pack(COUNTS).records]
    assert rows == [
        ("oasbud_001_1", "malignant", "oasbud_3"), ("oasbud_001_2", "malignant", "oasbud_3"),
        ("oasbud_002_1", "benign", "oasbud_3"), ("oasbud_002_2", "benign", "oasbud_3"),
        ("oasbud_003_1", "malignant", "oasbud_5"), ("oasbud_003_2", "malignant", "oasbud_5"),
    ]  # fmt: skip


def test_grey_is_decibels_below_the_strongest_echo(raw):
    manifest = raw.pack(COUNTS)
    inner = slice(3, -3)  # away from the ends of a line, where the analytic signal of a cut wave overshoots
    for scan, dark in (("1", 255 * (1 - 15 / 45)), ("2", 0)):
        image_HWC = read_image(raw.shards, manifest.record(f"oasbud_001_{scan}"))
        assert image_HWC.shape == (HEIGHT, LINES, 3)
        bright = image_HWC[inner, : LINES // 2].astype(float)
        assert bright.min() > 245
        assert image_HWC[inner, LINES // 2 :] == pytest.approx(bright.mean() - 255 + dark if dark else 0, abs=4)


def test_another_dynamic_range_shows_weaker_echoes(raw):
    manifest = raw.pack(COUNTS, parameters={"dynamic_range_db": 120})
    image_HWC = read_image(raw.shards, manifest.record("oasbud_001_2"))
    assert image_HWC[5:-5, LINES // 2 :].mean() == pytest.approx(255 * (1 - 60 / 120), abs=6)


@pytest.mark.parametrize("decibels", [0, -5, float("nan"), float("inf")])
def test_a_dynamic_range_that_shows_nothing_is_refused(raw, decibels):
    with pytest.raises(ConfigError, match=r"dynamic_range_db=.*must be > 0"):
        raw.pack(COUNTS, parameters={"dynamic_range_db": decibels})
    assert raw.packed_nothing()


def test_pixels_are_square_and_the_mask_keeps_its_area_in_millimetres(raw):
    record = raw.pack(COUNTS).record("oasbud_002_1")
    assert record.pixel_mm == pytest.approx(PIXEL_MM)
    lesion = read_mask(raw.shards, record)
    assert lesion[:, 16:32].sum() == lesion.sum()
    millimetres = 250 * 0.01925 * 16 * 38 / LINES
    assert lesion.sum() * PIXEL_MM**2 == pytest.approx(millimetres, rel=0.1)
    assert record.attributes == {"birads": "3"}


def test_the_envelope_of_a_pure_tone_is_its_strength():
    tone = 3 * np.cos(2 * np.pi * 50 * np.arange(400) / 400)[:, None]  # whole periods
    assert oasbud.envelope(tone) == pytest.approx(np.full((400, 1), 3.0))


def changed(**fields):
    def harm(raw):
        raw.lesions[1] |= fields
        raw.save()

    return harm


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (changed(roi2=np.zeros((9, LINES))), r"data\(2\): rf2 has the shape \(1000, 64\) and roi2 \(9, 64\)"),
        (changed(**{"class": 2}), r"data\(2\): class is 2; allowed: 0 \(benign\) and 1"),
        (changed(rf1=np.zeros((SAMPLES, LINES), np.int16)), r"data\(2\): rf1 holds no echoes"),
        (lambda raw: (raw.folder / "OASBUD.mat").write_bytes(b"none"), "is not a readable MATLAB file"),
        (lambda raw: savemat(raw.folder / "OASBUD.mat", {"lesions": 1}), "has no variable 'data'"),
        (lambda raw: savemat(raw.folder / "OASBUD.mat", {"data": 1}), "'data' must be a struct"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_packed(raw, harm, message):
    harm(raw)
    with pytest.raises(DataError, match=message):
        raw.pack(COUNTS)
    assert raw.packed_nothing()


def test_the_cards_counts_are_the_publications_twice(card_of):
    assert card_of("oasbud").counts == {"benign": 2 * 48, "malignant": 2 * 52}
    assert not card_of("oasbud").verified
