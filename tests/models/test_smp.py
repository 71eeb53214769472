"""Architectures of segmentation-models-pytorch on encoders of timm, under the model contract."""

import dataclasses

import pytest
import safetensors.torch
import segmentation_models_pytorch as smp
import timm
import torch

from bushpc import weights
from bushpc.config import CellConfig, compose
from bushpc.data.lineage import licences_of_pulled
from bushpc.errors import ConfigError, WeightsError
from bushpc.models.smp import ARCHITECTURES, Smp
from bushpc.models.smp_label import SmpLabel
from bushpc.shards.licences import conflicts

COMMON = ("data=phantom", "cluster=local", "model.image_size=64", "model.pretrained=false")


def config_of(*words):
    return compose(["model=smp", *COMMON, *words]).model


def sized(architecture):
    """PAN pools the deepest features three times."""
    return 128 if architecture == "PAN" else 64


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_predicts_and_learns_as_the_librarys_own(architecture, make_batch):
    encoder, size = "tu-test_vit" if architecture == "DPT" else "tu-test_resnet", sized(architecture)
    words = (f"model.architecture={architecture}", f"model.encoder={encoder}", f"model.image_size={size}")
    model, batch = Smp(config_of(*words)), make_batch(size=size, count=2)
    theirs = smp.create_model(
        architecture, encoder, encoder_weights=None, **({"img_size": size} if architecture == "DPT" else {})
    )
    theirs.load_state_dict(model.net.state_dict())
    with torch.no_grad():  # timm says 0.5 and 0.5 of both of its networks
        expected = theirs.eval()((batch.image_BCHW - 0.5) / 0.5).sigmoid()
        torch.testing.assert_close(model.eval().predict(batch).prob_BKHW, expected)
    model.train()(batch).total.backward()
    without = [name for name, value in model.named_parameters() if value.grad is None]
    # The last block's class token and norm are behind the features that DPT reads.
    assert all(name.startswith("net.encoder.model.") for name in without)
    assert not without or architecture in ("DPT", "PSPNet")


@pytest.mark.parametrize(
    ("encoder", "architecture"),
    [("tu-test_convnext", "UnetPlusPlus"), ("tu-test_vit", "DPT"), ("tu-test_efficientnet", "Unet")],
)
def test_timms_weights_are_loaded_as_timm_loads_them(encoder, architecture, tmp_path):
    """At 64 pixels, where positions of the ViT, made for 160, have to be resampled."""
    network = encoder.removeprefix("tu-")
    config = dataclasses.replace(
        config_of(f"model.architecture={architecture}", f"model.encoder={encoder}"), pretrained=True
    )
    (file,) = config.weight_files()
    safetensors.torch.save_file(timm.create_model(network).state_dict(), tmp_path / file.name)
    ours = Smp(config, str(tmp_path)).backbone().model.eval()
    how = {"img_size": 64} if architecture == "DPT" else {"features_only": True}
    overlay = {"file": str(tmp_path / file.name)}
    theirs = timm.create_model(network, pretrained=True, pretrained_cfg_overlay=overlay, **how).eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        features = (ours(image), theirs(image))
    torch.testing.assert_close(*features)
    assert file.licence == timm.get_pretrained_cfg(network).license == "apache-2.0"


def test_a_staged_file_of_another_network_is_no_start(tmp_path):
    config = dataclasses.replace(config_of("model.encoder=tu-test_resnet"), pretrained=True)
    (file,) = config.weight_files()
    wrong = {name: value[:1] for name, value in timm.create_model("test_resnet").state_dict().items() if value.ndim}
    safetensors.torch.save_file(wrong, tmp_path / file.name)
    with pytest.raises(WeightsError, match=r"test_resnet.safetensors does not fit the model"):
        Smp(config, str(tmp_path))


@pytest.mark.parametrize(
    ("words", "network"),
    [
        (["model=vit_diffusion", "model.vit=deit_tiny_patch16_224.fb_in1k"], "deit_tiny_patch16_224.fb_in1k"),
        (["model=vit_diffusion_small", "model.channels=4", "model.vit=deit_tiny_patch16_224"], "deit_tiny_patch16_224"),
        (["model=efficientnet_small", "model.network=tf_efficientnet_b0.ap_in1k"], "tf_efficientnet_b0.ap_in1k"),
        (["model=xbusnet_small", "model.encoder=resnet18.a1_in1k"], "resnet18.a1_in1k"),
        (["model=xbusnet_small", "model.encoder=resnetv2_18"], "resnetv2_18"),
        (["model=smp", "model.encoder=tu-tf_efficientnet_lite0"], "tf_efficientnet_lite0"),
        (["model=smp", "model.encoder=timm-tf_efficientnet_lite0"], "tf_efficientnet_lite0"),
        (["model=unet_small", "model.encoder=xception"], "legacy_xception"),
        (["model=unet_small", "model.encoder=dpn68"], "dpn68"),
        (["model=unet_small", "model.encoder=efficientnet-b0.advprop"], "tf_efficientnet_b0.ap_in1k"),
    ],
)
def test_the_image_is_normalised_as_the_chosen_networks_weights_expect(words, network):
    config = compose(["data=phantom", "cluster=local", "model.pretrained=false", *words]).model
    theirs = timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(network).to_dict())
    ours = config.normalize()
    torch.testing.assert_close(ours.mean.flatten(), torch.tensor(theirs["mean"]))
    torch.testing.assert_close(ours.std.flatten(), torch.tensor(theirs["std"]))


def test_a_run_from_before_keeps_the_numbers_that_it_was_trained_with():
    cell = compose(["model=vit_diffusion", "model.vit=deit_tiny_patch16_224", "data=phantom", "cluster=local"])
    frozen = cell.to_dict()
    assert CellConfig.from_dict(frozen).model.mean == (0.485, 0.456, 0.406)
    for name in ("mean", "std"):
        del frozen["model"][name]  # as an earlier version wrote it
    assert CellConfig.from_dict(frozen).model.normalize().mean.unique().tolist() == [0.5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.encoder=tu-convnext_tinny"], r"unknown encoder 'convnext_tinny'; did you mean 'convnext_tiny'"),
        (["model.encoder=convnext_tiny"], r"did you mean 'tu-convnext_tiny'"),
        (["model.encoder=tu-convnext_tiny.fb_in23k"], r"unknown weights of timm's convnext_tiny .* 'fb_in22k'"),
        (["model.encoder=resnet50.swssl"], r"unknown weights of resnet50 'swssl'; did you mean 'swsl'"),
        (["model.architecture=Unett"], r"unknown model.architecture 'Unett'; did you mean 'Unet'"),
        (["model.encoder=tu-test_vit"], r"needs model=smp model.architecture=DPT"),
        (["model.architecture=DPT", "model.encoder=resnet34"], r"DPT takes ViTs of timm alone"),
        (["model.architecture=DPT", "model.encoder=tu-test_vit", "model.image_size=72"], r"divisible by 16"),
        (
            ["model.architecture=DPT", "model.encoder=tu-vit_small_patch14_dinov2", "model.image_size=56"],
            r"needs model.patch_size=16",
        ),
        (
            ["model.architecture=DeepLabV3Plus", "model.encoder=tu-swin_tiny_patch4_window7_224"],
            r"DeepLabV3Plus dilates its encoder",
        ),
        (["model.image_size=100"], r"model.image_size=100 is not a multiple of 32, .* nearest is 96"),
        (["model.architecture=FPN", "model.encoder_depth=2"], r"depth for FPN decoder cannot be less than 3"),
        (["model.architecture=Linknet", "model.decoder_channels=[8]"], r"Linknet takes 0 numbers.*null"),
        (["model.encoder=tu-test_resnet", "model.decoder_channels=[8,8]"], r"takes 5 numbers above 0, one per stage"),
        (["model.encoder=tu-test_resnet", "model.encoder_depth=6"], r"depth should be in range \[1, 5\], got 6"),
        (["model.patch_size=16"], r"resnet34 has no patches"),
        (["model.std=[1,1,0]", "model.mean=[0,0,0]"], r"model.std=.* above 0"),
        (["model.mean=[0.5]", "model.std=[0.5]"], r"three numbers are needed"),
        (["model.mean=[0.5,0.5,0.5]"], r"belong together"),
        (
            ["model.architecture=DeepLabV3", "model.encoder=tu-test_resnet", "train.batch_size=1"],
            r"BatchNorm that needs 2: set train.batch_size to 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused_when_composed(words, message):
    with pytest.raises(ConfigError, match=message):
        compose(["model=smp", *COMMON, *words])


def test_a_network_without_weights_says_so_before_the_queue():
    with pytest.raises(ConfigError, match=r"timm has no pretrained weights of 'densenet264d'.*model.pretrained=false"):
        dataclasses.replace(config_of("model.encoder=tu-densenet264d"), pretrained=True).weight_files()


def test_dinov2s_patches_are_resampled_for_dpt():
    words = ("model.architecture=DPT", "model.encoder=tu-vit_small_patch14_dinov2", "model.patch_size=16")
    with torch.device("meta"):
        model = Smp(config_of(*words))
    assert model.backbone().model.patch_embed.proj.weight.shape[2:] == (16, 16)


@pytest.mark.parametrize(
    ("architecture", "encoder"), [("Unet", "tu-test_resnet"), ("DPT", "tu-test_vit"), ("Segformer", "mit_b0")]
)
def test_the_second_head_is_the_librarys_and_learns_labels_alone(architecture, encoder, make_batch):
    words = ("model=smp_label", *COMMON, f"model.architecture={architecture}", f"model.encoder={encoder}")
    config = compose([*words, "model.label_dropout=0"]).model
    model, batch = SmpLabel(config), make_batch(count=3, label_B=torch.tensor([0, 1, -1]))
    theirs = smp.create_model(
        architecture,
        encoder,
        encoder_weights=None,
        aux_params={"classes": 3},
        **({"img_size": 64} if architecture == "DPT" else {}),
    )
    theirs.load_state_dict(model.net.state_dict())
    with torch.no_grad():
        mask, label = theirs.eval()(model.normalize(batch.image_BCHW, theirs))
        made = model.eval().predict(batch)
        torch.testing.assert_close((made.prob_BKHW, made.class_prob_BL), (mask.sigmoid(), label.softmax(1)))
        losses = model(batch)
    torch.testing.assert_close(losses.terms["ce"], torch.nn.functional.cross_entropy(label[:2], torch.tensor([0, 1])))
    torch.testing.assert_close(losses.total, sum(losses.terms.values()))


def test_the_label_weight_scales_the_labels_share(make_batch):
    config = compose(["model=smp_label", *COMMON, "model.label_weight=0.25"]).model
    losses = SmpLabel(config).eval()(make_batch(count=2))
    torch.testing.assert_close(losses.total, losses.terms["dice"] + losses.terms["bce"] + 0.25 * losses.terms["ce"])


def test_the_licence_of_the_weights_goes_where_the_model_goes(tmp_path):
    """`convnextv2_atto`'s weights are CC BY-NC: a model under a licence that allows commerce contradicts them."""
    config = dataclasses.replace(config_of("model.encoder=tu-convnextv2_atto"), pretrained=True)
    (kept,) = weights.origins(config, tmp_path)
    stated = timm.get_pretrained_cfg("convnextv2_atto")
    assert kept == {
        "name": "convnextv2_atto.safetensors",
        "hub_repo": stated.hf_hub_id,
        "licence": stated.license,
    }
    licences = licences_of_pulled(config.weight_files())
    (found,) = conflicts("apache-2.0", licences)
    assert "requires non-commercial" in found
    assert not conflicts("cc-by-nc-4.0", licences)
