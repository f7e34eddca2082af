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
from nerine.errors import OptionError
from nerine.tiny import load_pipeline
from nerine.train.drawing import AdapterFile, generate, put_on
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
    assert "there is a file of that name; choose another, or say --force" in again.err
    before = files[0].read_bytes()
    files[0].write_bytes(b"")
    forced = run(
        capsys, "generate", "../x", "a handwritten seven", "--seed", 1, "-o", tmp_path / "p", "--force", *SHORT
    )
    assert forced.code == 0, forced.err
    assert files[0].read_bytes() == before


def test_one_picture_may_be_a_file(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is the picture alone, without a name beside it, and says all that it was drawn from."""
    file = tmp_path / "one.png"
    done = run(
        capsys, "generate", "zwölf", "--adapter", f"{adapter}:unet=0.5", "--seed", 3, "-o", file, "--json", *SHORT
    )
    assert done.code == 0, done.err
    found = Image.open(file)
    assert found.size == (16, 16)
    facts: dict[str, str] = dict(found.text)  # type: ignore[attr-defined]
    assert facts.pop("base").startswith("TinyPipeline")
    assert facts == {
        "prompt": "zwölf",
        "seed": "3",
        "strength": "1",
        "steps": "2",
        "guidance": "2.0",
        "negative": "",
        "size": "16x16",
        "adapters": f"{adapter}:unet=0.5",
    }
    assert json.loads(done.out)["pictures"] == [{"file": str(file), "prompt": "zwölf", "seed": 3, "strength": 1.0}]
    assert run(capsys, "generate", "a", "-o", file, *SHORT).code == 1
    assert Image.open(file).text["prompt"] == "zwölf"  # type: ignore[attr-defined]


def test_prompts_that_begin_alike_have_files_of_their_own(tmp_path: Path) -> None:
    base = family_of(load_pipeline())
    prompts = ["a handwritten seven of a colour such as " + colour for colour in ("red", "blue")]
    report = generate(base, [*prompts, "?"], tmp_path / "p", seeds=[1], steps=1)
    names = [Path(file).name for file in report.files]
    stem = "a-handwritten-seven-of-a-colour-such-as"
    assert names == [f"00-{stem}-1-1.png", f"01-{stem}-1-1.png", "02-picture-1-1.png"]
    assert {Image.open(file).text["prompt"] for file in report.files} == {*prompts, "?"}  # type: ignore[attr-defined]


def test_nothing_is_drawn_that_could_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = family_of(load_pipeline())
    monkeypatch.setattr(base, "draw", lambda *given, **options: pytest.fail("it was drawn"))
    (tmp_path / "a-7-1.png").touch()
    (tmp_path / "s.png").touch()
    for out, words in (
        (tmp_path, "there is a file of that name"),
        (tmp_path / "s.png", "there is a file of that name"),
        (tmp_path / "gone" / "s.png", "does not exist; create it first"),
        (tmp_path / "s.jpg", r"written as \.png"),
    ):
        with pytest.raises(OptionError, match=words):
            generate(base, ["b", "a"], out, seeds=[6, 7], steps=1)


def test_strengths_by_part_keep_their_proportion(adapter: Path, tmp_path: Path) -> None:
    """At half the strength, each part has half of its own; and afterwards what it had before."""
    base = family_of(load_pipeline())
    (worn,) = put_on(base, [AdapterFile(str(adapter), {"unet": 0.8, "text_encoder": 0.4})])
    seen: list[set[float]] = []
    draw = base.draw

    def watched(*given: object, **options: object) -> list[object]:
        seen.append({round(one.strength, 6) for *_, one in worn.network.adapters()})
        return draw(*given, **options)  # type: ignore[arg-type]

    base.draw = watched  # type: ignore[method-assign, assignment]
    with pytest.raises(OptionError, match="finite"):
        generate(base, ["a"], tmp_path / "s.png", adapters=[worn], strengths=[0, float("nan")], steps=1)
    assert seen == []
    generate(base, ["a"], tmp_path / "s.png", adapters=[worn], strengths=[0, 0.5, 1], steps=1)
    assert seen == [{0.0}, {0.4, 0.2}, {0.8, 0.4}]
    assert {one.strength for *_, one in worn.network.adapters()} == {0.8, 0.4}


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
    worn = put_on(base, [AdapterFile(str(adapter), 0.5)])
    report = generate(base, ["a handwritten two"], tmp_path / "d", adapters=worn, strengths=[0.0, 1.0], steps=2)
    zero, one = (pixels(Path(file)) for file in report.files)
    assert (zero == numpy.asarray(plain, dtype=int)).all()
    assert numpy.abs(one - zero).max() > 30
    assert {adapter.strength for *_, adapter in worn[0].network.adapters()} == {0.5}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--grid", "strengths=0,1", "-o", "s.png"), "there is no adapter whose strength"),
        (("--grid", "strength=1", "-o", "s.png"), "--grid: expected strengths=0,0.5,1"),
        (("--grid", "seeds=1,x", "-o", "s.png"), "--grid: expected"),
        (("--grid", "seeds=1,2", "-o", "folder"), "--grid makes one sheet"),
        (("--size", "512"), "--size: expected WIDTHxHEIGHT"),
        (("--seed", -1), "seed: expected a whole number from 0"),
        (("--seed", 2**70), "seed: expected a whole number from 0"),
        (("--seed", 5, "--grid", "seeds=1,2", "-o", "s.png"), "leave out --seed"),
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
