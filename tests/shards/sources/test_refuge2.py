"""Promises of REFUGE2: disc and cup overlap as they do in the eye, and the publisher's splits can be used."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from bushpc.errors import DataError
from bushpc.shards.manifest import read_image, read_mask
from bushpc.shards.split import find_folds, load_folds

FILES = {
    "train": ("g0001.bmp", "g0002.bmp", "n0001.bmp"),
    "val": ("V0001.png", "V0002.png"),
    "test": ("T0001.bmp", "T0002.bmp", "T0003.bmp"),
}
SIZES = {"train": (40, 30), "val": (24, 24), "test": (24, 24)}


def eye(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Disc and cup: two circles, the cup inside of the disc."""
    y, x = np.mgrid[: size[1], : size[0]]
    squared = (y - 12) ** 2 + (x - 11) ** 2
    return squared < 64, squared < 16


@pytest.fixture
def refuge(raw_of):
    raw = raw_of("refuge2")
    for split, names in FILES.items():
        for name in names:
            raw.image(f"{split}/images/{name[:-4]}.jpg", "RGB", SIZES[split])
            disc, cup = eye(SIZES[split])
            levels = Image.fromarray(np.where(cup, 0, np.where(disc, 128, 255)).astype(np.uint8))
            path = raw.folder / split / "mask" / name
            path.parent.mkdir(exist_ok=True)
            # Grey, with a palette and in colour: all are met.
            levels.convert({"train": "L", "val": "P", "test": "RGB"}[split]).save(path)
        (raw.folder / split / "images" / "Thumbs.db").write_bytes(b"a viewer's")
    return raw


COUNTS = {"unlabelled": 8}


def test_disc_and_cup_are_two_classes_and_the_disc_includes_the_cup(refuge):
    manifest = refuge.pack(COUNTS)
    assert manifest.mask_classes == ["disc", "cup"]
    assert {record.key for record in manifest.records} == {name[:-4] for names in FILES.values() for name in names}
    for record in manifest.records:
        disc, cup = eye((record.width, record.height))
        mask_HW = read_mask(refuge.shards, record)
        assert np.array_equal(mask_HW & 1 > 0, disc)
        assert np.array_equal(mask_HW & 2 > 0, cup)
        assert record.lesion_pixels == disc.sum()
        assert record.label == "unlabelled"


def test_an_image_is_kept_at_its_size_with_its_split_and_what_its_name_says(refuge):
    manifest = refuge.pack(COUNTS)
    record = manifest.record("g0001")
    with Image.open(refuge.folder / "train/images/g0001.jpg") as file:
        assert np.array_equal(read_image(refuge.shards, record), np.asarray(file))
    facts = {record.key: record.attributes for record in manifest.records}
    assert facts["g0002"] == {"split": "train", "glaucoma": "yes"}
    assert facts["n0001"] == {"split": "train", "glaucoma": "no"}
    assert facts["V0001"] == {"split": "val", "glaucoma": None}


def test_published_fold_0_trains_on_train_and_val_and_evaluates_on_test(refuge):
    manifest = refuge.pack(COUNTS)
    folds = load_folds(find_folds(manifest, refuge.shards, "published"), manifest.records)
    assert folds.validation(0) == ["T0001", "T0002", "T0003"]
    assert folds.train(0) == ["V0001", "V0002", "g0001", "g0002", "n0001"]
    assert folds.validation(1) == ["V0001", "V0002"]


def without_a_mask(folder):
    (folder / "val/mask/V0002.png").unlink()


def without_an_image(folder):
    (folder / "test/images/T0003.jpg").unlink()


def of_another_size(folder):
    Image.fromarray(np.full((24, 25), 255, np.uint8)).save(folder / "val/mask/V0001.png")


def smoothed(folder):
    path = folder / "train/mask/n0001.bmp"
    Image.open(path).resize((20, 15), Image.Resampling.BILINEAR).resize((40, 30), Image.Resampling.BILINEAR).save(path)


def inverted(folder):
    path = folder / "train/mask/n0001.bmp"
    Image.fromarray(255 - np.asarray(Image.open(path))).point(lambda level: 128 if level == 127 else level).save(path)


def damaged(folder):
    (folder / "test/images/T0001.jpg").write_bytes(b"no picture")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_a_mask, "val/images/V0002.jpg has no mask"),
        (without_an_image, "test/mask/T0003.bmp is the mask of no image"),
        (of_another_size, r"val/images/V0001.jpg has 24x24 pixels, its mask val/mask/V0001.png has 25x24"),
        (smoothed, r"train/mask/n0001.bmp has pixels of value .*masks of this dataset use only 0, 128, 255"),
        (inverted, r"train/mask/n0001.bmp: its corner has value 0; it must be background .255."),
        (damaged, r"test/images/T0001.jpg is not a readable JPG"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_packed(refuge, damage, message):
    damage(refuge.folder)
    with pytest.raises(DataError, match=message):
        refuge.pack(COUNTS, excerpt=True)
    assert refuge.packed_nothing()


@pytest.fixture
def published(raw_of):
    """The tree of the publisher's page: REFUGE1's three splits, REFUGE2's own two, names from 1 in each."""
    raw = raw_of("refuge2")
    splits = {
        ("Train/REFUGE1-train/Training400/Glaucoma", "g0001"): "Train/REFUGE1-train/Training400-GT/Disc_Cup_Masks",
        ("Train/REFUGE1-val/REFUGE-Validation400", "V0001"): "Train/REFUGE1-val/REFUGE-Validation400-GT/Disc_Cup_Masks",
        ("Train/REFUGE1-test/Test400", "T0001"): "Train/REFUGE1-test/REFUGE-Test-GT/Disc_Cup_Masks/G",
        ("Validation/Images", "V0001"): "Validation/Disc_Masks",
        ("Test/refuge2-test", "T0001"): "Test/Disc_Mask",
    }  # fmt: skip
    for (images, name), masks in splits.items():
        raw.image(f"{images}/{name}.jpg", "RGB", (24, 24))
        disc, cup = eye((24, 24))
        path = raw.folder / masks / f"{name}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.where(cup, 0, np.where(disc, 128, 255)).astype(np.uint8)).save(path)
    return raw


def test_the_publishers_own_tree_is_read_with_refuge2s_own_images(published):
    manifest = published.pack({}, excerpt=True)
    splits = {record.key: record.attributes["split"] for record in manifest.records}
    assert splits == {
        "g0001": "train", "V0001": "val", "T0001": "test",
        "refuge2-val-V0001": "refuge2-val", "refuge2-test-T0001": "refuge2-test",
    }  # fmt: skip
    assert manifest.record("g0001").attributes["glaucoma"] == "yes"
    disc, cup = eye((24, 24))
    for record in manifest.records:
        assert np.array_equal(read_mask(published.shards, record), disc + 2 * (disc & cup))
    folds = load_folds(find_folds(manifest, published.shards, "published"), manifest.records, excerpt=True)
    assert folds.validation(0) == ["refuge2-test-T0001"]
    assert folds.train(0) == ["T0001", "V0001", "g0001", "refuge2-val-V0001"]


def test_the_publishers_tree_is_counted_as_the_publication_counts(published):
    with pytest.raises(DataError, match=r"1 files match Validation/Disc_Masks.*400 expected(?s:.*)2000 expected"):
        published.pack({})


def test_a_mask_of_the_disc_alone_is_not_read_as_a_cup(published):
    path = published.folder / "Test/Disc_Mask/T0001.bmp"
    Image.fromarray(np.where(eye((24, 24))[0], 0, 255).astype(np.uint8)).save(path)
    with pytest.raises(DataError, match="without the rest of the disc"):
        published.pack({}, excerpt=True)
