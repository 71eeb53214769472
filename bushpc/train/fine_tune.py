"""Fine-tuning: which parameters stay frozen, and what share of the learning rate each layer gets.

model, train.freeze ─freeze→ requires_grad off; model, train.layer_decay ─lr_scales→ optim.adamw
"""

from __future__ import annotations

import fnmatch
import typing as t
from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bushpc.config.fine_tune import ENCODER
from bushpc.errors import ConfigError
from bushpc.models.base import OUTSIDE, Model, encoder_prefix


def freeze(model: Model, patterns: Sequence[str]) -> None:
    """Switch requires_grad off for what the patterns name.

    Raises: ConfigError for a pattern that names nothing, for `encoder` where there is none to train, and if nothing is
    left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        named = _named(model, pattern, parameters)
        for name in named:
            parameters[name].requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError(f"train.freeze={list(patterns)} leaves {type(model).__name__} nothing to train")


def _named(model: Model, pattern: str, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    if pattern == ENCODER:
        prefix = _trained_encoder(model, "train.freeze=[encoder]")
        head = _classifier(model.backbone())
        return [name for name, each in parameters.items() if name.startswith(prefix) and each not in head]
    found = fnmatch.filter(parameters, pattern)
    if not found:
        examples = list(parameters)[:: max(1, len(parameters) // 4)]
        raise ConfigError(
            f"train.freeze: '{pattern}' names no parameter of {type(model).__name__}; * stands for any text. Names "
            f"are such as {', '.join(examples)}"
        )
    return found


def _classifier(encoder: nn.Module | None) -> set[nn.Parameter]:
    """The parameters of the classifier of one of timm's networks, which is no part of the encoder."""
    get: t.Any = getattr(encoder, "get_classifier", None)
    head = get() if get else None
    return set(head.parameters()) if isinstance(head, nn.Module) else set()


def frozen_norms(model: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """The BatchNorms whose parameters `freeze` froze: in training, too, they keep the statistics they came with."""
    if not patterns:
        return []
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [norm for norm in norms if not any(parameter.requires_grad for parameter in norm.parameters())]


def _trained_encoder(model: Model, what: str) -> str:
    """How the names of the encoder's parameters begin. what: the setting that needs one. Raises: ConfigError."""
    prefix = encoder_prefix(model)
    if prefix is None or prefix.startswith(OUTSIDE):
        raise ConfigError(
            f"{what}: {type(model).__name__} as it is configured has no encoder that is trained. Name parameters by "
            "patterns in train.freeze, and leave train.layer_decay at 1"
        )
    return prefix


def lr_scales(model: Model, decay: float) -> dict[str, float]:
    """The share of the learning rate of every parameter: decay ** (layers above its own).

    The encoder's layers are counted as timm counts them (`param_groups_layer_decay`); all else is one layer above them.
    Raises: ConfigError for a model without an encoder.
    """
    prefix = _trained_encoder(model, f"train.layer_decay={decay:g}")
    encoder = model.backbone()
    assert encoder is not None
    layers = {f"{prefix}{name}": layer for name, layer in layers_of(encoder).items()}
    names = [name for name, _ in model.named_parameters()]
    top = max(layers.values()) + any(name not in layers for name in names)
    return {name: decay ** (top - layers.get(name, top)) for name in names}


def layers_of(encoder: nn.Module) -> dict[str, int]:
    """Parameter → layer, from 0 at the stem. Every block is a layer; what follows the last block belongs to it."""
    if (inner := _only_child(encoder)) is not None:
        name, child = inner
        return {f"{name}.{rest}": layer for rest, layer in layers_of(child).items()}
    if hasattr(encoder, "group_matcher"):
        from timm.models import group_parameters

        matcher: t.Any = encoder.group_matcher
        return dict(group_parameters(encoder, matcher(coarse=False), reverse=True))
    layers: dict[str, int] = {}
    numbers: dict[str, int] = {}
    modules = dict(encoder.named_modules())
    for name, _ in encoder.named_parameters():
        block = _block(name, modules)
        if block:
            numbers.setdefault(block, len(numbers) + 1)
        layers[name] = numbers[block] if block else len(numbers)
    return layers


def _only_child(module: nn.Module) -> tuple[str, nn.Module] | None:
    """The child of a wrapper that holds all of its parameters."""
    if hasattr(module, "group_matcher") or next(module.parameters(recurse=False), None) is not None:
        return None
    children = [(name, child) for name, child in module.named_children() if any(True for _ in child.parameters())]
    return children[0] if len(children) == 1 else None


def _block(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The block that a parameter belongs to, as `layer1.0`; "" outside of blocks.

    A block is a module with parts that has a number, inside as many numbered modules or lists of modules as there are.
    """
    block, parts = "", name.split(".")[:-1]
    for count in range(1, len(parts) + 1):
        path = ".".join(parts[:count])
        if not _has_parts(modules[path]):
            break
        if parts[count - 1][-1].isdigit() and not _is_one_step(modules[path]):
            block = path
        elif block and not _lists_blocks(modules[path]):
            break
    return block


def _has_parts(module: nn.Module) -> bool:
    return any(True for child in module.children() for _ in child.parameters())


def _is_one_step(module: nn.Module) -> bool:
    """Whether a module is a bare sequence of layers, such as a stem of three convolutions."""
    return type(module) is nn.Sequential and not any(map(_has_parts, module.children()))


def _lists_blocks(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential) and all(map(_has_parts, module.children()))
