"""The parts of a pipeline that take adapters, by the names that pipelines and files give to them.

Models look a pipeline's parts up here, and files the component that a part is; neither knows the other.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["PARTS"]

# What hosts call the parts of a pipeline: the component that it is. The second transformer of a pipeline that has one
# for late steps (Wan 2.2) is a denoiser like the first, with files of its own.
PARTS: Mapping[str, str] = {
    "unet": "denoiser",
    "transformer": "denoiser",
    "transformer_2": "denoiser",
    "prior": "denoiser",
    "diffusion_model": "denoiser",
    "denoiser": "denoiser",
    "text_encoder": "text_encoder",
    "text_encoder_1": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "text_encoder_3": "text_encoder_3",
}
