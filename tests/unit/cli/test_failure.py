"""How commands end that fail: one paragraph, where more is explained, and the code; never a traceback unasked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from blocky_model import adapter_of
from commands import run
from nerine import LoRA
from nerine.cli.terminal import prepare_streams
from nerine.tools import planning


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "NERINE_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)


def failing(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `nerine presets` fail with an error."""

    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr(planning, "presets_report", fail)


def test_a_refusal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    done = run(capsys, "inspect", tmp_path / "none.safetensors")
    assert (done.code, done.out) == (1, "")
    first, last = done.err.splitlines()
    assert first.startswith(f"Error: {tmp_path}/none.safetensors: expected an adapter file, found nothing there")
    assert last == "More: nerine explain file-not-found"


def test_a_real_adapter_for_another_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", LoRA(rank=2))
    other = tmp_path / "other.safetensors"
    from safetensors.torch import save_file

    save_file({"blocks.0.attn.weight": torch.ones(8, 6), "blocks.1.attn.weight": torch.ones(8, 6)}, other)
    done = run(capsys, "merge", other, file, "-o", tmp_path / "out.safetensors")
    assert done.code == 1
    assert done.err.endswith("More: nerine explain wrong-model\n")


def test_it_is_wrapped_where_a_width_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    err = run(capsys, "inspect", tmp_path / "none.safetensors").err
    assert len(err.splitlines()) > 2
    assert all(len(line) <= 50 or " " not in line for line in err.splitlines())
    assert f"{tmp_path}/none.safetensors:" in err  # in one piece, to be copied


def test_what_is_not_understood(capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "presets", "--modell", "x")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[0].startswith("Error: No such option: --modell")
    assert done.err.splitlines()[1:] == ["Usage: nerine presets [OPTIONS] [NAME]", "More: nerine presets --help"]
    done = run(capsys, "mrege")
    assert done.code == 2
    assert "'merge'" in done.err
    assert run(capsys, "inspect").err.startswith("Error: Missing argument FILE.")


@pytest.mark.parametrize("words", [("--traceback", "presets", "x"), ("presets", "x", "--traceback"), ("presets", "x")])
def test_the_traceback_on_request(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--traceback" not in words:
        monkeypatch.setenv("NERINE_TRACEBACK", "1")
    done = run(capsys, *words)
    assert done.code == 1
    assert done.err.startswith("Traceback (most recent call last):")
    assert done.err.splitlines()[-2].startswith("Error: no preset is called 'x'")
    monkeypatch.setenv("NERINE_TRACEBACK", "0")
    assert "Traceback" not in run(capsys, "presets", "x").err


def test_a_fault_is_said_to_be_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    failing(KeyError("lora_up"), monkeypatch)
    done = run(capsys, "presets")
    assert (done.code, done.out) == (70, "")
    assert done.err.startswith("Error: KeyError: 'lora_up' (nerine/cli/presets.py, line ")
    assert "this is a fault of nerine, not of your files" in done.err
    assert "--traceback" in done.err
    assert done.err.endswith("More: nerine explain fault-of-nerine\n")
    assert "Traceback (most" not in done.err
    assert "Traceback (most" in run(capsys, "presets", "--traceback").err


@pytest.mark.parametrize(
    ("error", "words", "key"),
    [
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"),
            "OutOfMemoryError: CUDA out of memory",
            "out-of-memory",
        ),
        (ModuleNotFoundError("No module named 'diffusers'"), "No module named 'diffusers'", "missing-extra"),
        (OSError(28, "No space left on device", "a.safetensors"), "a.safetensors: No space left", "cannot-write"),
    ],
)
def test_what_is_not_a_fault_of_nerine(
    error: Exception, words: str, key: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(error, monkeypatch)
    done = run(capsys, "presets")
    assert done.code == 1
    assert words in done.err
    assert done.err.endswith(f"More: nerine explain {key}\n")


def test_ctrl_c(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    failing(KeyboardInterrupt(), monkeypatch)
    assert run(capsys, "presets") == (130, "", "interrupted\n")


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_a_reader_that_goes_away() -> None:
    code = "import sys; sys.argv = ['nerine', *sys.argv[1:]]; from nerine.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()  # before a letter is written
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (141, b"")


def test_letters_that_an_encoding_lacks(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    prepare_streams()
    assert "Σσ² × 3 → α ▁█ é".encode("ascii", "nerine") == b"sum sigma^2 x 3 -> alpha .# \\xe9"
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("ascii", "nerine")
