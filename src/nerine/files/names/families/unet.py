"""The UNets of Stable Diffusion 1, 2 and XL, and their ControlNets.

diffusers counts the parts of each resolution on their own (`down_blocks.1.attentions.0`); the original program counts
all steps of the way down and of the way up through (`input_blocks.4.1`), so that which number is which depends on how
many parts each resolution has.
"""

from __future__ import annotations

from collections.abc import Iterator

from nerine.files.names.families.base import Family, Shapes, Table, table

__all__ = ["CONTROLNET", "UNET"]

RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
OUTSIDE = table("""
    conv_in                       input_blocks.0.0
    time_embedding.linear_1       time_embed.0
    time_embedding.linear_2       time_embed.2
    conv_norm_out                 out.0
    conv_out                      out.2
""")
HINTS = table("""
    controlnet_down_blocks.*             zero_convs.*.0
    controlnet_mid_block                 middle_block_out.0
    controlnet_cond_embedding.conv_in    input_hint_block.0
""")


class Tree:
    """Which paths there are, asked by their beginnings."""

    def __init__(self, shapes: Shapes) -> None:
        self._heads = {path[:end] for path in shapes for end in _ends(path)}

    def __contains__(self, head: str) -> bool:
        return head in self._heads

    def numbers(self, head: str) -> Iterator[int]:
        """0, 1, 2, ... as long as there is such a path below `head`."""
        number = 0
        while f"{head}.{number}" in self._heads:
            yield number
            number += 1


def _ends(path: str) -> Iterator[int]:
    end = path.find(".")
    while end >= 0:
        yield end
        end = path.find(".", end + 1)
    yield len(path)


def _step(ours: str, number: int, theirs: str) -> Table:
    """A resnet and the attention after it."""
    resnet = tuple((f"{ours}.resnets.{number}.{a}", f"{theirs}.0.{b}") for a, b in RESNET)
    return (*resnet, (f"{ours}.attentions.{number}.**", f"{theirs}.1.**"))


def _middle(tree: Tree, own: str) -> Iterator[tuple[str, ...]]:
    """Resnets and attentions in turn; there are models without the attention, or with one resnet alone."""
    if own == "diffusers":
        count = len(list(tree.numbers("mid_block.resnets"))) + len(list(tree.numbers("mid_block.attentions")))
        has_attention = "mid_block.attentions.0" in tree
    else:
        count = len(list(tree.numbers("middle_block")))
        has_attention = "middle_block.1" in tree and "middle_block.1.in_layers" not in tree
    for number in range(count):
        if has_attention and number % 2:
            yield f"mid_block.attentions.{number // 2}.**", f"middle_block.{number}.**"
        else:
            resnet = f"mid_block.resnets.{number // 2 if has_attention else number}"
            yield from ((f"{resnet}.{a}", f"middle_block.{number}.{b}") for a, b in RESNET)


def _from_diffusers(tree: Tree) -> Iterator[tuple[str, ...]]:
    at = 1
    for block in tree.numbers("down_blocks"):
        ours = f"down_blocks.{block}"
        for number in tree.numbers(f"{ours}.resnets"):
            yield from _step(ours, number, f"input_blocks.{at}")
            at += 1
        if f"{ours}.downsamplers" in tree:
            yield f"{ours}.downsamplers.0.conv", f"input_blocks.{at}.0.op"
            at += 1
    at = 0
    for block in tree.numbers("up_blocks"):
        ours = f"up_blocks.{block}"
        number = 0
        for number in tree.numbers(f"{ours}.resnets"):
            yield from _step(ours, number, f"output_blocks.{at}")
            at += 1
        after = 2 if f"{ours}.attentions.{number}" in tree else 1
        yield f"{ours}.upsamplers.0.conv", f"output_blocks.{at - 1}.{after}.conv"


def _from_native(tree: Tree) -> Iterator[tuple[str, ...]]:
    block, number = 0, 0
    for at in tree.numbers("input_blocks"):
        theirs = f"input_blocks.{at}"
        if f"{theirs}.0.op" in tree:
            yield f"down_blocks.{block}.downsamplers.0.conv", f"{theirs}.0.op"
            block, number = block + 1, 0
        elif at:
            yield from _step(f"down_blocks.{block}", number, theirs)
            number += 1
    block, number = 0, 0
    for at in tree.numbers("output_blocks"):
        theirs = f"output_blocks.{at}"
        yield from _step(f"up_blocks.{block}", number, theirs)
        number += 1
        for after in (1, 2):
            if f"{theirs}.{after}.conv" in tree:
                yield f"up_blocks.{block}.upsamplers.0.conv", f"{theirs}.{after}.conv"
                block, number = block + 1, 0


def _labels(tree: Tree, own: str) -> Iterator[tuple[str, ...]]:
    """What else the time embedding is told. The original program has one name for both of diffusers'; models that
    are told sizes (XL) have no attention at the first resolution, models that are told an image (2.1 unCLIP) have."""
    is_class = "class_embedding" in tree if own == "diffusers" else "input_blocks.1.1.proj_in" in tree
    ours = "class_embedding" if is_class else "add_embedding"
    yield f"{ours}.linear_1", "label_emb.0.0"
    yield f"{ours}.linear_2", "label_emb.0.2"


def _grown(shapes: Shapes, own: str) -> Table:
    tree = Tree(shapes)
    blocks = _from_diffusers(tree) if own == "diffusers" else _from_native(tree)
    return (*blocks, *_middle(tree, own), *_labels(tree, own))


def _grown_with_hints(shapes: Shapes, own: str) -> Table:
    tree = Tree(shapes)
    if own == "diffusers":
        blocks = len(list(tree.numbers("controlnet_cond_embedding.blocks")))
    else:
        blocks = sum(1 for path in shapes if path.startswith("input_hint_block.")) - 2
    hints = [(f"controlnet_cond_embedding.blocks.{i}", f"input_hint_block.{2 * i + 2}") for i in range(blocks)]
    return (*_grown(shapes, own), *hints, ("controlnet_cond_embedding.conv_out", f"input_hint_block.{2 * blocks + 2}"))


UNET = Family(
    "unet",
    ("diffusers", "native"),
    {
        "diffusers": ("conv_in", "time_embedding.linear_1", "down_blocks.*.resnets.*.time_emb_proj"),
        "native": ("input_blocks.*.*", "time_embed.*", "input_blocks.*.*.emb_layers.*"),
    },
    OUTSIDE,
    _grown,
)
CONTROLNET = Family(
    "controlnet",
    UNET.namings,
    {
        "diffusers": (*UNET.marks["diffusers"], "controlnet_mid_block"),
        "native": (*UNET.marks["native"], "zero_convs.*.*"),
    },
    (*OUTSIDE, *HINTS),
    _grown_with_hints,
)
