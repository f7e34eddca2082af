"""An adapter file as people have them: a LoRA for every layer of SDXL's UNet under the names that sd-scripts gives
them, with falling spectra, sizes that depend on the block, and the metadata of a training run.

python tests/sdxl_adapter.py FILE    writes one of full width
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from nerine.files.names import aliases

WIDTHS, CONTEXT, LAYERS = (320, 640, 1280), 2048, (0, 2, 10)
Shapes = dict[str, tuple[int, ...]]


def sdxl_shapes(narrower: int = 1) -> Shapes:
    """{path: shape of the weight} of every Linear and Conv2d of SDXL's UNet, all widths divided by `narrower`."""
    found = {path: _narrowed(shape, narrower) for path, shape in _shapes()}
    assert len(found) == 794
    return found


def _narrowed(shape: tuple[int, ...], by: int) -> tuple[int, ...]:
    out, inputs, *kernel = shape
    return (max(out // by, 4), max(inputs // by, 4), *kernel)


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    first, second, third = WIDTHS
    time = 4 * first
    yield "conv_in", (first, 4, 3, 3)
    yield "time_embedding.linear_1", (time, first)
    yield "time_embedding.linear_2", (time, time)
    yield "add_embedding.linear_1", (time, 2816)
    yield "add_embedding.linear_2", (time, time)
    for block, (inputs, out) in enumerate(((first, first), (first, second), (second, third))):
        for number in range(2):
            yield from _resnet(f"down_blocks.{block}.resnets.{number}", inputs if not number else out, out, time)
            if LAYERS[block]:
                yield from _attention(f"down_blocks.{block}.attentions.{number}", out, LAYERS[block])
        if block < 2:
            yield f"down_blocks.{block}.downsamplers.0.conv", (out, out, 3, 3)
    for number in range(2):
        yield from _resnet(f"mid_block.resnets.{number}", third, third, time)
    yield from _attention("mid_block.attentions.0", third, 10)
    skips = ((third, third, second), (second, second, first), (first, first, first))
    before = third
    for block, out in enumerate(reversed(WIDTHS)):
        for number in range(3):
            yield from _resnet(f"up_blocks.{block}.resnets.{number}", before + skips[block][number], out, time)
            before = out
            if LAYERS[2 - block]:
                yield from _attention(f"up_blocks.{block}.attentions.{number}", out, LAYERS[2 - block])
        if block < 2:
            yield f"up_blocks.{block}.upsamplers.0.conv", (out, out, 3, 3)
    yield "conv_out", (4, first, 3, 3)


def _resnet(path: str, inputs: int, out: int, time: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{path}.conv1", (out, inputs, 3, 3)
    yield f"{path}.time_emb_proj", (out, time)
    yield f"{path}.conv2", (out, out, 3, 3)
    if inputs != out:
        yield f"{path}.conv_shortcut", (out, inputs, 1, 1)


def _attention(path: str, width: int, count: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{path}.proj_in", (width, width)
    for number in range(count):
        for name, inputs in (("attn1", width), ("attn2", CONTEXT)):
            block = f"{path}.transformer_blocks.{number}.{name}"
            yield f"{block}.to_q", (width, width)
            yield f"{block}.to_k", (width, inputs)
            yield f"{block}.to_v", (width, inputs)
            yield f"{block}.to_out.0", (width, width)
        yield f"{path}.transformer_blocks.{number}.ff.net.0.proj", (8 * width, width)
        yield f"{path}.transformer_blocks.{number}.ff.net.2", (width, 4 * width)
    yield f"{path}.proj_out", (width, width)


def native(shapes: Shapes) -> dict[str, str]:
    """{path: what the original program calls that layer}."""
    return {alias.own: alias.name for alias in aliases(shapes)["native"]}


# -- numbers -----------------------------------------------------------------------------------------------------------
def factors(
    out: int, n: int, rank: int, norm: float, power: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """up `[out, rank]`, down `[rank, n]` and the singular values of their product, which fall like i^-power."""
    values = torch.arange(1, rank + 1).float() ** -power
    values *= norm / values.norm()
    left, right = (torch.linalg.qr(torch.randn(size, rank, generator=generator))[0] for size in (out, n))
    found = torch.zeros(rank)
    found[: min(rank, out, n)] = values[: min(rank, out, n)]
    return (
        _columns(left, rank) * values.sqrt(),
        values.sqrt()[:, None] * _columns(right, rank).mT,
        found,
    )


def _columns(q: Tensor, count: int) -> Tensor:
    return torch.cat([q, q.new_zeros(q.shape[0], count - q.shape[1])], 1) if q.shape[1] < count else q


def size_of(path: str) -> float:
    """|change| of a layer: more in the middle and in the cross-attention, more where there are more entries."""
    depth = 1.6 if path.startswith("mid_block") else 1.2 if path.startswith("up_blocks.0") else 0.7
    kind = 1.8 if ".attn2." in path else 0.5 if ".conv" in path else 1.0
    return 0.4 * depth * kind


def sdxl_tensors(
    shapes: Shapes, names: Mapping[str, str], rank: int = 32, dtype: torch.dtype = torch.float16, seed: int = 0
) -> dict[str, Tensor]:
    """The tensors of a file: `lora_unet_...` with alpha half the rank."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for path, (out, *rest) in shapes.items():
        norm = size_of(path) * (0.7 + 0.6 * float(torch.rand((), generator=generator))) * math.sqrt(out / 640)
        power = 0.5 + 0.7 * float(torch.rand((), generator=generator))
        up, down, _ = factors(out, math.prod(rest), rank, 2 * norm, power, generator)  # alpha/rank is a half
        stem = "lora_unet_" + names[path].replace(".", "_")
        ones = [1] * (len(rest) - 1)
        found[f"{stem}.lora_down.weight"] = down.reshape(rank, *rest).to(dtype).contiguous()
        found[f"{stem}.lora_up.weight"] = up.reshape(out, rank, *ones).to(dtype).contiguous()
        found[f"{stem}.alpha"] = torch.tensor(rank / 2)
    return found


def training_metadata() -> dict[str, str]:
    """What sd-scripts writes about a run."""
    folders = {
        "10_ohwx woman": {"n_repeats": 10, "img_count": 42},
        "3_paper cutout": {"n_repeats": 3, "img_count": 120},
    }
    words = {
        "10_ohwx woman": {"ohwx woman": 42, "smiling": 17, "outdoors": 21, "red scarf": 9, "closed eyes": 4},
        "3_paper cutout": {"paper cutout": 120, "flat color": 96, "white background": 88, "simple shadow": 41},
    }
    return {
        "ss_session_id": "1867242302",
        "ss_training_started_at": "1710165900.12",
        "ss_training_finished_at": "1710173880.5",
        "ss_output_name": "paper_woman_xl",
        "ss_learning_rate": "0.0001",
        "ss_unet_lr": "0.0001",
        "ss_text_encoder_lr": "5e-05",
        "ss_num_train_images": "780",
        "ss_num_reg_images": "0",
        "ss_num_epochs": "12",
        "ss_epoch": "10",
        "ss_steps": "1950",
        "ss_max_train_steps": "2340",
        "ss_lr_scheduler": "cosine_with_restarts",
        "ss_lr_warmup_steps": "100",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "32",
        "ss_network_alpha": "16.0",
        "ss_network_args": json.dumps({"conv_dim": "32", "conv_alpha": "16"}),
        "ss_mixed_precision": "bf16",
        "ss_full_fp16": "False",
        "ss_v2": "False",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_clip_skip": "None",
        "ss_seed": "42",
        "ss_noise_offset": "0.0357",
        "ss_min_snr_gamma": "5.0",
        "ss_optimizer": "prodigyopt.prodigy.Prodigy",
        "ss_optimizer_args": "",
        "ss_max_grad_norm": "1.0",
        "ss_batch_size_per_device": "4",
        "ss_total_batch_size": "4",
        "ss_resolution": "(1024, 1024)",
        "ss_shuffle_caption": "True",
        "ss_keep_tokens": "1",
        "ss_flip_aug": "False",
        "ss_sd_model_name": "sd_xl_base_1.0.safetensors",
        "ss_dataset_dirs": json.dumps(folders),
        "ss_tag_frequency": json.dumps(words),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.title": "Paper Woman XL",
        "modelspec.author": "A. Nony Mous",
        "modelspec.trigger_phrase": "ohwx woman, paper cutout",
        "modelspec.license": "CreativeML Open RAIL++-M",
    }


def write_sdxl(file: Path, narrower: int = 1, rank: int = 32, seed: int = 0) -> Shapes:
    """Write such a file; the shapes of the layers by diffusers' paths."""
    shapes = sdxl_shapes(narrower)
    save_file(sdxl_tensors(shapes, native(shapes), rank, seed=seed), file, training_metadata())
    return shapes


if __name__ == "__main__":
    write_sdxl(Path(sys.argv[1]))
