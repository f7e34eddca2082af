"""The tables of docs/targets.md, worked out from the code: how many layers each preset chooses in which model.

cd tests && PYTHONPATH=. python -m targets_tables    writes them into the document
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path

from torch import nn

from nerine import TargetError
from nerine.model.presets import PRESETS, preset_of, select
from target_models import DENOISERS, LANGUAGE, denoiser, language

DOCUMENT = Path(__file__).parents[1] / "docs" / "targets.md"
NONE = "none there"


def versions() -> str:
    """What the numbers were counted in."""
    return f"diffusers {version('diffusers')}, transformers {version('transformers')}"


@cache
def counts(build: Callable[[str], nn.Module], name: str) -> dict[str, int]:
    """The number of layers that each preset chooses in a model; 0 where it is an error."""
    model, found = build(name), {}
    for preset in PRESETS:
        try:
            found[preset] = len(select(model, preset))
        except TargetError:
            found[preset] = 0
    return found


def table(build: Callable[[str], nn.Module], names: Iterable[str]) -> str:
    head = f"| model | {' | '.join(PRESETS)} |"
    rows = [
        f"| {name} | {' | '.join(str(count or NONE) for count in counts(build, name).values())} |" for name in names
    ]
    return "\n".join([head, "|---" * (len(PRESETS) + 1) + "|", *rows])


def experts_of(model: nn.Module) -> list[str]:
    """The names of parameters that stack the weights of experts, which only a pattern chooses."""
    found = {
        path.replace(".0.", ".*.", 1): None
        for path, parameter in model.named_parameters()
        if parameter.dim() == 3 and "expert" in path
    }
    names = [re.sub(r"\.\d+\.", ".*.", path) for path in found]
    return list(dict.fromkeys(names))


def experts() -> str:
    rows = [(name, experts_of(language(name))) for name in LANGUAGE]
    lines = [f"| {name} | {', '.join(f'`{path}`' for path in paths)} |" for name, paths in rows if paths]
    return "\n".join(["| model | parameters |", "|---|---|", *lines])


def presets() -> str:
    lines = [f"| `{name}` | {preset_of(name).about} |" for name in PRESETS]
    return "\n".join(["| preset | what it chooses |", "|---|---|", *lines])


def written(text: str) -> str:
    """The document with the tables as they are now."""
    made = {
        "presets": presets(),
        "versions": f"Counted in {versions()}.",
        "denoisers": table(denoiser, DENOISERS),
        "language": table(language, LANGUAGE),
        "experts": experts(),
    }
    for mark, new in made.items():
        pattern = rf"(<!-- {mark}: written by tests/targets_tables.py -->\n).*?(<!-- end of {mark} -->)"
        text, count = re.subn(pattern, lambda m, new=new: f"{m[1]}{new}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{DOCUMENT.name} has no place for the table {mark!r}")
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
