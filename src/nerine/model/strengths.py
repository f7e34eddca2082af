"""Strengths by layer: one number, or numbers by pattern, as in {"unet": 0.8, "unet.up_blocks": 1.0}.

Patterns are those of rules. They are read as if each were set after the one before: where several match a layer, the
last one counts, so that the general one stands before the special one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from nerine.errors import OptionError, TargetError, nearest
from nerine.model.adapter import check_strength
from nerine.model.patterns import Match, lineage, matches

__all__ = ["Strength", "check_strengths", "strengths_at"]

Strength = float | Mapping[Match, float]


def check_strengths(value: Strength) -> None:
    """Raise `OptionError` where `value` is neither a finite number nor numbers by pattern."""
    if not isinstance(value, Mapping):
        check_strength(value)
        return
    for match, number in value.items():
        if not isinstance(match, str | type) and not callable(match):
            raise OptionError(f"strength: expected a pattern, a class or a predicate as key, got {match!r}")
        try:
            check_strength(number)
        except OptionError as error:
            raise OptionError(f"{match!r}: {error}") from None


def strengths_at(value: Strength, layers: Sequence[tuple[str, nn.Module]], model: nn.Module) -> list[float | None]:
    """The strength of each layer (path, module) of `model`; None where no pattern matches it.

    Raises:
        OptionError: it is no strength.
        TargetError: a pattern matches none of the layers.
    """
    check_strengths(value)
    if not isinstance(value, Mapping):
        return [float(value)] * len(layers)
    found: list[float | None] = [None] * len(layers)
    for match, number in value.items():
        at = [i for i, (path, module) in enumerate(layers) if matches(match, path, module, lineage(model, path))]
        if not at:
            names = dict.fromkeys(part for path, _ in layers for part in path.split(".") if not part.isdigit())
            hint = nearest(match.split(".")[-1], names) if isinstance(match, str) else ""
            raise TargetError(f"no adapted layer matches {match!r}. {hint}".rstrip())
        for i in at:
            found[i] = float(number)
    return found
