"""Promises of staging: once per node, verified, never in the way, and the same training bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bushpc.cell import run_cell
from bushpc.cluster.scratch import Unusable, place
from bushpc.config import CellConfig
from bushpc.data import room, staging
from bushpc.data.cache import DecodingStopped, boot
from bushpc.data.loader import FoldData
from bushpc.data.square import decode
from bushpc.data.staging import Source, Stage, open_stage, stage_shards
from bushpc.dist import World
from bushpc.errors import DataError
from bushpc.files import sha256_of

fork = multiprocessing.get_context("fork")
HOST = socket.gethostname()
SCRATCH = ("SLURM_TMPDIR", "TMPDIR")


@pytest.fixture
def node(tmp_path):
    """A disk of a node, and lines that were said."""
    disk = tmp_path / "disk"
    disk.mkdir()
    return Node(disk, tmp_path / "shared")


class Node:
    def __init__(self, disk: Path, shared: Path) -> None:
        self.disk, self.shared, self.said = disk, shared, []
        shared.mkdir()

    def open(self, **how) -> Stage | None:
        return open_stage(str(self.disk), say=self.said.append, **how)

    def files(self, count: int = 3, size: int = 1000) -> list[Source]:
        for i in range(count):
            (self.shared / f"shard-{i}.tar").write_bytes(os.urandom(size))
        paths = sorted(self.shared.iterdir())
        return [Source(path, path.stat().st_size, sha256_of(path)) for path in paths]

    @property
    def home(self) -> Path:
        return self.disk / f"bushpc-stage-{os.getuid()}"


def released() -> None:
    """As when the processes that used copies have ended."""
    while staging._users:
        staging._users.pop().close()


def test_the_copy_is_the_same_bytes_in_a_folder_that_is_ours_alone(node):
    sources = node.files()
    copy = node.open().copy("data", sources)
    assert copy.parent == node.home
    assert node.home.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.read_bytes() for path in copy.glob("*.tar")} == {
        source.path.name: source.path.read_bytes() for source in sources
    }
    assert node.said[0].startswith("copied 3 kB to")


def test_processes_of_a_node_copy_once_and_the_others_wait_for_it(node):
    sources, notes = node.files(), node.disk / "notes"

    def one():
        stage = Stage(home=node.home, keep_going=lambda: not time.sleep(0.05), say=lambda line: note(line))

        def note(line):
            with notes.open("a") as file:
                file.write(line + "\n")

        assert stage.copy("data", sources) is not None

    assert node.open() is not None
    processes = [fork.Process(target=one) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(notes.read_text().splitlines()) == 1


def test_a_copy_that_was_killed_half_way_is_made_anew(node):
    sources = node.files(count=2)
    stage = node.open()
    half = node.home / f".data_{HOST}_{boot()}"
    half.mkdir()
    (half / "shard-0.tar").write_bytes(b"half")
    copy = stage.copy("data", sources)
    assert not half.exists()
    assert (copy / "shard-0.tar").read_bytes() == sources[0].path.read_bytes()


def test_a_copy_of_which_a_cleaner_took_files_is_made_anew(node):
    sources = node.files()
    copy = node.open().copy("data", sources)
    (copy / "shard-1.tar").unlink()
    assert node.open().copy("data", sources) == copy
    assert (copy / "shard-1.tar").exists()


def test_an_altered_shard_is_an_error_and_leaves_no_copy(node):
    sources = node.files()
    sources[1].path.write_bytes(os.urandom(1000))
    with pytest.raises(DataError, match=r"shard-1\.tar is altered: its SHA-256 is"):
        node.open().copy("data", sources)
    assert [path.name for path in node.home.iterdir()] == ["lock"]


def test_without_room_the_shared_folder_is_used_with_one_line(node, monkeypatch):
    sources = node.files()
    monkeypatch.setattr(staging, "room", lambda folder: 2999)
    assert node.open().copy("data", sources) is None
    [line] = node.said
    assert "has room for 3 kB, 3 kB are needed" in line
    assert f"data is read from {node.shared}" in line


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_behind(node, monkeypatch):
    def full(self, source, target):
        target.write_bytes(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Stage, "_copy_file", full)
    assert node.open().copy("data", node.files()) is None
    assert "No space left on device" in node.said[0]
    assert [path.name for path in node.home.iterdir()] == ["lock"]


def test_a_stop_signal_ends_copying_within_a_block(node):
    with pytest.raises(DecodingStopped):
        node.open(keep_going=lambda: False).copy("data", node.files())
    assert [path.name for path in node.home.iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("wanted", "environment", "where"),
    [
        ("auto", {"SLURM_TMPDIR": "a", "TMPDIR": "b"}, "a"),
        ("auto", {"SLURM_TMPDIR": "missing", "TMPDIR": "b"}, "b"),
        ("$LOCAL/b", {"LOCAL": "."}, "b"),
        ("${LOCAL}/b", {"LOCAL": "."}, "b"),
        ("a", {}, "a"),
    ],
)
def test_the_place_is_found_by_the_nodes_own_variables(tmp_path, monkeypatch, wanted, environment, where):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(name).mkdir()
    assert place(wanted, SCRATCH, environment) == tmp_path / where


@pytest.mark.parametrize(
    ("wanted", "environment", "reason"),
    [
        ("auto", {}, "no folder on this node is named by $SLURM_TMPDIR or $TMPDIR"),
        ("$LOCAL_SCRATCH/x", {}, "$LOCAL_SCRATCH is not set on this node"),
        ("/no/such/disk", {}, "there is no folder /no/such/disk on this node"),
    ],
)
def test_a_place_that_is_not_there_is_said_in_one_line(wanted, environment, reason):
    with pytest.raises(Unusable) as why:
        place(wanted, SCRATCH, environment)
    assert str(why.value) == reason
    said = []
    assert open_stage(wanted, scratch=SCRATCH, say=said.append, environment=environment) is None
    assert said == [f"cluster.staging={wanted}: {reason}; data is read from where it lies"]


def test_a_folder_that_somebody_else_could_have_made_is_not_used(node):
    elsewhere = node.shared / "elsewhere"
    elsewhere.mkdir()
    node.home.symlink_to(elsewhere)
    assert node.open() is None
    assert "is a link" in node.said[0]
    node.home.unlink()
    node.home.mkdir()
    node.home.chmod(0o777)
    assert node.open() is None


def test_what_earlier_jobs_left_is_deleted_and_what_others_use_or_wrote_is_not(node):
    stage = node.open()
    used = stage.copy("used", node.files())
    strange = [node.home / "mine.txt", node.home / "a_folder", node.home / f"data_otherhost_{boot()}"]
    strange[0].touch()
    strange[1].mkdir()
    strange[2].mkdir()
    foreign = node.disk / f"data_{HOST}_{boot()}"
    foreign.mkdir()
    earlier, idle, fresh = (node.home / f"{name}" for name in ("a_H_00000000", "b_H_B", "c_H_B"))
    gone = []
    for path in (earlier, idle, fresh):
        copy = path.with_name(path.name.replace("H", HOST).replace("B", boot()))
        copy.mkdir()
        (copy / "users").touch()
        gone.append(copy)
    os.utime(gone[1] / "users", (0, 0))
    stage.copy("data", node.files())
    assert [copy.exists() for copy in gone] == [False, False, True]
    assert used.exists()
    assert all(path.exists() for path in (*strange, foreign))


def test_unused_copies_make_room_and_used_ones_stay(node, monkeypatch):
    stage = node.open()
    old = stage.copy("old", node.files())
    monkeypatch.setattr(staging, "room", lambda folder: 0 if old.exists() else 10**9)
    assert stage.copy("data", node.files()) is None  # this process uses it
    released()
    assert stage.copy("data", node.files()) is not None
    assert not old.exists()


def final_weights(cell_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((cell_dir / "checkpoints").glob("step_*"))[-1] / "model.safetensors")


UNET = ("model=unet_small", "model.image_size=64", "augment.hflip=0.5")


def test_training_from_the_nodes_disk_is_the_same_bit_for_bit(make_cell, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(room, "SHARED_MEMORY", tmp_path / "none")  # where earlier runs have left decoded images
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    disk = tmp_path / "disk"
    disk.mkdir()
    plain = make_cell("plain", *UNET)
    staged = make_cell("staged", *UNET, f"cluster.staging={disk}", "loader.cache_dir=null")
    nowhere = make_cell("nowhere", *UNET, "cluster.staging=$NO_SUCH_VARIABLE", "loader.cache_dir=null")
    for cell_dir in (plain, staged, nowhere):
        assert run_cell(cell_dir, World()) is None
    ours = final_weights(plain)
    for other in (staged, nowhere):
        theirs = final_weights(other)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert (plain / "per_image.csv").read_text() == (other / "per_image.csv").read_text()
    home = disk / f"bushpc-stage-{os.getuid()}"
    assert len(list(home.glob("phantom-*/*.tar"))) == 2
    assert list((home / "cache").glob("phantom-*/images.npy"))
    said = capfd.readouterr().out
    assert said.count("$NO_SUCH_VARIABLE is not set on this node") == 1


def test_features_are_computed_in_the_shared_folder_and_read_from_the_disk(make_cell, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    frozen = (
        *("model=sam_multitask_small", "model.encoder=frozen", "model.image_size=64", "data.normals=false"),
        *("train.epochs=null", "train.iterations=4", "train.batch_size=4", "model.curriculum=[1,1,1]"),
        *("evaluate.explain=0", "evaluate.metrics=[dice,label_ce]", "loader.features=true", "augment.variants=2"),
        *("augment.strength.benign=0.5", f"loader.features_dir={tmp_path / 'features'}"),
    )
    plain, staged = make_cell("plain", *frozen), make_cell("staged", *frozen, f"cluster.staging={disk}")
    for cell_dir in (plain, staged):
        assert run_cell(cell_dir, World()) is None
    ours, theirs = final_weights(plain), final_weights(staged)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    copies = list((disk / f"bushpc-stage-{os.getuid()}").glob("features-*"))
    assert {copy.name.split("-")[-2] for copy in copies} >= {"plain"}
    assert list((tmp_path / "features").rglob("*.safetensors"))


def test_the_shards_are_read_from_the_copy_and_not_from_the_shared_folder(make_cell, phantom_folder, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    shared = tmp_path / "shards"
    shutil.copytree(phantom_folder, shared)
    cell_dir = make_cell("cell", f"data.root={shared}", f"cluster.staging={disk}")
    cell = CellConfig.load(cell_dir / "config.yaml")
    data = FoldData.open(cell, 0, cell_dir.parent.parent / "folds.csv")
    _, staged = stage_shards(cell, data, open_stage(cell.cluster.staging))
    assert staged.folder != data.folder
    for tar in shared.glob("*.tar"):
        tar.unlink()
    image, mask = decode(staged.folder, data.train[0], 32)
    assert image.shape[:2] == mask.shape == (32, 32)
