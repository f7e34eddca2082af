"""Which layers get what: rules, patterns and presets, all read against the paths and classes of a model.

A pattern is a piece of a layer's path. "to_q", "attn1.to_q" and "mid_block" match every layer at or below a module
so named; `*` and `?` stand for letters within one name; "re:..." is a regular expression for the whole path.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import Tensor, nn

from nerine.algorithms import Algorithm, Norm
from nerine.errors import OptionError, TargetError, UnsupportedBase, nearest
from nerine.model.adapter import check_strength
from nerine.model.layer import is_layer, kind_of, layer_kind, parameter_site, projections, site_of
from nerine.model.mount import Spot
from nerine.model.pipeline import named_layers
from nerine.site import Site

__all__ = ["PRESETS", "Rule", "Target", "Targets", "every_spot", "find_targets", "matches", "spot_at"]

_log = logging.getLogger("nerine")

Predicate = Callable[[str, nn.Module], bool]
Match = str | type[nn.Module] | Predicate
Targets = Match | Sequence[Match]


def _of_kind(*kinds: str) -> Predicate:
    """Layers of these kinds, attention blocks (which are linear), and norms for who asks for nothing else."""
    return lambda path, module: (layer_kind(module) or "linear") in kinds


PRESETS: dict[str, tuple[Match, ...]] = {
    "full": (_of_kind("linear", "conv", "transposed"),),
    "full-lin": (_of_kind("linear"),),
}


@dataclass(frozen=True)
class Rule:
    """What the layers that `match` get; the first rule that matches a layer wins, and `algorithm=None` skips it.

    `match` is a pattern, a class of layers, or a predicate of path and module. A parameter that stands alone (the
    experts of a mixture, say) is matched by a pattern that ends in its name. `lr` is their own learning rate for
    `Network.param_groups`, `strength` what they start with. With `rows=(start, stop)` the adapter acts on those outputs
    alone, as on the queries of a fused projection; several such rules may match one layer.
    """

    match: Match
    algorithm: Algorithm | None
    lr: float | None = None
    strength: float = 1.0
    rows: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if self.algorithm is not None and not isinstance(self.algorithm, Algorithm):
            raise OptionError(
                f"Rule: expected an algorithm such as LoRA(rank=16), or None to skip, got {self.algorithm!r}"
            )
        if self.lr is not None and (isinstance(self.lr, bool) or not isinstance(self.lr, int | float) or self.lr < 0):
            raise OptionError(f"Rule: lr must be a number of at least 0, got {self.lr!r}")
        if self.rows is not None and (
            not isinstance(self.rows, tuple)
            or len(self.rows) != 2
            or not all(isinstance(row, int) for row in self.rows)
            or not 0 <= self.rows[0] < self.rows[1]
        ):
            raise OptionError(f"Rule: rows must be (start, stop) with 0 <= start < stop, got {self.rows!r}")


@dataclass(frozen=True)
class Target:
    """A weight that a rule has chosen."""

    spot: Spot
    kind: str
    rule: Rule
    algorithm: Algorithm


def matches(match: Match, path: str, module: nn.Module) -> bool:
    """Whether the layer `module` at `path` is meant by `match`."""
    if isinstance(match, type):
        return isinstance(module, match)
    if not isinstance(match, str):
        return bool(match(path, module))
    if match.startswith("re:"):
        return _is_whole(match, path)
    wanted, names = match.split("."), path.split(".")
    return any(
        all(fnmatchcase(name, want) for name, want in zip(names[i:], wanted, strict=False))
        for i in range(len(names) - len(wanted) + 1)
    )


def _is_whole(pattern: str, path: str) -> bool:
    """Whether the regular expression after "re:" is the whole path."""
    try:
        return re.fullmatch(pattern[3:], path) is not None
    except re.error as error:
        raise OptionError(f"the pattern {pattern!r} is not a regular expression: {error}") from error


def _ends_in(pattern: str, path: str) -> bool:
    """Whether a pattern means the last name of `path`, and not only something above it."""
    if pattern.startswith("re:"):
        return _is_whole(pattern, path)
    wanted = pattern.split(".")
    names = path.split(".")[-len(wanted) :]
    return len(names) == len(wanted) and all(map(fnmatchcase, names, wanted))


def _is_explicit(match: Match, path: str, module: nn.Module) -> bool:
    """Whether a match means this very layer, and not only something above it."""
    return _ends_in(match, path) if isinstance(match, str) else matches(match, path, module)


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


@dataclass(frozen=True)
class _Candidate:
    """A weight that might be adapted."""

    path: str
    module: nn.Module  # what rules are matched against
    holder: nn.Module
    attr: str = "weight"
    caller: nn.Module | None = None

    @property
    def kind(self) -> str:
        return kind_of(self.holder, self.attr)

    def spot(self, rows: tuple[int, int] | None) -> Spot:
        """Where the adapter goes.

        Raises:
            UnsupportedBase: this weight cannot be adapted, or not by rows.
        """
        alone = self.caller is not None
        site = parameter_site(self.holder, self.attr, self.path) if alone else site_of(self.holder, self.path)
        if rows is None:
            return Spot(self.path, self.holder, site, self.attr, caller=self.caller)
        check_rows(site, rows, self.path, alone)
        site = site.rows(rows[1] - rows[0])
        return Spot(f"{self.path}[{rows[0]}:{rows[1]}]", self.holder, site, self.attr, rows, self.caller)


def _candidates(model: nn.Module, patterns: Sequence[str]) -> Iterator[_Candidate]:
    """Layers, the projections of attention blocks, and parameters that stand alone where a pattern ends in them."""
    inside: set[int] = set()
    for path, module in named_layers(model):
        if ".nerine" in f".{path}" or id(module) in inside:
            continue
        if isinstance(module, nn.MultiheadAttention):
            inside.update(id(part) for part in module.modules())
            for name, holder, attr in projections(module):
                yield _Candidate(f"{path}.{name}" if path else name, module, holder, attr, module)
        elif is_layer(module):
            yield _Candidate(path, module, module)
        else:
            for name, parameter in module._parameters.items():
                whole = f"{path}.{name}" if path else name
                if isinstance(parameter, Tensor) and any(_ends_in(pattern, whole) for pattern in patterns):
                    yield _Candidate(whole, module, module, name, module)


def find_targets(
    model: nn.Module, what: Algorithm | Sequence[Rule], targets: Targets, train_norm: bool = False
) -> tuple[list[Target], dict[str, str]]:
    """The weights to adapt, in the order of the model, and those left out with the reason.

    Raises:
        TargetError: nothing is left, or two chosen layers share one weight.
        OptionError: `what` is neither an algorithm nor rules.
    """
    rules, wanted = _as_rules(what), _as_matches(targets)
    preset = isinstance(targets, str) and targets in PRESETS
    if preset and any(a is not None and a.kinds == {"norm"} for a in (rule.algorithm for rule in rules)):
        wanted.append(_of_kind("norm"))
    if train_norm:
        wanted.append(_of_kind("norm"))
        rules.append(Rule(_of_kind("norm"), Norm()))
    patterns = [m for m in [*wanted, *(rule.match for rule in rules)] if isinstance(m, str)]
    candidates = list(_candidates(model, patterns))
    chosen: list[Target] = []
    skipped: dict[str, str] = {}
    for candidate in candidates:
        path, module = candidate.path, candidate.module
        if not any(matches(match, path, module) for match in wanted):
            continue
        explicit = not preset and any(_is_explicit(match, path, module) for match in wanted)
        found = [rule for rule in rules if matches(rule.match, path, module)]
        if train_norm and layer_kind(module) == "norm":
            found = [rule for rule in found if rule.algorithm is None or "norm" in rule.algorithm.kinds]
        kind = layer_kind(module)
        suits = any(rule.algorithm is not None and kind in rule.algorithm.kinds for rule in found)
        if not explicit and (kind == "embedding" or (kind == "norm" and not suits)):
            continue  # below something that was named, but nobody asked for it
        together = found if found and found[0].rows is not None else found[:1]
        for rule in together:
            target = _target(candidate, rule)
            if isinstance(target, str):
                skipped[path] = target
            else:
                chosen.append(target)
        if not together:
            skipped[path] = "no rule matches"
    if not chosen:
        raise TargetError(_nothing_matched(model, candidates, wanted, rules, skipped))
    _refuse_shared_weights(chosen)
    return chosen, skipped


def every_spot(model: nn.Module, rows: Sequence[tuple[int, int]] = ()) -> dict[str, Spot]:
    """All weights that a file might have an adapter for, by path, whole and in each range of `rows` that they have;
    those that cannot be adapted are left out."""
    found = {}
    for candidate in _candidates(model, ["*"]):
        for part in (None, *rows):
            try:
                spot = candidate.spot(part)
            except (UnsupportedBase, OptionError) as error:
                _log.info("%s", error)
                continue
            found[spot.path] = spot
    return found


def spot_at(spots: Mapping[str, Spot], path: str) -> Spot:
    """The spot of that path; where it names rows of a weight, as in "to_qkv[0:64]", those of the whole weight's."""
    if path in spots:
        return spots[path]
    whole, _, text = path[:-1].rpartition("[")
    start, _, stop = text.partition(":")
    spot = spots[whole]
    rows = (int(start), int(stop))
    check_rows(spot.site, rows, path, spot.caller is not None)
    return replace(spot, path=path, site=spot.site.rows(rows[1] - rows[0]), rows=rows)


def check_rows(site: Site, rows: tuple[int, int], path: str, alone: bool) -> None:
    """Whether an adapter can act on some rows of a weight.

    Raises:
        UnsupportedBase: the layer has no rows that could be taken alone.
        OptionError: it has fewer rows.
    """
    if site.groups > 1 or site.kind not in ("linear", "conv") or site.experts or (site.opaque and not alone):
        raise UnsupportedBase(f"{path}: adapters on some rows need a plain Linear or an ungrouped Conv")
    if rows[1] > site.shape[0]:
        raise OptionError(f"{path}: rows {rows} of a weight that has {site.shape[0]}")


def _target(candidate: _Candidate, rule: Rule) -> Target | str:
    """What a rule makes of a candidate, or why nothing."""
    if rule.algorithm is None:
        return "skipped by a rule"
    try:
        spot = candidate.spot(rule.rows)
    except UnsupportedBase as error:
        return str(error).removeprefix(f"{candidate.path}: ")
    why = rule.algorithm.unsuited(spot.site)
    return why or Target(spot, candidate.kind, rule, rule.algorithm)


def _nothing_matched(
    model: nn.Module,
    candidates: list[_Candidate],
    wanted: list[Match],
    rules: list[Rule],
    skipped: dict[str, str],
) -> str:
    name = type(model).__name__
    if not candidates:
        return f"{name} has no layer of a kind that nerine knows, so there is nothing to adapt"
    if skipped:
        reasons = "; ".join(f"{path}: {why}" for path, why in list(skipped.items())[:5])
        return f"every layer of {name} that the targets match was left out. {reasons}"
    patterns = [m for m in [*wanted, *(rule.match for rule in rules)] if isinstance(m, str)]
    names = {part for c in candidates for part in c.path.split(".") if not part.isdigit()}
    shown = ", ".join(f"{c.path} ({c.kind})" for c in candidates[:6])
    hints = " ".join(nearest(p.split(".")[-1], [*names, *PRESETS]) for p in patterns[:1] if p)
    return (
        f"no layer of {name} matches {', '.join(map(repr, patterns)) or 'the targets'}. {hints} "
        f"Candidates: {shown}{', ...' if len(candidates) > 6 else ''} ({len(candidates)} in all)"
    )


def _refuse_shared_weights(chosen: list[Target]) -> None:
    seen: dict[int, str] = {}
    for spot in (target.spot for target in chosen if target.spot.rows is None):
        other = seen.setdefault(id(spot.holder._parameters[spot.attr]), spot.path)
        if other != spot.path:
            raise TargetError(
                f"{other} and {spot.path} share one weight: two adapters on it would be merged twice. "
                f'Leave one out, for example with Rule("{spot.path}", None) before the other rules'
            )
