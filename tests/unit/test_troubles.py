"""What is explained: every error that the library raises has its entry, and every entry is of use to somebody."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from nerine import errors
from nerine.errors import FormatError, NerineError, OptionError, ShapeError
from nerine.troubles import Trouble, find, search, troubles
from source_tree import PACKAGE, dotted, sources

KINDS = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, NerineError)}


def template(node: ast.expr) -> str:
    """The text of a message, with x for whatever is known only when it is raised."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) if isinstance(part, ast.Constant) else "x" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return "x"


def raised() -> Iterator[tuple[str, str, str]]:
    """(place, class, template) of every error of ours that the source makes."""
    kinds = dict(KINDS)
    for source in sources():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef) and any(dotted(base) in kinds for base in node.bases):
                kinds.setdefault(node.name, kinds[next(dotted(base) for base in node.bases if dotted(base) in kinds)])
    for source in sources():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and node.args:
                name = dotted(node.func).rpartition(".")[2]
                if name in kinds:
                    yield f"{source.where}:{node.lineno}", kinds[name].__name__, template(node.args[0])


SITES = list(raised())


def is_by_pattern(entry: Trouble, message: str) -> bool:
    return any(pattern.search(" ".join(message.split())) for pattern in entry.patterns)


def test_the_sites_are_found() -> None:
    assert len(SITES) > 500
    assert {kind for _, kind, _ in SITES} >= set(KINDS) - {"NerineError"}


def test_every_error_is_explained() -> None:
    assert [f"{place}: {message}" for place, kind, message in SITES if find(KINDS[kind](message)) is None] == []


def test_few_errors_are_left_to_what_is_said_of_all_values_or_files() -> None:
    """A message that is made elsewhere, or only of what is known at run time, is not counted."""
    left = []
    for place, kind, message in SITES:
        entry = find(KINDS[kind](message))
        assert entry is not None
        is_general = entry.key in ("unreadable-content", "bad-value", "any-error") and not is_by_pattern(entry, message)
        if is_general and message.replace("x", "").strip(" .:"):
            left.append(f"{place} {kind}: {message}")
    assert len(left) <= len(SITES) // 50, "\n".join(left)


def test_every_entry_is_of_use() -> None:
    used = Counter(entry.key for _, kind, message in SITES if (entry := find(KINDS[kind](message))))
    idle = {key for key, entry in troubles().items() if not used[key] and not entry.is_foreign}
    assert idle == set()


def test_every_class_has_an_entry_of_its_own() -> None:
    fallbacks = [entry.fallback for entry in troubles().values() if entry.fallback]
    assert sorted(fallbacks) == sorted(KINDS)
    for name, kind in KINDS.items():
        entry = find(kind("@@@"))
        assert entry is not None
        assert entry.fallback == name


FOREIGN = {  # patterns of messages that torch, the system or the hub write, in entries that are ours as well
    "cannot-write",
    "base-does-not-open",
    "bad-picture",
    "damaged-file",
    "devices-apart",
    "file-not-found",
    "missing-extra",
    "no-device",
    "no-values-yet",
    "not-finite",
    "output-exists",
    "pickle-refused",
    "shape-mismatch",
}


def unmet(patterns: list[tuple[str, str]], texts: set[str]) -> list[tuple[str, str]]:
    """The patterns that are in none of the texts."""
    whole = "\n".join(texts)  # a dot does not go beyond a text
    return [(key, pattern) for key, pattern in patterns if not re.search(pattern, whole, re.IGNORECASE | re.MULTILINE)]


def test_no_pattern_is_idle() -> None:
    """Every pattern of ours meets a message, or a text that becomes part of one."""
    patterns = [
        (entry.key, pattern.pattern)
        for entry in troubles().values()
        if not entry.is_foreign and entry.key not in FOREIGN
        for pattern in entry.patterns
    ]
    idle = unmet(patterns, {" ".join(message.split()) for _, _, message in SITES})
    nodes = (node for source in sources() for node in ast.walk(source.tree))
    parts = (template(node) for node in nodes if isinstance(node, (ast.Constant, ast.JoinedStr)))
    idle = unmet(idle, {" ".join(text.split()) for text in parts if 8 < len(text) < 500})
    assert idle == []


@pytest.mark.parametrize(
    ("error", "key"),
    [
        (FormatError("a.safetensors (12 bytes): not a whole safetensors file (header)"), "damaged-file"),
        (FormatError("a: none of its 4 keys belongs to this model. Is it made for another model?"), "wrong-model"),
        (OptionError("LoKr has no setting 'faktor'. Did you mean 'factor'?"), "unknown-setting"),
        (OptionError("rank: expected a whole number, got 'four'"), "bad-value"),
        (ShapeError("rank: expected a whole number, got 'four'"), "shape-mismatch"),
        (KeyError("weights"), None),
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", "out-of-memory"),
        ("RuntimeError: Expected all tensors to be on the same device, but found at least two", "devices-apart"),
        ("bash: nerine: command not found", "command-not-found"),
        ("lora key not loaded: lycoris_x.hada_w1_a", "other-program"),
        ("how do I cook rice", None),
        ("", None),
    ],
)
def test_messages_find_their_entries(error: Any, key: str | None) -> None:
    found = find(error)
    assert (found and found.key) == key


def test_a_pasted_traceback_is_read_from_its_error_on() -> None:
    """The source lines above it quote messages that are not meant."""
    text = """
      Traceback (most recent call last):
        File "a.py", line 3, in <module>
          raise FormatError(f"{file}: not a whole safetensors file")
        File "b.py", line 9, in f
      nerine.errors.OptionError: no preset is called
      'atn-only'. Did you mean 'attn-only'?
      More: nerine explain output-exists
    """
    found = find(text)
    assert found is not None
    assert found.key == "unknown-preset"


def test_a_message_that_the_terminal_wrapped_is_found() -> None:
    found = find("Error: sdxl.safetensors: there is a file of that name; choose another, or say\n--force to replace it")
    assert found is not None
    assert found.key == "output-exists"


def test_words_find_titles_first() -> None:
    assert search("memory")[0].key == "out-of-memory"
    assert {entry.key for entry in search("--unmerge")} == {"needs-base"}
    assert search("zebra") == []
    assert search("") == []


@pytest.mark.parametrize("key", troubles())
def test_an_entry_is_whole(key: str) -> None:
    entry = troubles()[key]
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", key)
    assert 1 <= len(entry.steps) <= 5
    assert 5 < len(entry.title) <= 70
    assert entry.means.endswith((".", "."))
    assert not entry.page or (PACKAGE.parent.parent / "docs" / entry.page).is_file(), entry.page
    assert set(entry.to_dict()) == {"key", "title", "means", "do", "page", "foreign"}


def test_nothing_is_read_at_import_and_torch_is_not_needed() -> None:
    code = (
        "import sys, nerine.errors; assert 'nerine.troubles' not in sys.modules; import nerine.troubles as t;"
        "assert 'torch' not in sys.modules and not t.troubles.cache_info().currsize"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
