"""The generators of the documentation, which are no package: they live beside the pages that they write."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

HOME = Path(__file__).parents[3] / "docs" / "generate"


@pytest.fixture(scope="session")
def generator() -> Iterator[Callable[[str], ModuleType]]:
    """Import one of them by name; all are forgotten in the end, for their names are plain words."""
    sys.path.insert(0, str(HOME))
    yield import_module
    sys.path.remove(str(HOME))
    for file in HOME.glob("*.py"):
        sys.modules.pop(file.stem, None)
