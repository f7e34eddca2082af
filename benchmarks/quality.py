"""Which algorithm learns what: every algorithm at about the same number of trained values, on one small task.

    python benchmarks/quality.py               # the whole study, about forty minutes on two cores
    python benchmarks/quality.py --only LoRA LoKr
    python benchmarks/quality.py --resume      # go on; what is in the results already is kept
    python benchmarks/quality.py --table       # write the table of docs/which-algorithm.md and the README again

The task is the one of `nerine demo`: the embedded model learns the style "neon" from the digits 0 to 4, and is judged
by the digits 5 to 9, which it is never shown in that style. The loss there is at fixed noise and times. Each contestant
chooses its learning rate from the same grid, by the held-out loss of a run of its own (seed 100); a choice at the edge
moves on by one. Then three runs with other seeds are made at that rate. LyCORIS gets the same settings and rate.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import multiprocessing
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nerine
from nerine import BOFT, IA3, DiagOFT, DoRA, DyLoRA, Full, GLoRA, LoHa, LoKr, LoRA, Norm, TLoRA
from nerine.algorithms import Algorithm
from nerine.tiny import Judge, colour_distance, drop_prompts, held_out_loss, load_pipeline, prompt, style_set
from nerine.tiny.data import to_image
from nerine.tiny.losses import TIMESTEPS, flow_error
from nerine.train.drawing import contact_sheet

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
PICTURE = ROOT / "docs" / "images" / "quality.png"
STYLE, STEPS, BATCH, SEEDS, TRIAL_SEED = "neon", 60, 16, (0, 1, 2), 100
RATES = (1e-3, 4e-3, 1.6e-2)
STRIDE = 4.0  # between the rates of the grid, and beyond it
MOVES = 2
SHOWN = (5, 6, 7, 8, 9)
EACH = 5  # pictures that the judge reads of each digit


@dataclass(frozen=True)
class Contestant:
    """One row: `algorithm` in nerine, or `lycoris` with these settings at the rate that `like` has chosen."""

    name: str
    algorithm: Algorithm | None = None
    lycoris: tuple[tuple[str, Any], ...] = ()
    like: str = ""
    budget: bool = True  # whether it has about as many values as the others


CONTESTANTS = (  # about 45,000 values, as near as each comes to that
    Contestant("LoRA", LoRA(rank=2)),
    Contestant("DoRA(LoRA)", DoRA(LoRA(rank=2))),
    Contestant("LoHa", LoHa(rank=1)),
    Contestant("DoRA(LoHa)", DoRA(LoHa(rank=1))),
    Contestant("LoKr", LoKr(rank=4, factor=2)),
    Contestant("DoRA(LoKr)", DoRA(LoKr(rank=4, factor=2))),
    Contestant("DyLoRA", DyLoRA(rank=2)),
    Contestant("T-LoRA", TLoRA(rank=2)),
    Contestant("GLoRA", GLoRA(rank=1)),
    Contestant("Diag-OFT", DiagOFT(block_size=8)),
    Contestant("BOFT", BOFT(block_size=2, stages=3)),
    Contestant("(IA)³", IA3(), budget=False),
    Contestant("Norm", Norm(), budget=False),
    Contestant("Full", Full(), budget=False),
    Contestant("LyCORIS LoKr", lycoris=(("algo", "lokr"), ("factor", 2), ("rank", 4)), like="LoKr"),
    Contestant("LyCORIS DoRA(LoRA)", lycoris=(("algo", "lora"), ("dora_wd", True), ("rank", 2)), like="DoRA(LoRA)"),
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """LyCORIS prints and warns while it is put together."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def adapted(contestant: Contestant, unet: nn.Module, seed: int) -> tuple[list[nn.Parameter], Callable[[Tensor], None]]:
    """What is trained on `unet`, and who is told of the times of each batch."""
    torch.manual_seed(seed)
    if contestant.algorithm is not None:
        targets = "*norm*" if isinstance(contestant.algorithm, Norm) else "all"
        network = nerine.attach(unet, contestant.algorithm, targets=targets)
        return list(network.parameters()), lambda times: network.set_timestep(times * TIMESTEPS)
    with quiet():
        import lycoris

        settings = dict(contestant.lycoris)
        rank = settings.pop("rank")
        sizes = {"linear_dim": rank, "linear_alpha": float(rank), "conv_dim": rank, "conv_alpha": float(rank)}
        unet.requires_grad_(False)
        peer = lycoris.create_lycoris(unet, 1.0, **sizes, **settings)
        peer.apply_to()
        peer.requires_grad_(True).train()
    return [p for p in peer.parameters() if p.requires_grad], lambda times: None


def trained(contestant: Contestant, lr: float, seed: int, steps: int, draws: bool) -> dict[str, Any]:
    """One run: held-out loss, seconds a step, and where `draws` is set, what it draws."""
    torch.set_num_threads(1)
    pipeline, data = load_pipeline(), style_set(STYLE)
    unet = pipeline.unet
    with torch.no_grad():
        states, empty, held = pipeline.encode(data.train.prompts), pipeline.encode([""]), None
        held = pipeline.encode(data.held_out.prompts)
    parameters, tell = adapted(contestant, unet, seed)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    unet.train()
    began = time.monotonic()
    for step in range(steps):
        factor = min((step + 1) / 8, max(0.03, 1 - step / steps))
        optimizer.param_groups[0]["lr"] = lr * factor
        chosen = torch.randint(len(data.train), (BATCH,), generator=generator)
        text = drop_prompts(states[chosen], empty, 0.1, generator)
        pictures = data.train.pictures[chosen]
        noise = torch.randn(pictures.shape, generator=generator)
        times = torch.randn(BATCH, generator=generator).sigmoid()
        tell(times)
        loss = flow_error(unet, text, pictures, noise, times)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    seconds = (time.monotonic() - began) / max(1, steps)
    unet.eval()
    found: dict[str, Any] = {"loss": held_out_loss(unet, held, data.held_out.pictures), "seconds": seconds}
    found["values"] = sum(p.numel() for p in parameters)
    found["loss"] = found["loss"] if math.isfinite(found["loss"]) else None  # too high a rate; no number in JSON either
    return {**found, **(drawn(pipeline) if draws else {})}


def drawn(pipeline: Any) -> dict[str, Any]:
    """What the judge makes of pictures of the digits 5 to 9, and how far their colours are from the style's."""
    digits = torch.tensor([digit for digit in SHOWN for _ in range(EACH)])
    generator = torch.Generator().manual_seed(5)
    pictures = pipeline(
        [prompt(int(d), STYLE) for d in digits], generator=generator, output_type="latent", num_inference_steps=12
    ).images
    return {
        "read": Judge().accuracy(pictures, digits, STYLE),
        "colours": colour_distance(pictures, style_set(STYLE).held_out.pictures),
        "pictures": ((pictures[::EACH] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).tolist(),
    }


def lowest(tried: dict[float, float | None]) -> float:
    """The rate of the lowest loss; those that led to none are the worst."""
    return min(tried, key=lambda rate: math.inf if tried[rate] is None else tried[rate])


def best_rate(contestant: Contestant, steps: int) -> tuple[float, dict[str, float | None]]:
    """The rate of the lowest held-out loss, and all that were tried."""
    tried = {rate: trained(contestant, rate, TRIAL_SEED, steps, False)["loss"] for rate in RATES}
    for _ in range(MOVES):
        best = lowest(tried)
        beyond = best * STRIDE if best == max(tried) else best / STRIDE if best == min(tried) else None
        if beyond is None:
            break
        tried[beyond] = trained(contestant, beyond, TRIAL_SEED, steps, False)["loss"]
    return lowest(tried), {f"{rate:g}": loss for rate, loss in sorted(tried.items())}


def study(contestant: Contestant, lr: float | None, steps: int) -> dict[str, Any]:
    """All runs of one contestant."""
    rate, tried = (lr, {}) if lr is not None else best_rate(contestant, steps)
    runs = [trained(contestant, rate, seed, steps, True) for seed in SEEDS]
    losses = [run["loss"] for run in runs]
    return {
        "name": contestant.name,
        "settings": str(contestant.algorithm) if contestant.algorithm is not None else str(dict(contestant.lycoris)),
        "values": runs[0]["values"],
        "in_budget": contestant.budget,
        "lr": rate,
        "tried": tried,
        "losses": losses,
        "loss": statistics.mean(losses),
        "spread": statistics.stdev(losses),
        "read": statistics.mean(run["read"] for run in runs),
        "colours": statistics.mean(run["colours"] for run in runs),
        "seconds": statistics.median(run["seconds"] for run in runs),
        "pictures": runs[0]["pictures"],
    }


def base_figures() -> dict[str, Any]:
    """The model before any training."""
    pipeline, data = load_pipeline(), style_set(STYLE)
    with torch.no_grad():
        held = pipeline.encode(data.held_out.prompts)
    return {"loss": held_out_loss(pipeline.unet, held, data.held_out.pictures), **drawn(pipeline)}


def run(contestants: Sequence[Contestant], known: dict[str, Any], steps: int, workers: int) -> dict[str, Any]:
    """All of them, LyCORIS last, for it takes over rates; the results are written after each."""
    own = [c for c in contestants if not c.like and c.name not in known["rows"]]
    peers = [c for c in contestants if c.like and c.name not in known["rows"]]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for some in (own, peers):
            jobs = {
                pool.submit(study, c, known["rows"][c.like]["lr"] if c.like else None, steps): c
                for c in some
                if not c.like or c.like in known["rows"]
            }
            for job in as_completed(jobs):
                row = job.result()
                known["rows"][row["name"]] = row
                print(f"{row['name']}: {row['loss']:.4f} at {row['lr']:g}", file=sys.stderr, flush=True)
                write(known)
    return known


def write(found: dict[str, Any]) -> None:
    order = [c.name for c in CONTESTANTS if c.name in found["rows"]]
    RESULTS.write_text(json.dumps({**found, "rows": {name: found["rows"][name] for name in order}}) + "\n")


def picture(found: dict[str, Any]) -> None:
    """The grid: the base, every contestant's first run, and real pictures in the style."""
    data = style_set(STYLE).held_out
    real = torch.stack([data.pictures[(data.digits == digit).nonzero()[0, 0]] for digit in SHOWN])
    from PIL import Image

    drawn = {"base": found["base"], **found["rows"]}
    shown = {name: torch.tensor(row["pictures"]).float() / 127.5 - 1 for name, row in drawn.items()}
    rows = {**shown, "real pictures": real}
    tiles = [[to_image(p).resize((96, 96), Image.Resampling.BICUBIC) for p in some] for some in rows.values()]
    names = [name.replace("³", "3") for name in rows]  # a sign that Pillow's font does not have
    contact_sheet(tiles, names, [prompt(d, STYLE).removeprefix("a handwritten ") for d in SHOWN], PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="names of contestants")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if not options.table:
        fresh = {
            "style": STYLE,
            "steps": options.steps,
            "batch": BATCH,
            "versions": {"torch": torch.__version__, "python": platform.python_version(), "nerine": nerine.__version__},
            "base": base_figures(),
            "rows": {},
        }
        known = json.loads(RESULTS.read_text()) if options.resume and RESULTS.exists() else fresh
        chosen = [c for c in CONTESTANTS if not options.only or c.name in options.only]
        write(run(chosen, known, options.steps, options.workers))
    found = json.loads(RESULTS.read_text())
    picture(found)
    sys.path.insert(0, str(Path(__file__).parent))
    import quality_table

    quality_table.main()


if __name__ == "__main__":
    main()
