"""Which part of a pipeline a lone model is taken for when its file is written."""

from __future__ import annotations

import pytest

from nerine.files.writing import _likely

WAN = {f"blocks.{i}.{a}.{n}": (24, 24) for i in range(2) for a in ("self_attn", "cross_attn") for n in "qkvo"}
WAN |= {f"blocks.{i}.ffn.{n}": s for i in range(2) for n, s in ((0, (48, 24)), (2, (24, 48)))}
WAN |= {"patch_embedding": (24, 4, 1, 2, 2), "text_embedding.0": (24, 16), "time_projection.1": (144, 24)}


@pytest.mark.parametrize(
    ("shapes", "part"),
    [
        (WAN, "denoiser"),
        ({"layers.0.self_attn.q_proj": (8, 8), "layers.0.cross_attn.q_proj": (8, 8)}, "denoiser"),
        ({"model.layers.0.self_attn.q_proj": (8, 8)}, "text_encoder"),
        ({"encoder.block.0.layer.0.SelfAttention.q": (8, 8)}, "text_encoder"),
        ({"blocks.0.attn.qkv": (24, 8)}, "denoiser"),
    ],
)
def test_a_model_is_known_by_its_layers(shapes: dict[str, tuple[int, ...]], part: str) -> None:
    assert _likely(shapes) == part
