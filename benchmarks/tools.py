"""What merging into a whole checkpoint costs: a LoRA of rank 32 on all layers of a UNet of SDXL's shape, in fp16.

    python benchmarks/tools.py [--rounds 3] [--gigabytes 2] [--json FILE] [--markdown FILE]

The measure is copying the checkpoint (read, write, on the disk). Beside nerine: LyCORIS's own merge, which needs the
model in memory, and with NERINE_SD_SCRIPTS=<checkout> (and NERINE_SD_SCRIPTS_PYTHON=<an interpreter with its
requirements>) the merge of sd-scripts. Every figure comes from a process of its own, which has imported everything
before the clock runs; the jobs take turns. Time includes reading the model from and writing it to the disk. README.md
says what the figures mean; `tools_adapters.py` and `tools_extract.py` have the other tools.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import median

import torch
from files import timed, unet
from step import header
from torch import nn

MEGA = 10**6
RANK, ALPHA = 32, 16
PEERS = ("LyCORIS", "sd-scripts")


LEAD = "model.diffusion_model."


def native() -> dict[str, tuple[int, ...]]:
    """{name: shape} of the tensors of SDXL's UNet, as the original checkpoint has them."""
    from nerine.files.names import aliases

    state = {key: tuple(t.shape) for key, t in unet().to("meta").state_dict().items()}
    weights = {key.removesuffix(".weight"): shape for key, shape in state.items() if key.endswith(".weight")}
    names = {alias.own: alias.name for alias in aliases(weights)["native"]}
    return {f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": shape for key, shape in state.items()}


def write_inputs(base: Path, lora: Path, gigabytes: float) -> dict[str, int]:
    """A checkpoint of at least that size and a LoRA for each of its linear and convolutional layers."""
    from nerine.files.store import Outgoing, write_file

    generator = torch.Generator().manual_seed(0)
    chosen: dict[str, tuple[int, ...]] = {}
    for key, shape in native().items():  # from the first layer on, until it is large enough
        chosen[key] = shape
        if 2 * sum(map(math.prod, chosen.values())) >= gigabytes * 1e9:
            break

    def made(shape: tuple[int, ...]) -> Callable[[], torch.Tensor]:
        return lambda: torch.empty(shape, dtype=torch.float16).uniform_(-0.05, 0.05, generator=generator)

    outgoing = [Outgoing(LEAD + key, shape, torch.float16, made(shape)) for key, shape in chosen.items()]
    written = write_file(base, outgoing, {"format": "pt"})
    tensors = {}
    adapted = {key.removesuffix(".weight"): shape for key, shape in chosen.items() if len(shape) > 1}
    for path, (out, inputs, *kernel) in adapted.items():
        stem = "lora_unet_" + path.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = torch.randn(RANK, inputs, *kernel, generator=generator).half()
        up = torch.randn(out, RANK, *[1] * len(kernel), generator=generator) * 1e-3
        tensors[f"{stem}.lora_up.weight"] = up.half()
        tensors[f"{stem}.alpha"] = torch.tensor(float(ALPHA))
    write_file(lora, tensors, {})
    return {"bytes": written, "layers": len(adapted), "largest": max(map(math.prod, chosen.values())) * 2}


def on_disk(file: Path) -> None:
    with open(file, "rb+") as stream:
        os.fsync(stream.fileno())


def copied(base: Path, lora: Path, out: Path) -> None:
    with open(base, "rb") as source, open(out, "wb") as target:
        while piece := source.read(16 * 2**20):
            target.write(piece)
    on_disk(out)


def merged_by_nerine(base: Path, lora: Path, out: Path) -> None:
    from nerine.tools import merge

    merge(base, [lora], out, force=True)


def merged_by_lycoris(base: Path, lora: Path, out: Path) -> None:
    """The layers of the checkpoint as modules in memory, LyCORIS's `merge`, and the state dict written."""
    import lycoris.utils
    from safetensors.torch import load_file, save_file

    from nerine.model.skeleton import skeleton

    state = {key.removeprefix(LEAD): t for key, t in load_file(base).items()}
    model = skeleton({key: (tuple(t.shape), t.dtype) for key, t in state.items()})
    model.load_state_dict(state, assign=True)
    lycoris.utils.merge([], model, load_file(lora), 1.0, "cpu")
    save_file({LEAD + key: t.contiguous() for key, t in model.state_dict().items()}, out)
    on_disk(out)


def merged_by_sd_scripts(base: Path, lora: Path, out: Path) -> None:
    """sd-scripts' class of the UNet, its `merge_to_sd_model`, and the state dict written."""
    import sdxl_merge_lora
    from library.sdxl_original_unet import SdxlUNet2DConditionModel
    from safetensors.torch import load_file, save_file

    state = {key.removeprefix(LEAD): t for key, t in load_file(base).items()}
    with torch.device("meta"):
        model = SdxlUNet2DConditionModel()
    model.load_state_dict(state, strict=False, assign=True)
    sdxl_merge_lora.merge_to_sd_model(nn.Module(), nn.Module(), model, [str(lora)], [1.0], [], torch.float16)
    found = model.state_dict()
    save_file({LEAD + key: found[key].contiguous() for key in state}, out)
    on_disk(out)


NEEDS = {  # imported before the clock runs
    "nerine": ("nerine.tools.merge",),
    "LyCORIS": ("lycoris.utils", "nerine.model.skeleton"),
    "sd-scripts": ("sdxl_merge_lora", "library.sdxl_original_unet"),
}
JOBS = {
    "copy": copied,
    "nerine": merged_by_nerine,
    "LyCORIS": merged_by_lycoris,
    "sd-scripts": merged_by_sd_scripts,
}


def job(name: str, base: Path, lora: Path, out: Path) -> dict[str, float]:
    """One measurement, in this process."""
    torch.set_num_threads(2)
    if name == "sd-scripts":
        checkout = os.environ["NERINE_SD_SCRIPTS"]
        sys.path[:0] = [checkout, f"{checkout}/networks"]
    for module in NEEDS.get(name, ()):
        import_module(module)
    logging.disable(logging.CRITICAL)
    return timed(lambda: JOBS[name](base, lora, out))


def measure(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """{job: its least and median seconds, and most memory}; the jobs take turns."""
    names = [name for name in JOBS if name != "sd-scripts" or "NERINE_SD_SCRIPTS" in os.environ]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    out = folder / "out.safetensors"
    for _ in range(rounds):
        for name in names:
            os.sync()  # what others have left to be written is not counted here
            python = os.environ.get("NERINE_SD_SCRIPTS_PYTHON", sys.executable) if name == "sd-scripts" else None
            command = [python or sys.executable, __file__, "--job", name, "--folder", str(folder)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            out.unlink()
    return {
        name: {
            "best": min(r["seconds"] for r in runs),
            "median": median(r["seconds"] for r in runs),
            "memory": max(r["memory"] for r in runs),
        }
        for name, runs in found.items()
    }


def goals(found: dict[str, dict[str, float]], largest: float) -> list[tuple[str, float, float]]:
    """What was to be reached: the words, the figure, the limit."""
    own, copy = found["nerine"], found["copy"]
    rows = [
        ("merge, times a copy of the file: at most 2", own["median"] / copy["median"], 2.0),
        ("memory, MB: the largest tensor + 1000", own["memory"], largest + 1000),
    ]
    for peer in [name for name in PEERS if name in found]:
        rows.append((f"time over that of {peer}: at most 1/3", own["median"] / found[peer]["median"], 1 / 3))
        rows.append((f"memory over that of {peer}: at most 1/4", own["memory"] / found[peer]["memory"], 1 / 4))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        base, lora, out = (options.folder / f"{name}.safetensors" for name in ("base", "lora", "out"))
        print(json.dumps(job(options.job, base, lora, out)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = write_inputs(folder / "base.safetensors", folder / "lora.safetensors", options.gigabytes)
        found = measure(folder, options.rounds)
    about = {**header(options.rounds), "gigabytes": round(size["bytes"] / 1e9, 2), "layers": size["layers"]}
    lines = ["| what | best s | median s | / copy | peak MB |", "| --- | --- | --- | --- | --- |"]
    copy = found["copy"]["median"]
    lines += [
        f"| {n} | {r['best']:.1f} | {r['median']:.1f} | {r['median'] / copy:.2f} | {r['memory']:.0f} |"
        for n, r in found.items()
    ]
    lines += ["", "| goal | reached | limit |  |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {words} | {figure:.2f} | {limit:.2f} | {'reached' if figure <= limit else 'missed'} |"
        for words, figure, limit in goals(found, size["largest"] / MEGA)
    ]
    text = (
        f"# Merging a LoRA into a checkpoint of {size['bytes'] / 1e9:.1f} GB\n\n{about}\n\n" + "\n".join(lines) + "\n"
    )
    print(text)
    if options.json:
        options.json.write_text(json.dumps({"about": about, "found": found}, indent=2) + "\n")
    if options.markdown:
        options.markdown.write_text(text)


if __name__ == "__main__":
    main()
