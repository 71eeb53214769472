"""Rivals that are written here from their publications: sizes, gradients, predictions and what they refuse."""

from dataclasses import replace

import pytest
import safetensors.torch
import timm
import torch

from bushpc.config import compose
from bushpc.errors import ConfigError, WeightsError

COMMON = ("data=phantom", "cluster=local")
# Parameters of the authors' released networks, built on torch's meta device, with one class.
RELEASED = {
    ("transunet",): 105_275_921,
    ("transunet", "model.image_size=256"): 105_322_001,
    ("swin_unet",): 27_168_132,
    ("u_kan",): 6_356_689,
    ("u_kan", "model.widths=[32,64,256,320,512]"): 25_359_265,
    # Without the ImageNet classifier of 2,049,000 parameters that their ResNet carries along.
    ("anatosegnet",): 94_906_217 - 2_049_000,
    # Theirs reads one channel, 576 filter values less.
    ("multitask_nnunet",): 15_819_799 + 576,
}
SMALL = {
    "transunet_small": ["model.decoder_channels=[32,16,16,8,8]"],
    "swin_unet_small": [],
    "aau_net_small": ["model.widths=[8,16]"],
    "anatosegnet_small": [],
    "multitask_nnunet_small": [],
    "u_kan_small": ["model.widths=[8,8,8,8,8]"],
}


def model_of(name, *words):
    config = compose([f"model={name}", "model.pretrained=false", *COMMON, *words])
    return config.model_class(config.model, None)


@pytest.mark.parametrize("words", RELEASED, ids="-".join)
def test_as_many_parameters_as_the_authors_network(words):
    with torch.device("meta"):
        assert model_of(*words).parameter_count() == RELEASED[words]


@pytest.mark.parametrize(
    "words",
    [
        ("transunet",),
        ("swin_unet",),
        ("anatosegnet",),
        ("edcnn", "model.xception=xception41", "model.mobilenet=mobilenetv1_100.ra4_e3600_r224_in1k"),
        ("fcn",),
        ("mask_rcnn",),
        ("efficientnet",),
        ("bussam",),
    ],
    ids=lambda words: words[0],
)
def test_a_staged_file_of_another_architecture_is_refused(words, tmp_path):
    config = compose([f"model={words[0]}", *words[1:], "model.pretrained=true", *COMMON])
    for file in config.model.weight_files():
        safetensors.torch.save_file(timm.create_model("test_resnet").state_dict(), tmp_path / file.name)
    with torch.device("meta"), pytest.raises(WeightsError, match=r"does not fit the model .* bushpc weights pull"):
        config.model_class(config.model, str(tmp_path))


def test_a_staged_file_with_more_layers_is_refused(tmp_path):
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in timm.create_model("resnet101").state_dict().items()}
    deeper = {name: torch.zeros(shape, dtype=torch.uint8) for name, shape in shapes.items()}
    config = compose(["model=fcn", "model.pretrained=true", *COMMON])
    safetensors.torch.save_file(deeper, tmp_path / config.model.weight_files()[0].name)
    with torch.device("meta"), pytest.raises(WeightsError, match=r"layers that the network lacks: fc, layer3\.10\.bn1"):
        config.model_class(config.model, str(tmp_path))


@pytest.mark.parametrize("name", SMALL)
def test_trains_and_predicts(name, make_batch):
    model, batch = model_of(name, "model.image_size=64", *SMALL[name]), make_batch(count=2)
    losses = model.train()(batch)
    losses.total.backward()
    without = [
        name for name, value in model.named_parameters() if value.grad is None or not value.grad.isfinite().all()
    ]
    assert without == []
    seen = []
    model.cam_layer().register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        prob_BKHW = model.eval().predict(batch).prob_BKHW
    assert prob_BKHW.shape == (2, 1, 64, 64)
    assert 0 <= float(prob_BKHW.min()) <= float(prob_BKHW.max()) <= 1
    assert seen[-1].ndim == 4
    assert any(isinstance(module, model.config.blocks) for module in model.modules())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=transunet", "model.image_size=100"], "multiple of 16, the stride of the ViT's grid: .* 96 and 112"),
        (["model=transunet", "model.image_size=7"], "the nearest are 16"),
        (["model=transunet", "model.depth=6"], "or set model.pretrained=false"),
        (["model=transunet_small", "model.resnet_channels=[64,128,128]"], "three multiples of 128"),
        (["model=transunet_small", "model.heads=5"], "must divide model.width=64"),
        (
            ["model=swin_unet", "model.image_size=240"],
            "multiple of 32, the stride of .* 224 and 256",
        ),
        (["model=swin_unet", "model.depths=[2,2,6,2]"], "or set model.pretrained=false"),
        (["model=swin_unet_small", "model.heads=[1,2,4]"], "4 numbers above 0 are needed, one per stage"),
        (["model=swin_unet_small", "model.heads=[1,5,4,8]"], "5 must divide the 48 channels"),
        (
            ["model=aau_net", "model.image_size=250"],
            "multiple of 16, the stride of the deepest of 5 levels: .* 240 and 256",
        ),
        (["model=aau_net", "model.pretrained=true"], "trained from scratch"),
        (["model=aau_net_small", "train.batch_size=1"], "train.batch_size to 2 or more"),
        (["model=u_kan", "model.image_size=300"], "multiple of 32, the stride of the deepest tokens: .* 288 and 320"),
        (["model=u_kan", "model.widths=[16,32,128]"], "5 numbers above 0"),
        (["model=u_kan_small", "model.image_size=32", "train.batch_size=1"], "train.batch_size to 2 or more"),
        (["model=anatosegnet", "model.image_size=250"], "multiple of 32, the encoder's stride: .* 224 and 256"),
        (["model=anatosegnet", "model.heads=7"], "heads=7 must divide .* 1024 and 2048"),
        (["model=anatosegnet", "model.encoder=efficientnet_b0"], "unknown model.encoder"),
        (["model=multitask_nnunet", "model.image_size=144"], "multiple of 32, .* 128 and 160"),
        (["model=multitask_nnunet", "model.image_size=32"], "must be 64 or more"),
        (["model=multitask_nnunet", "model.widths=[32,64]"], "5 numbers"),
        (["model=medsegdiff", "model.image_size=240"], "multiple of 32, the stride of the deepest of 6 .* 224 and 256"),
        (["model=medsegdiff", "model.dynamic=false"], "set model.ff_parser=false as well"),
        (["model=medsegdiff", "model.widths=[100,200]"], "multiples of model.groups=32"),
        (["model=medsegdiff", "model.sampler=ddim", "model.steps=300"], "must be one of 1, 2, 4"),
        (["model=medsegdiff", "model.attention=[6]"], "levels are 0 to 5"),
        (["model=transunet_small", "model.image_size=16", "train.batch_size=1"], "train.batch_size to 2 or more"),
    ],
)
def test_what_does_not_fit_is_refused_when_composed(words, message):
    with pytest.raises(ConfigError, match=message):
        compose([*COMMON, *words])


def test_medsegdiffs_unet_has_the_parameters_of_the_released_one():
    from bushpc.models.medsegdiff import ConditionedUNet

    config = compose(["model=medsegdiff", *COMMON]).model
    with torch.device("meta"):
        net = ConditionedUNet(config)
    one_map_less = 128 * 9 + 1  # the released one also predicts a deviation
    assert sum(value.numel() for value in net.unet.parameters()) == 113_673_218 - one_map_less
    assert sum(value.numel() for value in net.parameters()) == 144_057_985  # what the yaml states


def test_medsegdiff_denoises_and_predicts(make_batch):
    model, batch = model_of("medsegdiff_small", "model.image_size=32", "model.steps=2"), make_batch(size=32, count=2)
    losses = model(batch)
    losses.total.backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []
    with torch.no_grad():
        made, again = (model.eval().predict(given) for given in (batch, replace(batch, mask_BKHW=batch.mask_BKHW * 0)))
    assert made.prob_BKHW.shape == made.uncertainty_BKHW.shape == (2, 1, 32, 32)
    assert 0 <= float(made.prob_BKHW.min()) <= float(made.prob_BKHW.max()) <= 1
    assert torch.equal(made.prob_BKHW, again.prob_BKHW), "the same noise for the same key, and no look at the mask"
    alone = model_of("medsegdiff_small", "model.image_size=32", "model.dynamic=false", "model.ff_parser=false")
    assert torch.isfinite(alone(batch).total)


def test_ff_parser_filters_frequencies_and_fusion_weighs_the_image_by_both_maps():
    from bushpc.models.medsegdiff import FFParser, attentive_fusion

    parser, x, y = FFParser(2, 8), torch.rand(1, 2, 8, 8), torch.rand(1, 2, 8, 8)
    with torch.no_grad():
        parser.A.zero_()
        parser.A[:, 0, 0, 0] = 1  # the mean alone passes
        torch.testing.assert_close(parser(x), x.mean(dim=(2, 3), keepdim=True).expand_as(x))
        unit = [(each - each.mean()) / (each.var(correction=0) + 1e-5).sqrt() for each in (x, y)]
        torch.testing.assert_close(attentive_fusion(x, y), unit[0] * unit[1] * x)


def test_transunets_tokens_are_those_of_timms_hybrid_vit():
    net = model_of("transunet_small", "model.image_size=64").net.eval()
    seen = []
    net.encoder.norm.register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        net(image := torch.rand(2, 3, 64, 64))
        torch.testing.assert_close(seen[0], net.encoder.forward_features(image))


def test_transunet_takes_timms_weights_at_another_size():
    import timm

    from bushpc.models.transunet import R50_VIT_B16

    with torch.device("meta"):
        model, theirs = model_of("transunet", "model.image_size=256"), timm.create_model(R50_VIT_B16)
        model._load_encoder(theirs.state_dict(), None)  # strict: a name or shape that differs raises


def test_patch_expanding_gives_each_position_a_square():
    from bushpc.models.swin_unet import PatchExpanding

    expand = PatchExpanding(4, 2, 2)
    expand.norm = torch.nn.Identity()
    x_BhwC = torch.rand(1, 3, 3, 4)
    with torch.no_grad():
        made, mapped = expand(x_BhwC), expand.linear(x_BhwC)
    for row, column, down, right in [(0, 0, 0, 0), (1, 2, 0, 1), (2, 1, 1, 0), (2, 2, 1, 1)]:
        square = mapped[0, row, column].reshape(2, 2, 2)
        torch.testing.assert_close(made[0, 2 * row + down, 2 * column + right], square[down, right])


def test_swin_unet_starts_from_swin_t_with_its_decoder_mirrored():
    import timm

    from bushpc.models.swin_unet import SWIN_T

    model, theirs = model_of("swin_unet", "model.image_size=256"), timm.create_model(SWIN_T)
    model._load(theirs.state_dict(), None)
    weight = theirs.layers[2].blocks[1].mlp.fc1.weight
    for stage in (model.backbone().layers[2], model.net.decoder[0]):
        assert torch.equal(stage.blocks[1].mlp.fc1.weight, weight)


@pytest.mark.parametrize(("c", "f"), [(3, 32), (64, 32)])
def test_a_haam_has_the_parameters_of_the_released_module(c, f):
    from bushpc.models.aau_net import HAAM

    of_channels = 9 * c * f + 25 * c * f + 6 * f + (2 * f * f + f + 2 * f + f * f + f) + (2 * f * f + f + 2 * f)
    of_space = (9 * c * f + 3 * f) + (f * f + 3 * f) + (f + 1) + (18 * f * f + 3 * f)
    assert sum(value.numel() for value in HAAM(c, f).parameters()) == of_channels + of_space


def test_haam_weighs_two_receptive_fields_against_each_other():
    from bushpc.models.aau_net import HAAM

    module, x = HAAM(2, 4).eval(), torch.rand(1, 2, 8, 8)
    for gate, chosen in ((100.0, module.dilated), (-100.0, module.large)):
        torch.nn.init.constant_(module.channel_gate[3].bias, gate)  # alpha is 1, or 0
        read = []
        hook = module.of_channels.register_forward_hook(lambda *call, read=read: read.append(call[1][0]))
        with torch.no_grad():
            module(x)
            torch.testing.assert_close(read[0].sum(dim=1), chosen(x).sum(dim=1))
        hook.remove()


def test_splines_are_scipys():
    from scipy.interpolate import BSpline

    from bushpc.models.u_kan import cubic_splines

    x, knots = torch.linspace(-1, 1, 41, dtype=torch.float64), torch.arange(-3, 9).double() * 0.4 - 1
    theirs = BSpline.design_matrix(x.numpy(), knots.numpy(), k=3).toarray()
    torch.testing.assert_close(cubic_splines(x, 5).double(), torch.from_numpy(theirs), atol=1e-6, rtol=0)


def test_a_kan_layer_is_the_sum_of_its_edges():
    from bushpc.models.u_kan import KanLinear, cubic_splines

    layer, x = KanLinear(2, 3, 5), torch.tensor([0.3, -0.7])
    silu, splines = torch.nn.functional.silu(x), cubic_splines(x, 5)
    edges = [
        sum(layer.w_OI[o, i] * silu[i] + layer.s_OI[o, i] * (layer.c_OIG[o, i] @ splines[i]) for i in range(2))
        for o in range(3)
    ]
    torch.testing.assert_close(layer(x), torch.stack(edges))


def test_anatosegnets_attention_adds_differences_and_prefers_near_positions():
    from bushpc.models.anatosegnet import AnatomicalAttention

    layer, x = AnatomicalAttention(4, heads=1, gamma=0.5), torch.rand(1, 4, 3, 3)
    with torch.no_grad():
        right, below = torch.zeros_like(x), torch.zeros_like(x)
        right[..., :-1], below[..., :-1, :] = x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]
        W_q, W_k, W_v = layer.qkv.weight.chunk(3)
        maps = [part.flatten(2)[0].T for part in (x, right, below)]  # N x C
        scores = sum((part @ W_q.T) @ (part @ W_k.T).T for part in maps) / 4**0.5
        position = torch.arange(9.0)
        scores = scores + 2 - 0.5 * (position[:, None] - position[None]).abs()  # beta, which a softmax does not see
        expected = layer.proj(scores.softmax(dim=-1) @ (maps[0] @ W_v.T))
        torch.testing.assert_close(layer(x).flatten(2)[0].T, expected)


def test_the_multitask_losses_are_the_authors(make_batch):
    from bushpc.losses.overlap import soft_dice_loss

    model = model_of("multitask_nnunet_small", "model.image_size=64")
    batch = make_batch(count=3, label_B=torch.tensor([1, -1, 2]))
    losses = model(batch)
    logits, label_logits = model.net(model.normalize(batch.image_BCHW, model.net))
    dice = sum(soft_dice_loss(each, batch.mask_BKHW) / (i + 1) for i, each in enumerate(logits))
    prob = label_logits.softmax(dim=1)[[0, 2], [1, 2]]
    focal = (-((1 - prob) ** 2) * prob.log()).mean()
    torch.testing.assert_close(losses.total, 0.35 * dice + 0.65 * focal)
    prediction = model.predict(batch)
    torch.testing.assert_close(prediction.class_prob_BL.sum(dim=1), torch.ones(3))
