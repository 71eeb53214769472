"""XBusNet's promises: the paper's equations, Table 4's switches, frozen towers, prompts, the two passes."""

import copy
import dataclasses

import numpy as np
import open_clip
import pytest
import safetensors.torch
import timm
import torch
from torch import nn
from torch.nn import functional as F

from bushpc import weights
from bushpc.errors import ConfigError, WeightsError
from bushpc.models.xbusnet import XBusNet, clip_image_tower
from bushpc.nn.clip import CLIP_VIT_B16, TextEncoder
from bushpc.nn.text_unet import SFA

# Rows of Table 4: lfe, gfe, sfa.
TABLE_4 = [(True, True, True), (False, True, False), (True, False, True), (True, True, False)]


def train(model, batch, steps, lr=3e-3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(batch).total.backward()
        optimizer.step()


def predict(model, batch):
    model.eval()
    with torch.no_grad():
        return model.predict(batch)


def with_text_that_matters(model):
    """SFA starts as the identity; give its last layers the weights that training would."""
    for module in model.modules():
        if isinstance(module, SFA):
            nn.init.normal_(module.mlp[-1].weight, std=0.05)
    return model


# --- learning ---------------------------------------------------------------------------------------------


def test_learns_one_batch_by_heart(xbusnet_config, make_batch):
    model, batch = XBusNet(xbusnet_config()), make_batch()
    train(model, batch, steps=40)
    # In training mode: batch normalisation's running averages need more than 40 steps to settle.
    with torch.no_grad():
        assert model(batch).terms["dice"] < 0.05


@pytest.mark.parametrize("switches", TABLE_4)
def test_every_row_of_table_4_trains_all_parameters_that_it_has(xbusnet_config, make_batch, switches):
    lfe, gfe, sfa = switches
    model = XBusNet(xbusnet_config(lfe=lfe, gfe=gfe, sfa=sfa))
    # After one step SFA's zero-initialised last layers let gradients through to the layers below them.
    train(model, make_batch(), steps=1)
    model.zero_grad()
    model(make_batch()).total.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    still = [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.any()]
    assert not still
    top_level = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert top_level == {"fusion"} | ({"lfe"} if lfe else set()) | ({"gfe"} if gfe else set())
    assert any(isinstance(module, SFA) for module in model.modules()) == sfa


def test_trains_under_bfloat16_autocast_with_a_float32_loss(xbusnet_config, make_batch):
    model = XBusNet(xbusnet_config())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(make_batch())
    losses.total.backward()
    assert losses.total.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_model_cast_to_bfloat16_takes_float32_batches(xbusnet_config, make_batch):
    model = XBusNet(xbusnet_config()).to(torch.bfloat16)
    model(make_batch()).total.backward()
    assert predict(model, make_batch()).prob_BKHW.dtype == torch.float32


def test_loss_terms_are_weighted_as_configured(xbusnet_config, make_batch):
    config = xbusnet_config(dice_weight=0.5, bce_weight=2.0)
    losses = XBusNet(config)(make_batch())
    torch.testing.assert_close(losses.total, 0.5 * losses.terms["dice"] + 2 * losses.terms["bce"])


# --- equations --------------------------------------------------------------------------------------------


def test_sfa_is_its_closed_form():
    sfa = SFA(channels=3, text_dim=5)
    for parameter in sfa.parameters():
        nn.init.normal_(parameter)
    feature, e = torch.randn(2, 3, 4, 6), torch.randn(2, 5)
    first, last = sfa.mlp[0], sfa.mlp[2]
    z = (e @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T + last.bias
    expected = torch.empty_like(feature)
    for b in range(2):
        for channel in range(3):
            gamma, beta = z[b, channel], z[b, 3 + channel]
            expected[b, channel] = gamma * feature[b, channel] + beta + feature[b, channel]
    torch.testing.assert_close(sfa(feature, e), expected)


def test_sfa_starts_as_the_identity():
    feature = torch.randn(2, 3, 4, 6)
    assert torch.equal(SFA(channels=3, text_dim=5)(feature, torch.randn(2, 5)), feature)


def test_conditioning_is_equation_7(xbusnet_config):
    gfe = XBusNet(xbusnet_config(sfa=False)).gfe
    A, e_c = torch.randn(2, 64, 32), torch.randn(2, 64)
    seen = []
    gfe.project.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    gfe(A, e_c)
    c = e_c @ gfe.W_c.weight.T + gfe.W_c.bias
    scale = c @ gfe.W_mul.weight.T + gfe.W_mul.bias
    shift = c @ gfe.W_add.weight.T + gfe.W_add.bias
    for n in range(64):  # token n stands at row n // 8, column n % 8 of the grid
        torch.testing.assert_close(seen[0][:, :, n // 8, n % 8], scale * A[:, n] + shift, atol=1e-5, rtol=1e-5)


def test_maps_have_the_channels_and_sizes_of_equations_8_12_and_16(xbusnet_config, make_batch):
    for stride in (1, 2):
        model = XBusNet(xbusnet_config(global_channels=64, local_channels=32, fusion_stride=stride))
        seen = {}
        model.gfe.register_forward_hook(lambda _, __, out, seen=seen: seen.update(F_g=out.shape))
        model.lfe.register_forward_hook(lambda _, __, out, seen=seen: seen.update(F_l=out.shape))
        model.fusion.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.update(F_cat=inputs[0].shape))
        prediction = predict(model, make_batch())
        h = 64 // stride
        assert seen == {"F_g": (4, 64, h, h), "F_l": (4, 32, h, h), "F_cat": (4, 96, h, h)}
        assert prediction.prob_BKHW.shape == (4, 1, 64, 64)


def test_probabilities_are_probabilities(xbusnet_config, make_batch):
    prob = predict(XBusNet(xbusnet_config()), make_batch()).prob_BKHW
    assert prob.dtype == torch.float32
    assert prob.min() >= 0
    assert prob.max() <= 1


# --- text -------------------------------------------------------------------------------------------------


def test_every_distinct_sentence_is_embedded_once(xbusnet_config, make_batch):
    model = XBusNet(xbusnet_config())
    asked = []
    model.text.tower.register_forward_hook(lambda _, inputs, __: asked.extend(inputs[0].tolist()))
    for _ in range(3):
        model(make_batch())
    predict(model, make_batch())
    distinct = {*make_batch().conditions["spatial_prompts"], *make_batch().conditions["attribute_prompts"], ""}
    assert len(asked) == len(distinct)
    assert sorted(asked) == sorted(open_clip.tokenize(list(distinct)).tolist())


def test_an_embedding_does_not_depend_on_what_was_embedded_with_it(xbusnet_config):
    config, sentences = xbusnet_config(), [f"a lesion of kind {i}" for i in range(9)]
    together = TextEncoder(config, None)(sentences, torch.device("cpu"))
    one_by_one = TextEncoder(config, None)
    reverse = torch.cat([one_by_one([s], torch.device("cpu")) for s in sentences[::-1]]).flip(0)
    assert torch.equal(together, reverse)


def test_sentences_are_told_apart_and_no_sentence_is_zero(xbusnet_config):
    text = TextEncoder(xbusnet_config(), None)
    sentences = [
        f"a {size} lesion in the {v} {h} quadrant of the breast"
        for size in ("small", "medium", "large")
        for v in ("upper", "lower")
        for h in ("inner", "outer")
    ]
    e = text(["", *sentences], torch.device("cpu"))
    assert not e[0].any()
    torch.testing.assert_close(e[1:].norm(dim=1), torch.full((12,), 64**0.5))
    apart = torch.cdist(e, e) / 64**0.5 + torch.eye(13)
    assert apart.min() > 0.1


def test_embeddings_made_in_inference_mode_can_be_trained_with(xbusnet_config, make_batch):
    model = XBusNet(xbusnet_config())
    with torch.inference_mode():
        model.eval().predict(make_batch())
    model.train()(make_batch()).total.backward()


def test_text_tower_is_the_same_in_every_process_and_leaves_the_seed_alone(xbusnet_config):
    torch.manual_seed(1)
    one = TextEncoder(xbusnet_config(), None)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)
    other = TextEncoder(xbusnet_config(), None)
    assert all(torch.equal(a, b) for a, b in zip(one.tower.parameters(), other.tower.parameters(), strict=True))


@pytest.mark.parametrize("field", ["spatial_prompts", "attribute_prompts"])
def test_each_prompt_changes_its_own_images_prediction_and_no_other(xbusnet_config, make_batch, field):
    model = with_text_that_matters(XBusNet(xbusnet_config()))
    batch = make_batch()
    prompts = ["a medium lesion in the lower inner quadrant", *batch.conditions[field][1:]]
    before = predict(model, batch).prob_BKHW
    after = predict(model, dataclasses.replace(batch, conditions=batch.conditions | {field: prompts})).prob_BKHW
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1:], after[1:])


def test_without_sfa_the_attribute_prompt_is_not_read(xbusnet_config, make_batch):
    model, batch = XBusNet(xbusnet_config(sfa=False)), make_batch()
    other = dataclasses.replace(batch, conditions=batch.conditions | {"attribute_prompts": ["round shape"] * 4})
    assert torch.equal(predict(model, batch).prob_BKHW, predict(model, other).prob_BKHW)


# --- frozen towers ----------------------------------------------------------------------------------------


def test_frozen_towers_keep_every_bit_through_training(xbusnet_config, make_batch):
    model = XBusNet(xbusnet_config(freeze_vision=True)).train()
    assert not model.gfe.clip.training
    assert not model.text.tower.training
    before = copy.deepcopy([model.gfe.clip.state_dict(), model.text.tower.state_dict()])
    reduction = model.gfe.W[0].weight.detach().clone()
    train(model, make_batch(), steps=2)
    assert not torch.equal(model.gfe.W[0].weight, reduction)
    for old, new in zip(before, [model.gfe.clip.state_dict(), model.text.tower.state_dict()], strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_a_resumed_model_predicts_the_same_bits(xbusnet_config, make_batch):
    config, batch = xbusnet_config(), make_batch()
    model = XBusNet(config)
    train(model, batch, steps=3)
    torch.manual_seed(99)
    resumed = XBusNet(config)
    resumed.load_state_dict(model.state_dict())
    assert torch.equal(predict(model, batch).prob_BKHW, predict(resumed, batch).prob_BKHW)


# --- two passes -------------------------------------------------------------------------------------------


def awaiting(first_pass, count=4):
    """Conditions whose spatial prompts wait for the first prediction."""
    return {"spatial_prompts": [first_pass] * count}


def test_a_prompt_that_waits_for_the_first_pass_steers_the_second(xbusnet_config, make_batch):
    model = with_text_that_matters(XBusNet(xbusnet_config()))
    seen = []

    def first_pass(prob_HW):
        seen.append(prob_HW)
        return "a large lesion in the lower outer quadrant"

    sentence = "a large lesion in the lower outer quadrant"
    first = predict(model, make_batch(conditions=awaiting("")))
    second = predict(model, make_batch(conditions=awaiting(first_pass)))
    direct = predict(model, make_batch(conditions=second.conditions))
    assert all(isinstance(prob_HW, np.ndarray) for prob_HW in seen)
    np.testing.assert_array_equal(np.stack(seen), first.prob_BKHW[:, 0])
    assert second.conditions == {"spatial_prompts": [sentence] * 4}
    assert torch.equal(second.prob_BKHW, direct.prob_BKHW)
    assert not torch.equal(second.prob_BKHW, first.prob_BKHW)


def test_a_given_prompt_stays_beside_those_that_wait(xbusnet_config, make_batch):
    model = with_text_that_matters(XBusNet(xbusnet_config()))
    mixed = [lambda prob_HW: "a small lesion", "a medium lesion", lambda prob_HW: "", "a large lesion"]
    found = predict(model, make_batch(conditions={"spatial_prompts": mixed}))
    wanted = ["a small lesion", "a medium lesion", "", "a large lesion"]
    assert found.conditions == {"spatial_prompts": wanted}
    direct = predict(model, make_batch(conditions={"spatial_prompts": wanted}))
    assert torch.equal(found.prob_BKHW, direct.prob_BKHW)


def test_prediction_touches_no_mask_in_either_pass(xbusnet_config, make_batch):
    model, batch = XBusNet(xbusnet_config()), make_batch(conditions=awaiting(lambda prob: "a small lesion"))
    poisoned = dataclasses.replace(batch, mask_BKHW=torch.full_like(batch.mask_BKHW, float("nan")))
    assert torch.equal(predict(model, batch).prob_BKHW, predict(model, poisoned).prob_BKHW)


def test_second_pass_computes_no_image_features_again(xbusnet_config, make_batch):
    model, runs = XBusNet(xbusnet_config()), []
    model.gfe.clip.register_forward_hook(lambda *_: runs.append("clip"))
    model.lfe.register_forward_hook(lambda *_: runs.append("lfe"))
    predict(model, make_batch(conditions=awaiting(lambda prob: "a small lesion")))
    assert sorted(runs) == ["clip", "lfe"]


def test_without_the_global_branch_nobody_is_asked_for_spatial_prompts(xbusnet_config, make_batch):
    def first_pass(prob_HW):
        raise AssertionError("nothing would read the sentences")

    prediction = predict(XBusNet(xbusnet_config(gfe=False)), make_batch(conditions=awaiting(first_pass)))
    assert prediction.conditions is None


# --- pretrained weights -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_model():
    """open_clip's own CLIP ViT-B/16 with QuickGELU, at random weights."""
    torch.manual_seed(7)
    return open_clip.create_model("ViT-B-16-quickgelu", pretrained=None).eval()


@pytest.fixture(scope="module")
def clip_state(clip_model):
    """Its tensors, in the layout of the file that `weights pull` stages."""
    return clip_model.state_dict()


def test_image_tokens_are_those_inside_open_clips_own_forward(xbusnet_config, clip_model, clip_state):
    config = xbusnet_config("xbusnet", image_size=224)
    tower = clip_image_tower(config, clip_state).eval()
    inside = {}
    for j in config.layers:
        block = clip_model.visual.transformer.resblocks[j - 1]
        block.register_forward_hook(lambda _, __, out, j=j: inside.update({j: out}))
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        clip_model.visual(image)
        Z = tower(image)
    for j, Z_j in zip(config.layers, Z, strict=True):
        assert Z_j.shape == (1, 196, 768)
        torch.testing.assert_close(Z_j, inside[j][:, 1:], atol=1e-5, rtol=1e-5)


def test_sentences_go_through_open_clips_own_text_tower(xbusnet_config, clip_model, clip_state):
    text = TextEncoder(xbusnet_config("xbusnet"), clip_state)
    sentence = "irregular shape, indistinct margin, BI-RADS 4"
    with torch.no_grad():
        raw = clip_model.encode_text(open_clip.get_tokenizer("ViT-B-16-quickgelu")([sentence, ""]))
    expected = F.normalize(raw[0] - raw[1], dim=0) * 512**0.5
    torch.testing.assert_close(text([sentence], torch.device("cpu"))[0], expected, atol=1e-4, rtol=1e-4)


def test_positions_are_interpolated_bicubically_to_the_models_grid(xbusnet_config, clip_state):
    native = clip_state["visual.positional_embedding"]
    tower = clip_image_tower(xbusnet_config("xbusnet"), clip_state)
    grid = native[1:].reshape(1, 14, 14, 768).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(22, 22), mode="bicubic", antialias=True, align_corners=False)
    assert torch.equal(tower.positional_embedding[0], native[0])
    torch.testing.assert_close(tower.positional_embedding[1:], expected[0].flatten(1).T)


def test_positions_stay_as_they_are_at_clips_own_size(xbusnet_config, clip_state):
    tower = clip_image_tower(xbusnet_config("xbusnet", image_size=224), clip_state)
    assert torch.equal(tower.positional_embedding, clip_state["visual.positional_embedding"])


def test_full_size_model_has_the_towers_of_its_sources(xbusnet_config, clip_model):
    model = XBusNet(xbusnet_config("xbusnet", pretrained=False))

    def count(module):
        return sum(p.numel() for p in module.parameters())

    visual = clip_model.visual
    assert count(visual) == 86_192_640
    unread = [*visual.transformer.resblocks[9:], visual.ln_post]  # above the ninth block nothing is read
    positions = (22 * 22 - 14 * 14) * 768
    assert count(model.gfe.clip) == 86_192_640 - sum(map(count, unread)) - visual.proj.numel() + positions
    assert count(model.text.tower) == count(clip_model) - count(visual) - 1  # 1: the logit scale
    resnet50 = timm.create_model("resnet50", num_classes=0)
    assert count(model.lfe.encoder) == count(resnet50)
    assert not any(p.requires_grad for p in model.gfe.clip.parameters())


def test_towers_start_from_the_staged_clip_file(xbusnet_config, clip_state, tmp_path):
    config = xbusnet_config("xbusnet", image_size=224, lfe=False)
    (file,) = config.weight_files()
    safetensors.torch.save_file(clip_state, tmp_path / file.name)
    model = XBusNet(config, str(tmp_path))
    (tmp_path / file.name).unlink()  # 600 MB, and pytest keeps the folders of its last three runs
    for name, tensor in model.gfe.clip.state_dict().items():
        assert torch.equal(tensor, clip_state[f"visual.{name}"]), name
    for name, tensor in model.text.tower.state_dict().items():
        assert torch.equal(tensor, clip_state[name]), name


def test_encoder_starts_from_its_staged_file(xbusnet_config, tmp_path):
    config = xbusnet_config(gfe=False, sfa=False, pretrained=True)
    (file,) = config.weight_files()
    staged = timm.create_model(config.encoder, pretrained=False).state_dict()  # with its classifier, as timm's file
    safetensors.torch.save_file(staged, tmp_path / file.name)
    loaded = XBusNet(config, str(tmp_path)).lfe.encoder.state_dict()
    assert loaded
    assert all(torch.equal(loaded[name], staged[name]) for name in loaded)


def test_weight_files_follow_the_switches(xbusnet_config):
    repos = {}
    for lfe, gfe, sfa in [*TABLE_4, (True, False, False)]:
        config = xbusnet_config("xbusnet", lfe=lfe, gfe=gfe, sfa=sfa)
        repos[lfe, gfe, sfa] = [file.hub_repo for file in config.weight_files()]
    clip, resnet = CLIP_VIT_B16.hub_repo, "timm/resnet50.a1_in1k"
    assert repos == {
        (True, True, True): [clip, resnet],
        (False, True, False): [clip],
        (True, False, True): [clip, resnet],
        (True, True, False): [clip, resnet],
        (True, False, False): [resnet],
    }
    assert xbusnet_config("xbusnet", pretrained=False).weight_files() == []


def test_missing_weights_name_the_command_that_stages_them(xbusnet_config, tmp_path):
    with pytest.raises(WeightsError, match="bushpc weights pull model=xbusnet"):
        XBusNet(xbusnet_config("xbusnet"), str(tmp_path))


def test_weights_of_another_architecture_are_named(xbusnet_config, tmp_path):
    config = xbusnet_config(gfe=False, sfa=False, pretrained=True)
    (file,) = config.weight_files()
    safetensors.torch.save_file({"conv1.weight": torch.zeros(1)}, tmp_path / file.name)
    with pytest.raises(WeightsError, match=rf"(?s){file.name} does not fit.*{weights.pull_command(XBusNet)}"):
        XBusNet(config, str(tmp_path))


# --- refused settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lfe": False, "gfe": False}, "no branch"),
        ({"image_size": 100}, "image_size=100 is not a multiple of clip_patch_size=8; the nearest is 96"),
        ({"image_size": 72}, "image_size=72 is not a multiple of the encoder's stride=32; the nearest is 64"),
        ({"image_size": 0}, "model.image_size=0: must be ≥ 1"),
        ({"clip_patch_size": 0}, "model.clip_patch_size=0: must be ≥ 1"),
        ({"layers": (1, 4)}, "from 1 to 3"),
        ({"layers": ()}, "from 1 to 3"),
        ({"layers": (2, 2)}, "once, in rising order"),
        ({"clip_heads": 7}, "clip_width=64 is not a multiple of clip_heads=7"),
        ({"text_heads": 7}, "text_width=64 is not a multiple of text_heads=7"),
        ({"attention_heads": 5}, "attention_heads=5 must divide .* 192 and 96"),
        ({"decoder_channels": (8, 8, 8)}, "four are needed"),
        ({"encoder": "resnet51"}, "unknown encoder 'resnet51'; similar names in timm: .*resnet50"),
        ({"encoder": "vit_tiny_patch16_224"}, "vit_tiny_patch16_224"),
        ({"fusion_stride": 3}, "model.fusion_stride=3: must be ≥ 1 and ≤ 2"),
        ({"dice_weight": 0.0, "bce_weight": 0.0}, "one of them above 0"),
        ({"pretrained": True}, "pretrained=true loads CLIP's ViT-B/16"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_composed(xbusnet_config, changes, message):
    with pytest.raises(ConfigError, match=message):
        xbusnet_config(**changes)
