"""Out by `bushpc shards export` and back by `bushpc shards import`: nothing is lost on the way."""

from __future__ import annotations

import numpy as np
import pytest

from bushpc.cli import main
from bushpc.shards.manifest import Manifest, read_image, read_mask
from bushpc.shards.split import read_fold_numbers

pytest.importorskip("pycocotools")


@pytest.mark.parametrize(("format", "place"), [("nnunet", "raw/Dataset001_phantom"), ("coco", ".")])
def test_what_is_exported_comes_back_equal(importing, phantom_folder, tmp_path, format, place):
    there = tmp_path / "there"
    assert main(["shards", "export", f"data={phantom_folder}", f"format={format}", f"out={there}"]) == 0
    assert main(["shards", "import", "data=mine", f"src={there / place}", f"out={importing.out}", "workers=1"]) == 0
    before, after = Manifest.load(phantom_folder), importing.manifest
    assert (after.mask_classes, after.channels) == (before.mask_classes, before.channels)
    assert [record.key for record in after.records] == [record.key for record in before.records]
    for old, new in zip(before.records, after.records, strict=True):
        assert (new.patient, new.label, new.pixel_mm) == (old.patient, old.label, old.pixel_mm)
        assert new.attributes == old.attributes
        assert np.array_equal(read_mask(importing.out, new), read_mask(phantom_folder, old))
        assert np.array_equal(read_image(importing.out, new), read_image(phantom_folder, old))
    folds = read_fold_numbers(phantom_folder / "folds.csv")
    assert read_fold_numbers(importing.out / "folds.csv") == folds
    assert read_fold_numbers(importing.out / "folds_published.csv") == folds
