"""Methods that torch.compile must leave out, without importing the compiler until something is compiled.

`torch.compiler.disable` as a decorator imports torch's compiler with the model's module: 1.5 s of every submission.
"""

from __future__ import annotations

import typing as t
from collections.abc import Callable

import torch

Function = t.TypeVar("Function", bound=Callable[..., t.Any])

_methods: list[tuple[type, str, Callable[..., t.Any]]] = []


class _Noted:
    """Stands in for a method while its class is made; the class then holds the plain function."""

    def __init__(self, function: Callable[..., t.Any]) -> None:
        self.function = function

    def __set_name__(self, owner: type, name: str) -> None:
        setattr(owner, name, self.function)
        _methods.append((owner, name, self.function))


def not_compiled(method: Function) -> Function:
    """Decorator: `leave_out_of_graphs` excludes the method from compilation."""
    return t.cast(Function, _Noted(method))


def leave_out_of_graphs() -> None:
    """Exclude every method with `not_compiled`; call it before a model is compiled. Calling it again does no harm."""
    while _methods:
        owner, name, function = _methods.pop()
        setattr(owner, name, torch.compiler.disable(function))
