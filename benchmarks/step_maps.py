"""What each algorithm of `step.py` is: tensors in the middle of training, and the changed weight by definition.

Every definition builds the whole changed weight in plain torch from the formula of its source, and knows nothing of
the library that is measured. Scales (alpha over rank) are one throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BLOCK", "FACTOR", "MAPS", "RANK", "Map", "axis_norm", "butterfly_size"]

RANK, FACTOR, BLOCK = 16, 8, 32

Shape = tuple[int, ...]
Draw = Callable[..., Tensor]  # a standard deviation and a shape
Values = dict[str, Tensor]


class Map(NamedTuple):
    """One algorithm: its name in the tables, its tensors for a weight of some shape, and its definition.

    `constant` tensors are not trained. A tensor called `shift` is added to the bias.
    """

    name: str
    values: Callable[[Shape, Draw], Values]
    changed: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    constant: tuple[str, ...] = ()
    shift: str = ""


def axis_norm(weight: Tensor, axis: str) -> Tensor:
    """Norms over all axes but one, shaped to multiply the weight."""
    keep = 0 if axis == "out" else 1
    return weight.square().sum([d for d in range(weight.dim()) if d != keep], keepdim=True).sqrt()


def _flat(shape: Shape) -> int:
    """Entries of one row of the weight."""
    return torch.Size(shape[1:]).numel()


def _ones(shape: Shape) -> list[int]:
    return [1] * (len(shape) - 2)


# -- low rank ----------------------------------------------------------------------------------------------------
def _lora_values(shape: Shape, draw: Draw) -> Values:
    out, *rest = shape
    return {"down": draw(_flat(shape) ** -0.5, RANK, *rest), "up": draw(0.02, out, RANK, *_ones(shape))}


def _lora(weight: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    return weight + (t["up"].flatten(1) @ t["down"].flatten(1)).reshape(weight.shape)


def _lokr_values(shape: Shape, draw: Draw) -> Values:
    out, inputs, *kernel = shape
    small = (out // FACTOR, inputs // FACTOR, *kernel)
    return {"w1": draw(0.3, FACTOR, FACTOR), "w2": draw(0.3 * _flat(shape) ** -0.5, *small)}


def _lokr(weight: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    return weight + torch.kron(t["w1"].reshape(*t["w1"].shape, *_ones(tuple(weight.shape))), t["w2"])


def _loha_values(shape: Shape, draw: Draw) -> Values:
    out, flat = shape[0], _flat(shape)
    values = {"w1_a": draw(0.1, out, RANK), "w1_b": draw(1.0, RANK, flat)}
    return values | {"w2_a": draw(0.2 * flat**-0.5, out, RANK), "w2_b": draw(1.0, RANK, flat)}


def _loha(weight: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    return weight + ((t["w1_a"] @ t["w1_b"]) * (t["w2_a"] @ t["w2_b"])).reshape(weight.shape)


def _tlora_values(shape: Shape, draw: Draw) -> Values:
    """Directions of about unit length, and the same a while later."""
    out, *rest = shape
    base = {
        "base_q": draw(_flat(shape) ** -0.5, RANK, *rest),
        "base_p": draw(out**-0.5, out, RANK, *_ones(shape)),
        "base_lambda": 1 + draw(0.1, 1, RANK),
    }
    moved = {
        name: base[f"base_{name}"] + draw(0.2 * float(base[f"base_{name}"].std()), *base[f"base_{name}"].shape)
        for name in ("q", "p", "lambda")
    }
    return moved | base


def _tlora(weight: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    now = t["p"].flatten(1) @ torch.diag(t["lambda"][0]) @ t["q"].flatten(1)
    start = t["base_p"].flatten(1) @ torch.diag(t["base_lambda"][0]) @ t["base_q"].flatten(1)
    return weight + (now - start).reshape(weight.shape)


def _glora_values(shape: Shape, draw: Draw) -> Values:
    out, inputs, *kernel = shape
    one = _ones(shape)
    values = {"a1": draw(inputs**-0.5, inputs, RANK, *one), "a2": draw(0.02, RANK, inputs, *one)}
    return values | {"b1": draw(0.02, out, RANK, *one), "b2": draw(_flat(shape) ** -0.5, RANK, inputs, *kernel)}


def _glora(weight: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    a = t["a1"].flatten(1) @ t["a2"].flatten(1)
    b = t["b1"].flatten(1) @ t["b2"].flatten(1)
    return weight + torch.einsum("oi...,ij->oj...", weight, a) + b.reshape(weight.shape)


# -- entries and factors -----------------------------------------------------------------------------------------
def _full_values(shape: Shape, draw: Draw) -> Values:
    return {"diff": draw(0.1 * _flat(shape) ** -0.5, *shape), "diff_b": draw(0.01, shape[0])}


def _full(weight: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    return weight + t["diff"]


def _ia3_shape(channels: int, shape: Shape) -> list[int]:
    return [1, channels, *_ones(shape)] if len(shape) > 2 else [channels]


def _ia3_values(shape: Shape, draw: Draw) -> Values:
    return {"w": draw(0.1, *_ia3_shape(shape[0], shape))}


def _ia3(weight: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    return weight * (1 + t["w"]).reshape(-1, *[1] * (weight.dim() - 1))


def _ia3_input_values(shape: Shape, draw: Draw) -> Values:
    return {"w_in": draw(0.1, *_ia3_shape(shape[1], shape))}


def _ia3_input(weight: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    return weight * (1 + t["w_in"]).reshape(1, -1, *[1] * (weight.dim() - 2))


# -- turns -------------------------------------------------------------------------------------------------------
def _cayley(blocks: Tensor) -> Tensor:
    """R = (I + Q)·(I - Q)⁻¹ of each block, with Q = B - Bᵀ."""
    q = blocks - blocks.mT
    eye = torch.eye(q.shape[-1])
    return (eye + q) @ torch.linalg.inv(eye - q)


def _diag_oft_values(shape: Shape, draw: Draw) -> Values:
    return {"blocks": draw(0.05, shape[0] // BLOCK, BLOCK, BLOCK)}


def _diag_oft(weight: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    """W' = Rᵀ·W."""
    turn = torch.block_diag(*_cayley(t["blocks"]))
    return (turn.T @ weight.flatten(1)).reshape(weight.shape)


def butterfly_size(out: int) -> int:
    """The even size nearest to `BLOCK` of which `out` has a power of two, the smaller of two."""
    sizes = [out >> j for j in range(out.bit_length()) if out % (2 << j) == 0 and (out >> j) % 2 == 0]
    return min(sizes, key=lambda size: (abs(size - BLOCK), size))


def _boft_values(shape: Shape, draw: Draw) -> Values:
    size = butterfly_size(shape[0])
    blocks = shape[0] // size
    return {"blocks": draw(0.03, blocks.bit_length(), blocks, size, size)}


def _boft(weight: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    """W' = R_m · … · R_1 · W; stage i interleaves the halves of neighbourhoods of 2ⁱ·s before its blocks turn them."""
    changed = weight.flatten(1)
    size = t["blocks"].shape[-1]
    for stage, turns in enumerate(_cayley(t["blocks"])):
        half = 2**stage * (size // 2)
        order = torch.arange(weight.shape[0]).reshape(-1, 2, half).transpose(1, 2).flatten()
        changed = (torch.block_diag(*turns) @ changed[order])[torch.argsort(order)]
    return changed.reshape(weight.shape)


def _oft_v2_values(shape: Shape, draw: Draw) -> Values:
    return {"upper": draw(0.05, _flat(shape) // BLOCK, BLOCK * (BLOCK - 1) // 2)}


def _oft_v2(weight: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    """W' = W·Rᵀ, R = I + 2Q + 2Q² + 2Q³ + Q⁴ in blocks along the rows."""
    rows, columns = torch.triu_indices(BLOCK, BLOCK, 1)
    q = torch.zeros(t["upper"].shape[0], BLOCK, BLOCK)
    q = q.index_put((torch.arange(len(q))[:, None], rows[None], columns[None]), t["upper"])
    q = q - q.mT
    turn = torch.block_diag(*(torch.eye(BLOCK) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q))
    return (weight.flatten(1) @ turn.T).reshape(weight.shape)


MAPS: dict[str, Map] = {
    "lora": Map("LoRA", _lora_values, _lora),
    "lokr": Map("LoKr", _lokr_values, _lokr),
    "loha": Map("LoHa", _loha_values, _loha),
    "dylora": Map("DyLoRA", _lora_values, _lora),
    "tlora": Map("T-LoRA", _tlora_values, _tlora, constant=("base_q", "base_p", "base_lambda")),
    "glora": Map("GLoRA", _glora_values, _glora),
    "full": Map("Full", _full_values, _full, shift="diff_b"),
    "ia3": Map("IA3", _ia3_values, _ia3),
    "ia3-input": Map("IA3 (input)", _ia3_input_values, _ia3_input),
    "diag-oft": Map("Diag-OFT", _diag_oft_values, _diag_oft),
    "boft": Map("BOFT", _boft_values, _boft),
    "oft-v2": Map("OFTv2", _oft_v2_values, _oft_v2),
}
