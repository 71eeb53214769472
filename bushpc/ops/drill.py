"""`bushpc drill`: does a run survive here? Two short runs of the user's own configuration, one of them disturbed.

    config → undisturbed run → the same, disturbed: TERM, USR2, requeue, KILL of a rank, a competing job
           → the cost of each disturbance, and whether weights and ledger equal those of the undisturbed run

runs/drill-<time>/
  undisturbed/, disturbed/   run folders as `bushpc cv` writes them, of one cell each
  times                      when the batch shells started, and when their ranks had ended
  drill.md                   what was found
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
import time
import typing as t
from collections.abc import Sequence
from pathlib import Path

from bushpc.cluster.base import cluster_for
from bushpc.config import CellConfig
from bushpc.dispatch.plan import cv_plan
from bushpc.errors import ConfigError, DispatchError
from bushpc.files import write_atomically
from bushpc.ops.audit import audit_run
from bushpc.ops.drill_found import KILL, LOCAL_WAYS, PREEMPT, QUEUE_WAYS, TITLES, Drill, Outcome, to_markdown
from bushpc.ops.drill_run import Run, Say, Site
from bushpc.ops.processes import RunProcess
from bushpc.runs.goodput import goodput, read_attempts

if t.TYPE_CHECKING:
    import torch

# Training steps per disturbance: enough to save, to be disturbed and to react before training ends.
STEPS_EACH, SAVES_EACH = 12, 3
# If these steps take fewer seconds, training may end before the signal arrives.
SECONDS_EACH = 2.5
# A process's start is known to a clock tick, and the next start may follow at once.
TICK_S = 0.05


def drill(config: CellConfig, *, command: Sequence[str], preempt_with: str | None, say: Say) -> Drill:
    """Run the drill: two short trainings with their evaluations, plus the queue's wait after each disturbance.

    command: what the user typed, for run.json. preempt_with: the cluster's options for a competing job that may preempt
    this one. say: takes a line of progress. Leaves no job behind, however it ends.
    Raises: ConfigError, DataError, WeightsError for what cannot run at all; DispatchError when the cluster refuses, or
    a run fails for a reason of its own.
    """
    cluster = cluster_for(config.cluster.executor)
    if preempt_with is not None and not cluster.requeues:
        raise ConfigError(
            f"--preempt-with: no job competes with one of cluster={config.choices['cluster']}; give a cluster with a "
            "queue, for example cluster=slurm"
        )
    ways = [*(QUEUE_WAYS if cluster.requeues else LOCAL_WAYS), *([PREEMPT] if preempt_with is not None else [])]
    cell = cv_plan(config).cells[f"fold{config.fold or 0}"]
    folder = Path(cell.runs_dir or "runs") / time.strftime("drill-%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    site = Site(cluster, folder, say, preempt_with)
    with contextlib.closing(site):
        quiet, each = _undisturbed(cell, folder, command, site, len(ways))
        hurt = Run(shorten(cell, folder, "disturbed", each, len(ways)), command, site)
        hurt.submit()
        outcomes = [disturb(hurt, how) for how in ways]
        hurt.until_done()
        orphans = site.left_behind([quiet, hurt])
    found = judge(quiet, hurt, outcomes, orphans, site)
    write_atomically(folder / "drill.md", to_markdown(found))
    return found


def _undisturbed(cell: CellConfig, folder: Path, command: Sequence[str], site: Site, ways: int) -> tuple[Run, int]:
    """The undisturbed run, and its steps per disturbance: more than usual where steps turn out to be quick."""
    each, name = STEPS_EACH, "undisturbed"
    while True:
        run = Run(shorten(cell, folder, name, each, ways), command, site)
        site.say(f"{name}: {run.cell.train.iterations} steps, a checkpoint every {run.save_every}, and the evaluation")
        run.submit()
        run.until_done()
        if each * run.step_seconds() >= SECONDS_EACH:
            return run, each
        each, name = math.ceil(1.2 * SECONDS_EACH / run.step_seconds()), f"{name}-longer"
        site.say("its steps are too quick for a signal to come between them; once more with more of them")


def shorten(cell: CellConfig, folder: Path, name: str, each: int, ways: int) -> CellConfig:
    """The cell with `each` training steps per disturbance and as many at the end; it saves often, and logs each step.

    The evaluation is not shortened. The batch shell notes when it starts and when its ranks have ended.
    """
    train = dataclasses.replace(
        cell.train,
        iterations=each * (ways + 1),
        # Both runs reach their last step, but the state of the early stop is saved and compared as well.
        stop_patience=cell.train.stop_patience and each * (ways + 1) + 1,
        save_every=max(1, each // SAVES_EACH),
        keep=max(2, cell.train.keep),
        keep_every=0,
        keep_best=None,
        log_every=1,
        validate_every=0,
        weights_from=None,
    )
    times = shlex.quote(str(folder / "times"))
    at_start, at_end = (f"echo {what} $(date +%s.%N) >>{times}" for what in ("start", "end"))
    lines = cluster_for(cell.cluster.executor).around_ranks(at_start, at_end)
    cluster = dataclasses.replace(cell.cluster, setup=(*cell.cluster.setup, *lines))
    return dataclasses.replace(cell, name=name, runs_dir=str(folder), train=train, cluster=cluster, resume_changes=())


def disturb(run: Run, how: str) -> Outcome:
    """Wait for a good moment, disturb the run, and follow it until it goes on."""
    site = run.site
    run.until(run.is_saved_and_on_its_way, f"the steps before {TITLES[how]}")
    before, faults = run.attempt_number, []
    if run.over:
        faults.append("came when training was over")
    site.say(f"{TITLES[how]} after step {run.lines()[-1][0]}")
    since = time.time()
    try:
        site.act(how, run)
    except DispatchError as error:
        return Outcome(how=how, step=run.lines()[-1][0], faults=(str(error),))
    ended = site.wait_for_end(run, since)
    logged = run.lines()
    by_itself = site.comes_back(run, before)
    if not by_itself:
        site.say("nothing brings it back here; submitted again")
        run.submit()
    first = run.until(lambda: run.first_sign(before, len(logged)), "the first step after it")
    started = site.started(ended or since)
    orphans = [process for process in site.processes(run) if process.started < (ended or since) - TICK_S]
    reached, resumed = max((step for step, _ in logged), default=0), run.resumed_from
    outcome = Outcome(
        how=how,
        step=reached,
        lost=max(0, reached - resumed),
        by_itself=by_itself,
        sealed_s=None if how == KILL else _between(since, run.sealed_at(resumed)),
        ended_s=_between(since, ended),
        waited_s=_between(ended, started),
        started_s=_between(started, first),
        total_s=_between(since, first),
        orphans=tuple(map(str, orphans)),
    )
    site.say(f"went on from step {resumed}, {outcome.lost} steps lost, {outcome.total_s:.1f} s after the command")
    return dataclasses.replace(outcome, faults=(*faults, *_broken_promises(outcome, run)))


def _broken_promises(outcome: Outcome, run: Run) -> list[str]:
    faults = []
    allowed = run.save_every + run.steps_in_a_write() if outcome.how == KILL else 0
    if outcome.lost > allowed:
        faults.append(f"lost {outcome.lost} steps, at most {allowed} are promised")
    if outcome.orphans:
        faults.append(f"outlived the ranks: {', '.join(outcome.orphans)}")
    # A rank may be killed by a fault of the run itself, so coming back by itself is not promised.
    if run.site.cluster.requeues and not outcome.by_itself and outcome.how != KILL:
        faults.append("did not come back by itself")
    grace_s = run.cell.cluster.grace_s
    if grace_s and outcome.how != KILL and (outcome.ended_s or 0.0) > grace_s:
        faults.append(f"took {outcome.ended_s:.1f} s to end; the site gives {grace_s:g} s (cluster.grace_s)")
    return faults


def judge(quiet: Run, hurt: Run, outcomes: list[Outcome], orphans: list[RunProcess], site: Site) -> Drill:
    """Compare the disturbed run with the undisturbed one."""
    notes, faults = list(site.notes), list(site.faults)
    tensors, differing = compare_checkpoints(quiet.last_checkpoint, hurt.last_checkpoint)
    if differing and quiet.cell.engine.deterministic:
        faults.append(f"{len(differing)} of {tensors} tensors of the last checkpoint differ from the undisturbed run's")
    elif not quiet.cell.engine.deterministic:
        notes.append("engine.deterministic=false: two undisturbed runs may differ in their bits, too")
    runs = {"undisturbed": quiet, "disturbed": hurt}
    ledgers = {name: audit_run(run.run_dir).cells[0] for name, run in runs.items()}
    faults += [f"ledger of the {name} run: {cell.violations[0]}" for name, cell in ledgers.items() if cell.violations]
    if orphans:
        faults.append(f"outlived the runs: {', '.join(map(str, orphans))}")
    if quiet.attempt_number:
        notes.append(f"the cluster itself stopped the undisturbed run, {quiet.attempt_number} time(s)")
    accounts = {name: goodput(read_attempts(run.cell_dir)) for name, run in runs.items()}
    return Drill(
        folder=quiet.run_dir.parent,
        steps=quiet.cell.train.iterations,
        save_every=quiet.save_every,
        step_s=round(quiet.step_seconds(), 4),
        outcomes=outcomes,
        tensors=tensors,
        differing=differing,
        ledgers={name: cell.verdict for name, cell in ledgers.items()},
        accounts={name: account for name, account in accounts.items() if account},
        notes=notes,
        faults=faults,
    )


def compare_checkpoints(ours: Path, theirs: Path) -> tuple[int, dict[str, float]]:
    """(number of tensors, part/name → largest absolute difference of those that are not the same, bit for bit).

    Infinite where only one has the tensor, or type or shape differ. Weights, optimizer and averages all count.
    """
    from safetensors.torch import load_file

    def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
        files = sorted(folder.glob("*.safetensors"))
        return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}

    a, b = tensors_of(ours), tensors_of(theirs)
    differing = dict.fromkeys(a.keys() ^ b.keys(), math.inf)
    for name in a.keys() & b.keys():
        if (a[name].dtype, a[name].shape) != (b[name].dtype, b[name].shape):
            differing[name] = math.inf
        elif a[name].numpy(force=True).tobytes() != b[name].numpy(force=True).tobytes():
            differing[name] = float((a[name].double() - b[name].double()).abs().max())
    return len(a.keys() | b.keys()), dict(sorted(differing.items()))


def _between(begin: float | None, end: float | None) -> float | None:
    """Seconds, never below 0: clocks of two nodes may differ."""
    return None if begin is None or end is None else round(max(0.0, end - begin), 2)
