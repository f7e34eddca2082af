"""One training step of one adapted layer on a GPU, in bf16: nerine beside the frozen layer, LyCORIS and PEFT.

    python benchmarks/gpu_step.py [--rounds 7] [--json FILE]

Forward and backward of a layer whose input needs its gradient and whose weight is frozen, in bf16 with fp32 adapters
under autocast, as trainers run it; timed with CUDA events, contestants interleaved, the best round counts. Everything
is a ratio to the frozen layer of the same round; "frozen again" shows the noise. LyCORIS and PEFT are left out where
they are not installed. Small layers are bound by the host's launches, and are so in training as well.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import nerine
from nerine.algorithms import Algorithm

Step = Callable[[], None]
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear 1280, 4,096 tokens": (lambda: nn.Linear(1280, 1280), (4, 1024, 1280)),
    "Linear 3072, 4,608 tokens": (lambda: nn.Linear(3072, 3072), (1, 4608, 3072)),
    "Linear 3072 to 12288, 4,608 tokens": (lambda: nn.Linear(3072, 12288), (1, 4608, 3072)),
    "Conv2d 320 3x3, 4 of 64x64": (lambda: nn.Conv2d(320, 320, 3, padding=1), (4, 320, 64, 64)),
}
ROWS: dict[str, tuple[Algorithm, dict[str, Any], dict[str, Any] | None]] = {
    "LoRA": (nerine.LoRA(rank=16), {"algo": "lora"}, {}),
    "DoRA(LoRA)": (nerine.DoRA(nerine.LoRA(rank=16)), {"algo": "lora", "dora_wd": True}, {"use_dora": True}),
    "LoKr f8": (nerine.LoKr(factor=8, full_matrix=True), {"algo": "lokr", "factor": 8, "full_matrix": True}, None),
    "DoRA(LoKr f8)": (
        nerine.DoRA(nerine.LoKr(factor=8, full_matrix=True)),
        {"algo": "lokr", "factor": 8, "full_matrix": True, "dora_wd": True},
        None,
    ),
    "LoHa": (nerine.LoHa(rank=16), {"algo": "loha"}, None),
    "Diag-OFT": (nerine.DiagOFT(block_size=32), {"algo": "diag-oft"}, None),
    "BOFT": (nerine.BOFT(block_size=32), {"algo": "boft"}, None),
    "GLoRA": (nerine.GLoRA(rank=16), {"algo": "glora"}, None),
}


def base(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(make()).cuda().to(torch.bfloat16).requires_grad_(False)


def step(model: nn.Module, shape: tuple[int, ...]) -> Step:
    """Forward and backward."""
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.autocast("cuda", torch.bfloat16):
        grad = torch.randn_like(model(x))

    def run() -> None:
        x.grad = None
        for p in trained:
            p.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            y = model(x)
        y.backward(grad)

    return run


def contestants(make: Callable[[], nn.Module], shape: tuple[int, ...], row: str) -> dict[str, Step]:
    algorithm, theirs, peft = ROWS[row]
    found = {"frozen": step(base(make), shape), "frozen again": step(base(make), shape)}
    model = base(make)
    network = nerine.attach(model, algorithm)
    torch.manual_seed(1)
    for p in network.parameters():
        p.data.add_(torch.randn_like(p) * 0.01)
    found["nerine"] = step(model, shape)
    if importlib.util.find_spec("lycoris"):
        for name, bypass in (("LyCORIS", False), ("LyCORIS bypass", True)):
            import lycoris

            if bypass and theirs.get("dora_wd"):
                continue
            model = base(make)
            try:
                other = lycoris.create_lycoris(model, 1.0, 16, 16, bypass_mode=bypass, **theirs)
                other.apply_to()
                other.cuda()
                found[name] = step(_with(model, other), shape)
                found[name]()
            except Exception as error:
                print(f"{row}: {name} fails: {type(error).__name__}: {str(error)[:100]}", flush=True)
                found.pop(name, None)
    if peft is not None and importlib.util.find_spec("peft"):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(base(make), LoraConfig(r=16, target_modules=["0"], **peft))
        found["PEFT"] = step(model, shape)
    return found


class _with(nn.Module):  # noqa: N801
    """A model whose adapters belong to another module."""

    def __init__(self, model: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.model, self.other = model, other

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y


def race(found: dict[str, Step], rounds: int, repeats: int = 20) -> dict[str, float]:
    """The best mean time of each over the rounds, in microseconds."""
    best = dict.fromkeys(found, float("inf"))
    for run in found.values():
        for _ in range(3):
            run()
    for _ in range(rounds):
        for name, run in found.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats):
                run()
            stop.record()
            torch.cuda.synchronize()
            best[name] = min(best[name], start.elapsed_time(stop) * 1000 / repeats)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json")
    given = parser.parse_args()
    about = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "python": platform.python_version()}
    for package in ("lycoris", "peft"):
        if importlib.util.find_spec(package):
            from importlib.metadata import version

            about[package] = version({"lycoris": "lycoris-lora"}.get(package, package))
    print(about, flush=True)
    rows = []
    for layer, (make, shape) in LAYERS.items():
        for row in ROWS:
            times = race(contestants(make, shape, row), given.rounds)
            ratios = {name: time / times["frozen"] for name, time in times.items()}
            rows.append({"layer": layer, "row": row, "frozen us": times["frozen"], **ratios})
            shown = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
            print(f"{layer} | {row} | frozen {times['frozen']:.0f} us | {shown}", flush=True)
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump({"about": about, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
