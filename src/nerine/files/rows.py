"""Layers that one model has in one piece and another in several (a fused qkv): an adapter taken apart and put together.

Everything is exact or refused: taking rows of an adapter takes the rows of whichever tensors have outputs; putting
adapters together is the block-sparse product of higher rank that computes the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nerine.algorithms import BOFT, DiagOFT, DoRA, Full, LoKr, LoRA, LowRank, Norm, Params, TLoRA
from nerine.axes import Spec
from nerine.errors import FormatError
from nerine.files.checkpoint import Record
from nerine.site import Site

__all__ = ["Span", "fuse", "is_low_rank", "plain", "rows_in", "take"]

Span = tuple[int, int]


def take(record: Record, spans: Sequence[Span], where: str) -> Record:
    """The adapter on these rows of its layer, in this order.

    Raises:
        FormatError: the algorithm mixes those rows with others.
    """
    count = sum(stop - start for start, stop in spans)
    site = record.site.rows(count)
    algorithm = record.algorithm
    inner = algorithm.inner if isinstance(algorithm, DoRA) else algorithm
    if isinstance(algorithm, DoRA) and algorithm.axis == "in":
        raise FormatError(f"{where}: a DoRA norm over input channels is one of all rows; it cannot be taken apart")
    if isinstance(inner, BOFT):
        raise FormatError(f"{where}: BOFT turns all rows together; it cannot be taken apart")
    if isinstance(inner, DiagOFT) and record.params.scale:
        raise FormatError(f"{where}: the constraint of Diag-OFT is one of all blocks; it cannot be taken apart")
    layout = algorithm.layout_of(record.params.tensors)
    size, axis = 1, "out"
    if isinstance(inner, LoKr):
        size, axis = record.site.shape[0] // _along(record, "a", layout.specs), "a"
    elif isinstance(inner, DiagOFT):
        size, axis = record.site.shape[0] // _along(record, "n", layout.specs), "n"
    if any(edge % size for span in spans for edge in span):
        raise FormatError(
            f"{where}: the rows {', '.join(f'{a}:{b}' for a, b in spans)} cut through the blocks of {size} rows of "
            f"{type(inner).__name__}; it cannot be taken apart"
        )
    tensors = {}
    for name, spec in layout.specs.items():
        t = record.params.tensors[name]
        words = {axis: size, **({"out": 1} if axis != "out" else {})}
        for word, block in words.items():
            if word in spec.words:
                t = _pick(t, _position(spec, word, t), [(a // block, b // block) for a, b in spans])
        tensors[name] = t
    return Record(algorithm, site, Params(tensors, record.params.scale))


def _along(record: Record, word: str, specs: Mapping[str, Spec]) -> int:
    for name, spec in specs.items():
        if word in spec.words:
            t = record.params.tensors[name]
            return int(t.shape[_position(spec, word, t)])
    return 1


def _position(spec: Spec, word: str, t: Tensor) -> int:
    index = spec.words.index(word)
    absent = "?1" in spec.words and "*1" in spec.words and t.dim() == 1
    return index - int(absent and spec.words.index("?1") < index)


def _pick(t: Tensor, axis: int, spans: Sequence[Span]) -> Tensor:
    picked = [t.narrow(axis, start, stop - start) for start, stop in spans]
    return picked[0] if len(picked) == 1 else torch.cat(picked, axis)


def is_low_rank(record: Record) -> bool:
    """Whether a plain LoRA, perhaps with DoRA around it, computes the same: `plain` gives it then. Reads no tensor."""
    algorithm = record.algorithm.inner if isinstance(record.algorithm, DoRA) else record.algorithm
    if not isinstance(algorithm, LowRank) or record.site.experts:
        return False
    return not isinstance(algorithm, TLoRA) or "base_q" in record.params.tensors  # else to be taken from the weight


def plain(record: Record) -> Record | None:
    """A low-rank adapter as a plain LoRA at scale one that computes the same; None where it is of another kind."""
    algorithm, params = record.algorithm, record.params
    if not is_low_rank(record):
        return None
    if isinstance(algorithm, DoRA):
        inner = plain(Record(algorithm.inner, record.site, params.without("magnitude")))
        assert inner is not None
        around = replace(algorithm, inner=inner.algorithm)
        magnitude = params.tensors["magnitude"]
        return Record(around, record.site, Params({"magnitude": magnitude, **inner.params.tensors}))
    assert isinstance(algorithm, LowRank)
    if set(params.tensors) == {"down", "up"}:
        up, down = params.tensors["up"], params.tensors["down"]
        up = up if params.scale == 1 or up.is_meta else up * params.scale
    else:
        up, down = algorithm.factors(params)
    tensors = {"down": down, "up": up.reshape(*up.shape[:2], *[1] * len(record.site.kernel))}
    return Record(LoRA(rank=down.shape[0]), record.site, Params(tensors))


def fuse(parts: Sequence[tuple[Record | None, Span]], site: Site, where: str) -> Record:
    """One adapter for a layer of `site` from those of its row ranges; None is a range without any.

    Raises:
        FormatError: they are of kinds that cannot be put together.
    """
    parts = sorted(parts, key=lambda part: part[1])
    held = [record for record, _ in parts if record is not None]
    if all(isinstance(record.algorithm, Full | Norm) for record in held):
        return _stacked(parts, site)
    flat = [None if record is None else plain(record) for record, _ in parts]
    decomposed = {isinstance(record.algorithm, DoRA) for record in held}
    if any(f is None for f, (record, _) in zip(flat, parts, strict=True) if record is not None):
        raise FormatError(f"{where}: one layer there, several here; only low-rank adapters can be put together exactly")
    if len(decomposed) > 1 or (decomposed == {True} and len(held) < len(parts)):
        raise FormatError(f"{where}: one layer there, several here, of which only some have DoRA magnitudes")
    ranks = [0 if f is None else f.params.tensors["down"].shape[0] for f in flat]
    downs, ups, magnitudes = [], [], []
    for f, before, rank, (_, (start, stop)) in zip(flat, _sums(ranks), ranks, parts, strict=True):
        if f is None:
            like = next(g for g in flat if g is not None).params.tensors["up"]
            ups.append(like.new_zeros((stop - start, sum(ranks), *like.shape[2:])))
            continue
        up = f.params.tensors["up"]
        wide = up.new_zeros((up.shape[0], sum(ranks), *up.shape[2:]))
        wide[:, before : before + rank] = up
        ups.append(wide)
        downs.append(f.params.tensors["down"])
        magnitudes += [f.params.tensors["magnitude"]] if "magnitude" in f.params.tensors else []
    tensors = {"down": torch.cat(downs), "up": torch.cat(ups)}
    algorithm = LoRA(rank=sum(ranks))
    if magnitudes:
        return Record(DoRA(algorithm), site, Params({"magnitude": torch.cat(magnitudes), **tensors}))
    return Record(algorithm, site, Params(tensors))


def _sums(counts: Sequence[int]) -> list[int]:
    return [sum(counts[:i]) for i in range(len(counts))]


def _stacked(parts: Sequence[tuple[Record | None, Span]], site: Site) -> Record:
    """Dense differences one above the other, with zeros where there is none."""
    held = next(record for record, _ in parts if record is not None)
    names = {name for record, _ in parts if record is not None for name in record.params.tensors}
    tensors = {}
    for name in sorted(names):
        like = next(r.params.tensors[name] for r, _ in parts if r is not None and name in r.params.tensors)
        tensors[name] = torch.cat(
            [
                like.new_zeros((stop - start, *like.shape[1:]))
                if record is None or name not in record.params.tensors
                else record.params.tensors[name]
                for record, (start, stop) in parts
            ]
        )
    return Record(held.algorithm, site, Params(tensors))


def rows_in(keys: Iterable[str]) -> list[tuple[int, int]]:
    """The row ranges of adapters on some rows of a weight, whose names in a file end in [start:stop]."""
    found = {match.groups() for key in keys for match in re.finditer(r"\[(\d{1,9}):(\d{1,9})\]", key)}
    return sorted((int(start), int(stop)) for start, stop in found if int(start) < int(stop))
