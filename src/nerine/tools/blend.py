"""One layer of several adapters as one adapter: W + Σ strength·(W' - W).

Low-rank products are put side by side, which is exact, and cut down in their factors where fewer ranks are wanted.
Whatever is no such product is summed entry by entry, and so are all where not every entry has a say (`voting`).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nerine.algorithms import IA3, DoRA, Full, GLoRA, LoHa, LoKr, LoRA, LowRank, Norm, Params
from nerine.errors import FormatError, OptionError, nearest
from nerine.files.checkpoint import Base, Record
from nerine.files.rows import plain
from nerine.ops.factored import halves, loss, spectrum, stacked
from nerine.ops.row_norm import low_rank_size
from nerine.tools.exact import as_lora, change_in, check_kernel, factors_of, kind_of
from nerine.tools.recast import best_of
from nerine.tools.voting import vote

__all__ = ["METHODS", "Blend", "Blended", "blended"]

METHODS = ("concat", "svd", "linear", "ties", "dare", "dare_linear", "dare_ties", "magnitude_prune")
DUST = 1e-6  # what is left of a sum below this share of its terms is their rounding in fp32
SUMS = ("concat", "svd", "linear")
SCALED = (LowRank, LoHa, LoKr, GLoRA, IA3)  # whose carriers may be multiplied by a strength


@dataclass(frozen=True)
class Blend:
    """How adapters are combined: a method, and what comes of what is no low-rank product: a "lora" of a `rank`, or the
    "full" difference. Low-rank products keep all of their ranks with concat. `density` and `sign` are those of
    `voting`, `seed` is that of DARE.

    Raises `OptionError` where they make no sense together.
    """

    method: str = "concat"
    to: str | None = None
    rank: int | None = None
    density: float = 0.5
    sign: str = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise OptionError(f"combine: no method is called {self.method!r}. {nearest(self.method, METHODS)}")
        if self.to not in (None, "lora", "full"):
            raise OptionError(f"combine: `to` is lora or full, got {self.to!r}; convert the result for other kinds")
        rank = self.rank
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise OptionError(f"combine: rank must be a whole number of at least 1, got {rank!r}")
        if self.to == "full" and rank is not None:
            raise OptionError("combine: a full difference has no rank; leave one of the two out")
        if self.method == "svd" and rank is None:
            raise OptionError("combine: svd cuts down to a rank; give one")
        if self.method == "concat" and rank is not None and self.to is None:
            raise OptionError("combine: concat keeps all ranks; use svd (or linear) to cut them down to a rank")
        if not self.is_sum and self.to != "full" and rank is None:
            raise OptionError(f"combine: {self.method} gives no low-rank product; give a rank, or to='full'")
        if not 0 < self.density <= 1:
            raise OptionError(f"combine: density is a share above 0 and up to 1, got {self.density!r}")
        if self.sign not in ("total", "frequency"):
            raise OptionError(f"combine: sign is total or frequency, got {self.sign!r}")

    @property
    def is_sum(self) -> bool:
        return self.method in SUMS


class Blended(NamedTuple):
    """What came of a layer: the adapter (None where one of the files has it as it shall be), how ("kept", "exact" or
    "fitted"), the relative error, the size of the change, and what is to be said of it."""

    record: Record | None
    method: str
    error: float = 0.0
    size: float = 0.0
    note: str = ""


Terms = Sequence[tuple[Record, float]]


@torch.no_grad()
def blended(path: str, terms: Terms, base: Base | None, want: Blend) -> Blended:
    """One layer of all that have it, at their strengths (none is zero).

    Raises:
        FormatError: a change depends on a weight that is not at hand.
        OptionError: it is no low-rank product, and neither a rank nor "full" was asked for.
    """
    passes = all(_is_small(record) for record, _ in terms)
    if want.is_sum or passes:
        if _may_stay(terms, want, passes):
            return Blended(None, "kept")
        summed = _summed(terms, want, passes)
        if summed is not None:
            return Blended(summed, "exact", 0.0, _size(summed))
    for record, _ in terms:
        check_kernel(path, record, base)
    if want.is_sum and want.to != "full":
        factored = _factored(path, terms, base, want)
        if factored is not None:
            return factored
    if any(record.site.experts for record, _ in terms):
        raise FormatError(f"{path}: it holds several experts, of which only one file may have an adapter")
    return _dense(path, terms, base, want)


def _may_stay(terms: Terms, want: Blend, passes: bool) -> bool:
    """Whether one file alone has the layer, as it shall be."""
    (record, strength), *others = terms
    is_whole = want.rank is None or not isinstance(record.algorithm, LowRank | LoHa | LoKr | GLoRA)
    return not others and strength == 1 and (passes or (want.to is None and is_whole))


def _is_small(record: Record) -> bool:
    """Whether it is the adapter of a norm, or of a bias alone, which stays what it is."""
    return isinstance(record.algorithm, Norm) or (
        isinstance(record.algorithm, Full) and "diff" not in record.params.tensors
    )


def _summed(terms: Terms, want: Blend, passes: bool) -> Record | None:
    """The sum of tensors where that is the sum of adapters; None where it is not."""
    first = terms[0][0]
    names = {frozenset(record.params.tensors) for record, _ in terms}
    kinds = {type(record.algorithm) for record, _ in terms}
    if len(kinds) > 1 or (not passes and (want.to == "lora" or want.rank is not None)):
        return None
    if isinstance(first.algorithm, Full | Norm) or (isinstance(first.algorithm, IA3) and len(names) == 1):
        if want.to == "full" and isinstance(first.algorithm, IA3):
            return None
        tensors: dict[str, Tensor] = {}
        for record, strength in terms:
            for name, t in record.params.tensors.items():
                tensors[name] = tensors[name] + t * strength if name in tensors else t * strength
        return replace(first, params=Params(tensors, first.params.scale))
    is_bare = "q" in first.params.tensors and "base_q" not in first.params.tensors  # a T-LoRA less its beginnings
    if len(terms) == 1 and want.to is None and isinstance(first.algorithm, SCALED) and not is_bare:
        return _scaled(first, terms[0][1])
    return None


def _size(record: Record) -> float:
    """|W' - W|, where it takes no weight to know it."""
    algorithm, p = record.algorithm, record.params
    if record.site.experts or not algorithm.is_fixed(p):
        return 0.0
    return float(algorithm.size(p, next(iter(p.tensors.values())).new_zeros(record.site.shape)))


def _scaled(record: Record, strength: float) -> Record:
    record = (plain(record) or record) if isinstance(record.algorithm, LoRA) else record
    carriers = record.algorithm.layout_of(record.params.tensors).carriers
    changed = {name: record.params.tensors[name] * strength for name in carriers}
    return replace(record, params=record.params.replaced(**changed))


def _factored(path: str, terms: Terms, base: Base | None, want: Blend) -> Blended | None:
    """Low-rank products side by side; None where one of them is no such product."""
    weight: Any = None if base is None else base.weight
    found = []
    for record, strength in terms:
        if isinstance(record.algorithm, DoRA):
            return None
        factors = factors_of(record, weight, path)
        if factors is None:
            return None
        found.append((factors[0] * strength, factors[1]))
    up, down = stacked(found)
    site = terms[0][0].site
    most = None if want.method == "concat" else want.rank
    if most is None and up.shape[1] <= min(site.shape[0], site.flat):
        return Blended(as_lora(up, down, site), "exact", 0.0, float(low_rank_size(up, down)))
    whole = spectrum(up, down)
    rank = min(most or len(whole.s), len(whole.s))
    record, size = as_lora(*halves(whole, rank), site), float(whole.total.sqrt())
    if size <= DUST * sum(float(low_rank_size(*factors)) for factors in found):
        return Blended(record, "exact", 0.0, 0.0, "they cancel: what is left is rounding")
    error = loss(whole.s, rank)
    return Blended(record, "fitted" if rank < len(whole.s) else "exact", error, size)


def _dense(path: str, terms: Terms, base: Base | None, want: Blend) -> Blended:
    weight: Any = None if base is None else base.weight
    if want.to is None and want.rank is None:
        kinds = " + ".join(kind_of(record.algorithm) for record, _ in terms)
        raise OptionError(
            f"{path}: {kinds} is no low-rank product. Say what to make of it: the full difference (to full, exact), or "
            "a LoRA of some rank (to lora, rank)"
        )
    changes = [change_in(record, weight, path) for record, _ in terms]
    strengths = [strength for _, strength in terms]
    method = {"dare": "dare_linear"}.get(want.method, "linear" if want.is_sum else want.method)
    rng = torch.Generator().manual_seed(zlib.crc32(f"{want.seed} {path}".encode()))
    total = vote(method, changes, strengths, density=want.density, sign=want.sign, rng=rng)
    shift = _shift(terms)
    site, size = terms[0][0].site, float(total.norm())
    if want.to == "full":
        tensors = {"diff": total, **({} if shift is None else {"diff_b": shift})}
        return Blended(Record(Full(), site, Params(tensors)), "exact", 0.0, size)
    if want.rank is None:
        raise OptionError(f"{path}: its sum is no low-rank product and can only be fitted: give a rank")
    up, down, error, size = best_of(total.flatten(1), want.rank, None)
    lost = 0.0 if shift is None else float(shift.norm())
    note = f"its change of the bias (size {lost:.2g}) has no place in a LoRA: left out" if lost else ""
    return Blended(as_lora(up, down, site), "fitted", error, size, note)


def _shift(terms: Terms) -> Tensor | None:
    total: Tensor | None = None
    for record, strength in terms:
        shift = record.algorithm.shift(record.params)
        if shift is not None:
            total = shift * strength if total is None else total + shift * strength
    return total
