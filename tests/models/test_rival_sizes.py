"""Full-size rivals have the parameters that are published of them, counted without memory on torch's meta device."""

import pytest
import torch

from bushpc.config import compose
from bushpc.errors import ConfigError
from bushpc.models.classic_unet import ClassicUNet
from bushpc.models.torchvision_nets import build

COUNTS = {  # model: (here, published)
    "classic_unet": (34_513_345, 34_513_345),  # hybrid attention, Table 2
    "unet_plus_plus": (9_119_332, 9_041_601),  # stated in its authors' Keras code
}


def count(words):
    config = compose(words)
    with torch.device("meta"):
        return config.model_class(config.model).parameter_count()


@pytest.mark.parametrize("name", COUNTS)
def test_a_full_size_rival_has_the_published_number_of_parameters(name):
    here, published = COUNTS[name]
    assert count([f"model={name}"]) == here
    assert here == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(("network", "published"), [("fcn_resnet50", 35_322_218), ("deeplabv3_resnet50", 42_004_074)])
def test_torchvisions_networks_have_what_torchvision_states_but_for_heads(network, published):
    with torch.device("meta"):
        ours = sum(p.numel() for p in build(network).parameters())
    auxiliary = 1024 * 256 * 9 + 2 * 256 + 256 * 21 + 21
    last = (512 if network.startswith("fcn") else 256) * 20 + 20  # 21 classes there, one here
    assert ours == published - auxiliary - last


def test_edcnn_is_keras_xception_and_mobilenet_beside_the_classic_unet():
    config = compose(["model=edcnn"])
    with torch.device("meta"):
        model = config.model_class(config.model)
    xception, mobilenet = (sum(p.numel() for p in network.parameters()) for network in model.networks)
    # Trained parameters that Keras states, with its classifiers of 1000 labels: 22,855,952 and 4,231,976.
    assert xception == 22_855_952 - 2048 * 1000 - 1000
    assert mobilenet == 4_231_976 - 1024 * 1000 - 1000
    assert model.parameter_count() == xception + mobilenet + 34_513_345 + (2048 + 1024) * 3 + 3


def test_edcnn_learns_both_tasks(make_batch):
    words = ["model.xception=test_resnet", "model.mobilenet=test_efficientnet", "model.width=4", "model.image_size=64"]
    config = compose(["model=edcnn", *words])
    model = config.model_class(config.model)
    losses = model.train()(make_batch())
    losses.total.backward()
    assert set(losses.terms) == {"dice", "bce", "ce"}
    assert all(value.grad is not None for value in model.parameters())
    prediction = model.eval().predict(make_batch())
    assert prediction.class_prob_BL.shape == (4, 3)
    assert prediction.prob_BKHW.shape == (4, 1, 64, 64)


@pytest.mark.parametrize("name", ["fcn", "deeplabv3"])
def test_torchvisions_networks_learn_at_any_size(name, make_batch):
    config = compose([f"model={name}", "model.pretrained=false", "model.image_size=40"])
    model = config.model_class(config.model)
    model.train()(make_batch(40, 2)).total.backward()
    assert all(value.grad is not None for value in model.parameters())
    assert model.eval().predict(make_batch(40, 1)).prob_BKHW.shape == (1, 1, 40, 40)


def test_the_classic_unet_learns_and_its_map_is_explained_where_it_is_made(make_batch):
    model = ClassicUNet(compose(["model=classic_unet", "model.width=4", "model.image_size=64"]).model)
    model.train()(make_batch()).total.backward()
    assert all(value.grad is not None for value in model.parameters())
    seen = []
    model.cam_layer().register_forward_hook(lambda *call: seen.append(call[2]))
    model.predict(make_batch())
    assert seen[0].shape == (4, 4, 64, 64)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=classic_unet", "model.pretrained=true"], "take model=unet"),
        (["model=classic_unet", "model.image_size=100"], "the nearest are 96 and 112"),
        (["model=fcn", "model.network=fcn_vgg16"], "unknown model.network"),
        (["model=edcnn", "model.xception=xeption"], "model.xception"),
        (["model=edcnn", "model.image_size=100"], "the nearest are 96 and 112"),
    ],
)
def test_what_cannot_be_built_is_refused_when_composed(words, said):
    with pytest.raises(ConfigError, match=said):
        compose(words)


@pytest.mark.parametrize("name", ["classic_unet", "unet_plus_plus", "fcn", "edcnn", "bussam", "smp"])
@pytest.mark.parametrize(("classes", "channels"), [(("disc", "cup"), 3), (("lesion",), 4)])
def test_a_dataset_of_other_classes_or_channels_is_refused_with_both(name, classes, channels):
    with pytest.raises(ConfigError, match="segments one class in images of three channels"):
        compose([f"model={name}"]).model.check_data(classes, [f"c{i}" for i in range(channels)])
