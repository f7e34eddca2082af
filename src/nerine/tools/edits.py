"""What adapters do to the tensors of a checkpoint: which tensors change, and by what.

W + Σ strength·(W' - W), every change worked out on the weight as it was, summed in at least fp32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nerine.algorithms import Full, LowRank, Norm
from nerine.errors import MergeError
from nerine.files.checkpoint import Layer, Record
from nerine.files.rows import Span
from nerine.model.adapter import weight_deviation
from nerine.model.strengths import Strength, strengths_at
from nerine.ops.precision import full_precision, is_finite, wide
from nerine.site import Site
from nerine.tools.weights import Weights

__all__ = ["Edit", "Share", "edits_of", "strengths_of"]

TILE = 1 << 18  # entries


@dataclass(frozen=True)
class Share:
    """One adapter on a tensor, or on some of its rows, at a strength; `label` is the path of its layer."""

    layer: Layer
    rows: Span | None
    strength: float
    label: str

    @property
    def is_fixed(self) -> bool:
        """Whether the change is the same whatever the weight is."""
        sketch = self.layer.sketch()
        return sketch.algorithm.is_fixed(sketch.params)


@dataclass
class Edit:
    """All that changes one tensor of a checkpoint: a weight at `site`, or the bias of one."""

    site: Site
    is_bias: bool = False
    shares: list[Share] = field(default_factory=list)

    def exact(self, stored: Tensor, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """The changed tensor in at least fp32 (or in `dtype`), in the shape that it has in the file."""
        own = (wide(stored) if dtype is None else stored).to(device=device, dtype=dtype)
        with torch.no_grad(), full_precision(own):
            if self.is_bias:
                return self._bias(own)
            weight = self.site.canonical(own)
            records = [(share, _brought(share.layer.record(), own)) for share in self.shares]
            fixed = all(r.algorithm.is_fixed(r.params) and not r.site.experts for _, r in records)
            alias = fixed and weight.is_contiguous() and own.data_ptr() != stored.data_ptr()
            total = weight if alias else weight.clone(memory_format=torch.contiguous_format)
            for share, record in records:
                rows = slice(None) if share.rows is None else slice(*share.rows)
                part = total[rows]
                found = _added(part, record, weight[rows], share.strength)
                if found.data_ptr() != part.data_ptr():
                    part.copy_(found)
            return self.site.native(total)

    def in_tiles(self, stored: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The changed tensor in `dtype`, in the memory of `stored` where it fits; None where it needs the whole weight.

        Products of factors are added to a few rows at a time, whose fp32 form never leaves the processor's cache.
        """
        if self.is_bias or self.site.flipped or self.site.kind not in ("linear", "conv") or not stored.is_contiguous():
            return None
        if any(share.rows is not None or share.layer.site.experts for share in self.shares):
            return None
        factors = []
        with torch.no_grad():
            for share in self.shares:
                if not isinstance(share.layer.algorithm, LowRank):
                    return None
                record = share.layer.record()
                params = record.params.filled(wide(t) for t in record.params.tensors.values())
                up, down = share.layer.algorithm.factors(params)
                factors.append((up * share.strength, down.flatten(1)))
            found = stored if dtype == stored.dtype else torch.empty_like(stored, dtype=dtype)
            source, target = stored.flatten(1), found.view(found.shape[0], -1)
            rows = max(1, TILE // source.shape[1])
            room = factors[0][0].new_empty((rows, source.shape[1]))
            for start in range(0, source.shape[0], rows):
                part = source[start : start + rows]
                tile = room[: part.shape[0]].copy_(part)
                for up, down in factors:
                    tile.addmm_(up[start : start + rows], down)
                target[start : start + rows].copy_(tile)
        return found

    def _bias(self, bias: Tensor) -> Tensor:
        total = bias.clone()
        for share in self.shares:
            record = _brought(share.layer.record(), bias)
            shift = record.algorithm.shift(record.params)
            if shift is not None:
                rows = slice(None) if share.rows is None else slice(*share.rows)
                total[rows] += shift * share.strength
        return total

    @property
    def is_fixed(self) -> bool:
        """Whether the change is the same whatever the tensor was, so that it can be taken out again."""
        return self.is_bias or all(share.is_fixed for share in self.shares)

    def turned(self) -> Edit:
        """The edit that takes this one out again, where it is fixed."""
        return replace(self, shares=[replace(share, strength=-share.strength) for share in self.shares])

    @property
    def label(self) -> str:
        """The layer, for errors and reports."""
        return self.shares[0].label + (" (bias)" if self.is_bias else "")

    def check(self, found: Tensor) -> Tensor:
        """What was found, if it is numbers throughout.

        Raises:
            MergeError: it is not.
        """
        if not is_finite(found):
            raise MergeError(
                f"{self.label}: the merged weight is not finite in {str(found.dtype).removeprefix('torch.')}; is the "
                "adapter damaged, or its strength too large for this format (try --dtype bf16 or fp32)?"
            )
        return found


def _added(total: Tensor, record: Record, weight: Tensor, strength: float) -> Tensor:
    if record.site.experts:
        return total + weight_deviation(record.algorithm, record.site, record.params, weight) * strength
    return record.algorithm.add_to(total, record.params, weight, strength)


def _brought(record: Record, like: Tensor) -> Record:
    params = record.params.filled(t.to(like) for t in record.params.tensors.values())
    return replace(record, params=params)


def _moves_bias(layer: Layer) -> bool:
    sketch = layer.sketch()
    return sketch.algorithm.shift(sketch.params) is not None


def _moves_weight(layer: Layer) -> bool:
    return not (isinstance(layer.algorithm, Full | Norm) and "diff" not in layer.shapes)


def edits_of(base: Weights, adapters: Iterable[Mapping[str, tuple[Layer, float]]]) -> dict[str, Edit]:
    """{tensor of the checkpoint: what changes it}, of adapters by the paths of their layers, at strengths.

    Raises:
        MergeError: an adapter moves a bias that the model does not have.
    """
    found: dict[str, Edit] = {}

    def put(key: str, path: str, layer: Layer, strength: float, is_bias: bool) -> None:
        spot = base.spot(path)
        site = base.spot(path.rpartition("[")[0]).site if spot.rows is not None else spot.site
        edit = found.setdefault(key, Edit(site, is_bias))
        edit.shares.append(Share(layer, spot.rows, strength, path))

    for layers in adapters:
        for path, (layer, strength) in layers.items():
            if not strength:
                continue
            if _moves_weight(layer):
                put(base.key(path), path, layer, strength, False)
            if _moves_bias(layer):
                key = base.bias_key(path)
                if key is None:
                    raise MergeError(
                        f"{path}: the adapter moves a bias, and the layer has none in {base.file.path}; the adapter is "
                        "for a model that has"
                    )
                put(key, path, layer, strength, True)
    return found


def strengths_of(base: Weights, paths: Iterable[str], strength: Strength) -> dict[str, float]:
    """The strength at each layer, one where no pattern matches it.

    Raises:
        OptionError: it is no strength.
        TargetError: a pattern matches none of the layers.
    """
    paths = list(paths)
    at = [(path.rpartition("[")[0] if path.endswith("]") else path, base.spot(path).holder) for path in paths]
    wanted = strengths_at(strength, at, base.model)
    return {path: 1.0 if own is None else own for path, own in zip(paths, wanted, strict=True)}
