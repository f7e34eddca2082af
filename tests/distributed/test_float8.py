"""FSDP2 of a base whose weights are kept in eight bits: the gradients of a single process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import nerine
from nerine import DiagOFT, DoRA, LoKr, LoRA
from small_world import attached, batch, model, stir
from two_processes import Failures, the_mesh

CASES = (LoRA(rank=2), DoRA(LoKr(rank=1, factor=2)), DiagOFT(block_size=2))


class Float8(nn.Linear):
    """Its weight is kept in float8 with a scale for each row."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        weight = layer.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 448
        self.weight = nn.Parameter((weight / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("weight_scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.weight_scale, self.bias)


def quantised() -> nn.Module:
    base = model(torch.float32)
    for block in base.blocks:
        block.up, block.down = (Float8(layer).requires_grad_(False) for layer in (block.up, block.down))
    return base


def gradients(algorithm: nerine.Algorithm, rank: int, sharded: bool) -> dict[str, torch.Tensor]:
    base, network = attached(algorithm, quantised())
    assert len(network) == 6
    stir(network)
    for unit in (*base.blocks, base) if sharded else ():
        fully_shard(unit, mesh=the_mesh())
    x, y = batch(0, rank, torch.float32)
    (base(x) - y).square().mean().backward()
    found = {}
    for key, p in network.named_parameters():
        assert p.grad is not None, key
        found[key] = p.grad.full_tensor() if sharded else p.grad  # type: ignore[attr-defined]
    return found


def equal_to_one_process(rank: int, folder: Path) -> None:
    failures = Failures()
    for algorithm in CASES:
        with failures.case(algorithm):
            want, got = gradients(algorithm, rank, False), gradients(algorithm, rank, True)
            for key, t in want.items():
                dist.all_reduce(t, op=dist.ReduceOp.SUM)
                torch.testing.assert_close(got[key], t / 2, rtol=1e-4, atol=1e-6)
    failures.tell()


def test_float8(run_on_two: Callable[..., None]) -> None:
    run_on_two(equal_to_one_process, ignore=("FSDP2-wrapped module",))
