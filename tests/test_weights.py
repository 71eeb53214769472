"""Staging of pretrained weights against a hub made of files, and what `check` finds wrong with a folder."""

import hashlib
import json
import shlex
import sys
from types import ModuleType, SimpleNamespace

import huggingface_hub
import pytest
import safetensors.torch
import torch

from bushpc import weights
from bushpc.cli import main
from bushpc.config import ModelConfig, WeightFile, compose, config_class
from bushpc.errors import WeightsError
from bushpc.models.base import Model
from bushpc.models.baselines import UNet
from bushpc.models.xbusnet import XBusNet

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@config_class
class ToyConfig(ModelConfig):
    def weight_files(self):
        return list(Toy.files) if self.pretrained else []


class Toy(Model):
    Config = ToyConfig
    makes = frozenset({"prob_BKHW"})
    files = (WeightFile(name="toy.safetensors", hub_repo="lab/toy", hub_file="model.safetensors", revision="main"),)


Toy.__module__ = "bushpc.models.toy"
CONFIG = ToyConfig(image_size=32, pretrained=True)


@pytest.fixture(autouse=True)
def toy_is_a_model(monkeypatch, tmp_path_factory):
    """Toy as a contributor adds it: one module, one yaml."""
    module = ModuleType("bushpc.models.toy")
    module.Toy = Toy
    monkeypatch.setitem(sys.modules, "bushpc.models.toy", module)
    configs = tmp_path_factory.mktemp("configs") / "configs"
    (configs / "model").mkdir(parents=True)
    (configs / "model" / "toy.yaml").write_text(
        "# @package _global_\nmodel: {_target_: bushpc.models.toy.Toy, image_size: 32, pretrained: true}\n"
    )
    monkeypatch.setenv("BUSHPC_CONFIGS", str(configs))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stands in for the Hugging Face hub: one repository, one file; counts downloads."""
    source = tmp_path / "hub.safetensors"
    safetensors.torch.save_file({"w": torch.arange(3.0)}, source)
    state = SimpleNamespace(downloads=[], content=source.read_bytes(), error=None)

    def download(repo, filename, *, revision, local_dir):
        state.downloads.append((repo, filename, revision))
        if state.error is not None:
            raise state.error
        path = f"{local_dir}/{filename}"
        with open(path, "wb") as file:
            file.write(state.content)
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(
        huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=lambda repo, revision: SimpleNamespace(sha=COMMIT))
    )
    return state


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "HfApi", refuse)


def test_pulled_files_verify_and_are_recorded_with_commit_and_hash(hub, tmp_path):
    folder = tmp_path / "weights"
    assert weights.pull(Toy, CONFIG, folder) == [folder / "toy.safetensors"]
    assert hub.downloads == [("lab/toy", "model.safetensors", COMMIT)]
    entry = json.loads((folder / "weights.lock.json").read_text())["toy.safetensors"]
    assert entry["commit"] == COMMIT
    assert entry["revision"] == "main"
    assert entry["sha256"] == hashlib.sha256(hub.content).hexdigest()
    assert weights.check(Toy, CONFIG, folder) == []
    assert sorted(path.name for path in folder.iterdir()) == ["toy.safetensors", "weights.lock.json"]


def test_pulling_twice_downloads_once(hub, tmp_path):
    weights.pull(Toy, CONFIG, tmp_path)
    weights.pull(Toy, CONFIG, tmp_path)
    assert len(hub.downloads) == 1


def test_a_damaged_file_is_named_and_pulled_again(hub, tmp_path):
    weights.pull(Toy, CONFIG, tmp_path)
    damaged = bytearray(hub.content)
    damaged[-1] ^= 1
    (tmp_path / "toy.safetensors").write_bytes(damaged)
    (problem,) = weights.check(Toy, CONFIG, tmp_path)
    assert "toy.safetensors" in problem
    assert hashlib.sha256(hub.content).hexdigest() in problem
    weights.pull(Toy, CONFIG, tmp_path)
    assert weights.check(Toy, CONFIG, tmp_path) == []


def test_a_hub_that_refuses_connections_is_a_weights_error_and_no_traceback(tmp_path, monkeypatch):
    """The library then raises its HTTP client's own error, which is no OSError."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match="Pull on a machine with internet access"):
        weights.pull(Toy, CONFIG, tmp_path / "weights")


def test_a_download_that_fails_leaves_nothing_behind(hub, tmp_path):
    hub.error = OSError("connection reset")
    with pytest.raises(WeightsError, match=r"lab/toy.*connection reset.*copy the weights folder"):
        weights.pull(Toy, CONFIG, tmp_path / "weights")
    assert list((tmp_path / "weights").iterdir()) == []


def test_missing_weights_are_one_problem_with_the_command(offline, tmp_path):
    (problem,) = weights.check(Toy, CONFIG, tmp_path)
    assert "toy.safetensors is not staged" in problem
    with pytest.raises(WeightsError, match="Run: bushpc weights pull model=toy"):
        weights.require(Toy, CONFIG, tmp_path)


@pytest.mark.parametrize(
    ("folder", "overrides"),
    [
        ("weights", ["model=xbusnet", "model.encoder=resnet18.a1_in1k", "model.decoder_channels=[64,32,16,8]"]),
        ("weights", ["model=xbusnet", "model.gfe=false", "model.sfa=false"]),
        ("scratch/w", ["model=xbusnet", "model.lfe=false"]),
        ("weights", ["model=unet", "model.encoder=resnet18"]),
        ("scratch/w", ["model=unet_small", "model.pretrained=true"]),
        ('it\'s "my" w,x=[1] \\$(touch trap)', ["model=unet"]),
    ],
)
def test_the_command_that_is_advised_pulls_what_is_missing_to_where_it_is_looked_for(
    hub, tmp_path, monkeypatch, folder, overrides
):
    monkeypatch.chdir(tmp_path)
    cell = compose(overrides)
    with pytest.raises(WeightsError) as stopped:
        weights.require(cell.model_class, cell.model, tmp_path / folder)
    _, _, command = str(stopped.value).partition("\nRun: ")
    program, *words = shlex.split(command)
    assert (program, main(words)) == ("bushpc", 0)
    weights.require(cell.model_class, cell.model, tmp_path / folder)
    wanted = [(file.hub_repo, file.hub_file) for file in cell.model.weight_files()]
    assert [(repo, name) for repo, name, _ in hub.downloads] == wanted


def test_the_command_that_is_advised_repeats_no_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for model_class, name in ((XBusNet, "xbusnet"), (UNet, "unet")):
        cell = compose([f"model={name}"])
        assert weights.pull_command(model_class, cell.model, cell.weights_folder) == f"bushpc weights pull model={name}"


def test_a_file_nobody_pulled_is_not_trusted(offline, tmp_path):
    safetensors.torch.save_file({"w": torch.zeros(1)}, tmp_path / "toy.safetensors")
    (problem,) = weights.check(Toy, CONFIG, tmp_path)
    assert "not recorded" in problem


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"revision": "v2"}, "at revision main, not v2"), ({"hub_repo": "lab/other"}, "not lab/other/model.safetensors")],
)
def test_a_file_from_elsewhere_is_named(hub, tmp_path, monkeypatch, changes, message):
    weights.pull(Toy, CONFIG, tmp_path)
    monkeypatch.setattr(Toy, "files", (Toy.files[0]._replace(**changes),))
    (problem,) = weights.check(Toy, CONFIG, tmp_path)
    assert message in problem


def test_nothing_is_needed_from_scratch(offline, tmp_path):
    config = ModelConfig(image_size=32, pretrained=False)
    assert weights.check(Toy, config, tmp_path / "absent") == []
    weights.require(Toy, config, tmp_path / "absent")


def test_staged_tensors_load_without_the_network(hub, tmp_path, monkeypatch):
    weights.pull(Toy, CONFIG, tmp_path)
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert weights.load_staged(Toy, Toy.files[0], tmp_path)["w"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("folder", ["given", "none"])
def test_loading_what_is_not_staged_names_the_command(tmp_path, folder):
    where = f" weights_dir={tmp_path}" if folder == "given" else ""
    with pytest.raises(
        WeightsError, match=f"run, with this run's model settings, bushpc weights pull model=toy{where}"
    ):
        weights.load_staged(Toy, Toy.files[0], tmp_path if folder == "given" else None)


def test_a_file_that_is_not_safetensors_is_refused(tmp_path):
    (tmp_path / "toy.safetensors").write_bytes(b"\x80\x04 a pickle could run code")
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        weights.load_staged(Toy, Toy.files[0], tmp_path)


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "toy.safetensors").write_bytes(b"x")
    (tmp_path / "weights.lock.json").write_text("{")
    with pytest.raises(WeightsError, match=r"weights.lock.json cannot be read.*pull the weights again"):
        weights.check(Toy, CONFIG, tmp_path)
