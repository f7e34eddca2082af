"""Many adapters on one model: each sample of a batch may have another, and none is attached.

Above `api` because a shelf reads files; what it puts on a layer is one function (`Mount.served`), so that neither the
layer nor its algorithm knows that there are several. Names are imported when they are first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nerine.serving.reports import ShelfReport
    from nerine.serving.shelf import Shelf

_HOME = {"Shelf": "shelf", "ShelfReport": "reports"}

__all__ = ["Shelf", "ShelfReport"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nerine.serving' has no attribute {name!r}")
    value = getattr(import_module(f"nerine.serving.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
