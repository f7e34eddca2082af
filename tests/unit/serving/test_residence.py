"""Few adapters are on the device, and which ones those are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import nerine
from nerine.errors import OptionError
from nerine.serving import Shelf
from served_models import alone, write


def here(shelf: Shelf) -> list[str]:
    return [row.name for row in shelf.report().rows if row.resident]


@pytest.fixture
def served(tmp_path: Path) -> tuple[nn.Module, Shelf, dict[str, Path]]:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).requires_grad_(False)
    files = {n: write(model, nerine.LoRA(rank=2), tmp_path / f"{n}.safetensors", i) for i, n in enumerate("abcd")}
    shelf = Shelf(model, resident=2)
    for name, file in files.items():
        shelf.add(name, file)
    return model, shelf, files


def test_who_was_not_used_for_longest_leaves(served: tuple[nn.Module, Shelf, dict[str, Path]]) -> None:
    model, shelf, files = served
    x = torch.ones(2, 5)
    assert here(shelf) == []
    for name, there in (("a", "a"), ("b", "ab"), ("a", "ab"), ("c", "ac"), ("d", "cd"), ("a", "ad")):
        shelf.use(name)
        torch.testing.assert_close(model(x), alone(shelf.model, {files[name]: 1.0}, x))
        assert here(shelf) == list(there)
    assert all(not held.there and not held.pieces for held in shelf._residence.held.values() if held.name in "bc")


def test_what_is_used_comes_back_after_a_batch_sent_it_away(served: tuple[nn.Module, Shelf, dict[str, Path]]) -> None:
    model, shelf, _ = served
    x = torch.ones(2, 5)
    shelf.use("a")
    before = model(x)
    with shelf.batch(["b", "c"]):
        model(x)
        assert here(shelf) == ["b", "c"]
    assert torch.equal(model(x), before)
    assert here(shelf) == ["a", "c"]


def test_more_than_there_is_room_for(served: tuple[nn.Module, Shelf, dict[str, Path]]) -> None:
    _, shelf, _ = served
    with pytest.raises(OptionError, match=r"3 different adapters at once, and at most 2 .* resident=3"):
        shelf.use({"a": 1.0, "b": 1.0, "c": 1.0})
    with pytest.raises(OptionError, match="3 different adapters"), shelf.batch(["a", "b", "c"]):
        pass
    with shelf.batch(["a", ("a", 0.5), None, "b"]):
        assert here(shelf) == ["a", "b"]


def test_half_precision_in_memory(served: tuple[nn.Module, Shelf, dict[str, Path]]) -> None:
    model, shelf, files = served
    x = torch.ones(2, 5)
    shelf.add("half", files["a"], dtype=torch.bfloat16)
    rows = {row.name: row for row in shelf.report().rows}
    assert rows["half"].bytes * 2 == rows["a"].bytes
    shelf.use("half")
    y = model(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, alone(model, {files["a"]: 1.0}, x), rtol=0.05, atol=0.05)
    with pytest.raises(OptionError, match="dtype must be"):
        shelf.add("odd", files["a"], dtype=torch.int8)


def test_adapters_of_one_kind_share_their_description(served: tuple[nn.Module, Shelf, dict[str, Path]]) -> None:
    _, shelf, _ = served
    assert len({id(held.slots) for held in shelf._residence.held.values()}) == 1


CODE = """
import copy, pathlib, tempfile, torch, nerine
from torch import nn
from nerine.errors import DeviceError
from nerine.serving import Shelf
from served_models import alone, write

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).requires_grad_(False)
x = torch.randn(3, 5)
made = {"a": nerine.LoRA(rank=2), "b": nerine.DoRA(nerine.LoRA(rank=1)), "c": nerine.LoKr(rank=1)}
folder = pathlib.Path(tempfile.mkdtemp())
files = {n: write(model, a, folder / f"{n}.safetensors", i) for i, (n, a) in enumerate(made.items())}
want = {n: alone(model, {f: 1.0}, x) for n, f in files.items()}
shelf = Shelf(model, resident=2)
for n, f in files.items():
    shelf.add(n, f)
shelf.use("a")
model(x)
model.to(DEVICE)  # the shelf was filled before
for n in "abc":
    shelf.use(n)
    torch.testing.assert_close(model(x.to(DEVICE)).cpu(), want[n], rtol=1e-4, atol=1e-5)
with shelf.batch(["c", None, "b"]):
    y = model(x.to(DEVICE)).cpu()
torch.testing.assert_close(y[[0, 2]], torch.stack([want["c"][0], want["b"][2]]), rtol=1e-4, atol=1e-5)
there = [t.device.type for held in shelf._residence.held.values() for t in held.there.values()]
assert there == ["cuda", "cuda"], there
assert all(home.flat.device.type == "cpu" for held in shelf._residence.held.values() for home in held.homes)

third = Shelf(copy.deepcopy(model))  # filled while the model is there: in pinned memory
third.add("b", files["b"])
third.use("b")
torch.testing.assert_close(third.model(x.to(DEVICE)).cpu(), want["b"], rtol=1e-4, atol=1e-5)
assert all(home.flat.is_pinned() for home in third._residence.held["b"].homes)

other = Shelf(copy.deepcopy(model), device="cpu")  # filled while the model is there
other.add("a", files["a"])
other.use("a")
try:
    other.model(x.to(DEVICE))
except DeviceError as error:
    assert "keeps adapters on cpu" in str(error), error
else:
    raise AssertionError("no error")
"""


@pytest.mark.no_device_guard
def test_on_a_device(run_on_simulated_cuda) -> None:
    run_on_simulated_cuda(CODE)
