"""`bushpc weights import`: weights of any origin → a file that a model starts from (`model.weights=FILE`).

sources.open_source ─match→ tensors under the model's own names → FILE, written whole or not at all
"""

from __future__ import annotations

import dataclasses
import json
import sys
import typing as t
from pathlib import Path

import torch
from torch.nn import functional as F

from bushpc.config import CellConfig, target_of
from bushpc.convert.match import Match, match, prefix_tokens
from bushpc.convert.sources import Source, Tensors
from bushpc.errors import ConfigError, WeightsError, first_of
from bushpc.files import write_atomically
from bushpc.models.base import Model, all_tensors, encoder_prefix
from bushpc.weight_file import Origin

MOST_SHOWN = 6


def convert(source: Source, cell: CellConfig, out: Path, *, least: float, licence: str | None) -> Origin:
    """Write the file; returns what its header states.

    cell: whose model it is for. least: share of the file, and of the part of the model, below which nothing is written.
    licence: of the weights, instead of what the source states. Raises: WeightsError, ConfigError.
    """
    if out.suffix != ".safetensors":
        raise ConfigError(f"out={out}: must end in .safetensors, for example out={out.with_suffix('.safetensors')}")
    if not 0 < least <= 1:
        raise ConfigError(f"least_share={least:g}: must be above 0 and at most 1; the default is 0.8")
    model = bare_model(cell)
    targets = all_tensors(model)
    tensors, found = _best_match(source.tensors, targets, model, least)
    if found.share < least:
        raise WeightsError(_too_little(source, cell, found, least))
    made = {name: _fitted(name, tensors[of], targets[name]) for name, of in found.source_of.items()}
    origin = _noted(source.origin, cell, found, licence)
    _write(out, made, origin)
    return origin


def bare_model(cell: CellConfig) -> Model:
    """The cell's model without any weights of others."""
    with torch.random.fork_rng(devices=[]):
        return t.cast("Model", cell.model_class(cell.model.standalone()))


def _best_match(given: Tensors, targets: Tensors, model: Model, least: float) -> tuple[Tensors, Match]:
    """The match that places most, of the names as they are and as timm's networks rename those of other projects."""
    found = []
    wanted = {name: tuple(tensor.shape) for name, tensor in targets.items()}
    for tensors in (given, *_as_timm_names_them(given, model)):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        found.append((tensors, match(shapes, wanted, encoder=encoder_prefix(model) or "", least=least)))
    return max(found, key=lambda each: (each[1].share, each[1].how != "order"))


def _as_timm_names_them(given: Tensors, model: Model) -> list[Tensors]:
    """The tensors through the filters that timm has for a network's other implementations (SAM, DINOv2, …)."""
    found = []
    outermost = [model, *model.outside_state().values()]
    for module in {type(each): each for net in outermost for each in net.modules()}.values():
        package = type(module).__module__
        rename = getattr(sys.modules[package], "checkpoint_filter_fn", None)
        if package.startswith("timm.models.") and rename and hasattr(module, "forward_features"):
            try:
                renamed = rename(dict(given), module)
            except Exception:  # of weights that the filter isn't for, it may raise anything
                continue
            if renamed.keys() != given.keys():
                tensors = {name: value for name, value in renamed.items() if isinstance(value, torch.Tensor)}
                found.append(tensors | _left_out(given, tensors))
    return found


def _left_out(given: Tensors, renamed: Tensors) -> Tensors:
    """The parts of a file that a filter dropped whole, such as SAM's mask_decoder: they count as unused."""
    places = {value.data_ptr() for value in renamed.values()}
    kept = {name.partition(".")[0] for name, value in given.items() if name in renamed or value.data_ptr() in places}
    return {name: value for name, value in given.items() if name.partition(".")[0] not in kept}


def _fitted(name: str, given: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """A tensor in the model's shape and type; see `match.reshaping`."""
    value = given
    if given.shape != own.shape:
        last = name.rpartition(".")[2].rpartition("/")[2]
        value = given.float()
        if last == "pos_embed":
            value = _positions(value, own.shape)
        elif last.startswith("rel_pos_"):
            value = F.interpolate(value.T[None], size=own.shape[0], mode="linear")[0].T
        else:
            from timm.models import adapt_input_conv

            value = adapt_input_conv(own.shape[1], value) if own.shape[1] == 1 else value.repeat(1, 3, 1, 1) / 3
    return value.to(own.dtype).contiguous().clone()


def _positions(value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    from timm.layers.pos_embed import resample_abs_pos_embed, resample_abs_pos_embed_nhwc

    if value.ndim == 4:
        return resample_abs_pos_embed_nhwc(value, list(shape[1:3]))
    tokens = prefix_tokens(value.shape[1], shape[1])
    assert tokens is not None, "match allows no other"
    edge = round((shape[1] - tokens) ** 0.5)
    return resample_abs_pos_embed(value, [edge, edge], num_prefix_tokens=tokens)


def _noted(origin: Origin, cell: CellConfig, found: Match, licence: str | None) -> Origin:
    return dataclasses.replace(
        origin,
        licence=licence or origin.licence,
        target=target_of(cell.model_class),
        settings=json.loads(json.dumps(dataclasses.asdict(cell.model.standalone()))),
        how=found.how,
        strip=found.strip,
        add=found.add,
        part=found.part,
        matched=len(found.source_of),
        share_of_file=round(found.share_of_file, 6),
        share_of_part=round(found.share_of_part, 6),
        reshaped=found.reshaped,
        unused=found.unused,
        missing=found.missing,
    )


def _write(out: Path, tensors: Tensors, origin: Origin) -> None:
    from safetensors.torch import save

    content = save(tensors, metadata=origin.to_metadata())
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        if out.exists() and out.read_bytes() != content:  # runs may depend on it
            raise WeightsError(f"{out} exists and holds something else: choose another out=, or delete it")
        write_atomically(out, content)
    except OSError as error:
        raise WeightsError(f"{out} could not be written ({error}); nothing was left there") from error


def _too_little(source: Source, cell: CellConfig, found: Match, least: float) -> str:
    parts = list(dict.fromkeys(name.partition(".")[0] for name in source.tensors))
    unused, empty, valid = (first_of(names, MOST_SHOWN) for names in (found.unused, found.missing, parts))
    placed = (
        f"{len(found.source_of)} of its {len(source.tensors)} tensors fit: {found.share_of_file:.0%} of its numbers, "
        f"and they fill {found.share_of_part:.0%} of {found.part.rstrip('./') or 'the model'}"
        if found.source_of
        else f"none of its {len(source.tensors)} tensors fits"
    )
    return (
        f"{source.origin.name} does not look like weights of {cell.model_class.__name__} with these settings: "
        f"{placed}; least_share={least:g} is needed, and nothing was written. Unused: {unused}. Empty: "
        f"{empty}. Set model.… to the network that the weights are of, take a part of the file (part=, one of "
        f"{valid}), or lower least_share"
    )
