"""What one training step of a Flux-like transformer keeps, computes and moves, counted on the meta device.

A model of one double and one single block is built in full width, and once more with a second block of each kind: the
differences are those of a block, and what is left is the rest. Nothing is computed; the operations are those that
nerine and diffusers ask torch for, forward and backward, with attention and RMS norms in the form they have on CUDA.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = [
    "BALANCE",
    "AsOnCuda",
    "Counts",
    "Meter",
    "Shape",
    "Work",
    "count",
    "count_kept",
    "flux",
    "from_plain",
    "inputs",
    "per_block",
    "plain",
]

BALANCE = 220.0  # FLOPs a byte: products that do fewer wait for memory (0.6 · 989 TFLOP/s over 0.8 · 3.35 TB/s)
Adapt = Callable[[nn.Module], object]


@dataclass(frozen=True)
class Shape:
    """Width, length of the sequences and number of blocks; the default is FLUX.1-dev at 1024 x 1024."""

    heads: int = 24
    head: int = 128
    double: int = 19
    single: int = 38
    image: int = 4096
    text: int = 512
    context: int = 4096

    @property
    def width(self) -> int:
        return self.heads * self.head


@dataclass(frozen=True)
class Work:
    """FLOPs of the products that arithmetic bounds, bytes that everything else reads and writes, number of kernels."""

    flops: float = 0.0
    bytes: float = 0.0
    kernels: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.kernels + other.kernels)

    def times(self, factor: float) -> Work:
        return Work(self.flops * factor, self.bytes * factor, self.kernels * factor)


@dataclass(frozen=True)
class Counts:
    """Bytes kept for backward, and the work of both passes."""

    kept: float
    forward: Work
    backward: Work

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.kept + other.kept, self.forward + other.forward, self.backward + other.backward)

    def times(self, factor: float) -> Counts:
        return Counts(self.kept * factor, self.forward.times(factor), self.backward.times(factor))


def flux(shape: Shape, double: int, single: int, device: str = "meta", dtype: torch.dtype = torch.bfloat16) -> Any:
    """The transformer with so many blocks, frozen."""
    from diffusers import FluxTransformer2DModel

    with warnings.catch_warnings(), torch.device(device):
        warnings.simplefilter("ignore")
        side = shape.head // 16 * 7
        model = FluxTransformer2DModel(
            num_layers=double,
            num_single_layers=single,
            attention_head_dim=shape.head,
            num_attention_heads=shape.heads,
            joint_attention_dim=shape.context,
            guidance_embeds=True,
            axes_dims_rope=(shape.head - 2 * side, side, side),
        )
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.requires_grad_(False)


def inputs(shape: Shape, model: Any, device: str = "meta", dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """One picture and one caption."""

    def zeros(*size: int) -> Tensor:
        return torch.zeros(*size, device=device, dtype=dtype)

    return {
        "hidden_states": zeros(1, shape.image, model.config.in_channels),
        "encoder_hidden_states": zeros(1, shape.text, shape.context),
        "pooled_projections": zeros(1, model.config.pooled_projection_dim),
        "timestep": zeros(1),
        "guidance": zeros(1),
        "img_ids": zeros(shape.image, 3),
        "txt_ids": zeros(shape.text, 3),
        "return_dict": False,
    }


class AsOnCuda(TorchFunctionMode):
    """Attention as flash attention and RMS norms in one kernel; elsewhere torch composes them of parts that keep more.

    Off the meta device both are stand-ins that keep the same and compute nothing.
    """

    def __init__(self, fused_norms: bool = True) -> None:
        super().__init__()
        self.fused_norms = fused_norms

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return attention(*args, **(kwargs or {}))
        if func is nn.functional.rms_norm and self.fused_norms:
            return rms_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def attention(query: Tensor, key: Tensor, value: Tensor, **others: Any) -> Tensor:
    if query.is_meta:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (t.to(torch.get_autocast_dtype(t.device.type)) for t in (query, key, value))
    return Attention.apply(query, key, value)


def rms_norm(input: Tensor, shape: list[int], weight: Tensor, eps: float | None = None, otherwise: Any = None) -> Any:
    if not input.is_meta and torch.is_autocast_enabled(input.device.type):
        input, weight = input.float(), weight.float()
    if weight.dtype != input.dtype:  # then CUDA composes it as well
        return (otherwise or nn.functional.rms_norm)(input, shape, weight, eps)
    return RmsNorm.apply(input, weight)


class RmsNorm(torch.autograd.Function):
    """Keeps the input and one number for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return grad * x, torch.empty_like(weight)


class Attention(torch.autograd.Function):
    """Keeps query, key, value, output and one number a row; `[batch, heads, tokens, head]`, laid out by tokens."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.zeros_like(query.transpose(1, 2).contiguous()).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(t) for t in ctx.saved_tensors[:3])


def _touched(t: Tensor) -> int:
    """Bytes of a tensor that are really there (an expanded one repeats them)."""
    return math.prod(n for n, step in zip(t.shape, t.stride(), strict=True) if step) * t.dtype.itemsize


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


class Meter(TorchDispatchMode):
    """Adds up the work of every operation that moves data."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or func in _FREE:
            return out
        moved = sum(_touched(t) for t in (*_tensors(args), *_tensors(out)))
        counter = flop_registry.get(func.overloadpacket)
        flops = counter(*args, **(kwargs or {}), out_val=out) if counter else 0
        bound = flops > BALANCE * moved
        self.work += Work(flops, 0, 1) if bound else Work(0, moved, 1)
        return out


_FREE = {torch.ops.aten._unsafe_view.default, torch.ops.aten.detach.default, torch.ops.aten.empty.memory_format}


@contextmanager
def kept_by(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of the distinct storages that autograd keeps, by storage; those of the model itself do not count."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    alive = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            alive.append(storage)  # else its address might be given to another one
            found[storage._cdata] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield found


def count_kept(model: Any, given: dict[str, Any]) -> int:
    """Bytes that a forward of `model` keeps for backward beside the model."""
    with kept_by(model) as found:
        model(**given)
    return sum(found.values())


def count(shape: Shape, double: int, single: int, adapt: Adapt) -> Counts:
    """A step of a model with so many blocks, after `adapt` has made it one that learns."""
    model = flux(shape, double, single)
    adapt(model)
    given = inputs(shape, model)
    with AsOnCuda():
        kept = count_kept(model, given)
        with Meter() as forward:
            out = model(**given)[0]
        with Meter() as backward:
            out.backward(torch.empty_like(out))
    return Counts(kept, forward.work, backward.work)


def per_block(shape: Shape, adapt: Adapt) -> dict[str, Counts]:
    """The counts of a double block, of a single block, and of the rest."""
    one, more_double, more_single = (count(shape, *n, adapt) for n in ((1, 1), (2, 1), (1, 2)))
    double, single = (more + one.times(-1) for more in (more_double, more_single))
    return {"double": double, "single": single, "rest": one + (double + single).times(-1)}


def plain(counts: Counts) -> dict[str, Any]:
    """For JSON."""
    return {
        "kept": counts.kept,
        "forward": {f.name: getattr(counts.forward, f.name) for f in fields(Work)},
        "backward": {f.name: getattr(counts.backward, f.name) for f in fields(Work)},
    }


def from_plain(values: dict[str, Any]) -> Counts:
    return Counts(values["kept"], Work(**values["forward"]), Work(**values["backward"]))
