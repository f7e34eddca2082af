"""`nerine train`: options are keys, what is given goes before the file, and mistakes are told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import run
from nerine.cli.train import _given
from nerine.tiny import style_set
from nerine.train.config import parse_config
from nerine.train.settings import keys

pytestmark = pytest.mark.no_device_guard
SHORT = ("--rank", 2, "--targets", "attn-only", "--steps", 2, "--batch-size", 2)


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return style_set("neon").write(tmp_path_factory.mktemp("pictures"))


def test_every_key_is_an_option(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    done = run(capsys, "train", "--help")
    assert done.code == 0
    missing = [one.option for one in keys() if one.option not in done.out]
    assert missing == []


def test_no_two_options_are_the_same() -> None:
    options = [one.option for one in keys()]
    assert len(options) == len(set(options))


def test_a_run_and_its_report(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(capsys, "train", "--data", pictures, "--out", "run", *SHORT, "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["is_finished"]
    assert report["adapter"] == ["run/adapter.safetensors"]
    assert "training LoRA(rank=2) on 32 layers of tiny" in done.err
    assert "step 2/2" in done.err
    again = run(capsys, "train", "--data", pictures, "--out", "run", *SHORT)
    assert again.code == 1
    assert "there is a run already; --resume goes on with it" in again.err
    on = run(capsys, "train", "--resume", "--out", "run")
    assert on.code == 0, on.err
    assert "from step 2 on" in on.err


def test_options_go_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[optimizer]\nlr = 1e-3\nsteps = 7\n[data]\ndata = ["p"]\n[[subset]]\nfolder = "x"\n')
    options = {one.name: None for one in keys()}
    found = _given(file, {**options, "lr": 2e-3, "settings": ["factor=8"], "prompts": ["a", "b"]}, False)
    assert (found["lr"], found["steps"]) == (2e-3, 7)
    assert found["settings"] == {"factor": "8"}
    assert found["prompts"] == ("a", "b")
    assert len(found["subset"]) == 1
    assert "subset" not in _given(file, {**options, "data": ["q"]}, False)


def test_the_example_is_written_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.toml"
    assert run(capsys, "train", "--init", file).code == 0
    assert parse_config(file.read_text(), "config") == {}
    again = run(capsys, "train", "--init", file)
    assert again.code == 1
    assert "there is such a file already" in again.err
    printed = run(capsys, "train", "--init")
    assert printed.out == file.read_text()


def test_a_dry_run_writes_no_run(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(capsys, "train", "--data", pictures, *SHORT, "--dry-run", "--layers")
    assert done.code == 0, done.err
    assert "32 layers: 8,192 values" in done.out
    assert "attn1.to_q" in done.out
    assert "s a step (tried)" in done.out
    assert not list(tmp_path.rglob("settings.toml"))
    as_json = json.loads(run(capsys, "train", "--data", pictures, *SHORT, "--dry-run", "--json").out)
    assert as_json["params"] == 8192


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--crop", "middle"), "--crop: there is no 'middle'"),
        (("--batch-size", 0), "--batch-size must be at least 1"),
        (("--set", "factor"), "--set: expected key=value"),
        (("--algo", "lokra"), "no algorithm is called 'lokra'. Did you mean"),
        (("--optimizer", "adamz"), "there is no 'adamz'"),
        (("--base", "nowhere"), "nothing is at nowhere"),
        (("--dialect", "cohya"), "cohya"),
        (("--resume", "--out", "gone"), "there is no run in gone"),
    ],
)
def test_mistakes_are_one_paragraph(
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[object, ...],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(capsys, "train", "--data", pictures, *SHORT, *options)
    assert done.code == 1, done.out
    assert words in done.err
    assert "Traceback" not in done.err
    assert "encoding" not in done.err, "the mistake could have been told before the long work"


def test_no_data_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(capsys, "train")
    assert done.code == 1
    assert "no folder of pictures is given, as in --data pictures" in done.err
