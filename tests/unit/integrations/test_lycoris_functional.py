"""LyCORIS's functions over bare tensors: what is added to an output is what is added to the weight. That the numbers
are LyCORIS's is tested among the peers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nerine.lycoris.functional import FUNC_LIST, boft, diag_oft, locon, loha, lokr

MODULES: dict[str, Any] = {"locon": locon, "loha": loha, "lokr": lokr}
FORMS = [(name, tucker) for name in MODULES for tucker in (False, True)]
LAYERS: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((12, 8), (3, 8), {}),
    ((12, 8, 3), (2, 8, 9), {"stride": 2, "padding": 1}),
    ((12, 4, 3, 2), (2, 8, 7, 6), {"groups": 2, "dilation": (2, 1)}),
    ((12, 8, 2, 3, 2), (1, 8, 4, 5, 4), {"padding": "same"}),
]


def stirred(tensors: tuple[Tensor | None, ...], dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    return [
        None if t is None else torch.randn(t.shape, generator=generator).to(dtype).requires_grad_() for t in tensors
    ]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own padding
@pytest.mark.parametrize(("name", "tucker"), FORMS)
@pytest.mark.parametrize("layer", LAYERS, ids=["linear", "conv1d", "conv2d", "conv3d"])
def test_outputs_are_those_of_the_weight(name: str, tucker: bool, layer: Any) -> None:
    shape, inputs, args = layer
    module = MODULES[name]
    tensors = stirred(module.weight_gen(torch.empty(shape, dtype=torch.float64), 2, tucker=tucker))
    trained = [t for t in tensors if t is not None]
    x = torch.randn(inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    op = FUNC_LIST[len(shape)]
    assert op is not None
    want = op(x, module.diff_weight(*tensors, gamma=0.7), **args)
    got = module.bypass_forward_diff(x, None, *tensors, gamma=0.7, extra_args=args)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    grads = [torch.autograd.grad(y.sin().sum(), [x, *trained]) for y in (got, want)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("module", [diag_oft, boft])
@pytest.mark.parametrize("constraint", [None, 0.5])
def test_turned_outputs_are_those_of_the_turned_weight(module: Any, constraint: float | None) -> None:
    weight, x = torch.randn(24, 8, 3, 2, dtype=torch.float64), torch.randn(2, 8, 5, 6, dtype=torch.float64)
    bias = torch.randn(24, dtype=torch.float64)
    tensors = stirred(module.weight_gen(weight, 6, rescale=True))
    out = functional.conv2d(x, weight, bias, padding=1)
    first = (x, out) if module is diag_oft else (out,)
    got = module.bypass_forward_diff(*first, *tensors, constraint=constraint, need_transpose=True, bias=bias)
    want = functional.conv2d(x, module.diff_weight(weight, *tensors, constraint=constraint), padding=1)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "tucker"), FORMS)
def test_the_compiler_takes_them_whole(name: str, tucker: bool) -> None:
    module, weight = MODULES[name], torch.empty(12, 8, 3, 2)
    tensors = stirred(module.weight_gen(weight, 2, tucker=tucker), torch.float32)
    x = torch.randn(2, 8, 5, 6)

    def added(x: Tensor, *tensors: Tensor | None) -> Tensor:
        changed: Tensor = module.bypass_forward_diff(x, None, *tensors, gamma=0.7)
        return changed + functional.conv2d(x, module.diff_weight(*tensors, gamma=0.7))

    compiled = torch.compile(added, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, *tensors), added(x, *tensors))


@pytest.mark.parametrize("name", MODULES)
def test_autocast(name: str) -> None:
    """Outputs in the format of autocast, weights in full precision."""
    module, weight = MODULES[name], torch.empty(12, 8)
    tensors, x = stirred(module.weight_gen(weight, 1, tucker=False), torch.float32), torch.randn(5, 8)
    whole = module.diff_weight(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.diff_weight(*tensors), whole)
        assert module.bypass_forward_diff(x, None, *tensors).dtype == torch.bfloat16


def test_rotations_of_half_precision_are_computed_in_full() -> None:
    weight = torch.randn(24, 8).bfloat16()
    for module in (diag_oft, boft):
        tensors = stirred(module.weight_gen(weight, 6), torch.bfloat16)
        d = module.diff_weight(weight, *tensors)
        exact = module.diff_weight(weight.double(), *(None if t is None else t.double() for t in tensors))
        assert d.dtype == torch.float32
        torch.testing.assert_close(d.double(), exact, rtol=1e-5, atol=1e-5)
