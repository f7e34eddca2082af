"""An adapter whose ranks stand in the order of what they add, so that the first ones are the best of that number.

Everything runs on the factors (QR of both, singular values of what is between them): no product of a layer's size is
formed. What becomes of the algorithms:

    LoRA, Tucker LoRA, T-LoRA     a plain LoRA
    DyLoRA                        as it is: any number of its first ranks is what it was trained for
    LoKr with a low-rank w2       itself; a low-rank w1 becomes whole
    GLoRA                         itself, each part in its own order (of the first, as it acts through the weight)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from nerine.algorithms import DyLoRA, GLoRA, LoKr, LowRank, Params
from nerine.errors import OptionError
from nerine.files.checkpoint import Record
from nerine.ops.factored import Spectrum, halves, loss, spectrum, squares
from nerine.ops.precision import wide
from nerine.ops.row_norm import low_rank_size
from nerine.tools.exact import Weight, as_lora, factors_of, kron_parts, rank_in

__all__ = ["Ordered", "beginning", "ordered", "why_not"]


@dataclass(frozen=True)
class Ordered:
    """An adapter without DoRA in the order of its ranks, the values `s` that they have (largest first; times `scale`
    they are those of the change), and the size of the smaller side of the matrix that those are of."""

    record: Record
    s: Tensor
    side: int
    scale: float = 1.0

    @property
    def size(self) -> float:
        """That of the whole change."""
        p = self.record.params
        if isinstance(self.record.algorithm, DyLoRA):
            return float(self.record.algorithm.size(p, self.s))
        return float(squares(self.s).sum().sqrt()) * abs(self.scale)

    def lost(self, rank: int) -> float:
        """The share of its size that the ranks beyond the first ones have."""
        if isinstance(self.record.algorithm, DyLoRA):  # whose ranks are not at right angles
            up, down = self.record.params.tensors["up"].flatten(1), self.record.params.tensors["down"].flatten(1)
            whole = float(low_rank_size(up, down))
            return float(low_rank_size(up[:, rank:], down[rank:])) / whole if whole else 0.0
        return loss(self.s, rank)


def why_not(record: Record) -> str:
    """Why an adapter has no ranks that could be ordered; empty where it has."""
    algorithm, t = record.algorithm, record.params.tensors
    name = type(algorithm).__name__
    if record.site.experts:
        return "several experts"
    if isinstance(algorithm, LoKr) and "w2_a" not in t:
        return "LoKr with a whole second factor"
    if not isinstance(algorithm, LowRank | LoKr | GLoRA):
        return f"{name} has no rank" if rank_in(record) is None else f"{name}: its ranks have no order"
    return ""


@torch.no_grad()
def ordered(
    record: Record, weight: Weight = None, path: str = "", dynamic: bool = False, prefix: bool = True
) -> Ordered:
    """The adapter with its ranks in order.

    `dynamic` is the form of sd-scripts: values all in up, and the scale as it was. With `prefix` a DyLoRA stays one.

    Raises:
        FormatError: a T-LoRA whose beginnings are not in the file, without the weight.
    """
    algorithm, site = record.algorithm, record.site
    if isinstance(algorithm, LoKr):
        return _kron(record)
    if isinstance(algorithm, GLoRA):
        return _glora(record, weight)
    if isinstance(algorithm, DyLoRA) and prefix:
        return Ordered(record, record.params.tensors["down"].flatten(1).norm(dim=1), min(site.shape[0], site.flat))
    scale = record.params.scale if dynamic and record.params.scale else 1.0
    up, down = _factors(record, weight, path)
    found = spectrum(up / scale, down)
    if not dynamic:
        return Ordered(as_lora(*halves(found, len(found.s)), site), found.s, min(site.shape[0], site.flat))
    plain = as_lora(found.u * found.s, found.vh, site)
    plain = replace(plain, params=plain.params._replace(scale=scale))
    return Ordered(plain, found.s, min(site.shape[0], site.flat), scale)


def _factors(record: Record, weight: Weight, path: str) -> tuple[Tensor, Tensor]:
    found = factors_of(record, weight, path)
    if found is None:
        raise OptionError(f"{path}: {type(record.algorithm).__name__} is no low-rank product")
    return found


def _kron(record: Record) -> Ordered:
    one, two = kron_parts(replace(record, params=record.params._replace(scale=1.0)))
    w1 = one[0] @ one[1] if isinstance(one, tuple) else one
    assert isinstance(two, tuple)
    found = spectrum(*two)
    up, down = halves(found, len(found.s))
    tensors = {"w1": w1, "w2_a": up, "w2_b": down}
    algorithm = record.algorithm
    assert isinstance(algorithm, LoKr)
    algorithm = replace(algorithm, tucker=False, decompose_both=False)
    side = min(up.shape[0], down.shape[1])
    plain = Record(algorithm, record.site, Params(tensors, record.params.scale))
    return Ordered(plain, found.s * w1.norm() * abs(record.params.scale), side)


def _glora(record: Record, weight: Weight) -> Ordered:
    t, site = record.params.tensors, record.site
    a1, a2, b1, b2 = (t[name].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    through = a1
    if weight is not None:
        own = wide(weight()).to(a1)
        through = torch.matmul(a1.mT, own.reshape(*own.shape[:2], -1)).movedim(1, 2).reshape(-1, a1.shape[1])
    r = torch.linalg.qr(through, mode="r").R
    p, s = torch.linalg.qr(a2.mT)
    u, values, vh = torch.linalg.svd(r @ s.mT, full_matrices=False)
    first = Spectrum(a1 @ torch.linalg.pinv(r) @ u, values, vh @ p.mT)
    second = spectrum(b1, b2)
    rank = max(len(first.s), len(second.s))
    of_each = [functional.pad(squares(part.s), (0, rank - len(part.s))) for part in (first, second)]
    both = (of_each[0] + of_each[1]).sqrt().to(first.s) * abs(record.params.scale)
    ones = [1] * len(site.kernel)
    (a1, a2), (b1, b2) = halves(first, rank), halves(second, rank)
    tensors = {
        "a1": a1.reshape(*a1.shape, *ones),
        "a2": a2.reshape(*a2.shape, *ones),
        "b1": b1.reshape(*b1.shape, *ones),
        "b2": b2.reshape(rank, *site.shape[1:]),
    }
    return Ordered(Record(record.algorithm, site, Params(tensors, record.params.scale)), both, rank)


def beginning(record: Record, rank: int) -> Record:
    """The first ranks of an adapter without DoRA, at the scale of all."""
    algorithm, tensors = record.algorithm, {}
    for name, spec in algorithm.layout_of(record.params.tensors).specs.items():
        t = record.params.tensors[name]
        tensors[name] = t.narrow(spec.words.index("rank"), 0, rank).contiguous() if "rank" in spec.words else t
    scale = record.params.scale
    settings = {"rank": rank, "alpha": None if scale == 1.0 else scale * rank}
    return Record(replace(algorithm, **settings), record.site, Params(tensors, scale))
