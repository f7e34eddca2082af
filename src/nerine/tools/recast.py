"""One layer as another algorithm: exactly where the two meet, else as near as the other one comes.

A DoRA stays around what it is around, its magnitudes as they are, where the other algorithm can be in it; else it is
multiplied in, for which the weight of the layer is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nerine.algorithms import (
    REGISTRY,
    Algorithm,
    DoRA,
    DyLoRA,
    Full,
    GLoRA,
    LoHa,
    LoKr,
    LoRA,
    Norm,
    Params,
    TLoRA,
    build,
)
from nerine.errors import FormatError, NerineError, OptionError, nearest
from nerine.files.checkpoint import Base, Record
from nerine.ops.factored import halves, least_rank, loss
from nerine.ops.low_rank_fit import leading, leading_until, within
from nerine.ops.precision import wide
from nerine.ops.row_norm import low_rank_size
from nerine.tools.exact import (
    around,
    as_lora,
    change_in,
    check_kernel,
    factors_of,
    from_factors,
    inside,
    kind_of,
    rank_in,
    spectrum_of,
)

__all__ = ["RecastRow", "Wanted", "low_rank_of", "recast", "totals", "wanted"]

DECOMPOSED = (LoRA, DyLoRA, LoHa, LoKr, GLoRA)  # what a DoRA may stay around
FACTORED = (LoRA, DyLoRA)  # what any product of two factors is, whatever its rank


@dataclass(frozen=True)
class Wanted:
    """What the layers are to become: an algorithm with `settings`, of a `rank` or within the relative error `tol`."""

    kind: type[Algorithm]
    rank: int | None = None
    tol: float | None = None
    dora: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_free(self) -> bool:
        """Whether whatever computes the same will do."""
        return self.rank is None and self.tol is None and not self.settings

    @property
    def algorithm(self) -> Algorithm:
        rank = {} if self.rank is None else {"rank": self.rank}
        return build({"algorithm": self.kind.name, **rank, **self.settings})


@dataclass(frozen=True)
class RecastRow:
    """What became of one layer. `method` is "kept", "exact" or "fitted"; `error` the relative error of the change, of
    what DoRA is around where that stays, and `size` that change itself."""

    layer: str
    before: str
    rank_before: int | None
    after: str
    rank: int | None
    method: str
    error: float = 0.0
    size: float = 0.0
    note: str = ""


def wanted(
    to: str, rank: int | None, tol: float | None, dora: bool = True, settings: Mapping[str, Any] | None = None
) -> Wanted:
    """The settings of a conversion, checked.

    Raises:
        OptionError: no such algorithm, or settings that it does not take.
    """
    if to == "locon":
        to = "lora"
    if to not in REGISTRY:
        raise OptionError(f"to: no algorithm is called {to!r}. {nearest(to, REGISTRY)}")
    kind = REGISTRY[to]
    if kind in (TLoRA, Norm):
        why = "starts on its base" if kind is TLoRA else "is for normalisation layers, which are left as they are"
        raise OptionError(f"to: nothing is converted to {to}, which {why}; choose lora, loha, lokr, full, ...")
    if tol is not None and kind not in FACTORED:
        raise OptionError(f"tol: a rank within an error is found for lora alone; give {to} a rank")
    if tol is not None and not 0 <= tol < 1:
        raise OptionError(f"tol: expected a relative error from 0 to 1, got {tol!r}")
    if tol is not None and rank is not None:
        raise OptionError("give a rank or tol, not both")
    others = set(settings or {}) - {"block_size"}
    if kind in FACTORED and others:
        raise OptionError(
            f"{to} is written at alpha = rank and needs no settings; leave out {', '.join(sorted(others))}"
        )
    found = Wanted(kind, rank, tol, dora, dict(settings or {}))
    _ = found.algorithm  # settings that it does not take are refused here
    return found


def totals(rows: list[RecastRow] | tuple[RecastRow, ...]) -> tuple[float, float]:
    """The largest relative error of a layer, and that of all layers together."""
    whole = sum(row.size**2 for row in rows)
    lost = sum((row.error * row.size) ** 2 for row in rows)
    return max((row.error for row in rows), default=0.0), (lost / whole) ** 0.5 if whole else 0.0


@torch.no_grad()
def recast(path: str, record: Record, base: Base | None, want: Wanted) -> tuple[Record, RecastRow]:
    """The adapter of a layer as what is wanted, and what that took.

    Raises:
        FormatError: it depends on a weight that is not at hand, or cannot become that.
        OptionError: it can only be fitted, and neither a rank nor an error was given.
    """
    own = inside(record)
    if isinstance(own.algorithm, Norm) or (isinstance(own.algorithm, Full) and "diff" not in own.params.tensors):
        return record, _row(path, record, record, "kept")
    stays = want.dora and want.kind in DECOMPOSED
    whole = record is own or stays
    is_plain = {"mid", "base_down"}.isdisjoint(own.params.tensors)
    if whole and type(own.algorithm) is want.kind and (is_plain or want.kind is not LoRA):
        small = want.kind is LoRA and want.rank is not None and (rank_in(own) or 0) <= want.rank
        if want.is_free or small:
            return record, _row(path, record, record, "kept")
    if record.site.experts:
        raise FormatError(f"{path}: it holds {record.site.experts} experts, which are not converted to another kind")
    check_kernel(path, record, base)
    if want.kind is Full:
        return _full(path, record, base)
    source = own if stays else record
    try:
        found, method, error, size = _low(path, source, base, want)
    except NerineError as error_:
        raise error_ if str(error_).startswith(path) else type(error_)(f"{path}: {error_}") from None
    note = "" if own.algorithm.shift(own.params) is None else _lost_bias(own, want)
    after = around(record, found) if stays else found
    return after, _row(path, record, after, method, error, size, note)


def _row(
    path: str,
    before: Record,
    after: Record,
    method: str,
    error: float = 0.0,
    size: float = 0.0,
    note: str = "",
) -> RecastRow:
    names = kind_of(before.algorithm), kind_of(after.algorithm)
    return RecastRow(path, names[0], rank_in(before), names[1], rank_in(after), method, error, size, note)


def _lost_bias(own: Record, want: Wanted) -> str:
    shift = own.algorithm.shift(own.params)
    size = 0.0 if shift is None else float(shift.norm())
    return f"its change of the bias (size {size:.2g}) has no place in {want.kind.__name__}: left out" if size else ""


def _weight(base: Base | None) -> Any:
    return None if base is None else base.weight


def _full(path: str, record: Record, base: Base | None) -> tuple[Record, RecastRow]:
    change = change_in(record, _weight(base), path)
    shift = record.algorithm.shift(record.params)
    tensors = {"diff": change, **({} if shift is None else {"diff_b": shift})}
    found = Record(Full(), record.site, Params(tensors))
    return found, _row(path, record, found, "exact", size=float(change.norm()))


def _low(path: str, source: Record, base: Base | None, want: Wanted) -> tuple[Record, str, float, float]:
    """The adapter, how it was found, the relative error, and the size of the change."""
    site = source.site
    if want.kind in FACTORED and not want.is_free:
        up, down, error, size = low_rank_of(path, source, base, want.rank, want.tol)
        if want.kind is DyLoRA:
            return _as_dylora(up, down, source, want), "fitted" if error else "exact", error, size
        return as_lora(up, down, site), "fitted" if error else "exact", error, size
    factors = None
    if want.is_free:
        factors = factors_of(source, _weight(base), path) if not isinstance(source.algorithm, DoRA) else None
        found = None if factors is None else from_factors(want.kind, *factors, site)
        if found is not None and factors is not None:
            return found, "exact", 0.0, float(low_rank_size(*factors))
        if want.kind in DECOMPOSED:
            raise OptionError(
                f"{path}: {kind_of(source.algorithm)} is no low-rank product, and can only be fitted: give a rank"
                f"{' or the error that is allowed (tol)' if want.kind in FACTORED else ''}"
            )
    return _fitted(path, source, base, want)


def _as_dylora(up: Tensor, down: Tensor, source: Record, want: Wanted) -> Record:
    plain = as_lora(up, down, source.site)  # its ranks stand in the order of their size already
    return Record(DyLoRA(**{**dict(want.settings), "rank": up.shape[1]}), source.site, plain.params)


def low_rank_of(
    path: str, source: Record, base: Base | None, rank: int | None, tol: float | None
) -> tuple[Tensor, Tensor, float, float]:
    """The best up and down of a rank, or of the least rank within an error, for the change of an adapter; the relative
    error that is left, and the size of the change."""
    found = None if isinstance(source.algorithm, DoRA) else spectrum_of(source, _weight(base), path)
    if found is not None:
        kept = min(len(found.s), rank) if rank is not None else least_rank(found.s, tol or 0.0)
        rounding = found.s[:1] * (torch.finfo(found.s.dtype).eps * len(found.s))
        kept = min(kept, max(1, int((found.s > rounding).sum())))
        return *halves(found, kept), loss(found.s, kept), float(found.total.sqrt())
    change = change_in(source, _weight(base), path).flatten(1)
    return best_of(change, rank, tol)


def best_of(matrix: Tensor, rank: int | None, tol: float | None) -> tuple[Tensor, Tensor, float, float]:
    """The best up and down of a rank, or of the least rank within an error, for a dense matrix; the relative error, and
    the size of the matrix."""
    found = leading_until(matrix, within(tol or 0.0)) if rank is None else leading(matrix, rank)
    found = found if found.rank else leading(matrix, 1)
    return *found.halves(), found.rest / found.total if found.total else 0.0, found.total


def _fitted(path: str, source: Record, base: Base | None, want: Wanted) -> tuple[Record, str, float, float]:
    """By the closed form that the other algorithm has for a given weight."""
    algorithm, site = want.algorithm, source.site
    why = algorithm.unsuited(site)
    if why:
        raise FormatError(f"{path}: {why}; leave it out or choose another algorithm")
    change = change_in(source, _weight(base), path)
    shapes = algorithm.design(site).shapes
    is_fixed = algorithm.is_fixed(Params({name: change.new_empty(shape) for name, shape in shapes.items()}))
    if base is None and not is_fixed:
        raise FormatError(f"{path}: {kind_of(algorithm)} is fitted beside the weight; give the base with --base")
    # beside a weight, what is small of the change would be lost to rounding
    weight = torch.zeros_like(change) if is_fixed or base is None else wide(base.weight()).to(change)
    params = algorithm.fit(site, weight, weight + change)
    off = algorithm.weight_deviation(params, weight) - change
    size = float(change.norm())
    return Record(algorithm, site, params), "fitted", float(off.norm()) / size if size else 0.0, size
