"""Promises of GAN, CGAN, DCGAN, DDPM and SGD: each player learns by its own loss; an image follows its conditions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bushpc.config import compose
from bushpc.errors import ConfigError
from bushpc.sample import Batch

SMALL = ("model.image_size=16", "data=phantom", "cluster=local", "train.accumulate=1")
TINY = ("model.channels=[8,16]", "model.groups=4", "model.layers=1", "model.steps=2")
WORDS = {
    **{kind: ("model.width=4", "model.noise=5") for kind in ("gan", "cgan", "dcgan")},
    **{name: TINY for name in ("ddpm", "sgd")},
}


def made(name):
    cell = compose([f"model={name}", *SMALL, *WORDS[name]])
    torch.manual_seed(0)
    return cell.model_class(cell.model)


@pytest.fixture
def batch():
    torch.manual_seed(1)
    mask = torch.zeros(2, 1, 16, 16)
    mask[:, :, 4:9, 3:12] = 1
    return Batch(
        keys=["a", "b"],
        epochs=[0, 0],
        image_BCHW=torch.rand(2, 3, 16, 16),
        mask_BKHW=mask,
        label_B=torch.tensor([0, 1]),
        conditions={"captions": ["a benign tumor", "a malignant tumor"]},
    )


@pytest.mark.parametrize("name", WORDS)
def test_every_parameter_has_a_gradient_and_scores_are_reproducible(name, batch):
    model = made(name)
    model(batch).total.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    with torch.no_grad():
        first, second = (model.predict(batch).scores for _ in range(2))
    [(metric, scores)] = first.items()
    assert scores.shape == (2,)
    assert torch.equal(scores, second[metric])


@pytest.mark.parametrize("kind", ["gan", "cgan", "dcgan"])
def test_each_players_gradient_is_that_of_its_own_loss_alone(kind, batch):
    def losses(model):
        torch.manual_seed(7)
        z = torch.randn(2, model.config.noise)
        real = model.discriminator(2 * batch.image_BCHW - 1, batch.mask_BKHW, batch.label_B)
        fake = model.discriminator(model.generator(z, batch.mask_BKHW, batch.label_B), batch.mask_BKHW, batch.label_B)
        ones, zeros = torch.ones(2), torch.zeros(2)
        d = F.binary_cross_entropy_with_logits(real, ones) + F.binary_cross_entropy_with_logits(fake, zeros)
        return d, F.binary_cross_entropy_with_logits(fake, ones)

    model = made(kind)
    d, g = losses(model)
    d_grads = torch.autograd.grad(d, list(model.discriminator.parameters()), retain_graph=True)
    g_grads = torch.autograd.grad(g, list(model.generator.parameters()))
    model = made(kind)
    torch.manual_seed(7)
    model(batch).total.backward()
    for parameters, grads in ((model.discriminator, d_grads), (model.generator, g_grads)):
        for parameter, grad in zip(parameters.parameters(), grads, strict=True):
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "reads_mask", "reads_label"), [
    ("gan", True, False), ("cgan", True, True), ("dcgan", True, False), ("ddpm", False, False), ("sgd", True, False),
])  # fmt: skip
def test_an_image_depends_on_its_seed_and_on_what_the_model_is_conditioned_on(name, reads_mask, reads_label, batch):
    model, mask = made(name).eval(), batch.mask_BKHW[:1, 0]
    first = model.generate(mask, ["a benign tumor"], [1])
    assert first.shape == (1, 3, 16, 16)
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, model.generate(mask, ["a benign tumor"], [1]))
    assert not torch.equal(first, model.generate(mask, ["a benign tumor"], [2]))
    assert torch.equal(first, model.generate(1 - mask, ["a benign tumor"], [1])) != reads_mask
    assert torch.equal(first, model.generate(mask, ["a malignant tumor"], [1])) != reads_label


def test_sizes_that_cannot_be_built_are_refused():
    with pytest.raises(ConfigError, match="must be a power of two"):
        compose(["model=dcgan", "model.image_size=48", "data=phantom", "cluster=local"])
    with pytest.raises(ConfigError, match="is not a multiple of 32"):
        compose(["model=sgd", "model.image_size=40", "data=phantom", "cluster=local"])
