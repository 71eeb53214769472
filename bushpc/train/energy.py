"""What a cell's GPUs draw: the driver's own counters (NVML) → `Attempt.energy_j`."""

from __future__ import annotations

import os
import typing as t


class EnergyMeter:
    """Joules that the GPUs of this attempt drew since the meter was made; None where no driver tells.

    gpus: of the attempt, all nodes together. Counted are those of them that this process sees, as a rule all of its
    node; GPUs of other nodes are taken to draw as much as these do on average. A counter is the whole device's: idle
    power is in it, and so is what others do on a GPU that they share.
    """

    def __init__(self, gpus: int) -> None:
        self._gpus = gpus
        self._nvml: t.Any
        self._nvml, self._devices = _open(gpus) if gpus else (None, [])
        self._begin = self._read()

    def joules(self) -> float | None:
        """So far. Counters of GPUs before Volta, and of MIG slices, do not exist."""
        now = self._read()
        if now is None or self._begin is None:
            return None
        # A driver that was loaded again counts from 0.
        return max(0.0, now - self._begin) * self._gpus / len(self._devices)

    def _read(self) -> float | None:
        if not self._devices:
            return None
        try:
            millijoules = [self._nvml.nvmlDeviceGetTotalEnergyConsumption(device) for device in self._devices]
        except self._nvml.NVMLError:
            return None
        return sum(millijoules) / 1000


def _open(gpus: int) -> tuple[t.Any, list[t.Any]]:
    """NVML and the devices that this process sees, `gpus` of them at most; none without a driver that answers."""
    try:
        import pynvml
    except ImportError:
        return None, []
    try:
        pynvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.replace(" ", "").split(",") if visible else [str(i) for i in range(pynvml.nvmlDeviceGetCount())]
        # NVML counts in the order of the PCI bus, CUDA from the fastest: the same among GPUs of one kind.
        return pynvml, [
            pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdecimal() else pynvml.nvmlDeviceGetHandleByUUID(name)
            for name in names[:gpus]
        ]
    except pynvml.NVMLError:
        return None, []
