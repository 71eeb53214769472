"""What every part that asks Slurm needs: its configuration and its way to write time limits."""

from __future__ import annotations

import math
import re

from bushpc.cluster.base import ask

# Jobs of one array, where Slurm does not say what it allows; its own default.
MAX_ARRAY_SIZE = 1001


def site_settings() -> dict[str, str]:
    """Slurm's own configuration, as `scontrol show config` tells it: KillWait, JobRequeue, PreemptMode …"""
    pairs = (line.partition("=") for line in ask("scontrol", "show", "config").splitlines())
    return {key.strip(): value.strip() for key, equals, value in pairs if equals}


def minutes_of(limit: str) -> float:
    """A time limit in Slurm's notation, in minutes; infinite where there is none.

    >>> [minutes_of(text) for text in ("90", "1:30:00", "2-00:00:00", "UNLIMITED")]
    [90.0, 90.0, 2880.0, inf]
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if match is None:
        return math.inf
    days, first, second, third = (int(part) if part else None for part in match.groups())
    assert first is not None
    if days is not None or third is not None:  # D-HH[:MM[:SS]] or HH:MM:SS
        return (days or 0) * 1440.0 + first * 60 + (second or 0) + (third or 0) / 60
    return first + (second or 0) / 60
