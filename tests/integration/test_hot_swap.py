"""Another file in the tensors of an attached adapter: nothing is compiled again, whatever rank and layers it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import nerine
from nerine import BOFT, IA3, DiagOFT, DoRA, FormatError, GLoRA, LoHa, LoKr, LoRA, OptionError, ShapeError, TLoRA

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
X = torch.linspace(-1, 1, 36).reshape(3, 12).sin()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).tanh())
        return out


def trained(algorithm: Any, seed: int, **more: Any) -> tuple[Model, nerine.Network]:
    model = Model().eval()
    network = nerine.attach(model, algorithm, **more)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model, network


def written(file: Path, algorithm: Any, seed: int, **more: Any) -> Tensor:
    model, network = trained(algorithm, seed, **more)
    nerine.save(network, file)
    with torch.no_grad():
        y: Tensor = model(X)
    return y


@pytest.mark.parametrize(
    "algorithm", [LoRA(rank=3, alpha=2), DoRA(LoKr(rank=2, factor=2)), DiagOFT(block_size=4)], ids=str
)
def test_a_file_and_strengths_are_exchanged_in_compiled_code(algorithm: Any, tmp_path: Path) -> None:
    """One graph for strength one, one for all others, one without: whatever changes within those is no news."""
    torch._dynamo.reset()
    want = written(tmp_path / "b.safetensors", algorithm, seed=2)
    model, network = trained(algorithm, seed=1)
    before = [p.data_ptr() for p in network.parameters()]
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        first = compiled(X)
        assert counter.frame_count == 1
        nerine.load(network, tmp_path / "b.safetensors", strict=True)
        torch.testing.assert_close(compiled(X), want, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(first, want, atol=1e-3)
        assert counter.frame_count == 1
        for strength in (0.5, 0.8, 0.3, 1.7, -0.4):
            network.strength = strength
            torch.testing.assert_close(compiled(X), model(X), rtol=1e-5, atol=1e-6)
        assert counter.frame_count <= 3
        seen = counter.frame_count
        for strength in (1.0, 0.25):
            network.strength = strength
            torch.testing.assert_close(compiled(X), model(X), rtol=1e-5, atol=1e-6)
        assert counter.frame_count == seen
    assert before == [p.data_ptr() for p in network.parameters()]
    torch._dynamo.reset()


def test_a_smaller_rank_is_exchanged_in_compiled_code(tmp_path: Path) -> None:
    """The scale is another number as well, which costs one compilation the first time that it changes."""
    torch._dynamo.reset()
    wants = [
        written(tmp_path / f"{i}.safetensors", LoRA(rank=rank, alpha=alpha), seed=i, targets=targets)
        for i, (rank, alpha, targets) in enumerate(
            [(2, 5.0, "full"), (1, 3.0, "second"), (4, 1.0, "first"), (3, 2.0, "full")]
        )
    ]
    model, network = trained(LoRA(rank=4, alpha=2), seed=9)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        compiled(X)
        for i, want in enumerate(wants):
            nerine.load(network, tmp_path / f"{i}.safetensors", swap=True)
            torch.testing.assert_close(compiled(X), want, rtol=1e-5, atol=1e-6)
            if i == 1:
                seen = counter.frame_count
    assert seen <= 3
    assert counter.frame_count == seen
    torch._dynamo.reset()


PAIRS = [
    (LoRA(rank=4, alpha=2), LoRA(rank=2, alpha=5)),
    (LoRA(rank=4, init="pissa"), LoRA(rank=2, init="pissa")),
    (LoHa(rank=3), LoHa(rank=2, alpha=1)),
    (LoKr(rank=3, factor=2), LoKr(rank=2, factor=2)),
    (DoRA(LoRA(rank=4)), DoRA(LoRA(rank=1, alpha=3))),
    (TLoRA(rank=4), TLoRA(rank=2)),
    (GLoRA(rank=3), GLoRA(rank=2)),
    (IA3(), IA3()),
    (BOFT(block_size=4), BOFT(block_size=4)),
]


@pytest.mark.parametrize(("large", "small"), PAIRS, ids=str)
def test_zeros_for_the_ranks_that_are_missing_are_exact(large: Any, small: Any, tmp_path: Path) -> None:
    want = written(tmp_path / "small.safetensors", small, seed=1)
    model, network = trained(large, seed=2)
    nerine.load(network, tmp_path / "small.safetensors", swap=True, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(model(X), want, rtol=1e-5, atol=1e-5)
    nerine.save(network, tmp_path / "again.safetensors")
    other = Model().eval()
    nerine.load(other, tmp_path / "again.safetensors", strict=True)
    torch.testing.assert_close(other(X), want, rtol=1e-5, atol=1e-5)


def test_layers_that_the_file_lacks_come_to_rest(tmp_path: Path) -> None:
    want = written(tmp_path / "a.safetensors", LoRA(rank=2), seed=1, targets="second")
    model, network = trained(LoRA(rank=2), seed=2)
    nerine.load(network, tmp_path / "a.safetensors", swap=True)
    torch.testing.assert_close(model(X), want, rtol=1e-5, atol=1e-6)
    assert network.report.missing == ("first",)

    written(tmp_path / "b.safetensors", DoRA(LoRA(rank=2)), seed=1, targets="second")
    model, network = trained(DoRA(LoRA(rank=2)), seed=2)
    before = model(X)
    with pytest.raises(FormatError, match=r"first: the file has no adapter for this layer, and the DoRA\(.*cannot be"):
        nerine.load(network, tmp_path / "b.safetensors", swap=True)
    assert torch.equal(model(X), before)


def test_what_cannot_be_exchanged_is_told(tmp_path: Path) -> None:
    written(tmp_path / "large.safetensors", LoRA(rank=5), seed=1)
    written(tmp_path / "other.safetensors", LoHa(rank=2), seed=1)
    model, network = trained(LoRA(rank=2), seed=2)
    before = model(X)
    with pytest.raises(ShapeError, match="swap=True"):
        nerine.load(network, tmp_path / "large.safetensors")
    for name in ("large", "other"):
        with pytest.raises(ShapeError, match="Attach with the settings of the file"):
            nerine.load(network, tmp_path / f"{name}.safetensors", swap=True)
    with pytest.raises(OptionError, match="hand over the one that is attached"):
        nerine.load(Model(), tmp_path / "large.safetensors", swap=True)
    assert torch.equal(model(X), before)
