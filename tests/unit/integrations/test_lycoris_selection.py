"""Which layers a LyCORIS preset chooses; that they are LyCORIS's own choice is tested among the peers."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import nerine
from nerine.errors import OptionError
from nerine.integrations.lycoris.presets import AlgoOverride
from nerine.integrations.lycoris.selection import Targets, selected, targets_of, unmatched


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6)
        self.wide = nn.Conv2d(4, 6, 3)
        self.norm = nn.LayerNorm(6)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 3)
        self.header = nn.Linear(6, 3)


def chosen(preset: dict[str, Any], model: nn.Module | None = None, **options: Any) -> dict[str, dict[str, Any]]:
    targets = targets_of(preset, default=Targets())
    return selected(model or Model(), preset, target_modules=targets.modules, target_names=targets.names, **options)


def test_blocks_give_their_layers_and_names_themselves() -> None:
    preset = {"target_module": ["Block"], "target_name": ["head"], "exclude_name": ["blocks.1"]}
    assert list(chosen(preset)) == ["blocks.0.inner", "blocks.0.wide", "head", "header"]
    assert list(chosen({**preset, "use_fnmatch": True})) == ["blocks.0.inner", "blocks.0.wide", "head"]
    assert list(chosen({**preset, "enable_conv": False})) == ["blocks.0.inner", "head", "header"]


def test_options_of_classes_and_of_names() -> None:
    preset = {
        "enable_conv": False,
        "module_algo_map": {"Block": {"algo": "lokr", "dim": 8}},
        "name_algo_map": {"head.*": {"dim": 2}, "header": AlgoOverride("loha")},
    }
    found = chosen(preset)
    assert found["blocks.0.wide"] == {"algo": "lokr", "dim": 8}
    assert (found["head"], found["header"]) == ({"dim": 2}, {"algo": "loha"})
    found["head"]["dim"] = 9
    assert preset["name_algo_map"]["head.*"] == {"dim": 2}


def test_norms_are_taken_where_they_are_asked_for() -> None:
    preset = {"target_module": ["Block"], "module_algo_map": {"Block": {"algo": "lokr"}}}
    assert "blocks.0.norm" not in chosen(preset)
    assert chosen(preset, train_norm=True)["blocks.0.norm"] == {"algo": "norm"}


def test_blocks_of_a_language_model_wait_to_be_asked_for() -> None:
    class LLMAdapterTransformerBlock(Block):
        pass

    model = nn.ModuleList([LLMAdapterTransformerBlock(), Block()])
    preset = {"target_module": ["LLMAdapterTransformerBlock", "Block"]}
    assert list(chosen(preset, model)) == ["1.inner", "1.wide"]
    assert len(chosen(preset, model, train_llm_adapter=True)) == 4
    targets = targets_of(preset)
    kept = unmatched(nn.ModuleList([Block()]), preset, target_modules=targets.modules, target_names=targets.names)
    assert kept == Targets()


def test_what_is_there_already_is_passed_over() -> None:
    model = Model()
    before = chosen({"target_module": ["Block"]}, model)
    nerine.attach(model, nerine.LoRA(rank=2))
    assert chosen({"target_module": ["Block"]}, model) == before


def test_the_targets_of_the_parts_of_sd_scripts() -> None:
    preset = {"unet_target_module": ["A"], "target_module": ["B"], "name_algo_map": {"c": {}}}
    assert targets_of(preset, "unet", Targets((), ("kept",))) == Targets(("A",), ("kept",))
    assert targets_of(preset, "text_encoder", Targets(("T",))) == Targets(("T",))
    assert targets_of(preset) == Targets(("B",), ("c",))


@pytest.mark.parametrize(
    ("preset", "words"),
    [
        ({"target_name": ["*.attn.*"]}, r"the pattern '\*.attn.\*' is not a regular expression.*use_fnmatch"),
        ({"module_algo_map": ["Block"]}, r"module_algo_map: expected a table such as .*, got \['Block'\]"),
        ({"name_algo_map": {"head": "lokr"}}, r"name_algo_map: 'head': expected a table such as .*, got 'lokr'"),
    ],
)
def test_what_cannot_be_read(preset: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        selected(Model(), preset, target_modules=["Block"], target_names=preset.get("target_name", []))
