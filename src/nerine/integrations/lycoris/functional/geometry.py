"""LyCORIS's `extra_args` of a convolution (stride, padding, dilation, groups) as a site, and one call of that layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nerine.algorithms.base import Call
from nerine.errors import OptionError, nearest
from nerine.site import Site

__all__ = ["call_of"]

_KNOWN = ("stride", "padding", "dilation", "groups")


def call_of(x: Tensor, shape: tuple[int, ...], extra_args: Mapping[str, Any], delta: Any) -> Call:
    """The call of a layer whose weight has `shape` `[out, in/groups, *k]`; `delta` makes a weight for who asks for it.

    Raises:
        OptionError: an argument that convolutions do not have, or any for a linear layer.
    """
    return Call(_site(shape, extra_args), x, x, None, delta)


def _site(shape: tuple[int, ...], extra_args: Mapping[str, Any]) -> Site:
    for name in extra_args:
        if name not in _KNOWN:
            raise OptionError(f"extra_args: there is no argument {name!r}. {nearest(name, _KNOWN)}")
    kernel = shape[2:]
    if not kernel:
        if extra_args:
            raise OptionError(f"extra_args: a linear layer has none, got {', '.join(extra_args)}")
        return Site("linear", shape)
    stride, dilation = (_each(extra_args.get(name, 1), len(kernel)) for name in ("stride", "dilation"))
    padding: Any = extra_args.get("padding", 0)
    border: tuple[int, ...] = ()
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise OptionError(f'extra_args: padding: expected numbers, "same" or "valid", got {padding!r}')
        if padding == "same":
            border = _border(kernel, dilation)
        padding = 0
    return Site("conv", shape, stride, _each(padding, len(kernel)), dilation, int(extra_args.get("groups", 1)), border)


def _each(value: Any, count: int) -> tuple[int, ...]:
    """A number for each axis of the kernel."""
    return tuple(value) if isinstance(value, tuple | list) and len(value) > 1 else _repeated(value, count)


def _repeated(value: Any, count: int) -> tuple[int, ...]:
    return (int(value[0] if isinstance(value, tuple | list) else value),) * count


def _border(kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
    """What padding="same" adds before and after each axis, the last axis first."""
    sides: list[int] = []
    for size, step in reversed(list(zip(kernel, dilation, strict=True))):
        total = step * (size - 1)
        sides += [total // 2, total - total // 2]
    return tuple(sides)
