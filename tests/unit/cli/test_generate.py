"""`nerine generate`: pictures and sheets, with adapters at any strength."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

import nerine
from commands import run
from nerine.tiny import load_pipeline
from nerine.train.drawing import AdapterFile, contact_sheet, generate, put_on
from nerine.train.families import family_of

pytestmark = pytest.mark.no_device_guard
SHORT = ("--steps", 2, "--device", "cpu")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that changes pictures a lot."""
    file = tmp_path_factory.mktemp("adapter") / "a.safetensors"
    network = nerine.attach(load_pipeline(), nerine.LoRA(rank=2), targets="attn-only")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn(p.shape) * 0.3)
    nerine.save(network, file)
    return file


def pixels(file: Path) -> numpy.ndarray:  # type: ignore[type-arg]
    return numpy.asarray(Image.open(file).convert("RGB"), dtype=int)


def test_single_pictures_say_what_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run(
        capsys, "generate", "a handwritten seven", "../x", "--seed", 1, "--seed", 2, "-o", tmp_path / "p", *SHORT
    )
    assert done.code == 0, done.err
    files = sorted((tmp_path / "p").iterdir())
    assert len(files) == 4
    assert all(file.parent == tmp_path / "p" for file in files)
    facts = Image.open(tmp_path / "p" / "a-handwritten-seven-2-1.png").text  # type: ignore[attr-defined]
    assert (facts["prompt"], facts["seed"], facts["steps"]) == ("a handwritten seven", "2", "2")
    again = run(capsys, "generate", "a handwritten seven", "--seed", 1, "-o", tmp_path / "p", *SHORT)
    assert again.code == 1
    assert "there is such a file already" in again.err


def test_strengths_are_columns_and_zero_is_the_base(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(
        capsys, "generate", "a handwritten two", "--adapter", f"{adapter}:0.5", "--grid", "strengths=0,1,2", "--json",
        "-o", tmp_path / "s.png", *SHORT,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert [p["strength"] for p in json.loads(done.out)["pictures"]] == [0.0, 1.0, 2.0]
    base = family_of(load_pipeline())
    plain = base.draw(["a handwritten two"], steps=2)[0]
    networks = put_on(base, [AdapterFile(str(adapter), 0.5)])
    report = generate(base, ["a handwritten two"], tmp_path / "d", networks=networks, strengths=[0.0, 1.0], steps=2)
    zero, one = (pixels(Path(file)) for file in report.files)
    assert (zero == numpy.asarray(plain, dtype=int)).all()
    assert numpy.abs(one - zero).max() > 30
    assert {adapter.strength for *_, adapter in networks[0].adapters()} == {0.5}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--grid", "strengths=0,1", "-o", "s.png"), "there is no adapter whose strength"),
        (("--grid", "strength=1", "-o", "s.png"), "--grid: expected strengths=0,0.5,1"),
        (("--grid", "seeds=1,x", "-o", "s.png"), "--grid: expected"),
        (("--grid", "seeds=1,2", "-o", "folder"), "--grid makes one sheet"),
        (("--size", "512"), "--size: expected WIDTHxHEIGHT"),
        (("--dtype", "int8"), "--dtype: expected auto"),
        (("--negative", "x"), "takes no negative prompt"),
        (("--device", "cuda:7"), "--device cuda:7"),
    ],
)
def test_mistakes_are_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[object, ...],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if words == "--device cuda:7" and torch.cuda.device_count() > 7:
        pytest.skip("there is such a device here")
    done = run(capsys, "generate", "a", "--steps", 1, *options)
    assert done.code == 1, done.out
    assert words in done.err


def test_sheets_show_pictures_of_any_size(tmp_path: Path) -> None:
    rows = [[Image.new("RGB", (16, 16), c) for c in ("red", "blue")], [Image.new("RGB", (900, 600), "green")] * 2]
    file = tmp_path / "s.png"
    contact_sheet(rows, ["a prompt that is so long that it takes more than one line to tell", "b"], ["x", "y"], file)
    found = pixels(file)
    for colour in ((255, 0, 0), (0, 0, 255), (0, 128, 0)):
        assert (found == colour).all(2).sum() >= 96 * 96
