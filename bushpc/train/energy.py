"""Energy used by a cell's GPUs: the driver's counters (NVML) → `Attempt.energy_j`."""

from __future__ import annotations

import os
import typing as t


class EnergyMeter:
    """Joules used by this attempt's GPUs since the meter was created; None if the driver has no counters.

    gpus: of the attempt, summed over nodes. The meter reads the GPUs that this process sees, usually all of its node,
    and assumes that GPUs of other nodes use the same on average. A counter covers the whole device, including idle
    power and other users of a shared GPU.
    """

    def __init__(self, gpus: int) -> None:
        self._gpus = gpus
        self._nvml: t.Any
        self._nvml, self._devices = _open(gpus) if gpus else (None, [])
        self._begin = self._read()

    def joules(self) -> float | None:
        """Joules so far. GPUs before Volta and MIG slices have no counters."""
        now = self._read()
        if now is None or self._begin is None:
            return None
        # Reloading the driver resets the counters to 0.
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
    """NVML and at most `gpus` of the devices that this process sees; no devices without a working driver."""
    try:
        import pynvml
    except ImportError:
        return None, []
    try:
        pynvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.replace(" ", "").split(",") if visible else [str(i) for i in range(pynvml.nvmlDeviceGetCount())]
        # NVML numbers GPUs in PCI bus order, CUDA by speed; the orders agree for GPUs of one model.
        return pynvml, [
            pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdecimal() else pynvml.nvmlDeviceGetHandleByUUID(name)
            for name in names[:gpus]
        ]
    except pynvml.NVMLError:
        return None, []
