"""Promises of `bushpc train`: whoever starts the ranks, the weights are the same, and a wrong world is no world."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bushpc.cli import main
from bushpc.dispatch.status import read_status

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
TINY = (
    *("model=xbusnet_small", "data=phantom", "cluster=local", "model.image_size=64", "fold=0"),
    *("train.iterations=4", "train.batch_size=4", "train.save_every=2", "train.log_every=1"),
)
TWO = "cluster.ranks_per_node=2"
pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def words(tmp_path_factory, phantom_folder):
    """words("name", "override", …) → the overrides of a tiny cell, all runs of this file in one folder."""
    folder = tmp_path_factory.mktemp("launched")

    def compose(name: str, *overrides: str) -> list[str]:
        where = (f"data.root={phantom_folder}", f"runs_dir={folder / 'runs'}", f"loader.cache_dir={folder / 'cache'}")
        return [*TINY, *where, f"name={name}", *overrides]

    compose.runs = folder / "runs"
    return compose


def environment() -> dict[str, str]:
    """One thread per rank, as jobs of `bushpc cv` have, and no variable of an earlier test's world."""
    theirs = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SUBMITIT_EXECUTOR")
    kept = {name: value for name, value in os.environ.items() if name not in theirs}
    return kept | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launcher(name: str) -> list[str]:
    accelerate_file = ROOT / "configs" / "accelerate" / "cpu_2_processes.yaml"
    return {
        "torchrun": [BIN / "torchrun", "--nproc-per-node=2", "--master-port", str(free_port()), "-m", "bushpc.cli"],
        "accelerate": [BIN / "accelerate", "launch", "--config_file", accelerate_file, "-m", "bushpc.cli"],
        "deepspeed": [BIN / "deepspeed", "--num_gpus=2", f"--master_port={free_port()}", "--module", "bushpc.cli"],
        "accelerate --cpu": [BIN / "accelerate", "launch", "--cpu", "--num_processes=2", "-m", "bushpc.cli"],
        "alone": [sys.executable, "-m", "bushpc.cli"],
    }[name]


def start(name: str, words: list[str]) -> subprocess.Popen[str]:
    command = [*map(str, launcher(name)), "train", *words]
    out = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=out, stderr=subprocess.STDOUT, text=True)


def run(name: str, words: list[str]) -> tuple[int, str]:
    process = start(name, words)
    said, _ = process.communicate(timeout=300)
    return process.returncode, said


def final_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run_dir / "cells" / "fold0" / "checkpoints").glob("step_*"))[-1]
    return load_file(newest / "model.safetensors")


def cell_of(run_dir: Path):
    return read_status(run_dir).cells[0]


@pytest.fixture(scope="module")
def reference(words):
    """Final weights of the same cell as two ranks of submitit's local executor."""
    assert main(["cv", *words("reference", TWO), "--wait"]) == 0
    return final_weights(words.runs / "reference")


@pytest.mark.parametrize("name", ["torchrun", "accelerate", "deepspeed"])
def test_every_launcher_trains_to_the_same_weights_as_the_executor(name, words, reference):
    code, said = run(name, words(name, TWO))
    assert code == 0, said
    assert "2 rank(s) on cpu" in said
    assert cell_of(words.runs / name).state == "done"
    weights = final_weights(words.runs / name)
    assert weights.keys() == reference.keys()
    assert all(torch.equal(weights[key], reference[key]) for key in reference)


def test_one_process_instead_of_two_is_refused(words):
    code, said = run("accelerate --cpu", words("single", TWO))
    assert code != 0
    assert "asks for 2 rank(s), and the launcher started 1" in said
    assert "returned non-zero exit status 2" in said
    assert not (words.runs / "single").exists()


@pytest.mark.parametrize(
    ("override", "reason"),
    [("train.iteration=3", "did you mean 'train.iterations'"), ("fold=9", "fold=9 does not exist")],
    ids=["before the ranks meet", "after"],
)
def test_a_config_error_ends_all_ranks_and_is_said_once(words, override, reason):
    code, said = run("torchrun", words("wrong", TWO, override))
    assert code != 0
    assert said.count(reason) == 1, said
    assert said.count("exitcode  : 2") == 2, said
    assert not (words.runs / "wrong").exists()


def until(what, process: subprocess.Popen[str]):
    deadline = time.monotonic() + 300
    while not (result := what()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return result


def test_a_running_cell_is_left_alone_and_a_stopped_or_killed_one_goes_on(words, capsys):
    run_dir, long = words.runs / "stopped", words("stopped", "train.iterations=400", "train.save_every=400")
    curves = run_dir / "cells" / "fold0" / "metrics.jsonl"
    process = start("alone", long)
    until(curves.exists, process)
    assert (cell_of(run_dir).state, cell_of(run_dir).job_id) == ("running", str(process.pid))
    assert main(["train", *long]) == 2
    assert f"fold0 of {run_dir} is running: job {process.pid} works on it" in capsys.readouterr().err
    assert main(["cv", *long]) == 0
    assert "already running: fold0" in capsys.readouterr().out

    process.terminate()
    said, _ = process.communicate(timeout=300)
    assert process.returncode == os.EX_TEMPFAIL, said
    assert cell_of(run_dir).state == "stopped"
    [saved] = (run_dir / "cells" / "fold0" / "checkpoints").glob("step_*")

    again = start("alone", long)
    last_line = len(curves.read_text().splitlines())
    [step, *_] = until(lambda: curves.read_text().splitlines()[last_line:], again)
    again.kill()
    assert f"resumed from {saved.name}" in again.communicate()[0]
    assert json.loads(step)["step"] == int(saved.name.removeprefix("step_")) + 1
    assert cell_of(run_dir).state == "stopped"
    assert "submit again to go on" in cell_of(run_dir).reason


def test_ranks_whose_launcher_is_killed_save_and_leave(words):
    run_dir = words.runs / "orphaned"
    process = start("torchrun", words("orphaned", TWO, "train.iterations=4000", "train.save_every=4000"))
    until((run_dir / "cells" / "fold0" / "metrics.jsonl").exists, process)
    process.kill()
    said, _ = process.communicate(timeout=300)  # to the end of the pipe, which the ranks hold as long as they live
    assert "stopped by SIGTERM" in said
    assert list((run_dir / "cells" / "fold0" / "checkpoints").glob("step_*"))
    assert cell_of(run_dir).state == "stopped"


def test_cv_takes_over_what_train_began(words, capsys):
    for command in ("train", "cv"):
        capsys.readouterr()
        assert main([command, *words("shared")]) == 0
    assert "already done: fold0" in capsys.readouterr().out
    while read_status(words.runs / "shared").report_live:
        time.sleep(0.2)
    assert (words.runs / "shared" / "report" / "index.html").exists()


def test_one_cell_is_trained_so_it_has_to_be_named(words, capsys):
    assert main(["train", *words("unnamed", "fold=null")]) == 2
    assert "say which, e.g. fold=0" in capsys.readouterr().err
