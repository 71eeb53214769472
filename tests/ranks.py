"""Where tests that need processes with torch start them: forked from one that has the slow imports behind it.

Each start of a Python that imports torch and a model takes 5 s of a core, a fork some milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os

RANKS = multiprocessing.get_context("forkserver")
os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed decides when it is imported
RANKS.set_forkserver_preload(
    [
        *("accelerate", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "open_clip", "pytest"),
        *("bushpc.cell", "bushpc.models.xbusnet", "bushpc.models.baselines"),
    ]
)
