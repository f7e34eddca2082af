"""`nerine train`: fine-tune a model from a folder of pictures.

The options are made from the settings, so that the command line, the configuration file and the documentation have the
same keys. What is given here goes before what the file says.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer

from nerine.cli.choices import algorithms, devices, dialects, listed, targets
from nerine.cli.shared import JSON, pairs, show
from nerine.cli.terminal import say
from nerine.errors import OptionError
from nerine.train.config import SUBSET, example, read, read_config, settings_of
from nerine.train.settings import Key, keys

__all__ = ["train"]

STOPPED = 130  # as for every program that was interrupted
_PANELS = {
    "base": "The model",
    "adapter": "What is trained",
    "data": "Pictures and captions",
    "objective": "The objective",
    "optimizer": "Optimisation",
    "validation": "Validation",
    "samples": "Pictures on the way",
    "output": "What is written",
}


def _train(
    file: Path | None,
    init: bool,
    resume: bool,
    dry_run: bool,
    layers: bool,
    as_json: bool,
    **options: Any,
) -> None:
    if init:
        _write_example(file)
        return
    given = _given(file, options, resume)
    from nerine.cli.training import watching

    settings = settings_of(given)
    if dry_run:
        from nerine.train.planning import plan_training

        with watching() as watcher:
            plan = plan_training(settings, watcher)
        if layers and not as_json:
            say(f"{plan.by_layer}\n")
        show(plan, as_json)
        return
    from nerine.train.running import train as run

    with watching() as watcher:
        report = run(settings, resume=resume, watcher=watcher)
    if watcher.speaks:
        show(report, as_json)
    if not report.is_finished:
        raise typer.Exit(STOPPED)


def _given(file: Path | None, options: Mapping[str, Any], resume: bool) -> dict[str, Any]:
    """{key: value} of the file, or of the run that goes on, and of the options, which go before."""
    named = {one.name: one for one in keys()}
    spoken = {}
    for name, value in options.items():
        if value is not None and value != [] and value != ():
            one = named[name]
            if "Mapping" in one.kinds:
                value = pairs(value, one.option)
            spoken[name] = read(one, value, one.option)
    found: dict[str, Any] = {}
    if file is not None:
        found = read_config(file)
    elif resume:
        from nerine.train.resuming import settings_before

        found = settings_before(Path(spoken.get("out", named["out"].default)))
    if "data" in spoken:
        found.pop(SUBSET, None)
    return {**found, **spoken}


def _write_example(file: Path | None) -> None:
    """The commented example, into a file that is not there yet, or on stdout."""
    if file is None:
        say(example(), end="")
        return
    if file.exists():
        raise OptionError(f"{file}: there is such a file already; choose another name for the example")
    from nerine.files.atomic import write_text

    write_text(file, example())
    say(f"wrote {file}; then: nerine train {file}", err=True)


def _parameter(one: Key) -> inspect.Parameter:
    """The option of a setting; None, or an empty list, where it is not given."""
    kinds, flag = one.kinds, one.option
    default = _said(one)
    about = one.about + (f" ({', '.join(one.choices)})" if one.choices else "") + (f" [{default}]" if default else "")
    panel = _PANELS[one.section]
    kind: Any
    if "bool" in kinds:
        kind, names = bool | None, f"{flag}/--no-{flag.removeprefix('--')}"
    elif "tuple" in kinds or "Mapping" in kinds:
        kind, names = list[str], flag
    elif kinds & {"int", "float"} and "str" not in kinds:
        kind, names = (float if "float" in kinds else int) | None, flag
    else:
        kind, names = str | None, flag
    empty: Any = [] if kind == list[str] else None
    option = typer.Option(
        empty, names, help=about, rich_help_panel=panel, show_default=False, autocompletion=_completion(one)
    )
    return inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)


def _completion(one: Key) -> Callable[[str], Any] | None:
    """What the shell completes for a setting; None is files."""
    known = {"algo": algorithms, "targets": targets, "dialect": dialects, "device": devices}
    return listed(*one.choices) if one.choices else known.get(one.name)


def _said(one: Key) -> str:
    """The default as the help shows it."""
    if one.default is None or one.default == () or one.default == {} or one.default == "":
        return ""
    if isinstance(one.default, bool):
        return "on" if one.default else "off"
    if isinstance(one.default, tuple):
        return ", ".join(map(str, one.default))
    return f"{one.default:g}" if isinstance(one.default, float) else str(one.default)


_OWN = {
    "file": (Path | None, typer.Argument(None, metavar="[CONFIG]", help="A configuration (TOML); --init writes one.")),
    "init": (bool, typer.Option(False, "--init", help="Write an example with every key explained, and stop.")),
    "resume": (bool, typer.Option(False, "--resume", help="Go on with the run in --out, from its last checkpoint.")),
    "dry_run": (bool, typer.Option(False, "--dry-run", help="Show what would be trained, its memory and its time.")),
    "layers": (bool, typer.Option(False, "--layers", help="With --dry-run: every layer.")),
    "as_json": (bool, JSON),
}


def train(*args: Any, **kwargs: Any) -> None:
    """Fine-tune a diffusion model from a folder of pictures.

    A caption stands beside its picture, under the same name, in a .txt.

    Without a base it is the little model that comes with nerine. The run's folder gets the adapter, its checkpoints,
    pictures on the way, loss.png and report.html. Several processes: accelerate launch -m nerine train config.toml.

    Examples:
        nerine train --data pictures --out run
        nerine train --data pictures --algo lokr --dora --steps 300 --prompt "a seven, neon"
        nerine train config.toml --steps 2000
    """
    _train(*args, **kwargs)


_PARAMETERS = [
    *(
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in _OWN.items()
    ),
    *map(_parameter, keys()),
]
train.__signature__ = inspect.Signature(_PARAMETERS)  # type: ignore[attr-defined]
train.__annotations__ = {one.name: one.annotation for one in _PARAMETERS}
