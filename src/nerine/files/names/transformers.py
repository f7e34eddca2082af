"""Diffusion transformers: native names against diffusers', as tables.

A line is "native = diffusers" with N for the number of a block. Several names after the sign are one layer there in
pieces here, in that order: of equal size, or with "| hidden" as many rows as there are inputs each and the rest for the
last. "| swap" exchanges the two halves of a layer that has twice as many outputs as inputs (shift and scale of the last
norm, which the two keep in different order).
Source: the released checkpoints against diffusers' classes (Flux, SD3, Wan, Z-Image, PixArt, AuraFlow).
"""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

from nerine.files.names.alias import Alias, Shapes, Span

__all__ = ["TABLES", "Table"]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class _Line(NamedTuple):
    native: str
    parts: tuple[str, ...]
    cut: str


class Table:
    """The names of one family, looked up from either side."""

    namings = ("native", "diffusers")

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self._native: dict[str, _Line] = {}
        self._diffusers: dict[str, tuple[_Line, int]] = {}
        for row in text.strip().splitlines():
            names, _, cut = row.partition("|")
            native, _, parts = names.partition("=")
            line = _Line(native.strip(), tuple(parts.split()), cut.strip())
            self._native[line.native] = line
            self._diffusers.update({part: (line, i) for i, part in enumerate(line.parts)})

    def count(self, shapes: Shapes, naming: str) -> int:
        """How many of the paths have names of this family."""
        known = self._native if naming == "native" else self._diffusers
        return sum(pattern in known for path in shapes for pattern, _ in [_split(path, known)])

    def aliases(self, shapes: Shapes, naming: str) -> tuple[Alias, ...]:
        """The names in the other naming of layers that have those of `naming`."""
        found: list[Alias] = []
        for path, shape in shapes.items():
            if naming == "native":
                pattern, number = _split(path, self._native)
                if pattern in self._native:
                    found += self._of_native(path, shape, self._native[pattern], number)
            else:
                pattern, number = _split(path, self._diffusers)
                if pattern in self._diffusers:
                    found += self._of_diffusers(path, shape, *self._diffusers[pattern], number, shapes)
        return tuple(found)

    @staticmethod
    def _of_native(path: str, shape: tuple[int, ...], line: _Line, number: str) -> list[Alias]:
        parts = [_numbered(part, number) for part in line.parts]
        if len(parts) > 1:
            spans = _spans(line, shape[0], shape[1], len(parts))
            return [Alias(part, path, own_rows=span) for part, span in zip(parts, spans, strict=True)]
        return _whole(parts[0], path, shape, line.cut)

    @staticmethod
    def _of_diffusers(
        path: str, shape: tuple[int, ...], line: _Line, index: int, number: str, shapes: Shapes
    ) -> list[Alias]:
        native = _numbered(line.native, number)
        if len(line.parts) == 1:
            return _whole(native, path, shape, line.cut)
        sizes = []
        for i, part in enumerate(line.parts):
            known = shapes.get(_numbered(part, number))
            usual = shape[0] if line.cut != "hidden" else shape[1] * (4 if i == len(line.parts) - 1 else 1)
            sizes.append(known[0] if known is not None else usual)
        start = sum(sizes[:index])
        return [Alias(native, path, rows=(start, start + sizes[index]))]


def _split(path: str, known: object) -> tuple[str, str]:
    """The pattern of a path and the number in it; a path that stands in the table as it is has none."""
    if path in known:  # type: ignore[operator]
        return path, ""
    match = _NUMBER.search(path)
    return (path, "") if match is None else (f"{path[: match.start()]}N{path[match.end() :]}", match.group())


def _numbered(name: str, number: str) -> str:
    return name.replace(".N.", f".{number}.")


def _spans(line: _Line, rows: int, inputs: int, count: int) -> list[Span]:
    size = inputs if line.cut == "hidden" else rows // count
    edges = [*(size * i for i in range(count)), rows]
    return list(itertools.pairwise(edges))


def _whole(name: str, path: str, shape: tuple[int, ...], cut: str) -> list[Alias]:
    if cut != "swap" or len(shape) < 2 or shape[0] != 2 * shape[1]:
        return [Alias(name, path)]
    half = shape[1]
    first, second = (0, half), (half, 2 * half)
    return [Alias(name, path, own_rows=first, rows=second), Alias(name, path, own_rows=second, rows=first)]


def _blocks(lead: str, other: str, text: str) -> str:
    """Lines of which the names stand below `lead` and `other`."""
    rows = []
    for row in text.strip().splitlines():
        names, bar, cut = row.partition("|")
        native, _, parts = names.partition("=")
        rows.append(f"{lead}{native.strip()} = {' '.join(other + part for part in parts.split())} {bar}{cut}")
    return "\n".join(rows) + "\n"


_FLUX = """
img_in = x_embedder
txt_in = context_embedder
time_in.in_layer = time_text_embed.timestep_embedder.linear_1
time_in.out_layer = time_text_embed.timestep_embedder.linear_2
vector_in.in_layer = time_text_embed.text_embedder.linear_1
vector_in.out_layer = time_text_embed.text_embedder.linear_2
guidance_in.in_layer = time_text_embed.guidance_embedder.linear_1
guidance_in.out_layer = time_text_embed.guidance_embedder.linear_2
final_layer.linear = proj_out
final_layer.adaLN_modulation.1 = norm_out.linear | swap
"""
_FLUX += _blocks(
    "double_blocks.N.",
    "transformer_blocks.N.",
    """
img_mod.lin = norm1.linear
txt_mod.lin = norm1_context.linear
img_attn.qkv = attn.to_q attn.to_k attn.to_v
txt_attn.qkv = attn.add_q_proj attn.add_k_proj attn.add_v_proj
img_attn.proj = attn.to_out.0
txt_attn.proj = attn.to_add_out
img_attn.norm.query_norm = attn.norm_q
img_attn.norm.key_norm = attn.norm_k
txt_attn.norm.query_norm = attn.norm_added_q
txt_attn.norm.key_norm = attn.norm_added_k
img_mlp.0 = ff.net.0.proj
img_mlp.2 = ff.net.2
txt_mlp.0 = ff_context.net.0.proj
txt_mlp.2 = ff_context.net.2
""",
)
_FLUX += _blocks(
    "single_blocks.N.",
    "single_transformer_blocks.N.",
    """
modulation.lin = norm.linear
linear1 = attn.to_q attn.to_k attn.to_v proj_mlp | hidden
linear2 = proj_out
norm.query_norm = attn.norm_q
norm.key_norm = attn.norm_k
""",
)
_SD3 = """
x_embedder.proj = pos_embed.proj
context_embedder = context_embedder
t_embedder.mlp.0 = time_text_embed.timestep_embedder.linear_1
t_embedder.mlp.2 = time_text_embed.timestep_embedder.linear_2
y_embedder.mlp.0 = time_text_embed.text_embedder.linear_1
y_embedder.mlp.2 = time_text_embed.text_embedder.linear_2
final_layer.linear = proj_out
final_layer.adaLN_modulation.1 = norm_out.linear | swap
"""
_SD3 += _blocks(
    "joint_blocks.N.",
    "transformer_blocks.N.",
    """
x_block.adaLN_modulation.1 = norm1.linear
context_block.adaLN_modulation.1 = norm1_context.linear | swap
x_block.attn.qkv = attn.to_q attn.to_k attn.to_v
context_block.attn.qkv = attn.add_q_proj attn.add_k_proj attn.add_v_proj
x_block.attn2.qkv = attn2.to_q attn2.to_k attn2.to_v
x_block.attn.proj = attn.to_out.0
context_block.attn.proj = attn.to_add_out
x_block.attn2.proj = attn2.to_out.0
x_block.attn.ln_q = attn.norm_q
x_block.attn.ln_k = attn.norm_k
context_block.attn.ln_q = attn.norm_added_q
context_block.attn.ln_k = attn.norm_added_k
x_block.attn2.ln_q = attn2.norm_q
x_block.attn2.ln_k = attn2.norm_k
x_block.mlp.fc1 = ff.net.0.proj
x_block.mlp.fc2 = ff.net.2
context_block.mlp.fc1 = ff_context.net.0.proj
context_block.mlp.fc2 = ff_context.net.2
""",
)
_WAN = """
time_embedding.0 = condition_embedder.time_embedder.linear_1
time_embedding.2 = condition_embedder.time_embedder.linear_2
text_embedding.0 = condition_embedder.text_embedder.linear_1
text_embedding.2 = condition_embedder.text_embedder.linear_2
time_projection.1 = condition_embedder.time_proj
img_emb.proj.0 = condition_embedder.image_embedder.norm1
img_emb.proj.1 = condition_embedder.image_embedder.ff.net.0.proj
img_emb.proj.3 = condition_embedder.image_embedder.ff.net.2
img_emb.proj.4 = condition_embedder.image_embedder.norm2
head.head = proj_out
"""
_WAN += _blocks(
    "blocks.N.",
    "blocks.N.",
    """
self_attn.q = attn1.to_q
self_attn.k = attn1.to_k
self_attn.v = attn1.to_v
self_attn.o = attn1.to_out.0
self_attn.norm_q = attn1.norm_q
self_attn.norm_k = attn1.norm_k
cross_attn.q = attn2.to_q
cross_attn.k = attn2.to_k
cross_attn.v = attn2.to_v
cross_attn.o = attn2.to_out.0
cross_attn.norm_q = attn2.norm_q
cross_attn.norm_k = attn2.norm_k
cross_attn.k_img = attn2.add_k_proj
cross_attn.v_img = attn2.add_v_proj
cross_attn.norm_k_img = attn2.norm_added_k
ffn.0 = ffn.net.0.proj
ffn.2 = ffn.net.2
norm3 = norm2
""",
)
_ATTENTION = """
attention.qkv = attention.to_q attention.to_k attention.to_v
attention.out = attention.to_out.0
attention.q_norm = attention.norm_q
attention.k_norm = attention.norm_k
"""
_Z_IMAGE = """
x_embedder = all_x_embedder.2-1
final_layer.linear = all_final_layer.2-1.linear
final_layer.adaLN_modulation.1 = all_final_layer.2-1.adaLN_modulation.1
"""
_Z_IMAGE += "".join(
    _blocks(f"{name}.N.", f"{name}.N.", _ATTENTION) for name in ("layers", "noise_refiner", "context_refiner")
)
_PIXART = """
x_embedder.proj = pos_embed.proj
y_embedder.y_proj.fc1 = caption_projection.linear_1
y_embedder.y_proj.fc2 = caption_projection.linear_2
t_embedder.mlp.0 = adaln_single.emb.timestep_embedder.linear_1
t_embedder.mlp.2 = adaln_single.emb.timestep_embedder.linear_2
csize_embedder.mlp.0 = adaln_single.emb.resolution_embedder.linear_1
csize_embedder.mlp.2 = adaln_single.emb.resolution_embedder.linear_2
ar_embedder.mlp.0 = adaln_single.emb.aspect_ratio_embedder.linear_1
ar_embedder.mlp.2 = adaln_single.emb.aspect_ratio_embedder.linear_2
t_block.1 = adaln_single.linear
final_layer.linear = proj_out
"""
_PIXART += _blocks(
    "blocks.N.",
    "transformer_blocks.N.",
    """
attn.qkv = attn1.to_q attn1.to_k attn1.to_v
attn.proj = attn1.to_out.0
cross_attn.q_linear = attn2.to_q
cross_attn.kv_linear = attn2.to_k attn2.to_v
cross_attn.proj = attn2.to_out.0
mlp.fc1 = ff.net.0.proj
mlp.fc2 = ff.net.2
""",
)
_AURAFLOW = """
t_embedder.mlp.0 = time_step_proj.linear_1
t_embedder.mlp.2 = time_step_proj.linear_2
cond_seq_linear = context_embedder
init_x_linear = pos_embed.proj
final_linear = proj_out
modF.1 = norm_out.linear | swap
"""
_AURAFLOW += _blocks(
    "double_layers.N.",
    "joint_transformer_blocks.N.",
    """
attn.w2q = attn.to_q
attn.w2k = attn.to_k
attn.w2v = attn.to_v
attn.w2o = attn.to_out.0
attn.w1q = attn.add_q_proj
attn.w1k = attn.add_k_proj
attn.w1v = attn.add_v_proj
attn.w1o = attn.to_add_out
mlpX.c_fc1 = ff.linear_1
mlpX.c_fc2 = ff.linear_2
mlpX.c_proj = ff.out_projection
mlpC.c_fc1 = ff_context.linear_1
mlpC.c_fc2 = ff_context.linear_2
mlpC.c_proj = ff_context.out_projection
modX.1 = norm1.linear
modC.1 = norm1_context.linear
""",
)
_AURAFLOW += _blocks(
    "single_layers.N.",
    "single_transformer_blocks.N.",
    """
attn.w1q = attn.to_q
attn.w1k = attn.to_k
attn.w1v = attn.to_v
attn.w1o = attn.to_out.0
modCX.1 = norm1.linear
mlp.c_fc1 = ff.linear_1
mlp.c_fc2 = ff.linear_2
mlp.c_proj = ff.out_projection
""",
)

TABLES = (
    Table("flux", _FLUX),
    Table("sd3", _SD3),
    Table("wan", _WAN),
    Table("z-image", _Z_IMAGE),
    Table("pixart", _PIXART),
    Table("auraflow", _AURAFLOW),
)
