"""Where a layer stands, by its path alone."""

from __future__ import annotations

import pytest

from nerine.tools.inspect.places import kinds_in_order, order_of, spot_of


@pytest.mark.parametrize(
    ("path", "component", "block", "kind"),
    [
        (
            "denoiser.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_out.0",
            "denoiser",
            "down_blocks.1.attentions.0",
            "attn1.to_out.0",
        ),
        ("unet.mid_block.resnets.1.time_emb_proj", "denoiser", "mid_block.resnets.1", "time_emb_proj"),
        ("input_blocks.4.1.transformer_blocks.0.ff.net.0.proj", "", "input_blocks.4.1", "ff.net.0.proj"),
        ("output_blocks.2.2.conv", "", "output_blocks.2.2", "conv"),
        ("transformer.single_transformer_blocks.37.proj_mlp", "denoiser", "single_transformer_blocks.37", "proj_mlp"),
        ("double_blocks.0.img_mlp.2", "", "double_blocks.0", "img_mlp.2"),
        (
            "text_encoder_2.text_model.encoder.layers.11.self_attn.q_proj",
            "text_encoder_2",
            "text_model.encoder.layers.11",
            "self_attn.q_proj",
        ),
        ("encoder.block.3.layer.1.DenseReluDense.wi_0", "", "encoder.block.3", "layer.1.DenseReluDense.wi_0"),
        ("encoder.layer.3.attention.self.query", "", "encoder.layer.3", "attention.self.query"),
        ("model.layers.12.mlp.gate_proj", "", "model.layers.12", "mlp.gate_proj"),
        ("layer1.0.conv1", "", "layer1.0", "conv1"),
        ("blocks.0.to_qkv[64:128]", "", "blocks.0", "to_qkv"),
        ("unet.conv_in", "denoiser", "", "conv_in"),
        ("odd_name_3_of_its_own", "", "odd_name_3", "of_its_own"),
        ("conv_in", "", "", "conv_in"),
    ],
)
def test_spots(path: str, component: str, block: str, kind: str) -> None:
    assert tuple(spot_of(path)) == (component, block, kind)


def in_order(paths: list[str]) -> list[str]:
    return sorted(paths, key=lambda path: order_of(spot_of(path), path))


def test_the_order_is_that_of_the_model() -> None:
    paths = [
        "conv_in",
        "time_embedding.linear_1",
        "down_blocks.0.resnets.0.conv1",
        "down_blocks.0.attentions.0.proj_in",
        "down_blocks.0.resnets.1.conv1",
        "down_blocks.0.attentions.1.proj_in",
        "down_blocks.0.downsamplers.0.conv",
        "down_blocks.2.resnets.0.conv1",
        "down_blocks.10.resnets.0.conv1",
        "mid_block.resnets.0.conv1",
        "mid_block.attentions.0.proj_in",
        "mid_block.resnets.1.conv1",
        "up_blocks.0.resnets.0.conv1",
        "up_blocks.0.upsamplers.0.conv",
        "conv_out",
    ]
    assert in_order(paths[::-1]) == paths


def test_double_blocks_go_before_single_ones() -> None:
    paths = ["x_embedder", "transformer_blocks.2.attn.to_q", "single_transformer_blocks.0.attn.to_q", "proj_out"]
    assert in_order(paths[::-1]) == paths


def test_kinds_that_belong_together() -> None:
    kinds = ["attn1.to_v", "ff.net.2", "attn2.to_q", "attn1.to_out.0", "attn1.to_q", "ff.net.0.proj", "attn1.to_k"]
    assert kinds_in_order([*kinds, "attn1.to_q"]) == [
        "attn1.to_q",
        "attn1.to_k",
        "attn1.to_v",
        "attn1.to_out.0",
        "attn2.to_q",
        "ff.net.0.proj",
        "ff.net.2",
    ]
