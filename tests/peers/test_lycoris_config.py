"""LyCORIS 4.1.3's presets, lists of options, masks and tools beside ours."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import nerine.lycoris as ours
from nerine.errors import OptionError
from nerine.lycoris import utils

theirs = pytest.importorskip("lycoris", reason="needs lycoris-lora: pip install 'nerine[peers]'")
pytestmark = [pytest.mark.peers, pytest.mark.no_device_guard]


def test_the_builtin_presets_are_the_same() -> None:
    assert dict(ours.PRESET) == theirs.config.PRESET
    assert list(ours.list_builtin_presets()) == list(theirs.list_builtin_presets())
    assert ours.VALID_PRESET_KEYS == theirs.config_sdk.VALID_PRESET_KEYS


@pytest.mark.parametrize("name", ["PresetConfig", "AlgoOverride", "AlgoSpec"])
def test_the_classes_have_the_same_fields_and_methods(name: str) -> None:
    mine, other = getattr(ours.config_sdk, name), getattr(theirs.config_sdk, name)
    assert [field.name for field in dataclasses.fields(mine)] == [field.name for field in dataclasses.fields(other)]
    assert {n for n in vars(other) if not n.startswith("_")} <= {n for n in dir(mine) if not n.startswith("_")}


@pytest.mark.parametrize("spec", theirs.list_algorithms(), ids=lambda spec: spec.name)
def test_every_option_that_they_list_is_one_of_ours(spec: Any) -> None:
    mine = ours.describe_algo(spec.name)
    assert (mine.name, mine.required_args) == (spec.name, spec.required_args)
    assert [arg for arg in spec.supported_args if not mine.supports(arg)] == []


def test_the_options_that_they_deny_and_take() -> None:
    """Their own preset would not pass their strict check, and the word of their modules is not in the list."""
    for algo, option in (("ia3", "train_on_input"), ("lora", "wd_on_out"), ("lokr", "decompose_both")):
        table = {"module_algo_map": {"Block": {"algo": algo, option: True}}}
        with pytest.raises(theirs.PresetValidationError):
            theirs.PresetConfig.from_dict(table, strict=True)
        assert ours.PresetConfig.from_dict(table, strict=True).to_dict() == table


def test_a_file_reads_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("toml")
    from lycoris.utils.preset import read_preset

    file = tmp_path / "mine.toml"
    file.write_text('target_name = ["a.*"]\n[name_algo_map."a.*"]\nalgo = "lokr"\ndim = 3\n', encoding="utf-8")
    assert ours.read_preset(file) == read_preset(str(file))
    file.write_text("target_nam = []\n", encoding="utf-8")
    assert read_preset(str(file)) is None  # and a line on the screen
    assert "target_nam" in capsys.readouterr().out
    with pytest.raises(ours.PresetValidationError, match="Did you mean 'target_name"):
        ours.read_preset(file)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 2.0])
def test_the_masks_are_the_same(alpha: float) -> None:
    for timestep in (0, 1, 7, 499, 500, 998, 999, 1000):
        for rank, least in ((16, 1), (5, 3), (4, 9)):
            arguments = (timestep, 1000, rank, least, alpha)
            assert torch.equal(ours.compute_timestep_mask(*arguments), theirs.compute_timestep_mask(*arguments))
    wrong = theirs.compute_timestep_mask(1200, 1000, 16, 1)  # past the last timestep: all ranks but one or two
    assert wrong.sum() == 14
    with pytest.raises(OptionError, match="expected a number from 0 to max_timestep 1000"):
        ours.compute_timestep_mask(1200, 1000, 16, 1)


def test_the_hash_is_the_same() -> None:
    tensors = {"b": torch.randn(3, 4).bfloat16(), "a": torch.tensor(2.0), "c": torch.arange(6).reshape(2, 3).mT}
    tensors["c"] = tensors["c"].contiguous()
    got = utils.precalculate_safetensors_hashes(tensors)
    assert got == theirs.utils.precalculate_safetensors_hashes(tensors)


@pytest.mark.parametrize(("mode", "param"), [("fixed", 3), ("threshold", 3.0), ("ratio", 0.5), ("full", 0)])
def test_extraction_is_the_same(mode: str, param: float) -> None:
    for weight, name in ((torch.randn(24, 8), "extract_linear"), (torch.randn(24, 8, 3, 3), "extract_conv")):
        (got, kind), (want, their_kind) = (getattr(side, name)(weight, mode, param) for side in (utils, theirs.utils))
        assert kind == their_kind
        if kind == "full":
            assert torch.equal(got, want)
            continue
        assert [t.shape for t in got] == [t.shape for t in want]
        products = [(up.flatten(1) @ down.flatten(1)).reshape(weight.shape) for down, up, _ in (got, want)]
        torch.testing.assert_close(*products, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[2], want[2], rtol=1e-4, atol=1e-5)


def test_a_quantile_keeps_what_it_says() -> None:
    """LyCORIS keeps one singular value too few: a difference of rank 4 loses its fourth at 0.9999."""
    weight = torch.randn(24, 4, generator=torch.Generator().manual_seed(2)) @ torch.randn(4, 16)
    got, want = (side.extract_linear(weight, "quantile", 0.9999)[0] for side in (utils, theirs.utils))
    assert (got[0].shape[0], want[0].shape[0]) == (4, 3)
    assert float(got[2].norm() / weight.norm()) < 1e-5
    assert float(want[2].norm() / weight.norm()) > 0.2


def test_flags_that_say_no() -> None:
    for value in ("0", "", "no", None, 0):
        assert theirs.utils.str_bool(value) is True
        assert utils.str_bool(value) is False
