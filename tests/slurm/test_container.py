"""Promises of containers on a real Slurm: ranks in a root without Slurm's programs, and all else as ever."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bushpc.cli import main
from bushpc.dispatch.status import CellStatus, read_status

RUNTIME = Path(__file__).with_name("sandboxed_root.sh")
STAND_IN = Path(__file__).resolve().parents[1] / "stand_in"
# Of the image: bubblewrap's command and Python's libraries need no more.
PROGRAMS = ("sh", "bash", "ls", "tr")
pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def bubblewrap() -> None:
    """Debian's sandbox for user namespaces; installed where we may."""
    if shutil.which("bwrap") is None and os.getuid() == 0 and shutil.which("apt-get"):
        install = ["apt-get", "-y", "-qq", "-o", "DPkg::Lock::Timeout=300", "install", "bubblewrap"]
        for step in (install, ["apt-get", "-qq", "update"], install):
            done = subprocess.run(step, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            if step is install and done.returncode == 0:
                break
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")


@pytest.fixture
def image(tmp_path, bubblewrap) -> Path:
    image = tmp_path / "image"
    for folder in ("bin", "lib", "lib64"):
        (image / folder).mkdir(parents=True)
    for program in PROGRAMS:
        shutil.copy(str(shutil.which(program)), image / "bin" / program)
    return image


@pytest.fixture
def words(slurm, image, tmp_path, two_folds_folder) -> list[str]:
    """Overrides of a small run whose ranks run in the image; its Python is the one of the tests, mounted."""
    pythons = ",".join(f"{folder}:{folder}:ro" for folder in dict.fromkeys((sys.prefix, sys.base_prefix)))
    return [
        *("model=unet_small", "data=phantom", "cluster=slurm", "name=cv", f"runs_dir={tmp_path / 'runs'}"),
        *(f"data.root={two_folds_folder}", f"loader.cache_dir={tmp_path / 'cache'}", f"weights_dir={tmp_path}"),
        *(
            "model.image_size=64",
            "cluster.time_min=30",
            "train.save_every=50",
            "train.log_every=5",
            "evaluate.explain=0",
        ),
        *("cluster.container.runtime=custom", f"cluster.container.image={image}"),
        f"cluster.container.command=bash {RUNTIME} {{image}} {{binds}}",
        *(f"cluster.container.python={sys.executable}", f"cluster.container.binds=[{pythons}]"),
    ]


def test_ranks_in_a_container_train_stop_come_back_and_are_reported(slurm, words, tmp_path):
    """From a copy of the shards on the nodes' disk, which is mounted, too: the sandbox's nodes are one machine."""
    run_dir, disk = tmp_path / "runs" / "cv", tmp_path / "disk"
    disk.mkdir()
    assert main(["cv", *words, "train.iterations=60", f"cluster.staging={disk}"]) == 0

    def cells() -> dict[str, dict]:
        return {cell["name"]: cell for cell in json.loads(read_status(run_dir).to_json())["cells"]}

    def log(name: str) -> str:
        return Path(cells()[name]["log"]).read_text()

    def trains() -> bool:
        cell = cells()["fold0"]
        assert cell["live"] or cell["step"], log("fold0")
        return 5 <= cell["step"] < 45

    slurm.until(trains, 600)
    slurm.run(["scancel", "--signal=TERM", cells()["fold0"]["job_id"]])
    slurm.until(lambda: not any(cell["live"] for cell in cells().values()), 900, lambda: log("fold0"))
    assert {cell["state"] for cell in cells().values()} == {"done"}, log("fold0")
    assert cells()["fold0"]["restarts"] == 1
    said = log("fold0")
    roots = [set(line.split(":", 1)[1].split()) for line in said.splitlines() if line.startswith("in the container:")]
    # The image's own folders, the mounts' parents, and nothing else of this machine: no /var, /opt or /home.
    mounted = {Path(folder).parts[1] for folder in (sys.prefix, sys.base_prefix, tmp_path, Path.cwd(), Path.home())}
    image = {"bin", "lib", "lib64", "dev", "proc", "etc", "tmp", "usr"}
    assert len(roots) == 2
    for root in roots:
        assert image <= root <= image | mounted
    assert "is visible" not in said
    assert "resumed from step_" in said
    assert sum("kB to" in log(name) and "copied" in log(name) for name in cells()) == 1
    # The batch shell outside told the ranks, which have no squeue.
    assert "is not known here" not in said
    slurm.wait(json.loads((run_dir / "jobs" / "report.json").read_text())["job_id"])
    assert json.loads((run_dir / "report" / "summary.json").read_text())["complete"] is True


def test_one_job_works_through_all_cells_in_a_container_and_comes_back(slurm, words, tmp_path):
    """The batch shell outside asks for each turn and requeues; what trains inside is tests/stand_in's."""
    run_dir, [binds] = tmp_path / "runs" / "cv", [word for word in words if "container.binds" in word]
    quick = ["train.iterations=150", "train.save_every=5", f"cluster.setup=['export PYTHONPATH={STAND_IN}']"]
    assert main(["cv", *words, *quick, "cluster.submit_window=1", f"{binds[:-1]},{STAND_IN}:{STAND_IN}:ro]"]) == 0

    def cells() -> list[CellStatus]:
        return read_status(run_dir).cells

    def logs() -> str:
        return "\n".join(path.read_text() for path in (run_dir / "jobs").rglob("*_log.out"))

    slurm.until(lambda: cells()[1].phase == "training" and cells()[1].step, what=logs)
    slurm.run(["scancel", "--signal=TERM", cells()[1].job_id])
    slurm.until((run_dir / "report" / "summary.json").exists, what=logs)
    assert {cell.state for cell in cells()} == {"done"}
    assert len({cell.job_id for cell in cells()}) == 1
    assert [cell.restarts for cell in cells()][:2] == [0, 1]
    assert logs().count("in the container:") == len(cells()) + 2, "one of them twice, and the report"
    assert json.loads((run_dir / "report" / "summary.json").read_text())["complete"] is True


def test_an_image_that_is_not_there_is_refused_before_anything_is_queued(slurm, words, tmp_path, capsys):
    queue = slurm.squeue()
    assert main(["cv", *words, f"cluster.container.image={tmp_path / 'none.sif'}"]) != 0
    assert "none.sif does not exist" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert set(slurm.squeue()) <= set(queue)  # an earlier job may end meanwhile
