"""The contract between a model and everything else. Trainer, evaluator and grid know this page and no model.

A model is one file here and one yaml in `configs/model/`. The yaml's `_target_` names the class; its other
keys are the fields of the class's `Config`. See CONTRIBUTING.md, "Add a model".
"""

from __future__ import annotations

import typing as t
from pathlib import Path

import torch
from torch import nn

from bushpc.config import CellConfig, ModelConfig
from bushpc.errors import ConfigError
from bushpc.sample import Batch, Losses, Prediction


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
        import timm  # here: it takes seconds, and most of those who read this page do without

        config = timm.get_pretrained_cfg(network)
        if config is None or not config.hf_hub_id:
            raise ConfigError(f"timm has no pretrained weights of '{network}'; choose another, or pretrained=false.")
        return cls(f"{network}.safetensors", config.hf_hub_id, "model.safetensors", revision)


class Model(nn.Module):
    """Base class of all models. Written as if for one device; no model calls torch.distributed.

    makes: the `Prediction` fields that `predict` fills.
    blocks: types of the modules that activation checkpointing (engine.recompute) computes again.
    prediction_fields: of `Config`, those that change what `predict` makes, and neither weights nor training.
    trainer: module whose `train` stands in for our own loop, where a package brings its own; None for all others.
    """

    Config: t.ClassVar[type[ModelConfig]]
    makes: t.ClassVar[frozenset[str]]
    blocks: t.ClassVar[tuple[type[nn.Module], ...]] = ()
    prediction_fields: t.ClassVar[frozenset[str]] = frozenset()
    trainer: t.ClassVar[str | None] = None

    def __init__(self, config: ModelConfig, weights_dir: str | None = None) -> None:
        """Build; load staged weights from `weights_dir` if `config.pretrained`. Raises: WeightsError."""
        super().__init__()
        self.config = config

    @classmethod
    def needs(cls, config: ModelConfig) -> frozenset[str]:
        """The `Batch` fields that `forward` and `predict` read with this configuration."""
        raise NotImplementedError

    @classmethod
    def check_data(cls, config: ModelConfig, mask_classes: t.Sequence[str], channels: t.Sequence[str]) -> None:
        """Refuse a dataset with mask classes or image channels that this configuration is not made for.

        Called on the login node; most models segment one class in three channels. Raises: ConfigError.
        """
        if len(mask_classes) != 1 or len(channels) != 3:
            raise ConfigError(
                f"{cls.__name__} segments one class in images of three channels; this dataset has the mask classes "
                f"{', '.join(mask_classes)} and the channels {', '.join(channels)}. Choose another dataset or model"
            )

    @classmethod
    def check_run(cls, cell: CellConfig) -> None:
        """Refuse a run with other settings that this model cannot follow. On the login node. Raises: ConfigError."""

    @classmethod
    def weight_files(cls, config: ModelConfig) -> list[WeightFile]:
        """The pretrained files that this configuration loads; empty with `pretrained=false`."""
        return []

    def outside_state(self) -> dict[str, nn.Module]:
        """Frozen modules that are kept out of `state_dict`, and so of checkpoints; an export must hold them too."""
        return {}

    def parameter_count(self) -> int:
        """All parameters, trained or frozen, those of `outside_state` included."""
        return sum(p.numel() for module in (self, *self.outside_state().values()) for p in module.parameters())

    @classmethod
    def feature_settings(cls, config: ModelConfig) -> dict[str, t.Any]:
        """What the outputs of `features` depend on besides images and the tensors of `outside_state`.

        Empty where there are none that stay the same throughout training: nothing can be cached then.
        """
        return {}

    def features(self, image_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a frozen part makes of images, name → B x …; `loader.features` has it computed once and kept.

        `forward` and `predict` read `batch.features` where there are some, and call this by themselves otherwise.
        """
        raise NotImplementedError

    def save_pretrained(self, folder: Path) -> str | None:
        """Write the model into an export's folder of a fold as another library opens it; returns how, for its card.

        None where no other library would.
        """
        return None

    def cam_layer(self) -> nn.Module | None:
        """The module whose output, B x channels x h x w, Grad-CAM maps are made of; None: there are no maps.

        Where `predict` makes several passes, it must be used in the last one.
        """
        return None

    def forward(self, batch: Batch) -> Losses:
        """The training loss. DDP and DeepSpeed hook `forward`, which is why it is computed in here."""
        raise NotImplementedError

    def predict(self, batch: Batch) -> Prediction:
        """The prediction, however many passes it takes. Called in eval mode without gradients."""
        raise NotImplementedError
