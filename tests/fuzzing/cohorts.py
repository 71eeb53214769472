"""Pictures, volumes, and cohorts that `bushpc shards import` reads."""

from __future__ import annotations

import typing as t
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from .reader import Reader, without

READERS: dict[str, Reader] = {}


def _picture(ending: str, **options: t.Any) -> Reader:
    def write(folder: Path, _: Path) -> Path:
        pixels = np.random.default_rng(0).integers(0, 256, (12, 17, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"scan.{ending}", **options)
        return folder / f"scan.{ending}"

    return Reader(write=write, read=lambda folder: _look_at(folder / f"scan.{ending}"))


def _look_at(path: Path) -> None:
    from bushpc.errors import DataError
    from bushpc.shards import readers
    from bushpc.shards.images import find_images, open_picture

    find_images(path.parent)
    if not path.name.endswith(".dcm"):
        for read in (readers.read_image, readers.read_mask):
            try:
                assert read(path.parent, path.name).dtype == np.uint8
            except DataError:
                continue
    picture = open_picture(path)
    pixels = picture.read(0)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    str(picture.scale)


for ending, options in (("png", {}), ("jpg", {}), ("tif", {"compression": "tiff_lzw"}), ("bmp", {})):
    READERS[f"a picture: {ending}"] = _picture(ending, **options)


def _dicom(folder: Path, _: Path) -> Path:
    from ..shards.exchange.cohorts import SIZE
    from ..shards.exchange.test_dicom import write_image

    write_image(folder / "scan.dcm", np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8), "P1")
    return folder / "scan.dcm"


def _nifti(folder: Path, _: Path) -> Path:
    import nibabel

    nibabel.save(nibabel.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4)), folder / "v.nii")
    return folder / "v.nii"


def _read_nifti(folder: Path) -> None:
    from bushpc.shards.sources import brats2021

    brats2021._volume(folder, "v.nii")


READERS["a picture: dcm"] = Reader(write=_dicom, read=lambda folder: _look_at(folder / "scan.dcm"))
READERS["a volume: nii"] = Reader(write=_nifti, read=_read_nifti)


def _import(write: Callable[[Path, Path], Path], **words: t.Any) -> Reader:
    """`bushpc shards import` of a cohort; a refusal leaves nothing."""

    def read(folder: Path) -> None:
        from bushpc.shards.exchange import take_in
        from bushpc.shards.exchange.settings import ImportSettings
        from bushpc.shards.manifest import Manifest

        settings = ImportSettings(labels={"B": "benign", "M": "malignant", "N": "normal"}, **words)
        examined = take_in.examine("mine", folder / "raw", settings, {})
        take_in.take_in(examined, folder / "out")
        assert Manifest.load(folder / "out").records

    return Reader(write=write, read=read, clean=without("out"))


def _coco(folder: Path, _: Path) -> Path:
    from ..shards.exchange.test_coco import coco, write_coco

    (folder / "raw").mkdir()
    write_coco(folder / "raw", coco(folder / "raw"))
    return folder / "raw" / "annotations.json"


def _nnunet(folder: Path, _: Path) -> Path:
    from ..shards.exchange.test_nnunet import write_nnunet

    (folder / "raw").mkdir()
    write_nnunet(folder / "raw")
    return folder / "raw" / "dataset.json"


def _cohort(name: str) -> Callable[[Path, Path], Path]:
    """A folder of pictures and masks with a table."""

    def write(folder: Path, _: Path) -> Path:
        import pandas as pd

        from ..shards.exchange.cohorts import write_folder

        (folder / "raw").mkdir()
        write_folder(folder / "raw")
        pd.read_csv(folder / "raw" / "list.csv").to_excel(folder / "raw" / "list.xlsx", index=False)
        return folder / "raw" / name

    return write


def _dicom_seg(name: str) -> Callable[[Path, Path], Path]:
    def write(folder: Path, _: Path) -> Path:
        from ..shards.exchange.cohorts import LABELS, PATIENTS, image_of, mask_of
        from ..shards.exchange.test_dicom import write_image, write_seg

        for scan in LABELS:
            made = write_image(folder / "raw" / scan / "image", image_of(scan)[..., 0], PATIENTS[scan])
            write_seg(folder / "raw" / scan / "seg", made, mask_of(scan)[None, ..., None], ["lesion"])
        return folder / "raw" / name

    return write


TABLE = {"images": "frames", "masks": "contours", "patients": "pid", "label": "dx"}
READERS["COCO to import"] = _import(_coco, kind="coco", patients="none")
READERS["nnU-Net to import"] = _import(_nnunet, kind="nnunet", patients="none")
READERS["a table to import: csv"] = _import(_cohort("list.csv"), kind="folder", table="list.csv", **TABLE)
READERS["a table to import: xlsx"] = _import(_cohort("list.xlsx"), kind="folder", table="list.xlsx", **TABLE)
READERS["a mask to import"] = _import(_cohort("contours/s1_roi.png"), kind="folder", table="list.csv", **TABLE)
READERS["DICOM to import"] = _import(_dicom_seg("s1/image"), kind="dicom")
READERS["DICOM SEG to import"] = _import(_dicom_seg("s1/seg"), kind="dicom")
