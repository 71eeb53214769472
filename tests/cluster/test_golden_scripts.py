"""Promises of the shipped profiles: each composes, says where it comes from, and asks for what its golden file states.

The golden files hold the #SBATCH lines and the srun line of what `--dry-run` prints. After a change that is meant,
BUSHPC_WRITE_GOLDEN=1 writes them again; read the difference before you commit it.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from bushpc.cli.app import main
from bushpc.config import compose, config_names
from bushpc.config.places import shipped_configs

GOLDEN = Path(__file__).parent / "golden"
SMALL = ["model=unet_small", "data=phantom", "name=run"]
NOT_SITES = ("local", "slurm", "a100")
# The GPUs of a node, and what else a training on two nodes takes there.
WHOLE_NODES = {
    "a100": (8, []),
    "alps": (4, []),
    "cannon": (4, []),
    "cc_in2p3": (4, []),
    "gautschi": (8, []),
    "hazel": (4, []),
    "isambard_ai": (4, []),
    "jean_zay": (8, []),
    "jupiter": (4, []),
    "juwels_booster": (4, []),
    "leonardo": (4, ["cluster.mem_gb=480"]),
    "lonestar6": (3, []),
    "lumi": (8, ["cluster.partition=standard-g", "cluster.time_min=2880"]),
    "mahti": (4, ["cluster.partition=gpumedium"]),
    "narval": (4, ["cluster.mem_gb=498"]),
    "nyu": (4, ["cluster.mem_gb=256"]),
    "perlmutter": (4, ["cluster.qos=regular", "cluster.exclusive=true"]),
    "puhti": (4, ["cluster.mem_gb=360"]),
    "rorqual": (4, ["cluster.mem_gb=498"]),
    "sherlock": (4, ["cluster.mem_gb=128"]),
    "slurm": (0, []),
    "snellius": (4, []),
    "stampede3": (4, []),
    "vista": (1, []),
}
PROFILES = sorted(name for name in WHOLE_NODES)
GRID = "title: t\nrows:\n" + "".join(f"  r{i}: {{set: {{train.lr: {i}.0e-4}}}}\n" for i in range(1, 5))


@pytest.fixture
def dry_run(tmp_path, phantom_folder, monkeypatch, capsys):
    """What a command with --dry-run prints, on a machine without Slurm; nothing is written."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in [name for name in os.environ if name.startswith(("SBATCH_", "SLURM_"))]:
        monkeypatch.delenv(name)

    def run(*words: str) -> str:
        folders = [f"data.root={phantom_folder}", f"runs_dir={tmp_path / 'runs'}"]
        capsys.readouterr()
        assert main([*words, "--dry-run", *SMALL, *folders]) == 0
        assert not (tmp_path / "runs").exists()
        return capsys.readouterr().out

    return run


def lines_of(printed: str, runs: Path) -> list[list[str]]:
    """The #SBATCH lines and the srun line of each script, without what differs between machines and runs."""
    scripts = []
    for script in re.split(r"^# --- .*\n", printed, flags=re.MULTILINE)[1:]:
        lines = [line for line in script.splitlines() if line.startswith(("#SBATCH", "srun "))]
        text = "\n".join(lines).replace(str(runs), "RUNS").replace(sys.executable, "PYTHON")
        scripts.append(re.sub(r"run((?:-report)?)-[0-9a-f]{8}", r"run\1-ID", text).splitlines())
    return scripts


@pytest.mark.parametrize("profile", PROFILES)
def test_scripts_of_every_shipped_profile_are_the_golden_ones(profile, dry_run, tmp_path):
    grid = tmp_path / "grid.yaml"
    grid.write_text(GRID)
    gpus, more = WHOLE_NODES[profile]
    kind = compose([*SMALL, f"cluster={profile}"]).cluster.gpu_type
    two = [f"cluster.gpus={f'{kind}:' if kind else ''}{gpus}", f"cluster.ranks_per_node={max(1, gpus)}", *more]
    two += ["cluster.nodes=2", "cluster.cells_per_job=1", f"train.batch_size={2 * max(1, gpus)}", "fold=0"]
    told = []
    for title, words in (
        ("cross-validation of five folds", ["cv"]),
        ("grid of 20 cells", ["grid", f"grid={grid}"]),
        ("training on two nodes", ["cv", *two]),
    ):
        scripts = lines_of(dry_run(words[0], f"cluster={profile}", *words[1:]), tmp_path / "runs")
        told += [f"== {title}", *scripts[0], ""]
        if words == ["cv"]:
            told += ["== report", *(scripts[1] if len(scripts) > 1 else ["written by the last cell"]), ""]
    found = "\n".join(told)
    golden = GOLDEN / f"{profile}.txt"
    if os.environ.get("BUSHPC_WRITE_GOLDEN"):
        golden.write_text(found)
    assert golden.read_text() == found


def test_every_shipped_profile_has_golden_scripts():
    shipped = {path.stem for path in (shipped_configs() / "cluster").glob("*.yaml")}
    assert shipped - {"local"} == set(PROFILES) == {path.stem for path in GOLDEN.glob("*.txt")}


@pytest.mark.parametrize("profile", [name for name in PROFILES if name not in NOT_SITES])
def test_a_sites_profile_says_its_source_and_date_and_that_nobody_ran_it(profile):
    head = (shipped_configs() / "cluster" / f"{profile}.yaml").read_text().partition("defaults:")[0]
    assert re.search(r"^# Written from \S.*, [A-Z][a-z]+ 20\d\d\.$", head, flags=re.MULTILINE)
    assert "# Not run there: try" in head


def test_at_least_twelve_sites_have_a_profile():
    assert len([name for name in config_names("cluster") if name in PROFILES and name not in NOT_SITES]) >= 12


def test_a_dry_run_says_where_there_is_no_script_and_waits_for_nothing(dry_run, capsys):
    assert "cluster.executor=local has no scripts" in dry_run("cv", "cluster=local")
    assert main(["cv", "--dry-run", "--wait", *SMALL, "cluster=slurm"]) == 2
    assert "nothing is submitted that could be waited for" in capsys.readouterr().err


def test_a_dry_run_of_a_grid_has_rows_with_the_same_settings_once(dry_run, tmp_path):
    grid = tmp_path / "grid.yaml"
    grid.write_text(GRID + "  again: {set: {train.lr: 1.0e-4}}\n")
    assert "#SBATCH --array=0-19%20\n" in dry_run("grid", f"grid={grid}", "cluster=slurm")
