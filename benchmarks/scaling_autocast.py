"""What blocks keep under autocast, and the peak of a step: a small Flux on the simulated CUDA of the tests.

    python benchmarks/scaling_autocast.py     # into results/scaling_autocast.json; or on a GPU, if there is one

Memory is counted by torch's own counters, in sequences of the model's width (one bf16 value for each token and
channel), so that the figures hold for wider models. Attention and RMS norms are stand-ins that keep what CUDA's keep.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import simulated_cuda  # noqa: E402  (imports no torch; it must come after installing)
from devices.table import library  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "scaling_autocast.json"
NAMES = ("LoRA", "LoKr", "IA3", "DoRA(LoRA)", "DoRA(LoKr)")
SMALL = {"heads": 4, "head": 64, "double": 2, "single": 3, "image": 2048, "text": 256, "context": 256}


def model_of(name: str, double: int, single: int, autocast: bool) -> tuple[Any, dict[str, Any], Any]:
    """A model on the device, its input, and the context that it runs in."""
    import torch
    from scaling_counts import Shape, flux, inputs
    from scaling_memory import adapt

    shape = Shape(**SMALL)
    model = flux(shape, double, single, "cpu").to("cuda")
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    adapt(name)(model)
    return model, inputs(shape, model, "cuda"), torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast)


def kept(name: str, double: int, single: int, autocast: bool) -> int:
    from scaling_counts import count_kept

    model, given, context = model_of(name, double, single, autocast)
    with context:
        return count_kept(model, given)


def peak(name: str, autocast: bool, checkpointing: bool) -> tuple[int, int]:
    """Bytes at the end of a forward, and at the highest point of the backward."""
    import torch

    gc.collect()
    model, given, context = model_of(name, SMALL["double"], SMALL["single"], autocast)
    if checkpointing:
        model.enable_gradient_checkpointing()
        model.train()
    gc.collect()
    before = torch.cuda.memory_allocated()
    with context:
        out = model(**given)[0]
    after = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out.float().square().mean().backward()
    return after - before, torch.cuda.max_memory_allocated() - before


def figures(name: str, autocast: bool) -> dict[str, float]:
    """In sequences: what a double and a single block keep, and what a backward takes beside, with checkpointing."""
    one, double, single = (kept(name, *n, autocast) for n in ((1, 1), (2, 1), (1, 2)))
    unit = (SMALL["image"] + SMALL["text"]) * SMALL["heads"] * SMALL["head"] * 2
    inputs_kept, highest = peak(name, autocast, True)
    found = {"double": double - one, "single": single - one, "working": highest - inputs_kept - (double - one)}
    return {key: value / unit for key, value in found.items()}


def main() -> None:
    simulated_cuda.install(library())
    import torch
    from scaling_counts import attention, rms_norm

    composed = torch.nn.functional.rms_norm
    torch.nn.functional.scaled_dot_product_attention = attention  # backward has threads, which know of no mode
    torch.nn.functional.rms_norm = lambda *args, **kwargs: rms_norm(*args, **kwargs, otherwise=composed)
    found = {
        name: {key: figures(name, autocast) for key, autocast in (("bf16", False), ("autocast", True))}
        for name in NAMES
    }
    device = "simulated" if simulated_cuda.is_simulated() else torch.cuda.get_device_name()
    RESULTS.write_text(json.dumps({"device": device, "torch": torch.__version__, "rows": found}, indent=1) + "\n")
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
