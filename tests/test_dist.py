"""Promises between ranks: a rendezvous that is never stale, never fixed, and never an address that leads nowhere."""

from __future__ import annotations

import hashlib
import json
import os
import socket

import pytest
import torch

from bushpc.dist import World, any_rank, gather, keyed_seed, meet, reachable_address, seed_everything, share_buffers
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
    assert any_rank(True, False, device=torch.device("cpu")) == (True, False)
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
