"""Promises of BUS-UCLM: the mask's colour is the label, the name's letters the patient, and INFO.csv must agree."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from bushpc.errors import DataError
from bushpc.shards.manifest import read_mask
from bushpc.shards.split import make_folds

GREEN, RED, BLUE = (0, 255, 0), (255, 0, 0), (0, 0, 255)
INFO = {
    "ALWI_000.png": "30x20;Benign;No;Yes;No",
    "ALWI_001.png": "30x20;Normal;No;No;No",
    "ANFO_000.png": "30x20;Malignant;Yes;No;No",
    "ANFO_001.png": "30x20;Malignant;No;No;Yes",
}
LABELS = {"benign": 1, "malignant": 2, "normal": 1}
SMALL = (slice(15, 18), slice(20, 29))


def info(raw, rows):
    lines = [
        "\ufeffImage;Resolution;Label;Doppler;Marks;Combined",
        *(f"{name};{cells}" for name, cells in rows.items()),
    ]
    (raw.folder / "INFO.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def uclm(raw_of):
    raw = raw_of("bus_uclm")
    for name in INFO:
        raw.image(f"images/{name}", mode="RGBA")
    raw.mask("masks/ALWI_000.png", "RGBA", colour=GREEN)
    raw.mask("masks/ALWI_001.png", "RGBA", box=None, size=(33, 44))  # black, and of another size
    raw.mask("masks/ANFO_000.png", "RGB", colour=RED)
    both = np.zeros((20, 30, 3), np.uint8)
    both[5:12, 8:19], both[SMALL] = RED, GREEN
    Image.fromarray(both).save(raw.folder / "masks/ANFO_001.png")
    info(raw, INFO)
    return raw


@pytest.mark.parametrize("with_table", [True, False])
def test_labels_and_masks_come_from_the_colours(uclm, labels_of, with_table):
    if not with_table:
        (uclm.folder / "INFO.csv").unlink()
    manifest = uclm.pack(LABELS)
    assert labels_of(manifest) == LABELS
    lesions = {record.key: int(read_mask(uclm.shards, record).sum()) for record in manifest.records}
    assert lesions == {"ALWI_000": 77, "ALWI_001": 0, "ANFO_000": 77, "ANFO_001": 77 + 27}
    facts = manifest.record("ANFO_000").attributes
    assert facts == ({"doppler": "yes", "marks": "no", "combined": "no"} if with_table else dict.fromkeys(facts))
    assert ("INFO.csv" in manifest.sources) == with_table


def test_frames_of_one_patient_never_straddle_a_split(uclm):
    manifest = uclm.pack(LABELS)
    assert {record.patient for record in manifest.records} == {"ALWI", "ANFO"}
    folds = make_folds(manifest.records, k=2)
    assert folds["ANFO_000"] == folds["ANFO_001"] != folds["ALWI_000"] == folds["ALWI_001"]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda raw: (raw.folder / "masks/ALWI_001.png").unlink(), r"images/ALWI_001\.png has no mask"),
        (lambda raw: (raw.folder / "images/ALWI_001.png").unlink(), r"masks/ALWI_001\.png is the mask of no image"),
        (lambda raw: (raw.folder / "masks").rename(raw.folder / "Masks"), r"the folder masks/ is missing"),
        (lambda raw: raw.mask("masks/ALWI_000.png", "RGB", colour=BLUE),
         r"masks/ALWI_000\.png: pixel x=8 y=5 is not black, green"),
        (lambda raw: raw.mask("masks/ANFO_000.png", "RGB", colour=GREEN),
         r"INFO\.csv labels ANFO_000\.png Malignant, but its mask's colour means benign"),
        (lambda raw: info(raw, {**INFO, "ZZZZ_000.png": "1x1;Normal;No;No;No"}), r"row 6: ZZZZ_000\.png is missing"),
        (lambda raw: info(raw, dict(list(INFO.items())[1:])), r"INFO\.csv has no row for ALWI_000\.png"),
        (lambda raw: raw.mask("masks/ALWI_000.png", "RGB", colour=GREEN, size=(40, 30)),
         r"images/ALWI_000\.png has 30x20 pixels, its mask .* has 40x30\. Or remove such scans from the folder"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_and_nothing_is_packed(uclm, harm, message):
    harm(uclm)
    with pytest.raises(DataError, match=message):
        uclm.pack(LABELS)
    assert uclm.packed_nothing()


def test_the_cards_counts_are_those_of_the_publication(card_of):
    assert card_of("bus_uclm").counts == {"benign": 174, "malignant": 90, "normal": 419}


def test_the_published_y_is_a_yes(uclm):
    info(uclm, {**INFO, "ANFO_000.png": "30x20;Malignant;Y;No;No"})
    assert uclm.pack(LABELS).record("ANFO_000").attributes["doppler"] == "yes"


def test_dark_colours_are_not_read_as_a_normal_scan(uclm):
    uclm.mask("masks/ANFO_000.png", "RGB", colour=(1, 0, 0))
    with pytest.raises(DataError, match=r"ANFO_000\.png: its highest level is 1, .*mask_threshold=N"):
        uclm.pack(LABELS)
