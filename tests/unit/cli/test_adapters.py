"""`nerine convert`, `resize` and `combine`, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from commands import run
from nerine import DoRA, LoHa, LoRA
from nerine.cli import app
from nerine.cli.combine import combine
from nerine.cli.convert import convert
from nerine.cli.resize import resize
from nerine.files.store import open_file
from tool_adapters import adapter_of, assert_close, base_of, moved

Caught = pytest.CaptureFixture[str]
KNOWN = {command.callback for command in app.registered_commands}
for _command in (combine, convert, resize):
    if _command not in KNOWN:
        app.command()(_command)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    base_of(tmp_path)
    adapter_of(tmp_path / "lora.safetensors", LoRA(rank=6, alpha=3.0))
    adapter_of(tmp_path / "loha.safetensors", LoHa(rank=2, alpha=1.0), [nn.Linear], seed=2)
    adapter_of(tmp_path / "dora.safetensors", DoRA(LoRA(rank=2)), [nn.Linear], seed=3)
    return tmp_path


def test_convert(folder: Path, capsys: Caught) -> None:
    words = ("convert", "loha.safetensors", "-o", "out.safetensors", "--to", "lora", "--dialect", "diffusers")
    done = run(capsys, *words)
    assert done.code == 0, done.err
    assert "2 exact; relative error of the change: 0 in all" in done.out
    assert_close(moved((folder / "out.safetensors", 1.0)), moved((folder / "loha.safetensors", 1.0)), 3e-6)
    again = run(capsys, *words)
    assert again.code == 1
    assert "say --force to replace it" in again.err
    assert run(capsys, *words, "--force", "--dry-run").code == 0
    report = json.loads(run(capsys, *words, "--force", "--json").out)
    assert report["written"]["dialect"] == "diffusers"
    assert [row["method"] for row in report["rows"]] == ["exact", "exact"]


def test_convert_with_settings_and_a_format(folder: Path, capsys: Caught) -> None:
    words = ("convert", "lora.safetensors", "-o", "out.safetensors", "--to", "lokr", "--rank", 8)
    done = run(capsys, *words, "--set", "factor=4", "--set", "full_matrix=true", "--dtype", "bf16")
    assert done.code == 0, done.err
    with open_file("out.safetensors") as source:
        assert source.dtype("lycoris_block_ff.lokr_w1") == torch.bfloat16
        assert source.shape("lycoris_block_ff.lokr_w1") == (4, 4)


def test_convert_out_of_a_decomposition(folder: Path, capsys: Caught) -> None:
    words = ("convert", "dora.safetensors", "-o", "out.safetensors", "--to", "lora", "--no-dora", "--tol", 0.01)
    done = run(capsys, *words)
    assert done.code == 1
    assert "give the base with --base" in done.err
    done = run(capsys, *words, "--base", "base.safetensors")
    assert done.code == 0, done.err
    assert "fitted" in done.out


def test_resize(folder: Path, capsys: Caught) -> None:
    done = run(capsys, "resize", "lora.safetensors", "-o", "out.safetensors", "--rank", 4, "--conv-rank", 2)
    assert done.code == 0, done.err
    assert "ranks in all: 24 -> 12" in done.out
    whole = (folder / "lora.safetensors").stat().st_size
    size = str(int(0.7 * whole))
    done = run(capsys, "resize", "lora.safetensors", "-o", "small.safetensors", "--size", size, "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["written"]["bytes"] <= 0.7 * whole
    assert 0 < report["error"] < 1
    assert report["energy"] == pytest.approx(1 - report["error"] ** 2)
    done = run(capsys, "resize", "lora.safetensors", "-o", "x.safetensors", "--method", "sv_ratio", "--param", 3)
    assert done.code == 0, done.err
    done = run(capsys, "resize", "lora.safetensors", "-o", "y.safetensors", "--size", "20 apples")
    assert done.code == 1
    assert "expected bytes such as 20MB" in done.err


def test_combine(folder: Path, capsys: Caught) -> None:
    words = ("combine", "lora.safetensors:block=0.5,to_q=2", "loha.safetensors:-0.3", "-o", "out.safetensors")
    done = run(capsys, *words)
    assert done.code == 0, done.err
    wanted = moved((folder / "lora.safetensors", {"block": 0.5, "to_q": 2.0}), (folder / "loha.safetensors", -0.3))
    assert_close(moved((folder / "out.safetensors", 1.0)), wanted, 3e-6)
    done = run(capsys, *words[:-1], "cut.safetensors", "--method", "svd", "--rank", 3, "--json")
    assert done.code == 0, done.err
    assert max(row["rank"] for row in json.loads(done.out)["rows"]) == 3
    words = ("combine", "lora.safetensors", "dora.safetensors", "-o", "ties.safetensors", "--method", "ties")
    assert run(capsys, *words, "--to", "full").code == 1  # DoRA needs the base
    done = run(capsys, *words, "--to", "full", "--density", 0.4, "--base", "base.safetensors")
    assert done.code == 0, done.err


@pytest.mark.parametrize("command", ["convert", "resize", "combine"])
def test_help_has_an_example(command: str, capsys: Caught) -> None:
    done = run(capsys, command, "--help")
    assert done.code == 0
    assert f"nerine {command} " in done.out
