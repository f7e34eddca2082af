"""One adapter as another that computes the same: whatever is a low-rank product as a LoRA, and a LoRA as whatever holds
one.

    LoHa     (A₁·B₁)∘(A₂·B₂)       rank r², rows and columns of the factors paired (Tucker cores taken into the downs)
    LoKr     w1 ⊗ w2               rank(w1)·rank(w2)
    GLoRA    W·a1·a2 + b1·b2       [W·a1 | b1]·[a2 ; b2]; on a convolution each tap of W·a1 is a rank of its own
    T-LoRA, DyLoRA, Tucker LoRA    as they define it
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from nerine.algorithms import Algorithm, DoRA, DyLoRA, GLoRA, LoHa, LoKr, LoRA, LowRank, Params
from nerine.errors import FormatError
from nerine.files.checkpoint import Base, Layer, Record
from nerine.model.adapter import weight_deviation
from nerine.ops.factored import (
    Spectrum,
    balanced,
    dense_spectrum,
    kron_factors,
    kron_spectrum,
    spectrum,
    split_matrix,
)
from nerine.ops.khatri_rao import paired_columns, paired_rows
from nerine.ops.precision import is_finite, wide
from nerine.ops.tucker import tucker_in
from nerine.site import Site
from nerine.tools.weights import no_base

__all__ = [
    "around",
    "as_lora",
    "brought",
    "change_in",
    "check_kernel",
    "factors_of",
    "from_factors",
    "inside",
    "kept_dtype",
    "kind_of",
    "kron_parts",
    "rank_in",
    "spectrum_of",
]

Weight = Callable[[], Tensor] | None
Factors = tuple[Tensor, Tensor]

# Layers that are convolutions of more than one tap by their names, in the models whose adapters hide the kernel.
_CONV = re.compile(r"(^|[._])(conv\d?(?!_shortcut)|in_layers|out_layers|op|input_blocks[._]0[._]0|out[._]2)([._]|$)")


def inside(record: Record) -> Record:
    """What a DoRA is around, or the adapter itself."""
    if not isinstance(record.algorithm, DoRA):
        return record
    return replace(record, algorithm=record.algorithm.inner, params=record.params.without("magnitude"))


def around(record: Record, inner: Record) -> Record:
    """`inner` with the DoRA of `record` around it, where that has one."""
    if not isinstance(record.algorithm, DoRA):
        return inner
    tensors = {"magnitude": record.params.tensors["magnitude"], **inner.params.tensors}
    algorithm = replace(record.algorithm, inner=inner.algorithm)
    return Record(algorithm, inner.site, Params(tensors, inner.params.scale))


def rank_in(record: Record) -> int | None:
    """The rank of an adapter by its tensors; None where it has none."""
    own = inside(record)
    layout = own.algorithm.layout_of(own.params.tensors)
    for name, spec in layout.specs.items():
        if "rank" in spec.words:
            return int(own.params.tensors[name].shape[spec.words.index("rank") + bool(own.site.experts)])
    return None


def kind_of(algorithm: Algorithm) -> str:
    """What an algorithm is called in reports, its settings aside."""
    if isinstance(algorithm, DoRA):
        return f"DoRA({kind_of(algorithm.inner)})"
    return type(algorithm).__name__


def kept_dtype(layer: Layer, asked: torch.dtype | None) -> torch.dtype:
    """The number format in which a layer is written: the one that is asked for, or that of its tensors."""
    if asked is not None:
        return asked
    own = [dtype for name, dtype in layer.dtypes.items() if name != "magnitude"]
    found = max(own, key=lambda dtype: dtype.itemsize, default=torch.float32)
    return found if found.itemsize > 1 else torch.bfloat16


def brought(layer: Layer, path: str, device: str | torch.device) -> Record:
    """The adapter of a layer in memory, in at least fp32, on a device.

    Raises:
        FormatError: a number in it is none.
    """
    record = layer.record()
    tensors = {name: wide(t).to(device) for name, t in record.params.tensors.items()}
    for name, t in tensors.items():
        if not is_finite(t):
            raise FormatError(f"{path}: {name} has entries that are no numbers; the file is damaged")
    return replace(record, params=Params(tensors, record.params.scale))


def check_kernel(path: str, record: Record, base: Base | None) -> None:
    """Refuse to take a convolution for a linear layer, whose taps some algorithms fold into the inputs.

    Raises:
        FormatError: the layer is a convolution by its name, and neither tensors nor a base tell its kernel.
    """
    own = inside(record)
    relations = own.algorithm.layout_of(own.params.tensors).relations
    if base is None and record.site.kind == "linear" and any("*k" in r for r in relations) and _CONV.search(path):
        raise no_base(path, "the kernel of this convolution")


def kron_parts(record: Record) -> tuple[Tensor | Factors, Tensor | Factors]:
    """w1 `[a, c]` with the scale in it and w2 `[b, d·Πk]`, each whole or as two factors."""
    t, scale = record.params.tensors, record.params.scale
    one = t["w1"] * scale if "w1" in t else (t["w1_a"] * scale, t["w1_b"])
    if "w2" in t:
        return one, t["w2"].flatten(1)
    if "t2" in t:
        return one, (t["w2_a"].mT, tucker_in(t["t2"], t["w2_b"]).flatten(1))
    return one, (t["w2_a"], t["w2_b"])


def _inputs_of_w2(record: Record) -> int:
    """d: how many input channels the second factor of a Kronecker product has."""
    t = record.params.tensors
    c = t["w1"].shape[1] if "w1" in t else t["w1_b"].shape[1]
    return record.site.shape[1] // int(c)


@torch.no_grad()
def factors_of(record: Record, weight: Weight = None, path: str = "") -> Factors | None:
    """up `[out, rank]` with the scale in it and down `[rank, in·Πk]`, whose product is the change that an adapter
    without DoRA makes; None where it is no low-rank product.

    Raises:
        FormatError: the weight is needed, and not at hand.
    """
    algorithm, p = record.algorithm, record.params
    if record.site.experts or isinstance(algorithm, DoRA):
        return None
    if isinstance(algorithm, LowRank):
        if "q" in p.tensors and "base_q" not in p.tensors:
            raise no_base(path, "what a T-LoRA started from")
        up, down = algorithm.factors(p)
        return up, down.flatten(1)
    if isinstance(algorithm, LoHa):
        return balanced(*_of_loha(p))
    if isinstance(algorithm, LoKr):
        one, two = kron_parts(record)
        pairs = [part if isinstance(part, tuple) else split_matrix(part) for part in (one, two)]
        return balanced(*kron_factors(pairs[0], pairs[1], _inputs_of_w2(record)))
    if isinstance(algorithm, GLoRA):
        if weight is None:
            raise no_base(path, "what GLoRA changes")
        return balanced(*_of_glora(p, wide(weight()).to(p.tensors["a1"].device)))
    return None


def _of_loha(p: Params) -> Factors:
    t = p.tensors
    if "t1" in t:
        b1, b2 = (tucker_in(t[f"t{i}"], t[f"w{i}_b"]).flatten(1) for i in (1, 2))
        up = paired_rows(t["w1_a"].mT, t["w2_a"].mT * p.scale)
    else:
        b1, b2 = t["w1_b"], t["w2_b"]
        up = paired_rows(t["w1_a"], t["w2_a"] * p.scale)
    out, inputs = up.shape[0], b1.shape[1]
    if up.shape[1] <= min(out, inputs):
        return up, paired_columns(b1, b2)
    a1, a2 = (t["w1_a"].mT, t["w2_a"].mT) if "t1" in t else (t["w1_a"], t["w2_a"])
    matrix = (a1 @ b1) * (a2 @ b2) * p.scale  # a product of as many ranks as it has rows is no smaller
    ones = torch.diag(torch.ones_like(matrix[:, 0] if out <= inputs else matrix[0]))
    return (ones, matrix) if out <= inputs else (matrix, ones)


def _of_glora(p: Params, weight: Tensor) -> Factors:
    a1, a2, b1, b2 = (p.tensors[name].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    by_tap = weight.flatten(2) if weight.dim() > 2 else weight[..., None]
    inputs, taps = by_tap.shape[1:]
    first = torch.matmul(a1.mT * p.scale, by_tap).flatten(1)  # [out, rank·taps]
    eye = torch.diag(torch.ones_like(a2[0, :1]).expand(taps))
    through = (a2[:, None, :, None] * eye[None, :, None, :]).reshape(-1, inputs * taps)
    return torch.cat([first, b1 * p.scale], 1), torch.cat([through, b2])


@torch.no_grad()
def spectrum_of(record: Record, weight: Weight = None, path: str = "") -> Spectrum | None:
    """Singular values and vectors of the change of a low-rank adapter without DoRA; None where it is no such."""
    if isinstance(record.algorithm, LoKr) and not record.site.experts:
        one, two = kron_parts(record)
        found = [spectrum(*part) if isinstance(part, tuple) else dense_spectrum(part) for part in (one, two)]
        return kron_spectrum(found[0], found[1], _inputs_of_w2(record))
    factors = factors_of(record, weight, path)
    return None if factors is None else spectrum(*factors)


# -- the other way round -----------------------------------------------------------------------------------------------
def as_lora(up: Tensor, down: Tensor, site: Site) -> Record:
    """The LoRA of these factors (down `[rank, in·Πk]`), at scale one."""
    rank = up.shape[1]
    tensors = {
        "down": down.reshape(rank, *site.shape[1:]),
        "up": up.reshape(site.shape[0], rank, *[1] * len(site.kernel)),
    }
    return Record(LoRA(rank=rank), site, Params(tensors))


def from_factors(kind: type[Algorithm], up: Tensor, down: Tensor, site: Site) -> Record | None:
    """An adapter of another kind that computes exactly up·down; None where there is none.

    A LoHa has ones for its second half, a LoKr the single number one for its first factor, a GLoRA zeros for its first
    part. The ranks of a DyLoRA stand in the order of their size, so that the first ones are the best.
    """
    rank = up.shape[1]
    if kind is LoRA:
        return as_lora(up, down, site)
    if kind is DyLoRA:
        found = spectrum(up, down)
        root = found.s.sqrt()
        plain = as_lora(found.u * root, root[:, None] * found.vh, site)
        return replace(plain, algorithm=DyLoRA(rank=len(root)))
    if kind is LoHa:
        first = torch.diag(torch.ones_like(up[0]))[:1]  # one silent half: [1, 0, 0, ...]
        ones_a, ones_b = first.expand(len(up), -1), first.mT.expand(-1, down.shape[1])
        return Record(LoHa(rank=rank), site, Params({"w1_a": up, "w1_b": down, "w2_a": ones_a, "w2_b": ones_b}))
    if kind is LoKr:
        return Record(LoKr(rank=rank, factor=1), site, Params({"w1": up.new_ones((1, 1)), "w2_a": up, "w2_b": down}))
    if kind is GLoRA:
        ones = [1] * len(site.kernel)
        inputs = site.shape[1]
        own = as_lora(up, down, site).params.tensors
        zeros = {"a1": up.new_zeros((inputs, rank, *ones)), "a2": up.new_zeros((rank, inputs, *ones))}
        return Record(GLoRA(rank=rank), site, Params({**zeros, "b1": own["up"], "b2": own["down"]}))
    return None


# -- dense -----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def change_in(record: Record, weight: Weight, path: str) -> Tensor:
    """W' - W `[out, in, *k]` of an adapter, DoRA included.

    Raises:
        FormatError: the weight is needed, and not at hand.
    """
    algorithm, p, site = record.algorithm, record.params, record.site
    like = next(iter(p.tensors.values()))
    if algorithm.is_fixed(p):
        own = like.new_zeros((*[site.experts] * bool(site.experts), *site.shape))
    elif weight is None:
        raise no_base(path, f"what {type(algorithm).__name__} changes")
    else:
        own = wide(weight()).to(like)
    return weight_deviation(algorithm, site, p, own)
