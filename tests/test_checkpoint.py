"""Promises of checkpoints: sealed or absent, verified on reading, newest whole one wins, no foreign code runs."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from torch import nn

from bushpc import checkpoint
from bushpc.errors import ResumeError


def small_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    return model


def save(folder, step, model):
    trained, frozen = checkpoint.split_state(model)
    sha256 = checkpoint.store_frozen(folder / "frozen", frozen)
    state = {"optimizer": {"state": {0: {"exp_avg": torch.full((2,), float(step))}}}, "scaler": None}
    return checkpoint.write(folder / "checkpoints", step, trained, state, {"config": "abc", "frozen": sha256})


def newest(folder, said=None):
    said = [] if said is None else said
    return checkpoint.newest(folder / "checkpoints", folder / "frozen", log=said.append)


def test_a_checkpoint_gives_back_every_tensor_bit_for_bit(tmp_path):
    model = small_model()
    save(tmp_path, 7, model)
    read = newest(tmp_path)
    assert read.step == 7
    assert read.model.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.model[name], tensor)
    assert torch.equal(read.state["optimizer"]["state"][0]["exp_avg"], torch.full((2,), 7.0))


def test_frozen_parameters_are_stored_once_for_all_checkpoints(tmp_path):
    model = small_model()
    first, second = save(tmp_path, 1, model), save(tmp_path, 2, model)
    assert len(list((tmp_path / "frozen").iterdir())) == 1
    assert first != second


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "meta.json", "seal.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "garbage"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, name, damage):
    model = small_model()
    save(tmp_path, 1, model)
    path = save(tmp_path, 2, model) / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        content[len(content) // 2] ^= 0x40
        path.write_bytes(
            {"flip": bytes(content), "truncate": content[: len(content) // 2], "garbage": b"\xff" * 64}[damage]
        )
    said: list[str] = []
    assert newest(tmp_path, said).step == 1
    assert "step_00000002" in said[0]


def test_a_damaged_frozen_file_is_refused(tmp_path):
    save(tmp_path, 1, small_model())
    [path] = (tmp_path / "frozen").iterdir()
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ResumeError, match="frozen parameters"):
        checkpoint.read(tmp_path / "checkpoints" / "step_00000001", tmp_path / "frozen")


def test_an_unfinished_write_is_no_checkpoint(tmp_path):
    save(tmp_path, 1, small_model())
    (tmp_path / "checkpoints" / ".step_00000002.1").mkdir()
    assert newest(tmp_path).step == 1
    checkpoint.retain(tmp_path / "checkpoints", 1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


def test_retention_keeps_the_newest(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, small_model())
    checkpoint.retain(tmp_path / "checkpoints", 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000020", "step_00000030"]


def test_a_run_that_walked_back_keeps_what_it_writes_next(tmp_path):
    for step in (100, 200, 300):
        path = save(tmp_path, step, small_model())
        if step > 100:
            (path / "model.safetensors").write_bytes(b"damaged")
    assert newest(tmp_path).step == 100
    checkpoint.set_aside_after(tmp_path / "checkpoints", 100)
    save(tmp_path, 150, small_model())
    checkpoint.retain(tmp_path / "checkpoints", 2)
    assert newest(tmp_path).step == 150
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_00000100", "step_00000150", "unread_step_00000200", "unread_step_00000300"]


def test_checkpoints_that_cannot_be_read_for_a_while_are_not_deleted(tmp_path):
    save(tmp_path, 100, small_model())
    (tmp_path / "frozen").rename(tmp_path / "away")
    assert newest(tmp_path) is None
    checkpoint.set_aside_after(tmp_path / "checkpoints", 0)
    (tmp_path / "away").rename(tmp_path / "frozen")
    assert checkpoint.read(tmp_path / "checkpoints" / "unread_step_00000100", tmp_path / "frozen").step == 100


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('foreign code ran')",)


def test_a_pickle_with_code_is_refused_without_running_it(tmp_path):
    path = save(tmp_path, 1, small_model())
    (path / "state.pt").write_bytes(pickle.dumps(Evil()))
    seal = json.loads((path / "seal.json").read_text())
    seal["state.pt"] = checkpoint.sha256_of(path / "state.pt")  # even when the seal was forged as well
    (path / "seal.json").write_text(json.dumps(seal))
    with pytest.raises(ResumeError):
        checkpoint.read(path, tmp_path / "frozen")
