"""What a bad day does to runs on a real Slurm: daemons away, broken disks, clocks, admins, colleagues, signals.

    row → a run, disturbed → it ends by itself, or `bushpc status` says why not and `bushpc resume` ends it
        → weights and predictions against an undisturbed run, ledger, steps lost → table, a line at a time

    tools/bad_days [--only TEXT …] [--size ci] [--out FOLDER]

Needs root for rows with a disk (tmpfs and bind mounts). Exit status 1 if a row is not as promised.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tools.baddays.day import Day, Days, Row, Site, mount, unmount
from tools.baddays.rows import all_rows
from tools.preemption_matrix import Case, CaseError, Result, Trial

# A row of each part that is quick.
CI = ("slurmctld-away-submit", "disk-full-save")
DISK = "size=64m"


def main(words: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "ci"), default="full", help="ci: a row of some parts")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="rows with one of these in their name")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="keep rows.jsonl and bad_days.md here")
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="of the runs; undisturbed ones there are used again"
    )
    parser.add_argument("--list", action="store_true", help="names of the rows, and end")
    given = parser.parse_args(words)
    rows = choose(given.size, given.only)
    if given.list or not rows:
        print("\n".join(row.name for row in rows or all_rows()))
        return 0 if rows else 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinds, so that all is taken down
    folder = given.work.absolute() if given.work else Path(tempfile.mkdtemp(prefix="bad-days-"))
    days, site = Days(folder), Site(folder / "slurm", accounting=any(row.accounting for row in rows))
    try:
        site.up()
        failed = run_all(rows, days, site, given.out)
        if given.out:
            write_table(given.out)
    except CaseError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        site.down()
    if failed:
        print(f"the runs are kept in {folder}", file=sys.stderr)
        return 1
    if not given.work:
        shutil.rmtree(folder)
    return 0


def choose(size: str, only: Sequence[str]) -> list[Row]:
    rows = [row for row in all_rows() if os.getuid() == 0 or not row.disk]
    if size == "ci":
        return [row for row in rows if row.name in CI]
    return [row for row in rows if not only or any(text in row.name for text in only)]


def run_all(rows: Sequence[Row], days: Days, site: Site, out: Path | None) -> int:
    """The undisturbed runs, then row after row. Returns how many are not as promised."""
    days.rows = {row.name: row for row in rows}
    cases = [row.case for row in rows]
    days.prepare(cases)
    # The same run for several rows, with as many folds as any of them has.
    references = {case.reference.name: case.reference for case in sorted(cases, key=lambda case: case.cells)}
    for reference in references.values():
        undisturbed(reference, days, site)
    failed = 0
    for row in rows:
        shutil.rmtree(days.runs_of(row) / row.name, ignore_errors=True)
        with disk_of(days, row):
            day = Day(days, row, site)
            result = day.run()
        failed += bool(result.faults)
        tell(row, day, result, out)
    return failed


def undisturbed(reference: Case, days: Days, site: Site) -> None:
    """Raises: CaseError if it does not end."""
    days.announce(reference)
    if all((days.run_dir(reference) / "cells" / f"fold{fold}" / "DONE").exists() for fold in range(reference.cells)):
        days.ended(reference)
        return
    result = Trial(days, reference, site, "lane0").run()
    days.ended(reference)
    if result.faults:
        raise CaseError(f"the undisturbed run {reference.name}: {'; '.join(result.faults)}")
    print(f"{reference.name}: {result.seconds:.0f} s", file=sys.stderr, flush=True)


def tell(row: Row, day: Day, result: Result, out: Path | None) -> None:
    ended = "; ".join(result.faults) or ("exact, after `bushpc resume`" if day.resumes else "exact")
    print(f"{time.strftime('%H:%M:%S')} {row.name}: {ended} ({result.seconds:.0f} s) {day.seen}", flush=True)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        facts = {"part": row.part, "name": row.name, "ended": ended, "seconds": result.seconds, "seen": day.seen}
        with (out / "rows.jsonl").open("a") as file:
            file.write(json.dumps(facts, ensure_ascii=False) + "\n")


def write_table(out: Path) -> None:
    """bad_days.md from all rows in rows.jsonl, of this run and earlier ones; a row that was run again counts once."""
    text = (out / "rows.jsonl").read_text()
    known = {row["name"]: row for row in map(json.loads, text.splitlines())}
    names = [row.name for row in all_rows()]
    lines = ["| part | row | ended | seconds | what was seen |", "|---|---|---|---:|---|"]
    for name in names:
        if row := known.get(name):
            cells = (row["part"], name, row["ended"], f"{row['seconds']:.0f}", row["seen"])
            lines.append("| " + " | ".join(" ".join(cell.replace("|", "/").split()) for cell in cells) + " |")
    exact = sum(row["ended"].startswith("exact") for row in known.values())
    lines += ["", f"{exact} of {len(known)} rows ended exact."]
    if left := [name for name in names if name not in known]:
        lines += ["", f"Not run: {', '.join(left)}."]
    (out / "bad_days.md").write_text("\n".join(lines) + "\n")


@contextlib.contextmanager
def disk_of(days: Days, row: Row) -> Iterator[None]:
    """A small file system for the row's run, seen through a bind mount; none where it needs none."""
    if not row.disk:
        yield
        return
    seen = days.runs_of(row)
    real = seen.with_name(seen.name + ".real")
    for path in (seen, real):
        path.mkdir(parents=True, exist_ok=True)
    try:
        mount("-t", "tmpfs", "-o", DISK, "tmpfs", real)
        mount("--bind", real, seen)
        yield
    finally:
        for path in (seen, real):
            unmount(path)


if __name__ == "__main__":
    sys.exit(main())
