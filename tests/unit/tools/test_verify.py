"""A verification holds for what is sound, with figures that are those of rounding, and fails for what is not."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nerine
from nerine import (
    BOFT,
    IA3,
    DiagOFT,
    DoRA,
    DyLoRA,
    FormatError,
    Full,
    GLoRA,
    LoHa,
    LoKr,
    LoRA,
    Norm,
    OFTv2,
    OptionError,
    ShapeError,
    TLoRA,
)
from nerine.algorithms import Algorithm
from nerine.files.dialects import DIALECTS
from nerine.files.dialects.kohya import Kohya
from nerine.files.store import write_file
from nerine.tools.verify import VerifyReport, verify
from nerine.tools.weights import Weights

ALGORITHMS = (
    LoRA(rank=2, alpha=1),
    LoRA(rank=2, alpha=1, tucker=True),
    LoRA(rank=2, alpha=1, scalar=True),
    DyLoRA(rank=2, alpha=1),
    TLoRA(rank=2, alpha=1),
    LoHa(rank=2, alpha=1),
    LoKr(rank=1, alpha=2, factor=2),
    GLoRA(rank=2, alpha=1),
    Full(),
    IA3(),
    IA3(on_input=True),
    DiagOFT(block_size=2, rescale=True),
    DiagOFT(block_size=2, constraint=0.1),
    BOFT(block_size=2),
    OFTv2(block_size=2),
    DoRA(LoRA(rank=2, alpha=1)),
    DoRA(LoKr(rank=1, alpha=2, factor=2)),
    DoRA(LoHa(rank=2, alpha=1), axis="in"),
    DoRA(BOFT(block_size=2)),
)
DENSE = ("to_q", "ff", "conv", "up", "down")


class Block(nn.Module):
    """Layers of every kind, none of them square."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.to_q = nn.Linear(12, 8)
        self.ff = nn.Linear(12, 20, bias=False)
        self.conv = nn.Conv2d(6, 8, 3)
        self.down = nn.Conv1d(4, 6, 1)
        self.up = nn.ConvTranspose2d(6, 4, 2)


class Model(nn.Module):
    def __init__(self, seed: int = 7) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.experts = nn.Parameter(torch.empty(3, 6, 4))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def save_base(file: Path, model: nn.Module, dtype: torch.dtype = torch.float32) -> Path:
    write_file(file, {name: t.detach().to(dtype).contiguous() for name, t in model.state_dict().items()}, {})
    return file


def save_adapter(
    file: Path, model: nn.Module, algorithm: Any, amount: float = 0.1, dialect: str = "lycoris", **options: Any
) -> Path:
    """An adapter that was trained a little: no tensor is as it started."""
    dtype = options.pop("dtype", None)
    network = nerine.attach(model, algorithm, generator=torch.Generator().manual_seed(2), **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    nerine.save(network, file, dialect=dialect, dtype=dtype)
    network.detach()
    return file


@dataclass
class Given:
    """A base and an adapter for it on the disk."""

    folder: Path
    model: nn.Module
    base: Path

    def adapter(self, algorithm: Any, name: str = "adapter.safetensors", **options: Any) -> Path:
        return save_adapter(self.folder / name, self.model, algorithm, **options)

    def changed(self, file: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
        """The adapter with other tensors in it, and the same metadata."""
        from nerine.files.store import open_file

        with open_file(file) as source:
            tensors = {key: source.read(key) for key in source.keys}
            metadata = dict(source.metadata)
        change(tensors)
        write_file(file, tensors, metadata)
        return file


@pytest.fixture
def given(tmp_path: Path) -> Given:
    model = Model()
    return Given(tmp_path, model, save_base(tmp_path / "base.safetensors", model))


def promise(report: VerifyReport, name: str) -> Any:
    return next(p for p in report.promises if p.name == name)


# -- what holds --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_every_algorithm_holds(given: Given, algorithm: Algorithm) -> None:
    report = verify(given.adapter(algorithm, targets=list(DENSE)), given.base, doubled=100)
    assert report.holds, str(report)
    assert {row.layer for row in report.layers} == {f"blocks.{i}.{name}" for i in range(2) for name in DENSE}
    for row in report.layers:  # a few roundings of the output in each format: 6e-8 and 1e-16 of it
        assert row.change > 1e-4
        assert row.trained is not None
        assert row.trained64 is not None
        assert row.trained * row.change < 1e-6
        assert row.trained64 * row.change < 1e-14
    assert all(row.lost < 1e-4 for row in report.layers if row.lost is not None)  # the base is in fp32
    own = {name for name, dialect in DIALECTS.items() if promise(report, f"reload: {name}").layers}
    assert {"lycoris", "bare", "hcp"} <= own
    for row in report.layers:
        assert row.reloaded["lycoris"] == 0  # bit for bit
        assert all(off < 1e-5 for off in row.reloaded.values())


def test_figures_of_rounding_are_not_zero(given: Given) -> None:
    """Nothing was compared with itself."""
    report = verify(given.adapter(DoRA(LoRA(rank=2, alpha=1)), targets=list(DENSE)), given.base, doubled=100)
    assert any(row.trained for row in report.layers)
    assert any(row.trained64 for row in report.layers)
    assert any(row.reloaded["comfy"] for row in report.layers)


def test_norms_embeddings_and_experts(given: Given) -> None:
    file = given.adapter(
        [nerine.Rule("norm", Norm()), nerine.Rule("*", LoRA(rank=2, alpha=1))],
        targets=["norm", "embed_tokens", "experts"],
    )
    report = verify(file, given.base)
    assert report.holds, str(report)
    trained = {row.layer: row.trained for row in report.layers}
    assert trained.keys() == {"blocks.0.norm", "blocks.1.norm", "embed_tokens", "experts"}
    assert trained["embed_tokens"] is not None
    assert trained["experts"] is trained["blocks.0.norm"] is None
    assert "3 layers compute with the changed weight itself" in str(report)


def test_several_algorithms_in_one_file(given: Given) -> None:
    rules = [nerine.Rule("to_q", DoRA(LoRA(rank=2))), nerine.Rule("conv", LoHa(rank=2)), nerine.Rule("ff", Full())]
    report = verify(given.adapter(rules, targets=["to_q", "conv", "ff"]), given.base)
    assert report.holds, str(report)
    assert {row.algorithm.split("(")[0] for row in report.layers} == {"DoRA", "LoHa", "Full"}
    assert promise(report, "reload: diffusers").layers == 2
    assert "refused 4" in promise(report, "reload: diffusers").why


def test_half_precision_of_the_file_is_allowed_for(given: Given) -> None:
    """Where a dialect multiplies the scale into a factor in fp16, W' is off by the last place of fp16."""
    file = given.adapter(TLoRA(rank=2, alpha=1.3), targets=["to_q"], dtype=torch.float16)
    report = verify(file, given.base)
    assert report.holds, str(report)
    assert 1e-5 < max(row.reloaded["diffusers"] for row in report.layers) < 3e-3


def test_factors_of_ia3_survive_half_precision(given: Given) -> None:
    """PEFT keeps 1 + w, which in fp16 would lose the last digits of a small w."""
    file = given.adapter(IA3(on_input=True), amount=0.01, targets=["ff"], dtype=torch.float16)
    report = verify(file, given.base)
    assert report.holds, str(report)
    assert all(row.reloaded["peft"] < 1e-4 for row in report.layers)


@pytest.mark.parametrize("dialect", ["kohya", "peft", "diffusers", "comfy"])
def test_files_of_other_dialects(given: Given, dialect: str) -> None:
    name = "folder" if dialect == "peft" else "adapter.safetensors"
    file = given.adapter(LoRA(rank=2, alpha=1), name, dialect=dialect, targets=["to_q", "conv"])
    report = verify(file, given.base)
    assert report.holds, str(report)
    assert report.dialect == dialect
    assert len(report.layers) == 4


def test_rows_of_a_fused_layer(tmp_path: Path) -> None:
    """An adapter for queries and values alone, on a base that has all three in one."""
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"to_qkv": nn.Linear(12, 24)})])})
    base = save_base(tmp_path / "base.safetensors", model)
    rules = [
        nerine.Rule("to_qkv", LoRA(rank=2, alpha=1), rows=(0, 8)),
        nerine.Rule("to_qkv", LoRA(rank=3, alpha=1), rows=(16, 24)),
    ]
    report = verify(save_adapter(tmp_path / "a.safetensors", model, rules, targets="to_qkv"), base)
    assert report.holds, str(report)
    assert {row.layer for row in report.layers} == {"blocks.0.to_qkv[0:8]", "blocks.0.to_qkv[16:24]"}
    assert all(row.reloaded["kohya"] < 1e-5 for row in report.layers)  # which has one layer of it


def test_a_change_that_is_small_beside_its_weight(given: Given) -> None:
    """fp32 rounds it on either way of computing; that is said, and is no failure."""
    file = given.adapter(DoRA(LoRA(rank=2, alpha=1)), amount=1e-5, targets=["to_q", "conv"])
    report = verify(file, given.base, doubled=0)
    rounded = [row for row in report.layers if row.trained is not None and row.trained > 1e-4]
    assert report.holds, str(report)
    assert rounded
    assert all(row.trained64 is not None and row.trained64 < 1e-8 for row in rounded)
    assert "fp32 rounds it by up to" in " ".join(report.notes)


def test_layers_that_change_nothing_are_told(given: Given) -> None:
    file = given.changed(
        given.adapter(LoRA(rank=2), targets=["to_q", "ff"]),
        lambda tensors: [t.zero_() for key, t in tensors.items() if key.endswith("to_q.lora_up.weight")],  # type: ignore[func-returns-value]
    )
    report = verify(file, given.base)
    still = {row.layer: row for row in report.layers if not row.change}
    assert report.holds, str(report)
    assert set(still) == {"blocks.0.to_q", "blocks.1.to_q"}
    assert "2 layers change nothing (first blocks.0.to_q)" in report.notes


def test_it_says_which_programs_are_off(given: Given) -> None:
    file = given.adapter(DoRA(LoRA(rank=2, alpha=1)), dialect="kohya", targets=["to_q", "ff"])
    report = verify(file, given.base)
    comfy = next(row for row in report.readers if row.reader == "ComfyUI")
    assert (comfy.exactly, comfy.approximately, comfy.better) == (0, 4, "comfy")
    assert comfy.worst is not None
    assert comfy.worst > 0.01
    assert "ComfyUI: divides a DoRA norm over outputs by that of the base; better as comfy" in str(report)


def test_without_base_factors_t_lora_is_taken_from_the_base(given: Given) -> None:
    file = given.adapter(TLoRA(rank=2, alpha=1), targets=["to_q"])

    def strip(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if ".base_" in key]:
            del tensors[key]

    report = verify(given.changed(file, strip), given.base)
    assert report.holds, str(report)
    assert any(
        "2 layers of T-LoRA (first blocks.0.to_q) come without what they started from" in n for n in report.notes
    )


# -- what does not -----------------------------------------------------------------------------------------------------
def assert_fails(report: VerifyReport, name: str, words: str) -> None:
    assert not report.holds
    assert not promise(report, name).holds
    assert words in str(report)
    assert str(report).endswith("train = merge = export = reload: DOES NOT HOLD")
    assert report.to_dict()["holds"] is False


@pytest.mark.parametrize("off", [2.0, 1.001])
def test_an_activation_face_that_computes_something_else(
    given: Given, monkeypatch: pytest.MonkeyPatch, off: float
) -> None:
    file = given.adapter(LoRA(rank=2, alpha=1), targets=["to_q", "conv"])
    add = LoRA.add
    monkeypatch.setattr(LoRA, "add", lambda self, p, call: add(self, p, call) * off)
    monkeypatch.setattr(LoRA, "output", Algorithm.output)
    report = verify(file, given.base, doubled=0)
    assert_fails(report, "train = merge, fp32", "training and merge differ by")
    assert all(row.trained64 == pytest.approx(off - 1, rel=1e-3) for row in report.layers)  # asked where fp32 differs
    assert promise(report, "merge, float32").holds
    assert promise(report, "reload: kohya").holds


def test_a_fused_output_that_computes_something_else(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    file = given.adapter(DoRA(LoRA(rank=2, alpha=1)), targets=["to_q"])
    output = DoRA.output
    monkeypatch.setattr(DoRA, "output", lambda self, p, call: output(self, p, call) * 1.01)
    assert_fails(verify(file, given.base), "train = merge, fp32", "training and merge differ by")


def test_a_changed_input_that_is_another(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    file = given.adapter(DoRA(LoRA(rank=2, alpha=1), axis="in"), targets=["to_q"])
    changed = DoRA.changed_input

    def other(self: DoRA, *args: Any) -> Any:
        found = changed(self, *args)
        return None if found is None else found._replace(x=found.x * 1.01)

    monkeypatch.setattr(DoRA, "changed_input", other)
    assert_fails(verify(file, given.base), "train = merge, fp32", "training and merge differ by")


def test_a_merge_that_sums_something_else(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    file = given.adapter(LoHa(rank=2, alpha=1), targets=["to_q"])
    monkeypatch.setattr(
        LoHa,
        "add_to",
        lambda self, total, p, weight, strength: total + 2 * self.weight_deviation(p, weight) * strength,
        raising=False,
    )
    assert_fails(verify(file, given.base), "merge, float32", "a merge differs from W + (W' - W) by")


def test_a_dialect_that_writes_other_numbers(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    file = given.adapter(LoKr(rank=1, alpha=2, factor=2), targets=["to_q", "ff"])
    emit = Kohya.emit
    monkeypatch.setattr(
        Kohya, "emit", lambda self, r, b: {k: t * 1.01 if k == "lokr_w1" else t for k, t in emit(self, r, b).items()}
    )
    report = verify(file, given.base)
    assert_fails(report, "reload: kohya", "kohya: W' is off by 1.0e-02 of the change after reading")
    assert [p.name for p in report.promises if not p.holds] == ["reload: kohya"]


def test_a_dialect_that_cannot_be_read_again(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    file = given.adapter(LoRA(rank=2, alpha=1), targets=["to_q"])
    monkeypatch.setattr(Kohya, "key", lambda self, stem, suffix: f"{stem}.{suffix}.what")
    report = verify(file, given.base)
    assert not promise(report, "reload: kohya").holds
    assert promise(report, "reload: kohya").why
    assert not report.holds


def test_a_dialect_that_loses_layers(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    file = given.adapter(LoRA(rank=2, alpha=1), targets=["to_q", "ff"])
    monkeypatch.setattr(
        Kohya, "key", lambda self, stem, suffix: f"{stem}{'_x' if stem.endswith('1_ff') else ''}.{suffix}"
    )
    report = verify(file, given.base)
    assert_fails(report, "reload: kohya", "kohya: W' is off by inf of the change after reading")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_no_numbers(given: Given, value: float) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in tensors if key.endswith("to_q.lora_up.weight") and "1" in key)
        tensors[key][0, 0] = value

    report = verify(given.changed(given.adapter(LoRA(rank=2), targets=["to_q", "ff"]), damage), given.base)
    (wrong,) = [row for row in report.layers if row.problems]
    assert (wrong.layer, wrong.problems) == ("blocks.1.to_q", ("not finite: up",))
    assert not promise(report, "merge, float32").holds
    assert not report.holds


def test_a_base_that_is_not_finite(given: Given) -> None:
    file = given.adapter(LoRA(rank=2), targets=["to_q", "ff"])
    with torch.no_grad():
        given.model.blocks[0].ff.weight[0, 0] = float("nan")  # type: ignore[union-attr,index]
    save_base(given.base, given.model)
    report = verify(file, given.base)
    assert [row.layer for row in report.layers if row.problems] == ["blocks.0.ff"]
    assert "the weight of the base is not finite" in str(report)


def test_a_base_of_another_model(given: Given, tmp_path: Path) -> None:
    """Half of the layers are there: the keys of the others are not used."""
    file = given.adapter(LoRA(rank=2), targets=["to_q", "ff"])
    other = save_base(tmp_path / "other.safetensors", nn.ModuleDict({"blocks": given.model.blocks[:1]}))  # type: ignore[dict-item,index]
    report = verify(file, other)
    assert not report.holds
    assert any(finding.startswith("6 keys are not used (first ") for finding in report.findings)
    assert "the base has no such layer" in report.findings[0]
    assert all(p.holds for p in report.promises)  # of the layers that are left


def test_a_file_that_lacks_layers(given: Given) -> None:
    def lose(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if "blocks_1_to_q" in key]:
            del tensors[key]

    report = verify(given.changed(given.adapter(LoRA(rank=2), targets=["to_q", "ff"]), lose), given.base)
    assert "1 layers are missing in the file (first blocks.1.to_q)" in report.findings
    assert not report.holds


def test_keys_that_mean_nothing(given: Given) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["lycoris_blocks_0_to_q.surprise"] = torch.ones(2)

    report = verify(given.changed(given.adapter(LoRA(rank=2), targets=["to_q", "ff"]), add), given.base)
    assert report.findings == (
        "1 keys are not used (first lycoris_blocks_0_to_q.surprise): no known algorithm has such a tensor",
    )


def test_shapes_of_another_model_are_refused(given: Given, tmp_path: Path) -> None:
    file = given.adapter(LoRA(rank=2), targets=["to_q"])
    other = save_base(
        tmp_path / "o.safetensors", nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(9, 8)})])})
    )
    with pytest.raises(ShapeError, match=r"blocks\.0\.to_q"):
        verify(file, other)


def test_a_merge_that_runs_over_in_half_precision(given: Given) -> None:
    file = given.adapter(Full(), amount=3e4, targets=["to_q", "ff"])
    assert verify(file, given.base).holds
    half = save_base(given.folder / "half.safetensors", given.model, torch.float16)
    report = verify(file, half)
    assert_fails(report, "merge, float16", "the merged weight is not finite in float16")
    assert promise(report, "train = merge, fp32").holds  # beside the base it would still work


def test_a_change_that_rounding_takes(given: Given) -> None:
    """bf16 has three digits; a change in the fourth is lost."""
    file = given.adapter(LoRA(rank=2, alpha=1), amount=2e-2, targets=["to_q", "ff"])
    fine = verify(file, given.base)
    coarse = verify(file, save_base(given.folder / "bf16.safetensors", given.model, torch.bfloat16))
    assert fine.holds, str(fine)
    assert fine.lost is not None
    assert fine.lost < 1e-3
    assert coarse.lost is not None
    assert coarse.lost > 0.5
    assert_fails(coarse, "merge, bfloat16", "merging rounds away")
    stored = {name: t.to(torch.bfloat16).float() for name, t in given.model.state_dict().items()}
    want = _rounding_error(file, given.model, stored)
    assert coarse.lost == pytest.approx(want, rel=0.02)


def _rounding_error(file: Path, model: nn.Module, stored: Mapping[str, Tensor]) -> float:
    """The same by nerine's own merge into a live model."""
    model.load_state_dict(dict(stored))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    network = nerine.load(model, file)
    network.merge()
    lost = change = 0.0
    for name, t in model.state_dict().items():
        if name in before and not torch.equal(t, before[name]):
            change += float((t - before[name]).square().sum())
            lost += float((t.to(torch.bfloat16).float() - t).square().sum())
    network.unmerge()
    network.detach()
    return (lost / change) ** 0.5


def test_a_base_that_nothing_can_be_written_to(tmp_path: Path) -> None:
    """Eight bits with a scale: training and reloading are checked, and a merge is refused."""
    model = nn.ModuleDict({"to_q": nn.Linear(12, 8)})
    file = save_adapter(tmp_path / "a.safetensors", model, LoRA(rank=2, alpha=1), targets="to_q")
    tensors = {"to_q.weight": model["to_q"].weight.detach().to(torch.float8_e4m3fn), "to_q.bias": torch.zeros(8)}
    base = tmp_path / "b.safetensors"
    write_file(base, {**tensors, "to_q.scale_weight": torch.tensor(0.5)}, {})
    report = verify(file, base)
    assert report.holds, str(report)
    merging = promise(report, "merge, float32")
    assert (merging.layers, merging.of) == (0, 1)
    assert "with a scale in to_q.scale_weight, and nothing is written over such" in merging.why
    assert promise(report, "train = merge, fp32").layers == 1


def test_a_bias_that_is_not_there(given: Given, tmp_path: Path) -> None:
    file = given.adapter(Full(), targets=["to_q"])
    state = {name: t for name, t in given.model.state_dict().items() if name != "blocks.1.to_q.bias"}
    base = tmp_path / "nobias.safetensors"
    write_file(base, state, {})
    report = verify(file, base)
    assert not report.holds
    assert "blocks.1.to_q" in str(report)


# -- as a tool ---------------------------------------------------------------------------------------------------------
def test_one_layer_at_a_time(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    living: list[weakref.ref[Tensor]] = []
    most = 0
    weight = Weights.weight

    def counted(self: Weights, path: str) -> Tensor:
        nonlocal most
        found = weight(self, path)
        living.append(weakref.ref(found))
        most = max(most, len({id(t) for ref in living if (t := ref()) is not None}))
        return found

    monkeypatch.setattr(Weights, "weight", counted)
    verify(given.adapter(DoRA(LoRA(rank=2)), targets=list(DENSE)), given.base)
    assert len(living) > 10
    assert most <= 3


def test_progress_goes_on_to_the_end(given: Given) -> None:
    told: list[tuple[int, int, str]] = []
    verify(
        given.adapter(LoRA(rank=2), targets=["to_q", "ff"]),
        given.base,
        progress=lambda done, total, what: told.append((done, total, what)),
    )
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert {total for _, total, _ in told} == {4}
    assert told[-1][0] == 4
    assert "blocks.1.to_q" in {what for _, _, what in told}


def test_the_same_seed_gives_the_same_figures(given: Given) -> None:
    file = given.adapter(DoRA(LoRA(rank=2)), targets=["to_q"])
    state = torch.random.get_rng_state()
    first, second, other = (verify(file, given.base, seed=seed) for seed in (1, 1, 2))
    assert first.to_dict() == second.to_dict() != other.to_dict()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_some_dialects_alone(given: Given) -> None:
    file = given.adapter(LoRA(rank=2), targets=["to_q"])
    report = verify(file, given.base, dialects=["kohya", "peft"])
    assert [p.name for p in report.promises if p.name.startswith("reload")] == ["reload: kohya", "reload: peft"]
    assert all(set(row.reloaded) == {"kohya", "peft"} for row in report.layers)
    with pytest.raises(OptionError, match="kohia"):
        verify(file, given.base, dialects=["kohia"])


def test_numbers_that_are_none(given: Given) -> None:
    file = given.adapter(LoRA(rank=2), targets=["to_q"])
    for options in ({"samples": 0}, {"doubled": -1}):
        with pytest.raises(OptionError, match="samples must be at least 1"):
            verify(file, given.base, **options)  # type: ignore[arg-type]


def test_an_algorithm_of_ones_own(given: Given) -> None:
    class Twice(LoRA):
        """LoRA under a name of its own, as plug-ins have it."""

        name = "lora"

    file = given.adapter(LoRA(rank=2), targets=["to_q"])
    assert verify(file, given.base, algorithms=[Twice]).holds


def test_nothing_in_common_is_an_error(given: Given, tmp_path: Path) -> None:
    other = save_base(tmp_path / "o.safetensors", nn.ModuleDict({"elsewhere": nn.Linear(3, 2)}))
    with pytest.raises(FormatError, match="belongs to this model"):
        verify(given.adapter(LoRA(rank=2), targets=["to_q"]), other)


def test_what_the_report_looks_like(given: Given) -> None:
    long = nn.ModuleDict(
        {"a_name_that_is_far_too_long_for_any_table": nn.ModuleDict({"of_eighty_columns" * 4: nn.Linear(12, 8)})}
    )
    base = save_base(given.folder / "long.safetensors", long)
    report = verify(save_adapter(given.folder / "l.safetensors", long, DoRA(LoHa(rank=2)), targets="*"), base)
    tables = [line for line in str(report).splitlines()[1:] if not line.startswith(("note", "ComfyUI", "PEFT"))]
    assert max(map(len, tables)) <= 100
    assert max(map(len, report.by_layer().splitlines())) <= 110
    data = json.loads(json.dumps(report.to_dict()))
    assert data["holds"] is True
    assert data["layers"][0]["reloaded"]["lycoris"] == 0
    assert {p["name"] for p in data["promises"]} >= {"train = merge, fp32", "merge, float32", "reload: bare"}


def test_it_computes_where_it_is_told(given: Given, run_on_simulated_cuda: Callable[[str], None]) -> None:
    """Weights, tensors and inputs meet on another device, with the same figures but for rounding."""
    rules = [
        nerine.Rule("norm", Norm()),
        nerine.Rule("to_q", DoRA(LoRA(rank=2, alpha=1))),
        nerine.Rule("conv", DoRA(LoHa(rank=2), axis="in")),
        nerine.Rule("*", LoKr(rank=1, alpha=2, factor=2)),
    ]
    file = given.adapter(rules, targets=[*DENSE, "norm", "embed_tokens", "experts"])
    run_on_simulated_cuda(
        f"""
        from nerine.tools.verify import verify

        here, there = (verify({str(file)!r}, {str(given.base)!r}, device=d) for d in ("cpu", DEVICE))
        assert here.holds and there.holds, str(there)
        for one, other in zip(here.layers, there.layers):
            assert abs(one.change - other.change) <= 1e-5 * one.change, (one, other)
        """
    )
