"""Comparisons against dense arithmetic, across dialects, algorithms and the names of programs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nerine
from blocky_model import LAYERS, adapter_of, base_of, weights
from nerine import BOFT, IA3, DiagOFT, DoRA, Full, GLoRA, LoHa, LoKr, LoRA
from nerine.algorithms import Algorithm
from nerine.files.names import aliases, renamed
from nerine.tools.compare import CompareReport, CompareRow, compare
from nerine.tools.convert import convert
from sdxl_adapter import native, sdxl_shapes, sdxl_tensors

ALGORITHMS: dict[str, Algorithm] = {
    "lora": LoRA(rank=4, alpha=2),
    "loha": LoHa(rank=2, alpha=3),
    "lokr": LoKr(rank=2, alpha=3, factor=4),
    "full": Full(),
    "dora": DoRA(LoRA(rank=4, alpha=2)),
    "glora": GLoRA(rank=3, alpha=2),
    "boft": BOFT(block_size=4),
}
PAIRS = [("lora", "lora"), ("lora", "loha"), ("lokr", "lora"), ("full", "loha"), ("lokr", "lokr"), ("loha", "loha")]
NEED_BASE = [("dora", "lora"), ("glora", "lokr"), ("boft", "dora"), ("boft", "boft")]


def check(row: CompareRow, a: torch.Tensor, b: torch.Tensor) -> None:
    """A row against the two dense changes."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    norms, product = (float(a.norm()), float(b.norm())), float((a * b).sum())
    # merging in fp32 rounds W + change: some 1e-5 of changes that are a hundredth of the weight
    assert (row.norm_a, row.norm_b) == pytest.approx(norms, rel=1e-4)
    assert row.cosine == pytest.approx(product / norms[0] / norms[1], abs=1e-4)
    assert row.ratio == pytest.approx(norms[1] / norms[0], rel=2e-4)
    assert row.distance == pytest.approx(float((a - b).norm()) / max(norms), abs=1e-4)
    count = row.directions
    assert count > 0
    for overlap, first, second in (
        (row.overlap_out, *(torch.linalg.svd(m)[0][:, :count] for m in (a, b))),
        (row.overlap_in, *(torch.linalg.svd(m)[2][:count].mT for m in (a, b))),
    ):
        cosines = torch.linalg.svdvals(first.mT @ second)
        assert overlap == pytest.approx(float(cosines.square().mean()), abs=2e-3)


@pytest.mark.parametrize("pair", [*PAIRS, *NEED_BASE], ids="-".join)
def test_against_dense_arithmetic(pair: tuple[str, str], tmp_path: Path) -> None:
    files = [
        adapter_of(tmp_path / f"{seed}.safetensors", ALGORITHMS[name], seed=seed) for seed, name in enumerate(pair)
    ]
    report = compare(*files, base=base_of(tmp_path) if pair in NEED_BASE else None)
    first, second = (weights(file) for file in files)
    assert {row.layer for row in report.rows} == set(LAYERS)
    for row in report.rows:
        check(row, first[row.layer], second[row.layer])
    whole = report.together
    a, b = (torch.cat([change.flatten() for change in changes.values()]).double() for changes in (first, second))
    assert whole.cosine == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-4)
    assert whole.distance == pytest.approx(float((a - b).norm() / max(a.norm(), b.norm())), abs=1e-4)
    assert report.identical == ""
    json.dumps(report.to_dict(), allow_nan=False)
    assert max(map(len, str(report).splitlines()[2:])) <= 80


def test_overlap_of_a_file_with_itself_made_larger(tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", LoRA(rank=4, alpha=2))
    tensors = load_file(file)
    save_file({k: t * 3 if "lora_up" in k else t for k, t in tensors.items()}, tmp_path / "b.safetensors")
    report = compare(file, tmp_path / "b.safetensors")
    for row in report.rows:
        assert (row.cosine, row.ratio) == (pytest.approx(1.0), pytest.approx(3.0))
        assert row.distance == pytest.approx(2 / 3)
        assert (row.overlap_out, row.overlap_in) == (pytest.approx(1.0), pytest.approx(1.0))
    assert report.largest == pytest.approx(2 / 3)


def test_which_blocks_differ_most(tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", LoRA(rank=4, alpha=2))
    tensors = load_file(file)
    for key, t in tensors.items():
        if "mid_block" in key and "lora_up" in key:
            t += 0.02 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1))
    save_file(tensors, tmp_path / "b.safetensors")
    report = compare(file, tmp_path / "b.safetensors")
    assert [block.name for block in report.blocks if block.distance] == ["mid_block.attentions.0"]
    assert report.blocks[0].layers == 8
    assert "mid_block.attentions.0" in str(report)


# -- the same ----------------------------------------------------------------------------------------------------------
def test_the_same_file_tensors_numbers(tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", LoRA(rank=4, alpha=2))
    shutil.copy(file, tmp_path / "b.safetensors")
    assert compare(file, tmp_path / "b.safetensors").identical == "files"
    with safe_open(file, "pt") as opened:
        metadata = {**opened.metadata(), "modelspec.title": "other"}
    save_file(load_file(file), tmp_path / "c.safetensors", metadata)
    report = compare(file, tmp_path / "c.safetensors")
    assert report.identical == "tensors"
    assert all(row.same_tensors and row.distance == 0 for row in report.rows)
    for dialect in ("diffusers", "comfy"):  # the scale goes into the factors
        convert(file, tmp_path / f"{dialect}.safetensors", dialect=dialect)
        report = compare(file, tmp_path / f"{dialect}.safetensors")
        assert report.identical == "numbers", report
        assert report.largest is not None
        assert report.largest <= 1e-6
    assert "same numbers" in str(report)


def test_a_difference_of_one_number_is_seen(tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", LoRA(rank=4, alpha=2))
    tensors = load_file(file)
    tensors["lycoris_conv_in.lora_up.weight"].view(-1)[5] *= 1.001
    save_file(tensors, tmp_path / "b.safetensors")
    report = compare(file, tmp_path / "b.safetensors")
    assert report.identical == ""
    assert [row.layer for row in report.rows if row.distance] == ["conv_in"]
    assert report.largest is not None
    assert 1e-6 < report.largest < 1e-3


def test_rotations_without_the_base(tmp_path: Path) -> None:
    a, b = (adapter_of(tmp_path / f"{i}.safetensors", DiagOFT(block_size=4), seed=i) for i in range(2))
    report = compare(a, b)
    assert all(row.distance is None and "need the base" in row.why for row in report.rows)
    assert report.largest is None
    assert f"not compared: {len(LAYERS)} layers" in str(report)
    assert compare(a, a).identical == "files"
    assert compare(a, b, base=base_of(tmp_path)).largest is not None


def test_magnitudes_without_the_base_are_said_to_be_left_out(tmp_path: Path) -> None:
    a, b = (adapter_of(tmp_path / f"{i}.safetensors", DoRA(LoRA(rank=2)), seed=i) for i in range(2))
    assert all("magnitudes" in row.why for row in compare(a, b).rows)


def test_biases_count(tmp_path: Path) -> None:
    a = adapter_of(tmp_path / "a.safetensors", Full())
    tensors = load_file(a)
    for key, t in tensors.items():
        if key.endswith("diff_b"):
            t *= 2
    save_file(tensors, tmp_path / "b.safetensors")
    report = compare(a, tmp_path / "b.safetensors")
    assert all(row.distance == 0 for row in report.rows)
    moved = [row.bias_distance for row in report.rows if row.bias_distance is not None]
    assert 0 < len(moved) < len(report.rows)
    assert moved == pytest.approx([0.5] * len(moved))
    assert report.largest == pytest.approx(0.5)
    assert report.identical == ""


def test_numbers_that_are_none(tmp_path: Path) -> None:
    a = adapter_of(tmp_path / "a.safetensors", LoRA(rank=2))
    tensors = load_file(a)
    tensors["lycoris_conv_in.lora_up.weight"].view(-1)[0] = torch.nan
    save_file(tensors, tmp_path / "b.safetensors")
    report = compare(a, tmp_path / "b.safetensors")
    assert [(row.layer, row.why) for row in report.rows if row.why] == [
        ("conv_in", "NaN or infinity in the second file")
    ]


# -- which layer is which ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("has_base", [False, True])
def test_layers_of_one_file_alone(has_base: bool, tmp_path: Path) -> None:
    a = adapter_of(tmp_path / "a.safetensors", LoRA(rank=2), targets=["*attn1*", "conv_in"])
    b = adapter_of(tmp_path / "b.safetensors", LoRA(rank=2), targets=["*attn1*", "*ff*"])
    report = compare(a, b, base=base_of(tmp_path) if has_base else None)
    assert report.only_a == ("conv_in",)
    assert len(report.only_b) == 8
    assert all(".ff." in path for path in report.only_b)
    assert len(report.rows) == 12
    assert report.largest is not None
    assert report.largest >= 1
    assert "only in B: 8 layers" in str(report)


def test_other_models_have_nothing_in_common(tmp_path: Path) -> None:
    a = adapter_of(tmp_path / "a.safetensors", LoRA(rank=2))
    other = nerine.attach(torch.nn.Sequential(torch.nn.Linear(6, 4)), LoRA(rank=2))
    nerine.save(other, tmp_path / "b.safetensors")
    report = compare(a, tmp_path / "b.safetensors")
    assert report.rows == ()
    assert (len(report.only_a), len(report.only_b)) == (len(LAYERS), 1)


def test_layers_of_other_shapes(tmp_path: Path) -> None:
    for number, width in enumerate((8, 10)):
        network = nerine.attach(torch.nn.Sequential(torch.nn.Linear(width, 12)), LoRA(rank=2))
        with torch.no_grad():
            for p in network.parameters():
                p.add_(1.0)
        nerine.save(network, tmp_path / f"{number}.safetensors")
    (row,) = compare(tmp_path / "0.safetensors", tmp_path / "1.safetensors").rows
    assert row.why == "its change is 12 x 8 in one and 12 x 10 in the other"


@pytest.mark.parametrize(
    "dialects", [("kohya", "peft"), ("lycoris", "kohya"), ("peft", "diffusers"), ("comfy", "onetrainer")]
)
def test_across_dialects(dialects: tuple[str, str], tmp_path: Path) -> None:
    places = []
    for seed, dialect in enumerate(dialects):
        place = tmp_path / (dialect if dialect == "peft" else f"{dialect}.safetensors")
        places.append(adapter_of(place, LoRA(rank=4, alpha=2), seed=seed, dialect=dialect, component="unet"))
    report = compare(*places)
    assert (len(report.rows), report.only_a, report.only_b) == (len(LAYERS), (), ())
    same_seed = adapter_of(tmp_path / "again.safetensors", LoRA(rank=4, alpha=2), seed=1)
    assert compare(places[1], same_seed).largest == pytest.approx(0.0, abs=1e-6)


def test_across_the_names_of_programs(tmp_path: Path) -> None:
    """The same adapter under diffusers' names and under those of the original program, without any model."""
    shapes = sdxl_shapes(32)
    save_file(sdxl_tensors(shapes, native(shapes), rank=2), tmp_path / "a.safetensors")
    tensors = sdxl_tensors(shapes, {path: path for path in shapes}, rank=2)
    changed = "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"
    tensors[changed] = tensors[changed] * 2
    save_file(tensors, tmp_path / "b.safetensors")
    for a, b in (("a", "b"), ("b", "a")):
        report = compare(tmp_path / f"{a}.safetensors", tmp_path / f"{b}.safetensors")
        assert (len(report.rows), report.only_a, report.only_b) == (794, (), ())
        (row,) = (row for row in report.rows if row.distance)
        assert row.layer.endswith(("middle_block.1.proj_in", "mid_block.attentions.0.proj_in"))
        assert row.ratio == pytest.approx(2 if a == "a" else 0.5, rel=1e-3)


def fused(tmp_path: Path) -> tuple[Path, Path, torch.Tensor, list[torch.Tensor]]:
    """An adapter for a fused qkv of a FLUX block, and one for its three parts."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    width, rank = 24, 4
    up, down = random(3 * width, rank), random(rank, width)
    whole = {"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": up}
    whole["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"] = down
    whole["lora_unet_double_blocks_0_img_attn_qkv.alpha"] = torch.tensor(float(rank))
    parts, changes = {}, []
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        part = up[i * width : (i + 1) * width] + 0.1 * random(width, rank)
        parts[f"transformer.transformer_blocks.0.attn.{name}.lora_A.weight"] = down.clone()
        parts[f"transformer.transformer_blocks.0.attn.{name}.lora_B.weight"] = part.contiguous()
        changes.append(part @ down)
    save_file(whole, tmp_path / "whole.safetensors")
    save_file(parts, tmp_path / "parts.safetensors")
    return tmp_path / "whole.safetensors", tmp_path / "parts.safetensors", up @ down, changes


def flux_base(folder: Path, is_fused: bool) -> Path:
    """The weights of one FLUX block, as little of them as tells the family."""
    width = 24
    names = {
        "img_in": (width, 16),
        "txt_in": (width, 32),
        "double_blocks.0.img_attn.qkv": (3 * width, width),
        "double_blocks.0.img_attn.proj": (width, width),
        "double_blocks.0.txt_attn.qkv": (3 * width, width),
        "double_blocks.0.img_mod.lin": (6 * width, width),
        "double_blocks.0.txt_mod.lin": (6 * width, width),
        "double_blocks.0.img_mlp.0": (4 * width, width),
        "double_blocks.0.txt_mlp.0": (4 * width, width),
        "single_blocks.0.linear1": (7 * width, width),
        "single_blocks.0.linear2": (width, 5 * width),
        "single_blocks.0.modulation.lin": (3 * width, width),
        "vector_in.in_layer": (width, 8),
        "time_in.in_layer": (width, 8),
        "final_layer.linear": (16, width),
    }
    shapes = dict(names)
    if not is_fused:
        shapes = renamed(names, aliases(names)["diffusers"])
    generator = torch.Generator().manual_seed(2)
    file = folder / f"base{is_fused}.safetensors"
    save_file({f"{k}.weight": torch.randn(s, generator=generator) for k, s in shapes.items()}, file)
    return file


@pytest.mark.parametrize("is_fused", [True, False])
def test_fused_layers_and_their_parts(is_fused: bool, tmp_path: Path) -> None:
    whole, parts, change, changes = fused(tmp_path)
    report = compare(whole, parts, base=flux_base(tmp_path, is_fused))
    assert (report.only_a, report.only_b) == ((), ())
    parts_of = change.chunk(3)
    rows = sorted(report.rows, key=lambda row: row.norm_b or 0.0)
    order = sorted(range(3), key=lambda i: float(changes[i].norm()))
    assert [row.norm_b for row in rows] == pytest.approx([float(changes[i].norm()) for i in order], rel=1e-5)
    assert [row.norm_a for row in rows] == pytest.approx([float(parts_of[i].norm()) for i in order], rel=1e-5)
    assert all("[" in row.layer for row in rows) == is_fused


def test_ia3_and_its_dense_difference(tmp_path: Path) -> None:
    """Two algorithms that make one and the same change."""
    a = adapter_of(tmp_path / "a.safetensors", IA3())
    tensors = {}
    for path, change in weights(a).items():
        tensors[f"lycoris_{path.replace('.', '_')}.diff"] = change
    save_file(tensors, tmp_path / "b.safetensors")
    report = compare(a, tmp_path / "b.safetensors", base=base_of(tmp_path))
    assert report.largest is not None
    assert report.largest < 1e-5


def test_progress(tmp_path: Path) -> None:
    a = adapter_of(tmp_path / "a.safetensors", LoRA(rank=2))
    told: list[tuple[int, int, str]] = []
    report = compare(a, a, progress=lambda *what: told.append(what))
    assert isinstance(report, CompareReport)
    assert told[0][:2] == (0, len(LAYERS))
    assert told[-1] == (len(LAYERS), len(LAYERS), "")
