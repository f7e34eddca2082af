"""A network that uses kernels computes, and learns, what it does without them."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn

import nerine
from nerine.errors import OptionError
from nerine.ops.kernel_choice import PLACES
from nerine.ops.triton import Kernel, kernels

CASES = {
    "DoRA(LoRA)": (nerine.DoRA(nerine.LoRA(rank=3, alpha=2)), {"stretch", "low_rank_row_norm"}),
    "DoRA(Diag-OFT)": (nerine.DoRA(nerine.DiagOFT(block_size=4)), {"stretch", "cayley", "turn_channels"}),
    "IA3": (nerine.IA3(), {"rescale"}),
    "OFTv2": (nerine.OFTv2(block_size=4, terms=0), {"cayley", "turn_channels"}),
}


def run(model, network, x):
    for p in network.parameters():
        p.grad = None
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in network.parameters())]


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_of_a_layer(case, draw):
    algorithm, wanted = CASES[case]
    model = nn.Sequential(nn.Linear(24, 16).to(draw(1).device)).requires_grad_(False)
    network = nerine.attach(model, algorithm)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(draw(*p.shape, std=0.1))
    x = draw(5, 24)
    plain = run(model, network, x)
    seen, real = set(), Kernel.function

    def noted(name):
        function = real.__get__(kernels()[name])
        return lambda *arguments: (seen.add(name), function(*arguments))[1]

    with mock.patch("nerine.ops.triton.Kernel.function", property(lambda kernel: noted(kernel.name))):
        network.use_kernels(*PLACES)
    for _ in range(2):  # the long way and the short one
        for one, other in zip(plain, run(model, network, x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert seen == wanted
    seen.clear()
    network.use_kernels()
    for one, other in zip(plain, run(model, network, x), strict=True):
        assert torch.equal(one, other)
    assert not seen


def test_unknown_kernels_are_named():
    network = nerine.attach(nn.Sequential(nn.Linear(4, 6)), nerine.LoRA(rank=2))
    with pytest.raises(OptionError, match="stretch"):
        network.use_kernels("strech")
