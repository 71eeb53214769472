"""The contract between a model and everything else. Trainer, evaluator and grid use only this interface.

A model is one file here and one yaml in `configs/model/`. The yaml's `_target_` names the class; its other
keys override defaults of the class's `Config`. See CONTRIBUTING.md, "Add a model".
"""

from __future__ import annotations

import typing as t
from pathlib import Path

import torch
from torch import nn

from bushpc.config import ModelConfig
from bushpc.sample import Batch, Losses, Prediction


class Model(nn.Module):
    """Base class of all models. Written as if for one device; no model calls torch.distributed.

    Config: the class of its settings, which answers everything that needs no network.
    makes: the `Prediction` fields that `predict` fills.
    trainer: the module whose `train` replaces our training loop, for packages with their own; None for all others.
    """

    Config: t.ClassVar[type[ModelConfig]]
    makes: t.ClassVar[frozenset[str]]
    trainer: t.ClassVar[str | None] = None

    def __init__(self, config: ModelConfig, weights_dir: str | None = None) -> None:
        """Build; load staged weights from `weights_dir` if `config.pretrained`. Raises: WeightsError."""
        super().__init__()
        self.config = config

    def outside_state(self) -> dict[str, nn.Module]:
        """Frozen modules that are not in `state_dict` or checkpoints; exports contain them."""
        return {}

    def parameter_count(self) -> int:
        """All parameters, trained or frozen, those of `outside_state` included."""
        return sum(p.numel() for module in (self, *self.outside_state().values()) for p in module.parameters())

    def features(self, image_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        """The outputs of a frozen part, name → B x …; with `loader.features` they are computed once and cached.

        `forward` and `predict` use `batch.features` if it is set, and call this method otherwise.
        """
        raise NotImplementedError

    def save_pretrained(self, folder: Path) -> str | None:
        """Write the model into a fold's export folder in another library's format; returns how to open it, or None.

        None: no other library reads this model.
        """
        return None

    def cam_layer(self) -> nn.Module | None:
        """The module whose output, B x channels x h x w, Grad-CAM explains; None: no maps.

        If `predict` makes several passes, the last one must use it.
        """
        return None

    def forward(self, batch: Batch) -> Losses:
        """The training loss. It is computed here because DDP and DeepSpeed hook `forward`."""
        raise NotImplementedError

    def predict(self, batch: Batch) -> Prediction:
        """The prediction, however many passes it takes. Called in eval mode without gradients."""
        raise NotImplementedError
