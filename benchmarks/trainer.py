"""What the trainer costs beyond the work itself: its step against a bare loop, with and without cached latents, and its
memory over a thousand steps.

    python benchmarks/trainer.py            # all three, some minutes
    python benchmarks/trainer.py --steps 40 # shorter

The bare loop is written out below: forward, backward and an optimiser step on batches that lie in memory, with the same
model, adapters, batch size and optimiser, and nothing else. Both are timed in turns in one process, a block of steps
each, and compared by their medians.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))
RESULTS = Path(__file__).parent / "results" / "trainer"
BLOCK = 5  # steps timed in one go

import psutil  # noqa: E402

import nerine  # noqa: E402
from nerine.tiny import denoising_loss, load_pipeline, style_set  # noqa: E402
from nerine.train.config import settings_of  # noqa: E402
from nerine.train.loop import Loop  # noqa: E402
from nerine.train.preparation import prepare  # noqa: E402
from nerine.train.watching import Watcher  # noqa: E402


def settings(folder: Path, **more: Any) -> Any:
    """A run on the tiny model."""
    common = {"data": (folder / "pictures",), "algo": "lora", "rank": 4, "batch_size": 8, "steps": 100_000}
    return settings_of({**common, "out": folder / "run", **more})


def bare(batch: int) -> Callable[[], float]:
    """A step of the loop that anyone would write."""
    pipeline = load_pipeline()
    network = nerine.attach(pipeline.unet, nerine.LoRA(rank=4))
    data = style_set("neon").train
    with torch.no_grad():
        states = pipeline.encode(data.prompts)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)

    def step() -> float:
        chosen = torch.randint(len(data), (batch,), generator=generator)
        loss = denoising_loss(pipeline.unet, states[chosen], data.pictures[chosen], generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def whole(folder: Path, **more: Any) -> Callable[[], object]:
    """A step of the trainer as `nerine train` makes it, with everything between steps that is due each time."""
    loop = Loop(prepare(settings(folder, **more), Watcher()), Watcher())
    batches = loop.batches()
    number = iter(range(100_000))

    def step() -> None:
        loop.advance(next(number), batches)

    return step


def timed(steps: dict[str, Callable[[], object]], count: int) -> dict[str, list[float]]:
    """Seconds a step of each, in blocks that take turns."""
    for step in steps.values():
        for _ in range(BLOCK):
            step()
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(max(1, count // BLOCK)):
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(BLOCK):
                step()
            found[name].append((time.perf_counter() - began) / BLOCK)
    return found


def against_a_bare_loop(folder: Path, count: int) -> dict[str, float]:
    found = {}
    for batch in (8, 32):
        times = timed({"bare": bare(batch), "trainer": whole(folder, batch_size=batch)}, count)
        found[f"batch {batch}"] = statistics.median(times["trainer"]) / statistics.median(times["bare"])
        found[f"batch {batch}, best"] = min(times["trainer"]) / min(times["bare"])
    return found


def cached_latents(folder: Path, count: int) -> dict[str, float]:
    """A model whose VAE costs about what its denoiser's step costs: cached latents over none."""
    import diffusers

    from tiny_pipelines import clip, tokenizer, unet

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=clip(),
        tokenizer=tokenizer(),
        unet=unet(),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder / "sd")
    steps = {
        how: whole(folder, base=str(folder / "sd"), resolution=64, batch_size=4, cache_latents=how, out=folder / how)
        for how in ("disk", "memory", "off")
    }
    times = {name: statistics.median(found) for name, found in timed(steps, count).items()}
    return {how: times[how] / times["off"] for how in ("disk", "memory")}


def memory(folder: Path, steps: int) -> dict[str, float]:
    """Resident bytes after a hundred steps and at the end."""
    step, process = whole(folder, out=folder / "memory", batch_size=4), psutil.Process()
    seen = []
    for number in range(steps):
        step()
        if number + 1 in (steps // 10, steps // 2, steps):
            gc.collect()
            seen.append(process.memory_info().rss / 1e6)
    return {"after a tenth, MB": seen[0], "after a half, MB": seen[1], "at the end, MB": seen[2], "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="timed steps of each")
    parser.add_argument("--long", type=int, default=1000, help="steps of the memory test")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        style_set("neon").write(folder / "pictures")
        found: dict[str, Any] = {
            "versions": {"torch": torch.__version__, "python": platform.python_version(), "nerine": nerine.__version__},
            "threads": options.threads,
            "load": os.getloadavg()[0],
        }
        parts: dict[str, Callable[[], dict[str, float]]] = {
            "step over a bare loop": lambda: against_a_bare_loop(folder, options.steps),
            "step with cached latents over one without": lambda: cached_latents(folder, options.steps),
            "memory": lambda: memory(folder, options.long),
        }
        for name, part in parts.items():
            print(f"{name} ...", file=sys.stderr)
            found[name] = part()
            print(json.dumps(found[name]), file=sys.stderr)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
