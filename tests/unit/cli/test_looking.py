"""The commands that look at adapter files: what they print, what they write, and how they end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from blocky_model import LAYERS, adapter_of, base_of
from nerine import DoRA, LoRA
from nerine.cli.bundle import bundle
from nerine.cli.compare import compare
from nerine.cli.inspect import inspect
from nerine.cli.metadata import metadata
from nerine.errors import NerineError, OptionError

APP = typer.Typer(pretty_exceptions_enable=False)
APP.command()(inspect)
APP.command()(compare)
APP.add_typer(metadata)
APP.add_typer(bundle)


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "80", "TERM": "dumb"}).invoke(APP, [str(one) for one in arguments])


def refused(*arguments: object) -> str:
    """The message of a run that the library refuses (the entry point shows it and exits with 1)."""
    done = run(*arguments)
    assert isinstance(done.exception, NerineError), done.output
    return str(done.exception)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return adapter_of(tmp_path / "a.safetensors", LoRA(rank=4, alpha=2), size=0.1)


@pytest.fixture
def broken(adapter: Path) -> Path:
    tensors = load_file(adapter)
    tensors["lycoris_conv_in.lora_up.weight"].zero_()
    save_file(tensors, adapter.with_name("broken.safetensors"))
    return adapter.with_name("broken.safetensors")


# -- inspect -----------------------------------------------------------------------------------------------------------
def test_inspect(adapter: Path) -> None:
    done = run("inspect", adapter)
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines()[2:])) <= 80
    assert "mid_block.attentions.0" in done.output
    assert "Suspicious layers: none" in done.output
    assert "attn2.to_v" not in done.output
    assert "of weight" not in done.output
    done = run("inspect", adapter, "--layers", "--base", base_of(adapter.parent))
    assert "attn2.to_v" in done.output
    assert "of weight" in done.output
    assert max(map(len, done.output.splitlines()[2:])) <= 80


def test_inspect_as_json(adapter: Path, broken: Path) -> None:
    found = json.loads(run("inspect", adapter, "--json").output)
    assert (found["healthy"], found["layers"]) == (True, len(LAYERS))
    found = json.loads(run("inspect", broken, "--json").output)
    assert [(one["layer"], one["problem"]) for one in found["findings"]] == [("conv_in", "dead")]


def test_inspect_strictly(adapter: Path, broken: Path) -> None:
    assert run("inspect", broken).exit_code == 0
    assert run("inspect", broken, "--strict").exit_code == 3
    assert run("inspect", broken, "--strict", "--json").exit_code == 3
    assert run("inspect", adapter, "--strict").exit_code == 0
    assert "conv_in" in run("inspect", broken).output


def test_inspect_writes_a_page(adapter: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = run("inspect", adapter, "--html", page)
    assert done.exit_code == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "written" in done.output
    assert "--force" in refused("inspect", adapter, "--html", page)
    assert run("inspect", adapter, "--html", page, "--force").exit_code == 0
    assert "this is what is read" in refused("inspect", adapter, "--html", adapter, "--force")
    json.loads(run("inspect", adapter, "--html", page, "--force", "--json").output)


def test_names_from_files_are_no_markup(tmp_path: Path) -> None:
    file = adapter_of(
        tmp_path / "a.safetensors", LoRA(rank=2), metadata={"modelspec.title": "[red]x[/red] [link=http://e]y[/link]"}
    )
    assert "[red]x[/red]" in run("inspect", file).output


# -- compare -----------------------------------------------------------------------------------------------------------
def test_compare(adapter: Path, tmp_path: Path) -> None:
    other = adapter_of(tmp_path / "b.safetensors", LoRA(rank=4, alpha=2), seed=2, size=0.1)
    done = run("compare", adapter, other)
    assert done.exit_code == 0
    assert "Blocks that differ most" in done.output
    assert run("compare", adapter, other, "--tol", "0.5").exit_code == 3
    assert run("compare", adapter, other, "--tol", "2.5").exit_code == 0
    assert run("compare", adapter, adapter, "--tol", "0").exit_code == 0
    found = json.loads(run("compare", adapter, other, "--json").output)
    assert len(found["rows"]) == len(LAYERS)
    assert found["together"]["layers"] == len(LAYERS)


def test_compare_what_cannot_be_compared(tmp_path: Path) -> None:
    a, b = (adapter_of(tmp_path / f"{i}.safetensors", DoRA(LoRA(rank=2)), seed=i) for i in range(2))
    assert run("compare", a, b, "--base", base_of(tmp_path), "--tol", "3").exit_code == 0
    some = adapter_of(tmp_path / "some.safetensors", DoRA(LoRA(rank=2)), seed=0, targets=["*attn1*"])
    assert run("compare", a, some, "--tol", "0.9").exit_code == 3  # layers that are in one alone


# -- metadata ----------------------------------------------------------------------------------------------------------
def test_metadata(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert "where to write" in refused("metadata", "edit", adapter, "--set", "a=b")
    assert "where to write" in refused("metadata", "strip", adapter, "--in-place", "-o", out)
    assert "nothing to do" in refused("metadata", "edit", adapter, "-o", out)
    assert "expected key=value" in refused("metadata", "edit", adapter, "--set", "a", "-o", out)
    done = run("metadata", "edit", adapter, "--set", "a=b=c", "--set", "ss_x=1", "-o", out)
    assert done.exit_code == 0, done.output
    assert json.loads(run("metadata", "show", out, "--json").output)["metadata"]["a"] == "b=c"
    assert run("metadata", "edit", out, "--delete", "ss_*", "--in-place").exit_code == 0
    assert "ss_x" not in run("metadata", "show", out).output
    assert run("metadata", "strip", out, "--in-place").exit_code == 0
    assert "a: b=c" not in run("metadata", "show", out).output
    before = out.read_bytes()
    done = run("metadata", "strip", out, "--all", "--in-place", "--dry-run")
    assert "nothing was written" in done.output
    assert out.read_bytes() == before


# -- bundle ------------------------------------------------------------------------------------------------------------
def test_bundle(adapter: Path, tmp_path: Path) -> None:
    save_file({"emb_params": torch.randn(2, 768)}, tmp_path / "one.safetensors")
    out, parts = tmp_path / "both.safetensors", tmp_path / "parts"
    done = run("bundle", "pack", adapter, "-e", f"my cat={tmp_path / 'one.safetensors'}", "-o", out)
    assert done.exit_code == 0, done.output
    assert "my cat" in run("bundle", "list", out).output
    (one,) = json.loads(run("bundle", "list", out, "--json").output)["embeddings"]
    assert (one["trigger"], one["tokens"], one["width"]) == ("my cat", 2, 768)
    assert run("bundle", "unpack", out, "-o", parts).exit_code == 0
    assert sorted(p.name for p in parts.iterdir()) == ["both.safetensors", "my cat.safetensors"]
    assert "--force" in refused("bundle", "unpack", out, "-o", parts)


def test_the_errors_are_of_the_library(tmp_path: Path) -> None:
    assert "found nothing there" in refused("inspect", tmp_path / "none.safetensors")
    assert issubclass(OptionError, NerineError)


def test_help_does_not_load_torch() -> None:
    code = (
        "import sys\n"
        "from nerine.cli import inspect, compare, metadata, bundle\n"
        "assert not {'torch', 'rich'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
