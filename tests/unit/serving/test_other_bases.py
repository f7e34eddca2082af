"""Bases that are no plain parameters: quantised, and brought to the device by an engine for each call."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import nerine
from nerine.algorithms import Algorithm
from nerine.serving import Shelf
from quantised import KINDS, SHAPE, Kind, linear
from served_models import write

ALGORITHMS: dict[str, Algorithm] = {
    "lora": nerine.LoRA(rank=3),
    "dora": nerine.DoRA(nerine.LoRA(rank=2)),
    "dora lokr": nerine.DoRA(nerine.LoKr(rank=2)),
    "ia3": nerine.IA3(),
}


@pytest.mark.no_device_guard
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "quanto" not in kind.name], ids=str)  # it compiles
def test_quantised_layers(kind: Kind, tmp_path: Path) -> None:
    files = {
        name: write(nn.Sequential(linear()), algorithm, tmp_path / f"{name}.safetensors", seed)
        for seed, (name, algorithm) in enumerate(ALGORITHMS.items())
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages, about themselves
        model = nn.Sequential(kind.make()).eval()
    dtype = next((t.dtype for t in model.parameters() if t.dtype in (torch.bfloat16, torch.float16)), torch.float32)
    x = torch.randn(len(files) + 1, 3, SHAPE[1], generator=torch.Generator().manual_seed(2)).to(dtype)
    shelf = Shelf(model)
    for name, file in files.items():
        shelf.add(name, file)
    with torch.no_grad():
        base = model(x)
        with shelf.batch([None, *files]):
            y, again = model(x), model(x)
    shelf.detach()
    assert torch.equal(y, again)
    assert torch.equal(y[0], base[0])
    for row, file in enumerate(files.values(), 1):
        network = nerine.load(model, file)
        with torch.no_grad():
            want = model(x)[row]
        network.detach()
        close = 2e-2 if dtype != torch.float32 else 1e-4
        torch.testing.assert_close(y[row], want, rtol=close, atol=close)


@pytest.mark.no_device_guard
def test_weights_that_come_for_each_call(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4)).requires_grad_(False).eval()
    files = {
        name: write(model, algorithm, tmp_path / f"{name}.safetensors", seed)
        for seed, (name, algorithm) in enumerate(ALGORITHMS.items())
    }
    x = torch.randn(len(files), 6)
    shelf = Shelf(model)
    for name, file in files.items():
        shelf.add(name, file)
    with shelf.batch(list(files)):
        want = model(x)
    shelf.detach()
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model[0].weight.is_meta
    for name, file in files.items():
        shelf.add(name, file)
    with shelf.batch(list(files)):
        torch.testing.assert_close(model(x), want)
        held = model[0]._hf_hook.weights_map
        held["weight"].mul_(2.0)  # leaves no sign on the parameter that comes
        other = model(x)
    assert not torch.allclose(other, want)
    held["weight"].mul_(0.5)
    shelf.use("dora")
    torch.testing.assert_close(model(x)[1], want[1])
    shelf.detach()
