"""LyCORIS's presets as data: what is read, what is refused in which words, and that the lists of options are true."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from nerine.algorithms import REGISTRY
from nerine.errors import NerineError
from nerine.integrations.lycoris import algorithms, settings
from nerine.integrations.lycoris.presets import (
    BUILTIN_PRESET_CONFIGS,
    PRESET,
    AlgoOverride,
    PresetConfig,
    PresetValidationError,
    describe_algo,
    list_algorithms,
    list_builtin_presets,
    read_preset,
)

TOML = """
enable_conv = false
target_module = ["Attention"]
use_fnmatch = true
[module_algo_map.Attention]
algo = "lokr"
dim = 100000
full_matrix = true
[name_algo_map."*.to_q"]
dim = 8
wd_on_out = false
"""


# -- what algorithms can be told -------------------------------------------------------------------------------------
def test_every_setting_of_every_algorithm_has_a_word_or_is_known_to_have_none() -> None:
    without = {("lora", "init"), ("boft", "stages"), ("full", "bias"), ("norm", "bias"), ("tlora", "timesteps")}
    without |= {("oft-v2", name) for name in ("terms", "neumann", "on_output", "shared")}
    silent = {
        (name, field.name)
        for name, kind in REGISTRY.items()
        for field in dataclasses.fields(kind)
        if field.name not in algorithms.WORDS and (name, field.name) not in algorithms._OF_ONE
    }
    assert silent <= without


def test_every_word_is_one_that_the_networks_take() -> None:
    known = {*settings.LAYER_OPTIONS, *settings.LAYER_NAMES}
    assert set(algorithms.OPTIONS) <= known
    assert {*settings.LAYER_OPTIONS} <= {*algorithms.OPTIONS, "algo"}
    assert set(algorithms.ALGO_REGISTRY) == set(settings.ALGORITHMS)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lora", "dim alpha use_tucker use_scalar rs_lora weight_decompose dora_wd wd_on_output wd_on_out bypass_mode"),
        ("lokr", "factor decompose_both full_matrix unbalanced_factorization use_tucker wd_on_out rank_dropout_scale"),
        ("ia3", "train_on_input bypass_mode"),
        ("diag-oft", "dim constraint rescaled"),
        ("dylora", "block_size rs_lora"),
        ("tlora", "sig_type use_data_init mask_group_id min_rank"),
        ("full", "dim alpha module_dropout"),
    ],
)
def test_what_an_algorithm_understands(name: str, options: str) -> None:
    spec = describe_algo(name.upper())
    assert spec in list(list_algorithms())
    assert [option for option in options.split() if not spec.supports(option)] == []
    assert not spec.supports("stages")


# -- reading ---------------------------------------------------------------------------------------------------------
def test_there_and_back() -> None:
    table = {
        "enable_conv": True,
        "exclude_name": ["a"],
        "module_algo_map": {"Attention": {"algo": "lokr", "dim": 3}},
        "name_algo_map": {"b": {"dim": 2}},
    }
    preset = PresetConfig.from_dict(table, strict=True)
    assert preset.to_dict() == table
    assert list(preset.list_algorithms()) == ["lokr"]
    assert preset.name_algo_map == {"b": AlgoOverride(options={"dim": 2})}
    table["exclude_name"].append("c")
    assert preset.exclude_name == ["a"]


def test_files(tmp_path: Path) -> None:
    written, also = tmp_path / "mine.toml", tmp_path / "mine.json"
    written.write_text(TOML, encoding="utf-8")
    found = read_preset(written)
    assert found["module_algo_map"] == {"Attention": {"algo": "lokr", "dim": 100000, "full_matrix": True}}
    assert found["name_algo_map"] == {"*.to_q": {"dim": 8, "wd_on_out": False}}
    also.write_text(json.dumps(found), encoding="utf-8")
    assert read_preset(str(also)) == found


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.toml", "enable_cov = true", r"a\.toml: a preset has no key 'enable_cov'. Did you mean 'enable_conv'\?"),
        ("a.toml", 'target_module = "Linear"', r"a\.toml: target_module: expected a list of names, got 'Linear'"),
        ("a.toml", 'enable_conv = "False"', r"a\.toml: enable_conv: expected true or false, got 'False'"),
        ("a.toml", "[[[", r"a\.toml: not valid TOML"),
        ("a.json", "{", r"a\.json: not valid JSON"),
        ("a.json", "[]", r"a\.json: expected a table of keys, found list"),
        ("a.json", '{"module_algo_map": []}', ""),
        ("a.json", '{"module_algo_map": [1]}', r"module_algo_map: expected a table for each module, got \[1\]"),
        ("a.json", '{"name_algo_map": {"x": "lokr"}}', r"name_algo_map.x: expected a table such as"),
        (
            "a.toml",
            '[module_algo_map.Block]\nalgo = "lokr"\nfacter = 4',
            r"a\.toml: module_algo_map.Block: lokr has no option 'facter'. Did you mean 'factor'\?",
        ),
        ("a.toml", '[name_algo_map.x]\nalgo = "lork"', r"name_algo_map.x: algo: .* 'lork'. Did you mean .*'lokr'"),
        (
            "a.toml",
            "[name_algo_map.x]\ndin = 4",
            r"x: no algorithm has an option 'din'. Did you mean 'dim'",
        ),
        ("a.toml", '[name_algo_map.x]\nalgo = "ia3"\nfactor = 4', r"ia3 has no option 'factor'"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, name: str, text: str, words: str) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    if not words:
        assert read_preset(file) == {}
        return
    with pytest.raises(PresetValidationError, match=words) as error:
        read_preset(file)
    assert isinstance(error.value, NerineError)
    assert isinstance(error.value, ValueError)  # as it is in LyCORIS
    assert str(error.value).count("preset ") == 1 + str(error.value).count("a preset has")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PresetValidationError, match=r"expected a \.toml or \.json file: .*gone\.toml"):
        read_preset(tmp_path / "gone.toml")


def test_options_are_only_checked_where_that_is_asked_for() -> None:
    table: dict[str, Any] = {"module_algo_map": {"Block": {"algo": "mine", "whatever": 1}}}
    assert PresetConfig.from_dict(table).to_dict() == table
    with pytest.raises(PresetValidationError, match="no algorithm is called 'mine'"):
        PresetConfig.from_dict(table, strict=True)


# -- LyCORIS's own presets -------------------------------------------------------------------------------------------
def test_the_builtin_presets_are_valid_and_cannot_be_changed_for_others() -> None:
    mine = list_builtin_presets()
    assert set(mine) == set(PRESET) == set(BUILTIN_PRESET_CONFIGS)
    for name, preset in mine.items():
        assert PresetConfig.from_dict(preset.to_dict(), strict=True) == preset == BUILTIN_PRESET_CONFIGS[name]
        assert PRESET[name] == preset.to_dict()
    mine["full"].unet_target_module = []
    assert list_builtin_presets()["full"].unet_target_module
    with pytest.raises(TypeError):
        PRESET["mine"] = {}  # type: ignore[index]
