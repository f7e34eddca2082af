"""Algorithms that nerine does not have, written here from the pieces: the algebra holds for `pre` and `post` as well.

They stand for what an author outside would write, and go through the same battery.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from contract.cases import FEW, TINY, around, few, places_of
from nerine.algorithms import Algorithm, Design, Params, Sandwich
from nerine.axes import Layout, Shape, Spec
from nerine.site import Site
from nerine.testing.battery import (
    check_checkpointing,
    check_copies,
    check_faces,
    check_gradients,
    check_merge,
    check_moves_at_first,
    check_output,
    check_row_norm,
    check_stack,
    check_strength,
    check_unmerge,
    check_zero_at_first,
)

pytestmark = [
    pytest.mark.no_device_guard,  # one device only, and thousands of small operations
    pytest.mark.filterwarnings("ignore:Using padding='same'"),  # torch's, of the base layer
]


@dataclass(frozen=True, kw_only=True)
class OnOutput(Sandwich):
    """(IA)³ on the outputs: W'[o] = W[o]·(1 + w[o])."""

    name = "toy-ia3-out"
    source = "Liu et al., arXiv:2205.05638"
    pieces = frozenset({"post"})
    layouts = (Layout({"w": Spec("out", "w", init="zeros", carrier=True, gate="out")}),)

    def design(self, site: Site) -> Design:
        return Design(self.layouts[0], site.sizes)

    def post(self, p: Params, t: Tensor) -> Tensor:
        return t * p.tensors["w"]


@dataclass(frozen=True, kw_only=True)
class OnInput(Sandwich):
    """(IA)³ on the inputs: W'[:, i] = W[:, i]·(1 + w[i])."""

    name = "toy-ia3-in"
    source = "Liu et al., arXiv:2205.05638"
    pieces = frozenset({"pre"})
    layouts = (Layout({"w": Spec("in", "w", init="zeros", carrier=True, gate="in")}),)

    def design(self, site: Site) -> Design:
        return Design(self.layouts[0], site.sizes)

    def pre(self, p: Params, t: Tensor, transpose: bool = False) -> Tensor:
        return t * p.tensors["w"]


@dataclass(frozen=True, kw_only=True)
class Turn(Sandwich):
    """Blocks of the outputs turned by Cayley rotations: W' = R·W, R = (I + Q)(I - Q)⁻¹, Q skew."""

    name = "toy-oft"
    source = "Qiu et al., arXiv:2306.07280"
    pieces = frozenset({"post"})
    layouts = (Layout({"q": Spec("n s s", "q", init="zeros", carrier=True, gate="n")}, ("out = n s",)),)

    def design(self, site: Site) -> Design:
        out, each = site.shape[0], site.shape[0] // site.groups  # a block may not reach over the groups of a layer
        s = 2 if each % 2 == 0 else each
        return Design(self.layouts[0], {**site.sizes, "n": out // s, "s": s})

    def post(self, p: Params, t: Tensor) -> Tensor:
        q = p.tensors["q"] - p.tensors["q"].mT
        eye = torch.eye(q.shape[-1], dtype=q.dtype)
        turn = torch.linalg.solve(eye - q, eye + q) - eye
        blocks = t.unflatten(-1, q.shape[:2])
        return torch.einsum("nij,...nj->...ni", turn.to(t.dtype), blocks).flatten(-2)


@dataclass(frozen=True, kw_only=True)
class PreAndDelta(Sandwich):
    """GLoRA's two main parts: W' = W + scale·(W·a1·a2 + b1·b2)."""

    name = "toy-glora"
    source = "Chavan et al., arXiv:2306.07967"
    pieces = frozenset({"pre", "delta"})
    layouts = (
        Layout(
            {
                "a1": Spec("in rank", "a1"),
                "a2": Spec("rank in", "a2", init="zeros"),
                "b1": Spec("out rank", "b1", gate="rank"),
                "b2": Spec("rank in *k", "b2", init="zeros", carrier=True),
            }
        ),
    )
    rank: int = 2

    def design(self, site: Site) -> Design:
        return Design(self.layouts[0], {**site.sizes, "rank": self.rank}, 0.75)

    def pre(self, p: Params, t: Tensor, transpose: bool = False) -> Tensor:
        a1, a2 = p.tensors["a1"], p.tensors["a2"]
        return t @ a1 @ a2 if transpose else t @ a2.mT @ a1.mT

    def delta(self, p: Params, shape: Shape) -> Tensor:
        return (p.tensors["b1"] @ p.tensors["b2"].flatten(1)).reshape(shape)


@dataclass(frozen=True, kw_only=True)
class AllThree(PreAndDelta):
    """Every piece at once: pre and delta inside, a scaling of the outputs around."""

    name = "toy-sandwich"
    pieces = frozenset({"pre", "delta", "post"})
    layouts = (Layout({**PreAndDelta.layouts[0].specs, "w": Spec("out", "w", init="zeros")}),)

    def post(self, p: Params, t: Tensor) -> Tensor:
        return t * p.tensors["w"]


OUTSIDERS = tuple(a for toy in (OnOutput(), OnInput(), Turn(), PreAndDelta(), AllThree()) for a in around(toy))


@pytest.mark.parametrize("algorithm", OUTSIDERS, ids=str)
def test_faces(algorithm: Algorithm) -> None:
    for place in places_of(algorithm):
        check_faces(algorithm, place)


@pytest.mark.parametrize("algorithm", OUTSIDERS, ids=str)
def test_deviations(algorithm: Algorithm) -> None:
    turns = isinstance(getattr(algorithm, "inner", algorithm), Turn)
    for place in places_of(algorithm):
        if turns and "depthwise" in place.name:
            continue  # there a block is one channel, which cannot turn
        check_zero_at_first(algorithm, place)
        check_moves_at_first(algorithm, place)
        check_strength(algorithm, place)
        check_output(algorithm, place)


@pytest.mark.parametrize("algorithm", [a for a in OUTSIDERS if getattr(a, "axis", "") != "in"], ids=str)
def test_row_norm(algorithm: Algorithm) -> None:
    for place in few(algorithm):
        check_row_norm(algorithm, place)


@pytest.mark.parametrize("algorithm", OUTSIDERS, ids=str)
def test_merging(algorithm: Algorithm) -> None:
    for place in few(algorithm):
        check_merge(algorithm, place)
        check_unmerge(algorithm, place, torch.bfloat16)


@pytest.mark.parametrize("algorithm", OUTSIDERS, ids=str)
def test_machinery(algorithm: Algorithm) -> None:
    for place in places_of(algorithm, TINY):
        check_gradients(algorithm, place)
        check_copies(algorithm, place)
        check_checkpointing(algorithm, place, False, dropout=0.2, rank_dropout=0.2, module_dropout=0.2)


@pytest.mark.parametrize("place", places_of(Turn(), FEW), ids=str)
def test_stack(place) -> None:
    check_stack((Turn(), PreAndDelta(), OnOutput()), place)
    check_stack((*around(AllThree()),), place)
