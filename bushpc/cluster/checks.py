"""One line of `bushpc doctor`: what was looked at, what was found, what to do. Backends yield them as well."""

from __future__ import annotations

import typing as t
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bushpc.errors import BushpcError

OK, WARNING, BROKEN = "ok", "warning", "broken"


@dataclass(frozen=True, kw_only=True)
class Check:
    """A finding. verdict: ok, warning or broken. advice: what to do next; "" where there is nothing to do."""

    name: str
    verdict: str
    found: str
    advice: str = ""


def is_broken(checks: Iterable[Check]) -> bool:
    return any(check.verdict == BROKEN for check in checks)


def run_check(name: str, check: Callable[..., Iterable[Check]], *args: t.Any) -> list[Check]:
    """One check's findings. If the check itself fails, that is a finding, and the findings before it are kept."""
    found: list[Check] = []
    try:
        for finding in check(*args):  # one by one: those before a failure are kept
            found.append(finding)
    except BushpcError as error:
        what, _, then = str(error).rpartition("\nRun: ")
        found.append(Check(name=name, verdict=BROKEN, found=what or then, advice=f"run: {then}" if what else ""))
    except Exception as error:
        found.append(Check(name=name, verdict=BROKEN, found=f"the check itself failed: {one_line(error)}"))
    return found


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
