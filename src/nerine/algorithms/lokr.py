"""LoKr: a Kronecker product beside the weight.   delta = w1 ⊗ w2,   out = a·b,   in = c·d

Either factor may itself be a low-rank product. Training applies the factors one after the other to the channels:
two small products, never one of the weight's size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from nerine.algorithms.base import FLOOR, Call, Design, Params, Sandwich, scaled
from nerine.algorithms.settings import check_alpha, check_flag, check_rank, scale_of
from nerine.axes import Layout, Shape, Sizes, Spec
from nerine.errors import OptionError
from nerine.ops.kron import add_kron, factorize, kron, kron_row_norm, mix_channels
from nerine.ops.kron_fit import low_rank_kron
from nerine.ops.precision import full_precision, same_dtype, wide
from nerine.ops.recompute import contract
from nerine.ops.tucker import tucker
from nerine.site import Site

__all__ = ["LoKr"]

_W1 = {
    "full": {"w1": Spec("a c", "lokr_w1", carrier=True)},
    "pair": {"w1_a": Spec("a rank", "lokr_w1_a", carrier=True), "w1_b": Spec("rank c", "lokr_w1_b")},
}
_W2 = {
    "full": {"w2": Spec("b d *k", "lokr_w2", init="zeros", gate="b")},
    "pair": {
        "w2_a": Spec("b rank", "lokr_w2_a", gate="rank"),
        "w2_b": Spec("rank flat", "lokr_w2_b", init="zeros"),
    },
    "tucker": {
        "t2": Spec("rank rank *k", "lokr_t2"),
        "w2_a": Spec("rank b", "lokr_w2_a", gate="rank"),
        "w2_b": Spec("rank d", "lokr_w2_b", init="zeros"),
    },
}
_RELATIONS = ("out = a b", "in = c d")
_LAYOUTS = {
    (one, two): Layout({**_W1[one], **_W2[two]}, (*_RELATIONS, "flat = d *k") if two == "pair" else _RELATIONS)
    for one in _W1
    for two in _W2
}


@dataclass(frozen=True, kw_only=True)
class LoKr(Sandwich):
    """W' = W + scale·(w1 ⊗ w2), with w1 `[a, c]`, w2 `[b, d, *k]`, out = a·b and in = c·d.

    `factor` asks for the size of the smaller factors a and c (-1: nearest to the square root). w2 is a low-rank product
    unless `full_matrix` is set or the rank is at least half its larger side; w1 only with `decompose_both`, by the
    same rule. `unbalanced` gives w1 the larger part of the outputs. Where no factor is low-rank there is no rank to
    divide by: scale is 1 and alpha has no effect, as every reader of such files has it.
    Source: Edalati et al. (KronA), arXiv:2212.10650; Yeh et al., arXiv:2309.14859.
    """

    name = "lokr"
    source = "Yeh et al., arXiv:2309.14859"
    passes = 18
    rank: int = 16
    alpha: float | None = None
    factor: int = -1
    decompose_both: bool = False
    full_matrix: bool = False
    unbalanced: bool = False
    tucker: bool = False
    scalar: bool = False
    rs: bool = False

    def __post_init__(self) -> None:
        check_rank("LoKr", self.rank)
        check_alpha("LoKr", self.alpha)
        check_flag("LoKr", decompose_both=self.decompose_both, full_matrix=self.full_matrix, rs=self.rs)
        check_flag("LoKr", unbalanced=self.unbalanced, tucker=self.tucker, scalar=self.scalar)
        if isinstance(self.factor, bool) or not isinstance(self.factor, int) or self.factor == 0 or self.factor < -1:
            raise OptionError(
                f"LoKr: factor must be -1 (square root) or a whole number of at least 1, got {self.factor!r}"
            )

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return tuple(_LAYOUTS.values())

    def _split(self, site: Site) -> Sizes:
        out, inputs = site.shape[:2]
        a, b = factorize(out, self.factor)
        c, d = factorize(inputs, self.factor)
        if self.unbalanced:
            a, b = b, a
        return {**site.sizes, "a": a, "b": b, "c": c, "d": d}

    def design(self, site: Site) -> Design:
        sizes = self._split(site)
        pair_1 = self.decompose_both and not self.full_matrix and self.rank < max(sizes["a"], sizes["c"]) / 2
        pair_2 = not self.full_matrix and self.rank < max(sizes["b"], sizes["d"]) / 2
        one = "pair" if pair_1 else "full"
        two = ("tucker" if self.tucker and not site.pointwise else "pair") if pair_2 else "full"
        if two == "pair":
            sizes["flat"] = sizes["d"] * (site.dense // (site.shape[0] * site.shape[1]))
        note = ""
        if pair_1 or pair_2:
            sizes["rank"] = self.rank
        elif self.alpha is not None and self.alpha != self.rank:
            note = "both factors are full: alpha has no effect"
        scale = scale_of(self.rank, self.alpha, self.rs) if pair_1 or pair_2 else 1.0
        return Design(_LAYOUTS[one, two], sizes, scale, self.scalar, note)

    @staticmethod
    def _w1(p: Params) -> Tensor:
        t = p.tensors
        if "w1" in t:
            return t["w1"]
        with full_precision(t["w1_a"]):
            return p.once("w1", lambda: t["w1_a"] @ t["w1_b"])

    @staticmethod
    def _w2(p: Params, kernel: Shape) -> Tensor:
        t = p.tensors
        if "w2" in t:
            return t["w2"]

        def product() -> Tensor:
            with full_precision(t["w2_a"]):
                if "t2" in t:
                    return tucker(t["t2"], t["w2_a"].mT, t["w2_b"])
                return (t["w2_a"] @ t["w2_b"]).reshape(t["w2_a"].shape[0], -1, *kernel)

        return p.once("w2", product)

    def delta(self, p: Params, shape: Shape) -> Tensor:
        return kron(self._w1(p), self._w2(p, shape[2:]))

    def weight(self, p: Params, weight: Tensor) -> Tensor:
        return add_kron(wide(weight), scaled(self._w1(p), p.scale), self._w2(p, tuple(weight.shape[2:])))

    def output(self, p: Params, call: Call) -> Tensor:
        return super().output(p, call) if call.sink is None else self._apply(p, call, call.sink)

    def add(self, p: Params, call: Call) -> Tensor:
        return super().add(p, call) if call.site.groups > 1 else self._apply(p, call)

    def _apply(self, p: Params, call: Call, into: Tensor | None = None) -> Tensor:
        """The factors one after the other on the channels; the result is added to `into` where that is given."""
        site = call.site
        w1, w2 = scaled(self._w1(p), p.scale), self._w2(p, site.kernel)
        if site.kind == "embedding":  # token c·d + i is row c of w1ᵀ beside row i of w2ᵀ
            size = w2.shape[1]
            rows = w1.mT[call.x // size][..., :, None] * w2.mT[call.x % size][..., None, :]
            return rows.flatten(-2)
        fine = replace(site, shape=tuple(w2.shape))  # w2 as a layer of its own, applied once for every row of w1
        batched = bool(site.kernel) and call.x.dim() == len(site.kernel) + 2

        def mixed(x: Tensor, w1: Tensor, _: Tensor) -> Tensor:
            h = mix_channels(x, same_dtype(w1, x), site.channel)
            return fine.prepared(h.flatten(0, 1) if batched else h)

        y = contract(fine, call.x, lambda _, w2: w2, [w1, w2], mixed, into=into)
        if into is not None:
            return y
        if site.kind == "linear":
            return y.flatten(-2)  # [..., a, b]
        return y.unflatten(0, (-1, w1.shape[0])).flatten(1, 2) if batched else y.flatten(0, 1)

    def fit(self, site: Site, weight: Tensor, target: Tensor) -> Params:
        """The nearest Kronecker product; where a factor is of low rank, the two are fitted in turns."""
        design = self.design(site)
        shapes, sizes = design.shapes, design.sizes
        if "t2" in shapes:
            raise OptionError("LoKr: a Tucker core is not fitted; leave tucker out")
        change = (wide(target) - wide(weight)) / design.scale
        rank_1, rank_2 = (None if name in shapes else self.rank for name in ("w1", "w2"))
        first, second = low_rank_kron(change, (sizes["a"], sizes["c"]), (rank_1, rank_2))
        names = [name for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b") if name in shapes]
        pairs = zip(names, (*first, *second), strict=True)
        return Params({name: t.reshape(shapes[name]) for name, t in pairs}, design.scale)

    def row_norm(self, p: Params, weight: Tensor) -> Tensor:
        w1, w2 = scaled(self._w1(p), p.scale), self._w2(p, tuple(weight.shape[2:]))
        return kron_row_norm(weight, w1, w2, FLOOR)

    def cost(self, site: Site, design: Design) -> int:
        if site.groups > 1:
            return site.dense
        s = design.sizes
        taps = site.dense // (site.shape[0] * site.shape[1])
        return s["a"] * s["c"] * s["d"] + s["a"] * s["b"] * s["d"] * taps
