"""Normalisation of a batch's image for a pretrained backbone."""

import torch
from torchvision.transforms.v2.functional import normalize

from bushpc.nn.normalize import Normalize

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def test_normalises_as_torchvision_does():
    image = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Normalize(MEAN, STD)(image), normalize(image, list(MEAN), list(STD)))


def test_follows_the_model_to_bfloat16_and_stays_out_of_checkpoints():
    module = Normalize(MEAN, STD).to(torch.bfloat16)
    assert module(torch.rand(1, 3, 4, 4)).dtype == torch.bfloat16
    assert not module.state_dict()
