"""MONAI's networks under the model contract."""

import pytest
import torch
from monai.networks import nets

from bushpc.config import compose
from bushpc.errors import ConfigError
from bushpc.models.monai_nets import Monai

COMMON = ("data=phantom", "cluster=local", "model.image_size=64")
DIRECT = {
    "attention_unet": lambda: nets.AttentionUnet(2, 3, 1, channels=(8, 16, 32), strides=(2, 2)),
    "basic_unet": lambda: nets.BasicUNet(2, 3, 1, features=(8, 8, 16, 32, 64, 8)),
    "swin_unetr": lambda: nets.SwinUNETR(in_channels=3, out_channels=1, feature_size=12, spatial_dims=2),
}
WIDTHS = {"attention_unet": "[8,16,32]", "basic_unet": "[8,8,16,32,64,8]", "swin_unetr": "[12]"}


@pytest.mark.parametrize("name", DIRECT)
def test_predicts_as_the_librarys_own_and_learns(name, make_batch):
    model = Monai(compose([f"model={name}", *COMMON, f"model.widths={WIDTHS[name]}"]).model)
    batch, theirs = make_batch(count=2), DIRECT[name]()
    theirs.load_state_dict(model.net.state_dict())
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = theirs.eval()((batch.image_BCHW - mean) / std).sigmoid()
        torch.testing.assert_close(model.eval().predict(batch).prob_BKHW, expected)
    model.train()(batch).total.backward()
    assert all(value.grad is not None for value in model.parameters())
    seen = []
    model.cam_layer().register_forward_hook(lambda *call: seen.append(call[2]))
    model.predict(batch)
    assert seen[0].shape[-2:] == (64, 64)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model=swin_unetr", "model.image_size=100"],
            "not a multiple of 32, the stride of SwinUNETR; the nearest is 96",
        ),
        (["model=swin_unetr", "model.image_size=32"], "normalises a single value"),
        (["model=swin_unetr", "model.widths=[10]"], "SwinUNETR one multiple of 12"),
        (["model=basic_unet", "model.widths=[8,8]"], "BasicUNetPlusPlus six"),
        (["model=attention_unet", "model.pretrained=true"], "MONAI has no weights"),
        (["model=attention_unet", "model.network=UNETR"], "unknown model.network 'UNETR'"),
    ],
)
def test_what_does_not_fit_is_refused_when_composed(words, message):
    with pytest.raises(ConfigError, match=message):
        compose([*COMMON, *words])
