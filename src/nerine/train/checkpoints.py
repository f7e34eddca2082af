"""Checkpoints of a run: everything that the next step depends on, in folders that are there whole or not at all.

    checkpoints/000500/state.pt             the adapters, the optimiser, the averages, in their own number formats
    checkpoints/000500/adapter.safetensors  the adapters once more, for other programs
    checkpoints/000500/checkpoint.json      the step, and how good it was

Random numbers and the order of the pictures are functions of the step and need no place here. The last few are kept,
and the best one. Where processes hold pieces of the tensors, all of them call `save`, and the first writes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nerine.errors import FormatError
from nerine.files.atomic import replacing_folder
from nerine.model.sharded import is_split, whole

__all__ = ["Checkpoint", "Checkpoints", "gathered", "scattered"]

STATE, FACTS = "state.pt", "checkpoint.json"
_NAME = re.compile(r"\d{6,}")


@dataclass(frozen=True)
class Checkpoint:
    """One that is on the disk: after `step` steps, with the loss of the validation there, if there was one."""

    folder: Path
    step: int
    validation: float | None

    def state(self) -> dict[str, Any]:
        """What was saved, on the CPU.

        Raises:
            FormatError: the file is damaged.
        """
        file = self.folder / STATE
        try:
            found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
            raise FormatError(
                f"{file}: the checkpoint cannot be read ({error}); delete {self.folder} to go on from the one before"
            ) from error
        return found


class Checkpoints:
    """Those in `folder`; `keep` is how many of the latest stay."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def all(self) -> list[Checkpoint]:
        """All that are complete, the oldest first."""
        if not self.folder.is_dir():
            return []
        found = [p for p in self.folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()]
        return [_read(folder) for folder in sorted(found, key=lambda folder: int(folder.name))]

    def latest(self) -> Checkpoint | None:
        found = self.all()
        return found[-1] if found else None

    def best(self) -> Checkpoint | None:
        """The one with the lowest loss in validation."""
        tried = [c for c in self.all() if c.validation is not None]
        return min(tried, key=lambda c: (c.validation, -c.step), default=None)

    def save(
        self, step: int, validation: float | None, state: Mapping[str, Any], write: Callable[[Path], object]
    ) -> Checkpoint:
        """Write the state after `step` steps; `write` puts other files into the folder that it is given."""
        self.folder.mkdir(parents=True, exist_ok=True)
        place = self.folder / f"{step:06d}"
        with replacing_folder(place) as folder:
            write(folder)
            with open(folder / STATE, "wb") as out:
                torch.save(dict(state), out)
                out.flush()
                os.fsync(out.fileno())
            with open(folder / FACTS, "w", encoding="utf-8") as facts:
                json.dump({"step": step, "validation": validation}, facts)
                facts.flush()
                os.fsync(facts.fileno())
        self._clear()
        return Checkpoint(place, step, validation)

    def _clear(self) -> None:
        """Remove what is neither among the latest nor the best."""
        found = self.all()
        best = self.best()
        for one in found[: -self.keep]:
            if best is None or one.step != best.step:
                shutil.rmtree(one.folder)


def _read(folder: Path) -> Checkpoint:
    file = folder / FACTS
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        return Checkpoint(folder, int(facts["step"]), facts["validation"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{file}: not a checkpoint of a training run ({error}); delete or move {folder}") from error


def gathered(state: Any) -> Any:
    """The same nest of dicts and lists with every tensor whole and on the CPU; a collective where some are split."""
    if isinstance(state, Tensor):
        return whole(state.detach()).cpu()
    if isinstance(state, Mapping):
        return {key: gathered(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gathered(value) for value in state)
    return state


def scattered(optimizer_state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimiser as `gathered` gave it, with tensors split as the parameters are that they belong to."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(map(is_split, parameters)):
        return optimizer_state
    placed = {
        number: {name: _like(value, parameters[number]) for name, value in own.items()}
        for number, own in optimizer_state["state"].items()
    }
    return {**optimizer_state, "state": placed}


def _like(value: Any, parameter: Any) -> Any:
    from torch.distributed.tensor import distribute_tensor

    if isinstance(value, Tensor) and value.shape == parameter.shape and is_split(parameter):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value
