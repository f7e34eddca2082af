"""Flattened names become what they were: every layer of every model that is at hand, and its other names."""

from __future__ import annotations

import pytest

from meta_models import DIFFUSERS, OTHERS, TRANSFORMERS, Shape, diffusers_shapes, transformers_shapes
from nerine.files.names import aliases, flatten
from nerine.files.names.unflatten import unflatten
from nerine.files.names.words import WORDS

pytestmark = pytest.mark.no_device_guard

# These read `img_attn_qkv` and the like where the same model's other naming, and all of Flux, has `img_attn.qkv`.
TWO_READINGS = {("hunyuan-image", "original"), ("hunyuan-video", "original")}


def _shapes(name: str) -> dict[str, Shape]:
    return transformers_shapes(name) if name in TRANSFORMERS else diffusers_shapes(name)


@pytest.mark.parametrize("name", [*DIFFUSERS, *OTHERS, *TRANSFORMERS])
def test_every_layer_comes_back(name: str) -> None:
    pytest.importorskip("diffusers", reason="needs diffusers: pip install 'nerine[train]'")
    assert [path for path in _shapes(name) if unflatten(flatten(path)) != path] == []


@pytest.mark.parametrize("name", [*DIFFUSERS, *TRANSFORMERS])
def test_so_do_its_other_names(name: str) -> None:
    pytest.importorskip("diffusers", reason="needs diffusers: pip install 'nerine[train]'")
    for naming, found in aliases(_shapes(name)).items():
        if (name, naming) not in TWO_READINGS:
            assert [a.name for a in found if unflatten(flatten(a.name)) != a.name] == []


@pytest.mark.parametrize(
    "path",
    [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "text_model.encoder.layers.0.self_attn.k_proj",
        "double_blocks.0.img_attn.qkv",
        "input_blocks.4.1.proj_in",
        "encoder.block.0.layer.0.SelfAttention.q",
        "encoder.block.1.layer.1.DenseReluDense.wi_0",
        "transformer_blocks.0.ff.net.0.proj",
        "time_embedding.linear_1",
        "add_embedding.linear_2",
        "up_blocks.0.upsamplers.0.conv",
        "single_blocks.37.modulation.lin",
        "label_emb.0.0",
        "all_x_embedder.2-1",
    ],
)
def test_well_known_names(path: str) -> None:
    assert unflatten(flatten(path)) == path


@pytest.mark.parametrize("name", ["", "_", "no_such_layer", "down_blocks_0_no_such_layer", "down_blocks__0", "x-y"])
def test_an_unknown_word_has_no_answer(name: str) -> None:
    assert unflatten(name) is None


def test_two_readings_have_no_answer() -> None:
    assert {"norm_q", "norm", "q_norm"} <= set(WORDS)
    assert unflatten("norm_q_norm") is None  # norm_q.norm or norm.q_norm


def test_the_vocabulary_is_in_order() -> None:
    assert list(WORDS) == sorted(set(WORDS))
