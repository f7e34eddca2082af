"""What Python takes: of one small layer beside a LoRA in two lines, and of a whole model beyond its layers.

    python benchmarks/overhead.py [--rounds 10] [--repeats 100] [--json FILE]

One thread, for the work is too small to be shared. (a) is a Linear of 128 to 128 on 4 tokens: time beyond the frozen
layer is nearly all overhead. (b) is a UNet of SDXL's layers and almost no width: what adapters add to the time of the
whole model, less what they add to each of its layers alone, is what the model loses on the way between them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from overhead_unet import WIDTH, unet_problem
from step_contestants import adapted, contestants, frozen
from step_measure import Contestant, Measured, Timing, race, race_in_eval, step, without_gradients
from step_rows import ROWS, Problem, problem_of
from suite_models import Alone, ModelProblem, layers_of, model_contestants, plain
from torch import Tensor, nn

__all__ = ["BY_HAND", "GOAL", "LayerOverhead", "ModelOverhead", "lost_share", "measure", "of_layer", "of_model"]

BY_HAND = "LoRA by hand"
GOAL = 0.03  # of a step of the adapted model
MODEL_ROWS = ("LoRA", "DoRA(LoRA)", "LoKr")
PEERS = ("LoRA", "DoRA(LoRA)")


@dataclass
class LayerOverhead:
    """Microseconds beyond the frozen layer of one contestant, and over those of a LoRA by hand."""

    row: str
    contestant: str
    step_us: float
    eval_us: float
    step_multiple: float = 0.0
    eval_multiple: float = 0.0


@dataclass
class ModelOverhead:
    """Milliseconds of a step of the whole model, and what is lost between its layers."""

    row: str
    layers: int
    frozen_ms: float
    adapted_ms: float
    layers_ms: float  # what the adapters add to the layers, each timed alone, times its count
    lost: float  # share of the adapted step
    reached: bool
    peers_ms: dict[str, float]


# -- (a) one layer -------------------------------------------------------------------------------------------------
def by_hand(p: Problem) -> Contestant:
    """LoRA as one writes it down."""
    t = p.leaves(ROWS["LoRA"])
    layer, down, up = p.fresh_layer(), t["down"], t["up"]

    def forward(x: Tensor) -> Tensor:
        out: Tensor = layer(x) + x @ down.T @ up.T
        return out

    return Contestant(BY_HAND, forward, t)


def _all(p: Problem) -> Iterator[tuple[str, Contestant]]:
    yield "", frozen(p)
    yield "LoRA", by_hand(p)
    for name, row in ROWS.items():
        if name in PEERS:
            yield from ((name, c) for c in contestants(p, row, by_hand=False) if not c.failure)
        else:
            yield name, adapted(p, row)


def repeated(act: Callable[[Measured, Contestant], tuple[float, float]], times: int) -> Any:
    """`act` as the median of so many in a row: a step is some microseconds, and an interruption is thousands."""

    def many(m: Measured, c: Contestant) -> tuple[float, float]:
        took = [act(m, c) for _ in range(times)]
        return median(t[0] for t in took), median(t[1] for t in took)

    return many


def of_layer(rounds: int = 10, repeats: int = 100) -> list[LayerOverhead]:
    """All algorithms of nerine, and the peers that have LoRA and DoRA."""
    p = problem_of(lambda: nn.Linear(128, 128), (4, 128))
    everyone = {f"{row}|{c.name}": c for row, c in _all(p)}
    group = [Contestant(key, c.forward, c.trained, modules=c.modules) for key, c in everyone.items()]
    times = race(p, {"": group}, rounds, repeated(step, repeats), warm_up=1)[""]
    used = race_in_eval(p, {"": group}, rounds, act=repeated(without_gradients, repeats))[""]

    def beyond(found: dict[str, Timing], key: str) -> float:
        return (min(found[key].total.values()) - min(found["|frozen"].total.values())) * 1e6

    hand = f"LoRA|{BY_HAND}"
    rows = []
    for key in [key for key in everyone if key != "|frozen"]:
        row, name = key.split("|")
        one = LayerOverhead(row, name, beyond(times, key), beyond(used, key))
        one.step_multiple = one.step_us / beyond(times, hand)
        one.eval_multiple = one.eval_us / beyond(used, hand)
        rows.append(one)
    return rows


# -- (b) a whole model -----------------------------------------------------------------------------------------------
def lost_share(frozen_model: float, adapted_model: float, added_to_layers: float) -> float:
    """The share of the adapted model's step that is neither the frozen model nor what its layers take alone."""
    return (adapted_model - frozen_model - added_to_layers) / adapted_model


def _best(times: dict[str, Timing]) -> dict[str, float]:
    return {name: min(timing.total.values()) for name, timing in times.items()}


def added_alone(one: Alone, row: str, rounds: int, repeats: int) -> float:
    """Seconds that the adapter adds to a step of one layer by itself."""
    torch.manual_seed(0)
    layer = nn.Sequential(one.build()).requires_grad_(False)
    x = torch.randn(one.x)
    p = ModelProblem(layer, x.requires_grad_(one.needs_grad), torch.randn_like(layer(x)))
    mine = next(c for c, _ in model_contestants(p, ROWS[row], peers=False))
    if one.needs_grad:
        best = _best(race(p, {"": [plain(p), mine]}, rounds, repeated(step, repeats), warm_up=1)[""])
        return best["nerine"] - best["frozen"]
    bare = _best(race(p, {"": [plain(p)]}, rounds, repeated(without_gradients, repeats), warm_up=1)[""])
    return _best(race(p, {"": [mine]}, rounds, repeated(step, repeats), warm_up=1)[""])["nerine"] - bare["frozen"]


def of_model(row: str, rounds: int = 10, repeats: int = 20, peers: bool = True) -> ModelOverhead:
    """One algorithm on all layers of the UNet."""
    p = unet_problem()
    group = [plain(p), *(c for c, _ in model_contestants(p, ROWS[row], peers) if not c.failure)]
    best = _best(race(p, {"": group}, rounds, warm_up=1)[""])
    layers = layers_of(group[1].modules[0], p.x, as_trained=True)
    added = sum(count * added_alone(one, row, 3, repeats) for one, count in layers.items())
    lost = lost_share(best["frozen"], best["nerine"], added)
    return ModelOverhead(
        row,
        sum(layers.values()),
        best["frozen"] * 1e3,
        best["nerine"] * 1e3,
        added * 1e3,
        lost,
        lost <= GOAL,
        {name: s * 1e3 for name, s in best.items() if name not in ("frozen", "nerine")},
    )


def measure(rounds: int = 10, repeats: int = 100) -> dict[str, Any]:
    """Both, on one thread, as plain data."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        layer = [asdict(one) for one in of_layer(rounds, repeats)]
        model = [asdict(of_model(row, rounds, max(1, repeats // 5))) for row in MODEL_ROWS]
    finally:
        torch.set_num_threads(before)
    return {"width": WIDTH, "layer": layer, "model": model}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=100, help="steps in a row of the single layer (100)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    found = measure(args.rounds, args.repeats)
    for one in (*found["layer"], *found["model"]):
        print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in one.items()))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
