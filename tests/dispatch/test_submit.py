"""Promises of dispatch on one machine: returns at once, runs what is missing, never twice, never half a run."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from bushpc.cli import main
from bushpc.cluster import local
from bushpc.config import compose, gpu_memory
from bushpc.dispatch.status import read_status, report_is_current
from bushpc.process import process_start

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("model=unet_small", "data=phantom", "cluster=local", "model.image_size=32", "train.iterations=4")


@pytest.fixture
def cv(tmp_path, phantom_folder, capsys, monkeypatch):
    """cv("override", …) runs `bushpc cv` on a tiny model, in the clone; returns (exit status, output, errors)."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # slots of their own, whatever else runs here

    def run(*words: str) -> tuple[int, str, str]:
        where = (f"data.root={phantom_folder}", f"runs_dir={tmp_path / 'my runs'}", "name=tiny")
        status = main(["cv", *SMALL, *where, f"loader.cache_dir={tmp_path / 'cache'}", *words])
        return status, *capsys.readouterr()

    return run


def wait_until_still(run_dir: Path, timeout: float = 600) -> None:
    deadline = time.monotonic() + timeout
    while True:
        status = read_status(run_dir)
        if not any(cell.live for cell in status.cells) and not status.report_live:
            return
        assert time.monotonic() < deadline, status
        time.sleep(0.2)


def states(run_dir: Path) -> dict[str, str]:
    return {cell.name: cell.state for cell in read_status(run_dir).cells}


def test_a_run_from_submission_to_report_and_again(cv, tmp_path):
    run_dir = tmp_path / "my runs" / "tiny"  # with a space: paths reach a shell, and must be quoted
    code, said, _ = cv("fold=1")
    assert code == 0
    assert "submitted: fold1\n" in said
    assert states(run_dir)["fold1"] != "done", "a submission does not wait for training"
    code, said, _ = cv("fold=1")
    assert "already running: fold1\n" in said
    assert "submitted" not in said
    wait_until_still(run_dir)
    assert states(run_dir) == {"fold0": "missing", "fold1": "done"} | dict.fromkeys(
        ("fold2", "fold3", "fold4"), "missing"
    )
    summary = json.loads((run_dir / "report" / "summary.json").read_text())
    assert summary["complete"] is False, "one fold of five is no cross-validation"
    assert summary["metrics"]["none"]["dice"]["mean"] is None

    # A further fold of the same run: the finished one is kept.
    done_before = (run_dir / "cells" / "fold1" / "DONE").stat().st_mtime_ns
    code, said, _ = cv("fold=2", "--wait")
    assert code == 0
    assert "report:" in said
    assert (run_dir / "cells" / "fold1" / "DONE").stat().st_mtime_ns == done_before
    assert [name for name, state in states(run_dir).items() if state == "done"] == ["fold1", "fold2"]

    # Other settings under the same name are refused, whatever the fold, and nothing is touched.
    for fold in (1, 3):
        code, _, errors = cv(f"fold={fold}", "train.lr=0.5")
        assert code == 2
        assert "train.lr: 0.001 → 0.5" in errors
    # Settings that cannot change the result may change.
    assert cv("fold=1", "train.save_every=3")[0] == 0

    # The code that ran is that of the run folder, not the clone's, which may be edited meanwhile.
    job = json.loads((run_dir / "cells" / "fold1" / "job.json").read_text())
    assert f"code {run_dir / 'code' / job['code'] / 'bushpc'}\n" in Path(job["log"]).read_text()


def test_on_one_machine_the_report_is_written_by_whom_the_profile_names(cv, tmp_path):
    quick = ("train.iterations=2", f"cluster.setup=['export PYTHONPATH={ROOT}/tests/stand_in']")
    run_dir = tmp_path / "my runs" / "tiny"
    page = run_dir / "report" / "index.html"
    code, _, errors = cv(*quick, "cluster.report=login", "fold=0")
    assert code == 0
    assert f"the report is written by `bushpc report {run_dir}` when the cells have ended" in errors
    wait_until_still(run_dir)
    assert not page.exists(), "nothing waits for the cells"
    assert "already done: fold0" in cv(*quick, "cluster.report=login", "fold=0")[1]
    assert page.exists(), "given again, the command writes it"

    cv(*quick, "cluster.report=last_cell", "fold=1")
    wait_until_still(run_dir)
    assert states(run_dir)["fold1"] == "done"
    assert report_is_current(run_dir), "written again, after the second cell"


def test_a_cell_whose_process_is_killed_is_seen_as_stopped_and_goes_on(cv, tmp_path):
    run_dir = tmp_path / "my runs" / "tiny"
    cv("fold=0", "train.iterations=60", "train.save_every=5")
    deadline = time.monotonic() + 300
    while not list((run_dir / "cells" / "fold0" / "checkpoints").glob("step_*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(json.loads((run_dir / "cells" / "fold0" / "state.json").read_text())["pid"], signal.SIGKILL)
    wait_until_still(run_dir)
    cell = read_status(run_dir).cells[0]
    assert cell.state == "stopped"
    assert "submit again" in cell.reason
    _, said, _ = cv("fold=0", "train.iterations=60", "train.save_every=5")
    assert "submitted: fold0" in said
    wait_until_still(run_dir)
    cell = read_status(run_dir).cells[0]
    assert (cell.state, cell.restarts) == ("done", 1)
    assert "resumed from" in Path(cell.log).read_text()


def test_term_to_a_cells_job_id_saves_and_leaves_nothing_behind(cv, tmp_path):
    run_dir = tmp_path / "my runs" / "tiny"
    cv("fold=0", "train.iterations=100000", "train.save_every=50000")
    deadline = time.monotonic() + 300
    while read_status(run_dir).cells[0].step < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    rank = json.loads((run_dir / "cells" / "fold0" / "state.json").read_text())["pid"]
    os.kill(int(read_status(run_dir).cells[0].job_id), signal.SIGTERM)
    while read_status(run_dir).cells[0].live:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    trains_on = process_start(rank) is not None
    if trains_on:
        os.kill(rank, signal.SIGKILL)
    assert not trains_on, "status says stopped"
    cell = read_status(run_dir).cells[0]
    assert cell.state == "stopped"
    assert "stopped by SIGTERM after step" in Path(cell.log).read_text()
    [checkpoint] = (run_dir / "cells" / "fold0" / "checkpoints").glob("step_*")
    assert int(checkpoint.name.removeprefix("step_")) >= 2
    wait_until_still(run_dir)


@pytest.mark.parametrize("shell", ["dash", "bash"])
def test_a_local_jobs_process_becomes_its_controller_in_any_shell(tmp_path, shell):
    """Whatever the path of the run holds; systems differ in what /bin/sh is."""
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    run_dir = tmp_path / "a 'run' && $more\n; x"
    (run_dir / "jobs").mkdir(parents=True)
    said = shlex.quote(str(run_dir / "said"))
    text = local.job_script([*local.detach_lines(run_dir / "jobs"), f"exec >{said}", "echo once"], run_dir / "jobs")
    code = f"import os, sys; print(sys.argv[1:], os.getpid(), os.environ['{local.CONTROLLER}'])"
    package = tmp_path / "fake" / "submitit" / "local"
    package.mkdir(parents=True)
    (package / "_local.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "fake")}
    (package / "__init__.py").touch()
    (package.parent / "__init__.py").touch()
    job = subprocess.Popen(["/bin/sh", "-c", text], executable=shutil.which(shell), env=env)
    assert job.wait(60) == 0
    assert (run_dir / "said").read_text() == f"once\n{[str(run_dir / 'jobs')]} {job.pid} {job.pid}\n"


@pytest.mark.parametrize("made", ["link", "of another user"])
def test_a_slot_folder_that_is_not_ours_is_refused(cv, tmp_path, monkeypatch, made):
    folder = tmp_path / f"bushpc-slots-{os.getuid()}"
    (tmp_path / "elsewhere").mkdir()
    if made == "link":
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        lstat = Path.lstat
        other = os.stat_result((0o40755, 0, 0, 1, os.getuid() + 1, 0, 0, 0, 0, 0))
        monkeypatch.setattr(Path, "lstat", lambda path: other if path == folder else lstat(path))
    code, _, error = cv("fold=0")
    assert code == 2
    assert "is not a folder of yours" in error
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_slot_folder_is_open_to_its_user_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    line = " && ".join(local.slot_lines(compose([*SMALL, "cluster.parallel=1"]).cluster))
    folder = tmp_path / f"bushpc-slots-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    # Taking a slot leaves what is in the file as it is.
    (folder / "0").write_text("kept")
    subprocess.run(["/bin/sh", "-c", line], check=True, timeout=300)
    assert (folder / "0").read_text() == "kept"


def test_a_cell_that_is_killed_while_it_waits_for_a_place_holds_up_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    wait_for_place = " && ".join(local.slot_lines(compose([*SMALL, "cluster.parallel=1"]).cluster))
    through = tmp_path / "through"
    with open(tmp_path / f"bushpc-slots-{os.getuid()}" / "0", "a") as place:
        fcntl.flock(place, fcntl.LOCK_EX)
        waiting = []
        for name in ("first", "second", "third"):
            waiting.append(subprocess.Popen(["bash", "-c", f"{wait_for_place} && echo {name} >>{through}"]))
            time.sleep(0.5)  # so that the first is the one that looks
        waiting[0].terminate()
        waiting[0].wait(60)
        assert not through.exists()
    assert [job.wait(60) for job in waiting[1:]] == [0, 0]
    assert sorted(through.read_text().split()) == ["second", "third"]


def test_a_submission_lets_go_of_the_callers_pipe(tmp_path, phantom_folder):
    """Whoever reads its output to the end, as a shell's `$(…)` does, must not wait for the cells."""
    words = [*SMALL, f"data.root={phantom_folder}", f"runs_dir={tmp_path}", "name=piped", "cluster.parallel=1"]
    words += ["train.iterations=60", f"loader.cache_dir={tmp_path / 'cache'}"]
    subprocess.run([sys.executable, "-m", "bushpc.cli", "cv", *words], capture_output=True, check=True, cwd=ROOT)
    assert "done" not in states(tmp_path / "piped").values(), "the pipe was held while cells ran"
    subprocess.run(["pkill", "--signal", "KILL", "--full", str(tmp_path / "piped")], check=False)
    wait_until_still(tmp_path / "piped")


@pytest.mark.real
def test_a_cell_of_two_ranks_runs_where_one_cell_fits(cv, tmp_path):
    run_dir = tmp_path / "my runs" / "tiny"
    code, _, errors = cv("fold=0", "cluster.ranks_per_node=2", "cluster.parallel=1", "--wait")
    assert code == 0, errors
    assert "2 rank(s)" in Path(read_status(run_dir).cells[0].log).read_text()


def test_a_job_that_dies_before_it_starts_is_not_taken_for_a_running_one(cv, tmp_path):
    run_dir = tmp_path / "my runs" / "tiny"
    code, _, errors = cv("fold=0", "cluster.setup=[exit 3]", "--wait")
    assert code == 1
    assert "fold0 failed" in errors
    assert cv("fold=0", "--wait")[0] == 0
    assert states(run_dir)["fold0"] == "done"


def test_a_failing_setup_line_ends_the_job_and_status_names_line_and_output(cv, tmp_path):
    """bash, as on Slurm: `source` exists there alone."""
    run_dir = tmp_path / "my runs" / "tiny"
    (tmp_path / "good.sh").write_text("export SAID=hello; false; true")
    lines = f"[source {tmp_path}/good.sh,echo $SAID # said,source /nonexistent/activate,touch {tmp_path}/after]"
    code, _, errors = cv("fold=0", f"cluster.setup={lines}", "--wait")
    assert code == 1
    cell = read_status(run_dir).cells[0]
    assert cell.state == "failed"
    assert "setup line 'source /nonexistent/activate' ended with status 1: " in cell.reason
    assert "No such file" in cell.reason
    assert cell.reason in errors
    assert not (tmp_path / "after").exists()
    assert "hello" in (run_dir / "jobs" / "local_controller.log").read_text()
    assert not (run_dir / "cells" / "fold0" / "metrics.jsonl").exists(), "it trained without the line"


def test_a_failing_cell_says_why_in_one_line(cv, tmp_path):
    run_dir = tmp_path / "my runs" / "tiny"
    code, _, errors = cv("fold=0", "train.lr=1e30", "train.grad_clip=0", "--wait")
    assert code == 1
    assert "is not finite at step" in errors
    cell = read_status(run_dir).cells[0]
    assert cell.state == "failed"
    assert "\n" not in cell.reason


def test_a_change_needs_its_name_and_makes_finished_cells_stale(cv, tmp_path):
    run_dir = tmp_path / "my runs" / "tiny"
    cv("fold=0")
    wait_until_still(run_dir)
    assert states(run_dir)["fold0"] == "done"
    code, _, error = cv("fold=0", "train.iterations=6")
    assert code == 2
    assert "train.iterations: 4 → 6" in error
    assert "resume_changes=[train.iterations]" in error
    assert states(run_dir)["fold0"] == "done"
    code, said, _ = cv("fold=0", "train.iterations=6", "resume_changes=[train.iterations]")
    assert "submitted: fold0\n" in said
    wait_until_still(run_dir)
    assert json.loads((run_dir / "cells" / "fold0" / "DONE").read_text())["step"] == 6
    assert "resumed from step_00000004" in Path(read_status(run_dir).cells[0].log).read_text()


def test_a_grace_time_that_was_measured_to_be_too_short_is_said_at_submission(cv, tmp_path):
    run_dir = tmp_path / "my runs" / "tiny"
    cv("fold=0")
    wait_until_still(run_dir)
    _, _, error = cv("fold=1", "cluster.grace_s=0.001")
    assert "warning: to stop may take" in error
    assert "cluster.grace_s=0.001" in error
    wait_until_still(run_dir)


def test_a_step_that_probably_does_not_fit_its_gpu_is_said_at_submission(cv, tmp_path, monkeypatch):
    gpu = ("cluster.gpus=a100:1", "engine.device=cuda", "engine.precision=bf16")
    settings = gpu_memory.memory_settings(compose([*SMALL, *gpu]))
    known = {"name": "tiny", "floor_gb": 1.0, "base_gb": 4.0, "image_gb": 10.0, "settings": settings}
    monkeypatch.setattr(gpu_memory, "_table", lambda: [known])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # none is needed: the jobs end in their setup
    short = (*gpu, "cluster.parallel=1", "cluster.setup=['exit 3']", "fold=0")
    code, said, errors = cv(*short, "train.batch_size=8")
    assert (code, "submitted: fold0\n" in said) == (0, True), errors
    assert "warning: fold0: a step of 8 image(s) takes about 84 GB, and a100 has 40 GB (3 image(s) fit)" in errors
    assert "train.accumulate=3 or more" in errors
    wait_until_still(tmp_path / "my runs" / "tiny")
    assert "image(s)" not in cv(*short, "train.batch_size=2", "name=fits")[2]
    wait_until_still(tmp_path / "my runs" / "fits")
