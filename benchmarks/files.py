"""What reading, attaching and converting an adapter file costs: a LoRA of about 200 MB for a UNet of SDXL's shape.

    python benchmarks/files.py [--megabytes 200] [--rounds 5] [--json FILE] [--markdown FILE]

Every figure is taken in a process of its own, which reports time and its peak of memory above what it held before. The
measure is the `safetensors` library in a process of the same kind: `load_file`, and `load_file` then `save_file`.
README.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from step import header
from torch import nn

MEGA = 10**6
ADAPTED = (nn.Linear, nn.Conv2d)


def unet() -> nn.Module:
    """SDXL's UNet with room for weights that nothing touches, in bf16."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            transformer_layers_per_block=(1, 2, 10),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    return model.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False)


def write_lora(file: Path, megabytes: float) -> int:
    """A LoRA for every layer, fp16, of about that size, as sd-scripts names it; returns the number of layers."""
    from safetensors.torch import save_file

    layers = {path: m.weight.shape for path, m in unet().named_modules() if isinstance(m, ADAPTED)}
    per_rank = sum(shape[0] + shape[1:].numel() for shape in layers.values()) * 2
    rank = max(1, round(megabytes * MEGA / per_rank))
    tensors = {}
    for path, (out, inputs, *kernel) in layers.items():
        stem = "lora_unet_" + path.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = torch.randn(rank, inputs, *kernel).half()
        tensors[f"{stem}.lora_up.weight"] = torch.randn(out, rank, *[1] * len(kernel)).half()
        tensors[f"{stem}.alpha"] = torch.tensor(rank / 2)
    save_file(tensors, file, {"ss_network_dim": str(rank)})
    return len(layers)


def memory(what: str) -> float:
    """A line of /proc/self/status in MB: VmRSS is what the process holds, VmHWM the most since that was set back."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024 / MEGA


def timed(action: Callable[[], Any]) -> dict[str, float]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before, start = memory("VmRSS"), time.perf_counter()
    kept = action()
    seconds, grown = time.perf_counter() - start, memory("VmHWM") - before
    del kept
    return {"seconds": seconds, "memory": grown}


def job(name: str, file: Path, out: Path) -> dict[str, float]:
    """One measurement, in this process."""
    torch.set_num_threads(2)
    from safetensors.torch import load_file, save_file

    import nerine
    from nerine.tools import convert

    if name == "load_file":
        return timed(lambda: {key: t.clone() for key, t in load_file(file).items()})  # its bytes, not a promise of them
    if name == "load_file, save_file":
        return timed(lambda: save_file(load_file(file), out))
    if name == "convert":
        return timed(lambda: convert(file, out, dialect="onetrainer"))
    if name == "convert to diffusers":
        return timed(lambda: convert(file, out, dialect="diffusers"))
    model = unet()
    nerine.attach(nn.Linear(2, 2), nerine.LoRA(rank=1))  # everything is imported before the clock runs
    dtype = torch.float16 if name.endswith("as stored") else None
    return timed(lambda: nerine.load(model, file, dtype=dtype))


JOBS = (
    "load_file",
    "load and attach",
    "load and attach, as stored",
    "load_file, save_file",
    "convert",
    "convert to diffusers",
)


def measure(file: Path, out: Path, rounds: int) -> dict[str, dict[str, float]]:
    """{job: its least and median seconds, and most memory}; the jobs take turns."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in JOBS}
    for _ in range(rounds):
        for name in JOBS:
            command = [sys.executable, __file__, "--job", name, "--file", str(file), "--out", str(out)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        name: {
            "best": min(r["seconds"] for r in runs),
            "median": median(r["seconds"] for r in runs),
            "memory": max(r["memory"] for r in runs),
        }
        for name, runs in found.items()
    }


def goals(found: dict[str, dict[str, float]], size: float) -> list[tuple[str, float, float]]:
    """What was to be reached: the words, the figure, the limit."""
    read, both = found["load_file"]["median"], found["load_file, save_file"]["median"]
    rows = []
    for name in ("load and attach", "load and attach, as stored"):
        rows.append((f"{name}, seconds: 1.5 x load_file + 1", found[name]["median"], 1.5 * read + 1))
        rows.append((f"{name}, MB: the file + 200", found[name]["memory"], size + 200))
    for name in ("convert", "convert to diffusers"):
        rows.append((f"{name}, seconds: 2 x (load_file, save_file)", found[name]["median"], 2 * both))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(job(options.job, options.file, options.out)))
        return
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "lora.safetensors", Path(folder) / "out.safetensors"
        layers = write_lora(file, options.megabytes)
        size = file.stat().st_size / MEGA
        found = measure(file, out, options.rounds)
    about = {**header(options.rounds), "layers": layers, "megabytes": round(size, 1)}
    lines = ["| what | best s | median s | peak MB |", "| --- | --- | --- | --- |"]
    lines += [f"| {n} | {r['best']:.2f} | {r['median']:.2f} | {r['memory']:.0f} |" for n, r in found.items()]
    lines += ["", "| goal | reached | limit |  |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {words} | {figure:.2f} | {limit:.2f} | {'reached' if figure <= limit else 'missed'} |"
        for words, figure, limit in goals(found, size)
    ]
    text = f"# An adapter file of {size:.0f} MB for {layers} layers\n\n{about}\n\n" + "\n".join(lines) + "\n"
    print(text)
    if options.json:
        options.json.write_text(json.dumps({"about": about, "found": found}, indent=2) + "\n")
    if options.markdown:
        options.markdown.write_text(text)


if __name__ == "__main__":
    main()
