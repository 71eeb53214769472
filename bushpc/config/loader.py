"""Settings of the way from shards to the model: workers, caches, lanes. Results do not depend on them."""

from __future__ import annotations

import typing as t

from bushpc.config.fields import Settings, config_class, setting


@config_class
class LoaderConfig(Settings):
    """How samples reach the model; results do not depend on it."""

    prefix: t.ClassVar[str] = "loader."

    workers: int = setting(
        0,
        "Worker processes per rank that augment, or that read ahead in streams; 0 works in the training process. "
        "Decoded images that need no change are copied in the training process either way.",
        affects="nothing",
        ge=0,
    )
    cache_dir: str | None = setting(
        None,
        "Folder for decoded images, shared by all ranks and cells of a node; null uses the node's shared memory if it "
        "has room, else its temporary folder.",
        affects="nothing",
    )
    cache_gb: float = setting(
        50.0,
        "Space that decoded images of all datasets may take on a node; unused caches are deleted above it.",
        unit="GB",
        affects="nothing",
        gt=0,
    )
    features: bool = setting(
        False,
        "Compute the outputs of a model's frozen part once and keep them for all epochs, folds and cells; false "
        "computes them in every step. With augmentation, set augment.variants.",
        affects="nothing",
    )
    features_dir: str | None = setting(
        None,
        "Folder for those outputs, visible from every node; null uses features/ next to the shards. Nothing in it is "
        "ever deleted.",
        affects="nothing",
    )
    lanes: int = setting(
        4,
        "With data.stream, shards are read in this many parallel lanes, whatever the number of ranks. The number of "
        "ranks must divide it, and it must divide train.batch_size.",
        order=True,
        ge=1,
    )
