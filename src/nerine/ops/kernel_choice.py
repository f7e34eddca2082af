"""Kernels that may stand in for operations: none, unless whoever calls asks for them.

The choice belongs to a context of execution and not to the process, so that networks in other threads, and others in
the same one, are not touched. What a kernel cannot take is left to the operation, which computes the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from nerine.errors import OptionError, nearest
from nerine.ops.triton import kernels

__all__ = ["PLACES", "Choice", "chosen", "standing_in", "using"]

PLACES = ("cayley", "low_rank_row_norm", "rescale", "stretch", "turn_channels")  # operations that ask `standing_in`
Choice = Mapping[str, tuple[Callable[..., str], Callable[..., Tensor]]]  # by name: what refuses, and the kernel

_CHOICE: ContextVar[Choice | None] = ContextVar("nerine kernels", default=None)


def chosen(names: Iterable[str]) -> Choice:
    """The kernels of these names.

    Raises:
        OptionError: there is none of that name that stands in for an operation.
        MissingExtra: triton is not installed.
    """
    known, found = kernels(), {}
    for name in names:
        if name not in PLACES:
            raise OptionError(f"no kernel called {name!r} stands in for an operation. {nearest(name, PLACES)}")
        found[name] = (known[name].unsuited, known[name].function)
    return found


@contextlib.contextmanager
def using(choice: Choice) -> Iterator[None]:
    """The kernels of `choice`, and no others, for the length of a `with` block."""
    before = _CHOICE.set(choice)
    try:
        yield
    finally:
        _CHOICE.reset(before)


def standing_in(name: str, *arguments: Any) -> Callable[..., Tensor] | None:
    """The kernel for these arguments of the operation `name`; None where it is not wanted, or cannot take them."""
    choice = None if torch.compiler.is_compiling() else _CHOICE.get()
    found = None if choice is None else choice.get(name)
    return None if found is None or found[0](*arguments) else found[1]
