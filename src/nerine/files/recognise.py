"""From the pieces of one layer to its adapter: which algorithm, which layout, what scale; decided by keys and shapes.

Nothing is read here but single numbers. What is refused is refused before anything of the layer's size exists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nerine.algorithms import Algorithm, DoRA, Layout, Params, Shape, Spec
from nerine.axes import bind, kernel_of
from nerine.errors import FormatError, ShapeError
from nerine.files.checkpoint import Layer
from nerine.files.pieces import ALPHA, EXTRA, MAGNITUDE, Known, Piece
from nerine.files.reports import LoadRow
from nerine.site import Site

__all__ = ["Told", "first", "recognise"]

LARGEST_ALPHA = 1e30  # times any size of a layer it is still a number in fp32
LARGEST = 2**34  # entries of a weight; larger ones exist in no model, and files that ask for them are hostile


@dataclass(frozen=True)
class Told:
    """What is known of a layer beside its tensors: where the file is, its path, the algorithm that metadata names."""

    file: str
    path: str
    algorithm: Algorithm | None = None
    note: str = ""  # what was wrong with the metadata


def recognise(told: Told, site: Site | None, pieces: Mapping[str, Piece], known: Known) -> tuple[Layer, LoadRow]:
    """The adapter that `pieces` (by canonical suffix) are, on a layer of `site`, or on one that their shapes tell.

    Raises:
        FormatError: they are no complete set of tensors of any algorithm, or a number is damaged.
        ShapeError: a tensor does not fit its layer or its partner.
    """
    algorithm, layout, notes = _which(told, site, pieces, known)
    chosen = {name: pieces[spec.key] for name, spec in layout.specs.items()}
    if MAGNITUDE in pieces:
        shapes = {name: _bare(piece.shape, site) for name, piece in chosen.items()}
        sizes = _sizes(layout, shapes, site, told.path)
        if site is not None and site.kind == "norm":
            raise ShapeError(f"{told.path}.{MAGNITUDE}: a norm has no magnitudes; remove this tensor")
        bare = _bare(pieces[MAGNITUDE].shape, site)
        if "in" not in sizes and len(bare) > 1 and bare[0] == 1:  # without a model, it alone may tell the inputs
            sizes["in"] = bare[1]
        axis, note = _axis(told, bare, sizes)
        notes += [note] if note else []
        algorithm = DoRA(algorithm, axis=axis)
        lead = pieces[MAGNITUDE].shape[:1] if site is not None and site.experts else ()
        shape = (*lead, *_magnitude_shape(axis, sizes))
        if site is None and bare[: len(shape)] == shape and set(bare[len(shape) :]) <= {1}:
            shape = bare  # a kernel that nothing else shows
        whole = pieces[MAGNITUDE].changed(lambda t: t.reshape(shape), shape)
        chosen = {"magnitude": whole, **chosen}
        layout = algorithm.layout_of(chosen)
    if told.algorithm is not None and set(chosen) in [set(one.specs) for one in told.algorithm.layouts]:
        own_axis = getattr(algorithm, "axis", "")
        algorithm = algorithm if getattr(told.algorithm, "axis", "") != own_axis else told.algorithm
    chosen = {name: _fit_ones(layout.specs[name], piece, site) for name, piece in chosen.items()}
    sizes = _sizes(layout, {name: _bare(piece.shape, site) for name, piece in chosen.items()}, site, told.path)
    if 0 in sizes.values():
        raise ShapeError(f"{told.path}: a tensor of the file has no elements ({', '.join(pieces)})")
    scale, note = _scale(told, pieces, layout, sizes)
    notes += [note] if note else []
    shown = str(algorithm) if told.algorithm is not None else _bare_name(algorithm)
    row = LoadRow(told.path, shown, sizes.get("rank"), scale, "; ".join(notes), getattr(algorithm, "axis", ""))
    layer = Layer(
        algorithm,
        _site_of(sizes, told, algorithm.kinds == {"norm"}) if site is None else site,
        {name: piece.shape for name, piece in chosen.items()},
        scale,
        lambda: Params({name: _number(told, piece) for name, piece in chosen.items()}, scale),
        dtypes={name: piece.dtype for name, piece in chosen.items()},
    )
    return layer, row


def _number(told: Told, piece: Piece) -> Tensor:
    """The values of a piece, which must be floating-point numbers."""
    tensor = piece.read()
    if not tensor.is_floating_point():
        raise FormatError(f"{told.file}: {piece.key} holds {tensor.dtype}, expected floating-point numbers")
    return tensor


def _sizes(layout: Layout, shapes: Mapping[str, Shape], site: Site | None, path: str) -> dict[str, int]:
    return bind(layout, shapes, {} if site is None else site.sizes, path)


def _site_of(sizes: Mapping[str, int], told: Told, is_norm: bool) -> Site:
    """The layer that the tensors themselves tell: its outputs and inputs, and its kernel where they show one."""
    kernel = kernel_of(sizes)
    out = sizes.get("out", 1)
    inputs = sizes.get("in", sizes.get("c", 1) * sizes.get("flat", 1))  # of a LoKr, flat is that of one factor
    if out * inputs * math.prod(kernel) > LARGEST:
        raise ShapeError(
            f"{told.path}: the tensors stand for a weight of {out:,} x {inputs:,}{''.join(f' x {k}' for k in kernel)} "
            "entries, more than any model has; the file is damaged or hostile"
        )
    ones = (1,) * len(kernel)
    if is_norm:
        return Site("norm", (out, *kernel))
    if not kernel:
        return Site("linear", (out, inputs))
    return Site("conv", (out, inputs, *kernel), ones, tuple(k // 2 for k in kernel), ones)


def _bare(shape: Shape, site: Site | None) -> Shape:
    """A shape without the axis of experts, where the layer has one."""
    return tuple(shape[1:]) if site is not None and site.experts else tuple(shape)


def _bare_name(algorithm: Algorithm) -> str:
    """The name of an algorithm whose settings the file does not tell."""
    if isinstance(algorithm, DoRA):
        return f"DoRA({_bare_name(algorithm.inner)}, axis={algorithm.axis!r})"
    return type(algorithm).__name__


def _which(
    told: Told, site: Site | None, pieces: Mapping[str, Piece], known: Known
) -> tuple[Algorithm, Layout, list[str]]:
    """The algorithm and layout whose tensors are exactly those of the file, by key and then by shape; notes on that."""
    own = set(pieces) - EXTRA
    by_key = [(a, layout) for a, layout in known.by_keys.get(frozenset(own), ()) if _marks_agree(layout, pieces)]
    if not by_key:
        raise FormatError(f"{_no_such_set(told, own, known)}{_unknown(told)}")
    layouts = {id(layout): layout for _, layout in by_key}  # some algorithms share theirs
    fitting = {key for key, layout in layouts.items() if len(layouts) == 1 or _fits(layout, site, pieces, told.path)}
    by_shape = [(a, layout) for a, layout in by_key if id(layout) in fitting]
    inner = getattr(told.algorithm, "inner", told.algorithm)
    likely = [pair for pair in by_shape if type(pair[0]) is type(inner)] or by_shape or by_key
    algorithm, layout = likely[0]
    rivals = {str(other.specs) for a, other in likely[1:] if type(a) is type(algorithm)} - {str(layout.specs)}
    note = "the shapes fit an older layout of the tensors as well: read as the newer one"
    return algorithm, layout, [note] if by_shape and rivals else []


def _marks_agree(layout: Layout, pieces: Mapping[str, Piece]) -> bool:
    return all(_single(pieces[key]) == bool(value) for key, value in layout.marks.items())


def _single(piece: Piece) -> bool | None:
    return bool(first(piece.read())) if math.prod(piece.shape) == 1 else None


def first(t: Tensor) -> float:
    """The first number of a tensor of any format."""
    return float(t.reshape(-1)[0].to(torch.float64))


def _fits(layout: Layout, site: Site | None, pieces: Mapping[str, Piece], path: str) -> bool:
    """Whether the shapes in the file agree with the layer and with each other."""
    shapes = {name: _bare(_ones(spec, pieces[spec.key].shape, site), site) for name, spec in layout.specs.items()}
    try:
        _sizes(layout, shapes, site, path)
    except ShapeError:
        return False
    return True


def _no_such_set(told: Told, own: set[str], known: Known) -> str:
    algorithm, layout = max(known.layouts, key=lambda pair: (len(pair[1].keys & own), -len(pair[1].keys)))
    lacking, extra = sorted(layout.keys - own), sorted(own - layout.keys)
    if own and own <= {"weight", "bias"}:
        return f"{told.file}: {told.path} has {' and '.join(sorted(own))} alone: expected an adapter, found a model"
    return (
        f"{told.file}: {told.path} has {', '.join(sorted(own)) or 'no tensors'}, which is no complete adapter; "
        f"the closest is {algorithm.name}, {'which also has ' + ', '.join(lacking) if lacking else ''}"
        f"{' and ' if lacking and extra else ''}{'which has no ' + ', '.join(extra) if extra else ''}"
    )


def _unknown(told: Told) -> str:
    """The end of an error about a file whose settings cannot be read, which may be the reason."""
    return f" {told.note}; pass the classes of your own algorithms as `algorithms`" if told.note else ""


def _scale(told: Told, pieces: Mapping[str, Piece], layout: Layout, sizes: Mapping[str, int]) -> tuple[float, str]:
    """alpha / rank, or the bound of a constraint; one where there is no alpha, no rank, or an alpha of zero (as the
    trainers read it)."""
    rank = sizes.get("rank", 0)
    if not layout.alpha or (layout.alpha == "scale" and not rank):
        return 1.0, ""
    is_bound = layout.alpha == "constraint"
    if "scale" in pieces and not is_bound:
        return _finite(told, pieces["scale"], "scale"), ""
    if ALPHA not in pieces:
        note = "read as no constraint" if is_bound else "read as the rank"
        return (0.0 if is_bound else 1.0), f"no alpha in the file: {note}"
    value = _finite(told, pieces[ALPHA], ALPHA)
    if is_bound and value < 0:
        raise FormatError(f"{told.file}: {told.path}.{ALPHA} is {value}; the file is damaged")
    if is_bound:
        return value, ""
    return (value / rank, "") if value else (1.0, "alpha is 0 in the file: read as the rank")


def _finite(told: Told, piece: Piece, name: str) -> float:
    if math.prod(piece.shape) != 1:
        raise ShapeError(f"{told.path}.{name}: expected a single number, got shape {piece.shape}")
    value = first(piece.read())
    if not abs(value) <= LARGEST_ALPHA:
        raise FormatError(f"{told.file}: {told.path}.{name} is {value}; the file is damaged")
    return value


def _magnitude_shape(axis: str, sizes: Mapping[str, int]) -> Shape:
    ones = (1,) * len(kernel_of(sizes))
    return (sizes["out"], 1, *ones) if axis == "out" else (1, sizes["in"], *ones)


def _axis(told: Told, shape: Shape, sizes: Mapping[str, int]) -> tuple[str, str]:
    """The axis of a magnitude by its shape, and a note where the shape alone does not tell."""
    hint = told.algorithm.axis if isinstance(told.algorithm, DoRA) else ""
    out, inputs = sizes.get("out", 0), sizes.get("in", 0)
    total = math.prod(shape)
    fits = [axis for axis, size in (("out", out), ("in", inputs)) if size and total == size]
    if len(shape) > 1 and len(fits) == 2 and out != 1:
        fits = ["out"] if shape[0] == out else ["in"]
    if not fits:
        raise ShapeError(
            f"{told.path}.{MAGNITUDE}: expected ({out}, 1, ...) for output rows or (1, {inputs}, ...) for input "
            f"channels, got {shape}"
        )
    if len(fits) == 1:
        return fits[0], ""
    if hint in fits:
        return hint, ""
    return "out", "1-D dora_scale on a square layer: read as output rows"


def _fit_ones(spec: Spec, piece: Piece, site: Site | None) -> Piece:
    shape = _ones(spec, piece.shape, site)
    return piece if shape == piece.shape else piece.changed(lambda t: t.reshape(shape), shape)


def _ones(spec: Spec, shape: Shape, site: Site | None) -> Shape:
    """`shape` with trailing axes of size one added or dropped, which programs write differently for 1x1 convolutions
    and their like; unchanged where that does not help."""
    if site is None or "?1" in spec.words:
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
