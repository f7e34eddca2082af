"""Each sample of a mixed batch gets what it would get alone, with its adapter attached: all algorithms, all layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nerine.model.layer import site_of
from nerine.serving import Shelf
from served_models import ALL, alone, write

PLACES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 8), (3, 12)),
    "linear, one vector a sample": (lambda: nn.Linear(6, 20, bias=False), (6,)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 7, 6)),
    "conv2d grouped": (lambda: nn.Conv2d(6, 12, (3, 2), groups=3), (6, 5, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, (3, 2), stride=(2, 1)), (6, 3, 4)),
    "embedding": (lambda: nn.Embedding(10, 6), (5,)),
}


def made(place: str, samples: int) -> tuple[nn.Module, Tensor]:
    make, shape = PLACES[place]
    torch.manual_seed(3)
    model = nn.Sequential(make()).double().requires_grad_(False).eval()
    if place == "embedding":
        return model, torch.randint(10, (samples, *shape))
    return model, torch.randn(samples, *shape, dtype=torch.float64)


@pytest.mark.parametrize("place", PLACES)
def test_a_mixed_batch_is_each_sample_alone(place: str, tmp_path: Path) -> None:
    model, _ = made(place, 1)
    files = {
        name: write(model, algorithm, tmp_path / f"{name}.safetensors", seed)
        for seed, (name, algorithm) in enumerate(ALL.items())
        if not algorithm.unsuited(site_of(model[0]))
    }
    assert len(files) > 20
    shelf = Shelf(model, resident=len(files))
    for name, file in files.items():
        shelf.add(name, file)
    summed = {"dora lora": 0.5, "lokr": -1.5, "lora": 0.25}
    entries = [*files, None, ("lora", 0.5), summed, "lora-5", ("lora", 0.5), None]
    model, x = shelf.model, made(place, len(entries))[1]
    base = model(x)  # nothing is in use yet
    with torch.no_grad(), shelf.batch(entries):
        y = model(x)
    shelf.detach()
    assert torch.equal(model(x), base)
    for number, entry in enumerate(entries):
        sample = x[number : number + 1]
        if entry is None:
            assert torch.equal(y[number], base[number])
            continue
        wanted = entry if isinstance(entry, dict) else dict([entry if isinstance(entry, tuple) else (entry, 1.0)])
        want = alone(model, {files[name]: strength for name, strength in wanted.items()}, sample)
        assert not torch.allclose(want[0], base[number], atol=1e-6), entry
        torch.testing.assert_close(y[number], want[0], rtol=1e-10, atol=1e-10, msg=lambda m, e=entry: f"{e}: {m}")


@pytest.mark.parametrize("place", PLACES)
def test_use_is_the_adapter_attached(place: str, tmp_path: Path) -> None:
    model, x = made(place, 4)
    shelf = Shelf(model, resident=2)
    for seed, (name, algorithm) in enumerate(ALL.items()):
        if algorithm.unsuited(site_of(model[0])):
            continue
        file = write(model, algorithm, tmp_path / "one.safetensors", seed)
        shelf.add(name, file, strength=0.7)
        shelf.use(name)
        with torch.no_grad():
            y = model(x)
        shelf.use(None)
        shelf.remove(name)
        assert "forward" not in model[0].__dict__
        torch.testing.assert_close(y, alone(model, {file: 0.7}, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["lora", "dora lora", "dora lokr", "boft"])
def test_bfloat16_is_as_near_as_the_format(name: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(24, 16)).bfloat16().requires_grad_(False).eval()
    x = torch.randn(3, 5, 24).bfloat16()
    file = write(model, ALL[name], tmp_path / "one.safetensors")
    want = alone(model.double(), {file: 1.0}, x.double())
    model.bfloat16()
    shelf = Shelf(model)
    shelf.add("one", file)
    shelf.add("same", file)
    with shelf.batch(["one", None, "same"]):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y[1], nn.functional.linear(x, model[0].weight, model[0].bias)[1])
    torch.testing.assert_close(y[[0, 2]].double(), want[[0, 2]], rtol=0.03, atol=0.03)
