"""bushpc: train, compare and use breast-ultrasound models. In Python, `bushpc.load(folder)` gives a trained one."""

from __future__ import annotations

import typing as t

if t.TYPE_CHECKING:
    from bushpc.evaluate.predictor import load

__all__ = ["load"]


def __getattr__(name: str) -> t.Any:
    """Load on first use: torch takes seconds to import, and most commands do without it."""
    if name == "load":
        from bushpc.evaluate.predictor import load

        return load
    raise AttributeError(f"module 'bushpc' has no attribute {name!r}")
