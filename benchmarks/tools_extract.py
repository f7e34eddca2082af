"""What fitting a LoRA of rank 32 to changes of weights costs: 100 layers of SDXL's shapes, spectra of a power law.

    python benchmarks/tools_extract.py [--layers 100] [--rank 32] [--seconds 75] [--json FILE] [--markdown FILE]

Beside it, in the same process and layer by layer in turn: `torch.linalg.svd(full_matrices=False)`, cut to the rank, and
LyCORIS's own `extract_linear` and `extract_conv`. Both take far longer, so that each gets only the layers that it does
within `--seconds`, spread over the model; LyCORIS's asks for all of both sides, and gets no layer with a side above
5200, which would take minutes and gigabytes. Ratios are over the layers that both of a pair have done.
README.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from files import ADAPTED, unet
from step import header
from torch import Tensor

from nerine import LoRA
from nerine.site import Site

LARGEST = 5200  # a side of a matrix that LyCORIS is still given
FALL = 0.7  # singular value k is k to this power smaller than the first


class Run(NamedTuple):
    """One fit: its seconds, and |D - product|."""

    seconds: float
    error: float


def shapes(count: int) -> list[tuple[int, ...]]:
    """Weights of SDXL's UNet, every so many of them."""
    found = [tuple(m.weight.shape) for m in unet().modules() if isinstance(m, ADAPTED)]
    step = len(found) / count
    return [found[int(i * step)] for i in range(min(count, len(found)))]


def change(shape: tuple[int, ...], seed: int) -> Tensor:
    """A difference of weights as training makes them: few strong directions, and many weak ones."""
    generator = torch.Generator().manual_seed(seed)
    out, inputs = shape[0], torch.Size(shape[1:]).numel()
    rank = min(out, inputs)
    strength = torch.arange(1, rank + 1).float() ** -FALL
    up = torch.randn(out, rank, generator=generator) * strength
    return 1e-3 * (up @ torch.randn(rank, inputs, generator=generator)).reshape(shape)


def timed(fit: Callable[[], Tensor], delta: Tensor) -> Run:
    begin = time.perf_counter()
    product = fit()
    seconds = time.perf_counter() - begin
    return Run(seconds, float(torch.linalg.vector_norm((delta.flatten(1) - product).double())))


def by_nerine(delta: Tensor, rank: int) -> Tensor:
    kind = "linear" if delta.dim() == 2 else "conv"
    site = Site(kind, tuple(delta.shape))
    p = LoRA(rank=rank).fit(site, torch.zeros_like(delta), delta)
    return p.tensors["up"].flatten(1) @ p.tensors["down"].flatten(1)


def by_svd(delta: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(delta.flatten(1), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def by_lycoris(delta: Tensor, rank: int) -> Tensor:
    from lycoris.utils import extract_conv, extract_linear

    extract = extract_linear if delta.dim() == 2 else extract_conv
    (down, up, _), _ = extract(delta, "fixed", rank)
    return up.flatten(1) @ down.flatten(1)


PEERS: dict[str, Callable[[Tensor, int], Tensor]] = {"svd": by_svd, "lycoris": by_lycoris}


def measure(layers: list[tuple[int, ...]], rank: int, seconds: float) -> list[dict[str, Any]]:
    """One row a layer; the layers in an order that jumps through the model, so that a part of them stands for all."""
    left = dict.fromkeys(PEERS, seconds)
    rows = []
    for turn, i in enumerate(sorted(range(len(layers)), key=lambda i: (i * 37) % len(layers))):
        shape = layers[i]
        delta = change(shape, i)
        row: dict[str, Any] = {"shape": list(shape), "nerine": timed(lambda: by_nerine(delta, rank), delta)}  # noqa: B023
        for name, fit in PEERS.items():
            flat = delta.flatten(1)
            too_large = max(flat.shape) > LARGEST or 2 * rank >= len(flat)  # and that is no product in its files
            if left[name] <= 0 or (name == "lycoris" and too_large):
                continue
            row[name] = timed(lambda: fit(delta, rank), delta)  # noqa: B023
            left[name] -= row[name].seconds
        rows.append(row)
        print(f"{turn + 1}/{len(layers)} {shape}", end="\r", flush=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Times over the layers that both have done, their ratio, and how much more than the best is left."""
    found: dict[str, Any] = {"nerine": {"layers": len(rows), "seconds": sum(row["nerine"].seconds for row in rows)}}
    for name in PEERS:
        both = [row for row in rows if name in row]
        if not both:
            continue
        own, ours = (sum(row[key].seconds for row in both) for key in (name, "nerine"))
        found[name] = {
            "layers": len(both),
            "seconds": own,
            "nerine_seconds": ours,
            "ratio": own / ours,
            "excess": max(row["nerine"].error / row[name].error - 1 for row in both),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=100)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=75, help="for each of the peers")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    layers = shapes(options.layers)
    by_nerine(change((64, 48), 0), 8)  # everything is imported before the clock runs
    by_lycoris(change((64, 48), 0), 8)
    rows = measure(layers, options.rank, options.seconds)
    found = summary(rows)
    lines = ["| peer | layers | its s | nerine s | ratio | excess error |", "| --- | --- | --- | --- | --- | --- |"]
    for name in (name for name in PEERS if name in found):
        f = found[name]
        times = f"{f['seconds']:.1f} | {f['nerine_seconds']:.1f} | {f['ratio']:.1f}"
        lines.append(f"| {name} | {f['layers']} | {times} | {f['excess']:.1e} |")
    about = {**header(1), "rank": options.rank, "layers": len(rows)}
    total = found["nerine"]["seconds"]
    text = (
        f"# Rank {options.rank} of {len(rows)} layers of SDXL: {total:.1f} s\n\n{about}\n\n" + "\n".join(lines) + "\n"
    )
    print(text)
    if options.json:
        plain = [{key: v._asdict() if isinstance(v, Run) else v for key, v in row.items()} for row in rows]
        options.json.write_text(json.dumps({"about": about, "found": found, "layers": plain}, indent=2) + "\n")
    if options.markdown:
        options.markdown.write_text(text)


if __name__ == "__main__":
    main()
