"""The UNet of Stable Diffusion 1, 2 and XL: diffusers' names and those of the original implementation.

    down_blocks.1.attentions.0   input_blocks.4.1      counted through all blocks, a downsampler counts as one
    mid_block.resnets.1          middle_block.2
    up_blocks.0.upsamplers.0     output_blocks.2.2     after the attention of the last layer, where there is one
Source: the layouts of CompVis's latent-diffusion and Stability's generative-models against diffusers'
UNet2DConditionModel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from nerine.files.names.alias import Alias, Shapes

__all__ = ["unet_aliases", "unet_family"]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_SINGLE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_INDEX = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.")
_NATIVE = re.compile(r"(input|output)_blocks\.(\d+)\.(\d+)\.(\w+)")


def unet_family(shapes: Shapes) -> str:
    """ "sd-unet" or "sdxl-unet", or nothing where these are no such layers."""
    diffusers = any(_INDEX.match(path) for path in shapes)
    native = any(_NATIVE.match(path) for path in shapes)
    if diffusers == native:
        return ""
    deep = any(".transformer_blocks.1." in path or path.startswith(("add_embedding.", "label_emb.")) for path in shapes)
    return "sdxl-unet" if deep else "sd-unet"


def unet_aliases(shapes: Shapes) -> dict[str, tuple[Alias, ...]]:
    """Native names of diffusers' layers, or the other way round."""
    from_diffusers = any(_INDEX.match(path) for path in shapes)
    pairs = dict(_pairs(*(_sizes(shapes) if from_diffusers else _native_sizes(shapes))))
    if not from_diffusers:
        pairs = {native: own for own, native in pairs.items()}
    heads = {*pairs}
    found = [
        Alias(pairs[head] + path[len(head) :], path)
        for path in shapes
        for head in [_head(path, heads)]
        if head is not None
    ]
    return {"native" if from_diffusers else "diffusers": tuple(found)}


def _head(path: str, heads: set[str]) -> str | None:
    """The longest of `heads` that `path` is or is below of."""
    words = path.split(".")
    return next((head for n in range(len(words), 0, -1) if (head := ".".join(words[:n])) in heads), None)


class _Block:
    """How many layers a block has, and whether it has attention and a sampler."""

    def __init__(self) -> None:
        self.layers, self.attention, self.sampler = 0, False, False


def _sizes(shapes: Shapes) -> tuple[list[_Block], list[_Block]]:
    """The blocks of a UNet with diffusers' names. Where only attention is adapted, and so the counts are not all to be
    seen, they are those of the released models: two layers down and three up."""
    sides: dict[str, dict[int, _Block]] = {"down": {}, "up": {}}
    whole = any(".resnets." in path for path in shapes)
    for path in shapes:
        match = _INDEX.match(path)
        if match:
            side, block, kind, layer = match.groups()
            own = sides[side].setdefault(int(block), _Block())
            own.attention |= kind == "attentions"
            own.sampler |= kind.endswith("samplers")
            if kind in ("resnets", "attentions"):
                own.layers = max(own.layers, int(layer) + 1)
    count = max([*sides["down"], *sides["up"]], default=0) + 1
    down, up = ([side.get(i) or _Block() for i in range(count)] for side in (sides["down"], sides["up"]))
    if not whole:
        for i in range(count):
            down[i].layers, up[i].layers = max(2, down[i].layers), max(3, up[i].layers)
            down[i].sampler = up[i].sampler = i < count - 1
    return down, up


def _native_sizes(shapes: Shapes) -> tuple[list[_Block], list[_Block]]:
    """The blocks of a UNet with native names: a sampler ends one."""
    seen: dict[str, dict[int, set[str]]] = {"input": {}, "output": {}}
    for path in shapes:
        match = _NATIVE.match(path)
        if match:
            side, index, _, word = match.groups()
            seen[side].setdefault(int(index), set()).add(word)
    down, up = [_Block()], [_Block()]
    for index in range(1, max(seen["input"], default=0) + 1):
        words = seen["input"].get(index, set())
        if "op" in words or (not words and not any("in_layers" in w for w in seen["input"].values())):
            down[-1].sampler = True
            down.append(_Block())
        else:
            down[-1].layers += 1
            down[-1].attention |= bool(words & {"transformer_blocks", "proj_in", "norm"})
    for index in range(max(seen["output"], default=-1) + 1):
        words = seen["output"].get(index, set())
        up[-1].layers += 1
        up[-1].attention |= bool(words & {"transformer_blocks", "proj_in", "norm"})
        if "conv" in words:
            up[-1].sampler = True
            up.append(_Block())
    return down, [block for block in up if block.layers] or up


def _pairs(down: list[_Block], up: list[_Block]) -> Iterator[tuple[str, str]]:
    """(diffusers' name, native name) of every module that the two call otherwise."""
    yield from _SINGLE.items()
    number = 1
    for i, block in enumerate(down):
        for j in range(block.layers):
            yield from _resnet(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{number}.0")
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{number}.1"
            number += 1
        if block.sampler:
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1
    yield from _resnet("mid_block.resnets.0", "middle_block.0")
    yield "mid_block.attentions.0", "middle_block.1"
    yield from _resnet("mid_block.resnets.1", "middle_block.2")
    number = 0
    for i, block in enumerate(up):
        for j in range(block.layers):
            yield from _resnet(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{number}.0")
            if not (block.sampler and not block.attention and j == block.layers - 1):
                yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{number}.1"
            number += 1
        if block.sampler:
            place = 2 if block.attention else 1
            yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{number - 1}.{place}.conv"


def _resnet(own: str, native: str) -> Iterator[tuple[str, str]]:
    for ours, theirs in _RESNET.items():
        yield f"{own}.{ours}", f"{native}.{theirs}"
