"""`nerine extract` and `nerine suggest`: their words reach the tools, and wrong usage ends with 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from checkpoint_pairs import low_rank, only, pair
from nerine.cli.extract import extract
from nerine.cli.suggest import suggest
from nerine.errors import NerineError, OptionError

APP = typer.Typer()
APP.command()(extract)
APP.command()(suggest)


def run(*words: Any) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(APP, [str(word) for word in words])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return pair(tmp_path_factory.mktemp("cli"), only(low_rank(rank=3), "attn1", "ff"))


def test_options_reach_the_tool(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    done = run("extract", *files, "-o", out, "--rank", 2, "--dora", "--dtype", "fp16", "--targets", "attn1", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["algorithms"] == {"DoRA(LoRA(rank=2))": report["layers"]}
    assert (report["dtype"], report["size"]) == ("float16", out.stat().st_size)
    assert all("attn1" in row["layer"] for row in report["rows"])
    again = run("extract", *files, "-o", out, "--algo", "lokr", "--set", "factor=4", "--set", "full_matrix=true")
    assert isinstance(again.exception, OptionError)  # the file is there
    again = run(
        "extract", *files, "-o", out, "--algo", "lokr", "--set", "factor=4", "--set", "full_matrix=true", "--force"
    )
    assert again.exit_code == 0, again.output
    assert "LoKr(" in again.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["--energy", 0.8],
        ["--threshold", 0.01],
        ["--ratio", 0.2],
        ["--quantile", 0.5],
        ["--size", "40kB"],
        ["--algo", "auto", "--size", "40kB", "--algos", "lora,full"],
        ["--mode", "fixed", "--param", 2],
        ["--mode", "full"],
        ["--algo", "ia3"],
        ["--rank", 3, "--conv-rank", 1, "--tucker", "--train-norm", "--min-change", 0.001, "--hashes"],
    ],
    ids=str,
)
def test_every_way_to_say_how_large_it_is(files: tuple[Path, Path], tmp_path: Path, words: list[Any]) -> None:
    done = run("extract", *files, "-o", tmp_path / "a.safetensors", *words, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "not written" in done.stdout
    assert not list(tmp_path.iterdir())
    if "40kB" in words:
        size = int(done.stdout.split("(kohya), not written: ")[1].split(" bytes")[0].replace(",", ""))
        assert 30_000 < size <= 40_000


def test_verbose_shows_every_layer(files: tuple[Path, Path], tmp_path: Path) -> None:
    words = ("extract", *files, "-o", tmp_path / "a.safetensors", "--rank", 1, "--dry-run")
    assert len(run(*words, "--verbose").stdout.splitlines()) > len(run(*words).stdout.splitlines())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "say how large the adapter is to be"),
        (["--rank", 2, "--energy", 0.5], "--rank and --energy each say how large"),
        (["--algo", "auto"], "give --size"),
        (["--algo", "auto", "--rank", 2], "give --size instead of --rank"),
        (["--rank", 2, "--param", 2], "--param is the number of a --mode"),
        (["--rank", 0], "--rank"),
    ],
    ids=str,
)
def test_wrong_usage_ends_with_two(files: tuple[Path, Path], tmp_path: Path, words: list[Any], told: str) -> None:
    done = run("extract", *files, "-o", tmp_path / "a.safetensors", *words)
    assert done.exit_code == 2
    assert told in done.output


def test_what_the_library_refuses_is_its_error(files: tuple[Path, Path], tmp_path: Path) -> None:
    for words in (["--algo", "boft", "--rank", 2], ["--rank", 2, "--dtype", "int8"], ["--size", "many"]):
        assert isinstance(run("extract", *files, "-o", tmp_path / "a.safetensors", *words).exception, NerineError)


def test_suggest_says_shows_and_draws(files: tuple[Path, Path], tmp_path: Path) -> None:
    words = ("suggest", *files, "--size", "60kB", "--sizes", "20kB,100kB", "--algos", "lora,lokr")
    done = run(*words, "--plot", tmp_path / "p.svg")
    assert done.exit_code == 0, done.output
    assert f"nerine extract {files[0]} {files[1]} -o adapter.safetensors --algo lora --size 0.06MB" in done.stdout
    assert (tmp_path / "p.svg").read_text().startswith("<svg")
    report = json.loads(run(*words, "--json").stdout)
    assert report["sizes"] == [20_000, 60_000, 100_000]
    assert [curve["name"] for curve in report["curves"]] == ["auto", "lora", "lokr", "lora, one rank"]
    assert isinstance(run(*words, "--plot", tmp_path / "p.svg").exception, OptionError)
    for wrong in ([files[0]], [*files, "--adapter", files[0]], []):
        assert run("suggest", *wrong).exit_code == 2


def test_neither_needs_torch_for_its_help() -> None:
    for name in ("extract", "suggest"):
        done = run(name, "--help")
        assert done.exit_code == 0
        assert "Examples:" in done.output
