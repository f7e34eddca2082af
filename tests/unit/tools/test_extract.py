"""Extracting adapters out of two checkpoints: merged, they give what they were taken from as nearly as is said."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint_pairs import difference, low_rank, only, pair, tensors, write_folder, write_single
from nerine.algorithms import DiagOFT, DoRA, Full, LoKr, LoRA
from nerine.errors import FormatError, OptionError, TargetError
from nerine.integrations.lycoris.extraction import extract_conv, extract_linear
from nerine.model.rules import Rule
from nerine.tools.extract import ExtractReport, extract
from nerine.tools.merge import merge

FULL_RANK = 10**6


def is_layer(name: str) -> bool:
    """Weights of layers that every algorithm can have an adapter on."""
    return name.endswith(".weight") and "norm" not in name and not name.endswith("_embedding.weight")


def merged(base: Path, adapter: Path, folder: Path) -> dict[str, Tensor]:
    """The tensors of the base with an adapter merged into it."""
    merge(base, [adapter], folder, dtype=torch.float32)
    return tensors(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Changes of three ranks and a little noise."""
    return pair(tmp_path_factory.mktemp("plain"), low_rank(noise=2e-4))


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Changes in the attention of the UNet alone."""
    return pair(tmp_path_factory.mktemp("attention"), only(low_rank(rank=6), "attn1.to_q", "attn2.to_k"))


# -- what comes back ---------------------------------------------------------------------------------------------------
def test_at_full_rank_the_merged_model_is_the_tuned_one(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, other = plain
    report = extract(base, other, tmp_path / "a.safetensors", rank=FULL_RANK)
    found, want = merged(base, tmp_path / "a.safetensors", tmp_path / "out"), tensors(other)
    layers = [name for name in want if is_layer(name)]
    assert report.layers == len(layers)
    for name in layers:  # a few roundings of fp32, in products over up to 1152 ranks
        scale = float((want[name] - tensors(base)[name]).abs().max())
        assert float((found[name] - want[name]).abs().max()) < 1e-4 * scale + 1e-6
    assert report.error < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 2},
        {"rank": 2, "dora": True},
        {"rank": 2, "dtype": torch.float16},
        {"algorithm": "lokr", "rank": 4},
        {"algorithm": LoKr(factor=4, full_matrix=True)},
        {"algorithm": "ia3"},
        {"algorithm": DiagOFT(block_size=8)},
        {"energy": 0.9},
        {"algorithm": "auto", "size": 100_000, "dtype": torch.float16},
    ],
    ids=str,
)
def test_the_reported_error_is_that_of_the_merged_model(
    plain: tuple[Path, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    base, other = plain
    report = extract(base, other, tmp_path / "a.safetensors", **options)
    before, want = tensors(base), tensors(other)
    found = merged(base, tmp_path / "a.safetensors", tmp_path / "out")
    whole = difference(before, want, is_layer)
    assert report.change == pytest.approx(whole, rel=1e-5)
    assert report.error == pytest.approx(difference(found, want, is_layer) / whole, rel=1e-3)
    row = max(report.rows, key=lambda row: row.change)
    name = f"{row.layer}.weight".replace("text_encoder.", "text_encoder.", 1)
    assert row.error == pytest.approx(difference(found, want, name.__eq__) / row.change, rel=1e-3)
    assert row.relative == pytest.approx(row.change / float(before[name].norm()), rel=1e-5)
    assert row.planned is None or row.planned == pytest.approx(row.error, rel=0.05)


def test_one_rank_more_keeps_more(plain: tuple[Path, Path], tmp_path: Path) -> None:
    errors = [extract(*plain, tmp_path / "a.safetensors", rank=rank, dry_run=True).error for rank in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2] > 0
    assert errors[2] < 0.2  # three ranks, but for the noise


def test_a_file_with_the_names_of_another_program_gives_the_same_adapter(
    plain: tuple[Path, Path], tmp_path: Path
) -> None:
    base, other = plain
    single = write_single(tmp_path / "tuned.safetensors", tensors(other))
    extract(base, other, tmp_path / "a.safetensors", rank=2)
    report = extract(base, single, tmp_path / "b.safetensors", rank=2)
    a, b = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert report.tuned == "tuned.safetensors"
    other_way = extract(single, base, tmp_path / "c.safetensors", rank=2)
    assert other_way.layers == report.layers
    assert other_way.error == pytest.approx(report.error, rel=1e-3)


def test_a_layer_that_is_fused_in_one_of_the_two_is_found_in_its_pieces(tmp_path: Path) -> None:
    """CLIP as transformers has it against OpenCLIP, which fuses query, key and value and turns its last projection."""
    width, wide, out = 8, 24, 12
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    apart, fused = {}, {}
    for i in range(2):
        ours, theirs = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        parts = {name: (noise(width, width), noise(width)) for name in ("q_proj", "k_proj", "v_proj")}
        for name, (weight, bias) in parts.items():
            apart[f"{ours}.self_attn.{name}.weight"] = weight
            apart[f"{ours}.self_attn.{name}.bias"] = bias
        fused[f"{theirs}.attn.in_proj_weight"] = torch.cat([weight for weight, _ in parts.values()])
        fused[f"{theirs}.attn.in_proj_bias"] = torch.cat([bias for _, bias in parts.values()])
        for a, b, shape in (
            ("self_attn.out_proj", "attn.out_proj", (width, width)),
            ("mlp.fc1", "mlp.c_fc", (wide, width)),
            ("mlp.fc2", "mlp.c_proj", (width, wide)),
        ):
            apart[f"{ours}.{a}.weight"] = fused[f"{theirs}.{b}.weight"] = noise(*shape)
            apart[f"{ours}.{a}.bias"] = fused[f"{theirs}.{b}.bias"] = noise(shape[0])
        for a, b in (("layer_norm1", "ln_1"), ("layer_norm2", "ln_2")):
            for attr in ("weight", "bias"):
                apart[f"{ours}.{a}.{attr}"] = fused[f"{theirs}.{b}.{attr}"] = noise(width)
    apart["text_model.embeddings.token_embedding.weight"] = fused["token_embedding.weight"] = noise(30, width)
    apart["text_model.embeddings.position_embedding.weight"] = noise(10, width)
    fused["positional_embedding"] = apart["text_model.embeddings.position_embedding.weight"]
    for attr in ("weight", "bias"):
        apart[f"text_model.final_layer_norm.{attr}"] = fused[f"ln_final.{attr}"] = noise(width)
    apart["text_projection.weight"] = noise(out, width)
    fused["text_projection"] = apart["text_projection.weight"].mT
    moved = {name: t + (low_rank(rank=1)(name, t) if t.dim() > 1 else 0) for name, t in apart.items()}
    files = {"base": fused, "apart": apart, "tuned": moved}
    for name, own in files.items():
        lead = "conditioner.embedders.1.model." if own is fused else ""
        save_file({lead + key: t.contiguous().clone() for key, t in own.items()}, tmp_path / f"{name}.safetensors")
    base, same, other = (tmp_path / f"{name}.safetensors" for name in files)

    nothing = extract(base, same, tmp_path / "n.safetensors", rank=1, dry_run=True)
    assert nothing.layers == 0
    assert nothing.identical > 0
    nothing = extract(same, base, tmp_path / "n.safetensors", rank=1, dry_run=True)
    assert nothing.layers == 0
    assert "left out" not in str(nothing)

    report = extract(base, other, tmp_path / "a.safetensors", rank=3 * width)
    assert report.error < 1e-5
    merge(same, [tmp_path / "a.safetensors"], tmp_path / "m.safetensors", component="text_encoder_2")
    found = load_file(tmp_path / "m.safetensors")
    for name, want in moved.items():
        if "_proj.weight" in name or ".fc" in name:
            torch.testing.assert_close(found[name], want, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A transformer whose layers the kohya dialect has in other pieces: query, key and value as one."""
    pytest.importorskip("diffusers")
    import tiny_pipelines

    folder = tmp_path_factory.mktemp("flux")
    model = tiny_pipelines.flux().transformer
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for name, t in model.named_parameters():
            t.add_(low_rank(rank=2)(name, t))
    model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


@pytest.mark.no_device_guard
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 2},
        {"rank": 1, "dora": True},
        {"ratio": 0.6},
        {"size": 20_000},
        {"algorithm": "auto", "size": 30_000},
        {"algorithm": "full"},
        {"rank": 1, "train_norm": True},
    ],
    ids=str,
)
def test_layers_that_are_fused_in_the_file_come_back(
    flux: tuple[Path, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    base, other = flux
    report = extract(base, other, tmp_path / "a.safetensors", **options)
    assert any("_img_attn_qkv." in key for key in load_file(tmp_path / "a.safetensors"))
    assert report.size == (tmp_path / "a.safetensors").stat().st_size <= options.get("size", 10**9)
    merge(base, [tmp_path / "a.safetensors"], tmp_path / "out")
    name = "diffusion_pytorch_model.safetensors"
    before, found, want = (load_file(folder / name) for folder in (base, tmp_path / "out", other))
    layers = {f"{row.layer}.weight" for row in report.rows} | {f"{path}.weight" for path in report.left}
    rest, whole = difference(found, want, layers.__contains__), difference(before, want, layers.__contains__)
    assert report.error == pytest.approx(rest / whole, rel=1e-3, abs=1e-6)
    others = "dora" in options or "ratio" in options or options.get("algorithm") == "auto"
    assert any("they got plain products" in note for note in report.notes) == others


@pytest.mark.no_device_guard
def test_what_cannot_be_fused_is_told_before_any_work(flux: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    with pytest.raises(FormatError, match="the kohya dialect has this layer in other pieces, for which LoKr"):
        extract(*flux, file, algorithm="lokr", rank=2)
    assert extract(*flux, file, algorithm="lokr", rank=2, dialect="lycoris").layers > 20


# -- what gets none ----------------------------------------------------------------------------------------------------
def test_layers_without_a_difference_get_no_adapter(attention: tuple[Path, Path], tmp_path: Path) -> None:
    report = extract(*attention, tmp_path / "a.safetensors", rank=2)
    assert {row.layer.rpartition(".")[2] for row in report.rows} == {"to_q", "to_k"}
    assert report.identical == sum(is_layer(name) for name in tensors()) - report.layers
    assert report.threshold == "every entry the same"
    assert f"identical layers: {report.identical}" in str(report)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_the_format_of_the_file_is_no_difference(tmp_path: Path, dtype: torch.dtype) -> None:
    values = {name: t * 1.2345 for name, t in tensors().items()}  # not what fp16 holds
    base = write_folder(tmp_path / "base", values)
    change = only(low_rank(rank=2), "attn2.to_v")
    other = write_folder(tmp_path / "tuned", {n: t + change(n, t) for n, t in values.items()}, dtype)
    report = extract(base, other, tmp_path / "a.safetensors", rank=2)
    assert {row.layer.rpartition(".")[2] for row in report.rows} == {"to_v"}
    assert str(dtype).removeprefix("torch.") in report.threshold
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert report.norms == 0
    assert report.biases == 0


def test_the_least_difference_in_one_format_is_one(tmp_path: Path) -> None:
    values = tensors()
    base = write_folder(tmp_path / "base", values)
    name = "unet.conv_out.weight"
    moved = values[name].clone()
    moved[0, 0, 0, 0] = torch.nextafter(moved[0, 0, 0, 0], torch.tensor(9.0))
    other = write_folder(tmp_path / "tuned", {**values, name: moved})
    report = extract(base, other, tmp_path / "a.safetensors", rank=1)
    assert [row.layer for row in report.rows] == ["unet.conv_out"]


def test_layers_that_changed_little_are_left_out_where_that_is_wished(tmp_path: Path) -> None:
    small, large = only(low_rank(size=1e-4), "to_k"), only(low_rank(size=0.1), "to_q")
    base, other = pair(tmp_path, lambda name, t: small(name, t) + large(name, t))
    every = extract(base, other, tmp_path / "a.safetensors", rank=2, dry_run=True)
    least = min(row.relative for row in every.rows if "to_q" in row.layer)
    report = extract(base, other, tmp_path / "a.safetensors", rank=2, min_change=least / 2)
    assert {row.layer.rpartition(".")[2] for row in report.rows} == {"to_q"}
    assert report.small == sum("to_k" in row.layer for row in every.rows)
    assert report.error > every.error  # what was left out counts


# -- sizes -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("mode", "param"), [("fixed", 3), ("threshold", 0.02), ("ratio", 0.3), ("quantile", 0.7), ("full", None)]
)
def test_the_modes_of_lycoris_give_its_ranks(
    plain: tuple[Path, Path], tmp_path: Path, mode: str, param: float | None
) -> None:
    base, other = plain
    report = extract(base, other, tmp_path / "a.safetensors", mode=mode, param=param)
    before, after = tensors(base), tensors(other)
    assert report.layers == sum(is_layer(name) for name in before)
    kinds = set()
    for row in report.rows:
        change = after[f"{row.layer}.weight"] - before[f"{row.layer}.weight"]
        judge = extract_linear if change.dim() == 2 else extract_conv
        found, kind = judge(change, mode, param or 0)
        kinds.add(kind)
        assert row.rank == (None if kind == "full" else found[0].shape[0]), row.layer
        assert (row.algorithm == "Full(bias=False)" or row.algorithm == "Full()") == (kind == "full")
    assert mode == "full" or "low rank" in kinds
    if mode in ("threshold", "ratio", "quantile"):
        ranks = {row.rank for row in report.rows}
        assert len(ranks) > 1
        short = {mode: param}
        assert extract(base, other, tmp_path / "b.safetensors", dry_run=True, **short).rows == report.rows


def test_a_share_of_the_energy_is_kept_and_a_rank_less_would_not_do(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, other = plain
    report = extract(base, other, tmp_path / "a.safetensors", energy=0.93)
    before, after = tensors(base), tensors(other)
    assert len({row.rank for row in report.rows}) > 1
    for row in report.rows:
        change = (after[f"{row.layer}.weight"] - before[f"{row.layer}.weight"]).flatten(1).double()
        shares = torch.linalg.svdvals(change).square().cumsum(0) / change.square().sum()
        assert shares[row.rank - 1] >= 0.93 - 1e-6
        assert row.rank == 1 or shares[row.rank - 2] < 0.93 + 1e-3
        assert row.kept >= 0.93 - 1e-5


def test_convolutions_may_have_a_rank_of_their_own(plain: tuple[Path, Path], tmp_path: Path) -> None:
    report = extract(*plain, tmp_path / "a.safetensors", rank=4, conv_rank=2, dry_run=True)
    for row in report.rows:
        assert row.rank == (2 if len(row.shape) == 4 and row.shape[2] > 1 else min(4, *row.shape[:1]))


SIZES = (12_000, 60_000, 300_000)


@pytest.mark.parametrize("algorithm", ["lora", "auto"])
def test_a_size_is_kept_and_used(plain: tuple[Path, Path], tmp_path: Path, algorithm: str) -> None:
    errors = []
    for size in SIZES:
        file = tmp_path / f"{size}.safetensors"
        report = extract(*plain, file, algorithm=algorithm, size=size, dtype=torch.float16)
        assert file.stat().st_size == report.size
        assert size - 1200 < report.size <= size  # less than the smallest adapter of most layers is left
        errors.append(report.error)
    assert all(after < before for before, after in itertools.pairwise(errors))


def test_spread_over_the_layers_it_keeps_more_than_one_rank_for_all(plain: tuple[Path, Path], tmp_path: Path) -> None:
    uniform = extract(*plain, tmp_path / "a.safetensors", rank=2, dtype=torch.float16)
    spread = extract(*plain, tmp_path / "b.safetensors", size=uniform.size, dtype=torch.float16)
    chosen = extract(*plain, tmp_path / "c.safetensors", algorithm="auto", size=uniform.size, dtype=torch.float16)
    assert spread.error < 0.9 * uniform.error
    assert chosen.error < 1.001 * spread.error


def test_auto_finds_the_form_that_the_change_has(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def change(name: str, t: Tensor) -> Tensor:
        if name.endswith("ff.net.2.weight"):  # a Kronecker product
            a, b = (torch.randn(4, 4, generator=generator), torch.randn(16, 64, generator=generator))
            return 0.01 * torch.kron(a, b)
        if name.endswith("attn1.to_q.weight"):  # a factor of each output
            return t * 0.3 * torch.rand(64, 1, generator=generator)
        if name.endswith("attn1.to_v.weight"):  # a factor of each input
            return t * 0.3 * torch.rand(1, 64, generator=generator)
        if name.endswith("attn2.to_out.0.weight"):  # a turn of blocks of eight outputs
            skew = torch.randn(8, 8, 8, generator=generator) * 0.1
            turn = torch.linalg.matrix_exp(skew - skew.mT)
            return torch.bmm(turn, t.reshape(8, 8, 64)).reshape(64, 64) - t
        if name.endswith("ff.net.0.proj.weight"):  # two ranks
            return low_rank(rank=2)(name, t)
        return torch.zeros_like(t)

    base, other = pair(tmp_path, change)
    report = extract(base, other, tmp_path / "a.safetensors", algorithm="auto", size=120_000)
    kinds = {row.layer.split(".transformer_blocks.0.")[1]: row.settings["algorithm"] for row in report.rows}
    assert kinds == {
        "attn1.to_q": "ia3",
        "attn1.to_v": "ia3",
        "attn2.to_out.0": "diag-oft",
        "ff.net.0.proj": "lora",
        "ff.net.2": "lokr",
    }
    assert report.error < 1e-3
    found = merged(base, tmp_path / "a.safetensors", tmp_path / "out")
    whole = difference(tensors(base), tensors(other), is_layer)
    assert difference(found, tensors(other), is_layer) / whole == pytest.approx(report.error, rel=0.05)


def test_auto_takes_the_difference_itself_where_nothing_smaller_does(tmp_path: Path) -> None:
    noise = only(low_rank(rank=1, size=0.0, noise=0.01), "to_q.weight")
    base, other = pair(tmp_path, noise)
    size = 7 * (64 * 64 * 2 + 600)
    report = extract(base, other, tmp_path / "a.safetensors", algorithm="auto", size=10 * size, dtype=torch.float16)
    assert {row.algorithm for row in report.rows} == {"Full(bias=False)"}
    assert report.error < 1e-3


def test_loha_is_tried_where_it_is_named(attention: tuple[Path, Path], tmp_path: Path) -> None:
    report = extract(*attention, tmp_path / "a.safetensors", algorithm="auto", algos=["loha"], size=60_000)
    assert {row.settings["algorithm"] for row in report.rows} == {"loha"}
    assert report.error < 0.7


def test_a_file_that_cannot_be_so_small_is_refused(plain: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="its header and norms alone take"):
        extract(*plain, tmp_path / "a.safetensors", size=50)
    with pytest.raises(OptionError, match="its header and norms alone take"):
        extract(*plain, tmp_path / "a.safetensors", size=5000, train_norm=True)
    assert not (tmp_path / "a.safetensors").exists()


# -- algorithms and layers ---------------------------------------------------------------------------------------------
def test_dora_is_nearer_and_nearly_keeps_the_norms_of_the_rows(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, other = plain
    without = extract(base, other, tmp_path / "a.safetensors", rank=1)
    report = extract(base, other, tmp_path / "b.safetensors", rank=1, dora=True)
    assert {row.algorithm for row in report.rows} == {"DoRA(LoRA(rank=1))"}
    found, want = merged(base, tmp_path / "b.safetensors", tmp_path / "out"), tensors(other)
    for name in (name for name in want if is_layer(name)):
        norms = (t[name].flatten(1).norm(dim=1) for t in (found, want))
        torch.testing.assert_close(*norms, rtol=0.02, atol=0)  # the magnitudes are nearest to the rows, not to norms
    assert report.error < without.error


@pytest.mark.parametrize("options", [{"rank": 4}, {"rank": 4, "dora": True}, {"size": 250_000}], ids=str)
def test_convolutions_may_have_a_core(plain: tuple[Path, Path], tmp_path: Path, options: dict[str, Any]) -> None:
    base, other = plain
    report = extract(base, other, tmp_path / "a.safetensors", tucker=True, **options)
    cores = [key for key in load_file(tmp_path / "a.safetensors") if key.endswith(".lora_mid.weight")]
    assert len(cores) == sum(len(row.shape) == 4 and row.shape[2] == 3 for row in report.rows)
    assert cores
    found, want, before = merged(base, tmp_path / "a.safetensors", tmp_path / "out"), tensors(other), tensors(base)
    for row in report.rows:
        name = f"{row.layer}.weight"
        assert row.error == pytest.approx(difference(found, want, name.__eq__) / row.change, rel=1e-3)
        assert difference(found, want, name.__eq__) < difference(before, want, name.__eq__)
        assert row.planned is None or row.planned == pytest.approx(row.error, rel=1e-3)


def test_the_whole_difference_takes_biases_and_embeddings_along(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, other = plain
    report = extract(base, other, tmp_path / "a.safetensors", algorithm="full", train_norm=True)
    found, want = merged(base, tmp_path / "a.safetensors", tmp_path / "out"), tensors(other)
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=0, atol=2e-7)
    assert report.biases == report.norms == 0
    assert not report.notes


def test_biases_and_norms_that_changed_are_counted(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, other = plain
    report = extract(base, other, tmp_path / "a.safetensors", rank=1, dry_run=True)
    before, after = tensors(base), tensors(other)
    norms = {name.rpartition(".")[0] for name in before if "norm" in name}
    biases = [name for name in before if name.endswith(".bias") and "norm" not in name]
    size = sum(float(before[name].square().sum()) for name in biases) ** 0.5
    assert report.norms == len(norms)
    assert report.biases == len(biases)
    assert report.bias_change == pytest.approx(difference(before, after, biases.__contains__) / size, rel=1e-5)
    assert "1 embeddings changed" in str(report) or "2 embeddings changed" in str(report)


def test_norms_are_taken_along_with_train_norm(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, other = plain
    report = extract(base, other, tmp_path / "a.safetensors", rank=1, train_norm=True)
    found, want = merged(base, tmp_path / "a.safetensors", tmp_path / "out"), tensors(other)
    for name in (name for name in want if "norm" in name):
        torch.testing.assert_close(found[name], want[name], rtol=0, atol=2e-7)
    assert report.norms == 0
    assert sum(row.algorithm == "Norm()" for row in report.rows) == len(
        {n.rpartition(".")[0] for n in want if "norm" in n}
    )


def test_a_bias_that_alone_has_changed_has_a_place_with_the_norms(tmp_path: Path) -> None:
    base, other = pair(tmp_path, only(low_rank(), "conv_in.bias"))
    without = extract(base, other, tmp_path / "a.safetensors", rank=1)
    assert without.layers == 0
    assert without.biases == 1
    report = extract(base, other, tmp_path / "b.safetensors", rank=1, train_norm=True)
    assert [row.layer for row in report.rows] == ["unet.conv_in"]
    found, want = merged(base, tmp_path / "b.safetensors", tmp_path / "out"), tensors(other)
    assert all(torch.equal(found[name], want[name]) or "conv_in" in name for name in want)
    torch.testing.assert_close(found["unet.conv_in.bias"], want["unet.conv_in.bias"])


def test_targets_and_rules_choose_layers(plain: tuple[Path, Path], tmp_path: Path) -> None:
    report = extract(*plain, tmp_path / "a.safetensors", rank=1, targets="attn-only")
    assert report.rows
    assert all("attn" in row.layer for row in report.rows)
    assert "not among the targets" in str(report)
    rules = [Rule("attn1", DoRA(LoRA(rank=2))), Rule("ff", Full())]
    report = extract(*plain, tmp_path / "b.safetensors", algorithm=rules)
    found = {row.algorithm for row in report.rows if "attn1" in row.layer}
    assert found == {"DoRA(LoRA(rank=2))"}
    assert {row.settings["algorithm"] for row in report.rows if "attn1" not in row.layer} == {"full"}
    with pytest.raises(TargetError, match="no layer"):
        extract(*plain, tmp_path / "c.safetensors", rank=1, targets="nowhere")


def test_a_part_that_one_of_the_two_lacks_is_left_out(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, other = plain
    unet = {name: t for name, t in tensors(other).items() if name.startswith("unet.")}
    save_file({name[5:]: t for name, t in unet.items()}, tmp_path / "unet.safetensors")
    report = extract(base, tmp_path / "unet.safetensors", tmp_path / "a.safetensors", rank=2)
    assert all(row.layer.startswith("unet.") for row in report.rows)
    assert any("has no text_encoder" in note for note in report.notes)
    assert all(key.startswith("lora_unet_") for key in load_file(tmp_path / "a.safetensors"))
    whole = extract(base, other, tmp_path / "b.safetensors", rank=2)
    assert [row for row in whole.rows if row.layer.startswith("unet.")] == list(report.rows)


def test_the_autoencoder_is_looked_at_and_left_out(tmp_path: Path) -> None:
    values = {
        "model.diffusion_model.x.to_q.weight": torch.randn(6, 4),
        "first_stage_model.conv.weight": torch.randn(3, 2),
    }
    save_file(values, tmp_path / "base.safetensors")
    save_file({name: t * 1.5 for name, t in values.items()}, tmp_path / "tuned.safetensors")
    report = extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "a.safetensors", rank=1)
    assert [row.layer for row in report.rows] == ["diffusion_model.x.to_q"]
    assert any("the vae differs in 1 of 1 tensors" in note for note in report.notes)


# -- the file ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dialect", ["kohya", "lycoris", "diffusers", "peft", "comfy"])
def test_what_each_dialect_holds_is_read_back(attention: tuple[Path, Path], tmp_path: Path, dialect: str) -> None:
    target = tmp_path / ("a" if dialect == "peft" else "a.safetensors")
    report = extract(*attention, target, rank=6, dialect=dialect)
    assert report.layers
    found, want = merged(attention[0], target, tmp_path / "out"), tensors(attention[1])
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=1e-4, atol=1e-5)


def test_a_dialect_that_cannot_hold_it_says_so_before_any_work(plain: tuple[Path, Path], tmp_path: Path) -> None:
    seen: list[str] = []
    with pytest.raises(FormatError, match="the diffusers dialect cannot hold"):
        extract(
            *plain,
            tmp_path / "a.safetensors",
            algorithm="ia3",
            dialect="diffusers",
            progress=lambda done, total, what: seen.append(what),
        )
    assert not seen
    report = extract(*plain, tmp_path / "a.safetensors", algorithm="auto", size=60_000, dialect="diffusers")
    assert {row.settings["algorithm"] for row in report.rows} == {"lora"}


def test_the_header_tells_ranks_and_where_it_comes_from(plain: tuple[Path, Path], tmp_path: Path) -> None:
    extract(*plain, tmp_path / "a.safetensors", rank=2, metadata={"title": "mine"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == "2"
    assert metadata["ss_network_alpha"] == "2.0"
    assert metadata["title"] == "mine"
    assert json.loads(metadata["extracted_from"]) == {"base": "base", "tuned": "tuned"}
    assert str(tmp_path) not in str(metadata)


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes(plain: tuple[Path, Path], tmp_path: Path) -> None:
    for options in ({"rank": 3}, {"algorithm": "auto", "size": 50_000}):
        extract(*plain, tmp_path / "a.safetensors", force=True, **options)
        first = (tmp_path / "a.safetensors").read_bytes()
        extract(*plain, tmp_path / "a.safetensors", force=True, **options)
        assert (tmp_path / "a.safetensors").read_bytes() == first


def test_a_dry_run_says_all_and_writes_nothing(plain: tuple[Path, Path], tmp_path: Path) -> None:
    dry = extract(*plain, tmp_path / "a.safetensors", rank=2, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    wet = extract(*plain, tmp_path / "a.safetensors", rank=2)
    assert "not written" in str(dry)
    assert dry.to_dict() | {"written": True} == wet.to_dict()
    assert wet.size == (tmp_path / "a.safetensors").stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors"]
    with pytest.raises(OptionError, match="there is a file of that name"):
        extract(*plain, tmp_path / "a.safetensors", rank=2)
    with pytest.raises(OptionError, match="this is what is read"):
        extract(*plain, plain[0] / "a.safetensors", rank=2, force=True)


def test_the_report_fits_into_a_terminal(plain: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    report = extract(*plain, "a.safetensors", rank=2, dora=True)
    lines = str(report).splitlines()
    assert max(map(len, lines[lines.index("") :])) <= 80
    assert len(lines) < 35
    assert len(report.verbose().splitlines()) > report.layers
    data = json.loads(json.dumps(report.to_dict()))
    assert data["layers"] == len(data["rows"]) == report.layers
    assert data["algorithms"] == {"DoRA(LoRA(rank=2))": report.layers}


def test_progress_is_told_layer_by_layer(attention: tuple[Path, Path], tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    extract(*attention, tmp_path / "a.safetensors", rank=2, progress=lambda *step: told.append(step))
    assert [done for done, _, _ in told] == list(range(len(told)))
    assert {total for _, total, _ in told} == {len(told)}


# -- what is wrong -----------------------------------------------------------------------------------------------------
def test_two_different_models_are_told_with_what_differs(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, other = plain
    values = tensors(other)
    name = "unet.conv_in.weight"
    wider = {**values, name: torch.cat([values[name], values[name]], 1)}
    with pytest.raises(
        FormatError, match=r"1 have another shape \(unet.conv_in \[32, 3, 3, 3\] there \[32, 6, 3, 3\]\)"
    ):
        extract(base, write_folder(tmp_path / "wider", wider), tmp_path / "a.safetensors", rank=1)
    fewer = {key: t for key, t in values.items() if ".attn1.to_q" not in key}
    with pytest.raises(FormatError, match=r"4 layers of .*base are not in .*fewer \(unet.down_blocks.1.*, \.\.\.\)"):
        extract(base, write_folder(tmp_path / "fewer", fewer), tmp_path / "a.safetensors", rank=1)
    with pytest.raises(FormatError, match=r"4 layers of .*base are not in .*fewer"):
        extract(tmp_path / "fewer", base, tmp_path / "a.safetensors", rank=1)
    save_file({"blocks.0.to_q.weight": torch.randn(6, 4)}, tmp_path / "alien.safetensors")
    with pytest.raises(FormatError, match="are different models"):
        extract(base, tmp_path / "alien.safetensors", tmp_path / "a.safetensors", rank=1)
    assert not (tmp_path / "a.safetensors").exists()


def test_what_cannot_have_an_adapter_may_be_missing(plain: tuple[Path, Path], tmp_path: Path) -> None:
    values = {name: t for name, t in tensors(plain[1]).items() if "conv_norm_out" not in name}
    other = write_folder(tmp_path / "other", values)
    report = extract(plain[0], other, tmp_path / "a.safetensors", rank=1)
    assert any("unet.conv_norm_out" in note for note in report.notes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(plain: tuple[Path, Path], tmp_path: Path, bad: float) -> None:
    values = tensors(plain[1])
    values["unet.mid_block.resnets.0.conv2.weight"][0, 1, 0, 0] = bad
    other = write_folder(tmp_path / "other", values)
    for options in ({"rank": 2}, {"algorithm": "auto", "size": 60_000}):
        with pytest.raises(FormatError, match=r"the weight of unet.mid_block.resnets.0.conv2 has entries that are no"):
            extract(plain[0], other, tmp_path / "a.safetensors", **options)
    assert not (tmp_path / "a.safetensors").exists()


def test_a_piece_that_is_missing_is_named(plain: tuple[Path, Path], tmp_path: Path) -> None:
    values = {name[5:]: t for name, t in tensors(plain[1]).items() if name.startswith("unet.")}
    names = sorted(values)
    pieces = {"m-1.safetensors": names[:50], "m-2.safetensors": names[50:]}
    for file, own in pieces.items():
        save_file({name: values[name] for name in own}, tmp_path / file)
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, own in pieces.items() for name in own}}))
    report = extract(plain[0], index, tmp_path / "a.safetensors", rank=1)
    assert report.layers > 50
    (tmp_path / "m-2.safetensors").unlink()
    with pytest.raises(FormatError, match=r"m-2.safetensors is not there"):
        extract(plain[0], index, tmp_path / "b.safetensors", rank=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "say how large it is to be"),
        ({"rank": 2, "energy": 0.5}, "got rank=2 and energy=0.5"),
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"rank": 1.5}, "rank must be a whole number of at least 1, got 1.5"),
        ({"energy": 1.5}, "energy must be a share"),
        ({"ratio": -0.1}, "ratio must be a number from 0 to 1"),
        ({"size": 0}, "size must be a number of bytes"),
        ({"mode": "rato", "param": 0.5}, "Did you mean 'ratio'"),
        ({"mode": "ratio"}, "mode 'ratio' needs param"),
        ({"param": 3}, "param belongs to a mode"),
        ({"energy": 0.5, "conv_rank": 3}, "conv_rank goes with rank"),
        ({"algorithm": "lora2", "rank": 2}, "Did you mean 'lora'"),
        ({"algorithm": "boft", "rank": 2}, "'boft' cannot be fitted"),
        ({"algorithm": "locon", "rank": 2}, "locon is algorithm='lora'"),
        ({"algorithm": "full", "rank": 2}, "full has no rank; leave rank out"),
        ({"algorithm": "lokr", "ratio": 0.5}, "ratio counts singular values"),
        ({"algorithm": "auto"}, "weighs algorithms against each other for a size"),
        ({"algorithm": "auto", "rank": 2}, "weighs algorithms against each other for a size"),
        ({"algorithm": "lora", "size": 9000, "algos": ["lora"]}, "algos says what algorithm='auto' may choose"),
        ({"algorithm": "ia3", "dora": True}, "dora goes around lora"),
        ({"algorithm": "lokr", "rank": 2, "tucker": True}, "tucker is a form of lora"),
        ({"algorithm": "glora", "size": 90_000}, "glora is not weighed by size"),
        ({"algorithm": "auto", "algos": ["lora", "dylora"], "size": 90_000}, "dylora is not weighed by size"),
        ({"rank": 2, "tucker": True, "dtype": torch.float64}, "dtype must be"),
        ({"energy": 0.5, "tucker": True}, "a core has none"),
        ({"rank": 2, "min_change": -1}, "min_change is"),
        ({"rank": 2, "dialect": "kohia"}, "no dialect is called 'kohia'"),
        ({"algorithm": [Rule("attn", LoRA(rank=2))], "rank": 2}, "rules have sizes"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(
    plain: tuple[Path, Path], tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(OptionError, match=words):
        extract(*plain, tmp_path / "a.safetensors", **options)


def test_numbers_too_large_for_the_format_are_refused(tmp_path: Path) -> None:
    save_file({"x.weight": torch.zeros(6, 4)}, tmp_path / "a.safetensors")
    save_file({"x.weight": torch.full((6, 4), 1e6)}, tmp_path / "b.safetensors")
    files = (tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "c.safetensors")
    with pytest.raises(FormatError, match="more than float16 holds"):
        extract(*files, algorithm="full", dtype=torch.float16)
    report = extract(*files, algorithm="full")
    assert isinstance(report, ExtractReport)
    assert report.relative > 0
