"""Normalisation of a batch's image for a pretrained backbone."""

import pytest
import torch
from torch import nn
from torchvision.transforms.v2.functional import normalize

from bushpc.nn.normalize import Normalize

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def test_normalises_as_torchvision_does():
    image = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    ours = Normalize(MEAN, STD)(image, nn.Conv2d(3, 1, 1))
    torch.testing.assert_close(ours, normalize(image, list(MEAN), list(STD)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_image_takes_the_type_of_the_backbones_parameters(dtype):
    assert Normalize(MEAN, STD)(torch.rand(1, 3, 4, 4), nn.Conv2d(3, 1, 1).to(dtype)).dtype == dtype


def test_nothing_goes_into_checkpoints():
    assert not Normalize(MEAN, STD).state_dict()
