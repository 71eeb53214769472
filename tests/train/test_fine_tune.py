"""Promises of fine-tuning: rates by layer as timm's, and what is frozen stays as it is."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay

from bushpc.cell import build_model
from bushpc.config import compose
from bushpc.dist import World
from bushpc.errors import ConfigError
from bushpc.train.engine import Engine, start_ranks
from bushpc.train.fine_tune import layers_of, lr_scales
from bushpc.train.optim import adamw, set_lr
from tests.train.on_ranks import global_batch

TINY = ("model=efficientnet_small", "data=phantom", "cluster=local", "model.image_size=64", "train.batch_size=4")


def test_the_groups_are_timms():
    cell = compose([*TINY, "train.layer_decay=0.6", "train.weight_decay=0.05", "train.lr=1e-2"])
    model = build_model(cell)
    optimizer = adamw(model, cell.train)
    set_lr(optimizer.param_groups, 1e-2)
    ours = {p: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    reference = param_groups_layer_decay(model.net, weight_decay=0.05, layer_decay=0.6)
    theirs = {p: (1e-2 * group["lr_scale"], group["weight_decay"]) for group in reference for p in group["params"]}
    assert ours.keys() == theirs.keys()
    for parameter, values in theirs.items():
        assert ours[parameter] == pytest.approx(values)
    assert len({rate for rate, _ in ours.values()}) > 5


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "densenet121"])
def test_networks_that_cannot_say_their_layers_are_counted_as_timm_counts_them(name):
    """A copy without timm's own answer, as features_only and other libraries have it."""
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=0)
    reference = group_parameters(net, net.group_matcher(coarse=False), reverse=True)

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self._modules, self._parameters = net._modules, net._parameters

    ours = layers_of(Plain())
    if name == "densenet121":  # timm takes a dense block's transition into the next block
        assert len(set(ours.values())) > 50
        return
    assert ours == reference


def test_a_decoder_has_the_full_rate_and_the_stem_the_least():
    model = build_model(compose([*TINY, "model=hybrid_attention_small", "model.pretrained=false"]))
    scales = lr_scales(model, 0.5)
    assert {scale for name, scale in scales.items() if not name.startswith("encoder.")} == {1.0}
    of_encoder = [scale for name, scale in scales.items() if name.startswith("encoder.")]
    assert max(of_encoder) == 0.5
    assert of_encoder[0] == min(of_encoder)


def test_what_is_frozen_stays_as_it_was_and_all_else_moves():
    cell = compose([*TINY, "train.freeze=[encoder]", "train.layer_decay=0.5"])
    start_ranks(cell, World())
    model = build_model(cell)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine = Engine(cell, World(), model)
    engine.train()
    engine.losses(global_batch(0))
    with engine.predictor():  # a validation in between
        pass
    engine.losses(global_batch(1))
    engine.update(1e-2)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"net.classifier.weight", "net.classifier.bias"}


def test_a_step_moves_each_layer_by_its_share_of_the_rate():
    """Adam's first step is the rate itself, whatever the gradient."""
    cell = compose([*TINY, "train.layer_decay=0.5", "train.weight_decay=0", "train.grad_clip=0"])
    start_ranks(cell, World())
    model = build_model(cell)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = Engine(cell, World(), model)
    engine.train()
    engine.losses(global_batch(0))
    engine.update(1e-2)
    scales = lr_scales(model, 0.5)
    for name, parameter in model.named_parameters():
        step = float((parameter.detach() - before[name]).abs().max())
        assert step <= 1e-2 * scales[name] * 1.01, name
    head = "net.classifier.bias"
    assert float((model.net.classifier.bias.detach() - before[head]).abs().max()) == pytest.approx(1e-2, rel=1e-2)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["train.freeze=[net.nothing]"], "'net.nothing' names no parameter"),
        (["train.freeze=['*']"], "nothing to train"),
        (["train.freeze=['']"], "empty pattern"),
        (["model=vit_diffusion_small", "train.freeze=[encoder]"], "no encoder that is trained"),
        (["train.layer_decay=0"], "must be"),
        (["train.start_row=a"], "without train.start_from"),
        (["train.start_sha256=abc", "train.start_from=x"], "64 hex digits"),
    ],
)
def test_what_cannot_be_frozen_is_refused_by_name(words, reason):
    with pytest.raises(ConfigError, match=reason):
        build_model(compose([*TINY, *words]))
