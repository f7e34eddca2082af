"""A complete text-to-image diffusion model of a few megabytes, trained, with pictures to fine-tune it on.

It draws handwritten digits at 16 px and fine-tunes within a minute or two on a laptop's CPU: for demos, tests
and first steps. Importing this package is cheap; diffusers and transformers are imported by `load_pipeline`
alone, and come with `pip install "nerine[train]"`.
"""

from nerine.tiny.data import Split, StyleSet, prompt, style_set
from nerine.tiny.judge import Judge, colour_distance
from nerine.tiny.load import load_pipeline
from nerine.tiny.losses import denoising_loss, drop_prompts, held_out_loss

__all__ = [
    "Judge",
    "Split",
    "StyleSet",
    "colour_distance",
    "denoising_loss",
    "drop_prompts",
    "held_out_loss",
    "load_pipeline",
    "prompt",
    "style_set",
]
