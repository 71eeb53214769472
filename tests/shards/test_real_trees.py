"""Promises of packing from real disks: nested, littered, unreadable and small folders; tables of any dialect."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bushpc.cli import main
from bushpc.errors import DataError
from bushpc.shards.images import find_images
from bushpc.shards.manifest import Manifest
from bushpc.shards.split import read_fold_numbers

SCANS = {"benign": 6, "malignant": 4, "normal": 3}


def busi(folder: Path, scans: dict[str, int] = SCANS) -> Path:
    rng = np.random.default_rng(0)
    for label, count in scans.items():
        (folder / label).mkdir(parents=True)
        for number in range(1, count + 1):
            Image.fromarray(rng.integers(0, 256, (20, 30), dtype=np.uint8)).save(
                folder / label / f"{label} ({number}).png"
            )
            mask = np.zeros((20, 30), np.uint8)
            mask[5:12, 8:19] = 255 * (label != "normal")
            Image.fromarray(mask).save(folder / label / f"{label} ({number})_mask.png")
    return folder


def pack(data, src, out, *words):
    return main(["pack", f"data={data}", f"src={src}", f"out={out}", "excerpt=true", "workers=1", *words])


def without_rights(*words: str) -> subprocess.CompletedProcess[str]:
    """`bushpc` as somebody who may not read every file, which root may."""
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"] if os.getuid() == 0 else []
    if drop and not shutil.which("setpriv"):
        pytest.skip("root without setpriv may read everything")
    command = [*drop, sys.executable, "-m", "bushpc.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


LITTER = [".DS_Store", "._benign (1).png", "._benign (1)_mask.png", "Thumbs.db", "desktop.ini", "~$table.xlsx"]


def test_what_systems_and_excel_leave_is_ignored(tmp_path):
    raw = busi(tmp_path / "raw")
    for place in (raw, raw / "benign", raw / "normal"):
        for name in LITTER:
            (place / name).write_bytes(b"litter")
    (raw / "__MACOSX" / "benign").mkdir(parents=True)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(raw / "__MACOSX" / "benign" / "benign (1).png")
    assert pack("busi", raw, tmp_path / "out") == 0
    assert len(Manifest.load(tmp_path / "out").records) == sum(SCANS.values())
    assert len(find_images(raw)) == 2 * sum(SCANS.values())


@pytest.mark.parametrize("nesting", ["a", "a/b", "Dataset/Dataset/Dataset_BUSI_with_GT"])
def test_a_folder_above_or_below_the_right_one_is_answered_with_the_src_to_use(tmp_path, capsys, nesting):
    right = busi(tmp_path / "raw" / nesting)
    assert pack("busi", tmp_path / "raw", tmp_path / "out") == 2
    assert f"src={right} looks like busi" in capsys.readouterr().err
    assert pack("busi", right / "benign", tmp_path / "out") == 2
    assert f"src={right} looks like busi" in capsys.readouterr().err


def isic(folder: Path, doubled: bool) -> Path:
    for part, name in (("ISIC2018_Task1-2_Training_Input", "ISIC_{:07d}.jpg"),
                       ("ISIC2018_Task1_Training_GroundTruth", "ISIC_{:07d}_segmentation.png")):  # fmt: skip
        place = folder / part / part if doubled else folder / part
        place.mkdir(parents=True)
        for number in range(6):
            pixels = np.zeros((20, 30), np.uint8)
            pixels[5:9, 5:9] = 255
            Image.fromarray(pixels).save(place / name.format(number), quality=95)
    return folder


def test_parts_that_an_archive_doubled_are_read(tmp_path):
    for doubled in (False, True):
        assert pack("isic2018", isic(tmp_path / f"raw{doubled}", doubled), tmp_path / f"out{doubled}") == 0
    tars = [(tmp_path / f"out{doubled}" / "lesion-000000.tar").stat().st_size for doubled in (False, True)]
    assert len(set(tars)) == 1 or abs(tars[0] - tars[1]) < 10240  # the samples name their files
    assert len(Manifest.load(tmp_path / "outTrue").records) == 6


def test_the_union_reads_bus_bra_as_its_archive_unpacks(real_data, tmp_path):
    raw = tmp_path / "raw"
    (raw / "bus_bra").mkdir(parents=True)
    (raw / "bus_bra" / "BUSBRA").symlink_to(real_data / "busbra_excerpt" / "BUSBRA"
                                            if (real_data / "busbra_excerpt" / "BUSBRA").exists()
                                            else real_data / "busbra_excerpt")  # fmt: skip
    assert pack("precise", raw, tmp_path / "out") == 0
    assert len(Manifest.load(tmp_path / "out").records) == 106


def one_sentence(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert all(part in done.stderr for part in parts), done.stderr


def test_what_may_not_be_read_or_written_is_one_sentence_and_exit_2(tmp_path):
    raw, out = busi(tmp_path / "raw"), tmp_path / "out"
    words = ["pack", "data=busi", f"src={raw}", f"out={out}", "excerpt=true", "workers=1"]
    image = raw / "benign" / "benign (2).png"
    image.chmod(0)
    one_sentence(without_rights(*words), "benign (2).png", "Permission denied")
    image.chmod(0o644)
    (raw / "malignant").chmod(0)  # 4 of 13 scans would be gone without a word
    one_sentence(without_rights(*words), str(raw / "malignant"), "Permission denied")
    (raw / "malignant").chmod(0o755)
    shutil.rmtree(out, ignore_errors=True)
    tmp_path.chmod(0o555)
    one_sentence(without_rights(*words), str(out), "Permission denied")
    tmp_path.chmod(0o755)
    assert pack("busi", raw, out) == 0
    busi(tmp_path / "more", {"benign": 7, "malignant": 4})
    out.chmod(0o555)
    (out / ".packing").chmod(0o555)
    words[2] = f"src={tmp_path / 'more'}"
    one_sentence(without_rights(*words), str(out), "Permission denied")
    out.chmod(0o755)
    (out / ".packing").chmod(0o755)


def test_an_excerpt_with_fewer_patients_than_folds_packs_and_says_what_it_cannot_do(tmp_path, capsys):
    raw, out = busi(tmp_path / "raw", {"benign": 2, "malignant": 1}), tmp_path / "out"
    assert pack("busi", raw, out) == 0
    assert "cannot be divided" not in (said := "".join(capsys.readouterr()))
    assert "but not cross-validated" in said
    assert not (out / "folds.csv").exists()
    assert main(["cv", "model=unet", "data=busi", f"data.root={out}", f"runs_dir={tmp_path}"]) == 2
    assert "3 patients with a lesion are too few for 5 folds" in capsys.readouterr().err


def test_pack_writes_the_folds_beside_its_shards(real_data, tmp_path):
    raw = tmp_path / "raw"
    images = raw / "BrEaST-Lesions_USG-images_and_masks"
    images.mkdir(parents=True)
    [sheet] = (real_data / "breast").glob("*.xlsx")
    (raw / sheet.name).symlink_to(sheet)
    for path in (real_data / "breast" / images.name).glob("case0[0-3]*.png"):
        (images / path.name).symlink_to(path)
    assert pack("breast", raw, tmp_path / "out") == 0
    shipped = read_fold_numbers(Path(__file__).parents[2] / "shards" / "breast" / "folds.csv")
    assert read_fold_numbers(tmp_path / "out" / "folds.csv") == shipped


def test_missing_folds_and_manifests_are_answered_with_what_makes_them(tmp_path, capsys):
    raw, out = busi(tmp_path / "raw"), tmp_path / "out"
    assert pack("busi", raw, out) == 0
    capsys.readouterr()
    audit = ["shards", "audit", f"data={out}", f"out={tmp_path / 'page'}"]
    main(["cv", "model=unet", "data=busi", f"data.root={out}", "folds=published", f"runs_dir={tmp_path}"])
    assert "published no folds. Use folds=frozen" in capsys.readouterr().err
    (out / "manifest.json").unlink()
    (out / ".packing" / "task.json").write_text("{}")
    assert main(audit) == 2
    said = capsys.readouterr().err
    assert "packing was interrupted" in said
    assert f"data=NAME src=FOLDER out={out}" in said


def bus_bra(folder: Path, save) -> Path:
    """Six patients in BUS-BRA's layout, its tables written by `save(path, rows)`."""
    rows = [["ID", "Case", "Histology", "Pathology", "BIRADS", "Device", "Side", "Width", "Height"]]
    folds = [["ID", "Case", "kFold", *(f"valid_{k}" for k in range(1, 6))]]
    for part in ("Images", "Masks"):
        (folder / part).mkdir(parents=True)
    for number in range(1, 7):
        name, fold = f"{number:04d}-l", number % 5 + 1
        rows.append([f"bus_{name}", str(number), "cyst", "benign", "2", "GE", "left", "30", "20"])
        folds.append([f"bus_{name}", str(number), str(fold), *("NaN" if k == fold else "1" for k in range(1, 6))])
        pixels = np.zeros((20, 30), np.uint8)
        pixels[5:9, 5 : 9 + number] = 255
        Image.fromarray(pixels).save(folder / "Images" / f"bus_{name}.png")
        Image.fromarray(pixels).save(folder / "Masks" / f"mask_{name}.png")
    save(folder / "bus_data.csv", rows)
    save(folder / "5-fold-cv.csv", folds)
    return folder


def table(delimiter=",", encoding="utf-8", index=False):
    def save(path, rows):
        if index:
            rows = [[str(number - 1) if number else "", *row] for number, row in enumerate(rows)]
        path.write_bytes("".join(delimiter.join(row) + "\r\n" for row in rows).encode(encoding))

    return save


@pytest.mark.parametrize(
    "save",
    [table(), table(";"), table("\t", "utf-16"), table(",", "utf-16"), table(";", "utf-8-sig"), table(index=True)],
    ids=["plain", "semicolons", "utf-16 tabs", "utf-16", "mark", "pandas index"],
)
def test_tables_of_every_dialect_give_the_same_folds(tmp_path, save):
    assert pack("bus_bra", bus_bra(tmp_path / "raw", save), tmp_path / "out") == 0
    folds = read_fold_numbers(tmp_path / "out" / "folds_published.csv")
    assert folds == {f"bus_{number:04d}-l": number % 5 for number in range(1, 7)}


def test_another_encoding_is_answered_with_what_to_do(tmp_path, capsys):
    raw = bus_bra(tmp_path / "raw", table())
    (raw / "bus_data.csv").write_bytes("ID,Case,Histologie é\n".encode("latin-1"))
    assert pack("bus_bra", raw, tmp_path / "out") == 2
    assert "save it as UTF-8 CSV" in capsys.readouterr().err


def test_a_folder_that_may_not_be_listed_is_an_error_for_python_too(tmp_path, monkeypatch):
    from bushpc.shards import tree

    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(tree.os, "scandir", refuse)
    with pytest.raises(DataError, match="cannot be read"):
        tree.glob(tmp_path, "*.png")
