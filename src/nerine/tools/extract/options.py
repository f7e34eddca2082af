"""What a layer can have: adapters of several algorithms and sizes, each with its bytes and the error that it leaves.

Errors are squares |W' - target|² over all entries. Where singular values tell them, nothing is fitted: a LoRA of any
rank leaves the rest of the squares, a Kronecker product that of the rearranged difference; the rounding of the factors
is added. What has no such rule is fitted and measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from nerine.algorithms import IA3, Algorithm, DiagOFT, Full, LoHa, LoKr, LoRA, Params
from nerine.ops.kron import nearest_kron
from nerine.ops.low_rank_fit import spectrum
from nerine.ops.precision import full_precision
from nerine.ops.tucker_fit import kept_squares
from nerine.site import Site
from nerine.tools.budget import Option
from nerine.tools.extract.noise import square
from nerine.tools.extract.plan import Plan
from nerine.tools.extract.prices import Price

__all__ = ["Case", "Catalogue", "catalogue", "error_of", "rounded"]

ROUNDING = 0.2  # of the spacing of numbers around one: the usual error of rounding, relative to the number
FACTORS = (2, 4, 8, 16, 32)  # of LoKr
LOKR_RANKS = (1, 2, 4, 8, 16, 32, 64)  # of its second factor, where that is not whole
BLOCKS = (4, 8, 16, 32)  # of Diag-OFT
LOHA_RANKS = (2, 4, 8, 16)  # each takes an iteration to fit
EXACT = frozenset({"magnitude"})  # not rounded


@dataclass
class Case:
    """One layer while its options are looked for: weight and difference `[out, in, *k]` in at least fp32."""

    site: Site
    weight: Tensor
    change: Tensor
    price: Price
    moves_bias: bool = False

    @cached_property
    def total(self) -> float:
        """|D|²."""
        return float(
            self.change.double().square().sum() if self.change.device.type != "mps" else self.change.square().sum()
        )

    @cached_property
    def values(self) -> Tensor:
        """The singular values of D, all of them, largest first, in fp64."""
        return spectrum(self.change.flatten(1)).cpu().double()

    @property
    def unit(self) -> float:
        """What rounding one number costs, as a share of its square."""
        return (ROUNDING * torch.finfo(self.price.dtype).eps) ** 2


@dataclass(frozen=True)
class Catalogue:
    """The options of a layer, the first of which is to have nothing, and what each of them is."""

    options: Sequence[Option]
    makers: Sequence[Callable[[], Algorithm] | None]

    def algorithm(self, option: int) -> Algorithm | None:
        """That of an option; None for nothing."""
        make = self.makers[option]
        return None if make is None else make()


Found = Iterator[tuple[Algorithm, float]]


def catalogue(case: Case, plan: Plan, most: int, refused: Callable[[Algorithm], bool]) -> Catalogue:
    """The options of a layer that take at most `most` bytes; `refused` says what the dialect cannot hold there."""
    options = [Option(0, case.total)]
    makers: list[Callable[[], Algorithm] | None] = [None]
    for template in plan.templates:
        if template.unsuited(case.site) or refused(plan.around(template)):
            continue
        own = _ranks(case, template, plan) if isinstance(template, LoRA) else _others(case, template, plan)
        for option, make in own:
            if option.bytes <= most and option.error < case.total:
                options.append(option)
                makers.append(make)
    return Catalogue(options, makers)


def _others(case: Case, template: Algorithm, plan: Plan) -> Iterator[tuple[Option, Callable[[], Algorithm]]]:
    for algorithm, error in FAMILIES[template.name](case, template):
        whole = plan.around(algorithm)
        yield Option(case.price.of(whole, case.site, case.moves_bias), error), partial(plan.around, algorithm)


def _ranks(case: Case, template: LoRA, plan: Plan) -> Iterator[tuple[Option, Callable[[], Algorithm]]]:
    """A LoRA of every rank. There are thousands of them, so that only what is chosen is made."""

    def made(rank: int) -> Algorithm:
        return plan.around(replace(template, rank=rank))

    site, total = case.site, case.total
    has_core = template.tucker and not site.pointwise
    first, second = (case.price.of(made(rank), site) for rank in (1, 2))
    kept = kept_squares(case.change).cpu() if has_core else case.values.square().cumsum(0)
    for rank, own in enumerate(kept[: min(site.shape[0], site.flat)].tolist(), 1):
        size = case.price.of(made(rank), site) if has_core else first + (rank - 1) * (second - first)
        rest = max(total - own, 0.0) + 2 * case.unit * min(own, total)
        yield Option(size, rest), partial(made, rank)


def error_of(algorithm: Algorithm, params: Params, weight: Tensor, change: Tensor) -> float:
    """|W' - target|² of these tensors, as they are."""
    with torch.no_grad(), full_precision(weight):
        rest = algorithm.weight_deviation(params, weight) - change
    return square(rest)


def rounded(params: Params, dtype: torch.dtype) -> Params:
    """The tensors as a file in that format gives them back."""
    tensors = {name: t if name in EXACT else t.to(dtype).to(t.dtype) for name, t in params.tensors.items()}
    return Params(tensors, params.scale)


def _measured(case: Case, algorithm: Algorithm) -> float:
    params = rounded(algorithm.fit(case.site, case.weight, case.weight + case.change), case.price.dtype)
    return error_of(algorithm, params, case.weight, case.change)


# -- one function a family ---------------------------------------------------------------------------------------------
def _lokr(case: Case, template: LoKr) -> Found:
    """Each factor, with the second factor whole or of some ranks. Ranks that are as good as whole are kept under their
    own name, so that one setting can be compared over all layers."""
    known: dict[tuple[int, int], tuple[float, Tensor]] = {}
    for factor in FACTORS if template.factor == -1 else (template.factor,):
        whole = replace(template, factor=factor, full_matrix=True, decompose_both=False, tucker=False)
        sizes = whole.design(case.site).sizes
        split = sizes["a"], sizes["c"]
        if split not in known:
            w1, w2 = nearest_kron(case.change, split, case.site.kernel)
            known[split] = square(w1), spectrum(w2.flatten(1)).cpu().double().square()
        first, second = known[split]
        rest = max(case.total - first * float(second.sum()), 0.0)
        most = rest + 2 * case.unit * (case.total - rest)
        yield whole, most
        for rank in LOKR_RANKS:
            own = replace(whole, rank=rank, full_matrix=False)
            kept = first * float(second[:rank].sum())
            is_whole = 2 * rank >= max(sizes["b"], sizes["d"])
            yield own, most if is_whole else max(case.total - kept, 0.0) + 3 * case.unit * kept


def _loha(case: Case, template: LoHa) -> Found:
    for rank in LOHA_RANKS:
        if rank <= min(case.site.shape[0], case.site.flat):
            own = replace(template, rank=rank)
            yield own, _measured(case, own)


def _ia3(case: Case, template: IA3) -> Found:
    for on_input in (False, True):
        own = replace(template, on_input=on_input)
        yield own, _measured(case, own)


def _diag_oft(case: Case, template: DiagOFT) -> Found:
    for size in BLOCKS if template == DiagOFT() else (template.block_size,):
        own = replace(template, block_size=size)
        if not own.unsuited(case.site):
            yield own, _measured(case, own)


def _full(case: Case, template: Full) -> Found:
    rest = case.change - case.change.to(case.price.dtype).to(case.change.dtype)
    yield replace(template, bias=case.moves_bias), square(rest)


FAMILIES: Mapping[str, Callable[[Case, Any], Found]] = {
    "lokr": _lokr,
    "loha": _loha,
    "ia3": _ia3,
    "diag-oft": _diag_oft,
    "full": _full,
}
