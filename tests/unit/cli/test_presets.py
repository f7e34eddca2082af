"""`nerine presets`: the list, one of them, and what each chooses in a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from nerine.cli.presets import presets
from nerine.errors import NerineError, OptionError
from nerine.files.store import write_file
from nerine.model.presets import PRESETS, preset_of, select
from nerine.model.toml import parse
from target_models import denoiser, language

APP = typer.Typer(pretty_exceptions_enable=False)
APP.command()(presets)


def run(*words: object) -> Result:
    return CliRunner(env={"COLUMNS": "100", "TERM": "dumb"}).invoke(APP, [str(word) for word in words])


def checkpoint(file: Path, name: str) -> Path:
    """A small checkpoint with the layers of a real model; all numbers in it are zero."""
    model = denoiser(name) if name == "Flux" else language(name)
    write_file(file, {n: torch.zeros(t.shape, dtype=torch.float16) for n, t in model.state_dict().items()}, {})
    return file


def test_the_list() -> None:
    done = run()
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(PRESETS)
    assert all(preset_of(name).about in line for name, line in zip(PRESETS, lines[2:], strict=True))
    assert [row["name"] for row in json.loads(run("--json").stdout)["presets"]] == list(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_one_of_them(name: str) -> None:
    done = run(name)
    assert done.exit_code == 0, done.output
    assert parse(done.stdout, name)["about"] == preset_of(name).about


def test_ones_own(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('about = "values"\n[denoiser]\nwhere = ["value"]\nkinds = ["linear"]\n', encoding="utf-8")
    assert run(mine).stdout == mine.read_text(encoding="utf-8")
    file = checkpoint(tmp_path / "flux.safetensors", "Flux")
    report = json.loads(run(mine, "--model", file, "--json").stdout)
    (row,) = report["presets"]
    assert row["layers"] == len(row["paths"]) > 0
    assert all("v" in path.rpartition(".")[2] for path in row["paths"])


@pytest.mark.parametrize("name", ["Flux", "CLIP text"])
def test_what_they_choose_in_a_checkpoint(tmp_path: Path, name: str) -> None:
    file = checkpoint(tmp_path / "model.safetensors", name)
    model = denoiser(name) if name == "Flux" else language(name)
    done = run("--model", file)
    assert done.exit_code == 0, done.output
    counts = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()[2 : 2 + len(PRESETS)]}
    for preset in PRESETS:
        if counts[preset]:
            assert counts[preset] == len(select(model, preset)), preset
        else:
            assert f"{preset}: 0 layers: " in done.stdout
    none = {preset for preset, count in counts.items() if not count}
    assert none == ({"unet-convblock-only"} if name == "Flux" else {p for p in PRESETS if p.startswith("unet")})
    assert ("it takes nothing of text encoders, and this is one" in done.stdout) is (name != "Flux")
    assert f"of {counts['all']} layers in" in done.stdout


def test_their_paths(tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "clip.safetensors", "CLIP text")
    done = run("attn-only", "--model", file, "--layers")
    assert done.exit_code == 0, done.output
    paths = {line.strip() for line in done.stdout.splitlines() if line.startswith("  ")}
    assert paths == set(select(language("CLIP text"), "attn-only"))


def test_what_is_refused(tmp_path: Path) -> None:
    done = run("atn-only")
    assert isinstance(done.exception, OptionError)
    assert "no preset is called 'atn-only'. Did you mean 'attn-only'" in str(done.exception)
    with pytest.raises(OptionError, match="Did you mean 'attn-only'"):
        raise run("atn-only", "--model", tmp_path).exception  # type: ignore[misc]
    assert isinstance(run("--model", tmp_path / "no.safetensors").exception, NerineError)
    assert run("attn-only", "--layers").exit_code == 2
