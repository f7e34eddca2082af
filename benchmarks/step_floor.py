"""The same maps by hand in plain torch, with the fewest passes known: how near the library comes to what is possible.

No settings, no checks, no half precision, and |W|² is computed once beforehand: this is a yardstick and not an
implementation. A gradient through DoRA's norm flows here as it does in nerine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from step_maps import axis_norm
from step_rows import Problem, Row
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["floor"]

Forward = Callable[[Tensor], Tensor]


def floor(p: Problem, row: Row, t: dict[str, Tensor]) -> Forward | None:
    """A forward of the adapted layer over the trained tensors `t`, for the algorithms that have one here."""
    if row.kind == "loha":
        return _loha(p, row, t)
    if row.kind in _WHOLE:
        return _WHOLE[row.kind](p, t)
    if row.kind not in _BESIDE:
        return None
    deviation = _BESIDE[row.kind]
    if row.axis is None:
        add = deviation(p, t)
        return lambda x: add(x, p.op(x, p.weight, p.bias))
    if row.axis == "in":
        return _dora_in(p, t)
    return _dora_out(p, row, t, deviation(p, t))


def _lora(p: Problem, t: dict[str, Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    down, up = t["down"], t["up"]
    if isinstance(p.layer, nn.Linear):
        return lambda x, y: y.addmm_(functional.linear(x, down), up.T)

    def conv(x: Tensor, y: Tensor) -> Tensor:
        return y.add_(functional.conv2d(p.op(x, down), up))

    return conv


def _lokr(p: Problem, t: dict[str, Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    w1, w2 = t["w1"], t["w2"]
    a, c = w1.shape

    def linear(x: Tensor, y: Tensor) -> Tensor:
        h = torch.matmul(w1, x.reshape(-1, c, w2.shape[1]))  # [tokens, a, d]
        return y.add_(functional.linear(h, w2).reshape(y.shape))

    def conv(x: Tensor, y: Tensor) -> Tensor:
        n, _, *space = x.shape
        mixed = torch.matmul(w1, x.reshape(n, c, -1)).reshape(n * a, w2.shape[1], *space)
        return y.add_(p.op(mixed, w2).reshape(y.shape))

    return linear if isinstance(p.layer, nn.Linear) else conv


def _tlora(p: Problem, t: dict[str, Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Both halves as one low-rank product of twice the rank."""

    def add(x: Tensor, y: Tensor) -> Tensor:
        up = torch.cat([t["p"].flatten(1) * t["lambda"], -t["base_p"].flatten(1) * t["base_lambda"]], 1)
        pair = {"down": torch.cat([t["q"], t["base_q"]]), "up": up.reshape(*up.shape, *[1] * (t["p"].dim() - 2))}
        return _lora(p, pair)(x, y)

    return add


def _glora(p: Problem, t: dict[str, Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """One low-rank product of twice the rank, for W·a1 is only out x rank; on a convolution two."""

    def linear(x: Tensor, y: Tensor) -> Tensor:
        pair = {"down": torch.cat([t["a2"], t["b2"]]), "up": torch.cat([p.weight @ t["a1"], t["b1"]], 1)}
        return _lora(p, pair)(x, y)

    def conv(x: Tensor, y: Tensor) -> Tensor:
        first = torch.einsum("oiyx,ir->oryx", p.weight, t["a1"].flatten(1))
        y = y.add_(p.op(functional.conv2d(x, t["a2"]), first))
        return y.add_(functional.conv2d(p.op(x, t["b2"]), t["b1"]))

    return linear if isinstance(p.layer, nn.Linear) else conv


_BESIDE = {"lora": _lora, "dylora": _lora, "lokr": _lokr, "tlora": _tlora, "glora": _glora}


# -- entries and factors -----------------------------------------------------------------------------------------
def _over_channels(p: Problem, t: Tensor) -> Tensor:
    return t.reshape(-1, *[1] * (p.weight.dim() - 2))


def _ia3(p: Problem, t: dict[str, Tensor]) -> Forward:
    bias = _over_channels(p, p.bias)
    return lambda x: torch.addcmul(bias, p.op(x, p.weight), 1 + _over_channels(p, t["w"]))


def _ia3_input(p: Problem, t: dict[str, Tensor]) -> Forward:
    return lambda x: p.op(x * (1 + _over_channels(p, t["w_in"])), p.weight, p.bias)


def _full(p: Problem, t: dict[str, Tensor]) -> Forward:
    return lambda x: p.op(x, p.weight + t["diff"], p.bias + t["diff_b"])


_WHOLE = {"ia3": _ia3, "ia3-input": _ia3_input, "full": _full}


# -- DoRA --------------------------------------------------------------------------------------------------------
def _dora_out(p: Problem, row: Row, t: dict[str, Tensor], add: Callable[[Tensor, Tensor], Tensor]) -> Forward:
    square = axis_norm(p.weight, "out").flatten().square()
    flat = p.weight.flatten(1)

    def norm() -> Tensor:
        if row.kind == "lora":
            up, down = t["up"].flatten(1), t["down"].flatten(1)
            return (square + ((2 * (flat @ down.T) + up @ (down @ down.T)) * up).sum(1)).sqrt()
        w1, w2 = t["w1"], t["w2"].flatten(1)
        a, c = w1.shape
        partial = torch.matmul(flat.reshape(a, w2.shape[0], c, -1), w2[None, :, :, None])[..., 0]  # [a, b, c]
        cross = (partial * w1[:, None]).sum(2)
        own = w1.square().sum(1)[:, None] * w2.square().sum(1)
        return (square + (2 * cross + own).flatten()).sqrt()

    over = [-1, *[1] * (p.weight.dim() - 2)]

    def forward(x: Tensor) -> Tensor:
        gain = t["magnitude"].flatten() / norm()
        return torch.addcmul(p.bias.reshape(over), add(x, p.op(x, p.weight)), gain.reshape(over))

    return forward


def _dora_in(p: Problem, t: dict[str, Tensor]) -> Forward:
    """Norms of input channels scale the input: no output-sized pass, and no dense product for the gradient."""
    square = axis_norm(p.weight, "in").flatten().square()
    flat, inputs = p.weight.flatten(1), p.weight.shape[1]
    add = _lora(p, t)
    over = [-1, *[1] * (p.weight.dim() - 2)]

    def forward(x: Tensor) -> Tensor:
        up, down = t["up"].flatten(1), t["down"].flatten(1)
        twice = 2 * (up.T @ flat) + (up.T @ up) @ down
        change = (twice * down).reshape(down.shape[0], inputs, -1).sum((0, 2))
        gain = t["magnitude"].flatten() / (square + change).sqrt()
        scaled = x * gain.reshape(over)
        return add(scaled, p.op(scaled, p.weight, p.bias))

    return forward


# -- LoHa --------------------------------------------------------------------------------------------------------
def _loha(p: Problem, row: Row, t: dict[str, Tensor]) -> Forward:
    tensors = [t["w1_a"], t["w1_b"], t["w2_a"], t["w2_b"]]
    magnitude = t.get("magnitude")
    return lambda x: _Hadamard.apply(p, x, magnitude, *tensors)


class _Hadamard(torch.autograd.Function):
    """One product with the changed weight, which is built again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, p: Problem, x: Tensor, m: Tensor | None, *factors: Tensor) -> Tensor:
        ctx.p = p
        ctx.save_for_backward(x, m, *factors)
        a1, b1, a2, b2 = factors
        v = (a1 @ b1).mul_(a2 @ b2).add_(p.weight.flatten(1))
        if m is not None:
            v.mul_(m.reshape(-1, 1) / torch.linalg.vector_norm(v, dim=1, keepdim=True))
        return p.op(x, v.reshape(p.weight.shape), p.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        p: Problem = ctx.p
        x, m, a1, b1, a2, b2 = ctx.saved_tensors
        d1, d2 = a1 @ b1, a2 @ b2
        v = torch.addcmul(p.weight.flatten(1), d1, d2)
        gm = None
        if m is None:
            gx, gv = _grads(p, grad, x, v)
        else:
            norm = torch.linalg.vector_norm(v, dim=1, keepdim=True)
            gain = m.reshape(-1, 1) / norm
            gx, gv = _grads(p, grad, x, v * gain)
            unit = v.div_(norm)
            gm = (gv * unit).sum(1, keepdim=True)
            gv = torch.addcmul(gv, unit, gm, value=-1).mul_(gain)
            gm = gm.reshape(m.shape)
        t1, t2 = d2.mul_(gv), d1.mul_(gv)
        return None, gx, gm, t1 @ b1.T, a1.T @ t1, t2 @ b2.T, a2.T @ t2


def _grads(p: Problem, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(p.layer, nn.Linear):
        return grad @ weight, grad.T @ x
    weight = weight.reshape(p.weight.shape)
    gx, gw, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, (1, 1), p.layer.padding, (1, 1), False, (0, 0), 1, (True, True, False)
    )
    return gx, gw.flatten(1)
