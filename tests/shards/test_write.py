"""Promises of packing: the same bytes always, never half, and every fault named before training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from bushpc.errors import ConfigError, DataError
from bushpc.shards import write
from bushpc.shards.manifest import Manifest, read_image, read_mask, verify
from bushpc.shards.write import pack

SMALL: dict[str, int | float] = {"count": 9, "normals": 2, "height": 64, "width": 80}


def tars(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def listen():
    """A progress callable that keeps what it is told."""
    said = []

    def show(done, total, message=""):
        said.append((done, total, message))

    return said, show


def test_packing_twice_gives_identical_bytes_whatever_the_number_of_workers(tmp_path):
    one = pack("phantom", None, tmp_path / "one", parameters=SMALL, workers=1, shard_samples=4)
    two = pack("phantom", None, tmp_path / "two", parameters=SMALL, workers=2, shard_samples=4)
    assert tars(tmp_path / "one") == tars(tmp_path / "two")
    assert (tmp_path / "one/manifest.json").read_bytes() == (tmp_path / "two/manifest.json").read_bytes()
    assert one.hash == two.hash
    assert list(tars(tmp_path / "one")) == [
        "lesion-000000.tar", "lesion-000001.tar", "lesion-000002.tar", "normal-000000.tar",
    ]  # fmt: skip


def test_packing_again_does_nothing_and_says_so(tmp_path):
    first = pack("phantom", None, tmp_path, parameters=SMALL)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    said, show = listen()
    again = pack("phantom", None, tmp_path, parameters=SMALL, progress=show)
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")} == before
    assert len(said) == 1
    assert "already packed" in said[0][2]


def test_a_damaged_set_is_packed_again(tmp_path):
    pack("phantom", None, tmp_path, parameters=SMALL)
    whole = tars(tmp_path)
    tar = tmp_path / "lesion-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-100])
    pack("phantom", None, tmp_path, parameters=SMALL)
    assert tars(tmp_path) == whole


def test_other_parameters_replace_the_set_and_leave_no_stale_tar(tmp_path):
    pack("phantom", None, tmp_path, parameters=SMALL, shard_samples=3)
    manifest = pack("phantom", None, tmp_path, parameters={**SMALL, "count": 4, "normals": 0}, shard_samples=3)
    assert sorted(tars(tmp_path)) == [shard.file for shard in manifest.shards]
    assert len(manifest.records) == 4


def test_the_plain_webdataset_library_reads_the_tars(tmp_path):
    manifest = pack("phantom", None, tmp_path, parameters=SMALL)
    dataset = webdataset.WebDataset(str(tmp_path / "lesion-000000.tar"), shardshuffle=False).decode("pil")
    samples = {sample["__key__"]: sample for sample in dataset}
    assert list(samples) == [record.key for record in manifest.lesions]
    for record in manifest.lesions:
        sample = samples[record.key]
        assert np.array_equal(np.asarray(sample["image.png"]), read_image(tmp_path, record))
        assert np.array_equal(np.asarray(sample["mask.png"].convert("L")), read_mask(tmp_path, record))
        assert sample["json"]["attributes"] == record.attributes
        assert sample["json"]["label"] == record.label


def test_a_pack_killed_at_any_time_goes_on_to_the_same_bytes(tmp_path):
    """Killed with SIGKILL in two different shards; the third run keeps what is finished and ends like any other."""
    pack("phantom", None, tmp_path / "whole", parameters=SMALL, shard_samples=3)
    program = (
        "import sys, time\n"
        "from bushpc.shards.write import pack\n"
        "def show(done, total, message=''):\n"
        "    print(done, message, flush=True)\n"
        "    time.sleep(0.05)\n"
        f"pack('phantom', None, sys.argv[1], parameters={SMALL!r}, shard_samples=3, progress=show)\n"
    )
    for stop_after in (4, 8):
        process = subprocess.Popen(
            [sys.executable, "-c", program, tmp_path / "killed"], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            if int(line.split()[0]) >= stop_after and "kept" not in line:
                break
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with pytest.raises(DataError, match="not packed"):
            Manifest.load(tmp_path / "killed")
    said, show = listen()
    pack("phantom", None, tmp_path / "killed", parameters=SMALL, shard_samples=3, progress=show)
    assert sum("kept" in message for _, _, message in said) >= 2
    assert tars(tmp_path / "killed") == tars(tmp_path / "whole")
    assert (tmp_path / "killed/manifest.json").read_bytes() == (tmp_path / "whole/manifest.json").read_bytes()


@pytest.mark.real
def test_no_worker_outlives_a_killed_pack(tmp_path):
    script = tmp_path / "packing.py"
    script.write_text(
        "import multiprocessing, sys\n"
        "from bushpc.shards.write import pack\n"
        "def show(done, total, message=''):\n"
        "    print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "if __name__ == '__main__':\n"
        "    pack('phantom', None, sys.argv[1], parameters={'count': 2000}, workers=2, progress=show)\n"
    )
    process = subprocess.Popen([sys.executable, script, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 60
    while any(_runs(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_runs(pid) for pid in workers)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_kill_while_the_tars_move_in_place_is_survived(tmp_path, monkeypatch):
    pack("phantom", None, tmp_path / "whole", parameters=SMALL, shard_samples=3)

    def die(self, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(Manifest, "save", die)
    with pytest.raises(KeyboardInterrupt):
        pack("phantom", None, tmp_path / "cut", parameters=SMALL, shard_samples=3)
    monkeypatch.undo()
    said, show = listen()
    pack("phantom", None, tmp_path / "cut", parameters=SMALL, shard_samples=3, progress=show)
    assert [message.partition(" ")[2] for _, _, message in said] == ["kept from an earlier attempt"] * 4
    assert tars(tmp_path / "cut") == tars(tmp_path / "whole")


def test_a_finished_shard_that_was_damaged_since_is_not_kept(tmp_path, monkeypatch):
    pack("phantom", None, tmp_path / "whole", parameters=SMALL, shard_samples=3)

    def die(work, out, manifest):
        tar = work / "lesion-000001.tar"
        data = bytearray(tar.read_bytes())
        data[700] ^= 1
        tar.write_bytes(data)
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "publish", die)
    with pytest.raises(KeyboardInterrupt):
        pack("phantom", None, tmp_path / "cut", parameters=SMALL, shard_samples=3)
    monkeypatch.undo()
    pack("phantom", None, tmp_path / "cut", parameters=SMALL, shard_samples=3)
    assert tars(tmp_path / "cut") == tars(tmp_path / "whole")


def test_two_packs_into_one_folder_do_not_mix(tmp_path):
    def second(done, total, message=""):
        with pytest.raises(DataError, match="Another bushpc pack"):
            pack("phantom", None, tmp_path, parameters=SMALL)

    pack("phantom", None, tmp_path, parameters=SMALL, progress=second)


def test_a_failed_repack_leaves_the_packed_set_whole(breast):
    manifest = pack("breast", breast.folder, breast.shards)
    breast.rows[2]["Shape"] = "round"
    breast.save()
    (breast.images / "case003.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"Row 4: .*case003\.png is not a readable PNG"):
        pack("breast", breast.folder, breast.shards)
    assert Manifest.load(breast.shards) == manifest
    verify(breast.shards, manifest, deep=True)


def test_breast_samples_keep_image_mask_scale_and_clinical_facts(breast):
    breast.rows[0] |= {"Age": 57, "BIRADS": "4a", "Halo": "no", "Margin": "not circumscribed - angular&indistinct"}
    breast.save()
    manifest = pack("breast", breast.folder, breast.shards)
    assert Counter(record.label for record in manifest.records) == {"benign": 2, "malignant": 1, "normal": 1}
    assert [record.key for record in manifest.lesions] == ["case001", "case002", "case003"]
    record = manifest.record("case001")
    assert record.shard == "lesion-000000.tar"
    assert manifest.record("case004").shard == "normal-000000.tar"
    assert record.pixel_mm == pytest.approx(0.075)
    assert record.attributes["age"] == 57.0
    assert record.attributes["birads"] == "4a"
    assert record.attributes["halo"] == "no"
    assert record.attributes["signs"] is None
    assert record.attributes["margin"] == "not circumscribed - angular&indistinct"
    assert manifest.record("case002").attributes["birads"] == "2"
    image, mask = read_image(breast.shards, record), read_mask(breast.shards, record)
    raw = np.asarray(Image.open(breast.images / "case001.png"))
    assert (image[:3, :5] == 0).all(), "what is transparent is black, not what hides under it"
    assert np.array_equal(image[3:], raw[3:, :, :3])
    assert mask.sum() == 7 * 11 - 1 == record.lesion_pixels, "a nearly transparent edge pixel is outside"
    assert record.lesion_length == 11
    assert (record.height, record.width) == (21, 30) == mask.shape


def test_a_missing_mask_is_named_with_its_row(breast):
    (breast.images / "case002_tumor.png").unlink()
    with pytest.raises(DataError, match=r"row 3: .*case002_tumor\.png is missing"):
        pack("breast", breast.folder, breast.shards)
    with pytest.raises(DataError, match=r"row 3: .*case002_tumor\.png is missing"):
        pack("breast", breast.folder, breast.shards, excerpt=True)


def test_every_missing_file_is_named_at_once(breast):
    (breast.images / "case002_tumor.png").unlink()
    (breast.images / "case004.png").unlink()
    with pytest.raises(DataError, match=r"(?s)row 3: .*case002_tumor\.png.*row 5: .*case004\.png"):
        pack("breast", breast.folder, breast.shards)


def test_image_and_mask_of_different_size_are_named_with_their_row(breast):
    Image.new("RGBA", (7, 9), "white").save(breast.images / "case003_tumor.png")
    with pytest.raises(DataError, match=r"Row 4: .*case003\.png has 30x23 pixels.*case003_tumor\.png has 7x9"):
        pack("breast", breast.folder, breast.shards)
    assert not (breast.shards / "manifest.json").exists()


def test_the_same_fault_is_the_same_error_from_a_worker_process(breast):
    Image.new("RGBA", (7, 9), "white").save(breast.images / "case003_tumor.png")
    with pytest.raises(DataError, match=r"Row 4: .*case003\.png has 30x23 pixels"):
        pack("breast", breast.folder, breast.shards, workers=2)


def test_an_empty_lesion_mask_is_refused(breast):
    Image.new("RGBA", (30, 21), (0, 0, 0, 0)).save(breast.images / "case001_tumor.png")
    with pytest.raises(DataError, match=r"'case001' has a lesion but an empty mask.*case001_tumor\.png"):
        pack("breast", breast.folder, breast.shards)


def test_a_missing_column_is_named(breast):
    breast.columns.remove("Margin")
    breast.save()
    with pytest.raises(DataError, match=r"clinical-data.*lacks the column Margin"):
        pack("breast", breast.folder, breast.shards)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("Pixel_size", "wide", r"row 3: Pixel_size is 'wide'"),
        ("Classification", "benin", r"row 3: Classification is 'benin'; allowed: benign"),
        ("Mask_tumor_filename", None, r"row 3: Mask_tumor_filename names 0 files for a malignant scan"),
        ("Image_filename", "case001.png", r"row 3: case001\.png is already in row 2"),
    ],
)
def test_an_unusable_cell_is_named_with_its_row(breast, column, value, message):
    breast.rows[1][column] = value
    breast.save()
    with pytest.raises(DataError, match=message):
        pack("breast", breast.folder, breast.shards)


def test_a_spreadsheet_that_is_none_is_named(breast):
    sheet = next(breast.folder.glob("*.xlsx"))
    sheet.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(DataError, match="is not a readable spreadsheet"):
        pack("breast", breast.folder, breast.shards)
    sheet.unlink()
    with pytest.raises(DataError, match=r"Dec-15-2023\.xlsx does not exist"):
        pack("breast", breast.folder, breast.shards)


def test_a_folder_that_does_not_match_the_card_is_refused_unless_it_is_an_excerpt(breast):
    del breast.rows[0]
    (breast.images / "case001_tumor.png").unlink()
    breast.save()
    with pytest.raises(
        DataError, match=r"(?s)2 files match .*_tumor\.png, 3 expected.*1 samples are benign, 2 expected"
    ):
        pack("breast", breast.folder, breast.shards)
    manifest = pack("breast", breast.folder, breast.shards, excerpt=True)
    assert manifest.excerpt
    assert Manifest.load(breast.shards).excerpt
    assert len(manifest.records) == 3


def test_an_excerpt_may_leave_images_out_of_the_folder(breast):
    for name in ("case001.png", "case001_tumor.png"):
        (breast.images / name).unlink()
    manifest = pack("breast", breast.folder, breast.shards, excerpt=True)
    assert [record.key for record in manifest.records] == ["case002", "case003", "case004"]


def test_wrong_requests_say_what_is_possible(tmp_path, breast):
    with pytest.raises(
        ConfigError, match=r"unknown dataset 'brest'; did you mean 'breast'\? Valid: .*breast, .*phantom"
    ):
        pack("brest", None, tmp_path)
    with pytest.raises(ConfigError, match=r"data=breast needs src=FOLDER"):
        pack("breast", None, tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        pack("breast", tmp_path / "nowhere", tmp_path)
    with pytest.raises(ConfigError, match="takes no src"):
        pack("phantom", tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"unknown parameter of phantom 'cuont'; did you mean 'count'"):
        pack("phantom", None, tmp_path, parameters={"cuont": 3})
    with pytest.raises(ConfigError, match="count=-1"):
        pack("phantom", None, tmp_path, parameters={"count": -1})
    with pytest.raises(ConfigError, match="workers=0"):
        pack("phantom", None, tmp_path, workers=0)
    with pytest.raises(DataError, match="card of 'breast'"):
        pack("phantom", None, breast.shards)


@pytest.fixture(scope="module")
def real_breast(real_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("breast")
    pack("breast", real_data / "breast", folder, workers=min(2, len(os.sched_getaffinity(0))))
    return folder


def test_real_breast_has_the_counts_that_its_publisher_states(real_breast):
    manifest = Manifest.load(real_breast)
    assert Counter(record.label for record in manifest.records) == {"benign": 154, "malignant": 98, "normal": 4}
    assert [record.key for record in manifest.records if record.label == "normal"] == [
        "case045", "case061", "case209", "case213",
    ]  # fmt: skip
    assert {record.shard for record in manifest.records if record.label == "normal"} == {"normal-000000.tar"}
    assert not manifest.excerpt
    assert len(manifest.sources) == 1 + 256 + 252 + 14
    verify(real_breast, manifest, deep=True)


def test_real_breast_masks_have_the_size_and_centre_that_xbusnet_published(real_breast, real_data):
    """XBusNet's sentences hold every mask's width, height and centre: an independent reading of the same masks."""
    import csv
    import re

    manifest = Manifest.load(real_breast)
    sentences = {}
    for path in (real_data / "xbusnet_folds").glob("val_fold*.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            sentences |= {row["Image Name"].removesuffix(".png"): row["Sentence"] for row in csv.DictReader(file)}
    assert len(sentences) == 252
    for record in manifest.lesions:
        width, height, c_x, c_y = map(int, re.findall(r"\d+", sentences[record.key]))
        rows, columns = np.nonzero(read_mask(real_breast, record))
        assert np.ptp(columns) + 1 == width
        assert np.ptp(rows) + 1 == height
        assert abs(columns.mean() - c_x) < 1.5  # theirs is a traced contour's, cut to whole pixels
        assert abs(rows.mean() - c_y) < 1.5


def test_real_breast_opens_with_plain_webdataset(real_breast):
    dataset = webdataset.WebDataset(str(real_breast / "normal-000000.tar"), shardshuffle=False).decode("rgb8")
    samples = list(dataset)
    assert [sample["__key__"] for sample in samples] == ["case045", "case061", "case209", "case213"]
    assert all(sample["image.png"].shape[2] == 3 for sample in samples)
    assert json.dumps(samples[0]["json"]["attributes"])


def test_a_folder_of_another_dataset_is_refused_with_what_it_looks_like(breast, tmp_path):
    (breast.images / "case001_other1.png").write_bytes(b"")  # the project's own card asks for one
    for excerpt in (False, True):
        with pytest.raises(DataError, match=r"raw is not the folder of busi: it looks like data=breast\..*busi/card"):
            pack("busi", breast.folder, tmp_path / "out", excerpt=excerpt)
    assert not (tmp_path / "out").exists()


def test_a_folder_above_or_below_the_right_one_is_refused_with_the_right_one(breast):
    for wrong in (breast.folder.parent, breast.images):
        with pytest.raises(DataError, match=rf"it has no file .*tumor\.png\. src={breast.folder} looks like breast"):
            pack("breast", wrong, breast.shards)
    assert not (breast.shards / "manifest.json").exists()
