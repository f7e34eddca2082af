"""`nerine suggest`: which algorithm, rank and layers suit a change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from nerine.cli.choices import dialects, formats
from nerine.cli.shared import DEVICE, FORCE, JSON, PICKLE, TARGETS, bar, dtype_of, show, size_of

__all__ = ["suggest"]


def suggest(
    base: Path | None = typer.Argument(None, help="The checkpoint before, or that an adapter is for."),
    tuned: Path | None = typer.Argument(None, help="The checkpoint after."),
    adapter: Path | None = typer.Option(None, "--adapter", help="An adapter file to look at instead of TUNED."),
    size: str | None = typer.Option(None, help="The size that the adapter is to have, as in 20MB."),
    sizes: str | None = typer.Option(None, help="The sizes of the table, as in 1MB,10MB,100MB."),
    algos: str | None = typer.Option(None, help="The algorithms to weigh, as in lora,lokr,loha."),
    left_out: float = typer.Option(0.01, help="Kinds of layers with less of the change than this may be left out."),
    targets: list[str] = TARGETS,
    plot: Path | None = typer.Option(None, "--plot", help="Draw error against size: .svg, or .png with matplotlib."),
    dtype: str = typer.Option(
        "fp16", "--dtype", help="The number format of the file: fp32, fp16 or bf16.", autocompletion=formats
    ),
    dialect: str = typer.Option("kohya", help="The dialect of the file.", autocompletion=dialects),
    component: str | None = typer.Option(None, help="The part of a pipeline that it is, where names do not tell."),
    device: str = DEVICE,
    allow_pickle: bool = PICKLE,
    force: bool = FORCE,
    as_json: bool = JSON,
) -> None:
    """Suggest which algorithm, rank and layers suit a change.

    For the difference of two checkpoints, or for what an adapter file changes. Weighs algorithms at equal bytes, layer
    by layer, and says which blocks and kinds of layers carry the change. The last lines are what to type.

    Examples:
        nerine suggest sdxl.safetensors mine.safetensors --size 20MB --plot sizes.svg
        nerine suggest --adapter style.safetensors --algos lora,lokr,loha
    """
    if (tuned is None) == (adapter is None) or (adapter is None and base is None):
        raise typer.BadParameter("give BASE and TUNED, or --adapter FILE (alone, or after its BASE)")
    from nerine.tools.output import check_output
    from nerine.tools.suggest import suggest as run
    from nerine.tools.suggest import write_plot

    options: dict[str, Any] = {"left_out": left_out, "targets": targets or "all", "dialect": dialect}
    options |= {"size": None if size is None else size_of(size), "dtype": dtype_of(dtype), "component": component}
    if sizes is not None:
        options["sizes"] = [size_of(text) for text in sizes.split(",")]
    if algos is not None:
        options["algos"] = [name.strip() for name in algos.split(",")]
    inputs = [file for file in (base, tuned, adapter) if file is not None]
    picture = None if plot is None else check_output(plot, inputs, force)
    with bar("looking") as progress:
        report = run(base, tuned, adapter, **options, device=device, allow_pickle=allow_pickle, progress=progress)
    if picture is not None:
        write_plot(report, picture)
    show(report, as_json)
