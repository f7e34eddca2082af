"""The LyCORIS dialect: `lycoris_<path with underscores>.<suffix>`, one `alpha` a layer, `dora_scale` for magnitudes.

Reading is generous where programs differ (trailing axes of size one, a missing alpha, 1-D magnitudes) and says so;
writing is exactly what LyCORIS writes, but for two numbers that it rounds: alpha and `dora_scale` stay in fp32.
Source: files written by LyCORIS 3.x and 4.1.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from nerine.algorithms import REGISTRY, Algorithm, DoRA, Params
from nerine.axes import Layout, Spec, bind, kernel_of
from nerine.errors import FormatError, OptionError, ShapeError
from nerine.files.checkpoint import Checkpoint, LoadReport, LoadRow, Record
from nerine.files.meta import Meta, read_meta
from nerine.files.names import candidates, flatten, split_key, stems
from nerine.files.store import Source
from nerine.ops.precision import wide
from nerine.site import Site

__all__ = ["Lycoris"]

_ALPHA, _MAGNITUDE = "alpha", "dora_scale"
Known = list[tuple[Algorithm, Layout]]


def _known_layouts(others: Sequence[type[Algorithm]]) -> Iterator[tuple[Algorithm, Layout]]:
    for kind in dict.fromkeys([*REGISTRY.values(), *others]):
        try:
            algorithm = kind()
        except TypeError as error:
            raise OptionError(
                f"{kind.__name__}: to be read from files, every setting needs a default ({error})"
            ) from None
        for layout in algorithm.layouts:
            yield algorithm, layout


class Lycoris:
    """Reader and writer of the dialect; `prefix` is what stands before the layer's name."""

    name = "lycoris"

    def __init__(self, prefix: str = "lycoris", others: Sequence[type[Algorithm]] = ()) -> None:
        self.prefix = prefix
        self.others = tuple(others)

    def knowing(self, others: Sequence[type[Algorithm]]) -> Lycoris:
        """This dialect with algorithms beside those of the registry."""
        return Lycoris(self.prefix, others)

    # -- writing -------------------------------------------------------------------------------------------------
    def write(self, records: Mapping[str, Record], dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Tensors by key, cast to `dtype` (None: as they are).

        Raises:
            FormatError: two layers would get the same name.
        """
        tensors: dict[str, Tensor] = {}
        for stem, path in stems(records, self.prefix).items():
            algorithm, site, params = records[path].algorithm, records[path].site, records[path].params
            layout = algorithm.layout_of(params.tensors)
            for name, spec in layout.specs.items():
                exact = spec.key == _MAGNITUDE
                tensor = params.tensors[name].detach()
                kept = torch.float32 if exact and tensor.dtype != torch.float64 else tensor.dtype
                tensors[f"{stem}.{spec.key}"] = tensor.to(kept if exact or dtype is None else dtype)
            for key, value in layout.marks.items():
                tensors[f"{stem}.{key}"] = torch.tensor(int(value))
            if layout.alpha:
                alpha = params.scale * (_rank(params, layout, site) if layout.alpha == "scale" else 1)
                tensors[f"{stem}.{_ALPHA}"] = torch.tensor(alpha, dtype=torch.float32)
        return tensors

    # -- reading -------------------------------------------------------------------------------------------------
    def read(self, source: Source, sites: Mapping[str, Site]) -> Checkpoint:
        """Records for the layers at `sites` (by path) that the file has tensors for.

        Raises:
            FormatError: nothing in the file belongs to these layers, or the tensors of a layer are no known set.
            ShapeError: a tensor does not fit its layer.
        """
        meta = read_meta(source.metadata, str(source.path), self.others)
        known = list(_known_layouts(self.others))
        suffixes = {key for _, layout in known for key in layout.keys} | {_ALPHA, _MAGNITUDE}
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
            raise FormatError(f"{_nothing_matched(source, unmatched, layers_of)}{_unknown(meta)}")
        records, rows = {}, []
        for path in (p for p in sites if p in found):
            records[path], row = _layer(source, path, sites[path], found[path], meta, known)
            rows.append(row)
        here = {flatten(path) for path in records}
        missing = tuple(path for path in meta.layers if flatten(path) not in here)
        notes = (meta.note,) if meta.note else ()
        report = LoadReport(str(source.path), tuple(rows), unmatched, missing, notes)
        return Checkpoint(records, meta, report)


def _layer(
    source: Source, path: str, site: Site, keys: Mapping[str, str], meta: Meta, known: Known
) -> tuple[Record, LoadRow]:
    told = meta.layers.get(path)
    algorithm, layout, notes = _recognise(path, site, keys, source, meta, known)
    tensors = {name: _floats(source, keys[spec.key]) for name, spec in layout.specs.items()}
    if _MAGNITUDE in keys:
        hint = told.axis if isinstance(told, DoRA) else ""
        magnitude = _floats(source, keys[_MAGNITUDE])
        axis, note = _axis(path, _shape(magnitude.shape, site), site, hint)
        notes += [note] if note else []
        algorithm = DoRA(algorithm, axis=axis)
        lead = magnitude.shape[:1] if site.experts else ()
        tensors = {"magnitude": magnitude.reshape(*lead, *_magnitude_shape(axis, site)), **tensors}
        layout = algorithm.layout_of(tensors)
    if told is not None and set(tensors) in [set(known.specs) for known in told.layouts]:
        algorithm = told if not isinstance(told, DoRA) or told.axis == getattr(algorithm, "axis", "") else algorithm
    tensors = {name: _fit_ones(layout.specs[name], t, site) for name, t in tensors.items()}
    sizes = bind(layout, {name: _shape(t.shape, site) for name, t in tensors.items()}, site.sizes, path)
    if 0 in sizes.values():
        raise ShapeError(f"{path}: a tensor of the file has no elements ({', '.join(keys.values())})")
    scale, note = _scale(path, source, keys.get(_ALPHA), layout, sizes)
    notes += [note] if note else []
    shown = str(algorithm) if told is not None else _bare_name(algorithm)
    row = LoadRow(path, shown, sizes.get("rank"), scale, "; ".join(notes))
    params = Params(tensors, scale)
    return Record(algorithm, site, params if told is None else algorithm.from_file(params)), row


def _shape(shape: tuple[int, ...], site: Site) -> tuple[int, ...]:
    """A shape without the axis of experts, where the layer has one."""
    return tuple(shape[1:] if site.experts else shape)


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


def _recognise(
    path: str,
    site: Site,
    keys: Mapping[str, str],
    source: Source,
    meta: Meta,
    known: Known,
) -> tuple[Algorithm, Layout, list[str]]:
    """The algorithm and layout whose tensors are exactly those of the file, by key and then by shape; notes on that."""
    own = set(keys) - {_ALPHA, _MAGNITUDE}
    by_key = [(a, layout) for a, layout in known if layout.keys == own and _marks_agree(layout, keys, source)]
    if not by_key:
        raise FormatError(f"{_no_such_set(path, own, known, source)}{_unknown(meta)}")
    by_shape = [(a, layout) for a, layout in by_key if _fits(layout, site, keys, source, path)]
    told = meta.layers.get(path)
    inner = getattr(told, "inner", told)
    likely = [pair for pair in by_shape if type(pair[0]) is type(inner)] or by_shape or by_key
    algorithm, layout = likely[0]
    rivals = {str(other.specs) for a, other in likely[1:] if type(a) is type(algorithm)} - {str(layout.specs)}
    note = "the shapes fit an older layout of the tensors as well: read as the newer one"
    return algorithm, layout, [note] if by_shape and rivals else []


def _marks_agree(layout: Layout, keys: Mapping[str, str], source: Source) -> bool:
    return all(bool(source.read(keys[key]).reshape(-1)[0]) == bool(value) for key, value in layout.marks.items())


def _fits(layout: Layout, site: Site, keys: Mapping[str, str], source: Source, path: str) -> bool:
    """Whether the shapes in the file agree with the layer and with each other."""
    shapes = {}
    for name, spec in layout.specs.items():
        shape = source.shape(keys[spec.key])
        shapes[name] = _shape(_ones(spec, shape, site), site)
    try:
        bind(layout, shapes, site.sizes, path)
    except ShapeError:
        return False
    return True


def _no_such_set(path: str, own: set[str], known: Known, source: Source) -> str:
    algorithm, layout = max(known, key=lambda pair: (len(pair[1].keys & own), -len(pair[1].keys)))
    lacking, extra = sorted(layout.keys - own), sorted(own - layout.keys)
    return (
        f"{source.path}: {path} has {', '.join(sorted(own)) or 'no tensors'}, which is no complete adapter; "
        f"the closest is {algorithm.name}, {'which also has ' + ', '.join(lacking) if lacking else ''}"
        f"{' and ' if lacking and extra else ''}{'which has no ' + ', '.join(extra) if extra else ''}"
    )


def _unknown(meta: Meta) -> str:
    """The end of an error about a file whose settings cannot be read, which may be the reason."""
    return f" {meta.note}; pass the classes of your own algorithms as `algorithms`" if meta.note else ""


def _rank(params: Params, layout: Layout, site: Site) -> int:
    """The rank by which readers divide alpha; one where no tensor has a rank."""
    for name, spec in layout.specs.items():
        if "rank" in spec.words:
            return _shape(params.tensors[name].shape, site)[spec.words.index("rank")]
    return 1


def _scale(path: str, source: Source, key: str | None, layout: Layout, sizes: Mapping[str, int]) -> tuple[float, str]:
    """alpha / rank, or the bound of a constraint; one where there is no alpha, no rank, or an alpha of zero (as the
    trainers read it)."""
    rank = sizes.get("rank", 0)
    if not layout.alpha or (layout.alpha == "scale" and not rank):
        return 1.0, ""
    is_bound = layout.alpha == "constraint"
    if key is None:
        return (
            (0.0, "no alpha in the file: read as no constraint")
            if is_bound
            else (
                1.0,
                "no alpha in the file: read as the rank",
            )
        )
    alpha = source.read(key)
    if alpha.numel() != 1:
        raise ShapeError(f"{path}.{_ALPHA}: expected a single number, got shape {tuple(alpha.shape)}")
    value = float(alpha.reshape(-1)[0])
    if not math.isfinite(value) or (is_bound and value < 0):
        raise FormatError(f"{source.path}: {path}.{_ALPHA} is {value}; the file is damaged")
    if is_bound:
        return value, ""
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
    return t.reshape(_ones(spec, tuple(t.shape), site))


def _ones(spec: Spec, shape: tuple[int, ...], site: Site) -> tuple[int, ...]:
    """`shape` with trailing axes of size one added or dropped, which programs write differently for 1x1 convolutions
    and their like; unchanged where that does not help."""
    if "?1" in spec.words:
        return shape
    kernel = kernel_of(site.sizes)
    starred = spec.words[-1] if spec.words[-1] in ("*k", "*1") else ""
    plain = len(spec.words) - bool(starred) + bool(site.experts)
    want = plain + (len(kernel) if starred else 0)
    if len(shape) > want and all(size == 1 for size in shape[want:]):
        return shape[:want]
    if plain <= len(shape) < want and (starred == "*1" or all(k == 1 for k in kernel)):
        return (*shape, *[1] * (want - len(shape)))
    return shape


def _nothing_matched(source: Source, unmatched: Mapping[str, str], layer_of: Mapping[str, object]) -> str:
    in_file = ", ".join(list(unmatched)[:3]) or "no keys at all"
    in_model = ", ".join(list(layer_of)[:3]) or "no layers"
    return (
        f"{source.path}: none of its {len(unmatched)} keys belongs to this model, so nothing was loaded. "
        f"In the file: {in_file}. The model's layers would be called {in_model}. Is it made for another model?"
    )
