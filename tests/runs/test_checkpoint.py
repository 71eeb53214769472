"""Promises of checkpoints: sealed or absent, verified on reading, newest whole one wins, no foreign code runs.

Writers are killed for real here (SIGKILL before each of their file operations, and by the kernel in the middle of a
file), disks are really full (a small tmpfs), and background writers really blocked.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from bushpc.errors import ResumeError
from bushpc.files import sha256_of
from bushpc.runs import checkpoint, frozen_store, retention
from bushpc.runs.retention import Retention
from bushpc.runs.saver import Saver

FILES = ["model.safetensors", "optimizer.safetensors", "meta.json", "seal.json"]


def small_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    return model


def parts_of(step: int, model: nn.Module | None = None) -> checkpoint.Parts:
    """What a step saves: other numbers at every step, and tensors of several types and shapes."""
    frozen = frozen_store.frozen_parameters(model) if model else {}
    state = model.state_dict() if model else {"weight": torch.full((4, 3), step + 0.25)}
    return {
        "model": {name: tensor for name, tensor in state.items() if name not in frozen},
        "optimizer": {"exp_avg/0.weight": torch.full((4, 3), float(step)), "step/0.weight": torch.tensor(float(step))},
    }


def save(folder: Path, step: int, model: nn.Module | None = None, **meta: object) -> Path:
    """Write one as a run does: checkpoints and the store of frozen parameters side by side."""
    sha256 = frozen_store.store_frozen(folder / "frozen", frozen_store.frozen_parameters(model)) if model else None
    return checkpoint.write(folder / "checkpoints", step, parts_of(step, model), {"frozen": sha256, **meta})


def newest(folder: Path, said: list[str] | None = None) -> checkpoint.Checkpoint | None:
    said = [] if said is None else said
    return checkpoint.newest(folder / "checkpoints", folder / "frozen", log=said.append)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_equal(parts: checkpoint.Parts, wanted: checkpoint.Parts) -> None:
    """Bit for bit, names and types included."""
    assert {part: set(tensors) for part, tensors in parts.items()} == {p: set(ts) for p, ts in wanted.items()}
    for part, tensors in wanted.items():
        for name, tensor in tensors.items():
            assert parts[part][name].dtype == tensor.dtype
            assert torch.equal(parts[part][name], tensor)


# What is written comes back


def test_a_checkpoint_gives_back_every_tensor_bit_for_bit(tmp_path):
    model = small_model()
    save(tmp_path, 7, model, settings={"train.lr": 0.1})
    read = newest(tmp_path)
    assert read.step == 7
    assert_equal(read.parts, {**parts_of(7, model), "model": model.state_dict()})
    assert read.meta["settings"] == {"train.lr": 0.1}


def test_every_type_and_shape_comes_back(tmp_path):
    tensors = {
        "bf16": torch.randn(3, 2).bfloat16(),
        "fp16": torch.randn(3).half(),
        "count": torch.tensor(2**60),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 5),
        "nan": torch.tensor([0.0, -0.0, float("inf")]),
    }
    checkpoint.write(tmp_path / "checkpoints", 1, {"model": tensors}, {"frozen": None})
    assert_equal(newest(tmp_path).parts, {"model": tensors})


def test_frozen_parameters_are_stored_once_for_all_checkpoints(tmp_path):
    model = small_model()
    first, second = save(tmp_path, 1, model), save(tmp_path, 2, model)
    assert len(names(tmp_path / "frozen")) == 1
    assert first != second
    assert "2.weight" not in checkpoint.load_file(second / "model.safetensors")


def test_whoever_may_read_a_run_may_read_its_weights(tmp_path):
    path = save(tmp_path, 1, small_model())
    modes = {stat.S_IMODE((path / name).stat().st_mode) for name in FILES}
    (tmp_path / "plain").write_text("")
    assert modes == {stat.S_IMODE((tmp_path / "plain").stat().st_mode)}


def test_a_whole_checkpoint_is_never_replaced(tmp_path):
    save(tmp_path, 1)
    checkpoint.write(tmp_path / "checkpoints", 1, parts_of(99), {"frozen": None})
    assert_equal(newest(tmp_path).parts, parts_of(1))


def test_a_damaged_one_of_the_same_step_makes_way_and_is_kept_aside(tmp_path):
    for _ in range(2):
        (save(tmp_path, 1) / "model.safetensors").write_bytes(b"damaged")
    save(tmp_path, 1)
    assert_equal(newest(tmp_path).parts, parts_of(1))
    assert names(tmp_path / "checkpoints") == ["step_00000001", "unread_step_00000001", "unread_step_00000001.2"]


def test_copies_that_a_user_keeps_beside_them_are_left_alone(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        shutil.copytree(save(tmp_path, step), folder / f"step_0000000{step}.mine")
    assert checkpoint.steps(folder) == [1, 2]
    assert newest(tmp_path).step == 2
    checkpoint.set_aside_after(folder, 1)
    retention.retain(folder, Retention(keep=1))
    assert names(folder) == ["step_00000001", "step_00000001.mine", "step_00000002.mine", "unread_step_00000002"]


def test_there_is_none_before_the_first_one(tmp_path):
    assert newest(tmp_path) is None
    assert checkpoint.steps(tmp_path / "checkpoints") == []
    checkpoint.set_aside_after(tmp_path / "checkpoints", 0)


# Damage


def flip(content: bytes, position: float, bit: int = 0x40) -> bytes:
    """One bit of another value, at this share of the way through."""
    at = min(int(position * len(content)), len(content) - 1)
    return content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]


DAMAGES: dict[str, Callable[[Path], object]] = {
    **{f"bit at {at:.0%}": lambda p, at=at: p.write_bytes(flip(p.read_bytes(), at)) for at in (0, 0.3, 0.5, 0.8, 1)},
    **{f"lowest bit at {at:.0%}": lambda p, at=at: p.write_bytes(flip(p.read_bytes(), at, 1)) for at in (0.1, 0.9)},
    **{f"cut at {at:.0%}": lambda p, at=at: os.truncate(p, int(at * p.stat().st_size)) for at in (0, 0.01, 0.5, 0.9)},
    "last byte cut": lambda p: os.truncate(p, p.stat().st_size - 1),
    "longer by a byte": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
    "zeros": lambda p: p.write_bytes(bytes(p.stat().st_size)),
    "garbage": lambda p: p.write_bytes(b"\xff" * 64),
    "removed": lambda p: p.unlink(),
    "a folder": lambda p: (p.unlink(), p.mkdir()),
    "a symlink loop": lambda p: (p.unlink(), p.symlink_to(p.name)),
    "a device": lambda p: (p.unlink(), p.symlink_to("/dev/zero")),
    "a pipe": lambda p: (p.unlink(), os.mkfifo(p)),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, name, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    DAMAGES[damage](path / name)
    said: list[str] = []
    assert_equal(newest(tmp_path, said).parts, parts_of(1))
    assert len(said) == 1
    assert str(path) in said[0]


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", FILES)
def test_a_file_without_read_permission_is_named(tmp_path, name):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    (path / name).chmod(0)
    said: list[str] = []
    assert newest(tmp_path, said).step == 1
    assert str(path / name) in said[0]


@pytest.mark.parametrize("instead", ["a file", "a symlink loop", "an empty folder", "a dangling link"])
def test_what_stands_in_place_of_a_checkpoint_is_named_and_makes_way(tmp_path, instead):
    save(tmp_path, 1)
    place = tmp_path / "checkpoints" / "step_00000002"
    make = {
        "a file": lambda: place.write_text("x"),
        "a symlink loop": lambda: place.symlink_to(place.name),
        "an empty folder": place.mkdir,
        "a dangling link": lambda: place.symlink_to("nowhere"),
    }
    make[instead]()
    said: list[str] = []
    assert newest(tmp_path, said).step == 1
    assert str(place) in said[0]
    save(tmp_path, 2)
    assert_equal(newest(tmp_path).parts, parts_of(2))
    for step in (3, 4):
        save(tmp_path, step)
    retention.retain(tmp_path / "checkpoints", Retention(keep=1))
    assert names(tmp_path / "checkpoints") == ["step_00000004", "unread_step_00000002"]


def test_a_checkpoint_under_another_steps_name_is_refused(tmp_path):
    save(tmp_path, 1).rename(tmp_path / "checkpoints" / "step_00000900")
    with pytest.raises(ResumeError, match="is of step 1"):
        checkpoint.read(tmp_path / "checkpoints" / "step_00000900", tmp_path / "frozen")


def test_nothing_that_the_seal_does_not_cover_is_read(tmp_path):
    path = save(tmp_path, 1)
    hashes = json.loads((path / "seal.json").read_text())
    for left_out in ("model.safetensors", "meta.json"):
        (path / "seal.json").write_text(json.dumps({name: h for name, h in hashes.items() if name != left_out}))
        with pytest.raises(ResumeError, match=left_out):
            checkpoint.read(path, tmp_path / "frozen")


def test_a_damaged_frozen_file_is_refused_and_storing_it_again_mends_it(tmp_path):
    model = small_model()
    path = save(tmp_path, 1, model)
    [frozen] = (tmp_path / "frozen").iterdir()
    frozen.write_bytes(frozen.read_bytes()[:-4])
    with pytest.raises(ResumeError, match="frozen parameters"):
        checkpoint.read(path, tmp_path / "frozen")
    frozen_store.store_frozen(tmp_path / "frozen", frozen_store.frozen_parameters(model))
    assert_equal({"model": newest(tmp_path).parts["model"]}, {"model": model.state_dict()})


def test_a_folder_that_cannot_be_listed_is_no_reason_to_begin_anew(tmp_path):
    (tmp_path / "checkpoints").write_text("not a folder")
    with pytest.raises(ResumeError, match=r"the checkpoints in .* cannot be listed"):
        newest(tmp_path)


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_with_code_is_refused_without_running_it(tmp_path, name):
    trace = tmp_path / "foreign code ran"
    path = save(tmp_path, 1)
    (path / name).write_bytes(pickle.dumps(Evil(trace)))
    if name != "seal.json":  # even when the seal was forged as well
        seal = json.loads((path / "seal.json").read_text()) | {name: sha256_of(path / name)}
        (path / "seal.json").write_text(json.dumps(seal))
    with pytest.raises(ResumeError):
        checkpoint.read(path, tmp_path / "frozen")
    assert not trace.exists()


# Retention


def test_an_unfinished_write_is_no_checkpoint(tmp_path):
    save(tmp_path, 1)
    for writer in ("1", f"host.{os.getpid()}"):  # process ids repeat, in containers at every start
        (tmp_path / "checkpoints" / f".step_00000002.{writer}").mkdir()
    assert newest(tmp_path).step == 1
    retention.retain(tmp_path / "checkpoints", Retention(keep=1))
    assert names(tmp_path / "checkpoints") == ["step_00000001"]


def kept(folder: Path, rule: Retention) -> list[int]:
    retention.retain(folder / "checkpoints", rule)
    return checkpoint.steps(folder / "checkpoints")


def test_retention_keeps_the_newest(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)
    assert kept(tmp_path, Retention(keep=2)) == [20, 30]


def test_retention_keeps_every_nth_step(tmp_path):
    for step in range(10, 80, 10):
        save(tmp_path, step)
    assert kept(tmp_path, Retention(keep=1, every=20)) == [20, 40, 60, 70]


@pytest.mark.parametrize(("more", "best"), [(True, 30), (False, 20)])
def test_retention_keeps_the_best(tmp_path, more, best):
    dice = {10: float("nan"), 20: 0.1, 30: 0.9, 40: 0.5, 50: None, 60: "0.95?", 70: 0.7}
    for step, value in dice.items():
        save(tmp_path, step, validation=None if value is None else {"dice": value, "iou": 0.99 if step == 10 else 0})
    assert kept(tmp_path, Retention(keep=2, best="dice", more=more)) == [best, 60, 70]


def test_the_best_stays_until_a_better_one_comes(tmp_path):
    for step, dice in ((10, 0.4), (20, 0.8), (30, 0.6), (40, 0.7), (50, 0.9), (60, 0.1)):
        save(tmp_path, step, validation={"dice": dice})
        kept(tmp_path, Retention(keep=1, best="dice"))
        assert checkpoint.steps(tmp_path / "checkpoints") == sorted(
            {step, 10 if step < 20 else 20 if step < 50 else 50}
        )


def test_nothing_is_deleted_while_the_newest_does_not_verify(tmp_path):
    for step in (10, 20, 30):
        path = save(tmp_path, step)
    (path / "optimizer.safetensors").write_bytes(b"the disk lied")
    said: list[str] = []
    retention.retain(tmp_path / "checkpoints", Retention(keep=1), said.append)
    assert checkpoint.steps(tmp_path / "checkpoints") == [10, 20, 30]
    assert "step_00000030" in said[0]
    assert newest(tmp_path).step == 20


def test_a_run_that_walked_back_keeps_what_it_writes_next(tmp_path):
    for step in (100, 200, 300):
        path = save(tmp_path, step)
        if step > 100:
            (path / "model.safetensors").write_bytes(b"damaged")
    assert newest(tmp_path).step == 100
    checkpoint.set_aside_after(tmp_path / "checkpoints", 100)
    save(tmp_path, 150)
    assert kept(tmp_path, Retention(keep=2)) == [100, 150]
    assert newest(tmp_path).step == 150
    aside = ["unread_step_00000200", "unread_step_00000300"]
    assert names(tmp_path / "checkpoints") == ["step_00000100", "step_00000150", *aside]


def test_checkpoints_that_cannot_be_read_for_a_while_are_not_deleted(tmp_path):
    for _ in range(2):  # set aside twice, under two names
        save(tmp_path, 100, small_model())
        (tmp_path / "frozen").rename(tmp_path / "away")
        assert newest(tmp_path) is None
        checkpoint.set_aside_after(tmp_path / "checkpoints", 0)
        (tmp_path / "away").rename(tmp_path / "frozen")
    for name in ("unread_step_00000100", "unread_step_00000100.2"):
        assert checkpoint.read(tmp_path / "checkpoints" / name, tmp_path / "frozen").step == 100


# Kill -9 at every step


# Audited by Python: everything that opens, makes, renames or deletes.
EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "os.chmod"}


class Killer:
    """SIGKILL to this process before its n-th file operation; the audit hook sees most, and the rest tells it.

    Between two operations a buffered write may be pending, which dies with the process, and a file that safetensors
    writes itself is also left half-written.
    """

    def __init__(self, n: int) -> None:
        self.left = n
        self.fsync, self.save_file = os.fsync, checkpoint.save_file

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, arguments: tuple) -> None:
        if event in EVENTS:
            self.count()

    def flush(self, descriptor: int) -> None:
        self.count()
        self.fsync(descriptor)

    def write_tensors(self, tensors: dict[str, torch.Tensor], path: Path) -> None:
        self.count()
        content = frozen_store.save(tensors)
        for length in (0, 8, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:length])
            self.count()
        self.save_file(tensors, path)

    def install(self) -> None:
        os.fsync, checkpoint.save_file = self.flush, self.write_tensors
        sys.addaudithook(self.audit)


def in_child(work: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> int:
    """The status that a forked process ends with: 0 for done, else the signal that killed it as a negative number."""
    child = os.fork()
    if child == 0:
        try:
            prepare()
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    deadline = time.monotonic() + 60
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the writer hangs")
        time.sleep(0.0005)


def killed_everywhere(work: Callable[[Path], object], start: Path, place: Path, least: int) -> Iterator[None]:
    """For n = 1, 2, …: `place` as a copy of `start` in which `work` was killed before its n-th file operation.

    The last n is the one that `work` survived. It must have been killed at least `least` times before.
    """
    for n in itertools.count(1):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(start, place, symlinks=True)
        status = in_child(lambda: work(place), Killer(n).install)
        assert status in (0, -signal.SIGKILL)
        yield
        if status == 0:
            assert n > least
            return


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 10, 20 and 30."""
    folder = tmp_path / "start"
    for step in (10, 20, 30):
        save(folder, step)
    return folder


def test_kill_9_anywhere_in_a_write_leaves_the_old_one_or_the_new_one(tmp_path, start):
    seen = []
    for _ in killed_everywhere(lambda run: save(run, 40), start, tmp_path / "run", least=35):
        found = newest(tmp_path / "run")
        seen.append(found.step)
        assert found.step in (30, 40)
        assert_equal(found.parts, parts_of(found.step))
        assert_equal(checkpoint.read(tmp_path / "run" / "checkpoints" / "step_00000030", start).parts, parts_of(30))
        save(tmp_path / "run", 50)
        assert kept(tmp_path / "run", Retention(keep=2)) == [found.step, 50]
        assert names(tmp_path / "run" / "checkpoints") == [f"step_000000{found.step}", "step_00000050"]
        assert_equal(newest(tmp_path / "run").parts, parts_of(50))
    assert seen == sorted(seen)  # there is one moment at which the new one is there
    assert {30, 40} == set(seen)


def test_kill_9_anywhere_in_replacing_a_damaged_one_keeps_the_one_before(tmp_path, start):
    (start / "checkpoints" / "step_00000030" / "model.safetensors").write_bytes(b"damaged")
    for _ in killed_everywhere(lambda run: save(run, 30), start, tmp_path / "run", least=35):
        found = newest(tmp_path / "run")
        assert_equal(found.parts, parts_of(found.step))
        assert found.step in (20, 30)
    assert found.step == 30


def test_kill_9_anywhere_in_retention_keeps_the_newest_and_never_half_of_an_old_one(tmp_path, start):
    def clear(run: Path) -> None:
        retention.retain(run / "checkpoints", Retention(keep=1))

    for _ in killed_everywhere(clear, start, tmp_path / "run", least=12):
        for step in checkpoint.steps(tmp_path / "run" / "checkpoints"):
            path = tmp_path / "run" / "checkpoints" / f"step_{step:08d}"
            assert_equal(checkpoint.read(path, start).parts, parts_of(step))
        assert newest(tmp_path / "run").step == 30
        clear(tmp_path / "run")
        assert names(tmp_path / "run" / "checkpoints") == ["step_00000030"]


def test_kill_9_anywhere_in_setting_aside_loses_nothing(tmp_path, start):
    def set_aside(run: Path) -> None:
        checkpoint.set_aside_after(run / "checkpoints", 10)

    for _ in killed_everywhere(set_aside, start, tmp_path / "run", least=2):
        set_aside(tmp_path / "run")
        folder = tmp_path / "run" / "checkpoints"
        assert names(folder) == ["step_00000010", "unread_step_00000020", "unread_step_00000030"]
        assert [checkpoint.read(path, start).step for path in sorted(folder.iterdir())] == [10, 20, 30]


def test_kill_9_anywhere_in_storing_frozen_parameters_leaves_them_whole_or_absent(tmp_path):
    (tmp_path / "start").mkdir()
    frozen = {"weight": torch.arange(50.0)}
    store = tmp_path / "run" / "frozen"
    for _ in killed_everywhere(
        lambda run: frozen_store.store_frozen(run / "frozen", frozen), tmp_path / "start", tmp_path / "run", least=5
    ):
        for path in store.glob("[!.]*") if store.exists() else ():
            assert sha256_of(path) == path.stem
        sha256 = frozen_store.store_frozen(store, frozen)
        assert names(store) == [f"{sha256}.safetensors"]  # nor does a killed writer's half take room for ever
        assert_equal({"frozen": checkpoint.load_file(store / f"{sha256}.safetensors")}, {"frozen": frozen})


def test_a_cell_whose_half_was_cleared_away_by_another_that_stored_the_same_goes_on(tmp_path, monkeypatch):
    frozen = {"weight": torch.arange(50.0)}
    theirs = frozen_store.store_frozen(tmp_path / "theirs", frozen)

    def lose_the_race(target: Path, content: bytes) -> None:
        shutil.copytree(tmp_path / "theirs", target.parent, dirs_exist_ok=True)
        raise FileNotFoundError(target)

    monkeypatch.setattr(frozen_store, "write_atomically", lose_the_race)
    assert frozen_store.store_frozen(tmp_path / "frozen", frozen) == theirs


@pytest.mark.parametrize("limit", [0, 1, 40, 120, 300, 2000, 20000])
def test_a_writer_that_the_kernel_kills_in_the_middle_of_a_file_leaves_the_old_one(tmp_path, limit):
    """limit: bytes into any file. SIGXFSZ ends the process inside the system call that writes."""
    save(tmp_path, 1)

    def limit_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    parts = {"model": {"weight": torch.zeros(6000)}}
    status = in_child(lambda: checkpoint.write(tmp_path / "checkpoints", 2, parts, {"frozen": None}), limit_files)
    assert status == -signal.SIGXFSZ
    assert_equal(newest(tmp_path).parts, parts_of(1))
    save(tmp_path, 2)
    retention.retain(tmp_path / "checkpoints", Retention(keep=5))
    assert names(tmp_path / "checkpoints") == ["step_00000001", "step_00000002"]


# In the background


def triples(step: int) -> Iterator[tuple[str, str, torch.Tensor]]:
    for part, tensors in parts_of(step).items():
        for name, tensor in tensors.items():
            yield part, name, tensor


class Blocked:
    """Writers that wait for `go` before they write."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.began = threading.Event(), threading.Event()
        self.write, self.written = checkpoint.write, []
        monkeypatch.setattr("bushpc.runs.saver.write", self.wait_and_write)

    def wait_and_write(self, folder: Path, step: int, *rest: object) -> Path:
        self.began.set()
        assert self.go.wait(30)
        self.written.append(step)
        return self.write(folder, step, *rest)


@pytest.fixture
def blocked(monkeypatch) -> Iterator[Blocked]:
    blocked = Blocked(monkeypatch)
    yield blocked
    blocked.go.set()


def saver(folder: Path, said: list[str] | None = None, still_ours: Callable[[], None] = lambda: None) -> Saver:
    return Saver(folder / "checkpoints", Retention(keep=2), still_ours, ([] if said is None else said).append)


def test_the_loop_waits_for_the_copy_alone(tmp_path, blocked):
    saving = saver(tmp_path)
    saving.save(1, triples(1), {"frozen": None})
    assert blocked.began.wait(30)  # save has returned, and the writer stands
    assert newest(tmp_path) is None
    blocked.go.set()
    saving.finish()
    assert_equal(newest(tmp_path).parts, parts_of(1))


def test_what_changes_after_the_copy_does_not_change_what_is_written(tmp_path, blocked):
    weight, meta = torch.arange(1000.0), {"frozen": None, "note": "then"}
    saving = saver(tmp_path)
    saving.save(1, [("model", "weight", weight)], meta)
    weight.fill_(-1)
    meta["note"] = "now"
    blocked.go.set()
    saving.finish()
    found = newest(tmp_path)
    assert torch.equal(found.parts["model"]["weight"], torch.arange(1000.0))
    assert found.meta["note"] == "then"


def test_a_second_save_waits_for_the_first_and_neither_mixes_with_the_other(tmp_path, blocked):
    saving = saver(tmp_path)
    saving.save(1, triples(1), {"frozen": None})
    second = threading.Thread(target=lambda: saving.save(2, triples(2), {"frozen": None}))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert blocked.written == []
    blocked.go.set()
    second.join(30)
    saving.finish()
    assert blocked.written == [1, 2]
    for step in (1, 2):  # the copy of the second goes into the memory of the first
        path = tmp_path / "checkpoints" / f"step_0000000{step}"
        assert_equal(checkpoint.read(path, tmp_path).parts, parts_of(step))


def test_parts_that_come_and_go_are_written_as_they_are(tmp_path):
    saving = saver(tmp_path)
    saving.save(1, [("model", "a", torch.ones(2)), ("ema", "a", torch.zeros(2))], {"frozen": None})
    saving.save(2, [("model", "b", torch.ones(3).bfloat16())], {"frozen": None})
    saving.finish()
    assert_equal(newest(tmp_path).parts, {"model": {"b": torch.ones(3).bfloat16()}})


def test_the_saver_clears_away_what_the_rule_does_not_keep(tmp_path):
    saving = saver(tmp_path)
    for step in range(1, 6):
        saving.save(step, triples(step), {"frozen": None})
    saving.finish()
    assert checkpoint.steps(tmp_path / "checkpoints") == [4, 5]


class LostLease:
    """`still_ours` that raises from the n-th question on."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self) -> None:
        self.left -= 1
        if self.left <= 0:
            raise ResumeError("the lease is another job's")


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("then", ["save", "finish"])
def test_a_lost_lease_ends_the_run_at_the_next_call_and_nothing_is_sealed(tmp_path, n, then):
    save(tmp_path, 1)
    before = names(tmp_path / "checkpoints")
    saving = saver(tmp_path, still_ours=LostLease(n))
    saving.save(2, triples(2), {"frozen": None})
    for _ in range(2 if then == "save" else 1):
        with pytest.raises(ResumeError, match="another job's"):
            saving.finish() if then == "finish" else saving.save(3, triples(3), {"frozen": None})
    assert names(tmp_path / "checkpoints") == before


def test_a_lease_lost_after_the_seal_ends_the_run_and_deletes_nothing(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    saving = saver(tmp_path, still_ours=LostLease(3))
    saving.save(4, triples(4), {"frozen": None})
    with pytest.raises(ResumeError, match="another job's"):
        saving.finish()
    assert checkpoint.steps(tmp_path / "checkpoints") == [1, 2, 3, 4]


def test_an_old_one_that_cannot_be_deleted_does_not_make_the_new_one_a_failure(tmp_path, monkeypatch):
    said: list[str] = []
    saving = saver(tmp_path, said)

    def busy(path: Path, *rest: object, **more: object) -> None:
        if ".deleted" in str(path):
            raise OSError(f"{path} is busy")
        remove(path, *rest, **more)

    remove = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", busy)
    for step in (1, 2, 3):
        saving.save(step, triples(step), {"frozen": None})
    saving.finish()
    assert any("could not be deleted" in line for line in said)
    assert checkpoint.steps(tmp_path / "checkpoints") == [2, 3]
    monkeypatch.undo()
    saving.save(4, triples(4), {"frozen": None})
    saving.finish()
    assert names(tmp_path / "checkpoints") == ["step_00000003", "step_00000004"]


# A full disk


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], check=True, capture_output=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def may_mount(*prefix: str) -> bool:
    command = [
        *prefix,
        "sh",
        "-c",
        'd=$(mktemp -d) && mount -t tmpfs tmpfs "$d" && umount "$d"; s=$?; rmdir "$d"; exit $s',
    ]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def on_a_small_disk(test: Callable[[Path], None]) -> Callable[[Path], None]:
    """Runs `test(disk)` on a disk of its own: here where we may mount, else as root of a user namespace of its own."""

    @functools.wraps(test)
    def run(tmp_path: Path) -> None:
        if may_mount():
            with small_disk(tmp_path / "disk") as disk:
                test(disk)
        elif may_mount("unshare", "--map-root-user", "--mount"):
            command = ["unshare", "--map-root-user", "--mount", sys.executable, __file__, test.__name__, str(tmp_path)]
            ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
            assert ended.returncode == 0, ended.stderr
        else:
            pytest.skip("no right to mount a tmpfs here, nor to make a user namespace in which there is one")

    del run.__wrapped__  # else pytest asks for the fixture `disk`
    run.on_disk = test
    return pytest.mark.real(run)


def fill(disk: Path, leave: int = 0) -> Path:
    """Write until nothing more goes in, then give `leave` bytes back."""
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
        for size in (1 << 16, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass
    os.truncate(ballast, ballast.stat().st_size - leave)
    return ballast


@on_a_small_disk
def test_a_full_disk_keeps_the_old_one_and_the_run_goes_on(disk):
    said: list[str] = []
    saving = saver(disk, said)
    saving.save(1, triples(1), {"frozen": None})
    saving.finish()
    ballast = fill(disk)
    before = names(disk / "checkpoints")
    for step in (2, 3):  # training goes on
        saving.save(step, triples(step), {"frozen": None})
    with pytest.raises(ResumeError, match=r"(?s)No space left.*step 1, which is intact.*Free some space"):
        saving.finish()
    assert [line.partition(" could")[0] for line in said] == ["checkpoint of step 2", "checkpoint of step 3"]
    assert all("No space left" in line and "step 1 is kept" in line for line in said)
    assert names(disk / "checkpoints") == before
    assert_equal(newest(disk).parts, parts_of(1))

    ballast.unlink()
    saving.save(4, triples(4), {"frozen": None})
    saving.finish()
    assert len(said) == 2
    assert_equal(newest(disk).parts, parts_of(4))


@on_a_small_disk
def test_wherever_the_room_ends_the_old_one_stays(disk):
    weights = {"model": {"weight": torch.arange(5000.0)}, "optimizer": {"exp_avg": torch.arange(9000.0)}}
    save(disk, 1)
    results = set()
    for pages in range(0, 22, 2):
        ballast = fill(disk, leave=pages * 4096)
        failure = ""
        try:
            checkpoint.write(disk / "checkpoints", 2, weights, {"frozen": None})
        except OSError as error:
            failure = str(error)
        if failure:
            assert "No space left" in failure
            assert names(disk / "checkpoints") == ["step_00000001"]
        assert_equal(newest(disk).parts, parts_of(1) if failure else weights)
        results.add("no room" if failure else "written")
        shutil.rmtree(disk / "checkpoints" / "step_00000002", ignore_errors=True)
        ballast.unlink()
    assert results == {"no room", "written"}


@on_a_small_disk
def test_frozen_parameters_without_room_are_an_error_that_says_what_to_do(disk):
    ballast = fill(disk, leave=8192)
    frozen = {"weight": torch.zeros(50_000)}
    with pytest.raises(ResumeError, match=r"(?s)No space left.*free some space"):
        frozen_store.store_frozen(disk / "frozen", frozen)
    assert names(disk / "frozen") == []
    ballast.unlink()
    sha256 = frozen_store.store_frozen(disk / "frozen", frozen)
    assert names(disk / "frozen") == [f"{sha256}.safetensors"]


@on_a_small_disk
def test_curves_and_heartbeat_on_a_full_disk_never_end_a_run(disk):
    from bushpc.train.track import Tracker

    (disk / "cell").mkdir()
    ballast = fill(disk)
    tracker = Tracker(disk / "cell", total=10, active=True)
    tracker.phase("training", 0)
    for step in range(1, 4):
        tracker.train(step, 0.5, {"dice": 0.5}, lr=1e-3)
        tracker.validation(step, {"dice": 0.5})
        tracker.alive(step)
    ballast.unlink()
    tracker.train(4, 0.25, {"dice": 0.25}, lr=1e-3)
    tracker.phase("done", 10)
    written = [json.loads(line) for line in (disk / "cell" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == [4]
    assert json.loads((disk / "cell" / "state.json").read_text())["phase"] == "done"


if __name__ == "__main__":  # one test, in a mount namespace that `on_a_small_disk` made
    with small_disk(Path(sys.argv[2]) / "disk") as disk:
        globals()[sys.argv[1]].on_disk(disk)
