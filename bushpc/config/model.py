"""Settings that every model has, and what follows from a model's settings alone. A model's file extends them."""

from __future__ import annotations

import dataclasses
import importlib
import typing as t
from pathlib import Path

import typing_extensions as te

from bushpc import environment
from bushpc.conditions import NO_PROMPTS, Condition, Variant
from bushpc.config.augment import AugmentConfig
from bushpc.config.cluster import ClusterConfig
from bushpc.config.data import DataConfig
from bushpc.config.engine import EngineConfig
from bushpc.config.evaluate import EvaluateConfig
from bushpc.config.fields import Settings, config_class, setting
from bushpc.config.loader import LoaderConfig
from bushpc.config.read import Scalar, build
from bushpc.config.train import TrainConfig
from bushpc.errors import BushpcError, ConfigError, unknown_name


class WeightFile(t.NamedTuple):
    """A pretrained file that a model loads: staged by `bushpc weights pull`, never fetched by a job.

    name: file name below the weights folder, always `.safetensors`.
    hub_repo, hub_file, revision: where `weights pull` gets it on the Hugging Face hub; a commit where one
        is known, else a branch, whose commit of that day the pull records and `weights check` holds to.
    licence: as the library that knows the file states it; empty where it states none.
    """

    name: str
    hub_repo: str
    hub_file: str
    revision: str
    licence: str = ""

    @classmethod
    def of_timm(cls, network: str, revision: str = "main") -> WeightFile:
        """timm's own weights of a network. Raises: ConfigError when there are none."""
        import timm  # takes seconds to import

        try:
            config = timm.get_pretrained_cfg(network)
        except RuntimeError as error:  # of a tag that the network lacks
            tags = timm.list_pretrained(f"{network.partition('.')[0]}.*")
            raise ConfigError(unknown_name("weights", network, tags)) from error
        if config is None or not config.hf_hub_id:
            elsewhere = f" Its file at {config.url} is no safetensors file." if config and config.url else ""
            raise ConfigError(
                f"timm has no pretrained weights of '{network}' on the Hugging Face hub.{elsewhere} Choose another "
                "network, or set model.pretrained=false"
            )
        return cls(f"{network}.safetensors", config.hf_hub_id, "model.safetensors", revision, config.license or "")


class CellGroups(t.Protocol):
    """What a model's `check_run` may ask of a cell: the groups besides the model's."""

    @property
    def data(self) -> DataConfig: ...

    @property
    def train(self) -> TrainConfig: ...

    @property
    def augment(self) -> AugmentConfig: ...

    @property
    def evaluate(self) -> EvaluateConfig: ...

    @property
    def loader(self) -> LoaderConfig: ...

    @property
    def engine(self) -> EngineConfig: ...

    @property
    def cluster(self) -> ClusterConfig: ...


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
    weights: str | None = setting(
        None,
        "Start from this file of imported weights (`bushpc weights import`), loaded after those of model.pretrained. "
        "null loads none.",
        affects="nothing",
        since=3,
    )
    weights_sha256: str | None = setting(
        None,
        "SHA-256 of that file, for a run that requires exactly these weights; null accepts what is there, and the run "
        "records it.",
        since=3,
    )

    def __post_init__(self) -> None:
        """Refuse combinations that cannot be built. Raises: ConfigError."""

    def follow_network(self) -> te.Self:
        """With the settings that follow from the chosen network, where none are given. When a command is composed."""
        return self

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

    @property
    def size_stride(self) -> int | None:
        """Of the edges of images that the network can read; None where it reads those of image_size alone."""
        return None

    @property
    def why_no_mirror(self) -> str:
        """Why no mirror images are averaged at test time, as the end of a sentence; "" where they can be."""
        return ""

    @property
    def needs_every_label(self) -> bool:
        """Whether it cannot train on scans without a label."""
        return False

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

    def check_run(self, cell: CellGroups) -> None:
        """Refuse settings outside `model` that the model cannot follow. On the login node. Raises: ConfigError."""

    def standalone(self) -> te.Self:
        """The settings of a model whose tensors are all given: it needs no staged files and no earlier run."""
        return dataclasses.replace(self, pretrained=False, weights=None, weights_sha256=None)

    @property
    def starts_from(self) -> Path | None:
        """The folder of an exported fold whose weights the model starts from; None for all others."""
        return None

    def for_fold(self, fold: int) -> te.Self:
        """The settings for one fold: with that fold's weights, if the model starts from a cross-validation."""
        return self


def model_of(content: t.Mapping[str, t.Any]) -> tuple[type[t.Any], ModelConfig]:
    """The model's class and settings from the group `model` of a config, `_target_` included. Raises: ConfigError."""
    content = dict(content)
    target = content.pop("_target_", None)
    model_class = model_class_of(target.text if isinstance(target, Scalar) else target)
    return model_class, build(model_class.Config, content, "model.")


def target_of(model_class: type[t.Any]) -> str:
    """The `_target_` of a model's class, by which `model_class_of` finds it."""
    return f"{model_class.__module__}.{model_class.__name__}"


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
    if not hasattr(found, "makes"):
        raise ConfigError(
            f"model._target_={target} does not state what its predict returns: add `makes`, the names of the "
            f'Prediction fields that it fills, to class {name}; for a mask, makes = frozenset({{"prob_BKHW"}})'
        )
    return t.cast("type[t.Any]", found)
