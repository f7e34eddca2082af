"""What `resize` and `combine` cost beside forming every product and decomposing it whole, as other tools do.

    python benchmarks/tools_adapters.py [--rounds 3] [--threads 2] [--json FILE]

Twenty layers: one transformer block of SDXL's UNet with 640 channels and one with 1280, LoRA of rank 64 (and two of
32), fp16. The measure is out × in products and `torch.linalg.svd` of each, file to file, the way in which sd-scripts'
resize_lora and svd_merge_lora work; once with all singular vectors, as they have it, and once with those that there
are values for ("thin").
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from step import header
from torch import Tensor

from nerine.tools import combine, resize

CONTEXT = 2048


def shapes() -> dict[str, tuple[int, int]]:
    """The linear layers of two transformer blocks, `[out, in]`."""
    found = {}
    for stage, width in ((1, 640), (2, 1280)):
        block = f"down_blocks_{stage}_attentions_0_transformer_blocks_0"
        for attention, inputs in (("attn1", width), ("attn2", CONTEXT)):
            for layer in ("to_q", "to_k", "to_v", "to_out_0"):
                own = inputs if layer in ("to_k", "to_v") else width
                found[f"lora_unet_{block}_{attention}_{layer}"] = (width, own)
        found[f"lora_unet_{block}_ff_net_0_proj"] = (8 * width, width)
        found[f"lora_unet_{block}_ff_net_2"] = (width, 4 * width)
    return found


def write_lora(file: Path, rank: int, seed: int) -> None:
    """A LoRA for these layers whose singular values fall off, as those of trained ones do."""
    rng = torch.Generator().manual_seed(seed)
    fall = torch.logspace(0, -2, rank)[:, None]
    tensors = {}
    for stem, (out, inputs) in shapes().items():
        tensors[f"{stem}.lora_down.weight"] = (torch.randn(rank, inputs, generator=rng) * fall).half()
        tensors[f"{stem}.lora_up.weight"] = (torch.randn(out, rank, generator=rng) * 0.02).half()
        tensors[f"{stem}.alpha"] = torch.tensor(rank / 2)
    save_file(tensors, file)


def change(tensors: dict[str, Tensor], stem: str) -> Tensor:
    """What a layer adds, as a matrix."""
    down, up = (tensors[f"{stem}.lora_{half}.weight"].float() for half in ("down", "up"))
    return up @ down * (tensors[f"{stem}.alpha"] / down.shape[0])


def cut_whole(changes: Sequence[tuple[str, Tensor]], rank: int, thin: bool) -> dict[str, Tensor]:
    """The best LoRA of a rank for matrices, by their whole decompositions."""
    found = {}
    for stem, matrix in changes:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=not thin)
        found[f"{stem}.lora_up.weight"] = (u[:, :rank] * s[:rank]).half().contiguous()
        found[f"{stem}.lora_down.weight"] = vh[:rank].half().contiguous()
        found[f"{stem}.alpha"] = torch.tensor(float(rank))
    return found


def whole_resize(file: Path, target: Path, rank: int, thin: bool) -> None:
    """As resize_lora does it."""
    tensors = load_file(file)
    save_file(cut_whole([(stem, change(tensors, stem)) for stem in shapes()], rank, thin), target)


def whole_combine(files: Sequence[tuple[Path, float]], target: Path, rank: int, thin: bool) -> None:
    """As svd_merge_lora does it."""
    loaded = [(load_file(file), strength) for file, strength in files]
    sums = [(stem, torch.stack([s * change(t, stem) for t, s in loaded]).sum(0)) for stem in shapes()]
    save_file(cut_whole(sums, rank, thin), target)


def seconds(action: Callable[[], Any], rounds: int) -> float:
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return median(taken)


def distance(ours: Path, theirs: Path) -> float:
    """|ours - theirs| / |theirs| over all layers."""
    a, b = load_file(ours), load_file(theirs)
    pairs = [(change(a, stem), change(b, stem)) for stem in shapes()]
    off, size = (sum(float(t.square().sum()) for t in ts) for ts in ([x - y for x, y in pairs], [y for _, y in pairs]))
    return (off / size) ** 0.5


def measure(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """{tool: its seconds, those of the others in the same run, the ratios, and how far the results are apart}."""
    write_lora(folder / "64.safetensors", 64, 0)
    files = [(folder / "a.safetensors", 0.7), (folder / "b.safetensors", 0.4)]
    for seed, (file, _) in enumerate(files, 1):
        write_lora(file, 32, seed)
    ours, theirs = folder / "ours.safetensors", folder / "theirs.safetensors"
    jobs: dict[str, tuple[Callable[[], Any], Callable[[bool], Any]]] = {
        "resize 64 -> 32": (
            lambda: resize(folder / "64.safetensors", ours, rank=32, force=True),
            lambda thin: whole_resize(folder / "64.safetensors", theirs, 32, thin),
        ),
        "combine 32 + 32 -> 32": (
            lambda: combine(files, ours, method="svd", rank=32, force=True),
            lambda thin: whole_combine(files, theirs, 32, thin),
        ),
    }
    found = {}
    for name, (own, other) in jobs.items():
        own()  # everything is imported before the clock runs
        row = {"nerine": seconds(own, rounds)}
        row["thin"] = seconds(lambda other=other: other(True), 1)  # type: ignore[misc]
        row["whole"] = seconds(lambda other=other: other(False), 1)  # type: ignore[misc]
        row["nerine"] = median([row["nerine"], seconds(own, rounds)])  # before and after, in the same run
        row |= {"ratio": row["whole"] / row["nerine"], "ratio to thin": row["thin"] / row["nerine"]}
        found[name] = {**row, "apart": distance(ours, theirs)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.rounds)
    about = {**header(options.rounds), "threads": options.threads, "layers": len(shapes())}
    print(about)
    print("| what | nerine s | whole s | ratio | thin s | ratio | apart |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, row in found.items():
        print(
            f"| {name} | {row['nerine']:.2f} | {row['whole']:.1f} | {row['ratio']:.0f} | {row['thin']:.1f} | "
            f"{row['ratio to thin']:.0f} | {row['apart']:.1e} |"
        )
    if options.json:
        options.json.write_text(json.dumps({"about": about, "found": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
