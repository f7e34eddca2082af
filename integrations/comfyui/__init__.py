"""ComfyUI nodes that load any adapter file that nerine reads, with the numbers that it was trained with.

ComfyUI finds this folder in `custom_nodes`. The work is done in `nerine.integrations.comfy`; here are the nodes, and
the class of patches that ComfyUI recognises as its own.
"""

from __future__ import annotations

import comfy.weight_adapter
import folder_paths

from nerine.integrations.comfy import Patch, adapter_patches, describe, originals_of, patched

BLOCKS = (
    "Strengths of parts of the model, one a line or between commas: double_blocks.0-9=0.5, single_blocks=0.8. "
    "A name means every layer at or below it, * stands for any letters, 0-9 for numbers; the first that fits decides. "
    "They are multiplied by strength_model or strength_clip."
)


class AdapterPatch(Patch, comfy.weight_adapter.WeightAdapterBase):
    """A patch of nerine's that ComfyUI calls with the weight."""


def _strength(what):
    tooltip = f"How strongly to change the {what}: 0 leaves it as it is, 1 is the adapter as it was trained."
    return ("FLOAT", {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01, "tooltip": tooltip})


def _files():
    tooltip = "LoRA, LoHa, LoKr, DoRA, OFT, ... in models/loras, from any trainer."
    return (folder_paths.get_filename_list("loras"), {"tooltip": tooltip})


class LoadAdapter:
    """MODEL and CLIP with an adapter, and a text on what became of every key of the file."""

    RETURN_TYPES = ("MODEL", "CLIP", "STRING")
    RETURN_NAMES = ("model", "clip", "report")
    FUNCTION = "load"
    CATEGORY = "loaders/nerine"
    DESCRIPTION = "Loads any adapter file that nerine reads and applies it exactly as it was trained."

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "adapter": _files(),
                "strength_model": _strength("diffusion model"),
                "strength_clip": _strength("text encoders"),
            },
            "optional": {
                "clip": ("CLIP",),
                "blocks": ("STRING", {"default": "", "multiline": True, "tooltip": BLOCKS}),
            },
        }

    def load(self, model, adapter, strength_model, strength_clip, clip=None, blocks=""):
        originals = {"model": originals_of(model)}
        if clip is not None:
            originals["clip"] = originals_of(clip.patcher)
        patches = adapter_patches(
            folder_paths.get_full_path_or_raise("loras", adapter),
            model.model,
            None if clip is None else clip.patcher.model,
            blocks=blocks,
            originals=originals,
            kind=AdapterPatch,
        )
        model = patched(model, patches.model, strength_model)
        if clip is not None:
            encoders = patched(clip.patcher, patches.clip, strength_clip)
            clip = clip.clone()
            clip.patcher = encoders
        return model, clip, str(patches.report)


class AdapterReport:
    """What is in a file, without a model."""

    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    FUNCTION = "describe"
    CATEGORY = "loaders/nerine"
    DESCRIPTION = "Says what is in an adapter file: who wrote it, and the algorithm, rank and scale of every layer."
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"adapter": _files()}}

    def describe(self, adapter):
        text = describe(folder_paths.get_full_path_or_raise("loras", adapter))
        return {"ui": {"text": [text]}, "result": (text,)}


NODE_CLASS_MAPPINGS = {"NerineLoadAdapter": LoadAdapter, "NerineAdapterReport": AdapterReport}
NODE_DISPLAY_NAME_MAPPINGS = {
    "NerineLoadAdapter": "Load adapter (nerine)",
    "NerineAdapterReport": "Adapter report (nerine)",
}
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
