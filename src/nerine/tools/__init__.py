"""What people do with adapter files: functions from files to files that report and never print.

Each is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nerine.tools.embeddings import embeddings
    from nerine.tools.convert import ConvertReport, convert
    from nerine.tools.merge import MergeReport, merge, unmerge

_HOMES = {
    "convert": ("ConvertReport", "convert"),
    "embeddings": ("embeddings",),
    "merge": ("MergeReport", "merge", "unmerge"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["ConvertReport", "MergeReport", "convert", "embeddings", "merge", "unmerge"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nerine.tools' has no attribute {name!r}")
    value = getattr(import_module(f"nerine.tools.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
