"""Promises of a cluster profile's settings: what can be said, what is refused, and what old files go on meaning."""

from __future__ import annotations

import pytest
import yaml

from bushpc.config import CellConfig, ClusterConfig, compose, explain, reconfigure
from bushpc.config.fields import Options
from bushpc.config.frozen import flat_settings
from bushpc.dispatch.plan import grid_plan
from bushpc.errors import ConfigError

SMALL = ["model=unet_small", "data=phantom"]
ON_SLURM = [*SMALL, "cluster=slurm"]


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Writes a profile `mysite` of the user's own."""
    monkeypatch.setenv("BUSHPC_CONFIGS", str(tmp_path))
    (tmp_path / "cluster").mkdir()

    def write(text: str, name: str = "mysite") -> None:
        (tmp_path / "cluster" / f"{name}.yaml").write_text(text)

    return write


@pytest.mark.parametrize(
    ("given", "count", "kind"),
    [("4", 4, None), ("a100:4", 4, "a100"), ("a100_1g.5gb:4", 4, "a100_1g.5gb"), ("0", 0, None), ("null", 0, None)],
)
def test_gpus_are_a_number_or_a_type_and_a_number(given, count, kind):
    profile = compose([*ON_SLURM, f"cluster.gpus={given}", "cluster.ranks_per_node=4"]).cluster
    assert (profile.gpu_count, profile.gpu_type) == (count, kind)


@pytest.mark.parametrize("given", ["a100", "-1", "4:a100", "a100:x"])
def test_gpus_that_are_neither_are_refused_with_an_example(given):
    with pytest.raises(ConfigError, match=r"type and number; for example cluster.gpus=4 or cluster.gpus=a100:4"):
        compose([*ON_SLURM, f"cluster.gpus={given}"])


def test_a_node_of_four_gpus_runs_four_cells_of_one_rank_or_one_of_four():
    own = compose([*ON_SLURM, "cluster.gpus=4", "cluster.cells_per_job=4"]).cluster
    assert (own.gpu_count, own.cells_per_job, own.world_size) == (4, 4, 1)
    compose([*ON_SLURM, "cluster.gpus=1", "cluster.cells_per_job=4"])
    for words in (["cluster.cells_per_job=3"], ["cluster.ranks_per_node=2"], []):
        with pytest.raises(ConfigError, match=r"each rank drives one GPU. Set cluster.ranks_per_node=4, or cluster.ce"):
            compose([*ON_SLURM, "cluster.gpus=4", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cluster.submit_window=0"], r"cluster.submit_window=0: must be ≥ 1"),
        (["cluster.gres=[gpu:a100:1]"], r"GPUs are asked for once; set cluster.gpus=a100:1 cluster.gpus_by=gres"),
        (["cluster.gres=[nvme 100]"], r"write name:count or name:type:count"),
        (["cluster.mem_gb=0", "cluster.mem_per=cpu"], r"0 means all memory of the node"),
        (["cluster.mem_gb=4", "cluster.mem_per=gpu"], r"set cluster.mem_per=node"),
        (["cluster.container.runtime=custom"], r"runtime=custom needs a command"),
        (["cluster.gpus_by=gre"], r"did you mean 'gres'"),
        (["cluster.sbatch.-c=a"], r"long name without dashes"),
        (["cluster.sbatch.hint=false"], r"true for an option without a value, or null"),
        (["cluster.sbatch=hint"], r"write options as {name: value}"),
        (["cluster.sbath.hint=a"], r"unknown setting 'cluster.sbath.hint'"),
    ],
)
def test_what_contradicts_itself_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        compose([*ON_SLURM, *words])


def test_free_options_come_from_yaml_and_words_as_they_are_typed(site):
    site("defaults: [slurm, _self_]\nsbatch: {hint: nomultithread, licenses: 'sps:2', spread-job: true, wait: no}\n")
    site("defaults: [mysite, _self_]\nsbatch: {licenses: null, comment: 010}\n", "mine")
    cell = compose([*SMALL, "cluster=mine", "cluster.srun.gpu-bind=none", "cluster.sbatch.mail_type=END"])
    expected = {"hint": "nomultithread", "licenses": None, "spread-job": True, "wait": "no", "comment": "010"}
    assert cell.cluster.sbatch == Options({**expected, "mail-type": "END"})
    assert cell.cluster.srun == Options({"gpu-bind": "none"})
    assert compose([*SMALL, "cluster=mine", "cluster.sbatch={hint:compute}"]).cluster.sbatch["hint"] == "compute"
    again = CellConfig.from_dict(yaml.safe_load(cell.to_yaml()))
    assert again == cell
    assert {cell.cluster: 1}[again.cluster] == 1, "profiles can be compared and counted"
    assert reconfigure(cell, ["cluster.sbatch.hint=compute"], {}).cluster.sbatch["hint"] == "compute"
    origins = {each.key: each.source for each in explain([*SMALL, "cluster=mine", "cluster.srun.gpu-bind=none"])}
    assert origins["cluster.srun.gpu-bind"] == "cluster.srun.gpu-bind=none"
    assert origins["cluster.sbatch.hint"].endswith("mysite.yaml:2")
    assert origins["cluster.cpu_jobs.sbatch"] == "default"


# --- settings that were renamed ------------------------------------------------------------------------------------


def test_a_profile_with_an_earlier_name_goes_on_working(site):
    site("defaults: [slurm, _self_]\ngpus_per_node: 2\nranks_per_node: 2\n")
    assert compose([*SMALL, "cluster=mysite"]).cluster.gpus == 2
    site("defaults: [mysite, _self_]\ngpus: a100:2\n", "mine")
    assert compose([*SMALL, "cluster=mine"]).cluster.gpus == "a100:2", "a later file wins, whatever its name for it"
    site("defaults: [slurm, _self_]\ngpus_per_node: 2\ngpus: 2\n", "both")
    with pytest.raises(ConfigError, match="gpus_per_node is the earlier name of gpus; keep gpus alone"):
        compose([*SMALL, "cluster=both"])


def test_words_and_rows_with_an_earlier_name_go_on_working(site, tmp_path, phantom_folder):
    assert compose([*ON_SLURM, "cluster.gpus=3", "cluster.gpus_per_node=1"]).cluster.gpus == 1
    frozen = compose([*ON_SLURM, "engine.device=cuda", "cluster.gpus_per_node=1"])
    two = reconfigure(frozen, ["cluster.gpus_per_node=2", "cluster.ranks_per_node=2"], {})
    assert two.cluster == ClusterConfig(executor="slurm", gpus=2, ranks_per_node=2)
    (tmp_path / "g.yaml").write_text(
        "title: t\nrows:\n  a: {}\n  b: {set: {cluster.gpus_per_node: 2, cluster.ranks_per_node: 2}}\n"
    )
    words = [*ON_SLURM, f"grid={tmp_path / 'g.yaml'}", f"data.root={phantom_folder}", "cluster.gpus_per_node=1"]
    plan = grid_plan([*words, f"runs_dir={tmp_path}"])
    assert [plan.cells[f"{row}-fold0"].cluster.gpus for row in "ab"] == [1, 2]


def test_a_frozen_config_with_an_earlier_name_goes_on_working():
    content = compose([*ON_SLURM, "cluster.gpus=2", "cluster.ranks_per_node=2"]).to_dict()
    content["cluster"]["gpus_per_node"] = content["cluster"].pop("gpus")  # as format 1 wrote it, without a stamp
    assert CellConfig.from_dict(content).cluster.gpus == 2
    assert flat_settings(yaml.safe_dump(content), {})["cluster.gpus"] == 2
    with pytest.raises(ConfigError, match=r"unknown setting .cluster.gpus_per_node."):
        CellConfig.from_dict({"format": 2, **content})
