"""LoKr over bare tensors: (w1, w1a, w1b, w2, w2a, w2b, t); of each factor either the whole or its parts, the rest None.

Here LyCORIS's `gamma` is alpha: it is divided by the rank, which the parts tell, and has no effect where both factors
are whole. `kron_weight` and `kron_bypass` take the factor itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nerine.algorithms import LoKr, Params
from nerine.integrations.lycoris.functional.general import check_backend, factorization, named, required
from nerine.integrations.lycoris.functional.geometry import call_of
from nerine.ops.kron import kron
from nerine.ops.precision import full_precision, wide

__all__ = ["bypass_forward_diff", "diff_weight", "kron_bypass", "kron_weight", "make_kron", "weight_gen"]

_LOKR = LoKr()
_NAMES = ("w1", "w1a", "w1b", "w2", "w2a", "w2b", "t")
Maybe = Tensor | None
Seven = tuple[Maybe, Maybe, Maybe, Maybe, Maybe, Maybe, Maybe]


def make_kron(w1: Tensor, w2: Tensor, scale: Any) -> Tensor:
    """scale·(w1 ⊗ w2) of `w1` `[a, c]` and `w2` `[b, d, *k]`."""
    return kron(w1.flatten(1) * scale, w2)


def weight_gen(
    org_weight: Tensor,
    rank: int,
    tucker: bool = True,
    factor: int = -1,
    decompose_both: bool = False,
    full_matrix: bool = False,
    unbalanced_factorization: bool = False,
) -> Seven:
    """w1, w1a, w1b, w2, w2a, w2b and t for `org_weight` `[out, in, *k]`, with out = a·b and in = c·d.

    w1 is `[a, c]`, or w1a `[a, rank]` and w1b `[rank, c]`. w2 is `[b, d, *k]`, or w2a `[b, rank]` and w2b
    `[rank, d, *k]`, or around a core t `[rank, rank, *k]` w2a `[rank, b]` and w2b `[rank, d]`. Parts are taken where
    the rank is less than half the larger side, and of w1 only with `decompose_both`; `full_matrix` takes none. w2 or
    w2b is zero.
    """
    out, inputs, *kernel = org_weight.shape
    (a, b), (c, d) = factorization(out, factor), factorization(inputs, factor)
    if unbalanced_factorization:
        a, b = b, a
    like = wide(org_weight.new_empty((0,)))
    w1 = w1a = w1b = w2 = w2a = w2b = t = None
    if full_matrix or rank >= max(b, d) / 2:
        w2 = like.new_zeros((b, d, *kernel))
    elif tucker and math.prod(kernel) != 1:
        t = _started(like.new_empty((rank, rank, *kernel)))
        w2a, w2b = _started(like.new_empty((rank, b))), like.new_zeros((rank, d))
    else:
        w2a, w2b = _started(like.new_empty((b, rank))), like.new_zeros((rank, d, *kernel))
    if decompose_both and not full_matrix and rank < max(a, c) / 2:
        w1a, w1b = _started(like.new_empty((a, rank))), _started(like.new_empty((rank, c)))
    else:
        w1 = _started(like.new_empty((a, c)))
    return w1, w1a, w1b, w2, w2a, w2b, t


def _started(t: Tensor) -> Tensor:
    return nn.init.kaiming_uniform_(t, a=math.sqrt(5))


def _params(weights: tuple[Maybe, ...], scale: Any) -> tuple[Params, tuple[int, ...]]:
    """The tensors under nerine's names, and the shape of the weight that they make."""
    w1, w1a, w1b, w2, w2a, w2b, t = named(weights, *_NAMES)
    found: dict[str, Tensor] = {}
    if w1 is not None:
        found["w1"] = w1 * scale
        a, c = w1.shape
    else:
        w1a, w1b = required(w1a, "w1a"), required(w1b, "w1b")
        found["w1_a"], found["w1_b"] = w1a * scale, w1b
        a, c = w1a.shape[0], w1b.shape[1]
    if w2 is not None:
        found["w2"] = w2
        return Params(found), (a * w2.shape[0], c * w2.shape[1], *w2.shape[2:])
    w2a, w2b = required(w2a, "w2a"), required(w2b, "w2b")
    if t is not None:
        found["t2"], found["w2_a"], found["w2_b"] = t, w2a, w2b
        return Params(found), (a * w2a.shape[1], c * w2b.shape[1], *t.shape[2:])
    found["w2_a"], found["w2_b"] = w2a, w2b.flatten(1)
    return Params(found), (a * w2a.shape[0], c * w2b.shape[1], *w2b.shape[2:])


def _scale(weights: tuple[Maybe, ...], gamma: Any) -> Any:
    """gamma / rank; one where nothing has a rank."""
    w1, w1a, _, w2, _, w2b, _ = named(weights, *_NAMES)
    if w1 is None:
        return gamma / required(w1a, "w1a").shape[1]
    return 1.0 if w2 is not None else gamma / required(w2b, "w2b").shape[0]


def _delta(weights: tuple[Maybe, ...], scale: Any) -> Tensor:
    p, shape = _params(weights, scale)
    with full_precision(next(iter(p.tensors.values()))):
        return _LOKR.delta(p, shape)


def _add(h: Tensor, weights: tuple[Maybe, ...], scale: Any, extra_args: Mapping[str, Any]) -> Tensor:
    p, shape = _params(weights, scale)
    return _LOKR.add(p, call_of(h, shape, extra_args, lambda: _LOKR.delta(p, shape)))


def kron_weight(
    w1: Maybe,
    w1a: Maybe,
    w1b: Maybe,
    w2: Maybe,
    w2a: Maybe,
    w2b: Maybe,
    t: Maybe = None,
    scale: Any = 1.0,
    backend: str | None = None,
) -> Tensor:
    """scale·(w1 ⊗ w2), each factor from its parts where it has some."""
    check_backend(backend)
    return _delta((w1, w1a, w1b, w2, w2a, w2b, t), scale)


def kron_bypass(
    h: Tensor,
    w1: Maybe,
    w1a: Maybe,
    w1b: Maybe,
    w2: Maybe,
    w2a: Maybe,
    w2b: Maybe,
    t: Maybe = None,
    scale: Any = 1.0,
    extra_args: Mapping[str, Any] | None = None,
    backend: str | None = None,
) -> Tensor:
    """What `kron_weight` adds to the output of the layer for `h`, by way of the two factors."""
    check_backend(backend)
    return _add(h, (w1, w1a, w1b, w2, w2a, w2b, t), scale, extra_args or {})


def diff_weight(*weights: Maybe, gamma: Any = 1.0, backend: str | None = None) -> Tensor:
    """(gamma/rank)·(w1 ⊗ w2); w1 ⊗ w2 where both factors are whole."""
    check_backend(backend)
    return _delta(weights, _scale(weights, gamma))


def bypass_forward_diff(
    h: Tensor,
    org_out: Maybe,
    *weights: Maybe,
    gamma: Any = 1.0,
    extra_args: Mapping[str, Any] | None = None,
    backend: str | None = None,
) -> Tensor:
    """What `diff_weight` adds to the output of the layer for `h`. `org_out` is not used."""
    check_backend(backend)
    return _add(h, weights, _scale(weights, gamma), extra_args or {})
