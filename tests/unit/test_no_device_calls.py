"""Algorithms and ops never choose a device, a dtype's place or a random number: the adapter does."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from source_tree import PACKAGE, Source, dotted, sources

FOLDERS = ("algorithms", "ops")
BANNED_METHODS = {"to", "cpu", "cuda"}

# {"file below src/nerine": {what it may call}}, with the reason beside it.
ALLOWED: dict[str, set[str]] = {"ops/precision.py": {".to("}}  # number formats, in one place


def offences(source: Source) -> Iterator[str]:
    allowed = ALLOWED.get(source.path.relative_to(PACKAGE).as_posix(), set())
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        used = {f".{node.func.attr}("} if isinstance(node.func, ast.Attribute) else set()
        banned = used & {f".{method}(" for method in BANNED_METHODS}
        if name.startswith("torch.rand"):
            banned.add("torch.rand*(")
        if any(keyword.arg == "device" for keyword in node.keywords):
            banned.add("device=")
        for word in sorted(banned - allowed):
            yield f"{source.where}:{node.lineno}: {word}"


def test_no_device_calls() -> None:
    found = [offence for source in sources(*FOLDERS) for offence in offences(source)]
    assert found == [], "make tensors by *_like and new_*, draw from the generator that is handed in"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("x.to(y)", ".to("),
        ("f(x).cpu()", ".cpu("),
        ("x[0].cuda()", ".cuda("),
        ("torch.randn(3)", "torch.rand*("),
        ("torch.rand_like(x)", "torch.rand*("),
        ("x.new_empty(3, device=d)", "device="),
    ],
)
def test_an_offence_is_found_and_named(code: str, words: str) -> None:
    (found,) = offences(Source(PACKAGE / "ops" / "x.py", ast.parse(code)))
    assert found == f"src/nerine/ops/x.py:1: {words}"


def test_every_exception_is_still_needed() -> None:
    for file, words in ALLOWED.items():
        text = (PACKAGE / file).read_text(encoding="utf-8")
        assert all(word.removesuffix("*(") in text for word in words), file
