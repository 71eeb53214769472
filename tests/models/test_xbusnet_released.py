"""XBusNet as released: its structure by cases worked by hand, and beside the authors' code where a clone is at hand.

XBUSNET_RELEASE=<clone of rmallina14/XBusNet at ba770f6>, with BUSHPC_DATA, runs the latter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from bushpc.conditions import AttributePrompt, Highlight, NumericPrompt, SpreadsheetPrompt
from bushpc.config import compose
from bushpc.dispatch.plan import cv_plan
from bushpc.errors import ConfigError
from bushpc.models.xbusnet_released import XBusNetReleased
from bushpc.nn.conv import PreNormResidual
from bushpc.train.optim import Schedule

TINY = (
    *("model=xbusnet_released", "data=phantom", "cluster=local", "fold=0", "model.pretrained=false"),
    *("model.image_size=64", "model.encoder=test_resnet", "model.clip_width=32", "model.clip_layers=1"),
    *("model.clip_heads=2", "model.text_width=32", "model.text_layers=1", "model.text_heads=2", "model.text_dim=32"),
    *("model.global_channels=16", "model.local_channels=16", "model.fusion_channels=16"),
)


@pytest.fixture
def model():
    config = compose(TINY).model
    return XBusNetReleased(config, None)


@pytest.fixture
def batch(make_batch):
    return make_batch(count=2, conditions={"highlights": [None, np.ones((64, 64, 3), np.float32)]})


def test_all_parameters_learn_from_sentences_mixed_with_pictures(model, batch):
    model(batch).total.backward()
    # timm's ResNets start with zeros in the last norm of each block, so what lies before it
    # learns from the second step on.
    first = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert all(name.startswith("lfe.encoder.layer") for name in first)


def test_the_bottleneck_reads_what_the_sentence_makes_of_enc4(model, batch):
    """With transformer and SFA of every other place unchanged, another p_l reaches enc5 only through enc4."""
    seen = []
    model.eval().lfe.transformer5.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    model.predict(batch)
    batch.conditions["attribute_prompts"] = ["another sentence", "and one more"]
    model.predict(batch)
    assert not torch.equal(*seen)


def test_sfa_is_at_least_256_wide_and_does_not_start_as_the_identity(model):
    widths = {site: (sfa.mlp[0].out_features, sfa.mlp[2].out_features // 2) for site, sfa in model.lfe.sfa.items()}
    assert all(width == max(256, channels) for width, channels in widths.values())
    assert all(sfa.mlp[2].weight.abs().sum() > 0 for sfa in model.lfe.sfa.values())


def test_a_fusion_block_normalises_and_activates_before_its_convolutions():
    block = PreNormResidual(16, 8, 8)
    x = torch.randn(2, 16, 5, 5)
    norm1, _, conv1, norm2, _, conv2 = block.body

    def silu_of_groups(norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
        groups = x.reshape(2, 8, -1)
        y = ((groups - groups.mean(2, keepdim=True)) / (groups.var(2, False, keepdim=True) + 1e-5).sqrt()).reshape(
            x.shape
        )
        return y * y.sigmoid()

    inner = conv1(silu_of_groups(norm1, x))
    torch.testing.assert_close(block(x), conv2(silu_of_groups(norm2, inner)) + block.skip(x))


def test_the_global_branch_scales_pixels_by_the_sentences_embedding(model):
    x, c = torch.randn(2, 3, 8, 8), torch.randn(2, 32)
    gfe = model.gfe
    gamma, beta = c @ gfe.W_mul.weight.T + gfe.W_mul.bias, c @ gfe.W_add.weight.T + gfe.W_add.bias
    expected = torch.stack(
        [gfe.project(x[i : i + 1])[0] * gamma[i, :, None, None] + beta[i, :, None, None] for i in (0, 1)]
    )
    torch.testing.assert_close(gfe(x, c), gfe.refine(expected))


def test_the_mixture_is_convex_and_only_of_training(model, batch):
    text = model.text.plain(batch.conditions["spatial_prompts"], torch.device("cpu"))
    torch.manual_seed(3)
    mixed = model._mixed(text, batch.conditions["highlights"])
    torch.manual_seed(3)
    w = torch.rand(2, 1)
    grey_and_white = torch.stack([torch.zeros(3, 224, 224), torch.ones(3, 224, 224)])
    torch.testing.assert_close(mixed, text * w + model.picture(grey_and_white) * (1 - w))
    torch.manual_seed(3)
    torch.testing.assert_close(model._mixed(text, [None, None]), text * w)  # no picture in the whole batch
    model.eval()
    before = model(batch).total
    batch.conditions["highlights"] = [None, None]
    assert torch.equal(model(batch).total, before)


def test_the_loss_is_minus_one_for_an_empty_mask_found_empty(model, batch):
    nn.init.zeros_(model.fusion[2].weight)
    nn.init.constant_(model.fusion[2].bias, -50.0)
    batch.mask_BKHW.zero_()
    assert float(model.eval()(batch).total) == pytest.approx(-1)
    nn.init.constant_(model.fusion[2].bias, 0.0)  # every probability 1/2, no lesion: 1 - 2 (0 + 1) / (2048 + 1)
    assert float(model(batch).total) == pytest.approx(1 - 2 / 2049)


def test_the_rate_is_torchs_cosine_of_20000_steps_to_1e_6():
    config = compose([*TINY]).train
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=1e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20000, 1e-6)
    schedule = Schedule(config, draws=201)
    for step in range(200):
        assert schedule.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        cosine.step()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.cosine_steps=500"], "ends before training does"),
        (["train.lr_end=1"], "is above train.lr"),
        (["train.schedule=constant"], "belong to train.schedule=cosine"),
        (["model.global_channels=12"], "not a multiple of the number of groups=8"),
        (["evaluate.tta=mirror"], "positions in pixels"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_composed(words, message):
    with pytest.raises(ConfigError, match=message):
        compose([*TINY, *words])


def test_its_headline_is_an_oracles_and_says_so():
    variants = compose(TINY).variants
    assert [variant.name for variant in variants] == ["oracle", "none", "shuffled_attributes"]
    assert variants[0].uses_ground_truth


def test_prompts_of_a_first_pass_are_refused_before_the_queue(phantom_folder):
    words = [*TINY, f"data.root={phantom_folder}"]
    with pytest.raises(ConfigError, match="set prompts to one of oracle, none, shuffled_attributes"):
        cv_plan(compose([*words, "prompts=first_pass"]))
    assert cv_plan(compose([*words, "prompts=none"])).first.variants[0].name == "none"


def test_a_stream_cannot_serve_the_pictures_and_is_refused_before_the_queue(phantom_folder):
    config = compose([*TINY, f"data.root={phantom_folder}", f"data.stream={phantom_folder}/"])
    with pytest.raises(ConfigError, match=r"model\.mix=false"):
        cv_plan(config)


# --- conditions -------------------------------------------------------------------------------------------


def scan(key="a", **attributes):
    return SimpleNamespace(
        key=key, patient=key, label="benign", attributes=attributes, lesion_pixels=1, height=400, width=800
    )


def test_sentences_count_pixels_of_the_original_image():
    """On 100 x 100 of an original of 400 x 800: 10 columns are 80 pixels, 5 rows are 20."""
    mask = np.zeros((100, 100), bool)
    mask[20:25, 40:50] = True
    # Centroid: column 44.5, row 22, so (44.5 + 0.5) 8 - 0.5 = 359.5 and (22 + 0.5) 4 - 0.5 = 89.5, cut off.
    expected = "Ultrasound shows a tumor approximately 80\N{MULTIPLICATION SIGN}20 pixels near (359, 89)."
    assert NumericPrompt().of(scan(), mask) == expected
    assert NumericPrompt().of(scan(), mask[:1]) == ""
    shown = {name: NumericPrompt().shown(name, [], None)(scan(), mask) for name in ("oracle", "none")}
    assert shown == {"oracle": expected, "none": ""}


def test_attributes_are_worded_as_in_the_published_folds():
    of = {"shape": "irregular", "margin": "not circumscribed - angular&indistinct", "birads": "4c"}
    sentence = (
        "Ultrasound shows a Tumor with irregular shaped, not circumscribed - angular&indistinct margin, BIRADS 4c"
    )
    assert SpreadsheetPrompt().of(scan(**of), np.zeros((1, 1), bool)) == sentence
    assert SpreadsheetPrompt().from_user(of) == sentence
    assert AttributePrompt().of(scan(**of), np.zeros((1, 1), bool)) != sentence


def test_partners_have_the_same_attributes_and_change_with_the_turn():
    part = [scan("a", shape="oval"), scan("b", shape="oval"), scan("c", shape="round"), scan("d", shape="oval")]
    kind = Highlight(mean=(0.0,) * 3, std=(1.0,) * 3).fitted(part, None)

    def draw(*words):
        return np.random.default_rng(abs(hash(words)))

    drawn = {kind.partner(draw, turn, "a") for turn in range(60)}
    assert drawn == {"a", "b", "d"}  # itself, too, as in the release
    assert kind.partner(draw, 0, "c") is None
    assert kind.partner(draw, 7, "a") == kind.partner(draw, 7, "a")


def test_a_picture_is_cropped_to_the_lesion_and_keeps_its_colour():
    image, mask = np.full((60, 60, 3), 51, np.uint8), np.zeros((60, 60), np.uint8)
    image[20:40, 10:30], mask[20:40, 10:30] = 204, 1
    picture = Highlight(mean=(0.0,) * 3, std=(1.0,) * 3).pictured(image, mask)
    assert picture.shape == (60, 60, 3)
    # 20 + 2 + 2 pixels become 60: the lesion has 5/6 of the edge, at 0.8; around it a tenth of what is there, blurred.
    assert (picture == np.float32(0.8)).all(axis=2).sum() == 50 * 50
    assert 0.02 <= picture[0, 0, 0] < 0.08
    flat = mask * 0
    flat[30, 5:55] = 1  # wide: padded above and below with zeros
    assert (Highlight(mean=(0.0,) * 3, std=(1.0,) * 3).pictured(image, flat)[[0, -1]] == 0).all()


# --- beside the release -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_released_code_computes_the_same():
    clone, data = os.environ.get("XBUSNET_RELEASE"), os.environ.get("BUSHPC_DATA")
    if not clone or not data:
        pytest.skip("set XBUSNET_RELEASE to a clone of rmallina14/XBusNet at ba770f6, and BUSHPC_DATA")
    breast = Path(data) / "breast/BrEaST-Lesions_USG-images_and_masks"
    command = [sys.executable, "-m", "tools.bench.xbusnet_release", clone, "--breast", str(breast)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
