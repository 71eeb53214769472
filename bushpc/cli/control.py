"""`bushpc resume | retry | cancel`: continue, repeat or end the jobs of a run."""

from __future__ import annotations

from bushpc.cli.command import JOBS_CONTINUE, JSON, Arguments, Command, Group, option, run_folder
from bushpc.cli.follow import print_submission
from bushpc.cli.show import print_json, some

CELL_HELP = "a cell, or a row of a grid for all its folds"


def resume(given: Arguments) -> int:
    from bushpc.dispatch import control

    words = [*(["--only", given.only] if given.only else []), *given.typed]
    command = ["bushpc", "resume", str(given.run_dir), *words]
    return print_submission(
        control.resume(given.run_dir, command, only=given.only, overrides=given.typed), as_json=given.json
    )


def retry(given: Arguments) -> int:
    from bushpc.dispatch import control

    command = ["bushpc", "retry", str(given.run_dir), *given.cells, *(["--fresh"] if given.fresh else [])]
    return print_submission(control.retry(given.run_dir, given.cells, command, fresh=given.fresh), as_json=given.json)


def cancel(given: Arguments) -> None:
    from bushpc.dispatch import control

    found = control.cancel(given.run_dir, given.cells)
    if given.json:
        print_json({"cancelled": found.cells, "not_ours": found.left})
        return
    print(f"cancelled: {some(found.cells) or 'nothing was running or queued'}")
    if found.left:
        left = some([f"{cell} ({run})" for cell, run in found.left.items()])
        print(f"not cancelled, because they belong to another run: {left}")


GROUP = Group(
    "Control",
    40,
    (
        Command(
            name="resume",
            summary="Submit what is missing of any run, from its own frozen settings.",
            after_interrupt=JOBS_CONTINUE,
            run=resume,
            example="bushpc resume runs/table4 --only failed cluster.mem_gb=128",
            options=(
                run_folder(),
                option("--only", metavar="STATE", help="only cells that are failed, stopped, stale or missing"),
                JSON,
            ),
            settings=True,
            notes=("Of the settings only cluster=, cluster.* and loader.* may change.",),
        ),
        Command(
            name="retry",
            summary="Submit some cells again, from their newest checkpoint or from step 0.",
            after_interrupt=JOBS_CONTINUE,
            run=retry,
            example="bushpc retry runs/table4 full-fold2 --fresh",
            options=(
                run_folder(),
                option("cells", nargs="+", metavar="CELL", help=CELL_HELP),
                option("--fresh", action="store_true", help="start at step 0; old files are moved to RUN/replaced"),
                JSON,
            ),
        ),
        Command(
            name="cancel",
            summary="End all jobs of a run, or those of some cells; running cells save first.",
            run=cancel,
            example="bushpc cancel runs/table4 full",
            options=(run_folder(), option("cells", nargs="*", metavar="CELL", help=CELL_HELP), JSON),
        ),
    ),
)
