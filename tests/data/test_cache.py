"""Promises of the node cache: decoded once by all, whole after any death, in room that is there, and reclaimed."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bushpc.config import LoaderConfig
from bushpc.data import cache, room
from bushpc.data.cache import DecodingStopped, open_cache
from bushpc.data.room import memory_left, places
from bushpc.data.square import decode, fit, resize
from bushpc.errors import DataError
from bushpc.shards.manifest import Manifest, read_image, read_mask

SIZE = 32
fork = multiprocessing.get_context("fork")


@pytest.fixture
def node(phantom_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "CHUNK_ROWS", 2)  # the dataset is small
    return Node(phantom_folder, tmp_path)


class Node:
    """A dataset and a place for caches. Processes of the node are forks; each notes the keys that it decodes."""

    def __init__(self, folder: Path, tmp_path: Path) -> None:
        self.folder, self.manifest = folder, Manifest.load(folder)
        self.keys = [record.key for record in self.manifest.records]
        self.place, self.notes = tmp_path / "caches", tmp_path / "decoded"
        self.loader = LoaderConfig(
            workers=0, cache_dir=str(self.place), cache_gb=50, features=False, features_dir=None, lanes=4
        )

    def open(self, size=SIZE, **how):
        return open_cache(self.manifest, self.folder, size, self.loader, **how)

    def start(self, work, *, before_each=lambda key: None) -> multiprocessing.Process:
        """A process that does `work`, in which `before_each` is called with the key of each image it decodes."""

        def run():
            # OpenMP's threads do not survive a fork: in a child of a process that had some, a parallel region waits
            # for them for ever. DataLoader gives its workers one thread, too.
            torch.set_num_threads(1)

            def noted(folder, record, size):
                before_each(record.key)
                with self.notes.open("a") as notes:
                    notes.write(f"{os.getpid()} {record.key}\n")
                return decode(folder, record, size)

            cache.decode = noted
            work()

        process = fork.Process(target=run)
        process.start()
        return process

    def run(self, work, **how) -> int:
        process = self.start(work, **how)
        process.join(300)
        return process.exitcode

    def decoded(self) -> list[list[str]]:
        return [line.split() for line in self.notes.read_text().splitlines()] if self.notes.exists() else []

    def home(self, size=SIZE) -> Path:
        [home] = self.homes(size)
        return home

    def homes(self, size=SIZE) -> list[Path]:
        return list(self.place.glob(f"[!.]*-{size}-*"))

    def ready(self) -> set[str]:
        return {key for key, ready in zip(self.keys, np.load(self.home() / "ready.npy"), strict=True) if ready}

    def assert_pixels_are_right(self, opened) -> None:
        for record in self.manifest.records:
            image_SSC, mask_SS = decode(self.folder, record, SIZE)
            assert np.array_equal(opened.images_NSSC[opened.rows[record.key]], image_SSC)
            assert np.array_equal(opened.masks_NSS[opened.rows[record.key]], mask_SS)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_cache_holds_the_shards_pixels_resized(node):
    opened = node.open(64)
    record = node.manifest.lesions[3]
    image, mask = read_image(node.folder, record), read_mask(node.folder, record)
    expected = np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR), dtype=int)
    row = opened.rows[record.key]
    assert np.abs(opened.images_NSSC[row].astype(int) - expected).max() <= 1
    expected = np.asarray(Image.fromarray(mask).resize((64, 64), Image.Resampling.NEAREST))
    assert (opened.masks_NSS[row] == expected).mean() > 0.995
    assert sorted(opened.rows) == sorted(node.keys)


@pytest.mark.parametrize("trap", ["a link to another folder", "a folder that all may write"])
def test_a_folder_that_somebody_else_may_have_laid_is_refused_and_nothing_in_it_is_touched(node, tmp_path, trap):
    everybodys, theirs = tmp_path / "everybodys", tmp_path / "theirs"
    for folder in (everybodys, theirs):
        folder.mkdir()
        folder.chmod(0o777)
    (theirs / "lock").write_text("precious")
    node.loader = dataclasses.replace(node.loader, cache_dir=str(everybodys / "cache"))
    (everybodys / "cache").symlink_to(theirs) if "link" in trap else theirs.rename(everybodys / "cache")
    with pytest.raises(DataError, match="is a link, or other users can write to it"):
        node.open()
    assert (everybodys / "cache" / "lock").read_text() == "precious"
    assert len(list((everybodys / "cache").iterdir())) == 1


def test_resizing_to_the_same_size_changes_nothing():
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (24, 24, 3), np.uint8), rng.integers(0, 2, (24, 24), np.uint8)
    same_image, same_mask = resize(image, mask, 24)
    assert np.array_equal(same_image, image)
    assert np.array_equal(same_mask, mask)


def test_a_lesion_that_vanishes_at_the_networks_size_is_named_before_training(node):
    with pytest.raises(DataError, match=r"the lesion of phantom\d+ .* vanishes at model.image_size=2"):
        node.open(2)


def test_an_image_and_a_mask_of_different_size_are_named(node):
    record = node.manifest.lesions[0]
    with pytest.raises(DataError, match=f"lesion-0.tar: image and mask of {record.key} differ in size"):
        fit("lesion-0.tar", record, np.zeros((4, 5, 3), np.uint8), np.ones((5, 4), np.uint8), 2)


def test_all_processes_of_a_node_decode_together_and_each_image_once(node):
    started = fork.Barrier(3)

    def work():
        started.wait(30)
        node.assert_pixels_are_right(node.open())

    processes = [node.start(work, before_each=lambda key: time.sleep(0.03)) for _ in range(3)]
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(key for _, key in node.decoded()) == sorted(node.keys)
    assert len({pid for pid, _ in node.decoded()}) > 1


def test_a_second_open_in_a_process_is_the_first_and_a_later_process_decodes_nothing(node):
    assert node.run(node.open) == 0
    before = node.decoded()
    assert node.run(lambda: node.assert_pixels_are_right(node.open())) == 0
    assert node.decoded() == before
    opened = node.open()
    assert node.open() is opened


def test_a_killed_decode_goes_on_where_it_stood(node):
    def die_at_the_twelfth(key):
        if len(node.decoded()) >= 11:
            os.kill(os.getpid(), signal.SIGKILL)

    assert node.run(node.open, before_each=die_at_the_twelfth) == -signal.SIGKILL
    there, before = node.ready(), len(node.decoded())
    assert 0 < len(there) < len(node.keys)
    assert node.run(lambda: node.assert_pixels_are_right(node.open())) == 0
    assert {key for _, key in node.decoded()[before:]} == set(node.keys) - there


def test_what_a_process_held_when_it_died_is_decoded_by_those_who_wait(node, tmp_path):
    def hold(key):
        (tmp_path / "held").touch()
        time.sleep(600)

    stuck = node.start(node.open, before_each=hold)
    wait_for((tmp_path / "held").exists)
    waiting = node.start(lambda: node.assert_pixels_are_right(node.open()))
    waiting.join(0.5)
    assert waiting.exitcode is None, "it went on without the chunks that another process holds"
    stuck.kill()
    waiting.join(300)
    assert waiting.exitcode == 0
    assert node.ready() == set(node.keys)


def test_decoding_ends_between_chunks_when_told_so_and_goes_on_later(node):
    def work():
        with pytest.raises(DecodingStopped, match=r"\d+ of 24 images are decoded"):
            node.open(keep_going=lambda: len(node.decoded()) < 6)

    assert node.run(work, before_each=lambda key: time.sleep(0.02)) == 0
    there, before = node.ready(), len(node.decoded())
    assert 6 <= len(there) < len(node.keys)
    assert node.run(lambda: node.assert_pixels_are_right(node.open())) == 0
    assert {key for _, key in node.decoded()[before:]} == set(node.keys) - there


def test_who_waits_for_another_process_can_be_told_to_stop(node):
    stuck = node.start(node.open, before_each=lambda key: time.sleep(600))
    wait_for(node.homes)
    deadline = time.monotonic() + 1.0

    def work():
        with contextlib.suppress(DecodingStopped):
            node.open(keep_going=lambda: time.monotonic() < deadline)
            raise AssertionError("it got a cache that is not whole")

    assert node.run(work) == 0
    stuck.kill()
    stuck.join()


def test_a_cache_of_which_cleaners_took_a_file_is_made_anew(node):
    assert node.run(node.open) == 0
    (node.home() / "masks.npy").unlink()
    assert node.run(lambda: node.assert_pixels_are_right(node.open())) == 0
    assert len(node.decoded()) == 2 * len(node.keys)


def test_a_cache_of_an_earlier_boot_and_one_left_half_way_are_reclaimed(node):
    lines: list[str] = []
    assert node.run(node.open) == 0
    with pytest.raises(DecodingStopped):
        node.open(48, keep_going=lambda: not node.homes(48))
    half = node.home(48)
    earlier = node.home().with_name(node.home().name[:-8] + "00000000")
    node.home().rename(earlier)
    node.open(log=lines.append)
    assert not earlier.exists()
    assert not half.exists()
    [line] = [line for line in lines if line.startswith("reclaimed")]
    assert earlier.name in line
    assert half.name in line


def test_a_cache_in_use_is_never_reclaimed(node):
    stuck = node.start(lambda: node.open(48), before_each=lambda key: time.sleep(600))
    wait_for(lambda: node.homes(48))
    node.loader = dataclasses.replace(node.loader, cache_gb=1e-9)
    node.open()
    assert node.home(48).exists()
    stuck.kill()
    stuck.join()


def test_beyond_the_limit_the_caches_unused_for_longest_make_way(node):
    for size in (36, 40, 44):
        assert node.run(lambda size=size: node.open(size)) == 0
        os.utime(node.home(size) / "users", (size, size))
    assert node.run(lambda: node.open(36)) == 0  # used again: now the newest
    two = sum(len(node.keys) * size * size * 4 for size in (36, SIZE)) + 4096
    node.loader = dataclasses.replace(node.loader, cache_gb=two / 1e9)
    node.open()
    assert [size for size in (36, 40, 44) if node.homes(size)] == [36]


def test_shared_memory_comes_first_and_the_temporary_folder_where_it_has_no_room(node, tmp_path, monkeypatch):
    shared, temporary = tmp_path / "shm", tmp_path / "tmp"
    for folder in (shared, temporary):
        folder.mkdir()
    monkeypatch.setattr(room, "SHARED_MEMORY", shared)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    node.loader = dataclasses.replace(node.loader, cache_dir=None)
    assert [place.parent for place in places(node.loader)] == [shared, temporary]
    assert node.run(node.open) == 0
    assert list(shared.glob("*/*-32-*"))
    monkeypatch.setattr(cache, "room", lambda place: 0 if place.is_relative_to(shared) else 1 << 30)
    assert node.run(lambda: node.open(40)) == 0
    assert list(temporary.glob("*/*-40-*"))
    assert node.run(node.open) == 0  # one that is there already needs no room
    assert not list(temporary.glob("*/*-32-*"))


def test_no_room_anywhere_says_how_much_is_needed_and_what_to_set(node, monkeypatch):
    monkeypatch.setattr(cache, "room", lambda place: 10_000_000)
    with pytest.raises(DataError, match=r"\(1\.\d\d GB\).*caches has space for 10\.0 MB.*loader\.cache_dir"):
        node.open(4096)


def test_a_disk_that_fills_up_is_an_error_when_the_cache_is_made_never_a_bus_error_later(node):
    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        with pytest.raises(DataError, match="File too large"):
            node.open()

    assert node.run(work) == 0
    assert [path.name for path in node.place.iterdir()] == ["lock"]


def test_every_block_of_a_cache_is_there_before_the_first_image_is_decoded(node):
    with pytest.raises(DecodingStopped):
        node.open(256, keep_going=lambda: not node.homes(256))
    assert not np.load(node.home(256) / "ready.npy").all()
    for file in node.home(256).glob("*.npy"):
        assert file.stat().st_blocks * 512 >= file.stat().st_size > 0


def test_a_place_that_cannot_be_written_is_named(node, tmp_path):
    (tmp_path / "file").write_text("")
    node.loader = dataclasses.replace(node.loader, cache_dir=str(tmp_path / "file" / "below"))
    with pytest.raises(DataError, match=r"file/below cannot be used: .*Not a directory"):
        node.open()


@pytest.mark.parametrize(("available_kb", "expected"), [(1_000_000, 900 + 70), (0, 0)])
@pytest.mark.parametrize("version", [1, 2])
def test_the_control_groups_of_a_job_limit_its_memory_but_their_file_cache_does_not_count(
    tmp_path, version, available_kb, expected
):
    top = tmp_path / "sys/fs/cgroup" / ("memory" if version == 1 else "")
    limit, used, stat = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "inactive_file 1\ntotal_inactive_file 70"),
        2: ("memory.max", "memory.current", "anon 5\ninactive_file 70"),
    }[version]
    for group, bytes_limit in (("job/step", "max"), ("job", "1000")):  # the step has no limit, the job has
        (top / group).mkdir(parents=True, exist_ok=True)
        (top / group / limit).write_text(bytes_limit)
        (top / group / used).write_text("100")
        (top / group / "memory.stat").write_text(stat)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable: {available_kb} kB\n")
    name = "4:cpu,memory:/job/step\n3:cpuset:/x\n" if version == 1 else "0::/job/step\n"
    (tmp_path / "proc/self/cgroup").write_text(name)
    assert memory_left(tmp_path) == expected
