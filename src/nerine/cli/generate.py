"""`nerine generate`: pictures from prompts, with any base and any adapters."""

from __future__ import annotations

import re
from pathlib import Path

import typer

from nerine.cli.choices import devices, formats
from nerine.cli.shared import FORCE, JSON, bar, show, split_strength
from nerine.errors import OptionError

__all__ = ["generate"]


def generate(
    prompts: list[str] = typer.Argument(..., help="What to draw; several may be given."),
    base: str = typer.Option("tiny", "--base", help='A diffusers folder, a checkpoint in one file, or "tiny".'),
    base_config: Path | None = typer.Option(None, "--base-config", help="For a file: the folder of configurations."),
    download: bool = typer.Option(False, "--download", help="For a file: fetch its configurations from the hub."),
    adapters: list[str] = typer.Option(
        [], "--adapter", help="FILE, FILE:0.8 or FILE:unet=0.8,text_encoder=0.4; several may be given."
    ),
    out: Path = typer.Option(Path("pictures"), "--out", "-o", help="A folder, or a .png: several are put on a sheet."),
    seeds: list[int] = typer.Option([], "--seed", help="Of the noise, 0 if left out; several may be given."),
    grid: str | None = typer.Option(None, "--grid", help="strengths=0,0.5,1 or seeds=1,2,3: the columns of a sheet."),
    steps: int = typer.Option(20, min=1, help="Denoising steps."),
    guidance: float | None = typer.Option(None, min=0, help="Guidance scale; the base's own if left out."),
    negative: str = typer.Option("", help="What not to draw."),
    size: str | None = typer.Option(None, help="WIDTHxHEIGHT in pixels; the base's own if left out."),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda, mps, ...", autocompletion=devices),
    dtype: str = typer.Option(
        "auto", "--dtype", help="fp32, fp16 or bf16; auto: bf16 on a GPU.", autocompletion=formats
    ),
    force: bool = FORCE,
    as_json: bool = JSON,
) -> None:
    """Draw pictures from prompts, with any base and any adapters.

    Every prompt is drawn with every seed, as single files or as one sheet. Without a base it is the little model that
    comes with nerine.

    Examples:
        nerine generate "a seven, neon" -o seven.png
        nerine generate "a cat" --base sdxl-folder --adapter style.safetensors:0.8 -o cat.png
        nerine generate "a seven, neon" --adapter style.safetensors --grid strengths=0,0.5,1 -o s.png
    """
    from nerine.train.drawing import AdapterFile, put_on
    from nerine.train.drawing import generate as draw
    from nerine.train.opening import open_base, place
    from nerine.train.settings import BaseSettings

    strengths, grid_seeds = _grid(grid, out, seeds)
    pixels = _size(size)
    if dtype not in ("auto", "fp32", "fp16", "bf16"):
        raise OptionError(f"--dtype: expected auto, fp32, fp16 or bf16, found {dtype!r}")
    opened = open_base(BaseSettings(base=base, config=base_config, download=download, device=device, dtype=dtype))
    place(opened, device)
    worn = put_on(opened, [AdapterFile(*split_strength(text)) for text in adapters])
    with bar("drawing") as progress:
        report = draw(
            opened,
            prompts,
            out,
            adapters=worn,
            strengths=strengths,
            seeds=grid_seeds or seeds or [0],
            force=force,
            progress=progress,
            negative=negative,
            steps=steps,
            guidance=guidance,
            size=pixels,
        )
    show(report, as_json)


def _grid(text: str | None, out: Path, seeds: list[int]) -> tuple[list[float], list[int]]:
    """(strengths, seeds) of "strengths=0,0.5,1" or "seeds=1,2", for a sheet in `out`; `seeds` are given beside it."""
    if text is None:
        return [], []
    if out.suffix.lower() != ".png":
        raise OptionError(f"--grid makes one sheet: give a file, as in --out sheet.png, found {out}")
    what, _, values = text.partition("=")
    try:
        if what == "strengths":
            return [float(value) for value in values.split(",")], []
        if what == "seeds":
            found = [int(value) for value in values.split(",")]
            if seeds:
                raise OptionError("--grid seeds=... says which seeds there are: leave out --seed")
            return [], found
    except ValueError:
        pass
    raise OptionError(f"--grid: expected strengths=0,0.5,1 or seeds=1,2,3, found {text!r}")


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", text.strip().lower())
    if match is None or not int(match[1]) or not int(match[2]):
        raise OptionError(f"--size: expected WIDTHxHEIGHT, as in 768x512, found {text!r}")
    return int(match[1]), int(match[2])
