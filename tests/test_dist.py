"""Promises between ranks: a rendezvous that is never stale, never fixed, and never an address that leads nowhere."""

from __future__ import annotations

import hashlib
import json
import os
import socket

import pytest
import torch

from bushpc.cluster.base import this_step
from bushpc.dist import (
    World,
    any_rank,
    gather,
    gpu_of,
    join,
    keyed_seed,
    meet,
    reachable_address,
    seed_everything,
    share_buffers,
)
from bushpc.errors import TrainingError


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "unset")
    monkeypatch.setenv("MASTER_PORT", "unset")


def note_of(folder, attempt):
    return folder / f"rendezvous-{hashlib.sha256(attempt.encode()).hexdigest()[:16]}.json"


def test_rank_0_offers_a_free_port_and_the_others_find_it(tmp_path):
    meet(World(rank=0, size=2), tmp_path, "job-1")
    offered = (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
    with socket.socket() as probe:
        probe.bind((offered[0], int(offered[1])))
    os.environ.update(MASTER_ADDR="", MASTER_PORT="")
    meet(World(rank=1, size=2), tmp_path, "job-1")
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == offered


def test_the_address_of_an_earlier_attempt_is_not_read(tmp_path, monkeypatch):
    meet(World(rank=0, size=2), tmp_path, "job-1-restart-0")
    monkeypatch.setattr("bushpc.dist.RENDEZVOUS_TIMEOUT_S", 0.2)
    with pytest.raises(TrainingError, match=r"waited .* for rank 0"):
        meet(World(rank=1, size=2), tmp_path, "job-1-restart-1")


def test_a_loopback_address_from_another_host_is_refused(tmp_path):
    note_of(tmp_path, "job").write_text(json.dumps({"address": "127.0.1.1", "port": 1, "host": "somewhere-else"}))
    with pytest.raises(TrainingError, match="which other nodes cannot reach"):
        meet(World(rank=1, size=2), tmp_path, "job")


def test_a_network_address_is_preferred_to_loopback(monkeypatch):
    names = {"node7": "10.0.0.7", "debian": "127.0.1.1"}
    monkeypatch.setattr(socket, "gethostname", lambda: "debian")
    monkeypatch.setattr(socket, "getfqdn", lambda: "debian")
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, *rest: [(0, 0, 0, "", (names[name], 0))])
    assert reachable_address("node7") == "10.0.0.7"
    assert reachable_address() == "127.0.0.1"


def test_alone_everything_is_local():
    assert any_rank(True, False) == (True, False)
    assert gather([1, 2]) == [1, 2]
    share_buffers(torch.nn.BatchNorm1d(2))


def test_seeds_depend_on_every_part_and_on_nothing_else():
    assert keyed_seed(1, "a") == keyed_seed(1, "a")
    assert len({keyed_seed(1, "a"), keyed_seed(1, "b"), keyed_seed(2, "a"), keyed_seed("1", "a")}) == 4
    seed_everything(0, "step", 3)
    first = torch.rand(2)
    torch.rand(5)
    seed_everything(0, "step", 3)
    assert torch.equal(torch.rand(2), first)


@pytest.fixture
def launched_with(monkeypatch):
    """launched_with(RANK="1", …) → the world that a process with these variables sees, and no other launcher's."""

    def world(**variables: str) -> World:
        for name in [name for name in os.environ if name.startswith(("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_"))]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return World.from_environment(this_step())

    return world


SRUN_STEP = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16"}
# Seen in a batch script of two tasks, outside srun.
BATCH_SCRIPT = {"SLURM_NTASKS": "2", "SLURM_NPROCS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def test_the_world_is_the_launchers_then_the_srun_steps_then_one_rank(launched_with):
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert launched_with(**torchrun) == World(rank=3, size=4, local_rank=1)
    assert launched_with(**SRUN_STEP) == World(rank=9, size=16, local_rank=1)
    assert launched_with(**SRUN_STEP, **torchrun) == World(rank=3, size=4, local_rank=1), "torchrun inside a step"
    assert launched_with() == World()


def test_a_batch_script_and_a_step_of_one_task_are_one_rank(launched_with):
    assert launched_with(**BATCH_SCRIPT) == World()
    assert launched_with(**BATCH_SCRIPT, SLURM_STEP_NUM_TASKS="1") == World()


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "0"},
        {"RANK": "two", "WORLD_SIZE": "4", "LOCAL_RANK": "0"},
        {"RANK": "4", "WORLD_SIZE": "4", "LOCAL_RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "3"},
        {"SLURM_STEP_NUM_TASKS": "2"},
    ],
    ids=["alone", "no number", "beyond the world", "more local than global", "a step without a task"],
)
def test_variables_that_make_no_world_are_refused_by_name(launched_with, variables):
    with pytest.raises(TrainingError, match=f"{next(iter(variables))}='.*do not name a rank"):
        launched_with(**variables)


@pytest.mark.parametrize(
    ("local_rank", "visible", "gpu"), [(0, 1, 0), (3, 4, 3), (3, 1, 0)], ids=["one of all", "last of four", "bound"]
)
def test_a_rank_drives_its_own_gpu_also_where_it_sees_no_other(local_rank, visible, gpu):
    assert gpu_of(local_rank, visible) == gpu


@pytest.mark.parametrize(("visible", "gpu"), [(4, 3), (1, 0)], ids=["four seen", "one bound"])
def test_a_rank_takes_its_gpu_before_nccl_opens_and_flags_go_by_gloo(monkeypatch, visible, gpu):
    calls = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: calls.append(number))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *words, **given: calls.append((words, given)))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    join(World(rank=7, size=8, local_rank=3), cuda=True, timeout_s=90)
    first, ((backend,), given) = calls
    assert first == gpu
    assert backend == "cpu:gloo,cuda:nccl"
    assert (given["rank"], given["world_size"], given["store"]) == (7, 8, None)
    assert given["timeout"].total_seconds() == 90
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("7", "8", "3")


def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(TrainingError, match=r"rank 2 .* sees 2 GPUs: set cluster\.ranks_per_node"):
        gpu_of(2, 2)
