"""The LyCORIS dialect: `lycoris_<path with underscores>.<suffix>`, one `alpha` a layer, `dora_scale` for magnitudes.

Reading is generous where programs differ (trailing axes of size one, a missing alpha, 1-D magnitudes) and says so;
writing is exactly what LyCORIS writes, but for two numbers that it rounds: alpha and `dora_scale` stay in fp32.
Source: files written by LyCORIS 3.x and 4.1.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from nerine.algorithms import REGISTRY, Algorithm, DoRA, Params
from nerine.axes import Layout, Spec, bind, kernel_of
from nerine.errors import FormatError, ShapeError
from nerine.files.checkpoint import Checkpoint, LoadReport, LoadRow, Record
from nerine.files.meta import Meta, read_meta
from nerine.files.names import candidates, flatten, split_key, stems
from nerine.files.store import Source
from nerine.ops.precision import wide
from nerine.site import Site

__all__ = ["Lycoris"]

_ALPHA, _MAGNITUDE = "alpha", "dora_scale"


def _known_layouts() -> Iterator[tuple[Algorithm, Layout]]:
    for kind in dict.fromkeys(REGISTRY.values()):
        algorithm = kind()
        for layout in algorithm.layouts:
            yield algorithm, layout


class Lycoris:
    """Reader and writer of the dialect; `prefix` is what stands before the layer's name."""

    name = "lycoris"

    def __init__(self, prefix: str = "lycoris") -> None:
        self.prefix = prefix

    # -- writing -------------------------------------------------------------------------------------------------
    def write(self, records: Mapping[str, Record], dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Tensors by key, cast to `dtype` (None: as they are).

        Raises:
            FormatError: two layers would get the same name.
        """
        tensors: dict[str, Tensor] = {}
        for stem, path in stems(records, self.prefix).items():
            algorithm, params = records[path].algorithm, records[path].params
            layout = algorithm.layout_of(params.tensors)
            for name, spec in layout.specs.items():
                exact = spec.key == _MAGNITUDE
                tensor = params.tensors[name].detach()
                kept = torch.float32 if exact and tensor.dtype != torch.float64 else tensor.dtype
                tensors[f"{stem}.{spec.key}"] = tensor.to(kept if exact or dtype is None else dtype)
            tensors[f"{stem}.{_ALPHA}"] = torch.tensor(params.scale * _rank(params, layout), dtype=torch.float32)
        return tensors

    # -- reading -------------------------------------------------------------------------------------------------
    def read(self, source: Source, sites: Mapping[str, Site]) -> Checkpoint:
        """Records for the layers at `sites` (by path) that the file has tensors for.

        Raises:
            FormatError: nothing in the file belongs to these layers, or the tensors of a layer are no known set.
            ShapeError: a tensor does not fit its layer.
        """
        meta = read_meta(source.metadata, str(source.path))
        suffixes = {spec.key for _, layout in _known_layouts() for spec in layout.specs.values()}
        suffixes |= {_ALPHA, _MAGNITUDE}
        layers_of = candidates(sites, self.prefix)
        found: dict[str, dict[str, str]] = {}
        unmatched: dict[str, str] = {}
        for key in source.keys:
            parts = split_key(key, suffixes)
            if parts is None:
                unmatched[key] = "no known algorithm has such a tensor"
            elif parts[0] not in layers_of:
                unmatched[key] = f"the model has no layer {parts[0].removeprefix(self.prefix + '_')}"
            else:
                layer = _the_one(layers_of[parts[0]], parts[0], meta, source)
                found.setdefault(layer, {})[parts[1]] = key
        if not found:
            raise FormatError(_nothing_matched(source, unmatched, layers_of))
        records, rows = {}, []
        for path in (p for p in sites if p in found):
            records[path], row = self._layer(source, path, sites[path], found[path], meta)
            rows.append(row)
        expected = {flatten(path): path for path in meta.layers}
        missing = tuple(path for flat, path in expected.items() if flat not in {flatten(p) for p in records})
        notes = (meta.note,) if meta.note else ()
        report = LoadReport(str(source.path), tuple(rows), unmatched, missing, notes)
        return Checkpoint(records, meta, report)

    def _layer(
        self, source: Source, path: str, site: Site, keys: Mapping[str, str], meta: Meta
    ) -> tuple[Record, LoadRow]:
        algorithm, layout = _recognise(path, set(keys), source)
        tensors = {name: _floats(source, keys[spec.key]) for name, spec in layout.specs.items()}
        notes = []
        told = meta.layers.get(path)
        if _MAGNITUDE in keys:
            hint = told.axis if isinstance(told, DoRA) else ""
            magnitude = _floats(source, keys[_MAGNITUDE])
            axis, note = _axis(path, tuple(magnitude.shape), site, hint)
            notes += [note] if note else []
            algorithm = DoRA(algorithm, axis=axis)
            tensors = {"magnitude": magnitude.reshape(_magnitude_shape(axis, site)), **tensors}
            layout = algorithm.layout_of(tensors)
        if told is not None and set(tensors) in [set(known.specs) for known in told.layouts]:
            algorithm = told if not isinstance(told, DoRA) or told.axis == getattr(algorithm, "axis", "") else algorithm
        tensors = {name: _fit_ones(layout.specs[name], t, site) for name, t in tensors.items()}
        sizes = bind(layout, {name: tuple(t.shape) for name, t in tensors.items()}, site.sizes, path)
        if 0 in sizes.values():
            raise ShapeError(f"{path}: a tensor of the file has no elements ({', '.join(keys.values())})")
        rank = sizes.get("rank")
        scale, note = _scale(path, source, keys.get(_ALPHA), rank)
        notes += [note] if note else []
        row = LoadRow(
            path, str(algorithm) if told is not None else _bare_name(algorithm), rank, scale, "; ".join(notes)
        )
        return Record(algorithm, Params(tensors, scale)), row


def _the_one(layers: list[str], stem: str, meta: Meta, source: Source) -> str:
    """The layer that a name in the file means; where several bear it, the one that the metadata tells."""
    told = [path for path in layers if path in meta.layers] if len(layers) > 1 else layers
    if len(told) != 1:
        raise FormatError(
            f"{source.path}: {stem} may mean {' or '.join(layers)}, and the file does not say which; "
            "rename one of the two in the model"
        )
    return told[0]


def _floats(source: Source, key: str) -> Tensor:
    """A tensor of the file in at least fp32."""
    tensor = source.read(key)
    if not tensor.is_floating_point():
        raise FormatError(f"{source.path}: {key} holds {tensor.dtype}, expected floating-point numbers")
    return wide(tensor)


def _bare_name(algorithm: Algorithm) -> str:
    """The name of an algorithm whose settings the file does not tell."""
    if isinstance(algorithm, DoRA):
        return f"DoRA({_bare_name(algorithm.inner)}, axis={algorithm.axis!r})"
    return type(algorithm).__name__


def _recognise(path: str, suffixes: set[str], source: Source) -> tuple[Algorithm, Layout]:
    """The algorithm and layout whose tensors are exactly those of the file."""
    own = suffixes - {_ALPHA, _MAGNITUDE}
    known = list(_known_layouts())
    for algorithm, layout in known:
        if layout.keys == own:
            return algorithm, layout
    algorithm, layout = max(known, key=lambda pair: (len(pair[1].keys & own), -len(pair[1].keys)))
    lacking, extra = sorted(layout.keys - own), sorted(own - layout.keys)
    raise FormatError(
        f"{source.path}: {path} has {', '.join(sorted(own)) or 'no tensors'}, which is no complete adapter; "
        f"the closest is {algorithm.name}, {'which also has ' + ', '.join(lacking) if lacking else ''}"
        f"{' and ' if lacking and extra else ''}{'which has no ' + ', '.join(extra) if extra else ''}"
    )


def _rank(params: Params, layout: Layout) -> int:
    """The rank by which readers divide alpha; one where no tensor has a rank."""
    for name, spec in layout.specs.items():
        if "rank" in spec.words:
            return params.tensors[name].shape[spec.words.index("rank")]
    return 1


def _scale(path: str, source: Source, key: str | None, rank: int | None) -> tuple[float, str]:
    """alpha / rank; one where there is no alpha, no rank, or an alpha of zero (as the trainers read it)."""
    if rank is None:
        return 1.0, ""
    if key is None:
        return 1.0, "no alpha in the file: read as the rank"
    alpha = source.read(key)
    if alpha.numel() != 1:
        raise ShapeError(f"{path}.{_ALPHA}: expected a single number, got shape {tuple(alpha.shape)}")
    value = float(alpha.reshape(-1)[0])
    if not math.isfinite(value):
        raise FormatError(f"{source.path}: {path}.{_ALPHA} is {value}; the file is damaged")
    return (value / rank, "") if value else (1.0, "alpha is 0 in the file: read as the rank")


def _magnitude_shape(axis: str, site: Site) -> tuple[int, ...]:
    ones = (1,) * len(site.kernel)
    return (site.shape[0], 1, *ones) if axis == "out" else (1, site.shape[1], *ones)


def _axis(path: str, shape: tuple[int, ...], site: Site, hint: str) -> tuple[str, str]:
    """The axis of a magnitude by its shape, and a note where the shape alone does not tell."""
    out, inputs = site.shape[:2]
    total = math.prod(shape)
    fits = [axis for axis, size in (("out", out), ("in", inputs)) if total == size]
    if len(shape) > 1 and len(fits) == 2 and out != 1:
        fits = ["out"] if shape[0] == out else ["in"]
    if not fits:
        raise ShapeError(
            f"{path}.{_MAGNITUDE}: expected ({out}, 1, ...) for output rows or (1, {inputs}, ...) for input channels, "
            f"got {shape}"
        )
    if len(fits) == 1:
        return fits[0], ""
    if hint in fits:
        return hint, ""
    return "out", "1-D dora_scale on a square layer: read as output rows"


def _fit_ones(spec: Spec, t: Tensor, site: Site) -> Tensor:
    """Add or drop trailing axes of size one, which programs write differently for 1x1 convolutions and their like."""
    kernel = kernel_of(site.sizes)
    starred = spec.words[-1] if spec.words[-1] in ("*k", "*1") else ""
    plain = len(spec.words) - bool(starred)
    want = plain + (len(kernel) if starred else 0)
    if t.dim() > want and all(size == 1 for size in t.shape[want:]):
        return t.reshape(t.shape[:want])
    if plain <= t.dim() < want and (starred == "*1" or all(k == 1 for k in kernel)):
        return t.reshape(*t.shape, *[1] * (want - t.dim()))
    return t


def _nothing_matched(source: Source, unmatched: Mapping[str, str], layer_of: Mapping[str, object]) -> str:
    in_file = ", ".join(list(unmatched)[:3]) or "no keys at all"
    in_model = ", ".join(list(layer_of)[:3]) or "no layers"
    return (
        f"{source.path}: none of its {len(unmatched)} keys belongs to this model, so nothing was loaded. "
        f"In the file: {in_file}. The model's layers would be called {in_model}. Is it made for another model?"
    )
