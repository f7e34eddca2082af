"""`nerine verify`: what it prints, and that it ends with 3 where something does not hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner, Result

import nerine
from nerine import DoRA, LoRA
from nerine.cli.verify import verify
from nerine.errors import FormatError, OptionError
from nerine.files.dialects import DIALECTS

APP = typer.Typer(pretty_exceptions_enable=False)
APP.command()(verify)


def run(*words: object) -> Result:
    return CliRunner(env={"COLUMNS": "100", "TERM": "dumb"}).invoke(APP, [str(word) for word in words])


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """An adapter and its base."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(8, 12)}) for _ in range(2)])})
    base, adapter = tmp_path / "base.safetensors", tmp_path / "adapter.safetensors"
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, base)
    network = nerine.attach(model, DoRA(LoRA(rank=2, alpha=1)))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    nerine.save(network, adapter, dialect="kohya")
    return adapter, base


def test_a_sound_file(files: tuple[Path, Path]) -> None:
    done = run(files[0], "--base", files[1])
    assert done.exit_code == 0, done.output
    assert done.stdout.rstrip().endswith("train = merge = export = reload: holds")
    for name in DIALECTS:
        assert f"reload: {name}" in done.stdout
    assert "ComfyUI" in done.stdout
    assert "train-merge" not in done.stdout


def test_every_layer(files: tuple[Path, Path]) -> None:
    done = run(files[0], "--base", files[1], "--layers")
    assert done.exit_code == 0, done.output
    assert "train-merge" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()[2:4]] == ["blocks.0.to_q", "blocks.1.to_q"]


def test_as_json(files: tuple[Path, Path]) -> None:
    done = run(
        files[0],
        "--base",
        files[1],
        "--json",
        "--layers",
        "--dialect",
        "peft",
        "--dialect",
        "kohya",
        "--fp64",
        0,
        "--samples",
        3,
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["holds"] is True
    assert [set(row["reloaded"]) for row in report["layers"]] == [{"peft", "kohya"}] * 2
    assert all(row["trained64"] is None for row in report["layers"])


@pytest.mark.parametrize("as_json", [True, False])
def test_a_damaged_file_ends_with_3(files: tuple[Path, Path], as_json: bool) -> None:
    adapter, base = files
    tensors = load_file(adapter)
    tensors["lora_unet_blocks_0_to_q.lora_up.weight"][0, 0] = float("nan")
    save_file(tensors, adapter)
    done = run(adapter, "--base", base, *(["--json"] if as_json else []))
    assert done.exit_code == 3, done.output
    assert json.loads(done.stdout)["holds"] is False if as_json else "DOES NOT HOLD" in done.stdout


def test_a_base_that_lacks_layers_ends_with_3(files: tuple[Path, Path]) -> None:
    adapter, base = files
    save_file({key: t for key, t in load_file(base).items() if ".0." in key}, base)
    done = run(adapter, "--base", base)
    assert done.exit_code == 3, done.output
    assert "4 keys are not used (first lora_unet_blocks_1_to_q.alpha): the base has no such layer" in done.stdout


def test_what_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, base = files
    with pytest.raises(FormatError, match=r"expected a model, found an adapter"):
        raise run(adapter, "--base", adapter).exception  # type: ignore[misc]
    with pytest.raises(FormatError, match="found nothing"):
        raise run(tmp_path / "no.safetensors", "--base", base).exception  # type: ignore[misc]
    with pytest.raises(OptionError, match="Did you mean 'kohya'"):
        raise run(adapter, "--base", base, "--dialect", "kohia").exception  # type: ignore[misc]
    assert run(adapter).exit_code == 2
    assert run(adapter, "--base", base, "--samples", 0).exit_code == 2
