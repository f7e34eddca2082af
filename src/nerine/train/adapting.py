"""The adapters of a run: which parts of the pipeline are trained, with which algorithm, from which values."""

from __future__ import annotations

from typing import Any

from torch import nn

from nerine.algorithms import Algorithm
from nerine.api import load
from nerine.errors import OptionError
from nerine.model.fitting import attach
from nerine.model.network import Network
from nerine.model.pipeline import Parts
from nerine.model.rules import Rule
from nerine.model.rules_file import read_rules
from nerine.tools.planning import algorithm_of
from nerine.train.families.base import Base
from nerine.train.settings import AdapterSettings

__all__ = ["adapt", "freeze", "trained_parts", "what_of", "where_of"]


def trained_parts(base: Base, settings: AdapterSettings) -> Parts:
    """The denoiser, and the text encoders where they are trained, under the names that the pipeline has for them.

    Raises:
        OptionError: text encoders are to be trained and there are none.
    """
    parts: dict[str, nn.Module] = {base.component: base.denoiser}
    if settings.text_encoder:
        if not base.text_encoders:
            raise OptionError(f"text_encoder: {type(base.pipeline).__name__} has no text encoder that could be trained")
        parts |= base.text_encoders
    return Parts(parts)


def adapt(parts: Parts, settings: AdapterSettings) -> Network:
    """Put the adapters on; their first values are drawn from torch's generators.

    Raises:
        OptionError, TargetError, FormatError: as `nerine.attach` and `nerine.load`.
    """
    dropouts: dict[str, Any] = {
        "dropout": settings.dropout,
        "rank_dropout": settings.rank_dropout,
        "module_dropout": settings.module_dropout,
    }
    if settings.start_from is not None:
        return load(parts, settings.start_from, strict=True, **dropouts).requires_grad_()
    targets, train_norm = where_of(settings)
    return attach(parts, what_of(settings), targets=targets, train_norm=train_norm, **dropouts)


def what_of(settings: AdapterSettings) -> Algorithm | list[Rule]:
    """The algorithm for all layers, or the rules.

    Raises:
        OptionError: a setting does not exist or has another type.
    """
    if settings.rules is not None:
        return read_rules(settings.rules)
    given = {key: str(value) for key, value in settings.settings.items()}
    for name in ("rank", "alpha"):
        value = getattr(settings, name)
        if value is not None:
            given[name] = str(value)
    return algorithm_of(settings.algo, given, settings.dora)


def where_of(settings: AdapterSettings) -> tuple[list[str], bool]:
    """Which layers, and whether norms are among them; rules say which by themselves."""
    return (["all"] if settings.rules is not None else list(settings.targets)), settings.train_norm


def freeze(base: Base) -> None:
    """Nothing of the base requires gradients, and no dropout of its own is on."""
    for part in base.parts:
        part.requires_grad_(False).eval()
