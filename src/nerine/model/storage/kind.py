"""What a storage is: one way in which a base keeps a weight. Knows no package and no layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["Storage", "is_named", "never"]

Is = Callable[[nn.Module, Tensor], bool]
Read = Callable[[nn.Module, Tensor], Tensor]
Write = Callable[[nn.Module, Tensor, Tensor], nn.Parameter]


def never(module: nn.Module, stored: Tensor) -> bool:
    """No weight at all."""
    return False


@dataclass(frozen=True)
class Storage:
    """One way to store a weight.

    `read(module, stored)` gives its values in the module's own form (`[out, in]` for a Linear) in a format that
    computes, on the device of the stored tensor. `write(module, stored, weight)` gives a new parameter that stores
    other values in the same way, rounded to it; the old one keeps its values, so that it can be put back. Where `write`
    is None, `refusal` says why such a weight cannot be merged into; a `write` that cannot take these values raises
    `MergeError` without naming the layer. `rounds_input` says whether the layer rounds its input as well: then another
    input is rounded in another way, and adapters act beside the layer only. With `in_place` `write` changes the
    parameter itself, of which a copy is kept to put back.
    """

    name: str
    is_it: Is
    read: Read
    write: Write | None = None
    refusal: str = ""
    rounds_input: Is = never
    in_place: bool = False


def is_named(thing: object, *names: str) -> bool:
    """Whether the class of `thing`, or one that it inherits from, has one of these names."""
    return any(kind.__name__ in names for kind in type(thing).__mro__)
