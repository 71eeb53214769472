"""Promises of the energy account, against a stand-in for the driver: what is counted, and that it can be missing."""

from __future__ import annotations

import sys
import types

import pytest

from bushpc.runs.goodput import read_attempts
from bushpc.runs.records import Heartbeat
from bushpc.train.energy import EnergyMeter
from bushpc.train.track import Tracker


class Driver(types.ModuleType):
    """pynvml with four GPUs; `millijoules` are their counters, a missing one cannot be read."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.millijoules: dict[int, int] = {0: 5_000, 1: 7_000, 2: 0, 3: 100}

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 4

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return {"GPU-d": 3}[uuid]

    def nvmlDeviceGetTotalEnergyConsumption(self, device: int) -> int:
        if device not in self.millijoules:
            raise self.NVMLError
        return self.millijoules[device]


@pytest.fixture
def driver(monkeypatch) -> Driver:
    driver = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return driver


@pytest.mark.parametrize(
    ("visible", "gpus", "joules"),
    [
        (None, 1, 1.0),  # the first of those on the machine
        ("1,2", 2, 2.0 + 4.0),
        ("1, 2", 6, (2.0 + 4.0) * 3),  # two of this node's, and as many on each of two others
        ("GPU-d", 1, 8.0),
    ],
)
def test_joules_are_those_of_the_visible_gpus_since_the_begin_and_of_the_others_as_much(
    driver, monkeypatch, visible, gpus, joules
):
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    meter = EnergyMeter(gpus)
    assert meter.joules() == 0
    for device, drawn in enumerate((1_000, 2_000, 4_000, 8_000)):
        driver.millijoules[device] += drawn
    assert meter.joules() == pytest.approx(joules)


def test_an_attempt_carries_its_energy_in_the_heartbeat_and_at_its_end(driver, tmp_path):
    tracker = Tracker(tmp_path, 10, active=True, ranks=2, gpus=2)
    driver.millijoules[1] += 3_000
    tracker.phase("training", 1)
    assert [attempt.energy_j for attempt in read_attempts(tmp_path)] == [3.0]
    driver.millijoules[0] += 500
    tracker.phase("done", 10)
    assert [attempt.energy_j for attempt in read_attempts(tmp_path, Heartbeat())] == [3.5]


def test_without_a_driver_or_a_counter_there_is_no_number(driver, monkeypatch):
    meter = EnergyMeter(2)
    del driver.millijoules[1]
    assert meter.joules() is None
    assert EnergyMeter(0).joules() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # its import fails
    assert EnergyMeter(2).joules() is None
