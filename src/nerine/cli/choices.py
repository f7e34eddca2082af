"""What the shell may complete: the values that options take.

They are read from the names of files and from the text of the source, for completing must not wait for torch: an
algorithm, a dialect or a preset that is added is completed without an edit here. Where nothing is said, the shell
completes files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

__all__ = ["algorithms", "devices", "dialects", "formats", "listed", "presets", "targets", "topics"]

_ROOT = Path(__file__).parent.parent
_NAME = re.compile(r'^    name = "([^"]+)"$', re.MULTILINE)
_FORMATS = ("fp32", "fp16", "bf16")
_DEVICES = ("cpu", "cuda", "cuda:0", "cuda:1", "mps", "xpu")


def algorithms(incomplete: str) -> list[str]:
    """Names of algorithms."""
    return _beginning(incomplete, _named("algorithms"))


def dialects(incomplete: str) -> list[str]:
    """Names of dialects."""
    return _beginning(incomplete, _named("files/dialects"))


def presets(incomplete: str) -> list[str]:
    """Names of presets."""
    return _beginning(incomplete, (file.stem for file in (_ROOT / "model/presets").glob("*.toml")))


def targets(incomplete: str) -> list[str]:
    """Names of presets, and those that leave out."""
    return _beginning(incomplete, (f"{'!' if incomplete.startswith('!') else ''}{name}" for name in presets("")))


def devices(incomplete: str) -> list[str]:
    """Names of devices; not only of those that are here, for that would take torch."""
    return _beginning(incomplete, _DEVICES)


def formats(incomplete: str) -> list[str]:
    """Number formats."""
    return _beginning(incomplete, _FORMATS)


def topics(incomplete: str) -> list[tuple[str, str]]:
    """What `nerine explain` explains, each with its title."""
    from nerine.troubles import troubles

    return [(key, entry.title) for key, entry in troubles().items() if key.startswith(incomplete)]


def listed(*values: str) -> Callable[[str], list[str]]:
    """A completion from these values."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.startswith(incomplete))


@lru_cache(maxsize=8)
def _named(folder: str) -> tuple[str, ...]:
    """The names that the classes in the files of a folder have."""
    texts = (file.read_text(encoding="utf-8") for file in sorted((_ROOT / folder).glob("*.py")))
    return tuple(name for text in texts for name in _NAME.findall(text))
