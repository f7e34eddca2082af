"""Writing a file: which layer bears which name in a dialect, and the tensors under each name, one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nerine.errors import FormatError
from nerine.files.checkpoint import Base, Layer, Record, joined
from nerine.files.dialects import DIALECTS
from nerine.files.dialects.base import DENOISER, EXACT, Dialect, Emitted, Shapes
from nerine.files.names import aliases, family_of, flatten
from nerine.files.resolve import component_of, split_parts
from nerine.files.rows import Span, fuse, take
from nerine.files.store import Outgoing
from nerine.site import Site

TEXT = "transformers"  # the naming of text encoders that files have, whichever version of transformers runs

__all__ = ["Written", "lay_out", "split_rows"]


@dataclass(frozen=True)
class Written:
    """A file laid out: what every tensor is called, and how it is made when its turn comes."""

    tensors: tuple[Outgoing, ...]
    layers: Mapping[str, Layer]  # by the name before the suffix
    config: Mapping[str, Any] = field(default_factory=dict)
    header: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class _Name(NamedTuple):
    """A layer of a file: its whole stem, its path without a prefix, and what it is made of."""

    stem: str
    path: str
    layer: Layer


def lay_out(
    layers: Mapping[str, Layer],
    dialect: Dialect,
    *,
    sites: Mapping[str, Site] | None = None,
    dtype: torch.dtype | None = None,
    component: str | None = None,
) -> Written:
    """The layers (by path in their model) as a file of this dialect.

    `sites` are all layers of the model, where it is at hand; they help to tell what it is. `dtype` casts the tensors,
    but for alpha and magnitudes. `component` says which part of a pipeline the model is.

    Raises:
        FormatError: two layers would get the same name, or the dialect cannot hold one of them exactly.
    """
    names = list(_named(layers, dialect, sites or {path: layer.site for path, layer in layers.items()}, component))
    _check(names, dialect)
    tensors: list[Outgoing] = []
    kept: dict[int, Emitted] = {}
    for name in names:
        emitted = _Emitted(name.layer, dialect, kept)
        for suffix, sketch in emitted.sketch().items():
            key = dialect.key(name.stem, suffix)
            tensors.append(_outgoing(key, suffix, sketch, emitted, dtype))
    config, header = dialect.beside({name.stem: name.layer.sketch() for name in names})
    return Written(tuple(tensors), {name.stem: name.layer for name in names}, config, header)


class _Emitted:
    """The tensors of one layer, made together when the first of them is asked for. `kept` has those of one layer at a
    time, whichever was last."""

    def __init__(self, layer: Layer, dialect: Dialect, kept: dict[int, Emitted]) -> None:
        self._layer, self._dialect, self._kept = layer, dialect, kept

    def sketch(self) -> Emitted:
        base = self._layer.base
        if base is not None:
            base = _sketched(base, self._layer)
        return self._dialect.emit(self._layer.sketch(), base)

    def take(self, suffix: str) -> Tensor:
        if suffix not in self._kept.get(id(self), {}):
            self._kept.clear()
            with torch.no_grad():
                self._kept[id(self)] = dict(self._dialect.emit(self._layer.record(), self._layer.base))
        return self._kept[id(self)].pop(suffix)


def _sketched(base: Base, layer: Layer) -> Base:
    """A base of the same shapes without values."""
    site = layer.site
    dtype = torch.float64 if torch.float64 in layer.dtypes.values() else torch.float32
    weight = torch.empty(site.shape, dtype=dtype, device="meta")
    return Base(lambda: weight, lambda: weight.new_empty(site.shape[:1]) if site.has_bias else None)


def _outgoing(key: str, suffix: str, sketch: Tensor, emitted: _Emitted, dtype: torch.dtype | None) -> Outgoing:
    kept = sketch.dtype
    if suffix in EXACT:
        kept = kept if kept == torch.float64 else torch.float32
    elif dtype is not None and kept.is_floating_point:
        kept = dtype
    if not sketch.is_meta:  # a number that the shapes and the scale tell already
        return Outgoing(key, tuple(sketch.shape), kept, lambda: sketch.to(kept))
    return Outgoing(key, tuple(sketch.shape), kept, lambda: emitted.take(suffix).detach().to(kept))


def _check(names: Sequence[_Name], dialect: Dialect) -> None:
    """Refuse what the dialect cannot hold exactly, and names that two layers share."""
    seen: dict[str, str] = {}
    for name in names:
        if name.stem in seen:
            raise FormatError(
                f"the layers {seen[name.stem]} and {name.path} would both be called {name.stem} in a file; "
                "leave one of them out, save the parts of a pipeline one by one, or rename it in the model"
            )
        seen[name.stem] = name.path
    refused = {name.path: why for name in names if (why := dialect.refuses(name.layer.sketch()))}
    if refused:
        able = [d.name for d in DIALECTS.values() if not any(d.refuses(name.layer.sketch()) for name in names)]
        path, why = next(iter(refused.items()))
        raise FormatError(
            f"the {dialect.name} dialect cannot hold {len(refused)} of {len(names)} layers exactly. {path}: {why}. "
            f"Choose one of the dialects that can: {', '.join(able) or 'there is none'}"
        )


# -- names -----------------------------------------------------------------------------------------------------------
def split_rows(path: str) -> tuple[str, Span | None]:
    """A path and the rows in it, as in "to_qkv[0:64]"."""
    if not path.endswith("]") or "[" not in path:
        return path, None
    whole, _, rows = path[:-1].rpartition("[")
    start, _, stop = rows.partition(":")
    return whole, (int(start), int(stop))


def _named(
    layers: Mapping[str, Layer], dialect: Dialect, sites: Mapping[str, Site], component: str | None
) -> Iterable[_Name]:
    """Every layer of the file, in the order of the model."""
    if dialect.naming == "own" and not any(dialect.prefixes.values()):  # it names all layers as the model does
        counts = {path: site.shape[0] for path, site in sites.items()}
        for path, layer in (layers if dialect.rows else _without_rows(layers, counts)).items():
            yield _name(dialect, next(iter(dialect.prefixes)), path, layer)
        return
    whole = {path: site for path, site in sites.items() if "[" not in path}
    parts = split_parts(whole)
    several = "text_encoder_1" in parts or sum(component_of(part).startswith("text_encoder") for part in parts) > 1
    for part, paths in parts.items():
        cut = len(part) + 1 if part else 0
        shapes = {path[cut:]: tuple(whole[path].shape) for path in paths}
        here = set(paths)
        own = {path[cut:]: layer for path, layer in layers.items() if split_rows(path)[0] in here}
        if not own:
            continue
        told = component_of(component) if component else component_of(part)
        prefix = dialect.prefix_of(told or _likely(shapes), part, shapes, several)
        for path, layer in _renamed(own, dialect, shapes):
            yield _name(dialect, prefix, path, layer)._replace(path=f"{part}.{path}" if part else path)


def _without_rows(layers: Mapping[str, Layer], counts: Mapping[str, int]) -> dict[str, Layer]:
    """Adapters on some rows of a layer as one adapter of the whole layer, which leaves the other rows alone; `counts`
    says how many rows a layer has."""
    found: dict[str, Layer] = {}
    spans: dict[str, list[tuple[Span, Layer]]] = {}
    for path, layer in layers.items():
        whole, rows = split_rows(path)
        if rows is None:
            found[path] = layer
        else:
            spans.setdefault(whole, []).append((rows, layer))
    for whole, parts in spans.items():
        if whole in found:
            raise FormatError(f"{whole} has an adapter of its own and others on some of its rows; save them apart")
        parts.sort(key=lambda part: part[0])
        (_, last), first = parts[-1][0], parts[0][1]
        found[whole] = _filled_up(parts, first.site.rows(counts.get(whole, last)), whole)
    return found


def _filled_up(parts: Sequence[tuple[Span, Layer]], site: Site, where: str) -> Layer:
    """One layer of pieces, with nothing where there is none."""
    spans: list[Span] = []
    held: list[Layer | None] = []
    at = 0
    for (start, stop), layer in parts:
        if start < at:
            raise FormatError(f"{where}: two adapters on the same rows; save them apart")
        if start > at:
            spans, held = [*spans, (at, start)], [*held, None]
        spans, held, at = [*spans, (start, stop)], [*held, layer], stop
    if at < site.shape[0]:
        spans, held = [*spans, (at, site.shape[0])], [*held, None]

    def join(records: list[Record | None]) -> Record:
        return fuse(list(zip(records, spans, strict=True)), site, where)

    return joined(held, join)


def _name(dialect: Dialect, prefix: str, path: str, layer: Layer) -> _Name:
    return _Name(prefix + (flatten(path) if dialect.flat else path), path, layer)


def _likely(shapes: Shapes) -> str:
    """The part of a pipeline that a model is, by its layers: a text encoder has attention layers of that library, and
    none that look at something else."""
    known = family_of(shapes)
    if known is not None:
        return "text_encoder" if TEXT in known[0].namings else DENOISER
    words = ("self_attn.", "SelfAttention.", "text_model.")
    is_text = any(word in path for path in shapes for word in words)
    return "text_encoder" if is_text and not any("cross_attn" in path for path in shapes) else DENOISER


def _renamed(layers: Mapping[str, Layer], dialect: Dialect, shapes: Shapes) -> Iterable[tuple[str, Layer]]:
    """Layers under the names that the dialect uses for this family of models."""
    found = aliases(shapes) if dialect.naming != "own" else {}
    others = found.get(_naming(dialect, shapes), found.get(TEXT, ()))
    groups: dict[str, list[Any]] = {}
    for alias in others:
        groups.setdefault(alias.name, []).append(alias)
    covered: set[str] = set()
    for name, group in groups.items():
        group.sort(key=lambda alias: alias.rows or (0, 0))
        parts = [_source(layers, alias) for alias in group]
        if not any(part for part, _ in parts):
            continue
        covered |= {used for _, used in parts}
        yield name, _joined([part for part, _ in parts], group, shapes, name)
    left = {path: layer for path, layer in layers.items() if path not in covered}
    if not dialect.rows:
        left = _without_rows(left, {path: shape[0] for path, shape in shapes.items()})
    yield from left.items()


def _naming(dialect: Dialect, shapes: Shapes) -> str:
    """Whose names the dialect writes for such a model."""
    known = family_of(shapes)
    deep = any(".transformer_blocks.1." in path or path.startswith(("add_embedding.", "label_emb.")) for path in shapes)
    family = "" if known is None else known[0].name
    return dialect.naming_for("sdxl-unet" if family == "unet" and deep else family)


def _source(layers: Mapping[str, Layer], alias: Any) -> tuple[Layer | None, str]:
    """The layer that a piece of a name comes from, cut to its rows."""
    if alias.own_rows is None:
        return layers.get(alias.own), alias.own
    start, stop = alias.own_rows
    rows = f"{alias.own}[{start}:{stop}]"
    if rows in layers:
        return layers[rows], rows
    layer = layers.get(alias.own)
    if layer is None:
        return None, alias.own
    cut = layer.changed(lambda record: take(record, [(start, stop)], alias.own))
    return replace(cut, base=None if layer.base is None else layer.base.rows(start, stop)), alias.own


def _joined(parts: list[Layer | None], group: list[Any], shapes: Shapes, name: str) -> Layer:
    if len(group) == 1 and group[0].rows is None:
        assert parts[0] is not None
        return parts[0]
    spans = [alias.rows for alias in group]
    held = next(part for part in parts if part is not None)
    site = held.site.rows(max(stop for _, stop in spans))

    def join(records: list[Record | None]) -> Record:
        return fuse(list(zip(records, spans, strict=True)), site, name)

    return joined(parts, join)
