"""Builds a network without its weights to see, on the login node, whether it can be built and what it makes.

Shapes are computed on torch's meta device: no memory, no arithmetic, and no random number of the run is drawn.
"""

from __future__ import annotations

import collections
import contextlib
import typing as t
from collections.abc import Callable, Iterator

import torch
from torch import nn

from bushpc.errors import ConfigError

ONE_VALUE = "more than 1 "  # of torch's refusal to normalise a single value


class Found(t.NamedTuple):
    """least_images: the fewest images of a training step. blocks: the types of which the network repeats modules."""

    least_images: int
    blocks: tuple[type[nn.Module], ...]


def probe(build: Callable[[], nn.Module], what: str, image_size: int, advice: str = "") -> Found:
    """What a network is like that makes one mask from one image of `image_size` pixels.

    what: the network in messages. advice: what else to choose, for their end. Raises: ConfigError with the library's
    words if it cannot be built, cannot take the image, or makes a mask of another size.
    """
    for device in ("meta", "cpu"):  # few networks compute while they are built, which only the CPU does
        try:
            return _probe(build, what, image_size, device)
        except ConfigError:
            raise
        except Exception as error:  # libraries raise anything from AttributeError to AssertionError here
            if device == "meta" and "meta" in str(error).lower():
                continue
            raise ConfigError(
                f"{what} cannot take images of {image_size} pixels, or each other: {_short(error)}. {advice}".rstrip()
            ) from error
    raise AssertionError("the CPU either builds or refuses")


def _probe(build: Callable[[], nn.Module], what: str, image_size: int, device: str) -> Found:
    with _apart(device):
        network = build()
        least = next((count for count in (1, 2) if _trains(network, count, image_size)), None)
        if least is None:
            raise ConfigError(
                f"{what} has a layer that normalises a single value with images of {image_size} pixels: make "
                "model.image_size larger"
            )
        mask = network.eval()(torch.empty(1, 3, image_size, image_size))
    if mask.shape != (1, 1, image_size, image_size):
        raise ConfigError(
            f"{what} makes a mask of {' x '.join(map(str, mask.shape[2:]))} pixels from an image of {image_size} x "
            f"{image_size}: choose another depth or architecture"
        )
    return Found(least, _repeated(network))


def _repeated(network: nn.Module) -> tuple[type[nn.Module], ...]:
    """The types, none of torch's own, of which some sequence in the network holds several: its blocks."""
    found: dict[type[nn.Module], None] = {}
    for module in network.modules():
        if type(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
            counted = collections.Counter(map(type, module.children()))
            found |= {
                kind: None
                for kind, count in counted.items()
                if count > 1 and not kind.__module__.startswith("torch.nn")
            }
    return tuple(found)


def _trains(network: nn.Module, images: int, image_size: int) -> bool:
    try:
        network.train()(torch.empty(images, 3, image_size, image_size))
    except ValueError as error:
        if ONE_VALUE in str(error):
            return False
        raise
    return True


@contextlib.contextmanager
def _apart(device: str) -> Iterator[None]:
    """On this device, without gradients, and without a trace in the run's random numbers."""
    with torch.random.fork_rng(devices=[]), torch.device(device), torch.no_grad():
        yield


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300].rstrip(". ")
