"""`bushpc status`, and following a run to its end (`--watch`, `--wait`)."""

from __future__ import annotations

import sys
import time
import typing as t
from pathlib import Path

from bushpc.cli.command import JSON, Arguments, Command, Group, option, run_folder
from bushpc.cli.show import print_json, some, warn, wide_console
from bushpc.errors import ConfigError, DispatchError

if t.TYPE_CHECKING:
    from rich.console import Group as Lines

    from bushpc.dispatch.status import RunStatus
    from bushpc.dispatch.submit import Submission

WATCH_S = 1.0
# The controller serves the whole site, so it is asked less often.
WATCH_CLUSTER_S = 10.0
WATCH_RETRIES = 6
LINE_EVERY_S = 20.0


def status(given: Arguments) -> int:
    from bushpc.dispatch.status import read_status
    from bushpc.dispatch.status_table import status_table

    if given.watch and given.json:
        raise ConfigError("--watch with --json: --json prints the state once, --watch follows it. Choose one")
    page = _page_of(given) if given.html else None
    if given.watch:
        found = watch(given.run_dir, until_report=False, each_time=page)
    else:
        found = read_status(given.run_dir, only_show=True)
        if page:
            page(found)
        if given.json:
            print(found.to_json())
        else:
            console = wide_console()
            console.print(status_table(found, console.width, given.all))
    return 0 if found.complete or any(cell.live for cell in found.cells) else 1


def _page_of(given: Arguments) -> t.Callable[[RunStatus], None]:
    """What writes the page of a state."""
    import shlex

    from bushpc.dispatch.status_page import refuse_page, write_status_page

    path = given.html.expanduser()
    refuse_page(path)
    command = ["bushpc", "status", str(given.run_dir), *(["--watch"] if given.watch else []), "--html", str(given.html)]

    def write(found: RunStatus) -> None:
        write_status_page(found, path, [shlex.quote(word) for word in command], watched=given.watch)

    return write


def watch(run_dir: Path, until_report: bool, each_time: t.Callable[[RunStatus], None] | None = None) -> RunStatus:
    """Follow a run: a live table on a terminal; in a log one line per change and every LINE_EVERY_S.

    each_time: gets every state that is read.
    """
    from rich.console import Console
    from rich.live import Live

    from bushpc.dispatch.status import read_status
    from bushpc.dispatch.status_table import plain_line, status_table

    def active(found: RunStatus) -> bool:
        return any(cell.live for cell in found.cells) or (until_report and found.report_live)

    def read_later(found: RunStatus) -> RunStatus:
        on_cluster = any(cell.job_id and not cell.local for cell in found.cells)
        for attempt in range(WATCH_RETRIES):
            time.sleep(WATCH_CLUSTER_S if on_cluster else WATCH_S)
            try:
                return read_status(run_dir)
            except DispatchError as error:
                if attempt + 1 == WATCH_RETRIES:
                    raise
                print(f"{error}; asking again", file=sys.stderr)
        raise AssertionError

    def shown(found: RunStatus) -> Lines:
        return status_table(found, console.width, height=console.height)

    tell = each_time or (lambda found: None)
    console = Console()
    found = read_status(run_dir)
    tell(found)
    if console.is_terminal:
        with Live(shown(found), console=console, refresh_per_second=4) as live:
            while active(found):
                found = read_later(found)
                tell(found)
                live.update(shown(found))
        return found
    printed: dict[str, tuple[str, float]] = {}
    while True:
        for cell in found.cells:
            stage, (last_stage, last_s) = f"{cell.state} {cell.phase}", printed.get(cell.name, ("", 0.0))
            due = cell.state == "running" and time.monotonic() - last_s >= LINE_EVERY_S
            if stage != last_stage or due:
                print(time.strftime("%H:%M:%S"), plain_line(cell), flush=True)
                printed[cell.name] = (stage, time.monotonic())
        if not active(found):
            return found
        found = read_later(found)
        tell(found)


def print_submission(result: Submission, wait_for: t.Sequence[str] | None = None, *, as_json: bool = False) -> int:
    """Print what was submitted; if `wait_for` names cells, follow the run and print the report.

    as_json: only what was submitted, as one object.
    """
    if as_json:
        print_json(result._asdict())
        return 0
    for verb, names in (
        ("submitted", result.submitted),
        ("already running", result.live),
        ("already done", result.done),
        ("trained once, shared with another run", [f"{cell} ({run})" for cell, run in result.elsewhere.items()]),
    ):
        if names:
            print(f"{verb}: {some(names)}")
    for line in result.said:
        print(line)
    for warning in result.warnings:
        warn(warning)
    print(f"run: {result.run_dir}\nstatus: bushpc status {result.run_dir}")
    if wait_for is None:
        return 0
    return _print_end(result.run_dir, watch(result.run_dir, until_report=True), wait_for)


def _print_end(run_dir: Path, found: RunStatus, wanted: t.Sequence[str]) -> int:
    from rich.console import Console

    from bushpc.report.page import build_report

    # The report job may have failed, so an older page could be there: build it again.
    result = build_report(run_dir)
    Console().print(result.fold_table)
    print(f"report: {result.html}")
    unfinished = [cell for cell in found.cells if cell.name in wanted and cell.state != "done"]
    for cell in unfinished:
        print(f"{cell.name} {cell.state}: {cell.reason}", file=sys.stderr)
    return 1 if unfinished else 0


GROUP = Group(
    "Following",
    30,
    (
        Command(
            name="status",
            summary="Show the state of every cell of a run.",
            run=status,
            example="bushpc status runs/table4 --watch",
            examples=("bushpc status runs/table4 --watch --html status.html", "bushpc status runs/table4 --json"),
            options=(
                run_folder(),
                option("--watch", action="store_true", help="keep the table on the screen until every cell has ended"),
                JSON,
                option(
                    "--html", type=Path, metavar="FILE", help="also write a page with curves, time left and reasons"
                ),
                option("--all", action="store_true", help="list all cells of a large run, done and queued ones too"),
            ),
            notes=(
                "Exit status 1: cells are missing or failed, and nothing is running.",
                "--watch --html FILE writes the page again until every cell has ended, and it reloads itself. FILE may "
                "lie anywhere, also where the run folder is read-only.",
            ),
        ),
    ),
)
