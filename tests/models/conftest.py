"""Small models and batches for the model tests; sizes as in `configs/model/*_small.yaml`, or smaller."""

from pathlib import Path

import pytest
import torch
import yaml

from bushpc.models.baselines import UNet
from bushpc.models.hybrid_attention import HybridAttention
from bushpc.models.xbusnet import XBusNet
from bushpc.sample import Batch

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
SPATIAL = ["a small lesion in the upper inner quadrant of the breast", "a large lesion in the lower outer quadrant", ""]
ATTRIBUTES = ["irregular shape, indistinct margin, BI-RADS 5", "oval shape, circumscribed margin, BI-RADS 2"]
CAPTIONS = [
    "breast ultrasound image of benign tumor with homogeneous echogenicity and clear boundary",
    "breast ultrasound image of malignant tumor with heterogeneous echogenicity and unclear boundary",
]


def _config(model_class, name, changes):
    fields = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]
    del fields["_target_"]
    fields = {**fields, **changes}
    return model_class.Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


@pytest.fixture
def xbusnet_config():
    """xbusnet_config(name="xbusnet_small", **changes) -> XBusNet.Config; 64 pixels unless said otherwise."""

    def make(name="xbusnet_small", **changes):
        return _config(XBusNet, name, {"image_size": 64, **changes} if name == "xbusnet_small" else changes)

    return make


@pytest.fixture
def unet_config():
    """unet_config(name="unet_small", **changes) -> UNet.Config; 64 pixels unless said otherwise."""

    def make(name="unet_small", **changes):
        return _config(UNet, name, {"image_size": 64, **changes} if name == "unet_small" else changes)

    return make


@pytest.fixture
def hybrid_attention_config():
    """hybrid_attention_config(name="hybrid_attention_small", **changes) -> its Config; small at 64 pixels."""

    def make(name="hybrid_attention_small", **changes):
        return _config(
            HybridAttention, name, {"image_size": 64, **changes} if name == "hybrid_attention_small" else changes
        )

    return make


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
