"""`bushpc cv | grid | train`: settings → cells → jobs."""

from __future__ import annotations

import typing as t
from pathlib import Path

from bushpc.cli.command import JOBS_CONTINUE, JSON, Arguments, Command, Group, option
from bushpc.cli.follow import print_submission
from bushpc.cli.show import print_json
from bushpc.errors import ConfigError

if t.TYPE_CHECKING:
    from bushpc.dispatch.plan import Plan

DRY_RUN = option("--dry-run", action="store_true", help="print the job scripts; submit and write nothing")
LIST = option("--list", action="store_true", help="check and list the rows; submit nothing")
WAIT = option("--wait", action="store_true", help="follow the cells until they end and print the report's table")


def cv(given: Arguments) -> int:
    from bushpc.config import compose
    from bushpc.dispatch.plan import cv_plan
    from bushpc.dispatch.submit import submit

    _refuse_to_wait(given)
    plan = cv_plan(compose(given.typed))
    if given.dry_run:
        return _print_scripts(plan)
    result = submit(plan, ["bushpc", "cv", *given.typed])
    return print_submission(result, plan.wanted if given.wait else None, as_json=given.json)


def grid(given: Arguments) -> int:
    from rich.console import Console

    from bushpc.dispatch.plan import grid_plan
    from bushpc.dispatch.plan_table import plan_table
    from bushpc.dispatch.submit import submit

    _refuse_to_wait(given)
    plan = grid_plan(given.typed)
    if given.list and given.json:
        print_json({"run": plan.first.run_dir, "cells": plan.wanted})
        return 0
    if given.list:
        Console().print(plan_table(plan))
        return 0
    if given.dry_run:
        return _print_scripts(plan)
    result = submit(plan, ["bushpc", "grid", *given.typed])
    return print_submission(result, plan.wanted if given.wait else None, as_json=given.json)


def _refuse_to_wait(given: Arguments) -> None:
    if given.json and (given.wait or given.dry_run):
        raise ConfigError("--json prints what was submitted, once: leave out --wait and --dry-run; `bushpc status RUN "
                          "--json` shows the rest")  # fmt: skip
    if given.dry_run and given.wait:
        raise ConfigError("--dry-run with --wait: nothing is submitted that could be waited for; leave one out")


def _print_scripts(plan: Plan) -> int:
    """What would be submitted, as the cluster would get it; only that names stand for the numbers of jobs."""
    from bushpc.cluster.base import cluster_for
    from bushpc.dispatch.snapshot import snapshot_path
    from bushpc.dispatch.submit import requests_of

    requests, said = requests_of(plan, snapshot_path(plan.first.run_dir))
    for number, request in enumerate(requests, 1):
        jobs = f"{len(request.work)} jobs as an array" if len(request.work) > 1 else "1 job"
        print(f"# --- {number} of {len(requests)}: {request.name}, {jobs}")
        script = cluster_for(request.profile.executor).script(request)
        print(script or f"# cluster.executor={request.profile.executor} has no scripts: it starts processes here")
    for line in (*said, *plan.warnings):
        print(f"# {line}")
    if not requests:
        print("# nothing is missing, so nothing would be submitted")
    return 0


def job(given: Arguments) -> int:
    import shlex
    from pathlib import Path

    from bushpc.cluster.base import cluster_for
    from bushpc.config import compose
    from bushpc.dispatch.cpu_job import request_of

    words = shlex.split(given.run or "")
    if not words or words[0] == "job":
        raise ConfigError('--run is needed: the command and its words; for example --run "pack data=breast"')
    config = compose(given.typed)
    profile, runs_dir = config.cluster, Path(config.runs_dir or "runs")
    cluster = cluster_for(profile.executor)
    cluster.require(profile)
    minutes = given.minutes or profile.time_min
    request = request_of(words, profile, runs_dir, cores=given.cores, minutes=minutes)
    if given.dry_run:
        print(cluster.script(request) or f"# cluster.executor={profile.executor} has no scripts")
        return 0
    request.folder.mkdir(parents=True, exist_ok=True)
    [submitted] = cluster.submit(request)
    if given.json:
        print_json({"job": submitted.id, "log": submitted.log})
        return 0
    print(f"job: {submitted.id}\nlog: {submitted.log}")
    return 0


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
            after_interrupt=JOBS_CONTINUE,
            run=cv,
            example="bushpc cv model=xbusnet_small data=phantom cluster=local --wait",
            examples=(
                "bushpc cv model=xbusnet data=breast cluster=slurm name=first",
                "bushpc cv model=unet data=busi cluster=slurm train.lr=3e-4 train.iterations=2000 --dry-run",
            ),
            options=(DRY_RUN, WAIT, JSON),
            settings=True,
            notes=("Run the same command again to submit only what is missing.",),
        ),
        Command(
            name="grid",
            summary="Run an ablation: every row of a grid over all folds, then a report.",
            after_interrupt=JOBS_CONTINUE,
            run=grid,
            example="bushpc grid grid=xbusnet_components data=breast cluster=slurm",
            examples=("bushpc grid grid=xbusnet_components data=breast --list",),
            options=(
                option("--list", action="store_true", help="check and list the rows; submit nothing"),
                DRY_RUN,
                WAIT,
                JSON,
            ),
            settings=True,
            notes=(
                "grid= is a name or your own yaml file, for example grid=my.yaml.",
                "rows=[a,b] runs these rows alone.",
            ),
        ),
        Command(
            name="job",
            summary="Run another command, such as pack, as a job without a GPU (cluster.cpu_jobs).",
            after_interrupt=JOBS_CONTINUE,
            run=job,
            example='bushpc job cluster=slurm --cores 4 --minutes 60 --run "pack data=phantom"',
            options=(
                option("--run", metavar="WORDS", help='the command with its words, such as "resume runs/table4"'),
                option("--cores", type=int, default=1, metavar="N", help="CPU cores (default 1)"),
                option("--minutes", type=int, metavar="N", help="time limit (default cluster.time_min)"),
                DRY_RUN,
                JSON,
            ),
            settings=True,
            notes=("The settings choose the cluster. The command runs in the folder where you call this.",),
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
