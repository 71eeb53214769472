"""The classifier under the model contract."""

import dataclasses

import pytest
import safetensors.torch
import timm
import torch

from bushpc.cli import main
from bushpc.config import ModelConfig, compose
from bushpc.dispatch.plan import cv_plan
from bushpc.errors import ConfigError, DataError, WeightsError
from bushpc.models.efficientnet import EfficientNet
from bushpc.nn.recompute import recompute

LABELS_OF_BATCH = torch.tensor([0, 1, 2, 1])


def config_of(name="efficientnet_small", **changes):
    return dataclasses.replace(compose([f"model={name}"]).model, **changes)


def test_learns_one_batch_by_heart(make_batch):
    model, batch = EfficientNet(config_of()), make_batch(label_B=LABELS_OF_BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        model(batch).total.backward()
        optimizer.step()
    with torch.no_grad():
        assert model(batch).total < 0.1


def test_every_parameter_trains(make_batch):
    model = EfficientNet(config_of())
    model(make_batch(label_B=LABELS_OF_BATCH)).total.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_prediction_is_the_librarys_softmax_and_reads_neither_mask_nor_label(make_batch):
    model, batch = EfficientNet(config_of()).eval(), make_batch()
    blind = dataclasses.replace(
        batch, mask_BKHW=torch.full_like(batch.mask_BKHW, float("nan")), label_B=torch.full((4,), -1)
    )
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        prediction = model.predict(blind)
        torch.testing.assert_close(prediction.class_prob_BL, model.net((batch.image_BCHW - mean) / std).softmax(1))
    assert prediction.prob_BKHW is None
    assert prediction.class_prob_BL.shape == (4, 3)


def test_b0_has_the_published_number_of_parameters():
    """Tan and Le, Table 2: 5.3M with ImageNet's 1000 labels; three labels take 997 rows off the last layer."""
    with torch.device("meta"):
        ours = EfficientNet(config_of("efficientnet", pretrained=False))
    published = 5_288_548
    assert ours.parameter_count() == published - 997 * (1280 + 1)


def test_everything_but_the_last_layer_starts_from_its_staged_file(tmp_path):
    config = config_of(pretrained=True)
    (file,) = config.weight_files()
    staged = timm.create_model("test_efficientnet").state_dict()
    safetensors.torch.save_file(staged, tmp_path / file.name)
    loaded = EfficientNet(config, str(tmp_path)).net.state_dict()
    assert loaded["classifier.weight"].shape == (3, 256)
    assert all(torch.equal(loaded[name], staged[name]) for name in staged if not name.startswith("classifier."))


def test_missing_weights_name_the_command_that_stages_them(tmp_path):
    with pytest.raises(WeightsError, match="bushpc weights pull model=efficientnet"):
        EfficientNet(config_of("efficientnet"), str(tmp_path))


def test_recomputed_blocks_give_the_same_loss(make_batch):
    model, batch = EfficientNet(config_of(network="efficientnet_lite0")), make_batch(label_B=LABELS_OF_BATCH)
    expected = model(batch).total
    recompute(model, model.config.blocks)
    torch.testing.assert_close(model(batch).total, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "efficientnet_b00"}, "unknown model.network 'efficientnet_b00'; did you mean 'efficientnet_b0'"),
        ({"network": "resnet18"}, "unknown model.network 'resnet18'"),
        ({"image_size": 16}, "model.image_size=16: must be ≥ 32; for example model.image_size=224"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_composed(changes, message):
    with pytest.raises(ConfigError, match=message):
        config_of(**changes)


def test_any_mask_classes_will_do_and_other_channels_will_not():
    config_of().check_data(["disc", "cup"], ["red", "green", "blue"])
    with pytest.raises(ConfigError, match="three channels"):
        ModelConfig(image_size=32, pretrained=False).check_data(["lesion"], ["t1", "t2", "flair", "t1ce"])


def test_scans_of_one_label_teach_it_nothing_and_are_refused(tmp_path):
    folder = tmp_path / "benign"
    only_benign = ("count=20", "normals=0", "malignant_share=0", "workers=1")
    assert main(["pack", "data=phantom", f"out={folder}", *only_benign]) == 0
    with pytest.raises(DataError, match="what trains in fold 0 of phantom has only benign"):
        cv_plan(compose(["model=efficientnet_small", "data=phantom", f"data.root={folder}"]))
