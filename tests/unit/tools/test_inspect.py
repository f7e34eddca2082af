"""What an inspection says of a file, against the dense changes, and the layers that it finds wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nerine
from blocky_model import LAYERS, Model, adapter_of, base_of, weights
from nerine import BOFT, IA3, DiagOFT, DoRA, Full, GLoRA, LoHa, LoKr, LoRA, Norm, TLoRA
from nerine.algorithms import Algorithm
from nerine.errors import FormatError
from nerine.tools.inspect import InspectReport, LayerRow, inspect
from nerine.tools.inspect.text import bar, printable, shortened, text_of
from sdxl_adapter import sdxl_shapes, size_of, training_metadata, write_sdxl

KINDS: dict[str, tuple[Algorithm, str]] = {  # with what they lack without the base
    "lora": (LoRA(rank=4, alpha=2), ""),
    "loha": (LoHa(rank=2, alpha=3), ""),
    "lokr": (LoKr(rank=2, alpha=3, factor=4), ""),
    "tlora": (TLoRA(rank=3, alpha=2), ""),
    "full": (Full(), ""),
    "dora": (DoRA(LoRA(rank=4, alpha=2)), "magnitudes"),
    "glora": (GLoRA(rank=3, alpha=2), "beside the weight"),
    "oft": (DiagOFT(block_size=4), "turn"),
    "boft": (BOFT(block_size=4), "turn"),
    "ia3": (IA3(), "turn"),
}
Q = "down_blocks.0.attentions.0.attn1.to_q"


def row_of(report: InspectReport, layer: str = Q) -> LayerRow:
    return next(row for row in report.rows if row.layer == layer)


def problems(report: InspectReport) -> set[tuple[str, str]]:
    return {(finding.layer, finding.problem) for finding in report.findings}


@pytest.mark.parametrize("kind", KINDS)
def test_measures_against_the_base(kind: str, tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", KINDS[kind][0])
    report = inspect(file, base=base_of(tmp_path))
    assert {row.layer for row in report.rows} == set(LAYERS)
    model = Model()
    for path, change in weights(file).items():
        row, flat = row_of(report, path), change.flatten(1)
        values = torch.linalg.svdvals(flat.double())
        shares = values.square() / values.square().sum()
        # merging in fp32 rounds W + change, some 6e-8 of |W|; the changes are above a hundredth of it
        norm = float(flat.norm())
        assert row.norm == pytest.approx(norm, rel=1e-4)
        assert row.spectral == pytest.approx(float(values[0]), rel=1e-4)
        assert row.relative == pytest.approx(norm / float(model.get_submodule(path).weight.detach().norm()), rel=1e-4)
        assert row.stable_rank == pytest.approx(float(values.square().sum() / values[0] ** 2), rel=1e-3)
        entropy = -float(torch.special.xlogy(shares, shares).sum())
        assert row.effective_rank == pytest.approx(math.exp(entropy), rel=1e-3)
        assert row.lacking == ""


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_base(kind: str, tmp_path: Path) -> None:
    algorithm, lacking = KINDS[kind]
    file = adapter_of(tmp_path / "a.safetensors", algorithm)
    report = inspect(file)
    row = row_of(report)
    assert row.relative is None
    assert row.norm is not None
    assert row.norm > 0
    assert lacking in row.lacking
    assert bool(row.lacking) == bool(lacking)
    assert any("in part" in note for note in report.notes) == bool(lacking)
    if not lacking:
        assert row.norm == pytest.approx(float(weights(file)[Q].norm()), rel=1e-4)


def test_what_the_file_is(tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", DoRA(LoKr(rank=2, alpha=3, factor=4), axis="in"), dtype=torch.float16)
    report = inspect(file)
    assert (report.container, report.dialect, report.bytes) == ("safetensors", "lycoris", file.stat().st_size)
    assert report.algorithms == {"DoRA(LoKr)": len(LAYERS)}
    assert report.axes == {"in": len(LAYERS)}
    ranked = len(LAYERS) - 1  # both factors of conv_in are whole
    assert report.ranks == {2: ranked}
    assert report.alphas == {3.0: ranked}
    assert report.settings == ("DoRA(LoKr(rank=2, alpha=3, factor=4), axis='in')",)
    assert report.written_by.startswith(f"nerine {nerine.__version__}")
    assert row_of(report).dtype == "float32, float16"  # magnitudes stay as they were trained
    network = nerine.load(Model(), file)
    assert report.parameters == sum(p.numel() for p in network.parameters())
    assert [block.name for block in report.blocks] == [
        "conv_in",
        "down_blocks.0.attentions.0",
        "down_blocks.0.attentions.1",
        "mid_block.attentions.0",
        "up_blocks.0.attentions.0",
    ]
    assert [block.layers for block in report.blocks] == [1, 8, 8, 8, 8]


def test_a_folder_and_a_pickle(tmp_path: Path) -> None:
    adapter_of(tmp_path / "folder", LoRA(rank=4, alpha=2), dialect="peft")
    report = inspect(tmp_path / "folder")
    assert (report.container, report.dialect) == ("folder, safetensors", "peft")
    assert report.bytes == sum(file.stat().st_size for file in (tmp_path / "folder").iterdir())
    assert report.training.groups["PEFT folder"]["lora_alpha"] == "4"  # PEFT's alpha is folded into the factors
    adapter_of(tmp_path / "a.safetensors", LoRA(rank=4, alpha=2))
    torch.save(load_file(tmp_path / "a.safetensors"), tmp_path / "a.pt")
    with pytest.raises(FormatError, match="pickle"):
        inspect(tmp_path / "a.pt")
    assert inspect(tmp_path / "a.pt", allow_pickle=True).container == "pickle"


def test_layers_of_all_kinds_together(tmp_path: Path) -> None:
    network = nerine.attach(Model(), LoRA(rank=2, alpha=1), targets=["*attn1*"])
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    nerine.save(network, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    stem = "lycoris_down_blocks_0_attentions_0_norm1"
    tensors |= {f"{stem}.w_norm": torch.full((32,), 0.5), f"{stem}.b_norm": torch.full((32,), 0.25)}
    save_file(tensors, tmp_path / "b.safetensors")
    row = row_of(inspect(tmp_path / "b.safetensors"), "down_blocks.0.attentions.0.norm1")
    assert row.algorithm == type(Norm()).__name__
    assert (row.norm, row.bias_norm) == pytest.approx((0.5 * 32**0.5, 0.25 * 32**0.5))
    assert (row.effective_rank, row.values) == (None, ())


# -- what looks wrong --------------------------------------------------------------------------------------------------
def spoilt(tmp_path: Path, change: Any) -> Path:
    """A healthy file after `change` of its tensors, whose layers are named by path and suffix."""
    file = adapter_of(tmp_path / "a.safetensors", LoRA(rank=8, alpha=4), size=0.1)
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    change(tensors, "lycoris_" + Q.replace(".", "_"))
    save_file(tensors, tmp_path / "spoilt.safetensors", metadata)
    return tmp_path / "spoilt.safetensors"


def test_a_healthy_file(tmp_path: Path) -> None:
    file = spoilt(tmp_path, lambda tensors, stem: None)
    for base in (None, base_of(tmp_path)):
        report = inspect(file, base=base)
        assert report.healthy, report.findings
        assert "Suspicious layers: none" in str(report)


def scaled(suffix: str, by: float) -> Any:
    def change(tensors: dict[str, torch.Tensor], stem: str) -> None:
        tensors[f"{stem}.{suffix}"] *= by

    return change


def put(suffix: str, at: tuple[int, ...], value: float) -> Any:
    def change(tensors: dict[str, torch.Tensor], stem: str) -> None:
        tensors[f"{stem}.{suffix}"][at] = value

    return change


def one_direction(tensors: dict[str, torch.Tensor], stem: str) -> None:
    up = tensors[f"{stem}.lora_up.weight"]
    tensors[f"{stem}.lora_up.weight"] = up[:, :1].expand_as(up).contiguous()


def without_alpha(tensors: dict[str, torch.Tensor], stem: str) -> None:
    del tensors[f"{stem}.alpha"]


def cut(tensors: dict[str, torch.Tensor], stem: str) -> None:
    tensors[f"{stem}.lora_up.weight"] = tensors[f"{stem}.lora_up.weight"][:, :5].contiguous()


FLAWS = {
    "not finite": put("lora_down.weight", (0, 3), math.nan),
    "not finite, infinity": put("lora_up.weight", (2, 1), math.inf),
    "dead": scaled("lora_up.weight", 0.0),
    "exploding": scaled("lora_up.weight", 60.0),
    "tiny": scaled("lora_up.weight", 1e-4),
    "collapsed": one_direction,
    "alpha": without_alpha,
    "alpha, zero": scaled("alpha", 0.0),
    "alpha, negative": scaled("alpha", -1.0),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flaw_is_found_and_nothing_else(flaw: str, tmp_path: Path) -> None:
    report = inspect(spoilt(tmp_path, FLAWS[flaw]))
    assert not report.healthy
    assert problems(report) == {(Q, flaw.split(",")[0])}
    assert Q.split(".")[-1] in str(report)


def test_a_huge_alpha_makes_a_huge_change(tmp_path: Path) -> None:
    report = inspect(spoilt(tmp_path, scaled("alpha", 1e6)))
    assert problems(report) == {(Q, "alpha"), (Q, "exploding")}


def test_larger_than_the_weight(tmp_path: Path) -> None:
    base = base_of(tmp_path)
    file = spoilt(tmp_path, scaled("lora_up.weight", 8.0))
    assert inspect(file).healthy  # not much larger than the others
    report = inspect(file, base=base)
    assert problems(report) == {(Q, "exploding")}
    assert "as large as the weight" in report.findings[0].reason


def test_no_alpha_anywhere_is_no_flaw(tmp_path: Path) -> None:
    """ComfyUI saves files so."""

    def change(tensors: dict[str, torch.Tensor], stem: str) -> None:
        for key in [key for key in tensors if key.endswith(".alpha")]:
            del tensors[key]

    report = inspect(spoilt(tmp_path, change))
    assert report.healthy
    assert any("no alpha" in note for note in report.notes)


def test_a_damaged_layer_does_not_hide_the_others(tmp_path: Path) -> None:
    file = spoilt(tmp_path, cut)
    for base in (None, base_of(tmp_path)):
        report = inspect(file, base=base)
        (finding,) = report.findings
        assert finding.problem == "damaged"
        assert finding.layer == "lycoris_" + Q.replace(".", "_")
        assert "axis 'rank' is 5 here but 8" in finding.reason
        assert len(report.rows) == len(LAYERS) - 1
        assert {key.rpartition("to_q.")[2] for key in report.unmatched} == {
            "lora_up.weight",
            "lora_down.weight",
            "alpha",
        }


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    save_file({"some.weight": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match="adapter"):
        inspect(tmp_path / "a.safetensors")
    file = adapter_of(tmp_path / "b.safetensors", LoRA(rank=2))
    save_file({"other.weight": torch.ones(3, 4)}, tmp_path / "base.safetensors")
    with pytest.raises(FormatError, match="none of its"):
        inspect(file, base=tmp_path / "base.safetensors")


def test_tensors_that_nobody_understands(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], stem: str) -> None:
        tensors["strange.thing"] = torch.zeros(3)
        tensors["bundle_emb.ohwx.clip_l"] = torch.zeros(4, 768)

    report = inspect(spoilt(tmp_path, change))
    assert report.healthy
    assert list(report.unmatched) == ["strange.thing"]
    assert report.embeddings == {"ohwx": {"clip_l": (4, 768)}}


# -- a file as people have them ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, InspectReport, list[tuple[int, int, str]]]:
    file = tmp_path_factory.mktemp("sdxl") / "style.safetensors"
    write_sdxl(file, narrower=16, rank=8)
    told: list[tuple[int, int, str]] = []
    return file, inspect(file, progress=lambda done, total, what: told.append((done, total, what))), told


def test_sdxl_as_sd_scripts_writes_it(sdxl: tuple[Path, InspectReport, Any]) -> None:
    file, report, told = sdxl
    assert (report.dialect, len(report.rows), report.components) == ("kohya", 794, {"denoiser": 794})
    assert report.healthy, report.findings[:3]
    assert told[0][:2] == (0, 794)
    assert told[-1][:2] == (794, 794)
    assert told[0][2].startswith("denoiser.")
    names = [block.name for block in report.blocks]
    assert names.index("input_blocks.4.1") < names.index("middle_block.1") < names.index("output_blocks.0.1")
    assert next(b for b in report.blocks if b.name == "middle_block.1").layers == 102
    path, shape = "mid_block.attentions.0.transformer_blocks.3.attn2.to_v", (80, 128)
    assert sdxl_shapes(16)[path] == shape
    row = row_of(report, "denoiser.middle_block.1.transformer_blocks.3.attn2.to_v")
    assert row.shape == shape
    assert row.norm is not None
    low, high = (size_of(path) * factor * math.sqrt(80 / 640) for factor in (0.7, 1.3))
    assert 0.99 * low < row.norm < 1.01 * high
    assert report.bytes == file.stat().st_size


def test_what_the_training_was(sdxl: tuple[Path, InspectReport, Any]) -> None:
    training = sdxl[1].training
    assert training.groups["about"]["title"] == "Paper Woman XL"
    assert training.groups["training"]["steps"] == "1950 of 2340"
    assert training.groups["when"] == {
        "began": "2024-03-11 14:05 UTC",
        "ended": "2024-03-11 16:18 UTC",
        "took": "2 h 13 min",
    }
    assert training.tags[0].word == "paper cutout"
    assert training.triggers[0] == training_metadata()["modelspec.trigger_phrase"]


def test_the_text_fits_80_columns_and_the_dictionary_is_json(sdxl: tuple[Path, InspectReport, Any]) -> None:
    report = sdxl[1]
    for text in (str(report), text_of(report, layers=True)):
        assert max(map(len, text.splitlines()[1:])) <= 80  # the first line is the path of the file
    assert "transformer_blocks.3.attn2.to_v" in text_of(report, layers=True)
    assert "transformer_blocks.3.attn2.to_v" not in str(report)
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found["healthy"] is True
    assert found["ranks"] == {"min": 8, "median": 8, "max": 8}
    assert len(found["rows"]) == 794


def test_json_of_a_broken_file_has_no_nan(tmp_path: Path) -> None:
    report = inspect(spoilt(tmp_path, FLAWS["not finite"]))
    assert row_of(report).norm is None
    assert row_of(report).not_finite == ("down",)
    json.dumps(report.to_dict(), allow_nan=False)


def test_texts_of_a_file_move_no_cursor(tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", LoRA(rank=2), metadata={"modelspec.title": "\x1b[2Jred\u202e\nnew"})
    text = str(inspect(file))
    assert "\\x1b[2Jred\\x202e new" in text
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_small_words() -> None:
    assert printable("a" * 70, 10) == "a" * 9 + "…"
    assert shortened("down_blocks.1.attentions.0.attn1.to_q", 20) == "down_bloc….attn1.to_q"[:9] + "…" + "attn1.to_q"
    assert bar(0.0) == ""
    assert bar(1e-9) == "▏"
    assert bar(1.0) == bar(7.0) == "█" * 12
    assert bar(0.5) == "█" * 6
