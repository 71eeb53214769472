"""Small models and batches for the model tests; sizes as in `configs/model/*_small.yaml`, or smaller."""

import dataclasses

import pytest
import torch

from bushpc.config import compose
from bushpc.sample import Batch

SPATIAL = ["a small lesion in the upper inner quadrant of the breast", "a large lesion in the lower outer quadrant", ""]
ATTRIBUTES = ["irregular shape, indistinct margin, BI-RADS 5", "oval shape, circumscribed margin, BI-RADS 2"]
CAPTIONS = [
    "breast ultrasound image of benign tumor with homogeneous echogenicity and clear boundary",
    "breast ultrasound image of malignant tumor with heterogeneous echogenicity and unclear boundary",
]


def _maker(small, **smaller):
    """make(name=small, **changes) -> the Config that `model=name` composes. smaller: further changes of `small`."""

    def make(name=small, **changes):
        return dataclasses.replace(
            compose([f"model={name}"]).model, **{**(smaller if name == small else {}), **changes}
        )

    return make


@pytest.fixture
def xbusnet_config():
    """xbusnet_config(name="xbusnet_small", **changes) -> XBusNet.Config; 64 pixels unless said otherwise."""
    return _maker("xbusnet_small", image_size=64)


@pytest.fixture
def unet_config():
    """unet_config(name="unet_small", **changes) -> UNet.Config; 64 pixels unless said otherwise."""
    return _maker("unet_small", image_size=64)


@pytest.fixture
def hybrid_attention_config():
    """hybrid_attention_config(name="hybrid_attention_small", **changes) -> its Config; small at 64 pixels."""
    return _maker("hybrid_attention_small", image_size=64)


@pytest.fixture
def sam_config():
    """sam_config(name="sam_multitask_small", **changes) -> SamMultitask.Config; 64 pixels unless said otherwise."""
    return _maker("sam_multitask_small", image_size=64, window=3)


@pytest.fixture
def diffusion_config():
    """diffusion_config(name="vit_diffusion_small", **changes) -> VitDiffusion.Config; small at 32 pixels, 4 steps."""
    return _maker("vit_diffusion_small", image_size=32, steps=4)


@pytest.fixture
def make_batch():
    """make_batch(size=64, count=4, **fields) -> Batch of dim squares on noise, with the squares as masks."""

    def make(size=64, count=4, **fields):
        generator = torch.Generator().manual_seed(1)
        image = 0.5 + 0.1 * torch.randn(count, 3, size, size, generator=generator)
        mask = torch.zeros(count, 1, size, size)
        for i in range(count):
            start = size // 8 * (1 + i % 3)
            mask[i, :, start : start + size // 3, start : start + size // 4] = 1
        content = {
            "keys": [f"case{i}" for i in range(count)],
            "epochs": [0] * count,
            "image_BCHW": (image - 0.3 * mask).clamp(0, 1),
            "mask_BKHW": mask,
            "label_B": torch.zeros(count, dtype=torch.int64),
        }
        conditions = {
            "spatial_prompts": [SPATIAL[i % 3] for i in range(count)],
            "attribute_prompts": [ATTRIBUTES[i % 2] for i in range(count)],
            "captions": [CAPTIONS[i % 2] for i in range(count)],
        }
        given = fields.pop("conditions", {})
        return Batch(**{**content, **fields}, conditions=conditions | given)

    return make


@pytest.fixture(autouse=True)
def _seeded_on_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
