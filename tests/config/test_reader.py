"""Promises of the one reader: a text is taken as it is typed, and yaml files mean the same wherever they are read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from bushpc.config import CellConfig, Composer, compose, compose_command, explain, reconfigure
from bushpc.dispatch.grid_file import load_grid
from bushpc.errors import ConfigError
from bushpc.generate.config import GenerateConfig

SMALL = ["model=unet_small", "data=phantom"]


@pytest.fixture
def configs(tmp_path, monkeypatch) -> Path:
    """The user's own folder of configs."""
    for group in ("cluster", "model", "data"):
        (tmp_path / group).mkdir()
    monkeypatch.setenv("BUSHPC_CONFIGS", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("text", ["2026_11_30", "71e3442", "010", "1e5", "true", "0x1F", "1.10"])
def test_a_name_is_taken_as_it_is_typed(text):
    assert compose([*SMALL, f"name={text}"]).name == text


ODD = ["2026_11", "010", "12:30", "a b", "[x]", "a=b", "#1", "~x", "x,y", "größe", "'q'", '"', "{a}", "a\\b", "$(x)"]


@pytest.mark.parametrize("text", ODD)
def test_a_text_means_the_same_as_a_word_in_a_site_yaml_and_in_a_grid(text, configs):
    (configs / "cluster" / "site.yaml").write_text(
        yaml.safe_dump({"defaults": ["slurm", "_self_"], "account": text}, allow_unicode=True, sort_keys=False)
    )
    assert compose([*SMALL, f"cluster.account={text}"]).cluster.account == text
    assert compose([*SMALL, "cluster=site"]).cluster.account == text
    assert Composer(SMALL)({"cluster.account": text}).cluster.account == text


@pytest.mark.parametrize("text", ["010", "2026_11", "12:30", "1e3", "no", "1.10", "2026-11-30"])
def test_a_text_of_a_site_yaml_needs_no_quotes(text, configs):
    (configs / "cluster" / "site.yaml").write_text(f"executor: slurm\naccount: {text}\n")
    assert compose([*SMALL, "cluster=site"]).cluster.account == text


@pytest.mark.parametrize("folder", ["a b", "[x]", "a=b", "#1", "~x", "x,y", "größe", "(1)", "a'b"])
def test_a_path_may_have_any_characters(folder, tmp_path):
    assert compose([*SMALL, f"runs_dir={tmp_path}/{folder}"]).runs_dir == f"{tmp_path}/{folder}"
    assert compose([*SMALL, f"evaluate.external=['{tmp_path}']"]).evaluate.external == (str(tmp_path),)


def test_a_list_of_texts_keeps_each_as_it_is_typed():
    setup = compose([*SMALL, "cluster.setup=[module load 010, 'echo a,b', export A=${HOME}/x]"]).cluster.setup
    assert setup == ("module load 010", "echo a,b", "export A=${HOME}/x")
    with pytest.raises(ConfigError, match=re.escape("a list is needed; write cluster.setup=[module load x]")):
        compose([*SMALL, "cluster.setup=module load x"])


def test_a_site_yaml_builds_on_another_wherever_it_is_read(configs, monkeypatch):
    monkeypatch.setenv("BUSHPC_TEST_ACCOUNT", "0123")
    monkeypatch.setenv("BUSHPC_TEST_NODES", "2")
    (configs / "cluster" / "site.yaml").write_text(
        "defaults: [slurm, _self_]\naccount: ${oc.env:BUSHPC_TEST_ACCOUNT}\ngrace_s: 1e2\ntime_min: 77\n"
        "nodes: ${oc.env:BUSHPC_TEST_NODES}\nqos: q-${cluster.account}\n"
    )
    composed = compose([*SMALL, "cluster=site"]).cluster
    resumed = reconfigure(compose(SMALL), ["cluster=site"], {}).cluster
    assert composed == resumed
    assert (composed.executor, composed.account, composed.grace_s, composed.time_min) == ("slurm", "0123", 100.0, 77)
    assert (composed.nodes, composed.qos) == (2, "q-0123")
    assert (
        reconfigure(compose(SMALL), ["cluster=site", "cluster.qos=010"], {"cluster.time_min": 5}).cluster.qos == "010"
    )


def test_a_site_yaml_that_lacks_a_field_gets_its_default(configs):
    (configs / "cluster" / "site.yaml").write_text("executor: slurm\n")
    assert compose([*SMALL, "cluster=site"]).cluster.time_min == 1440


def test_a_site_yaml_with_an_unknown_field_is_refused_with_its_place(configs):
    (configs / "cluster" / "site.yaml").write_text("executor: slurm\n\ntime_mn: 3\n")
    with pytest.raises(ConfigError, match=r"unknown setting 'cluster.time_mn'; did you mean 'cluster.time_min'\?"):
        compose([*SMALL, "cluster=site"])


@pytest.mark.parametrize("text", ["a: [1", "a: 1\na: 2\n", "- 1\n", "\tx: 1"])
def test_a_yaml_that_cannot_be_read_is_named(text, configs):
    (configs / "cluster" / "site.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"site\.yaml"):
        compose([*SMALL, "cluster=site"])


def test_a_variable_that_is_not_set_is_named(configs):
    (configs / "cluster" / "site.yaml").write_text("account: ${oc.env:BUSHPC_NO_SUCH}\n")
    with pytest.raises(ConfigError, match="BUSHPC_NO_SUCH"):
        compose([*SMALL, "cluster=site"])


def test_a_model_of_ones_own_builds_on_a_shipped_one(configs):
    (configs / "model" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [unet_small, _self_]\ntrain: {lr: 3e-4}\n"
    )
    mine, shipped = compose(["model=mine", "data=phantom"]), compose(SMALL)
    assert (mine.train.lr, mine.model, mine.train.warmup) == (3e-4, shipped.model, shipped.train.warmup)


def test_a_config_yaml_of_ones_own_gives_every_run_its_defaults_and_models_papers_win(configs):
    (configs / "config.yaml").write_text("defaults: [data: phantom]\ntrain: {lr: 0.003}\ncluster: {time_min: 77}\n")
    ours = compose(["model=unet"])
    assert (ours.choices["data"], ours.choices["engine"], ours.choices["cluster"]) == ("phantom", "ddp", "local")
    assert (ours.train.lr, ours.cluster.time_min) == (0.003, 77)
    assert compose(["model=vit_diffusion"]).train.lr == 5e-5, "its yaml states the paper's"
    assert compose(["model=xbusnet"]).train.lr == 0.003, "its yaml leaves 1e-4 to the defaults"
    assert compose(["model=vit_diffusion", "train.lr=1"]).train.lr == 1
    (configs / "config.yaml").write_text("defaults: phantom\n")
    with pytest.raises(ConfigError, match="`defaults` is a list of groups"):
        compose(["model=unet_small"])


def test_a_commands_own_settings_are_read_alike(configs):
    (configs / "generate.yaml").write_text("n: 7\npriors: {sizes_mm: {small: [4, 9]}}\n")
    config = compose_command(GenerateConfig, "generate", ["priors.malignant_share=1", "priors.sizes_mm.large=[21,22]"])
    assert (config.n, config.priors.malignant_share) == (7, 1.0)
    assert config.priors.sizes_mm == {"small": (4.0, 9.0), "medium": (10.0, 20.0), "large": (21.0, 22.0)}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "train.lr=1,2",
            "train.lr=1,2: one value is needed, for example train.lr=1. To train with several, write a grid",
        ),
        ("seed=010", "seed='010' is a str; allowed: int; for example seed=0"),
        ("train.lr='1e-4'", "train.lr='1e-4' is a str; allowed: float > 0"),
        ("cluster.nodes=1.5", "cluster.nodes=1.5 is a float; allowed: int ≥ 1; for example cluster.nodes=1"),
        ("train.balance=1", "train.balance=1 is a int; allowed: true or false; for example train.balance=false"),
        ("engine.kind=zero4", "unknown engine.kind 'zero4'; did you mean 'zero3'? Valid: ddp, zero1, zero2, zero3."),
        ("train.lr={a", "train.lr={a cannot be read"),
        ("data.name=null", "data.name=None is a NoneType; allowed: text; for example data.name=breast"),
        ("train=3", "did you mean 'train.lr'"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed_and_what_works(word, said):
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        compose([*SMALL, word])
    assert "multirun" not in str(caught.value)


def test_an_explicit_number_of_iterations_is_never_ignored():
    words = ["model=sam_multitask_small", "data=phantom"]
    assert compose(words).train.epochs is not None
    for cell in (compose([*words, "train.iterations=10"]), Composer(words)({"train.iterations": 10})):
        assert (cell.train.iterations, cell.train.epochs) == (10, None)
    with pytest.raises(ConfigError, match=r"train.iterations=10 with train.epochs=3: .* give one of them"):
        compose([*words, "train.iterations=10", "train.epochs=3"])


def test_a_grids_numbers_may_be_written_as_yaml_1_1_reads_text():
    assert Composer(SMALL)({"train.lr": "3e-4"}).train.lr == 3e-4
    assert Composer(SMALL)({"prompting.size_quantiles": ["3e-1", "7e-1"]}).prompting.size_quantiles == (0.3, 0.7)


def test_a_grid_of_ones_own_keeps_texts_and_reads_numbers(configs):
    (configs / "grid").mkdir()
    rows = (
        "{a: {set: {cluster.account: 010}}, b: {set: {cluster.account: 2026_11}}, c: {set: {cluster.account: 12:30}}}"
    )
    (configs / "grid" / "mine.yaml").write_text(f"axes:\n  train.lr: [1e-4, 3e-4]\nrows: {rows}\n")
    cells = [Composer(SMALL)(row.settings) for row in load_grid("mine").rows]
    assert [cell.train.lr for cell in cells[:2]] == [1e-4, 3e-4]
    assert [cell.cluster.account for cell in cells[2:]] == ["010", "2026_11", "12:30"]


def test_each_value_is_explained_by_where_it_comes_from(configs):
    (configs / "cluster" / "site.yaml").write_text("defaults: [slurm, _self_]\n\ntime_min: 5\n")
    found = {origin.key: origin for origin in explain([*SMALL, "cluster=site", "train.lr=3e-4"])}
    assert (found["train.lr"].value, found["train.lr"].source) == (3e-4, "train.lr=3e-4")
    assert found["train.warmup"].source.startswith("configs/model/unet_small.yaml:")
    assert found["cluster.time_min"].source == f"{configs}/cluster/site.yaml:3"
    assert found["cluster.executor"].source.startswith("configs/cluster/slurm.yaml:")
    assert found["loader.workers"].about.sentence
    counted = explain(["model=vit_diffusion", "data=phantom", "train.iterations=10"])
    assert next(each.source for each in counted if each.key == "train.epochs") == "train.iterations=10"
    frozen = compose([*SMALL, "cluster=site", "train.lr=3e-4"])
    assert CellConfig.from_dict(frozen.to_dict()) == frozen
