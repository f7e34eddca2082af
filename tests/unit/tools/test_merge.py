"""Merging into checkpoints: the same bits as merging in a model, whatever the algorithm, format and form on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nerine
from contract.cases import ONE_OF_EACH
from nerine.algorithms import Algorithm
from nerine.errors import FormatError, MergeError, OptionError, TargetError
from nerine.ops.rounding import stochastic, ulps
from nerine.tools import merge, unmerge

FORMATS = [torch.float32, torch.bfloat16, torch.float16]


class Model(nn.Module):
    """Layers of every kind that a checkpoint shows: linear, convolutions, norms, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Conv2d(6, 12, 3)
        self.blocks = nn.ModuleList([nn.Linear(12, 18), nn.Linear(18, 12)])
        self.along = nn.Conv1d(12, 6, 3)
        self.norm = nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 2)


def model(dtype: torch.dtype = torch.float32, seed: int = 3) -> Model:
    torch.manual_seed(seed)
    made = Model().to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return made.requires_grad_(False)


def trained(on: nn.Module, what: Any, file: Path, seed: int = 5, targets: Any = "all", **options: Any) -> Path:
    """A file of an adapter with values that are none of its first ones."""
    network = nerine.attach(on, what, targets=targets, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    nerine.save(network, file)
    network.detach()
    return file


def same_bits(file: Path, tensors: dict[str, Tensor]) -> None:
    """Bit by bit in formats narrower than that of the sum; of fp32 itself the last bits depend on where in memory the
    processor finds the factors of a product."""
    found = load_file(file)
    assert set(found) == set(tensors)
    for key, want in tensors.items():
        assert found[key].dtype == want.dtype, key
        if want.dtype == torch.float32:
            torch.testing.assert_close(found[key], want, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(found[key].view(torch.uint8), want.contiguous().view(torch.uint8)), key


def merged_in_memory(on: nn.Module, files: Iterable[tuple[Path, Any]]) -> dict[str, Tensor]:
    names = []
    for i, (file, strength) in enumerate(files):
        nerine.load(on, file, strength=strength, name=f"a{i}")
        names.append(f"a{i}")
    network = nerine.Network.of(on)
    network.merge(keep_original=False)
    network.detach()
    return dict(on.state_dict())


def suited(algorithm: Algorithm) -> str | list[str]:
    return "norm" if algorithm.kinds == {"norm"} else ["inlet", "blocks", "along", "attention"]


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("algorithm", ONE_OF_EACH, ids=str)
def test_a_merged_file_has_the_bits_of_a_merged_model(algorithm: Algorithm, dtype: torch.dtype, tmp_path: Path) -> None:
    save_file(model(dtype).state_dict(), tmp_path / "base.safetensors")
    adapter = trained(model(dtype), algorithm, tmp_path / "a.safetensors", targets=suited(algorithm))
    report = merge(tmp_path / "base.safetensors", [(adapter, 0.75)], tmp_path / "out.safetensors", verify=4)
    same_bits(tmp_path / "out.safetensors", merged_in_memory(model(dtype), [(adapter, 0.75)]))
    assert report.written
    assert report.verified is not None
    assert report.verified.holds
    before = load_file(tmp_path / "base.safetensors")
    changed = [key for key, t in load_file(tmp_path / "out.safetensors").items() if not torch.equal(t, before[key])]
    assert 0 < len(changed) <= report.changed, "every layer that moved is one of those that were reported"


def test_several_adapters_are_one_sum_with_one_rounding(tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    save_file(model(torch.bfloat16).state_dict(), base)
    kinds = [nerine.LoRA(rank=3, alpha=2), nerine.DoRA(nerine.LoKr(rank=1, factor=2)), nerine.DiagOFT(block_size=3)]
    files = [
        trained(model(), kind, tmp_path / f"{i}.safetensors", seed=i, targets=suited(kind), train_norm=not i)
        for i, kind in enumerate(kinds)
    ]
    strengths: list[Any] = [0.5, {"blocks": -0.25, "blocks.1": 1.5}, 0.125]
    pairs = list(zip(files, strengths, strict=True))
    report = merge(base, pairs, tmp_path / "out.safetensors")
    same_bits(tmp_path / "out.safetensors", merged_in_memory(model(torch.bfloat16), pairs))
    assert [one.strength for one in report.adapters] == strengths
    told = json.loads(safe_open(tmp_path / "out.safetensors", "pt").metadata()["nerine_merge"])
    assert told[0]["adapters"] == [["0.safetensors", 0.5], ["1.safetensors", strengths[1]], ["2.safetensors", 0.125]]


def test_strengths_by_pattern_must_match(tmp_path: Path) -> None:
    save_file(model().state_dict(), tmp_path / "base.safetensors")
    adapter = trained(model(), nerine.LoRA(rank=2), tmp_path / "a.safetensors")
    with pytest.raises(TargetError, match="no adapted layer matches 'blokcs'"):
        merge(tmp_path / "base.safetensors", [(adapter, {"blokcs": 0.5})], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_another_format_and_untouched_tensors(tmp_path: Path) -> None:
    whole = {**model().state_dict(), "steps": torch.tensor(7), "ids": torch.arange(5)}
    save_file(whole, tmp_path / "base.safetensors", {"modelspec.title": "base", "modelspec.hash_sha256": "0xab"})
    adapter = trained(model(), nerine.LoRA(rank=2), tmp_path / "a.safetensors", targets="blocks")
    report = merge(tmp_path / "base.safetensors", [adapter], tmp_path / "out.safetensors", dtype=torch.bfloat16)
    found = load_file(tmp_path / "out.safetensors")
    assert found["steps"].item() == 7
    assert found["ids"].dtype == torch.int64
    assert torch.equal(found["norm.weight"], whole["norm.weight"].bfloat16())
    assert report.changed == 2
    assert report.tensors == len(whole)
    assert report.dtype == "bfloat16"
    told = safe_open(tmp_path / "out.safetensors", "pt").metadata()
    assert told["modelspec.title"] == "base"
    assert "modelspec.hash_sha256" not in told


def test_fp8_weights_are_changed_in_fp32(tmp_path: Path) -> None:
    save_file({k: t.to(torch.float8_e4m3fn) for k, t in model().state_dict().items()}, tmp_path / "base.safetensors")
    adapter = trained(model(), nerine.LoRA(rank=2), tmp_path / "a.safetensors", targets="blocks")
    merge(tmp_path / "base.safetensors", [(adapter, 20.0)], tmp_path / "out.safetensors")
    exact = model()
    exact.load_state_dict({k: t.float() for k, t in load_file(tmp_path / "base.safetensors").items()})
    want = merged_in_memory(exact, [(adapter, 20.0)])
    same_bits(tmp_path / "out.safetensors", {k: t.to(torch.float8_e4m3fn) for k, t in want.items()})


def test_unmerging_with_the_original_gives_its_bits(tmp_path: Path) -> None:
    base, out, back = (tmp_path / f"{name}.safetensors" for name in ("base", "out", "back"))
    save_file(model(torch.float16).state_dict(), base, {"format": "pt"})
    adapter = trained(model(), nerine.DoRA(nerine.LoHa(rank=2, alpha=1)), tmp_path / "a.safetensors")
    merge(base, [(adapter, 0.8)], out)
    report = unmerge(out, [(adapter, 0.8)], back, original=base)
    assert report.restored == report.changed > 0
    assert back.read_bytes() == base.read_bytes()


def test_unmerging_keeps_what_else_was_changed(tmp_path: Path) -> None:
    base, out, more, back = (tmp_path / f"{name}.safetensors" for name in ("base", "out", "more", "back"))
    save_file(model().state_dict(), base)
    adapter = trained(model(), nerine.LoKr(full_matrix=True), tmp_path / "a.safetensors", targets="blocks")
    merge(base, [adapter], out)
    tensors = load_file(out)
    tensors["blocks.0.weight"] += 0.5
    tensors["norm.bias"] += 0.25
    save_file(tensors, more)
    report = unmerge(more, [adapter], back, original=base)
    assert report.restored == report.changed - 1
    found, before = load_file(back), load_file(base)
    assert torch.allclose(found["blocks.0.weight"], before["blocks.0.weight"] + 0.5, atol=1e-6)
    assert torch.equal(found["blocks.1.weight"], before["blocks.1.weight"])
    assert torch.equal(found["norm.bias"], before["norm.bias"] + 0.25)


def test_unmerging_without_the_original_subtracts_what_can_be_subtracted(tmp_path: Path) -> None:
    base, out, back = (tmp_path / f"{name}.safetensors" for name in ("base", "out", "back"))
    save_file(model().state_dict(), base)
    lora = trained(model(), nerine.LoRA(rank=2, alpha=3), tmp_path / "a.safetensors")
    dora = trained(model(), nerine.DoRA(nerine.LoRA(rank=2)), tmp_path / "d.safetensors")
    merge(base, [(lora, 0.7)], out)
    unmerge(out, [(lora, 0.7)], back)
    before = load_file(base)
    assert max(float((t - before[k]).abs().max()) for k, t in load_file(back).items()) < 1e-6
    with pytest.raises(MergeError, match=r"DoRA adds depends on the weight.*--original"):
        unmerge(out, [dora], back, force=True)


def test_rounding_by_chance_keeps_small_changes_in_the_mean(tmp_path: Path) -> None:
    base, small = tmp_path / "base.safetensors", tmp_path / "a.safetensors"
    save_file(model(torch.bfloat16).state_dict(), base)
    adapter = trained(model(), nerine.Full(), small, targets="blocks")
    exact = merged_in_memory(
        model(torch.bfloat16).float(), [(adapter, 0.01)]
    )  # less than half a step of bf16 almost everywhere

    def error(seed: int | None, count: int) -> float:
        total = torch.zeros_like(exact["blocks.0.weight"])
        for i in range(count):
            merge(base, [(adapter, 0.01)], tmp_path / "out.safetensors", seed=None if seed is None else i, force=True)
            total += load_file(tmp_path / "out.safetensors")["blocks.0.weight"].float()
        return float((total / count - exact["blocks.0.weight"]).norm())

    assert error(0, 40) < 0.35 * error(None, 1)
    assert error(7, 1) > 0, "one draw is not the mean"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_stochastic_rounding_lands_beside_the_number(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(1)
    exact = torch.cat([torch.randn(4000, generator=rng), torch.tensor([0.0, 1e-9, -1e-9, 1.0, -1.0])])
    like = torch.empty((), dtype=dtype)
    drawn = torch.stack([stochastic(exact, like, rng).float() for _ in range(300)])
    low, high = drawn.min(0).values, drawn.max(0).values
    assert bool(((low <= exact) & (exact <= high) | (low == high)).all())
    assert int(ulps(low.to(dtype), high.to(dtype)).max()) <= 1
    step = (high - low).clamp_min(1e-12)
    assert float(((drawn.mean(0) - exact) / step)[high > low].abs().max()) < 0.15  # 5 σ of 300 draws
    assert torch.equal(drawn[0][-2:], exact[-2:])


def test_a_weight_that_overflows_is_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    save_file(model(torch.float16).state_dict(), tmp_path / "base.safetensors")
    adapter = trained(model(), nerine.LoRA(rank=2), tmp_path / "a.safetensors", targets="blocks")
    with pytest.raises(MergeError, match=r"blocks.*not finite in float16.*--dtype bf16"):
        merge(tmp_path / "base.safetensors", [(adapter, 1e9)], tmp_path / "out.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "base.safetensors"]


def test_packed_weights_and_missing_biases_are_refused(tmp_path: Path) -> None:
    adapter = trained(model(), nerine.Full(), tmp_path / "a.safetensors", targets="blocks.0")
    tensors = {**model().state_dict()}
    tensors.pop("blocks.0.bias")
    save_file(tensors, tmp_path / "bare.safetensors")
    with pytest.raises(MergeError, match=r"blocks\.0: the adapter moves a bias, and the layer has none"):
        merge(tmp_path / "bare.safetensors", [adapter], tmp_path / "out.safetensors")
    tensors["blocks.0.weight"] = torch.zeros(108, 1, dtype=torch.uint8)
    save_file(tensors, tmp_path / "packed.safetensors")
    with pytest.raises(FormatError, match="belongs to this model"):
        merge(tmp_path / "packed.safetensors", [adapter], tmp_path / "out.safetensors")


def test_inputs_are_never_overwritten_and_other_files_only_by_force(tmp_path: Path) -> None:
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file(model().state_dict(), base)
    adapter = trained(model(), nerine.LoRA(rank=2), tmp_path / "a.safetensors")
    before = base.read_bytes()
    for target in (base, adapter, tmp_path):
        with pytest.raises(OptionError, match=r"is read|lies in this folder"):
            merge(base, [adapter], target, force=True)
    out.write_text("precious")
    with pytest.raises(OptionError, match="--force"):
        merge(base, [adapter], out)
    assert out.read_text() == "precious"
    assert base.read_bytes() == before
    report = merge(base, [adapter], out, dry_run=True, force=True)
    assert out.read_text() == "precious"
    assert not report.written
    assert report.changed > 0
    assert "dry run" in str(report)
    assert merge(base, [adapter], out, force=True).bytes == out.stat().st_size


def test_what_an_adapter_has_no_layer_for_is_said(tmp_path: Path) -> None:
    save_file(model().state_dict(), tmp_path / "base.safetensors")
    file = trained(model(), nerine.LoRA(rank=2), tmp_path / "a.safetensors", targets="blocks")
    extra = {**load_file(file), "lycoris_tail.lora_up.weight": torch.ones(2, 2)}
    save_file({**extra, "lycoris_tail.lora_down.weight": torch.ones(2, 2)}, file)
    report = merge(tmp_path / "base.safetensors", [file], tmp_path / "out.safetensors")
    assert "2 keys not used" in str(report)
    assert report.to_dict()["adapters"][0]["counts"]["keys not used"] == 2
    with pytest.raises(MergeError, match="2 of its keys belong to no layer"):
        merge(tmp_path / "base.safetensors", [file], tmp_path / "out.safetensors", strict=True, force=True)
    with pytest.raises(OptionError, match="no adapter"):
        merge(tmp_path / "base.safetensors", [], tmp_path / "o.safetensors")


# -- models in several files --------------------------------------------------------------------------------------
def in_pieces(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """A checkpoint in two files with an index, and settings beside it."""
    folder.mkdir()
    keys = sorted(tensors)
    halves = keys[::2], keys[1::2]
    for i, half in enumerate(halves):
        save_file({key: tensors[key] for key in half}, folder / f"model-{i + 1}-of-2.safetensors")
    weight_map = {key: f"model-{i + 1}-of-2.safetensors" for i, half in enumerate(halves) for key in half}
    size = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("by_index", [False, True])
def test_a_checkpoint_in_pieces_becomes_one_in_pieces(by_index: bool, tmp_path: Path) -> None:
    folder = in_pieces(tmp_path / "base", dict(model().state_dict()))
    adapter = trained(model(), nerine.LoRA(rank=2), tmp_path / "a.safetensors")
    base = folder / "model.safetensors.index.json" if by_index else folder
    merge(base, [adapter], tmp_path / "out", dtype=torch.float16)
    want = {k: t.half() for k, t in merged_in_memory(model(), [(adapter, 1.0)]).items()}
    found = {k: t for i in (1, 2) for k, t in load_file(tmp_path / "out" / f"model-{i}-of-2.safetensors").items()}
    assert set(found) == set(want)
    assert all(torch.equal(found[key], t) for key, t in want.items())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in want.values())
    assert (tmp_path / "out" / "config.json").exists() is not by_index
    with pytest.raises(FormatError, match="in several files, so this is a folder"):
        merge(base, [adapter], tmp_path / "out.safetensors")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_missing_piece_is_named(tmp_path: Path) -> None:
    folder = in_pieces(tmp_path / "base", dict(model().state_dict()))
    adapter = trained(model(), nerine.LoRA(rank=2), tmp_path / "a.safetensors")
    (folder / "model-2-of-2.safetensors").unlink()
    with pytest.raises(FormatError, match=r"names 2 files, and model-2-of-2\.safetensors is not there"):
        merge(folder, [adapter], tmp_path / "out")


def test_a_folder_takes_the_place_of_another_whole(tmp_path: Path) -> None:
    folder = in_pieces(tmp_path / "base", dict(model().state_dict()))
    adapter = trained(model(), nerine.LoRA(rank=2), tmp_path / "a.safetensors")
    old = tmp_path / "out"
    old.mkdir()
    (old / "precious.txt").write_text("here")
    bad = trained(model(), nerine.LoRA(rank=2), tmp_path / "b.safetensors", targets="blocks")
    with pytest.raises(MergeError, match="not finite"):
        merge(folder, [(bad, 1e30)], old, dtype=torch.float16, force=True)
    assert [p.name for p in old.iterdir()] == ["precious.txt"]
    merge(folder, [adapter], old, force=True)
    assert not (old / "precious.txt").exists()
    assert (old / "config.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["base", "out"]
