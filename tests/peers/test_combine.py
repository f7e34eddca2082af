"""`combine` beside PEFT: the votes on equal tensors, and adapters merged by `add_weighted_adapter`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nerine
from nerine import LoRA
from nerine.tools.combine import combine
from nerine.tools.voting import vote
from tool_adapters import stirred

peft = pytest.importorskip("peft", reason="needs peft")
merge_utils = pytest.importorskip("peft.utils.merge_utils")

pytestmark = pytest.mark.peers

WEIGHTS = [0.7, 0.4, -0.3]


def changes(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(24, 17, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("density", [0.2, 0.5, 0.83])
@pytest.mark.parametrize(
    ("method", "sign"),
    [
        ("linear", "total"),
        ("magnitude_prune", "total"),
        ("ties", "total"),
        ("ties", "frequency"),
        ("dare_linear", "total"),
        ("dare_ties", "total"),
        ("dare_ties", "frequency"),
    ],
)
def test_votes_are_pefts(method: str, sign: str, density: float, count: int) -> None:
    """DARE too: the same draws from a generator in the same state."""
    own, weights = changes(count), torch.tensor(WEIGHTS[:count])
    torch.manual_seed(11)
    if method == "linear":
        wanted = merge_utils.task_arithmetic(own, weights)
    elif method.endswith("ties"):
        wanted = getattr(merge_utils, method)(own, weights, density, sign)
    else:
        wanted = getattr(merge_utils, method)(own, weights, density)
    rng = torch.Generator().manual_seed(11)
    found = vote(method, own, WEIGHTS[:count], density=density, sign=sign, rng=rng)
    assert float((found - wanted).abs().max()) <= 2e-6 * float(wanted.abs().max())
    assert 0 < float((wanted != 0).float().mean()) <= 1


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.proj, self.out = nn.Linear(12, 18), nn.Linear(18, 7, bias=False)


def in_peft(files: list[Path], how: str, **options: Any) -> dict[str, Tensor]:
    """The weights of a model into which PEFT has merged its own combination."""
    model = peft.PeftModel.from_pretrained(Model(), str(files[0]), adapter_name="a")
    model.load_adapter(str(files[1]), adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "both", combination_type=how, **options)
    model.set_adapter("both")
    return {key: t.detach() for key, t in model.merge_and_unload().state_dict().items()}


@pytest.mark.parametrize(
    ("how", "options"), [("cat", {"method": "concat"}), ("svd", {"method": "svd", "rank": 4})], ids=["cat", "svd"]
)
def test_combinations_of_factors_are_pefts(how: str, options: dict[str, Any], tmp_path: Path) -> None:
    files = []
    for number, rank in enumerate((3, 5)):
        network = stirred(nerine.attach(Model(), LoRA(rank=rank, alpha=2.0)), number)
        files.append(tmp_path / str(number))
        nerine.save(network, files[-1], dialect="peft")
    wanted = in_peft(files, how, **({"svd_rank": 4} if how == "svd" else {}))
    combine([(files[0], 0.7), (files[1], 0.4)], tmp_path / "both", **options)
    model = Model()
    nerine.load(model, tmp_path / "both", strict=True).merge()
    for layer in ("proj", "out"):
        before, ours = (m.state_dict()[f"{layer}.weight"] for m in (Model(), model))
        theirs = wanted[f"{layer}.weight"]
        assert float((ours - theirs).abs().max()) < 1e-5 * float((theirs - before).abs().max())
        assert float((theirs - before).abs().max()) > 0.1
