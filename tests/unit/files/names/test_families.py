"""The names of a layer in other programs: known keys, nothing left out, and the way back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest

from meta_models import DIFFUSERS, OTHERS, TRANSFORMERS, Shape, diffusers_shapes, transformers_shapes
from nerine.files.names import Alias, aliases, family_of, flatten, renamed
from nerine.files.names.families import FAMILIES

pytest.importorskip("diffusers", reason="needs diffusers: pip install 'nerine[train]'")

pytestmark = pytest.mark.no_device_guard

FAMILY = {
    "unet": [name for name in DIFFUSERS if name.startswith("unet ")],
    "wan": ["wan", "wan image", "wan vace"],
    "sd3": ["sd3", "sd3.5"],
    "ltx": ["ltx", "ltx2"],
}
# OpenCLIP stores the projection the other way round; T5's tokens are one weight at two places.
TWICE = {"encoder.embed_tokens"}
UNNAMED = {
    "clip with projection/open_clip": {"text_projection"},
    "t5/bare": TWICE,
    "t5 plain/bare": TWICE,
    "umt5/bare": TWICE,
}
ENCODERS = {
    "clip": ("clip-text", "bare"),
    "clip with projection": ("clip-text", "transformers"),
    "t5": ("t5-encoder", "transformers"),
    "t5 plain": ("t5-encoder", "transformers"),
    "umt5": ("t5-encoder", "transformers"),
}


def shapes(name: str) -> dict[str, Shape]:
    return diffusers_shapes(name) if name in DIFFUSERS else transformers_shapes(name)


def pieces(
    found: Iterable[Alias], own: Mapping[str, Shape], other: Mapping[str, Shape]
) -> set[tuple[tuple[str, int, int], tuple[str, int, int]]]:
    """Which rows are which, with all ends written out."""
    return {
        (
            (alias.own, *(alias.own_rows or (0, own[alias.own][0]))),
            (alias.name, *(alias.rows or (0, other[alias.name][0]))),
        )
        for alias in found
    }


@pytest.mark.parametrize("name", [*DIFFUSERS, *ENCODERS])
def test_no_layer_is_left_out_and_the_way_back_leads_home(name: str) -> None:
    ours = shapes(name)
    known = family_of(ours)
    assert known is not None
    family, own = known
    for naming, found in aliases(ours).items():
        unnamed = set(ours) - {alias.own for alias in found}
        assert unnamed == UNNAMED.get(f"{name}/{naming}", set())
        theirs = renamed(ours, found)
        back = family.aliases(theirs, naming)[own]
        assert renamed(theirs, back) == {path: shape for path, shape in ours.items() if path not in unnamed}
        assert {(b, a) for a, b in pieces(back, theirs, ours)} == pieces(found, ours, theirs)
        if any(alias.name != alias.own for alias in found) and name != "clip with projection":
            assert family_of(theirs) == (family, naming)


@pytest.mark.parametrize("name", [*DIFFUSERS, *ENCODERS])
def test_a_family_is_recognised(name: str) -> None:
    family, naming = family_of(shapes(name)) or (None, "")
    assert family is not None
    if name in ENCODERS:
        assert (family.name, naming) == ENCODERS[name]
    else:
        expected = next((family for family, names in FAMILY.items() if name in names), name)
        assert (family.name, naming) == (expected, "diffusers")


STRANGERS = [name for name in TRANSFORMERS if name not in ENCODERS]


@pytest.mark.parametrize("name", [*STRANGERS, "AutoencoderKL", "StableAudioDiTModel", "PriorTransformer"])
def test_a_stranger_is_left_alone(name: str) -> None:
    ours = diffusers_shapes(name) if name in OTHERS else transformers_shapes(name)
    assert family_of(ours) is None
    assert aliases(ours) == {}
    assert aliases({}) == {}


def test_part_of_a_model_is_enough() -> None:
    ours = {path: shape for path, shape in shapes("flux").items() if "blocks" in path}
    assert {a.own for a in aliases(ours)["native"]} == set(ours)
    ours = {path: shape for path, shape in shapes("unet sdxl").items() if "up_blocks" not in path}
    assert {a.own for a in aliases(ours)["native"]} == set(ours)


KEYS = {
    "unet sdxl": """
        conv_in                                                     input_blocks.0.0
        down_blocks.0.resnets.1.conv1                               input_blocks.2.0.in_layers.2
        down_blocks.0.downsamplers.0.conv                           input_blocks.3.0.op
        down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q  input_blocks.4.1.transformer_blocks.1.attn1.to_q
        down_blocks.1.resnets.0.conv_shortcut                       input_blocks.4.0.skip_connection
        down_blocks.2.attentions.1.proj_in                          input_blocks.8.1.proj_in
        mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj   middle_block.1.transformer_blocks.9.ff.net.0.proj
        mid_block.resnets.1.time_emb_proj                           middle_block.2.emb_layers.1
        up_blocks.0.attentions.2.transformer_blocks.9.attn2.to_k    output_blocks.2.1.transformer_blocks.9.attn2.to_k
        up_blocks.0.upsamplers.0.conv                               output_blocks.2.2.conv
        up_blocks.1.attentions.0.norm                               output_blocks.3.1.norm
        up_blocks.2.resnets.2.conv2                                 output_blocks.8.0.out_layers.3
        add_embedding.linear_1                                      label_emb.0.0
        time_embedding.linear_2                                     time_embed.2
        conv_out                                                    out.2
    """,
    "unet sd1": """
        down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k  input_blocks.2.1.transformer_blocks.0.attn2.to_k
        down_blocks.3.resnets.1.norm2                               input_blocks.11.0.out_layers.0
        up_blocks.0.upsamplers.0.conv                               output_blocks.2.1.conv
        up_blocks.1.upsamplers.0.conv                               output_blocks.5.2.conv
        up_blocks.3.attentions.2.proj_out                           output_blocks.11.1.proj_out
        conv_norm_out                                               out.0
    """,
    "unet sd2": """
        class_embedding.linear_2                                    label_emb.0.2
    """,
    "unet two levels": """
        down_blocks.1.resnets.0.conv1                               input_blocks.3.0.in_layers.2
        up_blocks.1.attentions.1.proj_in                            output_blocks.3.1.proj_in
    """,
    "unet no attention in the middle": """
        mid_block.resnets.0.conv1                                   middle_block.0.in_layers.2
    """,
    "controlnet": """
        controlnet_down_blocks.11                                   zero_convs.11.0
        controlnet_mid_block                                        middle_block_out.0
        controlnet_cond_embedding.blocks.0                          input_hint_block.2
        controlnet_cond_embedding.conv_out                          input_hint_block.14
    """,
    "flux": """
        transformer_blocks.1.attn.to_v[0:128]                 double_blocks.1.img_attn.qkv[256:384]
        transformer_blocks.0.attn.add_k_proj[0:128]           double_blocks.0.txt_attn.qkv[128:256]
        single_transformer_blocks.1.attn.to_k[0:128]          single_blocks.1.linear1[128:256]
        single_transformer_blocks.1.proj_mlp[0:512]           single_blocks.1.linear1[384:896]
        single_transformer_blocks.0.proj_out                  single_blocks.0.linear2
        transformer_blocks.0.norm1_context.linear             double_blocks.0.txt_mod.lin
        norm_out.linear[0:128]                                final_layer.adaLN_modulation.1[128:256]
        norm_out.linear[128:256]                              final_layer.adaLN_modulation.1[0:128]
        time_text_embed.guidance_embedder.linear_1            guidance_in.in_layer
        x_embedder                                            img_in
    """,
    "flux2": """
        transformer_blocks.0.ff_context.linear_in             double_blocks.0.txt_mlp.0
        single_transformer_blocks.0.attn.to_qkv_mlp_proj      single_blocks.0.linear1
        single_stream_modulation.linear                       single_stream_modulation.lin
    """,
    "chroma": """
        distilled_guidance_layer.layers.4.linear_1            distilled_guidance_layer.layers.4.in_layer
        distilled_guidance_layer.in_proj                      distilled_guidance_layer.in_proj
        transformer_blocks.0.ff.net.0.proj                    double_blocks.0.img_mlp.0
    """,
    "sd3.5": """
        transformer_blocks.1.attn2.to_k[0:192]                joint_blocks.1.x_block.attn2.qkv[192:384]
        transformer_blocks.0.norm1.linear                     joint_blocks.0.x_block.adaLN_modulation.1
        transformer_blocks.0.norm1_context.linear             joint_blocks.0.context_block.adaLN_modulation.1
        transformer_blocks.2.norm1_context.linear[0:192]      joint_blocks.2.context_block.adaLN_modulation.1[192:384]
        transformer_blocks.2.norm1_context.linear[192:384]    joint_blocks.2.context_block.adaLN_modulation.1[0:192]
        transformer_blocks.2.attn.norm_added_q                joint_blocks.2.context_block.attn.ln_q
        pos_embed.proj                                        x_embedder.proj
    """,
    "auraflow": """
        joint_transformer_blocks.1.attn.to_out.0              double_layers.1.attn.w2o
        joint_transformer_blocks.0.ff_context.out_projection  double_layers.0.mlpC.c_proj
        single_transformer_blocks.0.norm1.linear              single_layers.0.modCX.1
    """,
    "pixart": """
        transformer_blocks.1.attn2.to_v[0:1152]               blocks.1.cross_attn.kv_linear[1152:2304]
        adaln_single.linear                                   t_block.1
        adaln_single.emb.resolution_embedder.linear_2         csize_embedder.mlp.2
    """,
    "lumina2": """
        layers.1.attn.to_k[0:768]                             layers.1.attention.qkv[2304:3072]
        layers.1.norm1.norm                                   layers.1.attention_norm1
        context_refiner.1.norm1                               context_refiner.1.attention_norm1
        time_caption_embed.caption_embedder.1                 cap_embedder.1
    """,
    "z-image": """
        noise_refiner.0.attention.to_q[0:3840]                noise_refiner.0.attention.qkv[0:3840]
        layers.1.attention.to_out.0                           layers.1.attention.out
        layers.1.feed_forward.w2                              layers.1.feed_forward.w2
        all_final_layer.2-1.adaLN_modulation.1                final_layer.adaLN_modulation.1
    """,
    "wan image": """
        blocks.1.attn1.to_out.0                               blocks.1.self_attn.o
        blocks.1.attn2.add_k_proj                             blocks.1.cross_attn.k_img
        blocks.0.norm2                                        blocks.0.norm3
        condition_embedder.image_embedder.ff.net.2            img_emb.proj.3
        proj_out                                              head.head
    """,
    "ltx": """
        proj_in                                               patchify_proj
        time_embed.emb.timestep_embedder.linear_1             adaln_single.emb.timestep_embedder.linear_1
        transformer_blocks.1.attn2.norm_k                     transformer_blocks.1.attn2.k_norm
        transformer_blocks.1.ff.net.0.proj                    transformer_blocks.1.ff.net.0.proj
    """,
    "mochi": """
        transformer_blocks.1.norm1_context.linear             blocks.1.mod_y
        transformer_blocks.2.norm1_context.linear_1           blocks.2.mod_y
    """,
    "qwen-image": """
        transformer_blocks.1.img_mod.1                        transformer_blocks.1.img_mod.1
    """,
}
ORIGINAL = {
    "hunyuan-video": (
        "original",
        """
        transformer_blocks.0.attn.to_k[0:3072]                double_blocks.0.img_attn_qkv[3072:6144]
        transformer_blocks.0.ff.net.0.proj                    double_blocks.0.img_mlp.fc1
        single_transformer_blocks.1.norm.linear               single_blocks.1.modulation.linear
        """,
    ),
    "hunyuan-image": (
        "original",
        """
        context_embedder_2.linear_3                           byt5_in.fc3
        time_guidance_embed.guidance_embedder.linear_1        guidance_in.mlp.0
        """,
    ),
    "clip": (
        "transformers",
        """
        encoder.layers.1.self_attn.k_proj                     text_model.encoder.layers.1.self_attn.k_proj
        embeddings.token_embedding                            text_model.embeddings.token_embedding
        """,
    ),
    "clip with projection": (
        "open_clip",
        """
        text_model.encoder.layers.1.self_attn.v_proj[0:32]    transformer.resblocks.1.attn.in_proj_weight[64:96]
        text_model.encoder.layers.0.mlp.fc2                   transformer.resblocks.0.mlp.c_proj
        text_model.final_layer_norm                           ln_final
        """,
    ),
    "t5": ("bare", "encoder.block.1.layer.0.SelfAttention.q   block.1.layer.0.SelfAttention.q"),
}


@pytest.mark.parametrize(
    ("name", "naming", "keys"),
    [*((name, "native", keys) for name, keys in KEYS.items()), *((name, *rest) for name, rest in ORIGINAL.items())],
)
def test_known_keys(name: str, naming: str, keys: str) -> None:
    found = {(_written(a.own, a.own_rows, a.rows, shapes(name)[a.own][0]), a) for a in aliases(shapes(name))[naming]}
    written = {(own, f"{a.name}[{a.rows[0]}:{a.rows[1]}]" if a.rows else a.name) for own, a in found}
    for line in keys.strip().splitlines():
        assert tuple(line.split()) in written


def _written(own: str, rows: tuple[int, int] | None, others: tuple[int, int] | None, size: int) -> str:
    if rows is None and others is None:
        return own
    start, end = rows or (0, size)
    return f"{own}[{start}:{end}]"


def test_fused_here_and_split_there() -> None:
    native = renamed(shapes("flux"), aliases(shapes("flux"))["native"])
    found = [alias for alias in aliases(native)["diffusers"] if alias.own == "single_blocks.0.linear1"]
    assert found == [
        Alias("single_transformer_blocks.0.attn.to_q", "single_blocks.0.linear1", (0, 128)),
        Alias("single_transformer_blocks.0.attn.to_k", "single_blocks.0.linear1", (128, 256)),
        Alias("single_transformer_blocks.0.attn.to_v", "single_blocks.0.linear1", (256, 384)),
        Alias("single_transformer_blocks.0.proj_mlp", "single_blocks.0.linear1", (384, 896)),
    ]


def test_a_piece_has_no_place_without_its_neighbours() -> None:
    ours = shapes("flux")
    ours = {path: shape for path, shape in ours.items() if not path.endswith("single_transformer_blocks.0.attn.to_k")}
    unnamed = set(ours) - {alias.own for alias in aliases(ours)["native"]}
    assert unnamed == {f"single_transformer_blocks.0.{p}" for p in ("attn.to_q", "attn.to_v", "proj_mlp")}


def test_an_odd_size_is_not_cut() -> None:
    native = renamed(shapes("sd3"), aliases(shapes("sd3"))["native"])
    native["joint_blocks.0.x_block.attn.qkv"] = (385, 128)
    assert "joint_blocks.0.x_block.attn.qkv" not in {alias.own for alias in aliases(native)["diffusers"]}


@pytest.mark.parametrize("name", [*DIFFUSERS, *ENCODERS])
def test_a_name_means_one_thing_whichever_program_wrote_it(name: str) -> None:
    meanings: dict[str, set[tuple[object, ...]]] = {}
    for path in shapes(name):
        meanings.setdefault(flatten(path), set()).add(("whole", path))
    for naming, found in aliases(shapes(name)).items():
        for alias in found:
            is_whole = alias.rows is None and alias.own_rows is None
            meaning = ("whole", alias.own) if is_whole else (naming, alias.own, alias.own_rows, alias.rows)
            meanings.setdefault(flatten(alias.name), set()).add(meaning)
    for means in meanings.values():
        assert len(means) == 1 or not any(kind == "whole" for kind, *_ in means)


def test_the_tables_are_whole() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    for family in FAMILIES:
        assert set(family.marks) == set(family.namings)
        assert {len(row) for row in family.table} <= {len(family.namings)}
        for column in range(len(family.namings)):
            entries = [row[column] for row in family.table if row[column] != "-"]
            assert len(entries) == len(set(entries)), family.name
