"""The same tensors through LyCORIS 4.1.3: files written by either load in the other and give the same outputs.

Where LyCORIS computes something else on purpose or by mistake, the difference is listed at the end, with both numbers.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nerine
from nerine.algorithms import Algorithm, Call

pytestmark = [pytest.mark.peers, pytest.mark.no_device_guard, pytest.mark.filterwarnings("ignore")]
lycoris = pytest.importorskip("lycoris", reason="lycoris-lora is not installed (extra: peers)")

LORA, LOHA, LOKR = nerine.LoRA, nerine.LoHa, nerine.LoKr


class Net(nn.Module):
    """Non-square layers of every kind that both programs adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 16, 3, padding=1, stride=2)
        self.point = nn.Conv2d(16, 12, 1)
        self.line = nn.Conv1d(12, 20, 3, padding=1)
        self.to_q = nn.Linear(20, 24)
        self.out = nn.Linear(24, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.point(torch.tanh(self.conv(x)))).flatten(2)
        h = torch.tanh(self.line(h)).mean(2)
        return self.out(torch.tanh(self.to_q(h)))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    lycoris.LycorisNetwork.apply_preset(
        {
            "enable_conv": True,
            "target_module": ["Linear", "Conv1d", "Conv2d"],
            "target_name": [],
            "lora_prefix": "lycoris",
        }
    )
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 6, 9, 8)


def perturb(parameters: Any) -> None:
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn_like(p) * 0.2)


def close(ours: Tensor, theirs: Tensor) -> None:
    scale = theirs.abs().max()
    assert float((ours - theirs).abs().max() / scale) < 1e-5


ALGORITHMS = [
    LORA(rank=4, alpha=2.0),
    LORA(rank=4, alpha=2.0, rs=True),
    LORA(rank=4, alpha=2.0, scalar=True),
    LORA(rank=3, alpha=2.0, tucker=True),
    LOHA(rank=3, alpha=2.0),
    LOHA(rank=3, alpha=2.0, tucker=True),
    LOKR(rank=2, alpha=1.0),
    LOKR(rank=2, alpha=1.0, factor=2),
    LOKR(rank=1, alpha=0.5, decompose_both=True),
    LOKR(full_matrix=True, factor=4),
]


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, *map(nerine.DoRA, ALGORITHMS)], ids=str)
def test_lycoris_computes_the_same_from_our_file(algorithm: Algorithm, net: Net, x: Tensor, tmp_path: Path) -> None:
    base = copy.deepcopy(net)
    network = nerine.attach(net, algorithm)
    perturb(network.parameters())
    file = tmp_path / "a.safetensors"
    nerine.save(network, file)
    theirs, _ = lycoris.create_lycoris_from_weights(1.0, str(file), base)
    theirs.apply_to()
    assert len(theirs.loras) == 5
    close(net(x), base(x))


THEIRS = [
    {"algo": "lora"},
    {"algo": "lora", "use_tucker": True},
    {"algo": "lora", "use_scalar": True},
    {"algo": "loha"},
    {"algo": "loha", "use_tucker": True},
    {"algo": "lokr"},
    {"algo": "lokr", "factor": 3},
    {"algo": "lokr", "full_matrix": True},
    {"algo": "lokr", "decompose_both": True, "linear_dim": 1, "conv_dim": 1},
    {"algo": "lokr", "unbalanced_factorization": True},
    {"algo": "lokr", "use_tucker": True, "linear_dim": 1, "conv_dim": 1},
    {"algo": "lora", "dora_wd": True},
    {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    {"algo": "loha", "dora_wd": True},
    {"algo": "lokr", "dora_wd": True},
    {"algo": "lokr", "dora_wd": True, "wd_on_output": False},
]


@pytest.mark.parametrize("settings", THEIRS, ids=str)
def test_we_compute_the_same_from_their_file(settings: dict[str, Any], net: Net, x: Tensor, tmp_path: Path) -> None:
    base = copy.deepcopy(net)
    theirs = lycoris.create_lycoris(net, 1.0, **{"linear_dim": 2, "linear_alpha": 1.0, **settings})
    theirs.apply_to()
    perturb(theirs.parameters())
    file = tmp_path / "a.safetensors"
    theirs.save_weights(str(file), torch.float32, {})
    network = nerine.load(base, file, strict=True)
    assert len(network) == 5
    close(base(x), net(x))


# -- where LyCORIS 4.1.3 differs, and why we do not follow --------------------------------------------------------
@pytest.mark.parametrize("algo", ["loha", "lokr"])
def test_their_merge_applies_alpha_twice(algo: str, net: Net, x: Tensor, tmp_path: Path) -> None:
    """LyCORIS merges LoHa and LoKr with (alpha/rank)²: the merged model is not the trained one."""
    base, plain = copy.deepcopy(net), copy.deepcopy(net)
    theirs = lycoris.create_lycoris(net, 1.0, linear_dim=1, linear_alpha=0.5, algo=algo)
    theirs.apply_to()
    perturb(theirs.parameters())
    file = tmp_path / "a.safetensors"
    theirs.save_weights(str(file), torch.float32, {})
    trained = net(x)
    theirs.restore()
    theirs.merge_to(1.0)
    their_delta = net.to_q.weight - plain.to_q.weight
    network = nerine.load(base, file)
    close(base(x), trained)
    network.merge()
    close(base(x), trained)
    ours = base.to_q.weight - plain.to_q.weight
    assert torch.allclose(their_delta, ours * 0.5, atol=1e-6)


def test_their_default_mode_loses_small_deltas_in_bf16() -> None:
    """(W + dW) - W in bf16 leaves little of a delta of 0.1 % of W; ours is the product itself."""
    layer = nn.Linear(256, 128).to(torch.bfloat16)
    x = torch.randn(32, 256).to(torch.bfloat16)
    down = torch.randn(8, 256, dtype=torch.float64) / 16
    up = torch.randn(128, 8, dtype=torch.float64) * 1e-5
    exact = x.double() @ (up @ down).T

    theirs = lycoris.modules.LoConModule("a", copy.deepcopy(layer), 1.0, 8, 8).to(torch.bfloat16)
    with torch.no_grad():
        theirs.lora_down.weight.copy_(down)
        theirs.lora_up.weight.copy_(up)
        merged, _ = theirs.get_merged_weight(1.0, layer.weight.shape)
        lost = (merged - layer.weight).double()
    assert float((x.double() @ lost.T - exact).norm() / exact.norm()) > 0.3

    network = nerine.attach(layer, nerine.LoRA(rank=8))
    network.load_state_dict({"down": down.float(), "up": up.float()})
    _, _, adapter = next(network.adapters())
    call = Call(adapter.site, x, layer(x), layer.bias, lambda: layer.weight)
    ours = adapter.algorithm.deviation(adapter(x), call).double()
    assert float((ours - exact).norm() / exact.norm()) < 0.005


def test_their_circular_padding_differs_from_their_merge(x: Tensor) -> None:
    """LyCORIS pads the delta's convolution with zeros, whatever the layer does; ours pads as the layer does."""
    layer = nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular")
    plain = copy.deepcopy(layer)
    network = nerine.attach(layer, nerine.LoRA(rank=2))
    perturb(network.parameters())
    ours = layer(x)
    network.merge()
    close(layer(x), ours)
    theirs = lycoris.modules.LoConModule("a", plain, 1.0, 2, 2, bypass_mode=False)
    nn.init.normal_(theirs.lora_up.weight)
    theirs.apply_to()
    forward = plain(x)
    theirs.restore()
    theirs.merge_to(1.0)
    assert float((plain(x) - forward).abs().max()) > 0.1


def test_their_loader_refuses_input_axis_dora(net: Net, tmp_path: Path) -> None:
    """LyCORIS cannot reload a DoRA over the input axis, its own files included; we tell the axis by its shape."""
    network = nerine.attach(net, nerine.DoRA(nerine.LoRA(rank=2), axis="in"))
    perturb(network.parameters())
    file = tmp_path / "a.safetensors"
    nerine.save(network, file)
    nerine.load(Net(), file, strict=True)
    with pytest.raises(RuntimeError, match="shape"):
        lycoris.create_lycoris_from_weights(1.0, str(file), Net())


def test_strength_of_dora(net: Net, x: Tensor, tmp_path: Path) -> None:
    """At multiplier 0 LyCORIS's DoRA still adds the whole delta; our strength 0 is the base, bit by bit."""
    plain = net(x)
    network = nerine.attach(net, nerine.DoRA(nerine.LoRA(rank=2)))
    perturb(network.parameters())
    file = tmp_path / "a.safetensors"
    nerine.save(network, file)
    network.strength = 0.0
    assert torch.equal(net(x), plain)
    network.detach()
    theirs, _ = lycoris.create_lycoris_from_weights(0.0, str(file), net)
    theirs.apply_to()
    assert float((net(x) - plain).abs().max()) > 1e-3
