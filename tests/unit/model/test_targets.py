"""Which layers are chosen, which are left out and why, and what is said when nothing matches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import nerine
from nerine import DoRA, LoKr, LoRA, OptionError, Rule, TargetError

LORA = LoRA(rank=2)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.to_out = nn.Sequential(nn.Linear(8, 8), nn.Dropout())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(), Attention()
        self.ff = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.norm = nn.LayerNorm(8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3)
        self.mid_block = Block()
        self.blocks = nn.ModuleList([Block(), Block()])


def chosen(what: Any = LORA, targets: Any = "all", model: nn.Module | None = None) -> list[str]:
    return [row.layer for row in nerine.plan(model or Model(), what, targets=targets).rows]


QKV = ["to_q", "to_k", "to_v", "to_out.0"]
ATTENTION = [f"{attn}.{layer}" for attn in ("attn1", "attn2") for layer in QKV]
BLOCK = [*ATTENTION, "ff.0", "ff.2"]
ALL = ["conv_in", *(f"{b}.{layer}" for b in ("mid_block", "blocks.0", "blocks.1") for layer in BLOCK)]


@pytest.mark.parametrize(
    ("targets", "want"),
    [
        ("all", ALL),
        ("full", ALL[1:]),
        ("attn-only", [p for p in ALL if ".attn" in p]),
        ("ia3", [p for p in ALL if p.endswith(("to_k", "to_v", "ff.2"))]),
        (["attn-only", "conv_in", "!attn2"], [p for p in ALL if p == "conv_in" or ".attn1" in p]),
        ("full-lin", ALL[1:]),
        ("to_q", [p for p in ALL if p.endswith("to_q")]),
        ("attn1", [p for p in ALL if ".attn1." in p]),
        ("attn1.to_q", [p for p in ALL if p.endswith("attn1.to_q")]),
        ("mid_block", [p for p in ALL if p.startswith("mid_block")]),
        ("attn?", [p for p in ALL if ".attn" in p]),
        ("to_*", [p for p in ALL if ".to_" in p]),
        ("blocks.1", [p for p in ALL if p.startswith("blocks.1")]),
        ("blocks.*.ff", [p for p in ALL if p.startswith("blocks") and ".ff." in p]),
        (r"re:blocks\.[01]\.ff\.2", ["blocks.0.ff.2", "blocks.1.ff.2"]),
        (nn.Conv2d, ["conv_in"]),
        (lambda path, module: getattr(module, "out_features", 0) == 16, [p for p in ALL if p.endswith("ff.0")]),
        (["conv_in", "ff"], [p for p in ALL if p == "conv_in" or ".ff." in p]),
        (("to_q", nn.Conv2d), [p for p in ALL if p == "conv_in" or p.endswith("to_q")]),
    ],
    ids=lambda value: "predicate" if getattr(value, "__name__", "") == "<lambda>" else str(value),
)
def test_targets(targets: Any, want: list[str]) -> None:
    assert chosen(targets=targets) == want


@pytest.mark.parametrize("half", ["to", "attn", "block", "mid", "to_q_", "q", "re:to_q", "re:attn1", "TO_Q", "0.attn3"])
def test_a_pattern_matches_whole_names_only(half: str) -> None:
    with pytest.raises(TargetError):
        chosen(targets=half)


def test_rules_first_match_wins() -> None:
    rules = [
        Rule("attn2", None),
        Rule("attn1.to_q", DoRA(LORA), lr=1e-3),
        Rule("attn1", LoKr(rank=1), strength=0.5),
        Rule(nn.Conv2d, LoRA(rank=3)),
    ]
    model = Model()
    plan = nerine.plan(model, rules)
    by_layer = {row.layer: row.algorithm for row in plan.rows}
    assert by_layer["blocks.1.attn1.to_q"] == "DoRA(LoRA(rank=2))"
    assert by_layer["blocks.1.attn1.to_k"] == "LoKr(rank=1)"
    assert by_layer["conv_in"] == "LoRA(rank=3)"
    assert plan.skipped["mid_block.attn2.to_q"] == "skipped by a rule"
    assert plan.skipped["mid_block.ff.0"] == "no rule matches"
    network = nerine.attach(model, rules)
    adapters = {path: a for path, _, a in network.adapters()}
    assert adapters["blocks.0.attn1.to_v"].strength == 0.5
    assert adapters["blocks.0.attn1.to_q"].lr == 1e-3
    assert {g["lr"] for g in network.param_groups(1e-4)} == {1e-3, 1e-4}


def test_nothing_matches_names_candidates() -> None:
    with pytest.raises(TargetError) as caught:
        chosen(targets="to_qq")
    words = str(caught.value)
    assert "no layer of Model matches 'to_qq'. Did you mean 'to_q'" in words
    assert "Candidates: conv_in (Conv2d 3x3), mid_block.attn1.to_q (Linear)" in words
    assert "(34 in all)" in words


def test_a_preset_with_a_slip_is_recognised() -> None:
    with pytest.raises(TargetError, match="Did you mean 'full-lin'"):
        chosen(targets="full-linn")


def test_nothing_to_adapt() -> None:
    with pytest.raises(TargetError, match="Sequential has no layer of a kind that nerine knows"):
        chosen(model=nn.Sequential(nn.ReLU()))


def test_everything_left_out_says_why() -> None:
    with pytest.raises(TargetError, match=r"every layer of Model .* was left out\. conv_in: skipped by a rule"):
        chosen([Rule("conv_in", None)], targets="conv_in")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("lora", "expected an algorithm such as LoRA"),
        (LoRA, "expected an algorithm such as LoRA"),
        ([LORA], r"expected Rule\(match, algorithm\)"),
        ([("attn1", LORA)], r"expected Rule\(match, algorithm\)"),
        (None, "expected an algorithm"),
    ],
    ids=str,
)
def test_neither_algorithm_nor_rules(what: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        chosen(what)


def test_a_rule_takes_an_algorithm() -> None:
    with pytest.raises(OptionError, match="Rule: expected an algorithm"):
        Rule("attn1", "lora")  # type: ignore[arg-type]


def test_a_bad_regular_expression() -> None:
    with pytest.raises(OptionError, match=r"the pattern 're:\(' is not a regular expression"):
        chosen(targets="re:(")


@pytest.mark.parametrize("targets", [5, None, [5], [None]])
def test_bad_targets_are_an_option_error(targets: Any) -> None:
    with pytest.raises(OptionError):
        chosen(targets=targets)


def test_shared_weights_are_refused() -> None:
    model = Model()
    model.blocks[0].ff[0].weight = model.blocks[1].ff[0].weight
    with pytest.raises(TargetError, match=r"blocks\.0\.ff\.0 and blocks\.1\.ff\.0 share one weight"):
        nerine.attach(model, LORA)
    assert not any("nerine" in name for name, _ in model.named_modules())
    rules = [Rule("blocks.1.ff.0", None), Rule("re:.*", LORA)]
    assert len(nerine.attach(model, rules)) == len(ALL) - 1


def test_a_shared_module_is_one_layer() -> None:
    model = Model()
    model.blocks[0].ff[0] = model.blocks[1].ff[0]
    network = nerine.attach(model, LORA)
    assert len(network) == len(ALL) - 1


def test_attention_blocks_are_adapted_through_their_own_forward() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    plan = nerine.plan(model, LORA)
    found = {row.layer: (row.kind, row.path) for row in plan.rows}
    assert found == {
        "self_attn.in_proj_weight": ("Parameter", "module"),
        "self_attn.out_proj": ("Linear", "module"),
        "linear1": ("Linear", "factored"),
        "linear2": ("Linear", "factored"),
    }
    assert [row[0] for row in nerine.attach(model, LORA).report.rows] == list(found)


class PadsItself(nn.Conv1d):
    """A causal convolution: another padding than the one its settings tell."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(x, (2, 0)))


class OwnOperation(nn.Conv1d):
    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return super()._conv_forward(input * 2, weight, bias)


class Harmless(nn.Conv1d):
    """Only its construction differs."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3)


@pytest.mark.parametrize("kind", [PadsItself, OwnOperation])
def test_convolutions_that_pad_themselves_compute_through_their_own_forward(kind: type[nn.Conv1d]) -> None:
    model = nn.ModuleDict({"causal": kind(4, 4, 3), "plain": nn.Conv1d(4, 4, 3)})
    assert [row.path for row in nerine.plan(model, LORA).rows] == ["module", "weight"]


def test_a_subclass_with_its_own_constructor_is_adapted() -> None:
    assert chosen(model=nn.Sequential(Harmless(4))) == ["0"]


def test_weights_in_an_unknown_format_to_store_only_are_left_out() -> None:
    model = nn.ModuleDict({"small": nn.Linear(4, 4), "plain": nn.Linear(4, 4)})
    model["small"].weight = nn.Parameter(model["small"].weight.detach().to(torch.int8), requires_grad=False)
    plan = nerine.plan(model, LORA)
    assert [row.layer for row in plan.rows] == ["plain"]
    assert (
        "a known way to quantise it (docs/quantised-bases.md), found Parameter of torch.int8" in plan.skipped["small"]
    )


def test_a_second_adapter_sees_the_layers_and_not_the_first_adapter() -> None:
    model = Model()
    nerine.attach(model, LORA)
    assert chosen(model=model) == ALL


def test_a_layer_alone_is_a_model() -> None:
    layer = nn.Linear(4, 3)
    network = nerine.attach(layer, LORA)
    assert [path for path, *_ in network.adapters()] == [""]
    assert layer(torch.randn(2, 4)).shape == (2, 3)
    network.detach()
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_the_plan_and_report_are_readable() -> None:
    model = Model()
    plan = nerine.plan(model, [Rule("attn1", DoRA(LORA)), Rule("conv_in", LoKr(rank=16, alpha=1.0))])
    text = str(plan)
    assert "mid_block.attn1.to_q" in text
    assert "both factors are full: alpha has no effect" in text
    assert f"{len(plan.rows)} layers, {plan.params:,} trained values" in text
    assert "left out: mid_block.ff.0: no rule matches" in text
    assert plan.to_dict()["params"] == plan.params == sum(r["params"] for r in plan.to_dict()["layers"])
    report = nerine.attach(model, [Rule("attn1", DoRA(LORA))]).report
    assert "base parameters frozen" in str(report)
    assert report.to_dict()["params"] == report.params
