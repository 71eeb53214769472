"""Peak memory by torch's own MemTracker, which counts the storages that live at a time, in blocks of 512 bytes."""

from __future__ import annotations

import typing as t

import torch
from torch.distributed._tools.mem_tracker import MemTracker


class PeakMemory(MemTracker):
    """MemTracker of the device as a whole; its tables by module need torch's own autograd engine."""

    def _pre_fw_hook(self, *_: t.Any) -> None: ...

    def _post_fw_hook(self, *_: t.Any) -> None: ...

    def _pre_bw_hook(self, *_: t.Any) -> None: ...

    def _post_bw_hook(self, *_: t.Any) -> None: ...

    def peak(self, device: torch.device) -> int:
        """Bytes that lived at a time on `device`, at most, since the start or `restart`."""
        return self._peak_mem.get(device, 0)

    def live(self, device: torch.device) -> int:
        """Bytes that live there now."""
        return int(self.get_tracker_snapshot("current").get(device, {}).get("Total", 0))

    def restart(self) -> None:
        """Forget the peak."""
        self._peak_mem.clear()
        self._peak_mem_snap.clear()
