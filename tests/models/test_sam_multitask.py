"""SAM multi-task: the paper's equations and curriculum, SAM's encoder, and both tasks under the model contract."""

import dataclasses
import math
import re
from functools import partial

import pytest
import safetensors.torch
import torch
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

from bushpc.config import compose
from bushpc.errors import ConfigError, WeightsError
from bushpc.losses.label import labelled_cross_entropy
from bushpc.models.sam_multitask import (
    SAM_VIT_B,
    SamMultitask,
    build_encoder,
    shows_ground_truth,
)
from bushpc.nn.recompute import recompute

# Of timm's ViT, as small as it gets; its second block attends over the whole image.
TINY_SAM = {
    **{"patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2, "window_size": 14, "global_attn_indexes": (1,)},
    **{"neck_chans": 8, "use_rel_pos": True, "num_classes": 0},
}
LABELS_OF_BATCH = torch.tensor([0, 1, 2, 0])


@pytest.fixture
def sam_batch(make_batch):
    """sam_batch(**fields) -> Batch in the last phase of the curriculum; its third scan is a normal one."""

    def make(**fields):
        batch = make_batch(**{"label_B": LABELS_OF_BATCH, "epochs": [1000] * 4, **fields})
        batch.mask_BKHW[2] = 0
        batch.image_BCHW[1] += 0.3  # malignant ones are brighter
        return batch

    return make


# --- the paper's equations and curriculum -----------------------------------------------------------------------


def test_losses_are_those_of_equations_4_to_8(sam_config, sam_batch):
    model, batch = SamMultitask(sam_config()).eval(), sam_batch()
    with torch.no_grad():
        losses, prediction = model(batch), model.predict(batch)
    y, p = batch.mask_BKHW.double(), prediction.prob_BKHW.double()
    bce = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    dice = torch.stack(
        [1 - (2 * (y[i] * p[i]).sum() + 1e-6) / (y[i].sum() + p[i].sum() + 1e-6) for i in range(4)]
    ).mean()
    ce = -torch.stack([prediction.class_prob_BL[i, label].log() for i, label in enumerate(LABELS_OF_BATCH)]).mean()
    expected = {"bce": bce, "dice": dice, "ce": ce}
    for name, value in expected.items():
        assert float(losses.terms[name]) == pytest.approx(float(value), rel=1e-4)
    assert float(losses.total) == pytest.approx(float(0.6 * (bce + dice) + 0.4 * ce), rel=1e-4)


def test_scans_without_a_label_teach_the_mask_alone(sam_config, sam_batch):
    logits = torch.tensor([[0.0, 0.0, 0.0], [9.0, -9.0, 0.0]])
    assert labelled_cross_entropy(logits, torch.tensor([1, -1])) == pytest.approx(math.log(3))
    model = SamMultitask(sam_config())
    losses = model(sam_batch(label_B=torch.full((4,), -1)))
    losses.total.backward()
    assert losses.terms["ce"] == 0
    assert math.isfinite(losses.total.detach())
    assert not any(p.grad.any() for p in model.classifier.parameters())
    assert model.decoder.head.weight.grad.any()


def test_an_empty_mask_is_taught_by_cross_entropy_alone(sam_config, sam_batch):
    model = SamMultitask(sam_config()).eval()
    batch = sam_batch(mask_BKHW=torch.zeros(4, 1, 64, 64))
    terms = model(batch).terms
    assert float(terms["dice"]) == pytest.approx(1, abs=1e-6)
    assert float(terms["bce"]) > 0.1


def test_the_curriculum_shows_the_ground_truth_then_either_then_the_prediction():
    epochs = (0, 19, 20, 39, 40, 99)
    shown = {epoch: float(shows_ground_truth([epoch] * 4000, (20, 20, 20)).float().mean()) for epoch in epochs}
    assert [shown[epoch] for epoch in (0, 19, 40, 99)] == [1, 1, 0, 0]
    # 3.9 standard deviations of a fair coin's mean.
    assert all(abs(shown[epoch] - 0.5) < 3.9 * 0.5 / math.sqrt(4000) for epoch in (20, 39))
    mixed = shows_ground_truth([0, 50, 0, 50], (20, 20, 20))
    assert mixed.tolist() == [True, False, True, False]


def test_the_loss_on_held_out_samples_comes_from_the_predicted_mask_in_every_phase(sam_config, sam_batch):
    model = SamMultitask(sam_config(curriculum=(1, 0, 1))).eval()
    with torch.no_grad():
        losses = [float(model(sam_batch(epochs=[epoch] * 4)).terms["ce"]) for epoch in (0, 1)]
        shown = [float(model.train()(sam_batch(epochs=[epoch] * 4)).terms["ce"]) for epoch in (0, 1)]
    assert losses[0] == losses[1]
    assert shown[0] != shown[1], "the case is degenerate"


def test_the_classifier_sees_the_true_mask_first_and_its_gradient_reaches_the_decoder_only_through_the_predicted_one(
    sam_config, sam_batch
):
    config = sam_config(segmentation_share=0.0, curriculum=(1, 0, 1))  # (8) is the classification's loss alone
    reached = {}
    for epoch in (0, 1):
        model = SamMultitask(config)
        model(sam_batch(epochs=[epoch] * 4)).total.backward()
        reached[epoch] = bool(model.decoder.head.weight.grad.any())
    assert reached == {0: False, 1: True}


def test_mask_guided_pooling_is_the_mean_of_the_embedding_where_the_mask_lies(sam_config):
    classifier = SamMultitask(sam_config()).classifier
    embedding, mask = torch.zeros(1, 64, 8, 8), torch.zeros(1, 1, 64, 64)
    embedding[:, :, 2:6, 2:6] = 1
    mask[:, :, 16:48, 16:48] = 1
    read = []
    classifier.mlp = nn.Sequential(nn.Identity())
    classifier.mlp[0].register_forward_hook(lambda module, given, made: read.append(made))
    with torch.no_grad():
        classifier(embedding, mask)
        classifier(embedding, torch.zeros_like(mask))
    guided, unguided = read
    torch.testing.assert_close(guided[:, :64], torch.full((1, 64), 0.25))  # 16 of 64 places
    # By places of the 3 x 3 convolution inside the mask, 9 to 0: how many places there are with so many, in and out.
    inside, outside = {9: 4, 6: 8, 4: 4}, {3: 8, 2: 8, 1: 4, 0: 28}
    weight = [sum(n / (1 + math.exp(4 - 8 * k / 9)) for k, n in places.items()) for places in (inside, outside)]
    torch.testing.assert_close(guided[:, 64:], torch.full((1, 64), weight[0] / sum(weight)))
    # Without a lesion A is the same everywhere, and so is the mean.
    torch.testing.assert_close(unguided[:, 64:], torch.full((1, 64), 0.25))


# --- the encoder ------------------------------------------------------------------------------------------------


def test_the_full_encoder_is_sams_and_its_variants_train_what_they_say(sam_config):
    with torch.device("meta"):
        counts = {}
        for encoder in ("frozen", "full", "lora"):
            for decoder in ("unet", "sd"):
                model = SamMultitask(sam_config("sam_multitask", pretrained=False, encoder=encoder, decoder=decoder))
                trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
                counts[encoder, decoder] = trained
                if encoder == "frozen":
                    (outside,) = model.outside_state().values()
                    assert sum(p.numel() for p in outside.parameters()) == 89_670_912
    for decoder in ("unet", "sd"):
        assert counts["full", decoder] - counts["frozen", decoder] == 89_670_912
        # rank 8 x (768 in + 3 x 768 out) x 12 blocks
        assert counts["lora", decoder] - counts["frozen", decoder] == 8 * (768 + 2304) * 12


@pytest.mark.parametrize("size", [64, 96])
def test_attention_without_an_n_by_n_map_is_timms(sam_config, size):
    config = sam_config(image_size=size)
    encoder = build_encoder(config, None).eval()
    theirs = VisionTransformerSAM(
        img_size=size,
        patch_size=8,
        embed_dim=64,
        depth=4,
        num_heads=4,
        num_classes=0,
        use_rel_pos=True,
        window_size=3,
        global_attn_indexes=(1, 3),
        neck_chans=64,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    ).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():  # positions start at zero, and would not be tested
            parameter.normal_(std=0.2)
        theirs.load_state_dict(encoder.state_dict())
        image = torch.randn(2, 3, size, size)
        torch.testing.assert_close(encoder(image), theirs(image), rtol=1e-4, atol=1e-4)


def test_the_encoder_starts_from_its_staged_file(sam_config, tmp_path):
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in build_encoder(_full(sam_config), None).state_dict().items()}
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    state["blocks.3.attn.qkv.bias"] += 7
    safetensors.torch.save_file(state, tmp_path / SAM_VIT_B.name)
    model = SamMultitask(_full(sam_config, pretrained=True), str(tmp_path))
    assert (model.outside_state()["encoder"].blocks[3].attn.qkv.bias == 7).all()
    safetensors.torch.save_file({"blocks.3.attn.qkv.bias": torch.zeros(3)}, tmp_path / SAM_VIT_B.name)
    with pytest.raises(WeightsError, match=r"(?s)does not fit.*bushpc weights pull model=sam_multitask"):
        SamMultitask(_full(sam_config, pretrained=True), str(tmp_path))
    with pytest.raises(WeightsError, match="bushpc weights pull model=sam_multitask"):
        SamMultitask(_full(sam_config, pretrained=True), str(tmp_path / "elsewhere"))


def test_a_smaller_image_starts_from_sams_positions_in_shapes_that_need_no_staged_file(
    sam_config, tmp_path, monkeypatch
):
    big, small = (VisionTransformerSAM(img_size=size, **TINY_SAM).eval() for size in (1024, 96))
    with torch.no_grad():
        for name, parameter in big.named_parameters():
            parameter.normal_(std=0.2 if "pos" in name else 0.1)
    safetensors.torch.save_file(big.state_dict(), tmp_path / SAM_VIT_B.name)
    monkeypatch.setattr("timm.models.vision_transformer_sam.VisionTransformerSAM", lambda **_: small)
    encoder = build_encoder(sam_config("sam_multitask", image_size=96), str(tmp_path))
    assert encoder.pos_embed.shape == (1, 6, 6, 16)
    assert encoder.blocks[1].attn.rel_pos_h.shape == (11, 8)
    image = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        # timm interpolates what does not fit in every call.
        torch.testing.assert_close(encoder(image), big(image), rtol=1e-4, atol=1e-4)


def _full(sam_config, pretrained=False):
    return sam_config("sam_multitask", pretrained=pretrained)


def test_a_frozen_encoder_is_in_no_checkpoint_and_the_same_from_any_seed(sam_config):
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(SamMultitask(sam_config(encoder="frozen")))
    assert not any("encoder" in name or "blocks" in name for name in models[0].state_dict())
    states = [model.outside_state()["encoder"].state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(models[0].decoder.head.weight, models[1].decoder.head.weight)


# --- the contract -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["unet", "sd"])
def test_learns_one_batch_by_heart_in_both_tasks(sam_config, sam_batch, decoder):
    model = SamMultitask(sam_config(decoder=decoder, curriculum=(30, 30, 30)))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for epoch in range(90):
        optimizer.zero_grad()
        model(sam_batch(epochs=[epoch] * 4)).total.backward()
        optimizer.step()
    with torch.no_grad():
        prediction = model.eval().predict(sam_batch())
    assert prediction.class_prob_BL.argmax(dim=1).equal(LABELS_OF_BATCH)
    torch.testing.assert_close(prediction.class_prob_BL.sum(dim=1), torch.ones(4))
    truth, found = sam_batch().mask_BKHW > 0, prediction.prob_BKHW > 0.5
    assert 2 * (truth & found).sum() / (truth.sum() + found.sum()) > 0.8
    assert found[2].sum() < 20  # the normal scan


@pytest.mark.parametrize(
    ("encoder", "trained"),
    [("frozen", r"decoder\.|classifier\."), ("full", r".*"), ("lora", r"decoder\.|classifier\.|.*\.lora_[AB]\.")],
)
def test_exactly_what_trains_gets_a_gradient(sam_config, sam_batch, encoder, trained):
    model = SamMultitask(sam_config(encoder=encoder))
    for _ in range(2):  # adapters' A gets one as soon as B is not zero any more
        model(sam_batch()).total.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    for name, parameter in model.named_parameters():
        assert bool(parameter.grad is not None and parameter.grad.any()) == bool(re.match(trained, name)), name
    for module in model.outside_state().values():
        assert all(parameter.grad is None for parameter in module.parameters())


def test_given_features_replace_the_encoder(sam_config, sam_batch):
    model, batch = SamMultitask(sam_config(encoder="frozen")).eval(), sam_batch()
    with torch.no_grad():
        given = dataclasses.replace(
            batch, features=model.features(batch.image_BCHW), image_BCHW=torch.full_like(batch.image_BCHW, math.nan)
        )
        assert torch.equal(model(given).total, model(batch).total)
        assert torch.equal(model.predict(given).prob_BKHW, model.predict(batch).prob_BKHW)
    second = given.split(2)[1].features
    assert all(torch.equal(value, given.features[name][2:]) for name, value in second.items())
    assert sam_config().feature_settings == {}


def test_prediction_touches_no_mask(sam_config, sam_batch):
    model = SamMultitask(sam_config()).eval()
    poisoned = sam_batch(mask_BKHW=torch.full((4, 1, 64, 64), math.nan), epochs=[0] * 4)
    with torch.no_grad():
        assert torch.equal(model.predict(poisoned).class_prob_BL, model.predict(sam_batch()).class_prob_BL)


def test_recomputing_blocks_changes_no_gradient(sam_config, sam_batch):
    config, batch = sam_config(), sam_batch()
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        model = SamMultitask(config)
        if again:
            assert recompute(model, model.config.blocks) == 4 + 3
        model(batch).total.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "thawed"}, "unknown model.encoder 'thawed'"),
        ({"decoder": "unet3"}, "unknown model.decoder 'unet3'; did you mean 'unet'"),
        ({"image_size": 100}, "image_size=100 is not a multiple of model.patch_size=8; the nearest is 96"),
        ({"patch_size": 12, "image_size": 96}, "patch_size=12: .* power of 2"),
        ({"heads": 3}, "width=64 is not a multiple of model.heads=3"),
        ({"decoder_channels": (32, 16)}, "3 numbers are needed"),
        ({"decoder_channels": (32, 16, 6)}, "multiples of 4"),
        ({"skip_blocks": (1, 4)}, "skip_blocks=.*from 0 to 3"),
        ({"skip_blocks": (0, 1, 2, 3)}, "there are 3 stages"),
        ({"curriculum": (20, 20)}, "three numbers of epochs"),
        ({"segmentation_share": 1.5}, "model.segmentation_share=1.5: must be ≥ 0 and ≤ 1"),
        ({"lora_rank": 0}, "model.lora_rank=0: must be ≥ 1; for example model.lora_rank=8"),
        ({"pretrained": True}, "loads SAM's ViT-B"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_composed(sam_config, changes, message):
    with pytest.raises(ConfigError, match=message):
        sam_config(**changes)


def test_the_yaml_is_the_papers_protocol():
    cell = compose(["model=sam_multitask", "data=breast"])
    assert (cell.model.image_size, cell.model.curriculum, cell.model.segmentation_share) == (1024, (20, 20, 20), 0.6)
    assert (cell.train.epochs, cell.train.lr, cell.train.schedule) == (60, 1e-4, "constant")
    assert cell.data.normals
