"""A BatchNorm with a single value per channel stops training: such settings are refused when they are composed."""

from __future__ import annotations

import pytest
import torch

from bushpc.config import compose
from bushpc.errors import ConfigError
from bushpc.sample import Batch

WORDS = ("data=phantom", "cluster=local", "model.pretrained=false", "fold=0")


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        (["model=unet_small", "model.image_size=32", "train.batch_size=1"], "train.batch_size to 2 or more"),
        (["model=efficientnet_small", "model.image_size=32", "train.batch_size=1"], "train.batch_size to 2 or more"),
        (["model=hybrid_attention_small", "train.batch_size=4", "train.accumulate=4"], "train.batch_size to 8 or more"),
        (
            [
                "model=unet_small",
                "model.image_size=32",
                "train.batch_size=4",
                "cluster.ranks_per_node=4",
                "engine=zero2",
            ],
            "shared by 4 rank.s. .* train.batch_size to 8 or more",
        ),
    ],
)
def test_one_image_in_a_part_is_refused_with_the_numbers_that_work(words, numbers):
    with pytest.raises(ConfigError, match=numbers):
        compose([*WORDS, *words])


@pytest.mark.parametrize("name", ["unet_small", "efficientnet_small", "hybrid_attention_small", "xbusnet_small"])
@pytest.mark.parametrize("size", [32, 64])
def test_as_many_images_as_a_model_asks_for_train_and_fewer_do_not(name, size):
    words = [*WORDS, f"model={name}", f"model.image_size={size}", "train.batch_size=4"]
    try:
        config = compose(words)
    except ConfigError:
        pytest.skip(f"{name} takes no images of {size} pixels")
    model = config.model_class(config.model, None).train()
    least = config.model.least_images
    assert torch.isfinite(model(batch_of(least, size, model)).total)
    if least > 1:
        with pytest.raises((ValueError, ConfigError), match=r"more than 1 value per channel|single image"):
            model(batch_of(1, size, model))


def batch_of(images: int, size: int, model) -> Batch:
    return Batch(
        keys=[str(i) for i in range(images)],
        epochs=[0] * images,
        image_BCHW=torch.rand(images, 3, size, size),
        mask_BKHW=(torch.rand(images, 1, size, size) > 0.5).to(torch.uint8),
        label_B=torch.zeros(images, dtype=torch.int64),
        conditions={kind.name: ["a small lesion"] * images for kind in model.config.conditions},
    )
