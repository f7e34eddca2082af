"""Quantised layers of every kind, for the tests: how each is made from an ordinary Linear.

The packages are imported when a kind is built; one that is missing skips the test and names the extra.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

__all__ = ["KINDS", "SHAPE", "Kind", "linear"]

SHAPE = (48, 64)  # out, in: whole blocks for every kind


def linear() -> nn.Linear:
    """The layer that is quantised, the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return nn.Linear(SHAPE[1], SHAPE[0]).requires_grad_(False)


@dataclass(frozen=True)
class Kind:
    """One way to quantise. `exact` is how closely its layer computes with the weight that it
    stands for; `copies` whether its package can deepcopy such a layer."""

    name: str
    packages: tuple[str, ...]
    build: Callable[[nn.Linear], nn.Module]
    exact: float = 2e-5
    copies: bool = True

    def make(self, layer: nn.Linear | None = None) -> nn.Module:
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"{package} is not installed; it comes with the extra [quant] (diffusers with [train])")
        return self.build(copy.deepcopy(layer or linear()))

    def __str__(self) -> str:
        return self.name


def _bnb4(layer: nn.Linear, quant_type: str) -> nn.Module:
    import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, compute_dtype=torch.float32, quant_type=quant_type)
    made.load_state_dict(layer.state_dict())
    # on a CPU with AVX512-BF16, evaluation would pack the weight anew, which takes outputs in multiples of 32 only
    made.support_avx512bf16_for_cpu = False
    return made.to("cpu").requires_grad_(False)


def _bnb8(layer: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    made = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu").requires_grad_(False)


def _torchao(layer: nn.Linear, config: str, **options: Any) -> nn.Module:
    import torchao.quantization as q

    model = nn.Sequential(layer)
    if "granularity" in options:
        options = {**options, "granularity": q.PerGroup(options["granularity"])}
    q.quantize_(model, getattr(q, config)(**options))
    return model[0]


def _quanto(layer: nn.Linear, qtype: str, frozen: bool = True) -> nn.Module:
    import optimum.quanto as quanto

    model = nn.Sequential(layer)
    quanto.quantize(model, weights=getattr(quanto, qtype))
    if frozen:
        quanto.freeze(model)
    return model[0].requires_grad_(False)


def _gguf(layer: nn.Linear, quant_type: str) -> nn.Module:
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = getattr(gguf.GGMLQuantizationType, quant_type)
    made = GGUFLinear(layer.in_features, layer.out_features, True, compute_dtype=torch.float32)
    blocks = torch.from_numpy(gguf.quants.quantize(layer.weight.detach().numpy(), kind))
    made.weight, made.bias = GGUFParameter(blocks, quant_type=kind), layer.bias
    return made


class ScaledLinear(nn.Linear):
    """A Linear of eight-bit floats that casts for each call, with a scale beside the weight where it has one."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.to(torch.float32)
        for name in ("scale_weight", "weight_scale", "weight_scale_inv"):
            scale = getattr(self, name, None)
            if scale is not None:
                if scale.dim() == 2 and scale.shape[1] > 1:
                    scale = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
                weight = weight * scale
        return nn.functional.linear(input, weight.to(input.dtype), self.bias)


def _float8(layer: nn.Linear, name: str = "", by: str = "") -> nn.Module:
    made = ScaledLinear(layer.in_features, layer.out_features)
    weight = layer.weight.detach()
    if name:
        blocks = weight.abs().unflatten(1, (-1, 16)).unflatten(0, (-1, 16)).amax((1, 3))
        peak = {"tensor": weight.abs().max(), "row": weight.abs().amax(1, keepdim=True), "block": blocks}[by]
        made.register_buffer(name, peak / 448)
        spread = peak if by != "block" else peak.repeat_interleave(16, 0).repeat_interleave(16, 1)
        weight = weight / (spread / 448)
    made.weight = nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
    made.bias = layer.bias
    return made


_part = functools.partial
KINDS = (
    Kind("float8", (), _float8),
    Kind("float8 scale_weight", (), _part(_float8, name="scale_weight", by="tensor")),
    Kind("float8 weight_scale", (), _part(_float8, name="weight_scale", by="row")),
    Kind("float8 weight_scale_inv", (), _part(_float8, name="weight_scale_inv", by="block")),
    Kind("bitsandbytes nf4", ("bitsandbytes",), _part(_bnb4, quant_type="nf4")),
    Kind("bitsandbytes fp4", ("bitsandbytes",), _part(_bnb4, quant_type="fp4")),
    Kind("bitsandbytes int8", ("bitsandbytes",), _bnb8, exact=3e-2),  # rounds its input to eight bits
    Kind("torchao int8", ("torchao",), _part(_torchao, config="Int8WeightOnlyConfig", version=2)),
    Kind("torchao float8", ("torchao",), _part(_torchao, config="Float8WeightOnlyConfig")),
    Kind(
        "torchao int4",
        ("torchao",),
        _part(_torchao, config="IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=32),
    ),
    Kind("quanto qint8", ("optimum.quanto",), _part(_quanto, qtype="qint8"), copies=False),
    Kind("quanto qint4", ("optimum.quanto",), _part(_quanto, qtype="qint4"), copies=False),
    Kind("quanto qfloat8", ("optimum.quanto",), _part(_quanto, qtype="qfloat8"), copies=False),
    Kind("quanto qint8, not frozen", ("optimum.quanto",), _part(_quanto, qtype="qint8", frozen=False)),
    Kind("GGUF Q8_0", ("gguf", "diffusers"), _part(_gguf, quant_type="Q8_0"), copies=False),
    Kind("GGUF Q4_0", ("gguf", "diffusers"), _part(_gguf, quant_type="Q4_0"), copies=False),
)
