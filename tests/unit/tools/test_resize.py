"""`resize`: every adapter is the best of its ranks, the report says what it lost, and a size is kept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nerine
from nerine import IA3, DiagOFT, DoRA, DyLoRA, FormatError, Full, GLoRA, LoHa, LoKr, LoRA, Norm, OptionError, TLoRA
from nerine.algorithms import Algorithm
from nerine.files.store import open_file, write_file
from nerine.tools import resize
from nerine.tools.ranks import Choice, shares
from tool_adapters import LAYERS, Model, adapter_of, assert_close, base_of, distance, moved, stirred, weights


def best(change: Tensor, rank: int) -> float:
    """What the best matrix of a rank leaves of one, by the dense decomposition."""
    s = torch.linalg.svdvals(change.flatten(1).double())
    return float(s[rank:].norm() / s.norm())


LOW_RANK = (
    LoRA(rank=5, alpha=2.0),
    LoRA(rank=5, alpha=2.0, tucker=True),
    TLoRA(rank=3, alpha=2.0),
    LoRA(rank=17, alpha=2.0),
)


@pytest.mark.parametrize("algorithm", LOW_RANK, ids=str)
def test_a_lora_keeps_the_best_of_a_rank(algorithm: Algorithm, tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", algorithm)
    report = resize(file, tmp_path / "b.safetensors", rank=2)
    before, after = moved((file, 1.0)), moved((tmp_path / "b.safetensors", 1.0))
    for row in report.rows:
        key = f"{row.layer}.weight"
        assert (row.after, row.rank) == ("LoRA", 2)
        assert row.error == pytest.approx(best(before[key], 2), rel=1e-4)
        assert distance(after, before, [key]) == pytest.approx(row.error, rel=1e-4)
        assert row.size == pytest.approx(float(before[key].norm()), rel=1e-5)
        assert row.energy == 1 - row.error**2
    assert report.error == pytest.approx(distance(after, before), rel=1e-4)
    assert report.ranks[1] == 2 * len(LAYERS)
    with open_file(tmp_path / "b.safetensors") as source:
        assert float(source.read("lycoris_block_to_q.alpha")) == 2.0


def test_no_product_of_a_layers_size_is_formed(tmp_path: Path) -> None:
    """A layer of 40,000 x 30,000 would take 4.8 GB."""
    torch.manual_seed(0)
    up, down = torch.randn(40_000, 6), torch.randn(6, 30_000)
    tensors = {"lycoris_wide.lora_up.weight": up, "lycoris_wide.lora_down.weight": down}
    write_file(tmp_path / "a.safetensors", tensors, {})
    report = resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", rank=4)
    with open_file(tmp_path / "b.safetensors") as source:
        found = (source.read("lycoris_wide.lora_up.weight"), source.read("lycoris_wide.lora_down.weight"))
    q, r = torch.linalg.qr(up.double())
    s = torch.linalg.svdvals(r @ down.double())
    assert report.rows[0].error == pytest.approx(float(s[4:].norm() / s.norm()), rel=1e-5)
    kept = torch.linalg.svdvals(torch.linalg.qr(found[0].double()).R @ found[1].double())
    torch.testing.assert_close(kept, s[:4], rtol=1e-5, atol=0)
    assert q.shape == up.shape


def test_dylora_keeps_its_first_ranks(tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", DyLoRA(rank=6, alpha=3.0), [nn.Linear])
    report = resize(file, tmp_path / "b.safetensors", rank=4)
    with open_file(file) as old, open_file(tmp_path / "b.safetensors") as new:
        for layer in ("block_to_q", "block_ff"):
            up, down = (f"lycoris_{layer}.lora_{half}.weight" for half in ("up", "down"))
            assert torch.equal(new.read(up), old.read(up)[:, :4])
            assert torch.equal(new.read(down), old.read(down)[:4])
            assert float(new.read(f"lycoris_{layer}.alpha")) == 2.0  # the scale of training
    assert {row.after for row in report.rows} == {"DyLoRA"}
    before, after = moved((file, 1.0)), moved((tmp_path / "b.safetensors", 1.0))
    for row in report.rows:
        assert distance(after, before, [f"{row.layer}.weight"]) == pytest.approx(row.error, rel=1e-4)
    loaded = nerine.load(Model(), tmp_path / "b.safetensors", strict=True)
    assert {row.algorithm for row in loaded.report.rows} == {"DyLoRA(rank=4, alpha=2.0)"}


def test_by_energy_a_dylora_is_a_lora_in_order(tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", DyLoRA(rank=6, alpha=3.0), "to_q")
    (row,) = resize(file, tmp_path / "b.safetensors", energy=0.9).rows
    assert row.after == "LoRA"
    assert row.error == pytest.approx(best(moved((file, 1.0))["block.to_q.weight"], row.rank or 0), rel=1e-4)


@pytest.mark.parametrize("both", [False, True], ids=["one", "both"])
@pytest.mark.parametrize("tucker", [False, True], ids=["pair", "tucker"])
def test_lokr_is_cut_in_its_second_factor(both: bool, tucker: bool, tmp_path: Path) -> None:
    algorithm = LoKr(rank=2, alpha=3.0, factor=2, decompose_both=both, tucker=tucker)
    file = adapter_of(tmp_path / "a.safetensors", algorithm)
    report = resize(file, tmp_path / "b.safetensors", rank=1)
    before, after = moved((file, 1.0)), moved((tmp_path / "b.safetensors", 1.0))
    cut = [row for row in report.rows if row.rank == 1]
    assert len(cut) >= 3
    for row in cut:
        key = f"{row.layer}.weight"
        assert row.after == "LoKr"
        assert distance(after, before, [key]) == pytest.approx(row.error, rel=1e-4)
        assert 0 < row.error < 1
        assert row.size == pytest.approx(float(before[key].norm()), rel=1e-5)


@pytest.mark.parametrize("based", [False, True], ids=["alone", "beside the base"])
def test_glora_is_cut_in_both_parts(based: bool, tmp_path: Path) -> None:
    """Beside the base what is said is what is lost, and it is not more than without."""
    file = adapter_of(tmp_path / "a.safetensors", GLoRA(rank=4, alpha=3.0))
    report = resize(file, tmp_path / "b.safetensors", rank=2, base=base_of(tmp_path) if based else None)
    blind = resize(file, tmp_path / "c.safetensors", rank=2)
    before, after = moved((file, 1.0)), moved((tmp_path / "b.safetensors", 1.0))
    alone = moved((tmp_path / "c.safetensors", 1.0))
    assert {(row.after, row.rank) for row in report.rows} == {("GLoRA", 2)}
    for row in report.rows:
        key = f"{row.layer}.weight"
        if based:
            assert distance(after, before, [key]) == pytest.approx(row.error, rel=1e-4)
    assert 0.05 < distance(after, before) <= distance(alone, before)
    assert len(blind.rows) == len(report.rows)


def test_loha_is_fitted_of_fewer_ranks(tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", LoHa(rank=3, alpha=2.0))
    report = resize(file, tmp_path / "b.safetensors", rank=2)
    before, after = moved((file, 1.0)), moved((tmp_path / "b.safetensors", 1.0))
    for row in report.rows:
        assert (row.after, row.rank_before, row.rank) == ("LoHa", 3, 2)
        assert 0 < row.error < 0.9
        assert distance(after, before, [f"{row.layer}.weight"]) == pytest.approx(row.error, rel=1e-3)
    by_energy = resize(file, tmp_path / "c.safetensors", energy=0.5)
    assert {row.note for row in by_energy.rows} == {"a LoHa is resized by rank alone, or converted to a LoRA first"}
    assert_close(moved((tmp_path / "c.safetensors", 1.0)), before, 1e-7)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("inner", [LoRA(rank=4, alpha=3.0), LoKr(rank=2, alpha=3.0, factor=2)], ids=str)
def test_dora_around_it_keeps_its_magnitudes_or_has_them_fitted(inner: Algorithm, axis: str, tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", DoRA(inner, axis=axis), [nn.Linear])
    report = resize(file, tmp_path / "b.safetensors", rank=1)
    fitted = resize(file, tmp_path / "c.safetensors", rank=1, base=base_of(tmp_path))
    assert {row.after for row in (*report.rows, *fitted.rows)} == {f"DoRA({type(inner).__name__})"}
    with (
        open_file(file) as old,
        open_file(tmp_path / "b.safetensors") as new,
        open_file(tmp_path / "c.safetensors") as c,
    ):
        for key in (key for key in old.keys if key.endswith("dora_scale")):
            assert torch.equal(old.read(key), new.read(key))
            assert (c.read(key).abs() < old.read(key).abs()).all()  # by the cosine of an angle
    before = moved((file, 1.0))
    kept, better = (distance(moved((tmp_path / f"{name}.safetensors", 1.0)), before) for name in "bc")
    assert better < kept < 0.9


def test_what_has_no_rank_stays_to_the_bit(tmp_path: Path) -> None:
    model = Model()
    rules = [
        nerine.Rule("norm", Norm()),
        nerine.Rule("to_q", Full()),
        nerine.Rule("conv", IA3()),
        nerine.Rule("point", DiagOFT(block_size=4)),
        nerine.Rule("ff", LoKr(full_matrix=True)),
    ]
    file = tmp_path / "a.safetensors"
    nerine.save(stirred(nerine.attach(model, rules)), file)
    report = resize(file, tmp_path / "b.safetensors", rank=1)
    with open_file(file) as old, open_file(tmp_path / "b.safetensors") as new:
        assert old.keys == new.keys
        assert all(torch.equal(old.read(key), new.read(key)) for key in old.keys)
    notes = {row.layer: row.note for row in report.rows}
    assert notes == {
        "block.norm": "",
        "block.to_q": "Full has no rank",
        "block.conv": "IA3 has no rank",
        "block.point": "DiagOFT has no rank",
        "block.ff": "LoKr with a whole second factor",
    }


def test_a_rank_that_is_there_changes_nothing(tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", LoRA(rank=3, alpha=2.0, tucker=True))
    report = resize(file, tmp_path / "b.safetensors", rank=8)
    assert {row.note for row in report.rows} == {"it has 3 ranks already"}
    assert report.error == 0.0
    assert_close(moved((tmp_path / "b.safetensors", 1.0)), moved((file, 1.0)), 1e-7)


def test_kernels_may_have_a_rank_of_their_own(tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", LoRA(rank=5, alpha=2.0))
    report = resize(file, tmp_path / "b.safetensors", rank=3, conv_rank=2)
    ranks = {row.layer: row.rank for row in report.rows}
    assert ranks == {"block.to_q": 3, "block.ff": 3, "block.conv": 2, "block.point": 2}
    only = resize(file, tmp_path / "c.safetensors", conv_rank=2)
    assert {row.rank for row in only.rows} == {2, 5}


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_an_energy_is_kept_with_the_fewest_ranks(energy: float, tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", LoRA(rank=8, alpha=2.0))
    report = resize(file, tmp_path / "b.safetensors", energy=energy, rank=6)
    before = moved((file, 1.0))
    for row in report.rows:
        change = before[f"{row.layer}.weight"]
        wanted = next(rank for rank in range(1, 9) if 1 - best(change, rank) ** 2 >= energy)
        assert row.rank == min(6, wanted)


# -- into a size -------------------------------------------------------------------------------------------------------
def uneven(file: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Layers of very different sizes and spectra."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for number, (out, inputs, size) in enumerate([(40, 24, 1.0), (200, 30, 0.1), (24, 400, 3.0), (64, 64, 0.01)]):
        decay = torch.linspace(1, 0.1 * (number + 1), 12)[:, None] * size
        stem = f"lycoris_blocks_{number}_proj"
        tensors[f"{stem}.lora_up.weight"] = torch.randn(out, 12, generator=generator).to(dtype)
        tensors[f"{stem}.lora_down.weight"] = (decay * torch.randn(12, inputs, generator=generator)).to(dtype)
        tensors[f"{stem}.alpha"] = torch.tensor(6.0)
    write_file(file, tensors, {})
    return file


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_size_is_kept_and_used(share: float, dtype: torch.dtype, tmp_path: Path) -> None:
    file = uneven(tmp_path / "a.safetensors", dtype)
    whole = file.stat().st_size
    size = int(share * whole)
    report = resize(file, tmp_path / "b.safetensors", size=size)
    found = (tmp_path / "b.safetensors").stat().st_size
    largest = max(out + inputs for out, inputs in ((40, 24), (200, 30), (24, 400), (64, 64)))
    assert size - 2 * largest * dtype.itemsize < found <= size
    assert report.written.bytes == found
    assert report.bytes_before == whole
    ranks = [row.rank or 0 for row in report.rows]
    assert ranks[3] == min(ranks) >= 1  # a hundredth of the others
    dry = resize(file, tmp_path / "c.safetensors", size=size, dry_run=True)
    assert dry.rows == report.rows
    assert dry.written.bytes == found
    assert not (tmp_path / "c.safetensors").exists()


def test_a_size_that_cannot_be_kept(tmp_path: Path) -> None:
    file = uneven(tmp_path / "a.safetensors")
    with pytest.raises(OptionError, match=r"with one rank in each layer the file still has [\d,]+ bytes"):
        resize(file, tmp_path / "b.safetensors", size=1000)
    assert {p.name for p in tmp_path.iterdir()} == {"a.safetensors"}


def test_the_shares_leave_out_the_least() -> None:
    """Against all ways to share out the ranks of three layers."""
    generator = torch.Generator().manual_seed(1)
    squares = [torch.rand(4, generator=generator).sort(descending=True).values.double() * f for f in (1.0, 3.0, 0.2)]
    units = [7, 7, 7]
    for room in range(21, 85):
        found = shares(squares, units, [4, 4, 4], room)
        ways = [(a, b, c) for a in range(1, 5) for b in range(1, 5) for c in range(1, 5) if 7 * (a + b + c) <= room]
        least = min(sum(float(s[k:].sum()) for s, k in zip(squares, way, strict=True)) for way in ways)
        assert sum(float(s[k:].sum()) for s, k in zip(squares, found, strict=True)) == pytest.approx(least)
    assert shares(squares, units, [2, 4, 1], 700) == [2, 4, 1]


# -- sd-scripts' rules, by hand ----------------------------------------------------------------------------------------
def test_the_dynamic_rules() -> None:
    s = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.25])
    for method, param, wanted in (
        ("sv_ratio", 3.0, 3),  # two are above 4/3, and one more
        ("sv_ratio", 100.0, 5),  # all of them, and no more than are there
        ("sv_cumulative", 0.7, 3),  # 6 of 7.75 reach 70 %
        ("sv_fro", 0.9, 3),  # 20 of 21.3 reach 0.81, and one more
        ("sv_fro", 0.1, 2),
    ):
        assert Choice(method=method, param=param).keep(s, 64, False) == wanted, method
        assert Choice(method=method, param=param, rank=2).keep(s, 64, False) == 2
        assert Choice(method=method, param=param).keep(s * 1e-7, 64, False) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "expected a rank, or one of energy, size and method, got none"),
        ({"energy": 0.9, "size": 100}, "got energy and size"),
        ({"energy": 1.5}, "energy is a share from 0 to 1"),
        ({"rank": 0}, "rank"),
        ({"rank": -2}, "rank must be a whole number of at least 1"),
        ({"method": "sv_rato", "param": 2.0}, "Did you mean 'sv_ratio'"),
        ({"method": "sv_ratio"}, "a method and its param go together"),
        ({"method": "sv_fro", "param": -1.0}, "param must be a number above 0"),
    ],
)
def test_rules_that_make_no_sense(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", LoRA(rank=2), "to_q")
    with pytest.raises(OptionError, match=words):
        resize(file, tmp_path / "b.safetensors", **options)


# -- surroundings ------------------------------------------------------------------------------------------------------
def test_the_file_stays_what_it_was_otherwise(tmp_path: Path) -> None:
    network = stirred(nerine.attach(Model(), LoRA(rank=4, alpha=1.0), targets=[nn.Linear]))
    told = {"ss_network_module": "networks.lora", "ss_tag_frequency": "{}", "sshs_model_hash": "0"}
    nerine.save(network, tmp_path / "a.safetensors", dialect="kohya", metadata=told, dtype=torch.bfloat16)
    report = resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", rank=2, metadata={"more": "said"})
    assert report.written.dialect == "kohya"
    with open_file(tmp_path / "b.safetensors") as source:
        assert {source.dtype(key) for key in source.keys if "alpha" not in key} == {torch.bfloat16}
        told = dict(source.metadata)
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("2", "2.0")
    assert (told["ss_network_module"], told["ss_tag_frequency"], told["more"]) == ("networks.lora", "{}", "said")
    assert "sshs_model_hash" not in told
    resize(tmp_path / "a.safetensors", tmp_path / "c.safetensors", rank=2, dialect="diffusers", dtype=torch.float32)
    assert distance(moved((tmp_path / "c.safetensors", 1.0)), moved((tmp_path / "b.safetensors", 1.0))) < 0.01


def test_comfyuis_magnitudes_need_the_base(tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", DoRA(LoRA(rank=3)), [nn.Linear], dialect="comfy")
    with pytest.raises(FormatError, match="what it is in full is known only beside"):
        resize(file, tmp_path / "b.safetensors", rank=1)
    resize(file, tmp_path / "b.safetensors", rank=1, base=base_of(tmp_path))
    ours = weights((tmp_path / "b.safetensors", 1.0))
    assert distance(ours, weights((file, 1.0)), ["block.ff.weight", "block.to_q.weight"]) < 0.9


def test_a_pipeline_s_parts_stay_apart(tmp_path: Path) -> None:
    parts = nn.ModuleDict({"unet": Model(), "text_encoder": nn.ModuleDict({"proj": nn.Linear(6, 9)})})
    network = stirred(nerine.attach(parts, LoRA(rank=3)))
    nerine.save(network, tmp_path / "a.safetensors", dialect="kohya")
    report = resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", rank=1)
    with open_file(tmp_path / "a.safetensors") as old, open_file(tmp_path / "b.safetensors") as new:
        assert old.keys == new.keys
    assert re.search(r"ranks in all: 15 -> 5; bytes: [\d,]+ -> [\d,]+;", str(report))
    assert report.to_dict()["ranks"] == (15, 5)
