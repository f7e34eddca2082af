"""Numbers that stay the same: for each version of the semantics, what fixed tensors make of a fixed input.

`semantics-1.json` is never edited. If a formula changes, a new version gets a new file, and the numbers of the old one
still hold for files of that version. Run as a program, this file prints the numbers of today's formulas.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nerine
from nerine.algorithms import REGISTRY, Algorithm, DoRA, Params, build
from nerine.files.meta import SEMANTICS
from nerine.testing.battery import around

FILE = Path(__file__).with_name("semantics-1.json")

SETTINGS = {
    "lora": [
        {"rank": 2, "alpha": 1.5},
        {"rank": 2, "alpha": 3.0, "tucker": True},
        {"rank": 4, "alpha": 3.0, "rs": True},
        {"rank": 2, "alpha": 1.5, "init": "pissa"},
    ],
    "loha": [{"rank": 2, "alpha": 1.5}, {"rank": 2, "alpha": 3.0, "tucker": True}],
    "lokr": [
        {"rank": 1, "alpha": 0.75},
        {"rank": 1, "alpha": 2.0, "factor": 2, "unbalanced": True},
        {"rank": 1, "alpha": 2.0, "decompose_both": True, "tucker": True},
        {"full_matrix": True},
    ],
    "dylora": [{"rank": 4, "alpha": 3.0, "block_size": 2}],
    "tlora": [{"rank": 2, "alpha": 1.5}],
    "glora": [{"rank": 2, "alpha": 1.5}],
    "full": [{"bias": True}],
    "norm": [{"bias": True}],
    "ia3": [{"on_input": False}, {"on_input": True}],
    "diag-oft": [{"block_size": 2}, {"block_size": 2, "constraint": 0.0625, "rescale": True}],
    "boft": [{"block_size": 2}, {"block_size": 2, "constraint": 0.0625, "rescale": True}],
    "oft-v2": [{"block_size": 2}, {"block_size": 2, "terms": 0}],
}
LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), (3, 12)),
    "conv": (lambda: nn.Conv2d(4, 6, (3, 2), padding=1, stride=2), (2, 4, 5, 6)),
    "grouped": (lambda: nn.Conv1d(8, 6, 3, groups=2, padding=1, padding_mode="circular"), (2, 8, 5)),
}
NORM_LAYERS = {"layer norm": (lambda: nn.LayerNorm(6), (3, 6)), "group norm": (lambda: nn.GroupNorm(2, 4), (2, 4, 3))}


def wave(shape: tuple[int, ...], phase: float) -> Tensor:
    """Deterministic values that no generator can change."""
    count = int(torch.tensor(shape).prod()) if shape else 1
    return torch.sin(torch.arange(count, dtype=torch.float64) * 0.7 + phase).reshape(shape)


def algorithms() -> list[Algorithm]:
    plain = [REGISTRY[name](**s) for name, variants in SETTINGS.items() for s in variants]
    return [a for p in plain for a in around(p)]


def layers(algorithm: Algorithm) -> dict[str, Any]:
    return NORM_LAYERS if algorithm.kinds == {"norm"} else LAYERS


def case(algorithm: Algorithm, layer: str) -> dict[str, list[float]]:
    """Numbers of one adapter: output and weight, at strength 1 and 0.5, thinned out."""
    make, shape = layers(algorithm)[layer]
    model = nn.Sequential(make().double().requires_grad_(False))
    model[0].weight.copy_(wave(tuple(model[0].weight.shape), 0.1) * 0.5)
    model[0].bias.copy_(wave(tuple(model[0].bias.shape), 0.2))
    model.eval()
    network = nerine.attach(model, algorithm)
    ((_, _, adapter),) = network.adapters()
    with torch.no_grad():
        for i, (name, p) in enumerate(adapter.params().tensors.items()):
            p.copy_(1.5 + 0.5 * wave(tuple(p.shape), i) if name == "magnitude" else 0.6 * wave(tuple(p.shape), i + 0.5))
    x = wave(shape, 0.3)
    found = {"output": model(x).detach()}
    network.strength = 0.5
    found["half"] = model(x).detach()
    network.strength = 1
    network.merge()
    found["weight"] = model[0].weight.detach()
    return {name: thinned(t) for name, t in found.items()}


def thinned(t: Tensor) -> list[float]:
    """A few entries, and two sums that see all of them."""
    flat = t.flatten()
    weights = torch.cos(torch.arange(flat.numel(), dtype=torch.float64))
    return [*flat[:: max(1, flat.numel() // 4)][:5].tolist(), float(flat.sum()), float((flat * weights).sum())]


def known() -> dict[Algorithm, dict[str, dict[str, list[float]]]]:
    """The numbers by algorithm; a setting that was added later stands at its default there."""
    return {build(json.loads(key)): numbers for key, numbers in json.loads(FILE.read_text("utf-8")).items()}


KEYS = [(algorithm, layer) for algorithm in algorithms() for layer in layers(algorithm)]


@pytest.mark.parametrize(("algorithm", "layer"), KEYS, ids=lambda v: str(v))
def test_semantics_1(algorithm: Algorithm, layer: str) -> None:
    want = known()[algorithm][layer]
    for name, numbers in case(algorithm, layer).items():
        assert numbers == pytest.approx(want[name], rel=1e-10, abs=1e-12), name


def test_every_algorithm_has_golden_numbers() -> None:
    assert SETTINGS.keys() == REGISTRY.keys()
    assert known().keys() == set(algorithms())


def test_there_is_a_file_for_each_version() -> None:
    files = sorted(path.name for path in FILE.parent.glob("semantics-*.json"))
    assert files == [f"semantics-{version}.json" for version in range(1, SEMANTICS + 1)]


def test_by_the_formula() -> None:
    """The first numbers, worked out here without nerine: LoRA, and DoRA around it, on the linear layer."""
    weight, down, up = wave((8, 12), 0.1) * 0.5, 0.6 * wave((2, 12), 0.5), 0.6 * wave((8, 2), 1.5)
    changed = weight + 1.5 / 2 * up @ down
    lora = REGISTRY["lora"](rank=2, alpha=1.5)
    assert known()[lora]["linear"]["weight"] == pytest.approx(thinned(changed))
    dora = DoRA(lora)
    magnitude, down, up = 1.5 + 0.5 * wave((8, 1), 0), 0.6 * wave((2, 12), 1.5), 0.6 * wave((8, 2), 2.5)
    changed = weight + 1.5 / 2 * up @ down
    changed = changed * magnitude / changed.norm(dim=1, keepdim=True)
    assert known()[dora]["linear"]["weight"] == pytest.approx(thinned(changed))
    params = Params({"magnitude": magnitude, "down": down, "up": up}, 0.75)
    torch.testing.assert_close(dora.weight(params, weight), changed)


if __name__ == "__main__":
    numbers: dict[str, dict[str, dict[str, list[float]]]] = {}
    for one, where in KEYS:
        numbers.setdefault(json.dumps(one.settings(), sort_keys=True), {})[where] = case(one, where)
    print(json.dumps(numbers, indent=0, sort_keys=True))
