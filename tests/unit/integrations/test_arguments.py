"""Arguments of hosts: how text is read, and that the document names all of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from nerine.errors import OptionError
from nerine.integrations import arguments
from nerine.integrations.kohya.arguments import ARGUMENTS, indices
from nerine.integrations.kohya.blocks import Blocks
from nerine.integrations.lycoris.settings import LAYER_OPTIONS

DOCUMENT = Path(__file__).parents[3] / "docs" / "sd-scripts.md"


def test_the_document_has_every_argument() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    known = {*ARGUMENTS, *LAYER_OPTIONS, "conv_dim", "conv_alpha", "train_norm", "train_llm_adapter", "preset"}
    assert named == known - {"dim", "alpha"}


@pytest.mark.parametrize(
    ("read", "text", "want"),
    [
        (arguments.as_bool, "true", True),
        (arguments.as_bool, "1", True),
        (arguments.as_bool, "None", False),
        (arguments.as_bool, 0, False),
        (arguments.as_int, "16", 16),
        (arguments.as_int, "16.0", 16),
        (arguments.as_int, "none", None),
        (arguments.as_float, "1e-3", 1e-3),
        (arguments.as_floats, "[1, 2,,0.5]", [1.0, 2.0, 0.0, 0.5]),
        (arguments.as_ints, "4,8", [4, 8]),
        (arguments.as_pairs, "attn=8, ff=4", {"attn": 8.0, "ff": 4.0}),
        (arguments.as_pairs, r"a{1,2}=8,b=2", {"a{1,2}": 8.0, "b": 2.0}),
        (arguments.as_text, " None ", None),
    ],
)
def test_text_is_read(read: Any, text: Any, want: Any) -> None:
    assert read("x", text) == want


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (arguments.as_bool, "2"),
        (arguments.as_bool, "maybe"),
        (arguments.as_int, "1.5"),
        (arguments.as_float, "nan"),
        (arguments.as_float, True),
        (arguments.as_ints, "1,two"),
        (arguments.as_pairs, "attn"),
        (arguments.as_pairs, "attn=x"),
    ],
)
def test_what_cannot_be_read_is_an_error_with_its_name(read: Any, text: Any) -> None:
    with pytest.raises(OptionError, match="rank"):
        read("rank", text)


def test_blocks_of_a_unet_are_numbered_as_sd_scripts_does() -> None:
    sd = Blocks(["down_blocks.0.resnets.0.conv1"])
    numbers = {
        "down_blocks.0.attentions.1.proj_in.": 2,
        "down_blocks.0.downsamplers.0.conv.": 3,
        "down_blocks.2.resnets.1.conv1": 8,
        "mid_block.resnets.1.conv1": 12,
        "up_blocks.1.attentions.2.proj_in.": 18,
        "up_blocks.0.upsamplers.0.conv.": 15,
        "conv_in": -1,
    }
    assert {path: sd.of(path) for path in numbers} == numbers
    xl = Blocks(["input_blocks.0.0.weight"])
    numbers = {"time_embed.0": 0, "input_blocks.4.1.proj_in": 5, "middle_block.1.proj_in": 11, "out.2": 22}
    numbers |= {"output_blocks.8.0.in_layers.2": 21, "label_emb.0.0": 0}
    assert {path: xl.of(path) for path in numbers} == numbers


def test_rates_of_blocks_follow_curves_and_the_threshold() -> None:
    blocks = Blocks(["input_blocks.0.0"])
    weights = blocks.lr_weights({"down_lr_weight": "linear+0.5", "up_lr_weight": [1.0, 0.1]})
    assert weights is not None
    assert len(weights) == 23
    assert weights[1:10] == [i / 8 + 0.5 for i in range(9)]
    assert weights[10:13] == [1.0] * 3
    assert weights[13:16] == [1.0, 0.1, 1.0]
    clipped = blocks.lr_weights({"up_lr_weight": [1.0, 0.1], "block_lr_zero_threshold": 0.2})
    assert clipped is not None
    assert clipped[14] == 0
    assert blocks.lr_weights({}) is None


def test_numbers_of_blocks() -> None:
    assert indices("x", "all") is None
    assert indices("x", "none") == frozenset()
    assert indices("x", "0-2, 7") == {0, 1, 2, 7}
    for wrong in ("a", "3-1", "1-", "-2"):
        with pytest.raises(OptionError, match="0-3,7"):
            indices("x", wrong)
