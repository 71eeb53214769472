"""The U-Net baseline under the model contract."""

import dataclasses

import pytest
import safetensors.torch
import segmentation_models_pytorch as smp
import torch

from bushpc.errors import ConfigError, WeightsError
from bushpc.models.baselines import UNet


def test_learns_one_batch_by_heart(unet_config, make_batch):
    model, batch = UNet(unet_config()), make_batch()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        model(batch).total.backward()
        optimizer.step()
    with torch.no_grad():
        assert model(batch).terms["dice"] < 0.1


def test_every_parameter_trains(unet_config, make_batch):
    model = UNet(unet_config())
    model(make_batch()).total.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_prediction_is_the_librarys_and_touches_no_mask(unet_config, make_batch):
    model = UNet(unet_config()).eval()
    batch = make_batch()
    poisoned = dataclasses.replace(batch, mask_BKHW=torch.full_like(batch.mask_BKHW, float("nan")))
    normalised = (batch.image_BCHW - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225]
    )[:, None, None]
    with torch.no_grad():
        prob = model.predict(poisoned).prob_BKHW
        torch.testing.assert_close(prob, model.net(normalised).sigmoid())
    assert prob.shape == (4, 1, 64, 64)


def test_encoder_starts_from_its_staged_file(unet_config, tmp_path):
    config = unet_config(pretrained=True)
    staged = smp.Unet("resnet18", encoder_weights=None).encoder.state_dict()
    (file,) = config.weight_files()
    safetensors.torch.save_file(staged, tmp_path / file.name)
    loaded = UNet(config, str(tmp_path)).net.encoder.state_dict()
    assert all(torch.equal(loaded[name], staged[name]) for name in staged)


def test_missing_weights_name_the_command_that_stages_them(unet_config, tmp_path):
    with pytest.raises(WeightsError, match="bushpc weights pull model=unet"):
        UNet(unet_config("unet"), str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "resnet19"}, "unknown encoder 'resnet19'; did you mean 'resnet18'"),
        ({"image_size": 100}, "image_size=100"),
        ({"decoder_channels": (8, 8)}, r"decoder_channels=\[8, 8\].*takes 5 numbers"),
        ({"dice_weight": -1.0}, "model.dice_weight=-1.0: must be ≥ 0"),
        ({"dice_weight": 0.0, "bce_weight": 0.0}, "leave no loss"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_composed(unet_config, changes, message):
    with pytest.raises(ConfigError, match=message):
        unet_config(**changes)
