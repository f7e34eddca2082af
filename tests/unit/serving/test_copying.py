"""Adapters copied into a network: the same values as from the file, and nothing is compiled again."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch import nn

import nerine
from nerine.algorithms import Algorithm
from nerine.errors import FormatError, MergeError, OptionError, ShapeError
from nerine.serving import Shelf
from served_models import alone, write


def model_of() -> nn.Module:
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).double().requires_grad_(False).eval()


def filled(model: nn.Module, tmp_path: Path, **algorithms: Algorithm) -> tuple[Shelf, dict[str, Path]]:
    shelf = Shelf(model)
    files = {n: write(model, a, tmp_path / f"{n}.safetensors", i) for i, (n, a) in enumerate(algorithms.items())}
    for name, file in files.items():
        shelf.add(name, file)
    return shelf, files


@pytest.mark.parametrize(
    "kind",
    [
        lambda **more: nerine.LoRA(**more),
        lambda **more: nerine.DoRA(nerine.LoRA(**more)),
        lambda **more: nerine.LoHa(**more),
        lambda **more: nerine.GLoRA(**more),
    ],
    ids=["lora", "dora", "loha", "glora"],
)
def test_smaller_ranks_and_other_scales(kind, tmp_path: Path) -> None:
    model = model_of()
    shelf, files = filled(model, tmp_path, big=kind(rank=3), small=kind(rank=2, alpha=1.0))
    x = torch.randn(5, 6, dtype=torch.float64)
    other = copy.deepcopy(model)
    network = nerine.load(other, files["big"])
    tensors = list(network.parameters())
    for name in ("small", "big", "small"):
        shelf.copy_into(network, name)
        torch.testing.assert_close(other(x), alone(model, {files[name]: 1.0}, x), rtol=1e-10, atol=1e-10)
    assert all(one is two for one, two in zip(network.parameters(), tensors, strict=True))


def test_layers_that_the_adapter_lacks_rest(tmp_path: Path) -> None:
    model = model_of()
    shelf, files = filled(model, tmp_path, all=nerine.LoRA(rank=2))
    first = write(model, nerine.LoRA(rank=1), tmp_path / "first.safetensors", targets="0")
    shelf.add("first", first, strength=0.5)
    x = torch.randn(5, 6, dtype=torch.float64)
    network = nerine.load(model_of(), files["all"])
    for name, file, strength in (("first", first, 0.5), ("all", files["all"], 1.0)):
        shelf.copy_into(network, name)
        torch.testing.assert_close(network.model(x), alone(model, {file: strength}, x), rtol=1e-10, atol=1e-10)


def test_what_does_not_fit(tmp_path: Path) -> None:
    model = model_of()
    shelf, files = filled(model, tmp_path, two=nerine.LoRA(rank=2), kron=nerine.LoKr(rank=1))
    small = nerine.attach(model_of(), nerine.LoRA(rank=1), targets=lambda path, module: True)
    with pytest.raises(ShapeError, match="0: the adapter is LoRA"):
        shelf.copy_into(small, "two")
    with pytest.raises(ShapeError, match="the file has LoKr"):
        shelf.copy_into(small, "kron")
    part = nerine.attach(model_of(), nerine.LoRA(rank=2), targets="0")
    with pytest.raises(OptionError, match="1 layers where the network has none, for example 2"):
        shelf.copy_into(part, "two")
    turns = nerine.attach(
        model_of(), [nerine.Rule("0", nerine.LoRA(rank=2)), nerine.Rule("2", nerine.DoRA(nerine.Full()))]
    )
    shelf.add("first", write(model, nerine.LoRA(rank=2), tmp_path / "first.safetensors", targets="0"))
    with torch.no_grad():
        for parameter in turns.parameters():
            parameter.add_(0.5)
    before = turns.state_dict()
    before = {key: t.clone() for key, t in before.items()}
    with pytest.raises(FormatError, match="cannot be filled with zeros"):
        shelf.copy_into(turns, "first")
    assert all(torch.equal(before[key], t) for key, t in turns.state_dict().items())
    network = nerine.load(model_of(), files["two"])
    network.merge()
    with pytest.raises(MergeError, match="unmerge first"):
        shelf.copy_into(network, "two")


@pytest.mark.no_device_guard
def test_a_compiled_model_is_not_compiled_again(tmp_path: Path) -> None:
    made = {f"n{i}": nerine.DoRA(nerine.LoRA(rank=1 + i, alpha=2.0)) for i in range(4)}
    model = model_of()
    shelf, files = filled(model, tmp_path, **made)
    x = torch.randn(5, 6, dtype=torch.float64)
    network = nerine.load(model_of(), files["n3"])
    torch._dynamo.reset()
    compiled = torch.compile(network.model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compiled(x)
        for name in ("n0", "n2", "n1", "n3"):
            shelf.copy_into(network, name)
            want = alone(model, {files[name]: 1.0}, x)
            with torch._dynamo.config.patch(error_on_recompile=True):
                torch.testing.assert_close(compiled(x), want, rtol=1e-9, atol=1e-9)


@pytest.mark.no_device_guard
def test_a_compiled_model_may_be_served_with_breaks(tmp_path: Path) -> None:
    model = model_of()
    shelf, files = filled(model, tmp_path, one=nerine.LoRA(rank=2), two=nerine.DoRA(nerine.LoKr(rank=1)))
    x = torch.randn(3, 6, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        shelf.use("one")
        compiled(x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            with shelf.batch(["two", None, "one"]):
                y = compiled(x)
            shelf.use(None)
            base = compiled(x)
    torch.testing.assert_close(y[:1], alone(model, {files["two"]: 1.0}, x[:1]))
    torch.testing.assert_close(y[2:], alone(model, {files["one"]: 1.0}, x[2:]))
    assert torch.equal(y[1], base[1])
