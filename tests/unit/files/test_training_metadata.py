"""What other programs look at: right where it is known, absent where it is not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nerine import IA3, DoRA, LoHa, LoKr, LoRA, Norm, OptionError
from nerine.files.training_metadata import kohya_metadata, modelspec_metadata


def test_one_kind_of_layer() -> None:
    layers = {"a": LoKr(rank=8, alpha=4.0, factor=4), "b": LoKr(rank=8, alpha=4.0, factor=4)}
    found = kohya_metadata(layers, base_model="sdxl_base_v1-0", v2=False)
    args = json.loads(found.pop("ss_network_args"))
    assert found == {
        "ss_v2": "False",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "nerine.kohya",
        "ss_network_dim": "8",
        "ss_network_alpha": "4.0",
    }
    assert (args["algo"], args["factor"], args["full_matrix"]) == ("lokr", "4", "False")
    assert not {"rank", "alpha"} & args.keys()


@pytest.mark.parametrize(
    ("layers", "rank", "alpha"),
    [
        ({"a": LoRA(rank=4), "b": LoRA(rank=8)}, "Dynamic", "Dynamic"),
        ({"a": LoRA(rank=4, alpha=1.0), "b": LoRA(rank=8, alpha=1)}, "Dynamic", "1.0"),
        ({"a": LoRA(rank=4, alpha=1.0), "b": LoRA(rank=4)}, "4", "Dynamic"),
        ({"a": LoRA(rank=4), "b": Norm()}, "4", "4.0"),
        ({"a": DoRA(LoRA(rank=4)), "b": LoHa(rank=4)}, "4", "4.0"),
        ({"a": IA3()}, None, None),
        ({}, None, None),
    ],
)
def test_rank_and_alpha(layers: Any, rank: str | None, alpha: str | None) -> None:
    found = kohya_metadata(layers)
    assert (found.get("ss_network_dim"), found.get("ss_network_alpha")) == (rank, alpha)
    assert not {"ss_v2", "ss_base_model_version"} & found.keys()


def test_only_what_all_layers_share_is_told() -> None:
    layers = {"a": DoRA(LoRA(rank=4), axis="in"), "b": DoRA(LoHa(rank=4, tucker=True), axis="in")}
    args = json.loads(kohya_metadata(layers)["ss_network_args"])
    assert (args["dora_wd"], args["wd_on_output"], args["rs"]) == ("True", "False", "False")
    assert not {"algo", "tucker"} & args.keys()


def test_the_user_wins() -> None:
    found = kohya_metadata({"a": LoRA(rank=4)}, network_args={"conv_dim": 4}, user={"ss_network_dim": "9", "me": "x"})
    assert json.loads(found["ss_network_args"]) == {"conv_dim": "4"}
    assert (found["ss_network_dim"], found["me"]) == ("9", "x")
    spec = modelspec_metadata(architecture="a/lora", implementation="i", title="t", user={"modelspec.title": "mine"})
    assert spec["modelspec.title"] == "mine"


def test_modelspec_says_what_it_is_told() -> None:
    found = modelspec_metadata(
        title="t",
        architecture="flux-1-dev/lora",
        implementation="i",
        resolution="1024x1024",
        date="2024-12-31",
        author=None,
    )
    assert found == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "flux-1-dev/lora",
        "modelspec.implementation": "i",
        "modelspec.title": "t",
        "modelspec.resolution": "1024x1024",
        "modelspec.date": "2024-12-31",
    }


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"titel": "t"}, "no field 'titel'. Did you mean 'title'"),
        ({"architecture": "a", "title": "t"}, "give implementation as well"),
        ({"architecture": "a", "title": "t", "implementation": "i", "date": "yesterday"}, "expected a date like"),
    ],
)
def test_modelspec_refuses(fields: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        modelspec_metadata(**fields)
