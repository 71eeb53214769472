"""Promises of composition: what cannot work is refused by name, and a frozen config is the same config."""

from __future__ import annotations

import re

import pytest

from bushpc.config import GROUPS, CellConfig, compose, config_names, differences, explain, places, reconfigure
from bushpc.config.catalogue import kinds
from bushpc.config.read import plain
from bushpc.config.source import read_config
from bushpc.errors import ConfigError

SMALL = ["model=xbusnet_small", "data=phantom"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model=xbusnt", "did you mean 'xbusnet'"),
        ("data=brest", "did you mean 'breast'"),
        ("cluster=sllurm", "did you mean 'slurm'"),
        ("train.itrations=3", "did you mean 'train.iterations'"),
        ("train.iterations=abc", "train.iterations='abc' is a str; allowed: int"),
        ("train.iterations=0", "train.iterations=0: must be ≥ 1; for example train.iterations=1000"),
        ("prompts=gt", "Valid: first_pass, none, oracle, shuffled_attributes, wrong_quadrant, wrong_size"),
        ("folds=mine", "Valid: frozen, grouped, hybrid_attention_split"),
        ("train.accumulate=3", "in train.accumulate=3 parts each: make it a multiple of 3"),
        ("train.keep_best=dice", "train.keep_best=dice needs validations during training: set train.validate_every"),
        ("train.keep_best=loss", "unknown train.keep_best 'loss'"),
        ("train.keep_best=precision train.validate_every=5", "no validation measures it; add it to evaluate.metrics"),
        ("train.keep_best=label_auc train.validate_every=5", "tells no labels apart"),
        ("train.ema=1", "train.ema=1: must be ≥ 0 and < 1"),
        ("resume_changes=[train.lrr]", "unknown setting in resume_changes 'train.lrr'; did you mean 'train.lr'"),
        (
            "resume_changes=[train.batch_size]",
            "would skip some and repeat others: choose another name=… and start again",
        ),
        ("engine.precision=fp8", "Valid: auto, bf16, fp16, fp32"),
        ("train.batch_size=3 cluster.ranks_per_node=2", "make it a multiple of 2"),
        ("engine.device=cuda", "gives a cell no GPU"),
        ("just_a_word", "write key=value"),
        ("name=$(touch${IFS}owned)", "a folder name of letters"),
        ("name=../elsewhere", "a folder name of letters"),
        ("augment.zoom=1", "must be ≥ 0 and < 1"),
        ("train.lr=inf", "train.lr=inf: must be > 0 and < inf; for example train.lr=0.0001"),
        ("prompting.size_quantiles=[0.7,0.3]", "two rising numbers"),
    ],
)
def test_an_impossible_override_is_refused_and_the_way_out_is_named(override, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        compose([*SMALL, *override.split(" ")])


@pytest.mark.slow
@pytest.mark.parametrize("model", config_names("model"))
def test_every_model_composes_with_every_dataset_and_cluster(model):
    # What a dataset sets and what a cluster sets are other groups: each of one with one of the other is enough.
    datasets, clusters = config_names("data"), config_names("cluster")
    for number in range(max(len(datasets), len(clusters))):
        data, cluster = datasets[number % len(datasets)], clusters[number % len(clusters)]
        cell = compose([f"model={model}", f"data={data}", f"cluster={cluster}"])
        assert cell.choices["model"] == model
        assert cell.data.name == data


def test_a_frozen_config_reads_back_as_itself(tmp_path):
    cell = compose([*SMALL, "train.lr=3e-4"])
    path = tmp_path / "config.yaml"
    path.write_text(cell.to_yaml())
    assert CellConfig.load(path) == cell
    assert CellConfig.load(path).hash == cell.hash


def test_the_hash_follows_what_is_learnt_and_nothing_else():
    cell = compose(SMALL)
    assert compose([*SMALL, "train.lr=3e-4"]).hash != cell.hash
    assert compose([*SMALL, "seed=1"]).hash != cell.hash
    assert compose([*SMALL, "cluster=slurm", "name=other", "runs_dir=elsewhere", "loader.workers=3"]).hash == cell.hash
    assert compose([*SMALL, "evaluate.explain=0"]).hash == cell.hash


def test_a_change_that_is_allowed_by_name_is_no_difference():
    changed = compose([*SMALL, "train.iterations=7", "seed=3", "resume_changes=[train.iterations]"])
    assert differences(compose(SMALL), changed) == ["seed: 0 → 3"]


def test_differences_name_each_changed_setting():
    assert differences(compose(SMALL), compose([*SMALL, "train.iterations=7"])) == [
        f"train.iterations: {compose(SMALL).train.iterations} → 7"
    ]


def test_auto_is_resolved_before_anything_is_frozen():
    assert (compose(SMALL).engine.device, compose(SMALL).engine.precision) == ("cpu", "fp32")
    a100 = compose([*SMALL, "cluster=a100"])
    assert (a100.engine.device, a100.engine.precision) == ("cuda", "bf16")


@pytest.mark.parametrize(
    ("profile", "precision"),
    [
        (["cluster.gpus=a100:1"], "bf16"),
        (["cluster.gpus=v100:1"], "fp16"),
        (["cluster.gpus=nvidia_h100_80gb:1", "cluster.partition=v100"], "bf16"),  # the type tells for certain
        (["cluster.gpus=1", "cluster.constraint=v100-32g"], "fp16"),
        (["cluster.gpus=1", 'cluster.constraint="a100|p100"'], "fp16"),  # a job may get either
        (["cluster.gpus=1", "cluster.partition=gpu_v100"], "fp16"),
        (["cluster.gpus=1", "cluster.account=abc@v100"], "fp16"),
        (["cluster.gpus=t4:1"], "fp16"),
        (["cluster.gpus=mi250:1"], "bf16"),
        (["cluster.gpus=1"], "bf16"),
        (["cluster.gpus=v100:1", "engine.precision=fp32"], "fp32"),
        (["cluster.gpus=0", "cluster.partition=gpu_v100"], "fp32"),
    ],
)
def test_a_gpu_without_bf16_gets_fp16_where_the_precision_is_left_open(profile, precision):
    assert compose([*SMALL, "cluster=slurm", *profile]).engine.precision == precision


def test_xbusnet_defaults_are_the_papers():
    """Section 2.3: 1000 iterations, batch 4, AdamW 1e-4; 352 x 352; threshold 0.30 for the first pass."""
    cell = compose(["model=xbusnet", "data=breast"])
    train = cell.train
    assert (train.iterations, train.batch_size, train.lr, train.warmup) == (1000, 4, 1e-4, 0)
    assert (cell.model.image_size, cell.prompting.tau, cell.evaluate.threshold) == (352, 0.30, 0.5)
    assert cell.variants[0].name == "first_pass"


ALL_SOURCES = "also_prompts=[oracle,none,wrong_size,wrong_quadrant,shuffled_attributes]"


@pytest.mark.parametrize(
    ("overrides", "left"),
    [
        ([], ["first_pass", "oracle", "none", "wrong_size", "wrong_quadrant", "shuffled_attributes"]),
        (["model.sfa=false"], ["first_pass", "oracle", "none", "wrong_size", "wrong_quadrant"]),
        (["model.gfe=false"], ["none", "shuffled_attributes"]),
        (["model.gfe=false", "model.sfa=false"], ["none"]),
        (
            ["model.sfa=false", "prompts=shuffled_attributes"],
            ["first_pass", "oracle", "none", "wrong_size", "wrong_quadrant"],
        ),
        (["model.gfe=false", "prompts=wrong_size"], ["none", "shuffled_attributes"]),
        (["model=unet_small"], ["none"]),
    ],
)
def test_a_model_is_evaluated_with_the_prompts_it_can_read_and_never_gets_the_oracle_for_a_headline(overrides, left):
    assert [variant.name for variant in compose([*SMALL, ALL_SOURCES, *overrides]).variants] == left


# A dataset's name, and a method which is not that of new runs.
NEEDED = ("data.name", "augment.method")


# A site's profile says what the site wants, whatever our defaults become.
@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in GROUPS if group != "cluster" for name in config_names(group)]
)
def test_a_yaml_states_nothing_that_would_be_so_without_it(group, name):
    path = places.config_file(f"{group}/{name}")
    listed = [entry for entry in read_config(path)[1].get("defaults", []) if not isinstance(entry, dict)]
    below = [entry.text for entry in listed if entry.text != "_self_"]
    settings = explain([f"{group}={name}"])
    without = {origin.key: origin.value for origin in explain([f"{group}={below[0]}"])} if below else {}
    model = compose([f"{group}={name}"]).model
    defaults = {key: plain(default) for key, (_, default) in (kinds(CellConfig) | kinds(type(model))).items()}
    own = {origin.key: origin.value for origin in settings if origin.source.startswith(f"configs/{group}/{name}.yaml:")}
    assert [key for key, value in own.items() if value == (defaults | without)[key] and key not in NEEDED] == []


def test_a_frozen_cell_takes_another_cluster_without_becoming_another_cell():
    frozen = compose(["model=unet_small", "data=phantom", "cluster=slurm", "train.batch_size=16"])
    changed = reconfigure(frozen, ["cluster.nodes=2", "cluster.ranks_per_node=8", "cluster.setup=[module load x]"], {})
    assert (changed.cluster.nodes, changed.cluster.ranks_per_node, changed.cluster.setup) == (2, 8, ("module load x",))
    assert changed.hash == frozen.hash
    local = reconfigure(frozen, ["cluster=local"], {"cluster.cpus_per_rank": 4})
    assert (local.cluster.executor, local.cluster.cpus_per_rank, local.choices["cluster"]) == ("local", 4, "local")
    with pytest.raises(ConfigError, match=r"trains on the CPU .*add cluster.gpus=0"):
        reconfigure(frozen, ["cluster=a100"], {})
    assert reconfigure(frozen, ["cluster=a100", "cluster.gpus=0"], {}).cluster.mem_gb == 64
    on_gpu = compose(["model=unet_small", "data=phantom", "cluster=a100"])
    with pytest.raises(ConfigError, match=r"engine.device=cuda, but cluster=slurm gives a cell no GPU"):
        reconfigure(on_gpu, ["cluster=slurm"], {})
    with pytest.raises(ConfigError, match=r"did you mean 'cluster.nodes'"):
        reconfigure(frozen, ["cluster.node=2"], {})
