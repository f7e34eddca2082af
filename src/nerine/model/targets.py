"""Which layers get what: rules, patterns and presets, all read against the paths and classes of a model.

A pattern is a piece of a layer's path. "to_q", "attn1.to_q" and "mid_block" match every layer at or below a module
so named; `*` and `?` stand for letters within one name; "re:..." is a regular expression for the whole path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from nerine.algorithms import Algorithm
from nerine.errors import OptionError, TargetError, UnsupportedBase, nearest
from nerine.model.adapter import check_strength
from nerine.model.layer import CONVS, is_layer, kind_of, site_of
from nerine.site import Site

__all__ = ["PRESETS", "Rule", "Target", "Targets", "find_targets", "matches"]

Predicate = Callable[[str, nn.Module], bool]
Match = str | type[nn.Module] | Predicate
Targets = Match | Sequence[Match]

PRESETS: dict[str, tuple[Match, ...]] = {
    "full": (nn.Linear, *CONVS),
    "full-lin": (nn.Linear,),
}


@dataclass(frozen=True)
class Rule:
    """What the layers that `match` get; the first rule that matches a layer wins, and `algorithm=None` skips it.

    `match` is a pattern, a class of layers, or a predicate of path and module. `lr` is their own learning rate for
    `Network.param_groups`, `strength` what they start with.
    """

    match: Match
    algorithm: Algorithm | None
    lr: float | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if self.algorithm is not None and not isinstance(self.algorithm, Algorithm):
            raise OptionError(
                f"Rule: expected an algorithm such as LoRA(rank=16), or None to skip, got {self.algorithm!r}"
            )


@dataclass(frozen=True)
class Target:
    """A layer that a rule has chosen."""

    path: str
    module: nn.Module
    site: Site
    rule: Rule
    algorithm: Algorithm


def matches(match: Match, path: str, module: nn.Module) -> bool:
    """Whether the layer `module` at `path` is meant by `match`."""
    if isinstance(match, type):
        return isinstance(module, match)
    if not isinstance(match, str):
        return bool(match(path, module))
    if match.startswith("re:"):
        try:
            return re.fullmatch(match[3:], path) is not None
        except re.error as error:
            raise OptionError(f"the pattern {match!r} is not a regular expression: {error}") from error
    wanted, names = match.split("."), path.split(".")
    return any(
        all(fnmatchcase(name, want) for name, want in zip(names[i:], wanted, strict=False))
        for i in range(len(names) - len(wanted) + 1)
    )


def _as_rules(what: Algorithm | Sequence[Rule]) -> list[Rule]:
    if isinstance(what, Algorithm):
        return [Rule(lambda path, module: True, what)]
    if not isinstance(what, Iterable) or isinstance(what, str):  # type: ignore[unreachable]
        raise OptionError(f"expected an algorithm such as LoRA(rank=16), or a list of Rules, got {what!r}")
    rules = list(what)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise OptionError(f'expected Rule(match, algorithm), got {rule!r}; example: Rule("attn1", LoRA(rank=8))')
    return rules


def _as_matches(targets: Targets) -> list[Match]:
    if isinstance(targets, str) and targets in PRESETS:
        return list(PRESETS[targets])
    if isinstance(targets, str | type) or callable(targets):
        return [targets]
    wanted = list(targets) if isinstance(targets, Iterable) else [targets]
    for match in wanted:
        if not isinstance(match, str | type) and not callable(match):
            raise OptionError(
                f"targets: expected a preset ({', '.join(PRESETS)}), a pattern, a class of layers, a predicate, "
                f"or a list of those, got {match!r}"
            )
    return wanted


def find_targets(
    model: nn.Module, what: Algorithm | Sequence[Rule], targets: Targets
) -> tuple[list[Target], dict[str, str]]:
    """The layers to adapt, in the order of the model, and those left out with the reason.

    Raises:
        TargetError: no layer is left, or two chosen layers share one weight.
        OptionError: `what` is neither an algorithm nor rules.
    """
    rules, wanted = _as_rules(what), _as_matches(targets)
    chosen: list[Target] = []
    skipped: dict[str, str] = {}
    layers = [(p, m) for p, m in model.named_modules() if is_layer(m) and ".nerine." not in f".{p}."]
    inside = {id(m) for a in model.modules() if isinstance(a, nn.MultiheadAttention) for m in a.modules()}
    for path, module in layers:
        if not any(matches(match, path, module) for match in wanted):
            continue
        rule = next((rule for rule in rules if matches(rule.match, path, module)), None)
        if rule is None or rule.algorithm is None:
            skipped[path] = "no rule matches" if rule is None else "skipped by a rule"
        elif id(module) in inside:
            skipped[path] = "its forward is never called: it belongs to a MultiheadAttention"
        else:
            try:
                chosen.append(Target(path, module, site_of(module, path), rule, rule.algorithm))
            except UnsupportedBase as error:
                skipped[path] = str(error).removeprefix(f"{path}: ")
    if not chosen:
        raise TargetError(_nothing_matched(model, layers, wanted, rules, skipped))
    _refuse_shared_weights(chosen)
    return chosen, skipped


def _nothing_matched(
    model: nn.Module,
    layers: list[tuple[str, nn.Module]],
    wanted: list[Match],
    rules: list[Rule],
    skipped: dict[str, str],
) -> str:
    name = type(model).__name__
    if not layers:
        return f"{name} has no Linear or Conv layer, so there is nothing to adapt"
    if skipped:
        reasons = "; ".join(f"{path}: {why}" for path, why in list(skipped.items())[:5])
        return f"every layer of {name} that the targets match was left out. {reasons}"
    patterns = [m for m in [*wanted, *(rule.match for rule in rules)] if isinstance(m, str)]
    names = {part for path, _ in layers for part in path.split(".") if not part.isdigit()}
    shown = ", ".join(f"{path} ({kind_of(module)})" for path, module in layers[:6])
    hints = " ".join(nearest(p.split(".")[-1], [*names, *PRESETS]) for p in patterns[:1] if p)
    return (
        f"no layer of {name} matches {', '.join(map(repr, patterns)) or 'the targets'}. {hints} "
        f"Candidates: {shown}{', ...' if len(layers) > 6 else ''} ({len(layers)} in all)"
    )


def _refuse_shared_weights(chosen: list[Target]) -> None:
    seen: dict[int, str] = {}
    for target in chosen:
        other = seen.setdefault(id(target.module.weight), target.path)
        if other != target.path:
            raise TargetError(
                f"{other} and {target.path} share one weight: two adapters on it would be merged twice. "
                f'Leave one out, for example with Rule("{target.path}", None) before the other rules'
            )
