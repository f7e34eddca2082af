"""Two checkpoints of one model side by side: for each layer of the first, where its weight and bias are in the second.

They may be laid out differently: a folder and a file, one program's names and another's, a layer fused here and in
pieces there. Layers are found by their path first, and by the names that their family has in other programs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nerine.errors import FormatError
from nerine.files.pieces import Stem
from nerine.files.resolve import Index, component_of
from nerine.files.rows import Span
from nerine.model.mount import Spot
from nerine.ops.precision import is_finite, wide
from nerine.parts import PARTS
from nerine.site import Site
from nerine.tools.weights import Weights

__all__ = ["Pair", "Pairs", "adaptable", "is_layer", "pair_up"]

SHOWN = 3  # layers named in an error
KINDS = ("linear", "conv", "transposed")


class Source(NamedTuple):
    """Some or all rows of a layer here (`own_rows`), and where they are there: a layer, and which rows of it."""

    path: str
    own_rows: Span | None = None
    rows: Span | None = None


@dataclass(frozen=True)
class Pair:
    """One layer in both checkpoints. What is read comes in at least fp32, on `device`."""

    path: str
    site: Site
    base: Weights
    tuned: Weights
    sources: tuple[Source, ...]

    def weight(self, device: str | torch.device = "cpu") -> Tensor:
        """The weight `[out, in, *k]` in the first.

        Raises:
            FormatError: it is not finite.
        """
        return self._checked(self.base, self.base.weight(self.path), device)

    def target(self, device: str | torch.device = "cpu") -> Tensor:
        """The weight in the second, as the first has it.

        Raises:
            FormatError: it is not finite.
        """
        shape = (*[self.site.experts] * bool(self.site.experts), *self.site.shape)
        whole = self._gathered(lambda path: _as_here(self.tuned, path, self.base.spot(self.path)), shape)
        assert whole is not None, "a layer without a weight is no layer"
        return self._checked(self.tuned, whole, device)

    def shift(self, device: str | torch.device = "cpu") -> Tensor | None:
        """What the bias `[out]` has moved by; None where either has none.

        Raises:
            FormatError: it is not finite.
        """
        before = self.base.bias(self.path)
        if before is None:
            return None
        after = self._gathered(self.tuned.bias, tuple(before.shape))
        if after is None:
            return None
        before, after = self._checked(self.base, before, device), self._checked(self.tuned, after, device)
        return after - before

    @property
    def formats(self) -> tuple[torch.dtype, torch.dtype]:
        """In which number formats the weight is stored: in the first, in the second (the coarsest where several)."""
        there = [self.tuned.file.dtype(self.tuned.key(source.path)) for source in self.sources]
        return self.base.file.dtype(self.base.key(self.path)), max(there, key=lambda dtype: torch.finfo(dtype).eps)

    def _gathered(self, read: Callable[[str], Tensor | None], shape: Sequence[int]) -> Tensor | None:
        """A tensor put together from where its rows are there."""
        first, *others = self.sources
        if not others and first.own_rows is None and first.rows is None:
            found = read(first.path)
            return None if found is None else found.reshape(tuple(shape))
        parts = []
        for source in sorted(self.sources, key=lambda s: s.own_rows or (0, 0)):
            found = read(source.path)
            if found is None:
                return None
            parts.append(found if source.rows is None else found[source.rows[0] : source.rows[1]])
        return torch.cat(parts).reshape(tuple(shape))

    def _checked(self, where: Weights, tensor: Tensor, device: str | torch.device) -> Tensor:
        if not is_finite(tensor):
            raise FormatError(
                f"{where.file.path}: the weight of {self.path} has entries that are no numbers, so nothing can be "
                "taken from it; is the checkpoint damaged, or its training diverged?"
            )
        return wide(tensor.to(device))


def _as_here(tuned: Weights, path: str, here: Spot) -> Tensor:
    """A weight there, in the way in which the layer here has it: OpenCLIP keeps its last projection as [in, out]."""
    found, spot = tuned.weight(path), tuned.spot(path)
    is_bare = _is_lone(spot) != _is_lone(here)
    return found.mT if is_bare and path.rpartition(".")[2] == "text_projection" else found


@dataclass(frozen=True)
class Pairs:
    """All layers that both checkpoints have, by the path in the first, in its order.

    `missing` are layers of the first that the second has none for, `surplus` those of the second that stand for
    nothing in the first, `reshaped` {path: (shape here, shape there)}. `notes` say which parts were left out. `model`
    has the layers of the first that can be chosen: the denoisers and text encoders that both have.
    """

    base: Weights
    tuned: Weights
    layers: Mapping[str, Pair]
    missing: tuple[str, ...]
    surplus: tuple[str, ...]
    reshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    parts: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def model(self) -> nn.Module:
        modules = {part: self.base.model._modules[part] for part in self.parts if part}
        return nn.ModuleDict({name: part for name, part in modules.items() if part is not None}) or self.base.model

    def check(self) -> None:
        """Whether they are one model, as far as layers go that can have an adapter.

        Raises:
            FormatError: they are not; the message says which layers differ.
        """
        missing = [path for path in self.missing if is_layer(self.base, path)]
        surplus = [path for path in self.surplus if is_layer(self.tuned, path)]
        reshaped = {path: shapes for path, shapes in self.reshaped.items() if is_layer(self.base, path)}
        here, there = self.base.file.path, self.tuned.file.path
        told = []
        if missing:
            told.append(f"{len(missing)} layers of {here} are not in {there} ({_some(missing)})")
        if surplus:
            told.append(f"{len(surplus)} layers of {there} are not in {here} ({_some(surplus)})")
        if reshaped:
            shapes = [f"{path} {list(a)} there {list(b)}" for path, (a, b) in reshaped.items()]
            told.append(f"{len(reshaped)} have another shape ({_some(shapes)})")
        if told:
            raise FormatError(f"{here} and {there} are different models: {'; '.join(told)}. Give two that are alike")
        if not any(is_layer(self.base, path) for path in self.layers):
            raise FormatError(f"{here} and {there} are different models: they have no layer in common")

    @property
    def unlike(self) -> tuple[str, ...]:
        """Whatever has no partner of its shape; once `check` has passed, none of it could have an adapter."""
        return (*self.missing, *self.surplus, *self.reshaped)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def adaptable(weights: Weights) -> dict[str, dict[str, str]]:
    """{part of the pipeline: {path within it: path}} of the parts that can have adapters; "" is a model alone."""
    parts = _parts(weights)
    known = {part: paths for part, paths in parts.items() if component_of(part)}
    return known or {"": parts.get("", {})}


def _parts(weights: Weights) -> dict[str, dict[str, str]]:
    """All parts, "" for what is in none. A folder of a pipeline has a folder for each."""
    folders = {piece.place.partition("/")[0] for piece in weights.file.pieces if "/" in piece.place}
    names = {*PARTS, "vae", *folders}
    found: dict[str, dict[str, str]] = {}
    for path in weights.sites:
        top, dot, rest = path.partition(".")
        part, within = (top, rest) if dot and top in names else ("", path)
        found.setdefault(part, {})[within] = path
    return found


def _is_lone(spot: Spot) -> bool:
    """Whether it is a parameter that no layer and no attention block calls."""
    return spot.caller is not None and not isinstance(spot.caller, nn.MultiheadAttention)


def is_layer(weights: Weights, path: str) -> bool:
    """Whether it is a layer that every algorithm can have an adapter on."""
    spot = weights.spot(path)
    return spot.site.kind in KINDS and not _is_lone(spot)


@dataclass
class _Found:
    """What two parts have in common: pieces by path here, and which paths there were of use."""

    sources: dict[str, list[Source]] = field(default_factory=dict)
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)


def _match(base: Weights, part: str, here: Mapping[str, str], tuned: Weights, there: Mapping[str, str]) -> _Found:
    """The layers of one part in another, by path and by the names of their family."""
    index = Index({path: base.spot(path).site for path in here.values()})
    found = _Found()
    for within, path in there.items():
        matches = index.find(Stem(within, "", within, False), part)
        match = next((m for m in matches if m.name == within), matches[0] if len(matches) == 1 else None)
        for place in match.places if match is not None else ():
            found.used.add(path)
            found.sources.setdefault(place.path, []).append(Source(path, place.own_rows, place.rows))
    for own, sources in list(found.sources.items()):
        whole = [source for source in sources if source.own_rows is None]
        kept = whole[:1] or sources
        shape, held = tuple(base.spot(own).site.shape), _shape_of(tuned, kept)
        if _squeezed(shape) == _squeezed(held) or _turned(base, own, tuned, kept):
            found.sources[own] = kept
        else:
            del found.sources[own]
            found.reshaped[own] = (shape, held)
    return found


def _shape_of(tuned: Weights, sources: Iterable[Source]) -> tuple[int, ...]:
    """The shape of a weight put together from there."""
    rows, rest = 0, ()
    for source in sources:
        first, *rest = tuned.spot(source.path).site.shape  # type: ignore[assignment]
        rows += first if source.rows is None else source.rows[1] - source.rows[0]
    return rows, *rest


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """A linear layer and a convolution of one tap have the same weight."""
    kept = list(shape)
    while len(kept) > 2 and kept[-1] == 1:
        kept.pop()
    return tuple(kept)


def _turned(base: Weights, own: str, tuned: Weights, sources: Sequence[Source]) -> bool:
    """Whether it is the one weight that OpenCLIP keeps the other way round."""
    there, here = tuned.spot(sources[0].path), base.spot(own)
    if own.rpartition(".")[2] != "text_projection" or _is_lone(there) == _is_lone(here):
        return False
    return tuple(there.site.shape[::-1]) == tuple(here.site.shape)


def pair_up(base: Weights, tuned: Weights) -> Pairs:
    """The layers of two checkpoints in pairs. Nothing is refused yet, and no weight read."""
    ours, theirs = adaptable(base), adaptable(tuned)
    both = _matched_parts(base, ours, tuned, theirs)
    layers: dict[str, Pair] = {}
    missing: list[str] = []
    surplus: list[str] = []
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for part, (other, found) in both.items():
        for path in ours[part].values():
            if path in found.sources:
                layers[path] = Pair(path, base.spot(path).site, base, tuned, tuple(found.sources[path]))
            elif path not in found.reshaped:
                missing.append(path)
        surplus += [path for path in theirs[other].values() if path not in found.used]
        reshaped |= found.reshaped
    alone = [part for part in ours if part not in both]
    strange = [part for part in theirs if part not in {other for other, _ in both.values()}]
    if not both:  # nothing in common: all of it is missing
        missing, surplus = ([path for paths in parts.values() for path in paths.values()] for parts in (ours, theirs))
    notes = [f"{tuned.file.path.name} has no {part}, so it was left out" for part in alone if both]
    notes += [f"{base.file.path.name} has no {part}, so it was left out" for part in strange if both]
    order = {path: i for i, path in enumerate(base.sites)}
    layers = dict(sorted(layers.items(), key=lambda item: order[item[0]]))
    return Pairs(base, tuned, layers, tuple(missing), tuple(surplus), reshaped, tuple(both), tuple(notes))


def _matched_parts(
    base: Weights, ours: Mapping[str, Mapping[str, str]], tuned: Weights, theirs: Mapping[str, Mapping[str, str]]
) -> dict[str, tuple[str, _Found]]:
    """{part here: the part there that is the same, and what they have in common}: those of one name or one component,
    or a model alone and whichever part it is most like."""
    tries = []
    for part, here in ours.items():
        for other, there in theirs.items():
            same = component_of(part) == component_of(other)
            if same or not part or not other:
                found = _match(base, part, here, tuned, there)
                tries.append((len(found.sources), part == other, part, other, found))
    tries.sort(key=lambda one: one[:2], reverse=True)
    both: dict[str, tuple[str, _Found]] = {}
    taken: set[str] = set()
    for count, _, part, other, found in tries:
        if count and part not in both and other not in taken:
            both[part] = (other, found)
            taken.add(other)
    return {part: both[part] for part in ours if part in both}
