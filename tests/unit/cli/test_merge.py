"""`nerine merge`, as a user types it."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import run
from nerine.errors import OptionError
from nerine.files import store
from nerine.tools import merge as merge_module_or_function  # the function, whatever was imported before

Caught = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of two layers and a LoRA for both."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    shapes = {"blocks.0.to_q": (12, 8), "blocks.1.to_q": (6, 8)}
    save_file({f"{path}.weight": torch.randn(shape) for path, shape in shapes.items()}, "base.safetensors")
    lora = {}
    for path, (out, inputs) in shapes.items():
        stem = f"lora_unet_{path.replace('.', '_')}"
        lora[f"{stem}.lora_down.weight"] = torch.randn(2, inputs)
        lora[f"{stem}.lora_up.weight"] = torch.randn(out, 2)
        lora[f"{stem}.alpha"] = torch.tensor(1.0)
    save_file(lora, "style.safetensors")
    return tmp_path


def test_tools_are_functions() -> None:
    assert callable(merge_module_or_function)


def test_merge_and_back(folder: Path, capsys: Caught) -> None:
    done = run(capsys, "merge", "base.safetensors", "style.safetensors:0.5", "-o", "out.safetensors", "--verify", 2)
    assert done.code == 0, done.err
    assert "2 of 2 tensors changed" in done.out
    assert "as promised" in done.out
    base, style, out = (load_file(f"{name}.safetensors") for name in ("base", "style", "out"))
    stem = "lora_unet_blocks_0_to_q"
    want = base["blocks.0.to_q.weight"] + 0.25 * style[f"{stem}.lora_up.weight"] @ style[f"{stem}.lora_down.weight"]
    torch.testing.assert_close(out["blocks.0.to_q.weight"], want)
    back = ("merge", "out.safetensors", "style.safetensors:0.5", "-o", "back.safetensors", "--unmerge")
    done = run(capsys, *back, "--original", "base.safetensors", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["restored"] == 2
    assert all(torch.equal(t, base[key]) for key, t in load_file("back.safetensors").items())


def test_strengths_by_block(folder: Path, capsys: Caught) -> None:
    done = run(capsys, "merge", "base.safetensors", "style.safetensors:blocks=0,blocks.1=2", "-o", "out.safetensors")
    assert done.code == 0, done.err
    base, out = load_file("base.safetensors"), load_file("out.safetensors")
    assert torch.equal(out["blocks.0.to_q.weight"], base["blocks.0.to_q.weight"])
    assert not torch.equal(out["blocks.1.to_q.weight"], base["blocks.1.to_q.weight"])


def test_verify_that_finds_another_number_exits_with_3(
    folder: Path, capsys: Caught, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_bytes", lambda t: (t.detach() * 1.001).numpy().data.cast("B"))
    done = run(capsys, "merge", "base.safetensors", "style.safetensors", "-o", "out.safetensors", "--verify", 2)
    assert done.code == 3
    assert "NOT as promised" in done.out


def test_a_full_disk_is_one_line(folder: Path, capsys: Caught, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(t: torch.Tensor) -> memoryview:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "_bytes", full)
    done = run(capsys, "merge", "base.safetensors", "style.safetensors", "-o", "out.safetensors")
    assert done.code == 1
    assert done.err.splitlines() == [
        "Error: No space left on device; nothing was changed",
        "More: nerine explain cannot-write",
    ]
    assert sorted(p.name for p in folder.iterdir()) == ["base.safetensors", "style.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["base.safetensors", "style.safetensors"], 2, "out"),
        (["nothing.safetensors", "style.safetensors", "-o", "o.safetensors"], 1, "found nothing there"),
        (["base.safetensors", "base.safetensors", "-o", "o.safetensors"], 1, "expected an adapter, found a model"),
        (["base.safetensors", "style.safetensors:much", "-o", "o.safetensors"], 1, "found the strength 'much'"),
        (["base.safetensors", "style.safetensors", "-o", "base.safetensors", "--force"], 1, "this is what is read"),
        (["base.safetensors", "style.safetensors", "-o", "o.safetensors", "--dtype", "fp61"], 1, "fp16"),
        (["base.safetensors", "style.safetensors", "-o", "no/o.safetensors"], 1, "create it first"),
        (["base.safetensors", "style.safetensors", "-o", "o.safetensors", "--original", "b"], 1, "goes with --unmerge"),
        (["base.safetensors", "style.safetensors", "-o", "o.safetensors", "--unmerge", "--verify", "1"], 1, "without"),
    ],
)
def test_what_is_refused(folder: Path, capsys: Caught, arguments: list[str], code: int, words: str) -> None:
    done = run(capsys, "merge", *arguments)
    assert done.code == code
    assert words in done.err
    assert done.out == ""
    assert sorted(p.name for p in folder.iterdir()) == ["base.safetensors", "style.safetensors"]


def test_sizes_and_pairs() -> None:
    from nerine.cli.shared import pairs, size_of, split_strength

    assert [size_of(text) for text in ("20MB", "1.5 GiB", "800000", "2kb")] == [
        20_000_000,
        1_610_612_736,
        800_000,
        2000,
    ]
    assert pairs(["a=b=c", "d="], "--set") == {"a": "b=c", "d": ""}
    assert split_strength("C:\\x.safetensors:0.5") == ("C:\\x.safetensors", 0.5)
    assert split_strength("C:\\x.safetensors") == ("C:\\x.safetensors", 1.0)
    assert split_strength("x:down.[4-9,12]=-1,mid=2") == ("x", {"down.[4-9,12]": -1.0, "mid": 2.0})
    for bad in ("20 elephants", "", "-5MB"):
        with pytest.raises(OptionError, match="--size"):
            size_of(bad)
    with pytest.raises(OptionError, match="key=value"):
        pairs(["novalue"], "--set")
