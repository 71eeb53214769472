"""`bushpc reproduce`: a paper's tables, from what they need to one page with the paper's figures beside ours."""

from __future__ import annotations

import typing as t

from bushpc.cli.command import JOBS_CONTINUE, Arguments, Command, Group, option
from bushpc.cli.show import wide_console

if t.TYPE_CHECKING:
    from bushpc.dispatch.reproduce import Found, Paper


def reproduce(given: Arguments) -> int:
    from bushpc.dispatch.reproduce import load_paper, look_at, run_steps
    from bushpc.dispatch.reproduce_job import follow, wait_for

    paper = load_paper(given.paper, given.typed)
    if given.wait:
        wait_for(paper)
    found = look_at(paper)
    missing = [each for each in found if each.state == "missing"]
    if not given.list and (not missing or given.partly):
        found = run_steps(paper, print)
    _print(paper, found)
    if given.list:
        return 1 if missing else 0
    if missing and not given.partly:
        print("nothing was submitted, as the above is missing; --partly submits the steps that miss nothing")
        return 2
    page = _page(paper, found)
    if not all(each.state == "done" for each in found):
        print(follow(paper, found, partly=given.partly))
    print(f"page: {page}")
    return 0


def _page(paper: Paper, found: list[Found]) -> str:
    from bushpc.report.reproduction import RunOfStep, write_reproduction

    steps = [
        RunOfStep(each.step.name, each.step.what, each.state, paper.run_dir(each.step.name), each.line)
        for each in found
        if each.step.command[0] != "export"
    ]
    folder = paper.runs_dir / f"reproduce-{paper.name}"
    command = ["bushpc", "reproduce", paper.given, *paper.words]
    return str(write_reproduction(paper.title, steps, folder, command))


def _print(paper: Paper, found: list[Found]) -> None:
    """Each step with what it needs, then what is missing and how to get it."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=paper.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("step", "what", "state", "cells", "data", "weights", "GPU hours"):
        table.add_column(column, justify="right" if column in ("cells", "GPU hours") else "left")
    for each in found:
        hours = f"{each.gpu_hours:.1f}" if each.gpu_hours else "—"
        hours += f", {each.unknown} cells not known" if each.gpu_hours and each.unknown else ""
        names = (", ".join(f"{name}{'' if there else ' (missing)'}" for name, there in needed.items())
                 for needed in (each.data, each.weight_files))  # fmt: skip
        cells = (each.step.name, each.step.what, each.state, str(each.cells or "—"), *names, hours)
        table.add_row(*map(escape, cells))
    console = wide_console()
    console.print(table)
    print("GPU hours are those of the training steps alone:")
    for source in dict.fromkeys(source for each in found for source in each.sources):
        print(f"  {source}")
    print("commands:")
    for each in found:
        print(f"  {each.line}")
    if lines := dict.fromkeys(line for each in found if each.state == "missing" for line in each.missing):
        print("missing:")
        for line in lines:
            print(f"  {line}")


GROUP = Group(
    "Training",
    20,
    (
        Command(
            name="reproduce",
            summary="Reproduce a paper: what it needs, what is missing, the commands; then run them all.",
            after_interrupt=JOBS_CONTINUE,
            run=reproduce,
            example="bushpc reproduce xbusnet --list",
            options=(
                option(
                    "paper",
                    metavar="PAPER",
                    help="xbusnet, vit_diffusion, sam_multitask, hybrid_attention or tumor_generator; or a yaml file "
                    "like those in configs/reproduce",
                ),
                option("--list", action="store_true", help="only list; submit nothing"),
                option("--partly", action="store_true", help="submit the steps that miss nothing, without the others"),
                option("--wait", action="store_true", help="wait for the steps that run now, then go on"),
            ),
            settings=True,
            notes=("Settings, such as cluster=mysite or runs_dir=FOLDER, are added to every command.",),
        ),
    ),
)
