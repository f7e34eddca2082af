"""Whether a run may go on from a checkpoint: only as the run that it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nerine.errors import OptionError
from nerine.train.config import parse_config, read_config, settings_of, to_toml
from nerine.train.preparation import Run
from nerine.train.settings import TrainSettings, keys

__all__ = ["check_free", "check_same", "settings_before"]

SETTINGS = "settings.toml"
# What may be another when a run goes on: it does not change the numbers.
FREE = {"output", "samples"}
FREE_KEYS = {
    *("steps", "epochs", "device", "compile", "workers"),
    *("cache_latents", "cache_text", "cache_folder"),
    *("validation", "validate_every", "validation_times"),
}


def settings_before(out: Path) -> dict[str, Any]:
    """{key: value} of the run in that folder.

    Raises:
        OptionError: there is none.
    """
    file = out / SETTINGS
    if not file.is_file():
        raise OptionError(f"--resume: there is no run in {out} ({SETTINGS} is missing); give its folder with --out")
    return read_config(file)


def check_free(out: Path) -> None:
    """Whether a new run may begin in that folder.

    Raises:
        OptionError: there is one already, or something else.
    """
    if out.exists() and not out.is_dir():
        raise OptionError(f"{out}: expected a folder for the run, found a file; choose another --out")
    if (out / SETTINGS).exists():
        raise OptionError(f"{out}: there is a run already; --resume goes on with it, another --out begins a new one")


def check_same(run: Run, state: Mapping[str, Any]) -> None:
    """Whether the settings are those of the run that the state is from, so far as they change its numbers.

    Raises:
        OptionError: they are not; the message says which.
    """
    saved = state["settings"]
    odd = list(_differences(run.settings, saved))
    if run.global_batch != state["global_batch"]:
        odd.append(f"batch_size times processes was {state['global_batch']}, now it is {run.global_batch}")
    if run.steps != state["steps"] and run.settings.optimizer.schedule != "constant":
        odd.append(
            f"{state['steps']} steps were planned, now {run.steps}, and the {run.settings.optimizer.schedule} schedule "
            "depends on them"
        )
    if odd:
        raise OptionError("--resume: this is not the run that the checkpoint is from: " + "; ".join(odd))


def _differences(settings: TrainSettings, saved: str) -> Iterator[str]:
    before, now = (settings_of(parse_config(text, SETTINGS)) for text in (saved, to_toml(settings)))
    for one in keys():
        old, new = (getattr(getattr(s, one.section), one.name) for s in (before, now))
        if one.section not in FREE and one.name not in FREE_KEYS and old != new:
            yield f"{one.name} was {old!r}, now it is {new!r}"
    if before.subsets != now.subsets:
        yield "the [[subset]] sections are others"
