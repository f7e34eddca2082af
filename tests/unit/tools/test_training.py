"""The metadata of a file in people's words; damaged entries are notes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nerine.tools.inspect.training import Dataset, Tag, read_training
from sdxl_adapter import training_metadata


def test_a_run_of_sd_scripts() -> None:
    found = read_training(training_metadata())
    groups = found.groups
    assert groups["about"]["author"] == "A. Nony Mous"
    assert groups["base model"] == {
        "file": "sd_xl_base_1.0.safetensors",
        "kind": "stable-diffusion-xl-v1-base/lora",
        "version": "sdxl_base_v1-0",
    }
    network = {"module": "networks.lora", "rank": "32", "alpha": "16.0", "conv_dim": "32", "conv_alpha": "16"}
    assert groups["network"] == network
    assert groups["training"]["optimiser"] == "prodigyopt.prodigy.Prodigy"
    assert groups["training"]["epochs"] == "10 of 12"
    assert groups["data"]["resolution"] == "(1024, 1024)"
    assert "all in fp16" not in groups["training"]  # it says False
    assert found.datasets == (Dataset("10_ohwx woman", 42, 10), Dataset("3_paper cutout", 120, 3))
    assert found.tags[:2] == (Tag("paper cutout", 120, 120 / 162), Tag("flat color", 96, 96 / 162))
    assert found.triggers == ("ohwx woman, paper cutout",)
    assert found.notes == ()


def test_words_in_nearly_every_caption_are_triggers() -> None:
    metadata = {
        "ss_dataset_dirs": json.dumps({"a": {"n_repeats": 1, "img_count": 20}}),
        "ss_tag_frequency": json.dumps({"a": {" ohwx ": 20, "cat": 19, "dog": 17, "": 20, "none": 0}}),
    }
    found = read_training(metadata)
    assert found.triggers == ("ohwx", "cat")
    assert [tag.word for tag in found.tags] == ["ohwx", "cat", "dog"]


def test_datasets_as_newer_runs_tell_them() -> None:
    subsets = [{"image_dir": "faces", "img_count": 7, "num_repeats": 4, "class_tokens": "sks"}]
    metadata = {"ss_datasets": json.dumps([{"subsets": subsets, "tag_frequency": {"faces": {"smile": 3}}}])}
    found = read_training(metadata)
    assert found.datasets == (Dataset("faces", 7, 4),)
    assert found.tags == (Tag("smile", 3, 3 / 7),)


def test_settings_of_other_programs() -> None:
    metadata = {
        "lycoris_config": json.dumps({"algo": "lokr", "linear_dim": 16, "apply_preset": {"target_module": ["A"]}}),
        "lora_adapter_metadata": json.dumps({"unet.r": 8, "unet.target_modules": ["a", "b"], "unet.use_dora": False}),
    }
    groups = read_training(metadata, {"r": 4, "target_modules": ["x"], "peft_type": "LORA"}).groups
    assert groups["LyCORIS settings"] == {"algo": "lokr", "linear_dim": "16", "apply_preset.target_module": '["A"]'}
    assert groups["PEFT settings"] == {"unet.r": "8", "unet.use_dora": "false"}
    assert groups["PEFT folder"] == {"r": "4", "peft_type": "LORA"}


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(4, "4 s"), (60, "1 min"), (5400, "1 h 30 min"), (7980, "2 h 13 min"), (200_000, "2 days 8 h")],
)
def test_how_long_it_took(seconds: float, said: str) -> None:
    times = {"ss_training_started_at": "1700000000", "ss_training_finished_at": str(1700000000 + seconds)}
    assert read_training(times).groups["when"]["took"] == said


JSON_KEYS = ("ss_network_args", "ss_tag_frequency", "ss_dataset_dirs", "ss_datasets", "lycoris_config")


@pytest.mark.parametrize("key", JSON_KEYS)
@pytest.mark.parametrize(
    "text", ["{", '{"a": ', "[" * 100_000, "\x00", '{"a": 1e999}', "NaN", '"x"', "[[1]]", '{"a": [1]}']
)
def test_damaged_entries_are_no_errors(key: str, text: str) -> None:
    found = read_training({key: text, "ss_seed": "7"})
    assert found.groups["training"]["seed"] == "7"
    is_damaged = text in ("{", '{"a": ', "[" * 100_000, "\x00")
    assert any(key in note for note in found.notes) == is_damaged


@pytest.mark.parametrize("text", ["soon", "1e99", "nan", "-1e30"])
def test_a_time_that_is_none(text: str) -> None:
    found = read_training({"ss_training_started_at": text})
    assert "when" not in found.groups
    assert any("ss_training_started_at" in note for note in found.notes)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)
ANY_KEY = st.sampled_from(
    [*JSON_KEYS, "lora_adapter_metadata", "ss_training_started_at", "modelspec.title", "ss_steps"]
)


@given(st.dictionaries(ANY_KEY, ANY_JSON.map(json.dumps) | st.text(), max_size=5), ANY_JSON)
def test_any_metadata_is_read(metadata: dict[str, str], config: Any) -> None:
    found = read_training(metadata, config)
    for group in found.groups.values():
        assert all(isinstance(text, str) for pair in group.items() for text in pair)
    assert all(tag.count > 0 for tag in found.tags)
