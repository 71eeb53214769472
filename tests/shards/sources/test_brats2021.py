"""Promises of BraTS 2021: slices by a stated rule, four channels, three classes in each other, upright, by patient."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest

from bushpc.errors import ConfigError, DataError
from bushpc.shards.manifest import Manifest, read_image, read_mask
from bushpc.shards.split import ensure_folds, load_folds

CASES = [f"BraTS2021_{number:05d}" for number in (0, 2, 3, 5, 6)]
X, Y, Z = 20, 24, 12
SEQUENCES = ["flair", "t1", "t1ce", "t2"]
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # as the publisher stores them: x to the left, y to the back


def sequence(case: str, what: str) -> np.ndarray:
    """(X, Y, Z): 0 outside of a box, in it values between 100 and 900 with a bright vessel."""
    rng = np.random.default_rng(list(f"{case}{what}".encode()))
    volume = np.zeros((X, Y, Z), np.int16)
    volume[2:18, 2:22] = rng.integers(100, 900, (16, 20, Z))
    volume[3, 3, 5] = 30000
    return volume


def segmentation() -> np.ndarray:
    """(X, Y, Z): edema in slices 3 to 9, core in 4 to 8, enhancing tumour in 5 and 6; 60, 12 and 4 pixels a slice."""
    volume = np.zeros((X, Y, Z), np.uint8)
    volume[4:10, 5:15, 3:10] = 2
    volume[5:8, 6:10, 4:9] = 1
    volume[5:7, 7:9, 5:7] = 4
    volume[8, 12, 2] = 2  # a single pixel below
    return volume


def save(path, volume, affine=LPS) -> None:
    path.parent.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(volume, affine), path)


@pytest.fixture
def brats(raw_of):
    raw = raw_of("brats2021")
    for case in CASES:
        for what in SEQUENCES:
            save(raw.folder / case / f"{case}_{what}.nii.gz", sequence(case, what))
        save(raw.folder / case / f"{case}_seg.nii.gz", segmentation())
    (raw.folder / "BraTS2021_00495.tar").write_bytes(b"cases that came by themselves lie beside the folders")
    return raw


CHOICE = {"every": 2, "least_pixels": 50}


def upright(volume_XYZ: np.ndarray, z: int) -> np.ndarray:
    """A slice of a volume that is stored as the publisher does: rows to the back, columns to the patient's left."""
    return volume_XYZ[:, :, z].T


def test_slices_are_every_nth_with_enough_tumour_and_a_patients_stay_together(brats):
    manifest = brats.pack({}, parameters=CHOICE)
    assert [record.key for record in manifest.records] == [f"{case}_z{z:03d}" for case in CASES for z in (4, 6, 8)]
    assert {record.patient for record in manifest.records} == set(CASES)
    assert {record.label for record in manifest.records} == {"unlabelled"}
    folds = load_folds(ensure_folds(brats.shards, manifest), manifest.records)
    assert sorted(len(folds.validation(fold)) for fold in range(5)) == [3] * 5
    more = brats.pack({}, parameters={"every": 1, "least_pixels": 1})
    assert [record.attributes["slice"] for record in more.records if record.patient == CASES[0]] == [*range(2, 10)]


def test_enhancing_tumour_lies_in_the_core_and_the_core_in_the_whole_tumour(brats):
    manifest = brats.pack({}, parameters=CHOICE)
    assert manifest.mask_classes == ["enhancing_tumor", "tumor_core", "whole_tumor"]
    for record in manifest.records:
        mask_HW = read_mask(brats.shards, record)
        stored = upright(segmentation(), int(record.attributes["slice"]))
        for bit, values in enumerate(([4], [1, 4], [1, 2, 4])):
            assert np.array_equal(mask_HW & 1 << bit > 0, np.isin(stored, values))
        assert record.lesion_pixels == 60
    assert not read_mask(brats.shards, manifest.record(f"{CASES[0]}_z008")).max() & 1  # no enhancing tumour there


def test_each_sequence_is_a_channel_scaled_by_its_own_brains_percentiles(brats):
    manifest = brats.pack({}, parameters=CHOICE)
    assert manifest.channels == SEQUENCES
    for record in manifest.records[:3]:
        image_HWC = read_image(brats.shards, record)
        assert image_HWC.shape == (Y, X, 4)
        assert record.pixel_mm == 1.0
        for channel, what in enumerate(SEQUENCES):
            stored = sequence(record.patient, what).astype(float)
            low, high = np.percentile(stored[stored > 0], [0.5, 99.5])
            slice_HW = upright(stored, int(record.attributes["slice"]))
            grey = np.where(slice_HW > 0, 1 + 254 * np.clip((slice_HW - low) / (high - low), 0, 1), 0)
            assert np.abs(image_HWC[..., channel] - grey).max() <= 0.51
            assert np.array_equal(image_HWC[..., channel] > 0, slice_HW > 0)


def test_a_volume_stored_in_another_orientation_gives_the_same_slices(brats):
    before = brats.pack({}, parameters=CHOICE)
    images = [read_image(brats.shards, record) for record in before.records]
    masks = [read_mask(brats.shards, record) for record in before.records]
    for path in brats.folder.glob("*/*.nii.gz"):
        image = nibabel.load(path)
        save(path, np.asarray(image.dataobj)[::-1, ::-1], np.diag([1.0, 1.0, 1.0, 1.0]))
    after = brats.pack({}, parameters=CHOICE)
    assert before.sources != after.sources
    for record, image_HWC, mask_HW in zip(after.records, images, masks, strict=True):
        assert np.array_equal(read_image(brats.shards, record), image_HWC)
        assert np.array_equal(read_mask(brats.shards, record), mask_HW)


def of(folder, what):
    return folder / CASES[1] / f"{CASES[1]}_{what}.nii.gz"


def without_a_sequence(folder):
    of(folder, "t1ce").unlink()


def without_a_segmentation(folder):
    of(folder, "seg").unlink()


def truncated(folder):
    of(folder, "t2").write_bytes(of(folder, "t2").read_bytes()[:-400])


def no_nifti(folder):
    of(folder, "seg").write_bytes(b"an error page of a proxy")


def of_another_size(folder):
    save(of(folder, "flair"), np.ones((X, Y, Z - 1), np.int16))


def with_label_3(folder):
    save(of(folder, "seg"), np.where(segmentation() == 4, 3, segmentation()).astype(np.uint8))


def blank(folder):
    save(of(folder, "t1"), np.zeros((X, Y, Z), np.int16))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_a_sequence, f"{CASES[1]}_t1ce.nii.gz is missing"),
        (without_a_segmentation, rf"{CASES[1]}_seg.nii.gz is missing\n.*validation cases have no segmentation"),
        (truncated, rf"{CASES[1]}_t2.nii.gz is not a readable NIfTI volume"),
        (no_nifti, rf"{CASES[1]}_seg.nii.gz is not a readable NIfTI volume"),
        (of_another_size, rf"{CASES[1]}_flair.nii.gz has \(24, 20, 11\) voxels, its segmentation"),
        (with_label_3, rf"{CASES[1]}_seg.nii.gz has voxels of value 3; BraTS 2021 uses only 0, 1, 2 and 4"),
        (blank, rf"{CASES[1]}_t1.nii.gz contains no brain"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_packed(brats, damage, message):
    damage(brats.folder)
    with pytest.raises(DataError, match=message):
        brats.pack({}, parameters=CHOICE, excerpt=True)
    assert brats.packed_nothing()


@pytest.mark.parametrize("parameters", [{"every": 0}, {"least_pixels": 0}, {"every": 1.5}])
def test_a_rule_that_chooses_nothing_is_refused(brats, parameters):
    with pytest.raises(ConfigError, match=r"brats2021 every=.* least_pixels=.*: both must be whole numbers ≥ 1"):
        brats.pack({}, parameters=parameters)


def packed_pixels(raw):
    records = Manifest.load(raw.shards).records
    return {record.key: (read_image(raw.shards, record), read_mask(raw.shards, record)) for record in records}


def test_the_archives_collections_give_the_same_samples(brats):
    brats.pack({}, parameters=CHOICE, excerpt=True)
    flat = packed_pixels(brats)
    for number, case in enumerate(CASES):
        place = brats.folder / "BraTS2021_TrainingSet" / f"collection{number % 2}" / case
        place.parent.mkdir(parents=True, exist_ok=True)
        (brats.folder / case).rename(place)
    brats.pack({}, parameters=CHOICE, excerpt=True)
    nested = packed_pixels(brats)
    assert flat.keys() == nested.keys()
    assert all(np.array_equal(*both) for key in flat for both in zip(flat[key], nested[key], strict=True))


def as_2023(folder):
    """The folder's cases under the names and with the label of 2023, the first patient with a second visit."""
    names = {"flair": "t2f", "t1": "t1n", "t1ce": "t1c", "t2": "t2w", "seg": "seg"}
    for case in CASES:
        new = case.replace("BraTS2021_", "BraTS-GLI-") + "-000"
        (folder / new).mkdir()
        for what, name in names.items():
            volume = np.asarray(nibabel.load(folder / case / f"{case}_{what}.nii.gz").dataobj)
            if what == "seg":
                volume = np.where(volume == 4, 3, volume).astype(np.uint8)
            save(folder / new / f"{new}-{name}.nii.gz", volume)
            (folder / case / f"{case}_{what}.nii.gz").unlink()
        (folder / case).rmdir()
    visit = folder / "BraTS-GLI-00000-001"
    visit.mkdir()
    for path in (folder / "BraTS-GLI-00000-000").iterdir():
        (visit / path.name.replace("-000-", "-001-")).write_bytes(path.read_bytes())


def test_the_names_and_the_label_of_2023_give_the_same_slices(brats):
    brats.pack({}, parameters=CHOICE, excerpt=True)
    old = packed_pixels(brats)
    as_2023(brats.folder)
    manifest = brats.pack({}, parameters=CHOICE, excerpt=True)
    new = packed_pixels(brats)
    for key, (image_HWC, mask_HW) in old.items():
        renamed = key.replace("BraTS2021_", "BraTS-GLI-").replace("_z", "-000_z")
        assert np.array_equal(new[renamed][0], image_HWC)
        assert np.array_equal(new[renamed][1], mask_HW)
    visits = {record.key for record in manifest.records if record.patient == "BraTS-GLI-00000"}
    assert {key.split("_")[0] for key in visits} == {"BraTS-GLI-00000-000", "BraTS-GLI-00000-001"}


def test_two_editions_in_one_folder_and_other_labels_are_refused(brats):
    as_2023(brats.folder)
    path = brats.folder / "BraTS-GLI-00002-000" / "BraTS-GLI-00002-000-seg.nii.gz"
    volume = segmentation()  # with its 4
    save(path, volume)
    with pytest.raises(DataError, match="has voxels of value 4; BraTS 2023 uses only 0, 1, 2 and 3"):
        brats.pack({}, parameters=CHOICE, excerpt=True)
    save(brats.folder / "BraTS2021_00099" / "BraTS2021_00099_seg.nii.gz", volume)
    with pytest.raises(DataError, match="BraTS 2021 and BraTS 2023, which are the same patients"):
        brats.pack({}, parameters=CHOICE, excerpt=True)
