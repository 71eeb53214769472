"""`bushpc report | compare | audit`: what a run came to."""

from __future__ import annotations

import typing as t
from pathlib import Path

from bushpc.cli.command import JSON, ROW, Arguments, Command, Group, option, run_folder
from bushpc.cli.show import print_json

if t.TYPE_CHECKING:
    from bushpc.report.page import ReportResult


def report(given: Arguments) -> None:
    from bushpc.report.page import build_report

    _show(given, build_report(given.run_dir, given.out))


def compare(given: Arguments) -> None:
    from bushpc.report import build_comparison

    _show(given, build_comparison(given.run_dirs, given.out))


def _show(given: Arguments, result: ReportResult) -> None:
    from rich.console import Console

    if given.json:
        print_json({"page": result.html, "summary": result.content})
        return
    Console().print(result.fold_table)
    print(f"report: {result.html}")


def postprocess(given: Arguments) -> None:
    from bushpc.evaluate.choose import SIZES, choose
    from bushpc.shards.progress import progress

    sizes = SIZES if given.sizes is None else tuple(given.sizes)
    with progress("postprocess") as show:
        chosen, path = choose(given.run_dir, given.row, sizes, show)
    if given.json:
        import msgspec

        print_json({"path": path, **msgspec.to_builtins(chosen)})
        return
    for each in chosen.folds:
        plain, after = (
            "—" if value is None else f"{value:.4f}"
            for value in (each.plain[chosen.metric], each.chosen[chosen.metric])
        )
        print(f"fold {each.fold}: {each.rule.words} (chosen on the others); Dice {plain} → {after}")
    print(f"for new images, chosen on all folds: {chosen.for_all.words}")
    print(f"written: {path}; `bushpc report {given.run_dir}` shows it, `bushpc predict` and `bushpc export` apply it")


def audit(given: Arguments) -> int:
    from rich.console import Console

    from bushpc.ops.audit import audit_run, audit_table

    found = audit_run(given.run_dir)
    if given.json:
        print(found.to_json())
    else:
        Console().print(audit_table(found))
    return 0 if found.ok else 1


GROUP = Group(
    "Results",
    50,
    (
        Command(
            name="report",
            summary="Write tables, figures and the HTML page of a run.",
            run=report,
            example="bushpc report runs/table4",
            examples=("bushpc report runs/table4 --out ~/table4 --json",),
            options=(
                run_folder(),
                option("--out", type=Path, metavar="FOLDER", help="where to write (default: report in the run folder)"),
                JSON,
            ),
        ),
        Command(
            name="compare",
            summary="Compare runs on the same data and folds.",
            run=compare,
            example="bushpc compare runs/xbusnet runs/unet",
            options=(
                run_folder("run_dirs", nargs="+", help="run folders"),
                option(
                    "--out",
                    type=Path,
                    metavar="FOLDER",
                    help="where to write (default: compare-<names> beside the first run)",
                ),
                JSON,
            ),
        ),
        Command(
            name="postprocess",
            summary="Choose a post-processing of masks for each fold on the other folds, and for new images on all.",
            run=postprocess,
            example="bushpc postprocess runs/table4 --row full",
            options=(
                run_folder(),
                ROW,
                option(
                    "--sizes",
                    nargs="*",
                    type=float,
                    metavar="SHARE",
                    help="smallest parts to try, as shares of the image's area (default: 0.001 0.0025 0.005 0.01)",
                ),
                JSON,
            ),
            notes=("Tried are filled holes, dropped small parts, the largest part alone, and all combinations.",),
        ),
        Command(
            name="audit",
            summary="Prove that every sample was seen exactly once per epoch.",
            run=audit,
            example="bushpc audit runs/table4",
            options=(run_folder(), JSON),
            notes=("Exit status 1: a cell isn't exact, or it isn't finished.",),
        ),
    ),
)
