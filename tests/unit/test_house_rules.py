"""The house rules that a machine can check."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from source_tree import PACKAGE, Source, dotted, sources

LONGEST_FUNCTION = 60
LONGEST_KERNEL = 120
NAMES_THAT_SAY_NOTHING = {"utils", "util", "common", "misc", "helpers"}


def _is_swallowed(handler: ast.ExceptHandler) -> bool:
    """`except:`, `except Exception:` or `except BaseException:`, with nothing done about it."""
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    is_wide = any(c is None or dotted(c) in {"Exception", "BaseException"} for c in caught)
    is_silent = all(
        isinstance(s, (ast.Pass, ast.Continue)) or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
        for s in handler.body
    )
    return is_wide and is_silent


MAY = {
    "src/nerine/testing/battery.py": "reads pickles",  # of its own making, to see that modules survive it
    "src/nerine/lycoris/utils.py": "a name that says nothing",  # the name that LyCORIS has for it
}


def _unpickles(node: ast.AST) -> bool:
    """Imports pickle or a relative of it, or calls torch.load without the literal `weights_only=True`."""
    unsafe = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] in unsafe for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return not node.level and (node.module or "").split(".")[0] in unsafe
    if isinstance(node, ast.Call) and dotted(node.func) == "torch.load":
        keywords = {k.arg: k.value for k in node.keywords}
        safe = keywords.get("weights_only")
        return not (isinstance(safe, ast.Constant) and safe.value is True)
    return False


def offences(source: Source) -> Iterator[str]:
    if ast.get_docstring(source.tree) is None:
        yield f"{source.where}: opens without a docstring"
    if NAMES_THAT_SAY_NOTHING & set(source.module):
        yield f"{source.where}: a name that says nothing"

    folders = source.module[1:]
    longest = LONGEST_KERNEL if folders[:2] == ("ops", "triton") else LONGEST_FUNCTION
    for node in ast.walk(source.tree):
        at = f"{source.where}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > longest:
                yield f"{at}: '{node.name}' has {lines} lines, more than {longest}"
        elif isinstance(node, ast.ExceptHandler) and _is_swallowed(node):
            yield f"{at}: swallows every exception"
        elif isinstance(node, ast.Global):
            yield f"{at}: global {', '.join(node.names)}"
        elif isinstance(node, ast.Call) and dotted(node.func) == "print" and folders[:1] != ("cli",):
            yield f"{at}: prints outside the cli"
        elif _unpickles(node):
            yield f"{at}: reads pickles"


def test_house_rules() -> None:
    found = [offence for source in sources() for offence in offences(source)]
    assert [o for o in found if o.split(": ")[-1] != MAY.get(o.split(":")[0])] == []


@pytest.mark.parametrize(
    ("file", "code", "words"),
    [
        ("axes.py", "x = 1", "docstring"),
        ("model/utils.py", '"""."""', "says nothing"),
        ("api.py", '"""."""\ndef f():\n' + "    x = 1\n" * 60, "'f' has 61 lines"),
        ("api.py", '"""."""\ntry:\n    f()\nexcept Exception:\n    pass', "swallows"),
        ("api.py", '"""."""\nfor x in y:\n    try:\n        f()\n    except:\n        continue', "swallows"),
        ("api.py", '"""."""\ndef f():\n    global x', "global x"),
        ("api.py", '"""."""\nprint(1)', "prints"),
        ("api.py", '"""."""\nimport pickle', "pickles"),
        ("api.py", '"""."""\ntorch.load(f)', "pickles"),
        ("api.py", '"""."""\ntorch.load(f, weights_only=False)', "pickles"),
    ],
)
def test_an_offence_is_found_and_named(file: str, code: str, words: str) -> None:
    (found,) = offences(Source(PACKAGE / file, ast.parse(code)))
    assert words in found


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("cli/show.py", '"""."""\nprint(1)'),
        ("ops/triton/kron.py", '"""."""\ndef f():\n' + "    x = 1\n" * 60),
        ("api.py", '"""."""\ntry:\n    f()\nexcept KeyError:\n    pass'),
        ("api.py", '"""."""\ntry:\n    f()\nexcept Exception as e:\n    raise FormatError from e'),
        ("api.py", '"""."""\ntorch.load(f, weights_only=True)'),
    ],
)
def test_what_is_allowed_is_let_through(file: str, code: str) -> None:
    assert list(offences(Source(PACKAGE / file, ast.parse(code)))) == []
