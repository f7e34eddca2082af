"""Peak device memory of inference and of a training step under engines that offload, as multiples of the weights.

    python benchmarks/low_vram.py            # on a GPU, or on the simulated one of tests/simulated_cuda

Memory is counted by torch's own counters and depends on no clock. Writes benchmarks/results/low_vram.json and the table
in docs/devices.md.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import simulated_cuda  # noqa: E402  (imports no torch; it must come after installing)
from devices.table import library  # noqa: E402

DOCUMENT, RESULTS = ROOT / "docs" / "devices.md", ROOT / "benchmarks" / "results" / "low_vram.json"
START, END = "<!-- memory: written by benchmarks/low_vram.py -->", "<!-- end of memory -->"
WIDTH, LAYERS, TOKENS = 1024, 12, 8
REGIMES = ("resident", "accelerate CPU", "accelerate disk", "diffusers leaf", "diffusers block")


def model_of(torch: Any) -> Any:
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU()) for _ in range(LAYERS)]
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList(layers)

    def forward(x: Any) -> Any:
        for block in model.blocks:
            x = block(x)
        return x

    model.forward = forward
    return model


def place(model: Any, regime: str, device: Any) -> None:
    from accelerate import cpu_offload, disk_offload
    from diffusers.hooks import apply_group_offloading

    if regime == "resident":
        model.to(device)
    elif regime == "accelerate CPU":
        cpu_offload(model, device)
    elif regime == "accelerate disk":
        disk_offload(model, tempfile.mkdtemp(), device)
    else:
        level = f"{regime.split()[1]}_level"
        apply_group_offloading(model, device, offload_type=level, num_blocks_per_group=1)


def peak(algorithm: Any, regime: str, training: bool) -> float:
    """Peak of one call, or of one step of training, over the bytes of the base's weights."""
    import torch

    import nerine

    device = torch.device("cuda", 0)
    gc.collect()  # models with hooks are cycles
    model = model_of(torch)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    place(model, regime, device)
    network = None if algorithm is None else nerine.attach(model, algorithm)
    x = torch.randn(TOKENS, WIDTH, device=device)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    with torch.set_grad_enabled(training and network is not None):
        y = model.forward(x)
        if training and network is not None:
            y.square().mean().backward()
    return torch.cuda.max_memory_allocated(device) / size


def contestants() -> dict[str, Any]:
    import nerine

    plain = {
        "none": None,
        "LoRA 8": nerine.LoRA(rank=8),
        "LoHa 8": nerine.LoHa(rank=8),
        "LoKr f8": nerine.LoKr(rank=8, factor=8),
        "IA3": nerine.IA3(),
        "Diag-OFT 32": nerine.DiagOFT(block_size=32),
        "BOFT 32, 2 stages": nerine.BOFT(block_size=32, stages=2),
        "GLoRA 8": nerine.GLoRA(rank=8),
    }
    dora = {f"DoRA({name})": nerine.DoRA(plain[name]) for name in ("LoRA 8", "LoHa 8", "LoKr f8")}
    return {**plain, **dora}


def main() -> None:
    device = simulated_cuda.install(library())
    import torch

    rows: dict[str, dict[str, list[float]]] = {}
    for name, algorithm in contestants().items():
        rows[name] = {}
        for regime in REGIMES:
            rows[name][regime] = [peak(algorithm, regime, training) for training in (False, True)]
            print(f"{name:18} {regime:16} {rows[name][regime][0]:.2f} {rows[name][regime][1]:.2f}", flush=True)
    simulated = simulated_cuda.is_simulated()
    card = "simulated" if simulated else torch.cuda.get_device_name(device)
    RESULTS.write_text(json.dumps({"device": card, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    lines = [f"| adapter | {' | '.join(REGIMES)} |", f"|---|{'---|' * len(REGIMES)}"]
    for name, found in rows.items():
        cells = [f"{found[r][0]:.2f} / {'-' if name == 'none' else f'{found[r][1]:.2f}'}" for r in REGIMES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    text = DOCUMENT.read_text(encoding="utf-8")
    before, after = text[: text.index(START)], text[text.index(END) :]
    DOCUMENT.write_text(f"{before}{START}\n" + "\n".join(lines) + f"\n{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
