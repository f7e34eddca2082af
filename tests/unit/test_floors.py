"""Imports only go down: every package has a floor, and nothing imports from a floor above its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from source_tree import PACKAGE, Source, sources

FLOORS = {
    "errors": 0,
    "axes": 0,
    "parts": 0,
    "tables": 0,
    "troubles": 0,
    "version": 0,
    "site": 1,
    "ops": 1,
    "algorithms": 2,
    "model": 3,
    "files": 3,
    "api": 4,
    "tools": 4,
    "serving": 4,
    "integrations": 4,
    "kohya": 4,  # thin doors to integrations/, at the root
    "lycoris": 4,
    "testing": 5,
    "cli": 5,
    "__main__": 5,
    "train": 5,
    "tiny": 5,
    "ui": 5,
}
PUBLIC = 4  # a name taken from `nerine` itself comes from up there
STRANGERS = ({"model", "files"},)  # same floor, and yet neither may know the other


def imported(source: Source) -> Iterator[tuple[int, str]]:
    """Line and first name below `nerine` of everything that a file imports from the library."""
    package = source.module if source.path.name == "__init__.py" else source.module[:-1]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple((node.module or "").split(".")) if node.module else ()
            names = [(*base, alias.name) for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "nerine":
                yield node.lineno, name[1] if len(name) > 1 else ""


def violations(source: Source) -> Iterator[str]:
    if source.module == ("nerine",):  # the root joins everything, lazily
        return
    own = source.module[1]
    if own not in FLOORS:
        yield f"{source.where}: '{own}' has no floor yet; give it one in {__file__}"
        return
    for line, other in imported(source):
        at = f"{source.where}:{line}"
        if FLOORS.get(other, PUBLIC) > FLOORS[own]:
            yield f"{at}: '{own}' (floor {FLOORS[own]}) imports '{other or 'nerine'}' from above"
        if any({own, other} == pair for pair in STRANGERS):
            yield f"{at}: '{own}' and '{other}' must not know each other; join them in api.py"


def test_imports_only_go_down() -> None:
    assert [v for source in sources() for v in violations(source)] == []


@pytest.mark.parametrize(
    ("file", "code", "words"),
    [
        (
            "ops/kron.py",
            "from nerine.algorithms.base import Algorithm",
            "'ops' (floor 1) imports 'algorithms'",
        ),
        ("ops/kron.py", "from ..algorithms import base", "'ops' (floor 1) imports 'algorithms'"),
        ("axes.py", "def f():\n    from . import api", "'axes' (floor 0) imports 'api'"),
        ("algorithms/lora.py", "from nerine import LoRA", "'algorithms' (floor 2) imports 'LoRA'"),
        ("algorithms/lora.py", "import nerine", "'algorithms' (floor 2) imports 'nerine'"),
        ("files/__init__.py", "from ..model.layer import f", "must not know each other"),
        ("novelty.py", "", "has no floor yet"),
    ],
)
def test_a_violation_is_found_and_named(file: str, code: str, words: str) -> None:
    (found,) = violations(Source(PACKAGE / file, ast.parse(code)))
    assert words in found


@pytest.mark.parametrize(
    ("file", "code"),
    [
        (
            "algorithms/lora.py",
            "from ..ops.kron import kron\nfrom .base import Algorithm\nfrom nerine import errors",
        ),
        ("ops/triton/kron.py", "from ..kron import kron\nfrom ...errors import ShapeError"),
        ("api.py", "from . import files, model\nimport nerine.model.attach"),
        ("__init__.py", "from .cli import main"),
        ("model/layer.py", "import torch\nfrom files import x"),
    ],
)
def test_what_goes_down_is_let_through(file: str, code: str) -> None:
    assert list(violations(Source(PACKAGE / file, ast.parse(code)))) == []
