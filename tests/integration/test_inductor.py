"""`torch.compile` with inductor: the numbers of eager mode, in one graph that is compiled once."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor, nn

import nerine
from contract.cases import ONE_OF_EACH
from nerine.algorithms import DoRA
from nerine.testing.battery import around

pytestmark = [
    pytest.mark.slow,  # a minute of compiling each
    pytest.mark.no_device_guard,
    pytest.mark.filterwarnings("ignore"),  # of a compiler at work
    pytest.mark.skipif(shutil.which("g++") is None, reason="inductor on a CPU needs a C++ compiler: install g++"),
]

PLAIN = [a for a in ONE_OF_EACH if not isinstance(a, DoRA)]
FORMS = {
    "plain": [a for a in PLAIN if a.kinds != {"norm"}],
    "dora": [form for a in PLAIN if a.kinds != {"norm"} for form in around(a)[1:2]],
}


class Chain(nn.Module):
    """One linear layer for each algorithm, so that one graph has all of them; a norm at the end."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 12) for _ in range(count)])
        self.norm = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.norm(x)


def step(run: nn.Module, network: nerine.Network, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    for parameter in network.parameters():
        parameter.grad = None
    y = run(x)
    y.square().sum().backward()
    return y.detach(), [p.grad.clone() for p in network.parameters()]


@pytest.mark.parametrize("form", FORMS)
def test_inductor(form: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Chain(len(FORMS[form])).eval()  # DyLoRA draws a rank in training
    rules = [nerine.Rule(f"re:layers.{i}", algorithm) for i, algorithm in enumerate(FORMS[form])]
    network = nerine.attach(model, [*rules, nerine.Rule("norm", nerine.Norm())])
    assert len(network) == len(rules) + 1
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(5, 12)
    compiled = torch.compile(model, fullgraph=True)
    want = step(model, network, x)
    got = step(compiled, network, x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    with torch._dynamo.config.patch(error_on_recompile=True):  # other values and rates are no other graph
        optimizer = torch.optim.AdamW(network.param_groups(lr=1e-2), lr=1e-2)
        for rate in (1e-2, 5e-3):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            torch.testing.assert_close(step(compiled, network, x), step(model, network, x), rtol=1e-4, atol=1e-5)

    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for strength in (0.5, 0.7, -1.0):
        network.strength = strength
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    compiled_again = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    assert compiled_again <= 2, "one for the mode without gradients, one for another strength"
