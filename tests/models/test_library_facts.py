"""What is written down of timm and open_clip, so that the login node need not import them, is what they say."""

import open_clip.constants
import pytest
import timm.data.constants
import torch

from bushpc.models import efficientnet, sam_multitask, smp, vit_diffusion, xbusnet
from bushpc.nn.encoder import CHANNELS, feature_channels, feature_extractor
from bushpc.nn.normalize import IMAGENET_MEAN, IMAGENET_STD
from bushpc.nn.pretrained import WRITTEN_DOWN


@pytest.mark.parametrize("name", CHANNELS)
def test_channels_written_down_are_timms(name):
    strides = [2 << i for i in range(len(CHANNELS[name]))]
    with torch.device("meta"):
        assert feature_extractor(name, strides)[1] == list(CHANNELS[name]) == feature_channels(name, strides)


@pytest.mark.parametrize("vit", vit_diffusion.PATCHES)
def test_patches_written_down_are_timms(vit):
    config = vit_diffusion.VitDiffusionConfig(image_size=64, vit=vit)
    assert config._patch_of_timm() == vit_diffusion.PATCHES[vit]


@pytest.mark.parametrize("name", WRITTEN_DOWN)
def test_normalisation_written_down_is_timms(name):
    found = timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    assert WRITTEN_DOWN[name] == (found["mean"], found["std"])


def test_networks_that_are_not_looked_up_are_known():
    from segmentation_models_pytorch.encoders import encoders

    assert {encoder for _, encoder in smp.SHIPPED} <= set(encoders)
    assert set(efficientnet.SHIPPED) <= set(timm.list_models("*efficientnet*", module="efficientnet"))


def test_means_and_deviations_are_the_libraries():
    ours = (IMAGENET_MEAN, IMAGENET_STD, xbusnet.CLIP_MEAN, xbusnet.CLIP_STD)
    theirs = (timm.data.constants.IMAGENET_DEFAULT_MEAN, timm.data.constants.IMAGENET_DEFAULT_STD)
    assert ours == (*theirs, open_clip.constants.OPENAI_DATASET_MEAN, open_clip.constants.OPENAI_DATASET_STD)


@pytest.mark.parametrize("file", [xbusnet.CLIP_VIT_B16, sam_multitask.SAM_VIT_B], ids=lambda file: file.name)
def test_licences_written_down_are_timms(file):
    assert file.licence == timm.get_pretrained_cfg(file.hub_repo.removeprefix("timm/")).license
