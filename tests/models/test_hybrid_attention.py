"""The hybrid attention network's promises: the paper's equations, Table 2's rows and counts, weights, refusals."""

import math

import pytest
import safetensors.torch
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bushpc import weights
from bushpc.errors import ConfigError, WeightsError
from bushpc.models.hybrid_attention import GSA, SFEB, TAM, TSA, HybridAttention
from bushpc.nn.recompute import recompute

# Rows of Table 2 without the U-Net: conv_block, sfeb, tam.
BASELINE, CONV_BLOCK, SFEBS, FULL = (False, False, False), (True, False, False), (True, True, False), (True, True, True)
TABLE_2 = {BASELINE: 10_498_945, CONV_BLOCK: 11_089_537, SFEBS: 15_339_329, FULL: 15_427_713}


def switched(row):
    return dict(zip(("conv_block", "sfeb", "tam"), row, strict=True))


def train(model, batch, steps, lr=1e-3):
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(batch).total.backward()
        optimizer.step()


def count(tensors):
    return sum(tensor.numel() for tensor in tensors)


def randomised(module):
    """Biases and batch normalisations off their neutral start, so that a forgotten one shows."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


# --- learning ---------------------------------------------------------------------------------------------


def test_learns_one_batch_by_heart(hybrid_attention_config, make_batch):
    model, batch = HybridAttention(hybrid_attention_config()), make_batch()
    train(model, batch, steps=40, lr=3e-3)
    # In training mode: batch normalisation's running averages need more than 40 steps to settle.
    with torch.no_grad():
        assert model(batch).terms["jaccard"] < 0.1


@pytest.mark.parametrize("row", TABLE_2)
def test_every_row_of_table_2_trains_all_parameters_that_it_has(hybrid_attention_config, make_batch, row):
    model = HybridAttention(hybrid_attention_config(**switched(row)))
    train(model, make_batch(), steps=1)  # timm's ResNets start with zeros that let no gradient through
    model.zero_grad()
    model(make_batch()).total.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still
    assert sum(isinstance(module, SFEB) for module in model.modules()) == (4 if row[1] else 0)
    assert any(isinstance(module, TAM) for module in model.modules()) == row[2]


def test_trains_under_bfloat16_autocast_with_a_float32_loss(hybrid_attention_config, make_batch):
    model = HybridAttention(hybrid_attention_config())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(make_batch())
    losses.total.backward()
    assert losses.total.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_model_cast_to_bfloat16_takes_float32_batches(hybrid_attention_config, make_batch):
    model = HybridAttention(hybrid_attention_config()).to(torch.bfloat16)
    model(make_batch()).total.backward()
    prob = model.eval().predict(make_batch()).prob_BKHW
    assert prob.dtype == torch.float32
    assert prob.shape == (4, 1, 64, 64)
    assert ((prob >= 0) & (prob <= 1)).all()


def test_the_loss_is_the_weighted_sum_of_cross_entropy_and_jaccard(hybrid_attention_config, make_batch):
    model = HybridAttention(hybrid_attention_config(bce_weight=0.5, jaccard_weight=2.0))
    losses = model(make_batch())
    torch.testing.assert_close(losses.total, 0.5 * losses.terms["bce"] + 2 * losses.terms["jaccard"])


def test_blocks_computed_again_give_the_same_gradients(hybrid_attention_config, make_batch):
    model = HybridAttention(hybrid_attention_config())
    model(make_batch()).total.backward()
    kept = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    assert recompute(model, model.config.blocks) == 3 + 3 + 2  # encoder stages, decoder stages, ConvBlock and TAM
    model(make_batch()).total.backward()
    assert all(torch.equal(kept[name], p.grad) for name, p in model.named_parameters())


def test_the_map_layer_is_used_by_predict(hybrid_attention_config, make_batch):
    model, seen = HybridAttention(hybrid_attention_config()).eval(), []
    model.cam_layer().register_forward_hook(lambda _, __, out: seen.append(out.shape))
    model.predict(make_batch())
    assert seen == [(4, 16, 32, 32)]


# --- equations --------------------------------------------------------------------------------------------


def test_tsa_is_equations_1_to_4_with_a_map_of_channels_by_channels():
    tsa, feature = randomised(TSA(channels=6, size=4, heads=2)), torch.randn(3, 6, 4, 4)
    place = torch.empty(6, 4, 4)
    for i in range(4):
        for j in range(4):
            place[:, i, j] = torch.cat([tsa.row[:, i, 0], tsa.column[:, 0, j]])
    rows = (feature + place).permute(0, 2, 3, 1).reshape(3, 16, 6)  # F as the paper writes it: positions x c
    Q, K, V = (rows @ W.weight[:, :, 0, 0].T for W in (tsa.W_q, tsa.W_k, tsa.W_v))
    expected = torch.empty(3, 16, 6)
    for half in (slice(0, 8), slice(8, 16)):  # each head's positions
        A = torch.softmax(Q[:, half].transpose(1, 2) @ K[:, half] / math.sqrt(8), dim=-1)
        assert A.shape == (3, 6, 6)
        expected[:, half] = (A @ V[:, half].transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(tsa(feature), expected.transpose(1, 2).reshape(3, 6, 4, 4))


def test_gsa_is_equation_5_with_a_map_of_positions_by_positions():
    gsa, feature = randomised(GSA(channels=6)), torch.randn(2, 6, 3, 4)
    F_1, F_2, F_c = (W(feature).flatten(2) for W in (gsa.F_1, gsa.F_2, gsa.F_c))
    assert F_1.shape == (2, 3, 12)  # c' = c / 2
    A = torch.softmax(F_1.transpose(1, 2) @ F_2 / math.sqrt(3), dim=-1)
    assert A.shape == (2, 12, 12)
    torch.testing.assert_close(gsa(feature), (F_c @ A.transpose(1, 2)).reshape(2, 6, 3, 4))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_sfeb_is_equations_7_to_15(stride, training):
    sfeb, I_BChw = randomised(SFEB(channels=3, stride=stride)), torch.randn(4, 3, 6, 5)
    for module in sfeb.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)

    def mu(norm, x):
        used = None if training else (norm.running_mean, norm.running_var)
        mean, var = used or (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0))
        scaled = (x - mean[:, None, None]) / (var[:, None, None] + norm.eps).sqrt()
        return norm.weight[:, None, None] * scaled + norm.bias[:, None, None]

    local, fuse, gate = sfeb.local, sfeb.fuse, sfeb.gate
    I_1 = mu(local[1], F.conv2d(I_BChw, local[0].weight, local[0].bias, padding=1)[:, :, ::stride, ::stride]).clamp(0)
    P_o = torch.cat([I_1.flatten(2).max(2).values, I_1.flatten(2).mean(2)], 1)[:, :, None, None]
    F_c = mu(fuse[1], F.conv2d(P_o, fuse[0].weight, fuse[0].bias, padding=1)).clamp(0)
    F_G = I_BChw.flatten(2).mean(2)[:, :, None, None]
    F_cc = torch.sigmoid(mu(gate[1], F.conv2d(F_G, gate[0].weight, gate[0].bias)))
    expected = F_c * F_cc + I_BChw
    torch.testing.assert_close(sfeb.train(training)(I_BChw), expected, atol=1e-5, rtol=1e-5)


def test_sfeb_refuses_to_train_on_a_single_image_and_says_the_way_on():
    sfeb = SFEB(channels=3, stride=1)
    with pytest.raises(ConfigError, match=r"larger train\.batch_size"):
        sfeb(torch.randn(1, 3, 4, 4))
    assert sfeb.eval()(torch.randn(1, 3, 4, 4)).shape == (1, 3, 4, 4)


def test_tam_joins_both_attentions_and_the_input():
    tam, feature = randomised(TAM(channels=4, size=3, heads=3)), torch.randn(2, 4, 3, 3)
    joined = torch.cat([tam.tsa(feature), tam.gsa(feature), feature], dim=1)
    weight, bias = tam.merge.weight[:, :, 0, 0], tam.merge.bias
    expected = torch.einsum("oc,bchw->bohw", weight, joined) + bias[:, None, None]
    torch.testing.assert_close(tam(feature), expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_no_attention_map_is_written_down(memory_format):
    seen = set()

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            seen.update(tuple(x.shape[-2:]) for x in (out if isinstance(out, tuple) else [out]) if torch.is_tensor(x))
            return out

    tam = TAM(channels=32, size=16, heads=4)
    feature = torch.randn(2, 32, 16, 16).contiguous(memory_format=memory_format).requires_grad_()
    with Shapes():
        tam(feature).sum().backward()
    assert {(256, 16), (32, 64)} <= seen  # queries of GSA and of TSA
    assert not seen & {(256, 256), (32, 32)}


# --- Table 2 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", TABLE_2)
def test_full_size_rows_count_what_table_2_counts(hybrid_attention_config, row):
    with torch.device("meta"):
        model = HybridAttention(hybrid_attention_config("hybrid_attention", pretrained=False, **switched(row)))
    beyond_the_paper = 0
    if row == FULL:  # what the text asks for and the count of 88,384 does not hold, as hybrid_attention.yaml says
        W, halves, merge, unplaced = 3 * 256**2, 2 * 256 * (128 - 32) + 2 * (128 - 32), 768 * 256 + 256, 2_048
        beyond_the_paper = W + halves + merge - unplaced
    assert count(model.parameters()) == TABLE_2[row] + beyond_the_paper
    keras_total = {BASELINE: 10_550_337, CONV_BLOCK: 11_141_441, SFEBS: 15_395_457, FULL: 15_924_609}
    statistics = [b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    assert count(model.parameters()) + count(statistics) == keras_total[row]


def test_full_size_model_takes_a_step_at_256_pixels(hybrid_attention_config, make_batch):
    model = HybridAttention(hybrid_attention_config("hybrid_attention", pretrained=False))
    batch = make_batch(size=256, count=2)
    before = model(batch).total
    before.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-3 * parameter.grad
        assert model(batch).total < before


# --- pretrained weights -----------------------------------------------------------------------------------


def test_encoder_starts_from_its_staged_densenet(hybrid_attention_config, tmp_path):
    config = hybrid_attention_config(encoder="densenet121.tv_in1k", pretrained=True)
    (file,) = config.weight_files()
    assert file.hub_repo == "timm/densenet121.tv_in1k"
    whole = timm.create_model("densenet121", pretrained=False)  # with its fourth block and classifier, as timm's file
    safetensors.torch.save_file(whole.state_dict(), tmp_path / file.name)
    model = HybridAttention(config, str(tmp_path)).eval()
    image, inside = torch.randn(1, 3, 64, 64), []
    whole.features.denseblock3.register_forward_hook(lambda _, __, out: inside.append(out))
    with torch.no_grad():
        whole.eval()(image)
        torch.testing.assert_close(model.encoder(image)[-1], inside[0])


def test_missing_and_foreign_weights_name_the_command_that_stages_them(hybrid_attention_config, tmp_path):
    config = hybrid_attention_config(pretrained=True)
    with pytest.raises(WeightsError, match="bushpc weights pull model=hybrid_attention"):
        HybridAttention(config, str(tmp_path))
    (file,) = config.weight_files()
    safetensors.torch.save_file({"conv1.weight": torch.zeros(1)}, tmp_path / file.name)
    with pytest.raises(WeightsError, match=rf"(?s){file.name} does not fit.*{weights.pull_command(HybridAttention)}"):
        HybridAttention(config, str(tmp_path))


# --- refused settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 100}, "image_size=100 is not a multiple of 16, the bottleneck's stride; the nearest is 96"),
        ({"image_size": 8}, "image_size=8 .* the nearest is 16"),
        ({"decoder_channels": (8, 8, 8)}, "five numbers above 0"),
        ({"decoder_channels": (8, 8, 8, 8, 0)}, "five numbers above 0"),
        ({"decoder_channels": (7, 8, 8, 8, 8)}, "first must be even"),
        ({"heads": 5}, "heads=5 must divide the bottleneck's 16 positions"),
        ({"heads": 0}, "model.heads=0: must be ≥ 1"),
        ({"sfeb_stride": 3}, "model.sfeb_stride=3: must be ≥ 1 and ≤ 2"),
        ({"encoder": "densenet122"}, "unknown encoder 'densenet122'; similar names in timm: .*densenet121"),
        ({"encoder": "vit_tiny_patch16_224"}, "vit_tiny_patch16_224"),
        ({"bce_weight": 0.0, "jaccard_weight": 0.0}, "one of them above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_composed(hybrid_attention_config, changes, message):
    with pytest.raises(ConfigError, match=message):
        hybrid_attention_config(**changes)


def test_an_encoder_without_weights_of_its_own_is_refused_with_the_way_on(hybrid_attention_config):
    config = hybrid_attention_config(encoder="resnet10t", pretrained=True)
    assert config.weight_files()
    with pytest.raises(ConfigError, match="pretrained=false"):
        hybrid_attention_config(encoder="densenet264d", pretrained=True).weight_files()
