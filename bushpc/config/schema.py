"""Every setting of a run: its default, unit, sentence, bounds and what it affects. The yaml files only override.

`configs/model/*.yaml` bring a paper's training protocol; the fields of a model itself are in `bushpc/models`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import math
import os
import re
import sys
import typing as t
from pathlib import Path

import typing_extensions as te
import yaml

from bushpc import environment
from bushpc.conditions import NO_PROMPTS, VARIANTS, Condition, Variant
from bushpc.config import freeze, places
from bushpc.config.augment import AugmentConfig
from bushpc.config.cluster import ClusterConfig
from bushpc.config.fields import About, Settings, cached, config_class, fields_of, group, setting
from bushpc.config.read import YAML_DUMPER, YAML_FAILS, Scalar, build, build_fields, flat, load_yaml, plain
from bushpc.errors import BushpcError, ConfigError, unknown_name
from bushpc.metrics.registry import ALWAYS, LABEL_METRICS, METRICS

# Tools that show curves, and how each is installed.
TOOLS = {"tensorboard": "tensorboard", "wandb": "'bushpc[wandb]'", "mlflow": "'bushpc[mlflow]'"}
FOLDER_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
Engine = t.Literal["ddp", "zero1", "zero2", "zero3"]
Device = t.Literal["cpu", "cuda", "auto"]
Precision = t.Literal["fp32", "bf16", "fp16", "auto"]


@config_class
class TrainConfig(Settings):
    """How the model is trained: length, batch, optimiser, checkpoints, curves."""

    prefix: t.ClassVar[str] = "train."

    iterations: int = setting(1000, "Optimiser steps per fold.", unit="steps", ge=1)
    epochs: int | None = setting(
        None,
        "Passes over a fold's training part; the number of steps then follows from its size. null uses iterations.",
        ge=1,
    )
    batch_size: int = setting(
        4, "Global batch: samples per optimiser step, over all ranks together.", unit="samples", order=True, ge=1
    )
    accumulate: int = setting(
        1,
        "Each rank processes its share of the batch in this many equal parts, one after the other, to save memory. "
        "BatchNorm sees each part separately, as it does each rank.",
        ge=1,
    )
    balance: bool = setting(
        False,
        "Draw samples of rare labels more often, so that all labels are about equally frequent in an epoch; each draw "
        "is augmented separately. false draws every sample once.",
    )
    lr: float = setting(1e-4, "Peak learning rate of AdamW.", gt=0, lt=math.inf)
    schedule: t.Literal["cosine", "constant", "plateau"] = setting(
        "cosine",
        "Learning rate after warm-up: cosine decays to 0 at the last step, constant stays, plateau drops when the loss "
        "on held-out training samples stops improving.",
    )
    plateau_factor: float = setting(0.25, "With schedule=plateau, each drop multiplies the rate by this.", gt=0, lt=1)
    plateau_patience: int = setting(
        4, "With schedule=plateau, epochs without improvement before a drop.", unit="epochs", ge=1
    )
    stop_patience: int = setting(
        0,
        "Stop after this many epochs without improvement on the held-out samples; 0 never stops early. Results come "
        "from the last step either way.",
        unit="epochs",
        ge=0,
    )
    holdout: float = setting(
        0.0,
        "Share of the training part, split by patient and label, that is held out for plateau and early stopping. "
        "Never the validation fold, which must not influence any choice.",
        ge=0,
        le=0.5,
    )
    weight_decay: float = setting(0.01, "Decoupled weight decay of AdamW; with 0 it is Adam.", ge=0)
    warmup: int = setting(0, "Steps of linear warm-up before the schedule.", unit="steps", ge=0)
    grad_clip: float = setting(1.0, "Clip gradients to this global L2 norm; 0 disables clipping.", ge=0)
    ema: float = setting(
        0.0,
        "Decay of the exponential moving average of the weights, which predictions then use; 0 disables it.",
        ge=0,
        lt=1,
    )
    save_every: int = setting(
        100,
        "Save a checkpoint every so many steps, in addition to the last step and stop signals.",
        unit="steps",
        affects="nothing",
        ge=1,
    )
    keep: int = setting(2, "Number of newest checkpoints to keep.", affects="nothing", ge=1)
    keep_every: int = setting(
        0,
        "Also keep every checkpoint whose step is a multiple of this; 0 keeps no others.",
        unit="steps",
        affects="nothing",
        ge=0,
    )
    keep_best: str | None = setting(
        None,
        "Also keep the checkpoint with the best value of this validation metric, such as dice; needs validate_every. "
        "It is for your own use: results always come from the last step. null keeps none.",
        affects="nothing",
    )
    log_every: int = setting(
        10, "Write a line to metrics.jsonl every so many steps.", unit="steps", affects="nothing", ge=1
    )
    track: tuple[str, ...] = setting(
        ("tensorboard",),
        "Tools that show the same curves: tensorboard, wandb, mlflow; [] for none. They write into the cell's folder, "
        "offline, unless WANDB_MODE or MLFLOW_TRACKING_URI say otherwise. wandb and mlflow are extras: bushpc[wandb].",
        affects="nothing",
    )
    validate_every: int = setting(
        0,
        "Measure Dice on the validation part every so many steps, for the curves; 0 never. Not used for selection.",
        unit="steps",
        affects="nothing",
        ge=0,
    )
    weights_from: str | None = setting(
        None,
        "Run folder whose folds are trained already: the cells take over its weights and only evaluate. Only settings "
        "that affect predictions or evaluation may differ from that run. null trains.",
        affects="nothing",
    )

    def __post_init__(self) -> None:
        if self.tuned != bool(self.holdout):
            raise ConfigError(
                f"train.holdout={self.holdout} with train.schedule={self.schedule} and train.stop_patience="
                f"{self.stop_patience}: training samples are held out exactly when something watches their loss; set "
                "train.holdout=0.2 with train.schedule=plateau or train.stop_patience, else train.holdout=0"
            )
        for tool in self.track:
            if tool not in TOOLS:
                raise ConfigError(unknown_name("tool in train.track", tool, TOOLS))
        if self.keep_best is not None and self.keep_best not in METRICS:
            raise ConfigError(unknown_name("train.keep_best", self.keep_best, METRICS))
        if self.keep_best is not None and not self.validate_every:
            raise ConfigError(
                f"train.keep_best={self.keep_best} needs validations during training: set train.validate_every"
            )

    @property
    def tuned(self) -> bool:
        """Whether learning rate or length follow the loss on samples that are held out of training."""
        return self.schedule == "plateau" or self.stop_patience > 0


@config_class
class PromptingConfig(Settings):
    """How text prompts are made from masks and predictions."""

    prefix: t.ClassVar[str] = "prompting."

    spatial_dropout: float = setting(
        0.3,
        "Share of training samples whose spatial prompt is left out, so that the model also learns the first pass.",
        ge=0,
        le=1,
    )
    size_quantiles: tuple[float, ...] = setting(
        (0.3333, 0.6667), "Lesion-size quantiles of the training part that separate small, medium and large."
    )
    tau: float = setting(
        0.30, "Threshold on the first-pass probability map (paper 2.7).", affects="predictions", gt=0, lt=1
    )

    def __post_init__(self) -> None:
        low_high = self.size_quantiles
        if not (len(low_high) == 2 and 0 < low_high[0] < low_high[1] < 1):
            raise ConfigError(
                f"prompting.size_quantiles={list(low_high)}: must be two rising numbers between 0 and 1, for example "
                "prompting.size_quantiles=[0.3333,0.6667]"
            )


@config_class
class EvaluateConfig(Settings):
    """How predictions are scored."""

    prefix: t.ClassVar[str] = "evaluate."

    metrics: tuple[str, ...] = setting(
        ("dice", "iou", "fpr", "fnr"),
        "Metrics of the report's tables, in this order; the first one ranks. Masks: dice, iou, fpr, fnr, sensitivity, "
        "specificity, precision, accuracy (of pixels), bce, hd95_mm, hd95_px, nsd_mm, nsd_px (millimetres only where "
        "the dataset has a pixel size; pixels are those of the original image), betti_error (components and holes). "
        "Labels, for models that predict them: label_accuracy, label_f1 (macro), label_auc (macro, one against the "
        "rest), label_ce.",
        affects="evaluation",
    )
    threshold: float = setting(
        0.5, "Pixels with at least this probability count as lesion (paper 2.4).", affects="evaluation", gt=0, lt=1
    )
    nsd_mm: float = setting(
        1.0,
        "Surfaces up to this far apart count as equal in nsd_mm.",
        unit="mm",
        affects="evaluation",
        gt=0,
        lt=math.inf,
    )
    nsd_px: float = setting(
        5.0,
        "Surfaces up to this far apart count as equal in nsd_px.",
        unit="pixels of the original image",
        affects="evaluation",
        gt=0,
        lt=math.inf,
    )
    batch_size: int = setting(8, "Images per forward pass.", unit="images", affects="nothing", ge=1)
    explain: int = setting(
        2,
        "Make Grad-CAM maps of this many images per fold, the same images for every model; 0 makes none.",
        unit="images",
        affects="nothing",
        ge=0,
    )
    external: tuple[str, ...] = setting(
        (),
        "Other datasets, by name or as folders of shards, on which every fold's model is also scored, under the "
        "headline prompt source; for example [udiat, stu]. Scans without labels only get metrics of masks.",
        affects="evaluation",
    )

    def __post_init__(self) -> None:
        names = self.external_names
        for name in names:
            if not re.fullmatch(FOLDER_NAME, name) or names.count(name) > 1:
                raise ConfigError(
                    f"evaluate.external={list(self.external)}: the last part of each path names the dataset in the "
                    "tables; it must consist of letters, digits, '.', '_' and '-', and each name may occur once"
                )
        for metric in self.metrics:
            if metric not in METRICS:
                raise ConfigError(unknown_name("metric in evaluate.metrics", metric, METRICS))
        if not len(set(self.metrics)) == len(self.metrics) > 0:
            raise ConfigError(
                f"evaluate.metrics={list(self.metrics)}: name at least one metric, and each only once; for example "
                "evaluate.metrics=[dice,iou]"
            )

    @property
    def external_names(self) -> list[str]:
        """What the datasets of `external` are called."""
        return [Path(given).name for given in self.external]


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


@config_class
class DataConfig(Settings):
    """Which dataset trains and validates."""

    prefix: t.ClassVar[str] = "data."

    name: str = setting("breast", "Name of the dataset, which is its folder below shards/.")
    root: str | None = setting(None, "Folder of its packed shards; null uses shards/<name>.", affects="nothing")
    stream: str | None = setting(
        None,
        "Read the tars as a stream instead of from data.root, which then only needs manifest and folds: a URL or a "
        "command to which the tar's name is appended, such as https://host/breast/, /mnt/breast/ or `pipe:ssh storage "
        "cat /data/breast/`. null reads data.root through the node's cache.",
        affects="nothing",
    )
    normals: bool = setting(False, "Whether normal scans, which have nothing to segment, also train and validate.")
    synthetic: str | None = setting(
        None,
        "Folder of synthetic scans (`bushpc generate`) that train in addition to the real ones and are never "
        "validated; or a folder with fold0, fold1, …, where each fold uses the scans of a generator trained on that "
        "fold's training part. null uses none.",
        affects="nothing",
    )
    synthetic_sha256: str | None = setting(
        None,
        "SHA-256 of that folder's manifest, for a run that requires exactly these scans; null accepts what is there, "
        "and each cell records it.",
        order=True,
    )
    synthetic_ratio: float | None = setting(
        None,
        "Synthetic scans per real scan of the training part, taken from the start of the folder; 0 for none. null is 1 "
        "where data.synthetic is set.",
        order=True,
        ge=0,
        lt=math.inf,
    )
    real: bool = setting(
        True,
        "Whether real scans train; false trains on synthetic scans only, as many as there would be with real ones.",
        order=True,
    )

    def __post_init__(self) -> None:
        if self.stream == "":
            raise ConfigError("data.stream='': must be a URL, a folder that ends in '/', a pipe: command, or null")
        if self.synthetic == "":
            raise ConfigError("data.synthetic='': must be a folder that `bushpc generate` wrote, or null")
        ratio = self.synthetic_ratio
        if ratio and self.synthetic is None:
            raise ConfigError(
                f"data.synthetic_ratio={ratio:g} without data.synthetic: set that to a folder that `bushpc generate` "
                "wrote"
            )
        if not self.real and not self.mixed:
            raise ConfigError(
                f"data.real=false with data.synthetic={self.synthetic or 'null'} and data.synthetic_ratio={ratio}: "
                "nothing is left to train on; set data.synthetic to a folder that `bushpc generate` wrote and the "
                "ratio above 0, or data.real=true"
            )
        if self.mixed and self.stream:
            raise ConfigError(
                "data.synthetic with data.stream: a stream delivers one dataset; read the shards from data.root "
                "instead, or set data.synthetic=null"
            )

    @property
    def folder(self) -> Path:
        """The folder with card, folds, tars and manifest."""
        return Path(self.root).expanduser().resolve() if self.root else places.home() / "shards" / self.name

    @property
    def mixed(self) -> bool:
        """Whether synthetic scans train."""
        return self.synthetic is not None and self.synthetic_ratio != 0


@config_class
class EngineConfig(Settings):
    """What runs a training step: device, precision, DDP or ZeRO."""

    prefix: t.ClassVar[str] = "engine."

    kind: Engine = setting(
        "ddp",
        "How ranks share the model. ddp: every rank holds all of it (DistributedDataParallel through Accelerate). "
        "zero1, zero2, zero3: DeepSpeed ZeRO shares out optimizer state, then gradients, then weights.",
    )
    device: Device = setting(
        "auto", "auto uses the GPU where the cluster profile has GPUs, and is settled when a command is composed."
    )
    precision: Precision = setting(
        "auto",
        "auto is bf16 on a GPU (fp16 where cluster.gpus, constraint, partition or account name one without bf16, such "
        "as v100) and fp32 on a CPU. XBusNet's paper uses automatic mixed precision without a type.",
    )
    deterministic: bool = setting(True, "Use deterministic kernels only: two runs are equal bit for bit.")
    compile: bool = setting(False, "Use torch.compile; the first step then takes minutes.")
    channels_last: bool = setting(
        False,
        "Keep images and convolution weights as NHWC, which tensor cores read faster; with ZeRO only the images.",
    )
    recompute: bool = setting(
        False,
        "Activation checkpointing: compute the model's blocks again in the backward pass instead of keeping their "
        "outputs in memory. Not together with compile.",
        affects="nothing",
    )
    hang_s: float = setting(
        1800.0,
        "A rank without progress for this long writes the stack of every thread and ends the job; 0 never does.",
        unit="s",
        affects="nothing",
        ge=0,
    )

    def __post_init__(self) -> None:
        if self.compile and self.recompute:
            raise ConfigError(
                "engine.compile=true with engine.recompute=true: torch.compile cannot trace recomputed blocks; set one "
                "of them to false"
            )


class WeightFile(t.NamedTuple):
    """A pretrained file that a model loads: staged by `bushpc weights pull`, never fetched by a job.

    name: file name below the weights folder, always `.safetensors`.
    hub_repo, hub_file, revision: where `weights pull` gets it on the Hugging Face hub; a commit where one
        is known, else a branch, whose commit of that day the pull records and `weights check` holds to.
    """

    name: str
    hub_repo: str
    hub_file: str
    revision: str

    @classmethod
    def of_timm(cls, network: str, revision: str = "main") -> WeightFile:
        """timm's own weights of a network. Raises: ConfigError when there are none."""
        import timm  # takes seconds to import

        config = timm.get_pretrained_cfg(network)
        if config is None or not config.hf_hub_id:
            raise ConfigError(f"timm has no pretrained weights of '{network}'; choose another, or pretrained=false.")
        return cls(f"{network}.safetensors", config.hf_hub_id, "model.safetensors", revision)


@config_class
class ModelConfig(Settings):
    """A model's settings, and everything that follows from settings alone; a model's own `Config` extends it.

    The login node asks this class and builds no network; large libraries are imported in the methods that need them.
    """

    prefix: t.ClassVar[str] = "model."

    image_size: int = setting(
        256, "Edge of the square images that the loader makes for this model.", unit="pixels", ge=1
    )
    pretrained: bool = setting(True, "Start from staged weights (`bushpc weights pull`); false trains from scratch.")

    def __post_init__(self) -> None:
        """Refuse combinations that cannot be built. Raises: ConfigError."""

    @property
    def title(self) -> str:
        """The model's name in messages: `XBusNet` of `XBusNetConfig`."""
        return type(self).__name__.removesuffix("Config")

    @property
    def needs(self) -> frozenset[str]:
        """The `Batch` fields that `forward` and `predict` read."""
        return frozenset({"image_BCHW", "mask_BKHW"})

    @property
    def least_images(self) -> int:
        """The fewest images of a forward pass in training: 2 where one alone gives a BatchNorm a single value."""
        return 1

    def weight_files(self) -> list[WeightFile]:
        """The pretrained files that the model loads; empty with `pretrained=false`. Raises: ConfigError."""
        return []

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The kinds that the model is conditioned on, besides the image; see `bushpc.conditions`."""
        return ()

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The ways in which the model can be evaluated, the default first."""
        return (NO_PROMPTS,)

    def reads(self, condition: str) -> bool:
        """Whether the model is conditioned on the kind with this name."""
        return any(kind.name == condition for kind in self.conditions)

    @property
    def feature_settings(self) -> dict[str, t.Any]:
        """What the outputs of `Model.features` depend on besides images and the tensors of `outside_state`.

        Empty if they change during training: then nothing can be cached.
        """
        return {}

    @property
    def blocks(self) -> tuple[type, ...]:
        """Types of the modules that activation checkpointing (engine.recompute) computes again."""
        return ()

    def check_data(self, mask_classes: t.Sequence[str], channels: t.Sequence[str]) -> None:
        """Refuse a dataset whose mask classes or image channels the model cannot take. Raises: ConfigError.

        Called on the login node. Most models segment one class in images of three channels.
        """
        if len(mask_classes) != 1 or len(channels) != 3:
            raise ConfigError(
                f"{self.title} segments one class in images of three channels; this dataset has the mask classes "
                f"{', '.join(mask_classes)} and the channels {', '.join(channels)}. Choose another dataset or model"
            )

    def check_run(self, cell: CellConfig) -> None:
        """Refuse settings outside `model` that the model cannot follow. On the login node. Raises: ConfigError."""

    def standalone(self) -> te.Self:
        """The settings of a model whose tensors are all given: it needs no staged files and no earlier run."""
        return dataclasses.replace(self, pretrained=False)

    @property
    def starts_from(self) -> Path | None:
        """The folder of an exported fold whose weights the model starts from; None for all others."""
        return None

    def for_fold(self, fold: int) -> te.Self:
        """The settings for one fold: with that fold's weights, if the model starts from a cross-validation."""
        return self


@config_class
class CellConfig(Settings):
    """One training run, fully composed. `to_dict` and `from_dict` are inverse; `hash` names what it will learn."""

    name: str | None = setting(
        None,
        "Name of the run's folder below runs_dir; null derives it from model, data and a hash of the settings.",
        affects="nothing",
    )
    runs_dir: str | None = setting(
        None,
        "Folder of all run folders, visible from every node of the cluster; null uses runs/ in the clone.",
        affects="nothing",
    )
    weights_dir: str | None = setting(
        None,
        "Folder of staged pretrained weights (`bushpc weights pull`); null uses weights/ in the clone.",
        affects="nothing",
    )
    resume_changes: tuple[str, ...] = setting(
        (),
        "Settings in which a run may differ from its own earlier submissions and checkpoints, e.g. [train.lr]; any "
        "other difference is an error. Settings that determine the order of samples cannot be named here.",
        affects="nothing",
    )
    seed: int = setting(
        0, "Seed of initialisation, order, augmentation and dropout; the same seed gives the same run.", order=True
    )
    folds: t.Literal["frozen", "published", "grouped"] = setting(
        "frozen",
        "Which folds: frozen (shards/<name>/folds.csv), published (folds_published.csv, from the paper's authors) or "
        "grouped (folds_grouped.csv, near duplicates share a fold: `bushpc shards folds data=… duplicates=group`).",
    )
    fold: int | None = setting(None, "Train only this fold; null trains every fold.")
    prompts: str = setting(
        "first_pass",
        "Source of the prompts behind the report's headline: first_pass (sees no mask), oracle (uses the ground-truth "
        "mask and is labelled so), none (no spatial prompt), or a deliberately wrong one: wrong_size and "
        "wrong_quadrant (the oracle's sentence with another size or the opposite quadrant) and shuffled_attributes "
        "(first_pass with another patient's attributes). A variant that the model "
        "lacks becomes its first one; one that reads no prompts has `none` alone.",
        affects="predictions",
    )
    also_prompts: tuple[str, ...] = setting(
        ("oracle", "none"), "Prompt sources evaluated in addition to the headline one.", affects="predictions"
    )
    model_class: type[t.Any]
    model: ModelConfig
    data: DataConfig = group(DataConfig, "Which dataset trains and validates.")
    train: TrainConfig = group(TrainConfig, "How the model is trained.")
    prompting: PromptingConfig = group(PromptingConfig, "How text prompts are made.")
    augment: AugmentConfig = group(AugmentConfig, "Random changes of training scans.")
    evaluate: EvaluateConfig = group(EvaluateConfig, "How predictions are scored.")
    loader: LoaderConfig = group(LoaderConfig, "How samples reach the model.")
    engine: EngineConfig = group(EngineConfig, "What runs a training step.")
    cluster: ClusterConfig = group(ClusterConfig, "Where and with what resources jobs run.")
    choices: dict[str, str] = group(dict, "The name chosen of each group.", affects="nothing")

    def __post_init__(self) -> None:
        if self.name is not None and not re.fullmatch(FOLDER_NAME, self.name):
            raise ConfigError(f"name={self.name!r}: a folder name of letters, digits, '.', '_' and '-' is needed")
        known = {**VARIANTS, **{variant.name: variant for variant in self.model.variants}}
        for name in (self.prompts, *self.also_prompts):
            if name not in known:
                raise ConfigError(unknown_name("prompt source", name, known))
        for key in self.resume_changes:
            if key not in self.settings:
                raise ConfigError(unknown_name("setting in resume_changes", key, self.settings))
            if key in ORDER:
                raise ConfigError(f"resume_changes=[{key}]: {way_on([key])}")
        if self.engine.recompute and not self.model.blocks:
            raise ConfigError(
                f"engine.recompute=true: {self.model_class.__name__} names no blocks that could be computed again; "
                "set engine.recompute=false"
            )
        shares = self.cluster.world_size * self.train.accumulate
        if self.train.batch_size % shares:
            raise ConfigError(
                f"train.batch_size={self.train.batch_size} cannot be shared by {self.cluster.world_size} ranks "
                f"(cluster.nodes x cluster.ranks_per_node) in train.accumulate={self.train.accumulate} parts each: "
                f"make it a multiple of {shares}"
            )
        part, least = self.train.batch_size // shares, self.model.least_images
        if part < least:
            raise ConfigError(
                f"train.batch_size={self.train.batch_size}, shared by {self.cluster.world_size} rank(s) in "
                f"train.accumulate={self.train.accumulate} part(s) each, leaves {part} image to a part, and "
                f"{self.model_class.__name__} with model.image_size={self.model.image_size} has a "
                f"BatchNorm that needs {least}: set train.batch_size to {least * shares} or more, or use fewer ranks "
                "or parts"
            )
        self._check_keep_best()
        if self.loader.features:
            self._check_features()
        if self.train.tuned and not self.data.real:
            raise ConfigError(
                f"data.real=false with train.holdout={self.train.holdout}: the held-out scans are real ones, and this "
                "model is to see none; take a schedule that follows no loss (train.schedule=cosine, "
                "train.stop_patience=0, train.holdout=0)"
            )
        if self.data.stream:
            if self.train.balance:
                raise ConfigError(
                    "train.balance=true with data.stream: a stream delivers each sample once an epoch; read the shards "
                    "from data.root instead, or set train.balance=false"
                )
            self._check_lanes()

    def _check_keep_best(self) -> None:
        """A metric that no validation has would keep no checkpoint, and nobody would hear of it."""
        best, name = self.train.keep_best, self.model_class.__name__
        if best in LABEL_METRICS and "class_prob_BL" not in self.model_class.makes:
            raise ConfigError(f"train.keep_best={best}: {name} tells no labels apart; choose a metric of masks")
        if best is not None and best not in (*ALWAYS, *LABEL_METRICS, *self.evaluate.metrics):
            raise ConfigError(
                f"train.keep_best={best}: no validation measures it; add it to evaluate.metrics, which are "
                f"{', '.join(self.evaluate.metrics)}"
            )

    def _check_features(self) -> None:
        """What is computed once must be the same whenever it is asked for."""
        name = self.model_class.__name__
        if not self.model.feature_settings:
            raise ConfigError(
                f"loader.features=true: {name} as it is configured has no frozen part whose outputs could be kept; set "
                "loader.features=false"
            )
        if self.data.stream:
            raise ConfigError("loader.features=true with data.stream: a stream is read once; set one of them")
        if self.augment.changes and not self.augment.variants:
            raise ConfigError(
                "loader.features=true with augment.variants=0: images are changed differently every time, so the "
                f"outputs of {name}'s frozen part cannot be kept. Set augment.variants to a number of fixed changes "
                "per sample, such as 4, or switch augment off, or set loader.features=false"
            )
        if self.augment.changes and self.augment.where == "device":
            raise ConfigError(
                f"loader.features=true with augment.where=device: the outputs of {name}'s frozen part are computed of "
                "scans that the loader has changed; set augment.where=workers"
            )

    def _check_lanes(self) -> None:
        """A lane belongs to one rank, and gives equally many samples to every step."""
        ranks, batch_size, lanes = self.cluster.world_size, self.train.batch_size, self.loader.lanes
        if lanes % ranks or batch_size % lanes:
            valid = [str(count) for count in range(ranks, batch_size + 1, ranks) if batch_size % count == 0]
            raise ConfigError(
                f"loader.lanes={lanes} with data.stream: the {ranks} rank(s) must divide it and it must divide "
                f"train.batch_size={batch_size}; here that allows {', '.join(valid)}"
            )

    @property
    def weights_folder(self) -> str:
        """`weights_dir` as composition settled it."""
        assert self.weights_dir is not None, "composition sets it"
        return self.weights_dir

    @property
    def folders(self) -> list[str]:
        """Every folder outside the run's that training and evaluation read or write."""
        stream = self.data.stream if self.data.stream and self.data.stream.startswith("/") else None
        given = (str(self.data.folder), stream, self.data.synthetic, self.weights_dir, self.train.weights_from)
        caches = (*(self.loader.cache_dir or "").split(os.pathsep), self.loader.features_dir)
        return [folder for folder in (*given, *caches, *self.evaluate.external) if folder]

    @property
    def run_dir(self) -> Path:
        """The run's folder, once dispatch has named the run."""
        assert self.runs_dir is not None, "composition sets it"
        assert self.name is not None, "dispatch sets it"
        return Path(self.runs_dir) / self.name

    @property
    def variants(self) -> list[Variant]:
        """The model's evaluation variants that `prompts` and `also_prompts` ask for, headline first.

        A variant that the model doesn't have becomes its first one: a model that reads no prompts only has `none`.
        """
        own = {variant.name: variant for variant in self.model.variants}
        asked = [own.get(name, self.model.variants[0]) for name in (self.prompts, *self.also_prompts)]
        return list({variant.name: variant for variant in asked}.values())

    @functools.cached_property
    def hash(self) -> str:
        """12 hex digits over everything that determines the result."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def settings(self) -> dict[str, t.Any]:
        """Every setting that determines the result, as `train.lr` → value."""
        kinds = self._known
        groups = {name: value for name, value in self._plain.items() if self.about(name).affects != "nothing"}
        hashed = {key: value for key, value in flat(groups).items() if is_hashed(kinds.get(key), value)}
        # A stream's order depends on its lanes, not on where it comes from; without a stream there are none.
        hashed["loader.lanes"] = self.loader.lanes if self.data.stream else None
        if not self.data.mixed:
            hashed |= {"data.synthetic_sha256": None, "data.synthetic_ratio": None}
        hashed["evaluate.external"] = self.evaluate.external_names  # wherever they lie
        if not self.augment.changes:  # a cell without augmentation is what it was before there were two methods
            hashed.pop("augment.method", None)
        # Where epochs are counted, each fold's number of steps follows from them.
        return hashed | ({"train.iterations": None} if self.train.epochs else {})

    @property
    def _known(self) -> dict[str, tuple[About, t.Any]]:
        return {**kinds(type(self)), **kinds(type(self.model))}

    @property
    def training_hash(self) -> str:
        """As `hash`, over what the trained weights depend on: cells in which it is the same may share a training."""
        of_training = {key: value for key, value in self.settings.items() if not self._is_of_prediction(key)}
        return hashlib.sha256(json.dumps(of_training, sort_keys=True).encode()).hexdigest()[:12]

    def unlike(self, trained: t.Mapping[str, t.Any]) -> list[str]:
        """In what this cell's training differs from one with these `settings`: `train.lr: 0.0001 → 0.0003` each."""
        return [line for line in _changes(trained, self.settings) if not self._is_of_prediction(line.partition(":")[0])]

    def _is_of_prediction(self, key: str) -> bool:
        about = self._known[key][0] if key in self._known else None
        return about is not None and about.affects in ("predictions", "evaluation")

    @functools.cached_property
    def _plain(self) -> dict[str, t.Any]:
        """As `to_dict`, made once; nobody changes it."""
        return self.to_dict()

    def to_dict(self) -> dict[str, t.Any]:
        """Plain data in the layout of the yaml files."""
        out = plain({f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "model_class"})
        out["model"] = {"_target_": f"{self.model_class.__module__}.{self.model_class.__name__}", **out["model"]}
        return out

    def to_yaml(self) -> str:
        """The frozen `config.yaml` of a run directory."""
        content = {**freeze.CONFIG.stamp(), **self._plain}
        return "".join(_group_text(json.dumps({key: value})) for key, value in content.items())

    @classmethod
    def from_dict(cls, content: t.Mapping[str, t.Any]) -> CellConfig:
        """Build and check. Raises: ConfigError for an unknown key, a wrong type or an impossible combination."""
        if not isinstance(content, t.Mapping) or not isinstance(content.get("model", {}), t.Mapping):
            raise ConfigError("expected a group of settings, and in it another one named `model`")
        content = freeze.CONFIG.read(content)
        model_class, model = model_of(content.pop("model", {}))
        return cls(
            model_class=model_class, model=model, **build_fields(cls, content, "", skip=("model_class", "model"))
        )

    @classmethod
    def load(cls, path: Path) -> CellConfig:
        """Read a frozen `config.yaml`. Raises: ConfigError also where it is missing or damaged."""
        try:
            content = load_yaml(path.read_text())
        except YAML_FAILS as error:
            raise ConfigError(
                f"{path} cannot be read ({type(error).__name__}: {error}). It was written when the run was submitted: "
                "move it away and submit again"
            ) from error
        return cls.from_dict(content)


@functools.lru_cache(maxsize=1024)
def _group_text(group: str) -> str:
    """One group of settings, given as JSON, as YAML: a thousand cells of a grid share most of their groups."""
    return yaml.dump(json.loads(group), Dumper=YAML_DUMPER, sort_keys=False)


def model_of(content: t.Mapping[str, t.Any]) -> tuple[type[t.Any], ModelConfig]:
    """The model's class and settings from the group `model` of a config, `_target_` included. Raises: ConfigError."""
    content = dict(content)
    target = content.pop("_target_", None)
    model_class = model_class_of(target.text if isinstance(target, Scalar) else target)
    return model_class, build(model_class.Config, content, "model.")


def load_frozen(path: Path, run_dir: Path, command: str) -> CellConfig:
    """A frozen `config.yaml` of a run. command: what else goes on with that run, by the code that lies in it.

    Raises: ConfigError with the command to use where another version of bushpc wrote it.
    """
    try:
        return CellConfig.load(path)
    except ConfigError as error:
        codes = sorted((run_dir / "code").glob("*"), key=lambda code: code.stat().st_mtime)
        # Not by PYTHONPATH: `python -m` looks into the current folder first, which may be a clone.
        way_on = f"(cd {codes[-1]} && {sys.executable} -m bushpc.cli {command})" if codes else "none"
        raise ConfigError(
            f"{path} is no config of this version of bushpc ({error}). The version that wrote it continues the run: "
            f"{way_on}. Or start again under another name=…"
        ) from error


def differences(ours: CellConfig, theirs: CellConfig) -> list[str]:
    """Settings that determine the result and differ, one line each: `train.lr: 0.0001 → 0.0003`.

    Those that `theirs.resume_changes` names may differ.
    """
    changed = _changes(ours.settings, theirs.settings)
    return [line for line in changed if line.partition(":")[0] not in theirs.resume_changes]


def _changes(then: t.Mapping[str, t.Any], now: t.Mapping[str, t.Any]) -> list[str]:
    changed = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    return [f"{key}: {then.get(key)} → {now.get(key)}" for key in changed]


def way_on(names: t.Sequence[str]) -> str:
    """What to do about settings in which a run differs from its earlier submission or checkpoint."""
    if order := [name for name in names if name in ORDER]:
        return (
            f"which samples a step takes follows from {', '.join(order)}, so a run that went on would skip some and "
            "repeat others: choose another name=… and start again"
        )
    return f"choose another name=…, or go on with the new settings: resume_changes=[{','.join(names)}]"


def is_hashed(kind: tuple[About, t.Any] | None, value: t.Any) -> bool:
    """Whether a setting is part of a cell's hash. One of a later format is not while it has its default."""
    about, default = kind or (About(sentence=""), None)
    return about.affects != "nothing" and (about.since == 1 or value != plain(default))


def field_of(cls: type[Settings], key: str, model: type[Settings] | None = None) -> tuple[type[Settings], str] | None:
    """The class and the name of the field that `train.lr` is; None if there is none. model: what `model.` means."""
    name, _, rest = key.partition(".")
    if name not in fields_of(cls):
        return None
    inner = model if name == "model" and model else fields_of(cls)[name].annotation
    if rest and isinstance(inner, type) and issubclass(inner, Settings):
        return field_of(inner, rest)
    return cls, name


@cached
def kinds(cls: type[Settings], prefix: str | None = None) -> dict[str, tuple[About, t.Any]]:
    """`train.lr` → what is known of it and its default, for a config class and those that it holds."""
    prefix = cls.prefix if prefix is None else prefix
    found: dict[str, tuple[About, t.Any]] = {}
    for name, info in fields_of(cls).items():
        inner = info.annotation
        if name in ("model_class", "choices"):  # what the groups' names stand for, no settings
            continue
        if isinstance(inner, type) and issubclass(inner, Settings):
            found |= {} if inner is ModelConfig else kinds(inner, f"{prefix}{name}.")
            continue
        default = None if info.is_required() else cls.default(name)
        found[prefix + name] = cls.about(name), default
        if isinstance(default, dict):
            found |= {f"{prefix}{name}.{key}": (cls.about(name), value) for key, value in default.items()}
    return found


def model_class_of(target: t.Any) -> type[t.Any]:
    if not isinstance(target, str) or not target.startswith("bushpc.models."):
        raise ConfigError(f"model._target_={target}: must name a class below bushpc.models, see configs/model")
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, OSError, MemoryError) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if isinstance(error, AttributeError | ValueError) or (missing and module.startswith(missing)):
            raise ConfigError(f"model._target_={target} cannot be imported: {error}") from error
        # Not the setting's fault: a library is missing or damaged, or the shell has no room for it.
        advice = environment.address_space_note() or "`bushpc doctor` checks the installation"
        raise BushpcError(
            f"import error while {module} was loaded: {type(error).__name__}: {error}. {advice}"
        ) from error
    if not isinstance(found, type) or not hasattr(found, "Config"):
        raise ConfigError(f"model._target_={target} is no model, see configs/model")
    return t.cast("type[t.Any]", found)


# Which samples a step sees follows from these, and a checkpoint belongs to a step: no run may resume with others.
ORDER = tuple(key for key, (about, _) in kinds(CellConfig).items() if about.order)
