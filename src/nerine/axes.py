"""The axis mini-language: one line of words says which axes a tensor has; it is documentation, check and program.

    "out rank"        two axes; the same word means the same size in every tensor of the layout
    "rank in *k"      `*k` stands for all kernel axes of the layer (none for a linear layer)
    "out rank *1"     `*1` stands for as many axes of size one as the layer has kernel axes
    "?1 out *1"       `?1` is one axis of size one, there only where the layer has kernel axes
    "1 in"            a literal one

A `Layout` is one way in which the tensors of an algorithm can stand in memory and in a file; `bind` solves for the
sizes of the axes and says in words what disagrees. This file knows no torch: shapes are tuples of ints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from nerine.errors import ShapeError

__all__ = ["Layout", "Sizes", "Spec", "bind", "kernel_of", "shape_of"]

Sizes = dict[str, int]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Spec:
    """One tensor of a layout: its axes, its key in a file and how it starts.

    `init` and `live` are names of initialisers: `live` is what the tensor starts from where a learned scalar already
    makes the deviation zero. The `carrier`s together may be multiplied by a number to multiply the whole deviation by
    it. `gate` names the axis along which single entries can be switched off (rank dropout). A tensor that is not
    `trained` is a constant of the adapter.
    """

    axes: str
    key: str
    init: str = "kaiming"
    live: str = "kaiming"
    carrier: bool = False
    gate: str = ""
    trained: bool = True

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(self.axes.split())


@dataclass(frozen=True)
class Layout:
    """The tensors of one adapter by name, and the equations between the sizes of their axes, such as "out = a b".

    `alpha` says what a file's `alpha` means: "scale" (alpha / rank multiplies), "constraint" (a bound, taken as it is)
    or nothing (""). `marks` are further keys of a file with the number that each must hold. `check` says what is wrong
    with sizes where no equation can tell ("" where nothing is).
    """

    specs: Mapping[str, Spec]
    relations: tuple[str, ...] = ()
    alpha: str = "scale"
    marks: Mapping[str, float] = field(default_factory=dict)
    check: Callable[[Sizes], str] | None = None

    @property
    def keys(self) -> frozenset[str]:
        """The suffixes that a file has for this layout."""
        return frozenset([*(spec.key for spec in self.specs.values()), *self.marks])

    @property
    def carriers(self) -> tuple[str, ...]:
        """Names of the tensors that, multiplied by one number, multiply the whole deviation by it."""
        return tuple(name for name, spec in self.specs.items() if spec.carrier)

    def gates(self, has_kernel: bool) -> tuple[tuple[str, int], ...]:
        """Names of the tensors that one gate multiplies, and the axis along which it does at a layer with a kernel or
        without."""
        gated = (
            (name, [w for w in spec.words if has_kernel or w != "?1"], spec.gate) for name, spec in self.specs.items()
        )
        return tuple((name, words.index(gate)) for name, words, gate in gated if gate)


def kernel_of(sizes: Mapping[str, int]) -> Shape:
    """The kernel sizes `k0, k1, ...` as a tuple; empty for a linear layer."""
    found: list[int] = []
    while (size := sizes.get(f"k{len(found)}")) is not None:
        found.append(size)
    return tuple(found)


def shape_of(spec: Spec, sizes: Mapping[str, int]) -> Shape:
    """The shape that `spec` has once the sizes of its axes are known."""
    shape: list[int] = []
    for word in spec.words:
        if word == "*k":
            shape += kernel_of(sizes)
        elif word == "*1":
            shape += [1] * len(kernel_of(sizes))
        elif word == "?1":
            shape += [1] * bool(kernel_of(sizes))
        else:
            shape.append(1 if word == "1" else sizes[word])
    return tuple(shape)


def _spread(spec: Spec, shape: Shape, kernel_axes: int | None, where: str) -> list[str]:
    """One axis word per dimension of `shape`."""
    starred = any(word.startswith("*") for word in spec.words)
    plain = sum(word not in ("*k", "*1", "?1") for word in spec.words)
    only_kernel = "?1" in spec.words
    extra = len(shape) - plain
    if only_kernel and extra:  # with it comes one axis at least of the kernel
        extra = extra - 1 or -1
    if extra < 0 or (not starred and extra) or (starred and kernel_axes not in (None, extra)):
        want = plain + (kernel_axes or 0) * starred + bool(only_kernel and kernel_axes)
        raise ShapeError(
            f"{where}.{spec.key}: expected {want} axes '{spec.axes}', got {len(shape)} in {shape}. "
            "Is this file for another layer or model?"
        )
    words: list[str] = []
    for word in spec.words:
        if word == "*k":
            words += [f"k{i}" for i in range(extra)]
        elif word == "*1":
            words += ["1"] * extra
        elif word == "?1":
            words += ["1"] * bool(extra)
        else:
            words.append(word)
    return words


def bind(layout: Layout, shapes: Mapping[str, Shape], known: Mapping[str, int], where: str) -> Sizes:
    """Solve for the size of every axis.

    `shapes` has one shape per tensor name of the layout; `known` are the sizes that the layer itself fixes
    (`out`, `in`, `k0`, ...; empty where no layer is at hand); `where` names the layer in errors.

    Raises:
        ShapeError: a tensor is missing, has another number of axes, or disagrees with the layer or its partners.
    """
    sizes: Sizes = {"1": 1, **known}
    witness = dict.fromkeys(known, "the layer")
    kernel_axes = len(kernel_of(known)) if "out" in known else None
    for name, spec in layout.specs.items():
        if name not in shapes:
            raise ShapeError(f"{where}.{spec.key}: this tensor is missing (expected '{spec.axes}')")
        shape = tuple(shapes[name])
        for word, size in zip(_spread(spec, shape, kernel_axes, where), shape, strict=True):
            if sizes.setdefault(word, size) != size:
                other = witness.get(word, "this axis")
                raise ShapeError(
                    f"{where}.{spec.key}: axis '{word}' is {size} here but {sizes[word]} in {other} "
                    f"(expected '{spec.axes}', got {shape})"
                )
            witness.setdefault(word, spec.key)
    for relation in layout.relations:
        _relate(relation, sizes, witness, where, any_kernel=not known and not kernel_of(sizes))
    del sizes["1"]
    if layout.check is not None and (wrong := layout.check(sizes)):
        raise ShapeError(f"{where}: {wrong}")
    return sizes


def _relate(relation: str, sizes: Sizes, witness: Mapping[str, str], where: str, any_kernel: bool = False) -> None:
    """Check `left = product of the right words`, or solve it where one size is unknown. With `any_kernel`, no layer is
    at hand and no tensor shows its kernel, so that the product may be any part of `left`."""
    left, right = relation.split(" = ")
    words: list[str] = []
    for word in right.split():
        words += [f"k{i}" for i in range(len(kernel_of(sizes)))] if word == "*k" else [word]
    unknown = [word for word in words if word not in sizes]
    product = math.prod(sizes[word] for word in words if word in sizes)
    if len(unknown) > 1 or (unknown and left not in sizes):
        return
    if any_kernel and "*k" in right.split() and not unknown and product and sizes.get(left, product) % product == 0:
        return
    if unknown and product and sizes[left] % product == 0:
        sizes[unknown[0]] = sizes[left] // product
    elif unknown or sizes.setdefault(left, product) != product:
        shown = " x ".join(str(sizes.get(word, "?")) for word in words)
        raise ShapeError(
            f"{where}: {left} = {' x '.join(words)} must be {sizes[left]} ({witness.get(left, 'the layer')}) "
            f"but is {shown}{'' if unknown else f' = {product}'}"
        )
