"""The contract between a model and everything else. Trainer, evaluator and grid use only this interface.

A model is one file here and one yaml in `configs/model/`. The yaml's `_target_` names the class; its other
keys override defaults of the class's `Config`. See CONTRIBUTING.md, "Add a model".
"""

from __future__ import annotations

import typing as t
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from bushpc import weight_file
from bushpc.config import ModelConfig, target_of
from bushpc.errors import WeightsError
from bushpc.sample import Batch, Losses, Prediction

# Before the names of tensors that are no part of the model's own state: <OUTSIDE><module>/<tensor>.
OUTSIDE = "outside_state/"


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

    def backbone(self) -> nn.Module | None:
        """The part below decoder and heads, which can start from pretrained weights; None: no part is.

        `train.freeze=[encoder]` and `train.layer_decay` refer to it; `bushpc weights import` looks there first.
        """
        return None

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


def all_tensors(model: Model) -> dict[str, torch.Tensor]:
    """Everything that a prediction depends on, on the CPU: the state dict, and what the model keeps out of it."""
    return {
        f"{prefix}{key}": value.detach().cpu().contiguous()
        for prefix, module in _parts(model).items()
        for key, value in module.state_dict().items()
    }


def set_tensors(model: Model, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a model some of its tensors, by their names in `all_tensors`. Raises: RuntimeError for one that doesn't fit.

    Tensors that are not named keep their values.
    """
    modules = _parts(model)
    by_module: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        prefix = name[: name.rindex("/") + 1] if name.startswith(OUTSIDE) else ""
        by_module.setdefault(prefix, {})[name.removeprefix(prefix)] = value
    for prefix, named in by_module.items():
        if prefix not in modules:
            raise RuntimeError(f"the model has no tensors {prefix}…")
        if unexpected := modules[prefix].load_state_dict(named, strict=False).unexpected_keys:
            raise RuntimeError(f"the model has no tensor {prefix}{unexpected[0]}")


def encoder_prefix(model: Model) -> str | None:
    """How the names of the backbone's tensors begin in `all_tensors`; None without a backbone."""
    encoder = model.backbone()
    if encoder is None:
        return None
    inside = (f"{name}." for name, module in model.named_modules() if module is encoder)
    outside = (prefix for prefix, module in _parts(model).items() if module is encoder)
    return next(inside, None) or next(outside, None)


def _parts(model: Model) -> dict[str, nn.Module]:
    """Prefix in `all_tensors` → module: the model itself, and what it keeps out of its state."""
    return {"": model} | {f"{OUTSIDE}{name}/": module for name, module in model.outside_state().items()}


def load_imported(model: Model, *, only_outside: bool = False) -> None:
    """Give a model the tensors of `model.weights`, if it is set.

    only_outside: those that no checkpoint holds. Raises: WeightsError if the file is missing, changed or of another
    model.
    """
    config = model.config
    if config.weights is None:
        return
    path = Path(config.weights)
    origin = weight_file.require(path, config.weights_sha256, target_of(type(model)))
    if only_outside and not origin.part.startswith(OUTSIDE) and origin.part:
        return
    tensors = weight_file.read_tensors(path)
    wanted = {name: tensor for name, tensor in tensors.items() if name.startswith(OUTSIDE) or not only_outside}
    try:
        set_tensors(model, wanted)
    except RuntimeError as error:
        raise WeightsError(
            f"{path} does not fit {type(model).__name__} with these settings: {error}. It was imported for "
            f"{origin.settings}: import its source again for these settings, or set those"
        ) from error
