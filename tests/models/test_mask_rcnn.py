"""Mask R-CNN under the model contract: objects from masks, one probability map from objects."""

import numpy as np
import pytest
import torch

from bushpc.config import compose
from bushpc.models.mask_rcnn import MaskRcnn, _objects

SMALL = ("model=mask_rcnn", "model.network=resnet18", "model.pretrained=false", "model.image_size=64")


def test_a_masks_parts_are_objects_by_hand():
    mask = torch.zeros(8, 10)
    mask[1:3, 2:5] = 1
    mask[5:8, 7:10] = 1
    found = _objects(mask)
    assert found["boxes"].tolist() == [[2, 1, 5, 3], [7, 5, 10, 8]]
    assert torch.equal(found["masks"].sum(0).float(), mask)
    nothing = _objects(torch.zeros(8, 10))
    assert nothing["boxes"].shape == (0, 4)
    assert nothing["masks"].shape == (0, 8, 10)


def test_it_learns_from_scans_with_and_without_a_lesion_and_held_out_ones_change_nothing(make_batch):
    model, batch = MaskRcnn(compose(SMALL).model), make_batch(count=2)
    batch.mask_BKHW[1] = 0
    losses = model.train()(batch)
    losses.total.backward()
    assert {"classifier", "box_reg", "mask", "objectness", "rpn_box_reg"} == set(losses.terms)
    assert [name for name, value in model.named_parameters() if value.grad is None] == []
    before = {name: value.clone() for name, value in model.named_buffers()}
    with torch.no_grad():
        assert torch.isfinite(model.eval()(batch).total)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())


def test_a_pixel_has_the_highest_probability_of_the_objects_there(make_batch):
    model = MaskRcnn(compose(SMALL).model).eval()
    masks = torch.zeros(2, 1, 64, 64)
    masks[0, :, :4], masks[1, :, 2:8] = 0.9, 0.4
    objects = {"masks": masks, "scores": torch.tensor([0.6, 0.7])}
    model.net.forward = lambda images: [objects, {"masks": masks[:0], "scores": torch.zeros(0)}]
    prob = model.predict(make_batch(count=2)).prob_BKHW
    expected = np.zeros(64)
    expected[:4], expected[4:8] = 0.6, 0.4
    np.testing.assert_allclose(prob[0, 0, :, 5], expected, rtol=1e-6)
    assert prob.shape == (2, 1, 64, 64)
    assert not prob[1].any()


def test_at_full_size_it_has_what_torchvision_states_but_for_classes_and_batch_norm():
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

    config = compose(["model=mask_rcnn", "model.pretrained=false"])
    with torch.device("meta"):
        model = MaskRcnn(config.model)
    classes = 89 * (1024 + 1 + 4 * 1024 + 4 + 256 + 1)  # 91 there, 2 here: of labels, boxes and masks
    scales = sum(
        value.numel()
        for module in model.backbone().modules()
        if isinstance(module, torch.nn.BatchNorm2d)
        for value in module.parameters()
    )
    stated = MaskRCNN_ResNet50_FPN_Weights.DEFAULT.meta["num_params"]  # without the frozen normalisations' scales
    assert model.parameter_count() == stated - classes + scales
    assert stated == pytest.approx(44_401_393)
