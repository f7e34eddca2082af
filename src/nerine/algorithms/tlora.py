"""T-LoRA: a LoRA for diffusion whose rank follows the timestep, few ranks where there is most noise.

    delta = P·diag(λ∘m)·Q - P₀·diag(λ₀∘m)·Q₀        m: the ranks that take part, all of them outside training

It starts on singular directions of the weight. What it starts with is subtracted and kept beside it, in the file too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nerine.algorithms.base import Design, Params, scaled
from nerine.algorithms.low_rank import LowRank, from_base
from nerine.algorithms.settings import check_alpha, check_choice, check_flag, check_number, check_rank, scale_of
from nerine.axes import Layout, Spec
from nerine.errors import OptionError
from nerine.ops.precision import full_precision, wide
from nerine.site import Site

__all__ = ["TLoRA"]

_TRAINED = {
    "q": Spec("rank in *k", "q_layer.weight"),
    "p": Spec("out rank *1", "p_layer.weight"),
    "lambda": Spec("1 rank", "lambda_layer", carrier=True, gate="rank"),
}
_BASE = {
    "base_q": Spec("rank in *k", "base_q", trained=False),
    "base_p": Spec("out rank *1", "base_p", trained=False),
    "base_lambda": Spec("1 rank", "base_lambda", carrier=True, gate="rank", trained=False),
}
_WHOLE, _BARE = Layout({**_TRAINED, **_BASE}), Layout(_TRAINED)


@dataclass(frozen=True, kw_only=True)
class TLoRA(LowRank):
    """W' = W + (alpha/rank)·(P·λ·Q - P₀·λ₀·Q₀), with P `[out, rank]`, λ `[1, rank]` and Q `[rank, in, *k]`.

    `init` says which singular directions of the weight it starts on: "principal", "middle", "last", or "random"
    (orthogonal directions that have nothing to do with it). Once `Network.set_timestep(t)` is told the timesteps of a
    batch, the first ((T - t)/T)ᵖ·(rank - min_rank) + min_rank ranks take part, with T = `timesteps` and p = `power`;
    without, all of them do. `Network.penalty()` keeps P and Q orthogonal.
    Source: Soboleva et al., arXiv:2507.05964.
    """

    name = "tlora"
    source = "Soboleva et al., arXiv:2507.05964"
    instead = ", which says nothing of the timesteps that its ranks belong to; extract as LoRA instead"
    rank: int = 16
    alpha: float | None = None
    min_rank: int = 1
    init: str = "principal"
    power: float = 1.0
    timesteps: int = 1000
    rs: bool = False

    def __post_init__(self) -> None:
        check_rank("TLoRA", self.rank)
        check_rank("TLoRA", self.min_rank, "min_rank")
        check_rank("TLoRA", self.timesteps, "timesteps")
        check_alpha("TLoRA", self.alpha)
        check_number("TLoRA", "power", self.power)
        check_flag("TLoRA", rs=self.rs)
        check_choice("TLoRA", "init", self.init, ("principal", "middle", "last", "random"))
        if self.min_rank > self.rank:
            raise OptionError(f"TLoRA: min_rank must be at most the rank {self.rank}, got {self.min_rank}")

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return (_WHOLE, _BARE)

    def design(self, site: Site) -> Design:
        rank = min(self.rank, site.shape[0], site.flat)
        note = "T-LoRA trains all its ranks until Network.set_timestep is told the timesteps of each batch"
        note += "" if rank == self.rank else f"; rank {rank} where that is all that the weight has"
        return Design(_WHOLE, {**site.sizes, "rank": rank}, scale_of(rank, self.alpha, self.rs), note=note)

    def start(self, site: Site, weight: Tensor, rng: torch.Generator | None = None) -> Params:
        design = self.design(site)
        flat = wide(weight).flatten(1)
        if self.init == "random":
            found = self._random(flat, design.sizes["rank"], rng)
        else:
            found = self._singular(flat, design.sizes["rank"], self.init)
        both = {**found, **{f"base_{name}": t for name, t in found.items()}}
        shapes = design.shapes
        return Params({name: t.reshape(shapes[name]).clone() for name, t in both.items()}, design.scale)

    @staticmethod
    def _random(flat: Tensor, rank: int, rng: torch.Generator | None) -> dict[str, Tensor]:
        """q, p and λ of orthogonal directions in the shape of `flat` `[out, in·Πk]`."""
        out, inputs = flat.shape
        with full_precision(flat):
            p, q = (torch.linalg.qr(flat.new_empty((n, rank)).normal_(generator=rng))[0] for n in (out, inputs))
        size = (out**0.5 + inputs**0.5) / rank  # the largest singular value of random entries of σ = 1/rank
        return {"q": q.mT, "p": p, "lambda": flat.new_full((rank,), size)}

    @staticmethod
    @torch.no_grad()
    def _singular(flat: Tensor, rank: int, which: str) -> dict[str, Tensor]:
        """q, p and λ of singular directions of `flat` `[out, in·Πk]`."""
        with full_precision(flat):
            u, s, vh = torch.linalg.svd(flat, full_matrices=False)
        first = {"principal": 0, "last": len(s) - rank, "middle": (len(s) - rank) // 2}[which]
        chosen = slice(first, first + rank)
        return {"q": vh[chosen], "p": u[:, chosen], "lambda": s[chosen]}

    def complete(self, p: Params, weight: Tensor) -> tuple[Params, str]:
        if "base_q" in p.tensors:
            return p, ""
        found = self._singular(wide(weight).flatten(1), p.tensors["q"].shape[0], "principal")
        base = {f"base_{name}": t.reshape(p.tensors[name].shape).clone() for name, t in found.items()}
        return p.replaced(**base), "no base factors in the file: taken from the principal directions of this weight"

    def gate(self, p: Params, timestep: Tensor) -> Tensor:
        rank = p.tensors["q"].shape[0]
        low = min(self.min_rank, rank)
        left = ((self.timesteps - timestep) / self.timesteps).clamp(0, 1) ** self.power
        ranks = (left * (rank - low)).floor() + low
        index = torch.ones_like(p.tensors["lambda"].reshape(-1)).cumsum(0) - 1
        return (index < ranks[..., None]) * torch.ones_like(index)

    def penalty(self, p: Params) -> Tensor:
        total = p.tensors["q"].new_zeros(())
        for rows in (p.tensors["q"].flatten(1), p.tensors["p"].flatten(1).mT):
            gram = rows @ rows.mT
            total = total + (gram - torch.diag(torch.ones_like(gram[0]))).square().sum()
        return total

    def cost(self, site: Site, design: Design) -> int:
        return site.low_rank_cost(2 * design.sizes["rank"])

    def factors(self, p: Params) -> tuple[Tensor, Tensor]:
        t = p.tensors
        up, base_up = (t[f"{of}p"].flatten(1) * t[f"{of}lambda"].reshape(1, -1) for of in ("", "base_"))
        up, down = from_base(up, t["q"], base_up, t["base_q"])
        return scaled(up, p.scale), down
