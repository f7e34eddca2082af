"""What a pattern means: names, numbers, classes, exclusions."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import nerine
from nerine import LoRA, OptionError, Rule, TargetError

LORA = LoRA(rank=2)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"to_q": nn.Linear(8, 4), "to_k": nn.Linear(8, 4)})
        self.norm = nn.LayerNorm(8)


class Deeper(Inner):
    """Of a class derived from another."""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 8, 3)
        self.blocks = nn.ModuleList([Inner() if i < 12 else Deeper() for i in range(14)])
        self.late = nn.ModuleDict({"12": nn.Linear(8, 3)})


def chosen(targets: Any, what: Any = LORA) -> list[str]:
    return [row.layer for row in nerine.plan(Model(), what, targets=targets).rows]


def block(*numbers: int) -> list[str]:
    return [f"blocks.{i}.attn.{name}" for i in numbers for name in ("to_q", "to_k")]


EVERY = ["proj", *block(*range(14)), "late.12"]


@pytest.mark.parametrize(
    ("targets", "want"),
    [
        ("blocks.[4-6,12].attn", block(4, 5, 6, 12)),
        ("blocks.[4-6, 12]", block(4, 5, 6, 12)),
        ("blocks.[11-]", block(11, 12, 13)),
        ("blocks.[0]", block(0)),
        ("[12]", [*block(12), "late.12"]),
        ("blocks.[10-11].*.to_k", ["blocks.10.attn.to_k", "blocks.11.attn.to_k"]),
        ("blocks.3.attn.to_[kx]", ["blocks.3.attn.to_k"]),
        ("type:Conv2d", ["proj"]),
        ("type:Linear", EVERY[1:]),
        ("type:Deeper", block(12, 13)),
        ("type:Inner", block(*range(14))),
        ("type:Dee*", block(12, 13)),
        (Deeper, block(12, 13)),
        (nn.ModuleDict, EVERY[1:]),
        (["blocks.[12-]", "!to_q"], ["blocks.12.attn.to_k", "blocks.13.attn.to_k"]),
        (["!blocks"], ["proj", "late.12"]),
        (["all", "!type:Inner"], ["proj", "late.12"]),
        ("!blocks", ["proj", "late.12"]),
        (["!re:blocks.*", "!proj"], ["late.12"]),
    ],
    ids=str,
)
def test_a_pattern(targets: Any, want: list[str]) -> None:
    assert chosen(targets) == want


@pytest.mark.parametrize(
    "targets", ["blocks.[14-]", "[99]", "type:linear", "type:Dee", "blocks.[4-6", ["proj", "!proj"]]
)
def test_what_means_nothing(targets: Any) -> None:
    with pytest.raises(TargetError):
        chosen(targets)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("blocks.[6-4]", "'6-4' ends before it begins"),
        ("blocks.[4,]", r"expected numbers such as \[4-9,12\] or \[20-\], found ''"),
        ("blocks.[]", "found ''"),
        ("blocks.[-3]", "found '-3'"),
        ("blocks.[1 2]", "found '1 2'"),
    ],
)
def test_numbers_that_are_none(pattern: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        chosen(pattern)


def test_a_class_above_does_not_ask_for_norms() -> None:
    assert not any("norm" in path for path in chosen("type:Inner"))
    assert chosen("type:LayerNorm", nerine.Norm()) == [f"blocks.{i}.norm" for i in range(14)]


def test_a_rule_does_not_exclude() -> None:
    with pytest.raises(OptionError, match=r'Rule\("blocks", None\) before the other rules'):
        Rule("!blocks", LORA)


def test_a_preset_in_a_rule_and_in_an_exclusion() -> None:
    rules = [Rule("attn-only", LoRA(rank=3)), Rule("type:Conv2d", LORA)]
    with pytest.raises(TargetError):
        nerine.plan(nn.ModuleDict({"a": nn.Linear(4, 3)}), rules)
    assert chosen(["all", "!full"]) == ["proj", "late.12"]


def test_strengths_by_class() -> None:
    network = nerine.attach(Model(), LORA)
    assert network.set_strength(0.5, "type:Deeper") == 4
    assert network.set_strength(0.25, "blocks.[0-1]") == 4
    strengths = {path: adapter.strength for path, _, adapter in network.adapters()}
    assert (strengths["blocks.13.attn.to_q"], strengths["blocks.1.attn.to_q"], strengths["proj"]) == (0.5, 0.25, 1.0)
