"""`nerine explain`: the list, one entry, a pasted error, and the page that is made from the same entries."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest

from commands import run
from nerine.troubles import troubles

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "explain")
    assert done.code == 0
    assert max(map(len, done.out.splitlines())) <= 80
    for key in troubles():
        assert f"\n  {key} " in f"\n{done.out}"
    assert [one["key"] for one in json.loads(run(capsys, "explain", "--json").out)] == list(troubles())


@pytest.mark.parametrize("key", troubles())
def test_one_entry(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "explain", key)
    entry = troubles()[key]
    assert done.code == 0
    assert done.out.startswith(f"{entry.title}\n\n")
    assert f"\n{len(entry.steps)}. " in done.out
    wide = [line for line in done.out.splitlines() if len(line) > 80]
    assert all(len(line.split()) == 1 for line in wide), wide


def test_a_command_to_copy_stands_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert "\n     nerine inspect adapter.safetensors\n" in run(capsys, "explain", "wrong-model").out


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB"], "out-of-memory"),
        (["CUDA", "out", "of", "memory"], "out-of-memory"),
        (["ShapeError"], "shape-mismatch"),
        (["Error: --algo 'lorka' is not known here.\nDid you mean 'lora'?"], "unknown-algorithm"),
    ],
)
def test_an_error_finds_its_entry(words: list[str], key: str, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = json.loads(run(capsys, "explain", *words, "--json").out)
    assert found["key"] == key


def test_stdin(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    log = "step 1\nTraceback (most recent call last):\n  File 'a'\ntorch.OutOfMemoryError: CUDA out of memory.\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(log))
    assert run(capsys, "explain", "-").out.startswith("Out of memory\n")


def test_words_find_several(capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "explain", "merge")
    assert "merged-already" in done.out
    assert "merge-quantised" in done.out


def test_what_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "explain", "wrong-modle")
    assert (done.code, done.out) == (1, "")
    assert "Did you mean 'wrong-model'?" in done.err
    assert run(capsys, "explain", "how to bake bread").code == 1


def test_the_page_is_made_from_the_entries() -> None:
    spec = importlib.util.spec_from_file_location("troubles_page", ROOT / "docs/generate/troubles.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ((path, text),) = module.pages().items()
    assert path == ROOT / "docs/troubleshooting.md"
    assert path.read_text(encoding="utf-8") == text, "run docs/generate/troubles.py"
    for key in troubles():
        assert f"\n## {key}\n" in text
        assert f"(#{key})" in text
