"""`bushpc cv | grid | train`: settings → cells → jobs."""

from __future__ import annotations

from pathlib import Path

from bushpc.cli.command import Arguments, Command, Group, option
from bushpc.cli.follow import print_submission

WAIT = option("--wait", action="store_true", help="follow the cells until they end and print the report's table")


def cv(given: Arguments) -> int:
    from bushpc.config import compose
    from bushpc.dispatch.plan import cv_plan
    from bushpc.dispatch.submit import submit

    plan = cv_plan(compose(given.typed))
    result = submit(plan, ["bushpc", "cv", *given.typed])
    return print_submission(result, plan.wanted if given.wait else None)


def grid(given: Arguments) -> int:
    from rich.console import Console

    from bushpc.dispatch.plan import grid_plan, plan_table
    from bushpc.dispatch.submit import submit

    plan = grid_plan(given.typed)
    if given.list:
        Console().print(plan_table(plan))
        return 0
    result = submit(plan, ["bushpc", "grid", *given.typed])
    return print_submission(result, plan.wanted if given.wait else None)


def train(given: Arguments) -> int:
    from bushpc.dispatch.train_here import train_here

    return train_here(given.typed, given.run_file)


GROUP = Group(
    "Training",
    20,
    (
        Command(
            name="cv",
            summary="Cross-validate a model: one job per fold, then a report.",
            run=cv,
            example="bushpc cv model=xbusnet_small data=phantom cluster=local --wait",
            options=(WAIT,),
            settings=True,
            notes=("Run the same command again to submit only what is missing.",),
        ),
        Command(
            name="grid",
            summary="Run an ablation: every row of a grid over all folds, then a report.",
            run=grid,
            example="bushpc grid grid=xbusnet_components data=breast cluster=slurm",
            options=(option("--list", action="store_true", help="check and list the rows; submit nothing"), WAIT),
            settings=True,
            notes=("grid= is a name or your own yaml file, for example grid=my.yaml.",),
        ),
        Command(
            name="train",
            summary="Train one fold here, as a rank of torchrun, accelerate, deepspeed or srun.",
            run=train,
            example="bushpc train model=unet_small data=phantom fold=0 cluster=local",
            options=(
                option(
                    "--run-file", type=Path, metavar="FILE", help="write the run folder's path to FILE, for a script"
                ),
            ),
            settings=True,
        ),
    ),
)
