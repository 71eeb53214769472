"""bushpc: train, compare and use breast-ultrasound models. What is listed here is the Python interface.

pack, open_shards: a dataset. train_cell: one fold. read_results: a run as a DataFrame. load: a trained model.
export: a trained model as a folder that needs nothing else.
"""

from __future__ import annotations

import importlib
import typing as t

if t.TYPE_CHECKING:
    from bushpc.api import Shards, open_shards, pack, read_results, train_cell
    from bushpc.evaluate.export import export
    from bushpc.evaluate.predictor import load

__all__ = ["Shards", "export", "load", "open_shards", "pack", "read_results", "train_cell"]

_MODULES = {"export": "evaluate.export", "load": "evaluate.predictor"}


def __getattr__(name: str) -> t.Any:
    """Load on first use: torch takes seconds to import, and most commands do without it."""
    if name in __all__:
        return getattr(importlib.import_module(f"bushpc.{_MODULES.get(name, 'api')}"), name)
    raise AttributeError(f"module 'bushpc' has no attribute {name!r}")
