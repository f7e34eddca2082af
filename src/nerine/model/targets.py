"""Which layers get what: rules and targets, read against the paths and classes of a model.

How layers are named in them is written in `nerine.model.patterns`, what a preset means in `nerine.model.presets`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from nerine.algorithms import IA3, Algorithm, Norm
from nerine.errors import OptionError, TargetError, UnsupportedBase, nearest
from nerine.model.candidates import Candidate, candidates_of, every_spot, spot_at
from nerine.model.layer import layer_kind
from nerine.model.mount import Spot
from nerine.model.patterns import Match, Predicate, is_explicit, lineage, matches
from nerine.model.presets import PRESETS, choose, is_preset, preset_of, why_nothing
from nerine.model.rules import Rule
from nerine.model.rules_file import read_rules

__all__ = ["PRESETS", "Match", "Rule", "Target", "Targets", "What", "every_spot", "find_targets", "matches", "spot_at"]

Targets = Match | Sequence[Match]
What = Algorithm | Sequence[Rule] | str | os.PathLike[str]


def _of_kind(*kinds: str) -> Predicate:
    """Layers of these kinds."""
    return lambda path, module: (layer_kind(module) or "linear") in kinds


@dataclass(frozen=True)
class Target:
    """A weight that a rule has chosen."""

    spot: Spot
    kind: str
    rule: Rule
    algorithm: Algorithm


def _as_rules(what: What) -> list[Rule]:
    if isinstance(what, Algorithm):
        return [Rule(lambda path, module: True, what)]
    if isinstance(what, os.PathLike) or (isinstance(what, str) and what.endswith(".toml")):
        return read_rules(what)
    if not isinstance(what, Iterable) or isinstance(what, str):
        raise OptionError(
            f"expected an algorithm such as LoRA(rank=16), a list of Rules or a file of rules (.toml), got {what!r}"
        )
    rules = list(what)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise OptionError(f'expected Rule(match, algorithm), got {rule!r}; example: Rule("attn1", LoRA(rank=8))')
    return rules


def _as_matches(targets: Targets) -> list[Match]:
    if isinstance(targets, str | type) or callable(targets):
        return [targets]
    wanted = list(targets) if isinstance(targets, Iterable) else [targets]
    for match in wanted:
        if not isinstance(match, str | type) and not callable(match):
            raise OptionError(
                f"targets: expected a preset ({', '.join(PRESETS)}), a pattern, a class, a predicate, "
                f"or a list of those, got {match!r}"
            )
    return wanted


class _Question:
    """Targets and rules put to the candidates of one model; each preset among them is worked out once."""

    def __init__(self, model: nn.Module, targets: Sequence[Match], rules: Sequence[Rule]) -> None:
        self.model = model
        self.out = [match[1:] for match in targets if isinstance(match, str) and match.startswith("!")]
        self.wanted = [match for match in targets if not (isinstance(match, str) and match.startswith("!"))] or ["all"]
        named = [*self.wanted, *self.out, *(rule.match for rule in rules)]
        self.presets = {m: preset_of(m) for m in named if isinstance(m, str) and is_preset(m)}
        self.chosen = {name: choose(model, preset) for name, preset in self.presets.items()}
        self.paths = {name: frozenset(chosen.paths) for name, chosen in self.chosen.items()}
        self.patterns = [m for m in named if isinstance(m, str) and m not in self.presets]
        self.only_presets = all(map(self._is_preset, self.wanted))

    def _is_preset(self, match: Match) -> bool:
        return isinstance(match, str) and match in self.presets

    def says(self, match: Match, candidate: Candidate) -> bool:
        """Whether a match means a candidate."""
        if isinstance(match, str) and match in self.paths:
            return candidate.path in self.paths[match]
        return matches(match, candidate.path, candidate.module, lineage(self.model, candidate.path))

    def wants(self, candidate: Candidate) -> bool:
        """Whether the targets mean it. A parameter that stands alone is a candidate only where something names it, and
        a preset does not stand in its way."""
        if any(self.says(match, candidate) for match in self.out):
            return False
        return any(
            self.says(match, candidate) or (candidate.is_lone and self._is_preset(match)) for match in self.wanted
        )

    def is_explicit(self, candidate: Candidate) -> bool:
        """Whether the targets mean this very layer, and not only something above it."""
        named = (match for match in self.wanted if not self._is_preset(match))
        return any(is_explicit(match, candidate.path, candidate.module) for match in named)

    def suited(self, rule: Rule, candidate: Candidate) -> Rule:
        """A rule with what presets ask of its algorithm on this layer."""
        asked = [self.chosen[m] for m in (*self.wanted, rule.match) if isinstance(m, str) and m in self.chosen]
        algorithm = rule.algorithm
        if isinstance(algorithm, IA3) and any(candidate.path in chosen.on_input for chosen in asked):
            return replace(rule, algorithm=replace(algorithm, on_input=True))
        return rule


def find_targets(
    model: nn.Module, what: What, targets: Targets, train_norm: bool = False
) -> tuple[list[Target], dict[str, str]]:
    """The weights to adapt, in the order of the model, and those left out with the reason.

    Raises:
        TargetError: nothing is left, or two chosen layers share one weight.
        OptionError: `what` is neither an algorithm nor rules, or targets are no such.
    """
    rules = _as_rules(what)
    question = _Question(model, _as_matches(targets), rules)
    if question.only_presets and any(a is not None and a.kinds == {"norm"} for a in (rule.algorithm for rule in rules)):
        question.wanted.append(_of_kind("norm"))
    if train_norm:
        question.wanted.append(_of_kind("norm"))
        rules.append(Rule(_of_kind("norm"), Norm()))
    only_presets = question.only_presets
    candidates = list(candidates_of(model, question.patterns))
    chosen: list[Target] = []
    skipped: dict[str, str] = {}
    for candidate in candidates:
        path, module = candidate.path, candidate.module
        if not question.wants(candidate):
            continue
        explicit = not only_presets and question.is_explicit(candidate)
        found = [rule for rule in rules if question.says(rule.match, candidate)]
        if train_norm and layer_kind(module) == "norm":
            found = [rule for rule in found if rule.algorithm is None or "norm" in rule.algorithm.kinds]
        kind = layer_kind(module)
        suits = any(rule.algorithm is not None and kind in rule.algorithm.kinds for rule in found)
        if not explicit and (kind == "embedding" or (kind == "norm" and not suits)):
            continue  # below something that was named, but nobody asked for it
        together = found if found and found[0].rows is not None else found[:1]
        for rule in together:
            target = _target(candidate, question.suited(rule, candidate))
            if isinstance(target, str):
                skipped[path] = target
            else:
                chosen.append(target)
        if not together:
            skipped[path] = "no rule matches"
    if not chosen:
        raise TargetError(_nothing_matched(model, candidates, question, skipped))
    _refuse_shared_weights(chosen)
    return chosen, skipped


def _target(candidate: Candidate, rule: Rule) -> Target | str:
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
    model: nn.Module, candidates: list[Candidate], question: _Question, skipped: dict[str, str]
) -> str:
    name = type(model).__name__
    if not candidates:
        return f"{name} has no layer of a kind that nerine knows, so there is nothing to adapt"
    if skipped:
        reasons = "; ".join(f"{path}: {why}" for path, why in list(skipped.items())[:5])
        return f"every layer of {name} that the targets match was left out. {reasons}"
    if question.only_presets and not any(question.paths.values()):
        return why_nothing(model, next(iter(question.presets.values())))
    patterns = question.patterns
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
