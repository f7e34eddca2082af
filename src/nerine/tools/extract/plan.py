"""Which adapter a layer gets: what was asked for, put together into one algorithm for each layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from nerine.algorithms import REGISTRY, Algorithm, DoRA, Full, GLoRA, LoHa, LoKr, LoRA, build
from nerine.errors import OptionError, nearest
from nerine.model.rules import Rule
from nerine.site import Site
from nerine.tools.extract.ranks import Wanted, rank_for

__all__ = ["AUTO", "Plan", "family_names", "plan_of"]

AUTO = ("lora", "lokr", "ia3", "diag-oft", "full")  # LoHa takes an iteration for each size and is tried when named
SIZED = (*AUTO, "loha")  # those of which it is known what each size is worth
INSIDE = (LoRA, LoHa, LoKr, GLoRA)  # what DoRA goes around here: the others keep or move the norms themselves
What = str | Algorithm | Sequence[Rule]


def family_names() -> list[str]:
    """The algorithms that can be fitted to a difference."""
    return [name for name, kind in REGISTRY.items() if kind.fit is not Algorithm.fit and name != "norm"]


@dataclass(frozen=True)
class Plan:
    """`what` chooses the layers (an algorithm or rules); `templates` are the algorithms weighed against each other for
    a size, or the one that all layers get. `dora` is what goes around them, where magnitudes are to stand apart."""

    what: Algorithm | Sequence[Rule]
    templates: tuple[Algorithm, ...]
    wanted: Wanted | None
    dora: DoRA | None = None

    @property
    def is_sized(self) -> bool:
        return self.wanted is not None and self.wanted.kind == "size"

    @property
    def wants_others(self) -> bool:
        """Whether layers may get something else than plain products."""
        return any(not isinstance(template, LoRA) for template in self.templates) or self.may_be_full

    @property
    def may_be_full(self) -> bool:
        """Whether a product may give way to the difference itself."""
        return self.wanted is not None and (self.wanted.as_lycoris or self.wanted.kind == "full")

    @property
    def needs_values(self) -> bool:
        """Whether singular values decide about ranks."""
        return self.wanted is not None and self.wanted.counts

    def algorithm(self, own: Algorithm, site: Site, values: Tensor | None, is_alone: bool = True) -> Algorithm:
        """That of a layer for which the targets have chosen `own`; `values` are the singular values of its change.

        A layer that is in pieces in the file, or a piece of one, is not alone there: it gets a plain product.
        """
        if self.wanted is not None and has_rank(own):
            rank = rank_for(self.wanted, site, values, must=not is_alone)
            if rank is None:
                return Full()
            changed: Any = own  # of a class that has a rank
            own = replace(changed, rank=rank)
        own = fitted_size(own, site)
        return self.around(own) if is_alone else own

    def sketch(self, own: Algorithm, site: Site, is_alone: bool) -> Algorithm:
        """As `algorithm`, where the singular values are not known yet."""
        if self.needs_values:
            return replace(self, wanted=Wanted("rank", 1)).algorithm(own, site, None, is_alone)
        return self.algorithm(own, site, None, is_alone)

    def around(self, algorithm: Algorithm) -> Algorithm:
        """With DoRA around it, where that was asked for."""
        return replace(self.dora, inner=algorithm) if self.dora and isinstance(algorithm, INSIDE) else algorithm

    def __str__(self) -> str:
        if self.wanted is not None:
            return str(self.wanted)
        return str(self.what) if isinstance(self.what, Algorithm) else f"{len(self.what)} rules"


def fitted_size(algorithm: Algorithm, site: Site) -> Algorithm:
    """Without ranks that the weight does not have, and without a start on the weight, which a fit has no use for."""
    most = min(site.shape[0], site.flat)
    if isinstance(algorithm, DoRA):
        return replace(algorithm, inner=fitted_size(algorithm.inner, site))
    if isinstance(algorithm, LoRA) and algorithm.init != LoRA.init:
        algorithm = replace(algorithm, init=LoRA.init)
    if isinstance(algorithm, LoRA) and algorithm.rank > most:
        alpha = None if algorithm.alpha is None else algorithm.alpha * most / algorithm.rank
        return replace(algorithm, rank=most, alpha=alpha)
    return algorithm


def plan_of(
    algorithm: What,
    wanted: Wanted | None,
    algos: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    dora: bool = False,
    tucker: bool = False,
) -> Plan:
    """What the settings mean together.

    Raises:
        OptionError: an unknown algorithm or one that is not fitted, no size or one that does not go with it.
    """
    if settings and (not isinstance(algorithm, str) or algorithm == "auto"):
        raise OptionError("extract: settings go with the name of one algorithm")
    if not isinstance(algorithm, str | Algorithm):
        if wanted is not None or dora or tucker:
            raise OptionError("extract: rules have sizes and settings of their own; give them in the rules")
        rules = list(algorithm)
        for rule in rules:
            _check_fitted(rule.algorithm)
        return Plan(rules, (), None)
    if algorithm == "auto":
        return _automatic(wanted, algos, dora, tucker)
    if algos is not None:
        raise OptionError("extract: algos says what algorithm='auto' may choose from; give that, or one algorithm")
    template = _named(algorithm, settings) if isinstance(algorithm, str) else algorithm
    _check_fitted(template)
    around = template if isinstance(template, DoRA) else DoRA(template) if dora else None
    template = template.inner if isinstance(template, DoRA) else template
    if tucker and not isinstance(template, LoRA):
        raise OptionError(f"extract: tucker is a form of lora; leave it out for {template.name}")
    template = _with_tucker(template, tucker)
    if around is not None and not isinstance(template, INSIDE):
        raise OptionError(f"extract: dora goes around lora, loha, lokr or glora, not around {template.name}")
    _check_size(template, wanted, isinstance(algorithm, str) and "rank" not in (settings or {}))
    own = template if around is None or wanted is not None else replace(around, inner=template)
    return Plan(own, (template,), wanted, around)


def _automatic(wanted: Wanted | None, algos: Sequence[str] | None, dora: bool, tucker: bool) -> Plan:
    if wanted is None or wanted.kind != "size":
        raise OptionError(
            "extract: algorithm='auto' weighs algorithms against each other for a size; give size=20_000_000"
        )
    names = AUTO if algos is None else tuple(algos)
    if not names:
        raise OptionError("extract: algos names none; leave it out for " + ", ".join(AUTO))
    templates = tuple(_with_tucker(_named(name), tucker) for name in dict.fromkeys(names))
    for template in templates:
        _check_sized(template)
    return Plan(LoRA(), templates, wanted, DoRA(LoRA()) if dora else None)


def _named(name: str, settings: Mapping[str, Any] | None = None) -> Algorithm:
    known = family_names()
    if name in ("locon", "dora"):
        raise OptionError(f"extract: {name} is algorithm='lora'" + (", with dora=True" if name == "dora" else ""))
    if name not in known:
        reason = "cannot be fitted to a difference" if name in REGISTRY else "is unknown"
        raise OptionError(f"extract: the algorithm {name!r} {reason}. {nearest(name, [*known, 'auto'])}")
    return build({"algorithm": name, **(settings or {})})


def _check_fitted(algorithm: Algorithm | None) -> None:
    inner: Any = algorithm.inner if isinstance(algorithm, DoRA) else algorithm
    if inner is not None and type(inner).fit is Algorithm.fit:
        raise OptionError(
            f"extract: {type(inner).__name__} cannot be fitted to a difference; choose {', '.join(family_names())}"
        )


def _check_sized(template: Algorithm) -> None:
    if template.name not in SIZED:
        raise OptionError(
            f"extract: {template.name} is not weighed by size; choose of {', '.join(SIZED)}, or give rank"
        )


def _with_tucker(template: Algorithm, tucker: bool) -> Algorithm:
    if not isinstance(template, LoRA):
        return template
    return replace(template, tucker=tucker or template.tucker, init=LoRA.init)


def has_rank(algorithm: Algorithm) -> bool:
    """Whether a rank is among its settings."""
    return any(field.name == "rank" for field in dataclasses.fields(algorithm))


def _check_size(template: Algorithm, wanted: Wanted | None, is_name: bool) -> None:
    sizes = "rank, energy, threshold, ratio, quantile, mode or size"
    if wanted is None:
        if has_rank(template) and is_name and not getattr(template, "full_matrix", False):
            raise OptionError(f"extract: say how large it is to be, with one of {sizes}")
    elif wanted.kind == "size":
        _check_sized(template)
    elif wanted.counts and not isinstance(template, LoRA):
        raise OptionError(
            f"extract: {wanted.kind} counts singular values, which are those of a LoRA; give rank or size for "
            f"{template.name}"
        )
    elif wanted.counts and getattr(template, "tucker", False):
        raise OptionError(f"extract: {wanted.kind} counts singular values, and a core has none; give rank or size")
    elif wanted.kind != "full" and not has_rank(template):
        raise OptionError(f"extract: {template.name} has no rank; leave {wanted.kind} out")
