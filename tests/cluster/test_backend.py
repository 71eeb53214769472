"""Promises of the cluster interface: a backend is one file, and plan, submit, status, cancel, resume need no more."""

from __future__ import annotations

import ast
import json
import os
import sys
import types
from pathlib import Path

import pytest

from bushpc.cluster import base
from bushpc.cluster.base import cluster_for, cluster_names, this_job
from bushpc.cluster.records import Job
from bushpc.config import CellConfig, compose
from bushpc.dispatch.control import cancel, resume
from bushpc.dispatch.plan import Plan, cv_plan
from bushpc.dispatch.status import read_status
from bushpc.dispatch.submit import Submission, submit
from bushpc.errors import ConfigError, DispatchError
from bushpc.runs.layout import RunDir
from tests.cluster.in_process import InProcess

PACKAGE = Path(base.__file__).parents[1]
COMMAND = ["bushpc", "cv"]


@pytest.fixture
def cluster(monkeypatch) -> InProcess:
    """The backend, with an empty queue; cells are stand-ins that record their starts and write DONE."""
    backend = cluster_for("in_process")
    assert isinstance(backend, InProcess)
    backend.reset()

    def run_cell(folder: os.PathLike[str], world: object, stop: object) -> object:
        cell_dir = Path(folder)
        if (cell_dir / "fails").exists():
            raise RuntimeError("told to fail")
        if (cell_dir / "meanwhile").exists():
            cancel(cell_dir.parents[1], [cell_dir.name])
            return types.SimpleNamespace(signal_name="SIGTERM", step=3)
        (cell_dir / "DONE").write_text(json.dumps({"step": 4}))
        return None

    cell, dist = types.ModuleType("bushpc.cell"), types.ModuleType("bushpc.dist")
    cell.run_cell = run_cell  # type: ignore[attr-defined]
    dist.meet = lambda *args: None  # type: ignore[attr-defined]
    dist.World = lambda rank, size, local_rank: types.SimpleNamespace(is_main=rank == 0)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bushpc.cell", cell)
    monkeypatch.setitem(sys.modules, "bushpc.dist", dist)
    for name in [name for name in ("SLURM_JOB_ID",) if name in os.environ]:
        monkeypatch.delenv(name)
    return backend


@pytest.fixture
def plan(tmp_path, phantom_folder) -> Plan:
    words = ["model=unet_small", "data=phantom", "cluster=local", "cluster.executor=in_process", "name=run"]
    return cv_plan(compose([*words, f"data.root={phantom_folder}", f"runs_dir={tmp_path}", "train.iterations=4"]))


def states(run_dir: Path) -> dict[str, str]:
    return {cell.name: cell.state for cell in read_status(run_dir).cells}


def test_a_run_goes_from_plan_to_report_on_a_backend_of_one_file(cluster, plan):
    said = submit(plan, COMMAND)
    run_dir = said.run_dir
    assert said.submitted == [f"fold{k}" for k in range(5)]
    assert set(states(run_dir).values()) == {"queued"}
    [cells, report] = cluster.submissions
    assert cells.name.startswith("run-")
    assert [job.work[0].__class__.__name__ for job in (cells, report)] == ["CellJob", "ReportJob"]
    assert report.after == ["1", "2", "3", "4", "5"], "the report follows every cell"
    assert submit(plan, COMMAND).live == said.submitted, "the same command again submits nothing"
    assert len(cluster.work) == 6

    (run_dir / "cells" / "fold1" / "fails").touch()
    assert cluster.run_next() is None
    assert "told to fail" in str(cluster.run_next())
    assert states(run_dir) == {"fold0": "done", "fold1": "failed"} | dict.fromkeys(
        ("fold2", "fold3", "fold4"), "queued"
    )
    assert (
        next(cell.reason for cell in read_status(run_dir).cells if cell.name == "fold1") == "RuntimeError: told to fail"
    )


def test_cancelled_cells_leave_the_queue_and_are_resumed(cluster, plan):
    run_dir = submit(plan, COMMAND).run_dir
    assert cancel(run_dir, ["fold3", "fold4"]).cells == ["fold3", "fold4"]
    assert states(run_dir) == dict.fromkeys(("fold0", "fold1", "fold2"), "queued") | {
        "fold3": "stopped",
        "fold4": "stopped",
    }
    # A cell that runs is told, and stops by itself.
    (run_dir / "cells" / "fold0" / "meanwhile").touch()
    ended = cluster.run_next()
    assert isinstance(ended, SystemExit)
    assert ended.code == 75
    assert cluster.signals == [("1", "TERM")]
    assert states(run_dir)["fold0"] == "stopped"
    (run_dir / "cells" / "fold0" / "meanwhile").unlink()

    again: Submission = resume(run_dir, ["bushpc", "resume"], only="stopped")
    assert again.submitted == ["fold0", "fold3", "fold4"]
    while any(
        not isinstance(work, type(None)) and work.__class__.__name__ == "CellJob" for work in cluster.work.values()
    ):
        assert cluster.run_next() is None
    assert set(states(run_dir).values()) == {"done"}


def test_a_run_is_resumed_with_the_yaml_of_a_site(cluster, plan, tmp_path, monkeypatch):
    run_dir = submit(plan, COMMAND).run_dir
    hashes = {cell.name: CellConfig.load(cell.config).hash for cell in RunDir(run_dir).cell_dirs()}
    cancel(run_dir)
    site = tmp_path / "configs" / "cluster" / "site.yaml"
    site.parent.mkdir(parents=True)
    site.write_text(
        "defaults: [local, _self_]\nexecutor: in_process\ntime_min: ${oc.env:SITE_MINUTES}\naccount: 010\nparallel: 3\n"
    )
    monkeypatch.setenv("BUSHPC_CONFIGS", str(tmp_path / "configs"))
    monkeypatch.setenv("SITE_MINUTES", "77")
    again = resume(run_dir, ["bushpc", "resume"], only="stopped", overrides=["cluster=site", "cluster.parallel=4"])
    assert len(again.submitted) == 5
    profile = cluster.submissions[-2].profile
    assert (profile.time_min, profile.account, profile.parallel) == (77, "010", 4)
    for cell in RunDir(run_dir).cell_dirs():
        config = CellConfig.load(cell.config)
        assert (config.hash, config.cluster, config.choices["cluster"]) == (hashes[cell.name], profile, "site")


def test_a_refused_submission_keeps_what_was_accepted_and_the_next_one_adds_the_rest(cluster, plan):
    cluster.reset(most=3)
    with pytest.raises(DispatchError, match="its queue is full"):
        submit(plan, COMMAND)
    cluster.most = None
    cluster.work.clear()  # this one keeps nothing of a submission that it refused
    said = submit(plan, COMMAND)
    assert said.submitted == [f"fold{k}" for k in range(5)]


def test_an_unknown_backend_is_refused_with_the_names_of_those_there_are(plan, phantom_folder, tmp_path):
    words = ["model=unet_small", "data=phantom", "cluster=local", f"data.root={phantom_folder}", f"runs_dir={tmp_path}"]
    with pytest.raises(ConfigError, match=r"unknown cluster.executor 'slrum'. did you mean 'slurm'"):
        cv_plan(compose([*words, "cluster.executor=slrum"]))
    assert {"local", "slurm"} <= set(cluster_names())
    with pytest.raises(ConfigError, match="executor=local has one machine; use cluster=slurm"):
        cv_plan(compose([*words, "cluster.nodes=2", "train.batch_size=4"]))


def test_a_job_is_told_from_its_environment():
    assert this_job({}) is None
    job = this_job({"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "ENVIRONMENT": "BATCH"})
    assert job is not None
    assert (job.id, job.queue_id, job.restarts, job.batch) == ("8", "7_3", 0, True)
    again = this_job({"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "2", "SLURMD_NODENAME": "n1"})
    assert again is not None
    assert (again.queue_id, again.restarts, again.batch, again.node) == ("8", 2, False, "n1")


def test_a_job_of_another_machine_lives_as_long_as_its_log_speaks(tmp_path):
    log = tmp_path / "log"
    log.touch()
    job = Job(id="1", executor="local", host="elsewhere", log=str(log))
    assert cluster_for("local").states([job])
    os.utime(log, (1.0, 1.0))
    assert not cluster_for("local").states([job])


SLURM_WORDS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo", "sacct", "srun", "SLURM_", "SLURMD_", "SRUN_")
# What users read there: the words of an option's help, and of launchers that bushpc does not start.
HELP = ("cli", "cli.py", "cluster.py", "train_here.py", "dist.py")


def test_every_slurm_word_lives_in_cluster_slurm():
    """In code and messages; docstrings may explain what a mechanism is for."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name.startswith("slurm") or path.name in HELP or "cli" in path.parts:
            continue
        tree = ast.parse(path.read_text())
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
        docs = {id(node.body[0].value) for node in nodes if node.body and isinstance(node.body[0], ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                found += [f"{path.name}:{node.lineno}: {word}" for word in SLURM_WORDS if word in node.value]
    assert found == []
