"""Promises of coming back on a real Slurm: whatever ends a job that can go on, it goes on; what cannot, does not loop.

Jobs, batch shells, ranks and signals are real; the training that they do is a stand-in that imports no torch, so that
a dozen starts fit into a test.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bushpc.config import ClusterConfig, places
from bushpc.dispatch.jobs import queue_cells
from bushpc.dispatch.status import read_status

pytestmark = pytest.mark.real

# Found by every Python that starts in the job: it takes the place of the modules that import torch.
STAND_IN = """
import json, os, signal, sys, time, types
from pathlib import Path

def run_cell(cell_dir, world, stop):
    cell_dir = Path(cell_dir)
    from bushpc.runs.lease import Lease
    from bushpc.train.watchdog import Watchdog
    plan = json.loads((cell_dir / "plan.json").read_text())
    restart = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    checkpoints = cell_dir / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    sealed = [int(path.name[5:]) for path in checkpoints.iterdir()]
    with (cell_dir / f"trains{world.rank}").open("a") as file:
        file.write(str(restart))
    with Watchdog(cell_dir, world.rank, plan.get("hang_s", 0)) as watchdog:
        for step in range(max(sealed, default=0) + 1, plan["steps"] + 1):
            watchdog.alive(f"step {step}")
            time.sleep(0.1)
            if step == plan.get("dies_at") and restart in plan["restarts"]:
                # Real ranks meet at every step: the other one is there when one dies, and its collective breaks.
                meeting = cell_dir / f"meeting{restart}"
                if world.is_main:
                    meeting.touch()
                    time.sleep(1)
                    raise RuntimeError("Connection closed by peer")
                while not meeting.exists():
                    time.sleep(0.05)
                os.kill(os.getpid(), signal.SIGKILL)
            if step == plan.get("hangs_at"):
                while True:
                    time.sleep(60)
            if world.is_main and (step % 5 == 0 or stop):
                (checkpoints / f"step_{step:08d}").mkdir(exist_ok=True)
            if stop:
                print(f"rank {world.rank} stopped by {stop.signal_name} at step {step}", flush=True)
                return stop
    if world.is_main:
        (cell_dir / "DONE").write_text("{}")

def is_a_rank():
    return b"submitit.core._submit" in Path("/proc/self/cmdline").read_bytes() and "SLURM_PROCID" in os.environ

if is_a_rank():
    work, dist = types.ModuleType("bushpc.dispatch.work"), types.ModuleType("bushpc.dist")
    work.run_work = lambda cell_dir, run, world, stop: run_cell(cell_dir, world, stop)
    dist.meet = lambda *args: None
    dist.World = lambda rank, size, local_rank: types.SimpleNamespace(rank=rank, is_main=rank == 0)
    sys.modules.update({"bushpc.dispatch.work": work, "bushpc.dist": dist})
    names = json.loads(Path("names.json").read_text())
    cell_dir = Path("cells") / names[int(os.environ.get("SLURM_ARRAY_TASK_ID", 0))]
    with (cell_dir / f"starts{os.environ['SLURM_PROCID']}").open("a") as file:
        file.write(os.environ.get("SLURM_RESTART_COUNT", "0"))
    plan = json.loads((cell_dir / "plan.json").read_text())
    if plan.get("starts_slowly") and "SLURM_RESTART_COUNT" not in os.environ:
        time.sleep(60)  # no handler is in place yet: a signal ends it
"""


@pytest.fixture
def submit(slurm, tmp_path) -> Callable[..., Path]:
    """submit({cell: plan}, setting=…): the cells as jobs of two ranks on two nodes each; returns the run folder."""
    run_dir, stand_in = tmp_path / "run", tmp_path / "stand_in"
    stand_in.mkdir()
    (stand_in / "sitecustomize.py").write_text(STAND_IN)

    def submit(plans: dict[str, dict[str, object]], **settings: object) -> Path:
        for name, plan in plans.items():
            (run_dir / "cells" / name).mkdir(parents=True)
            (run_dir / "cells" / name / "plan.json").write_text(json.dumps({"steps": 10, **plan}))
        (run_dir / "names.json").write_text(json.dumps(list(plans)))
        (run_dir / "run.json").write_text(json.dumps({"cells": [{"name": name, "fold": 0} for name in plans]}))
        site = {"executor": "slurm", "nodes": 2, "time_min": 10, "setup": [f"export PYTHONPATH={stand_in}"], **settings}
        queue_cells(run_dir, dict.fromkeys(plans, ClusterConfig(**{**site, "setup": tuple(site["setup"])})))
        return run_dir

    return submit


def starts(run_dir: Path, cell: str, rank: int = 0) -> str:
    """The restart counts of a rank's starts, one digit each."""
    path = run_dir / "cells" / cell / f"starts{rank}"
    return path.read_text() if path.exists() else ""


def trains(run_dir: Path, cell: str, rank: int = 0) -> str:
    """The restart counts of the starts in which a rank came to its training, one digit each."""
    path = run_dir / "cells" / cell / f"trains{rank}"
    return path.read_text() if path.exists() else ""


def job_id(run_dir: Path, cell: str) -> str:
    return str(json.loads((run_dir / "cells" / cell / "job.json").read_text())["job_id"])


def log(run_dir: Path, cell: str) -> str:
    return Path(json.loads((run_dir / "cells" / cell / "job.json").read_text())["log"]).read_text()


def end_states(slurm, run_dir: Path) -> dict[str, str]:
    """State of every cell once none is live."""
    slurm.until(lambda: not any(cell.live for cell in read_status(run_dir).cells), what=lambda: str(slurm.squeue()))
    return {cell.name: cell.state for cell in read_status(run_dir).cells}


def test_a_signal_in_start_up_brings_the_job_back(slurm, submit):
    run_dir = submit({"term": {"starts_slowly": True}, "usr2": {"starts_slowly": True}})
    for cell, name in (("term", "TERM"), ("usr2", "USR2")):
        slurm.until(lambda cell=cell: starts(run_dir, cell) and starts(run_dir, cell, 1))
        slurm.run(["scancel", f"--signal={name}", job_id(run_dir, cell)])
    assert end_states(slurm, run_dir) == {"term": "done", "usr2": "done"}
    for cell in ("term", "usr2"):
        assert starts(run_dir, cell) == starts(run_dir, cell, 1) == "01"
        assert "before it could listen" in log(run_dir, cell)


def test_a_killed_rank_comes_back_but_not_for_ever_to_the_same_place(slurm, submit):
    dies = {"dies_at": 7, "restarts": [0]}
    run_dir = submit({"further": dies, "stuck": {**dies, "dies_at": 3, "restarts": [0, 1, 2, 3]}})
    assert end_states(slurm, run_dir) == {"further": "done", "stuck": "stopped"}
    assert starts(run_dir, "further") == "01"
    assert "it had got from step 0 to 5" in log(run_dir, "further")
    assert starts(run_dir, "stuck") == "0123"
    assert not (run_dir / "cells" / "stuck" / "FAILED").exists()


def test_a_hung_rank_ends_with_stacks_and_is_not_started_again(slurm, submit):
    run_dir = submit({"hung": {"hangs_at": 7, "hang_s": 8}})
    assert end_states(slurm, run_dir) == {"hung": "failed"}
    assert "made no progress for 8 s, last: step 7" in (run_dir / "cells" / "hung" / "FAILED").read_text()
    for rank in (0, 1):
        assert "in run_cell" in (run_dir / "cells" / "hung" / "hang" / f"rank{rank}.txt").read_text()
    assert starts(run_dir, "hung") == "0"


def test_a_stopped_job_saves_and_comes_back_as_often_as_it_is_stopped_and_a_cancelled_one_stays_away(slurm, submit):
    run_dir = submit({"cell": {"steps": 100_000}})
    for count in range(2):
        # A signal that comes before the ranks listen is another test's.
        slurm.until(lambda count=count: all(trains(run_dir, "cell", rank) == "01"[: count + 1] for rank in (0, 1)))
        slurm.run(["scancel", "--signal=TERM", job_id(run_dir, "cell")])
    slurm.until(lambda: trains(run_dir, "cell") == trains(run_dir, "cell", 1) == "012")
    assert log(run_dir, "cell").count("goes back into the queue: it was told to stop, and saved") == 2
    sealed = sorted((run_dir / "cells" / "cell" / "checkpoints").iterdir())
    assert len(sealed) >= 2
    slurm.run(["scancel", job_id(run_dir, "cell")])
    assert end_states(slurm, run_dir) == {"cell": "stopped"}
    assert starts(run_dir, "cell") == "012"


def test_the_time_limit_is_known_to_the_ranks(slurm, tmp_path):
    """Slurm tells it in the environment or is asked; here compared with what it says of the job."""
    said, code = tmp_path / "said", "from bushpc.cluster.base import time_limit; print(time_limit())"
    job = slurm.sbatch(f"cd {places.CLONE} && srun {sys.executable} -c '{code}' > {said}", "--time=7")
    assert slurm.wait(job) == ["COMPLETED"], said.read_text()
    facts = slurm.run(["scontrol", "--oneliner", "show", "job", job])
    words = dict(word.split("=", 1) for word in facts.split() if "=" in word)
    began = time.mktime(time.strptime(words["StartTime"], "%Y-%m-%dT%H:%M:%S"))
    assert float(said.read_text()) == began + 7 * 60
