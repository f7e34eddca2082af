"""What people do with adapter files: functions from files to files that report and never print.

Each is imported when it is first asked for.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nerine.tools.bundle import BundleReport, contents, pack, unpack
    from nerine.tools.combine import CombineReport, combine
    from nerine.tools.compare import CompareReport, compare
    from nerine.tools.convert import ConvertReport, convert
    from nerine.tools.embeddings import embeddings
    from nerine.tools.extract import ExtractReport, extract
    from nerine.tools.inspect import InspectReport, inspect
    from nerine.tools.merge import MergeReport, merge, unmerge
    from nerine.tools.metadata import MetadataReport, edit_metadata, show_metadata, strip_metadata
    from nerine.tools.pages import page
    from nerine.tools.resize import ResizeReport, resize
    from nerine.tools.suggest import SuggestReport, suggest
    from nerine.tools.verify import VerifyReport, verify

_HOMES = {
    "bundle": (
        "BundleReport",
        "contents",
        "pack",
        "unpack",
    ),
    "combine": (
        "CombineReport",
        "combine",
    ),
    "compare": (
        "CompareReport",
        "compare",
    ),
    "convert": (
        "ConvertReport",
        "convert",
    ),
    "embeddings": ("embeddings",),
    "extract": (
        "ExtractReport",
        "extract",
    ),
    "inspect": (
        "InspectReport",
        "inspect",
    ),
    "merge": (
        "MergeReport",
        "merge",
        "unmerge",
    ),
    "metadata": (
        "MetadataReport",
        "edit_metadata",
        "show_metadata",
        "strip_metadata",
    ),
    "pages": ("page",),
    "resize": (
        "ResizeReport",
        "resize",
    ),
    "suggest": (
        "SuggestReport",
        "suggest",
    ),
    "verify": (
        "VerifyReport",
        "verify",
    ),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BundleReport",
    "CombineReport",
    "CompareReport",
    "ConvertReport",
    "ExtractReport",
    "InspectReport",
    "MergeReport",
    "MetadataReport",
    "ResizeReport",
    "SuggestReport",
    "VerifyReport",
    "combine",
    "compare",
    "contents",
    "convert",
    "edit_metadata",
    "embeddings",
    "extract",
    "inspect",
    "merge",
    "pack",
    "page",
    "resize",
    "show_metadata",
    "strip_metadata",
    "suggest",
    "unmerge",
    "unpack",
    "verify",
]


if not TYPE_CHECKING:  # a checker would take any misspelt name for one that may come from here

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'nerine.tools' has no attribute {name!r}")
        value = getattr(import_module(f"nerine.tools.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


class _Tools(ModuleType):
    """A tool and the module that it is in share a name: whoever imports that module first leaves the tool here."""

    def __setattr__(self, name: str, value: object) -> None:
        is_home = isinstance(value, ModuleType) and _HOME.get(name) == name
        super().__setattr__(name, getattr(value, name) if is_home else value)


sys.modules[__name__].__class__ = _Tools
