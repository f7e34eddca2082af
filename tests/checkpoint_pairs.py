"""Two checkpoints of one model: the tiny pipeline of the package as it is, and as if it had been trained further.

The second may be a folder like the first, or one file with the names of the original Stable Diffusion.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nerine.files.names import aliases
from nerine.tiny.load import MODEL

FILES = {"unet": "unet/diffusion_pytorch_model.safetensors", "text_encoder": "text_encoder/model.safetensors"}
LEADS = {"unet": "model.diffusion_model.", "text_encoder": "cond_stage_model.transformer."}
Change = Callable[[str, Tensor], Tensor]  # name in its part, tensor in fp32: what is added


def tensors(folder: Path = MODEL) -> dict[str, Tensor]:
    """All tensors of a pipeline, in fp32, by part and name."""
    return {f"{part}.{k}": t.float() for part, file in FILES.items() for k, t in load_file(folder / file).items()}


def low_rank(rank: int = 3, size: float = 0.05, noise: float = 0.0, seed: int = 0) -> Change:
    """A change of that rank in every weight, of falling singular values, and of chance in every vector."""

    def change(name: str, t: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
        if t.dim() < 2:
            return 0.01 * torch.randn(t.shape, generator=generator)
        up = torch.randn(len(t), rank, generator=generator) * 0.5 ** torch.arange(rank)
        down = torch.randn(rank, t[0].numel(), generator=generator)
        rest = noise * torch.randn(t.shape, generator=generator)
        return size * (up @ down).reshape(t.shape) / t[0].numel() ** 0.5 + rest

    return change


def only(change: Change, *words: str) -> Change:
    """The change in tensors in whose names one of the words is."""
    return lambda name, t: change(name, t) if any(word in name for word in words) else torch.zeros_like(t)


def tuned(change: Change, base: Path = MODEL) -> dict[str, Tensor]:
    return {name: t + change(name, t) for name, t in tensors(base).items()}


def write_folder(folder: Path, values: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Path:
    """A pipeline of these tensors, laid out as diffusers has it."""
    shutil.copytree(MODEL, folder)
    for part, file in FILES.items():
        own = {name[len(part) + 1 :]: t.to(dtype) for name, t in values.items() if name.startswith(f"{part}.")}
        (folder / file).unlink()
        if own:
            save_file({name: t.contiguous() for name, t in own.items()}, folder / file)
        else:
            shutil.rmtree(folder / part)
    return folder


def write_single(file: Path, values: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Path:
    """One file, with the names of the original UNet."""
    shapes = {name.removesuffix(".weight")[5:]: tuple(t.shape) for name, t in values.items() if ".weight" in name}
    native = {alias.own: alias.name for alias in aliases(shapes)["native"]}
    found = {}
    for name, t in values.items():
        part, _, within = name.partition(".")
        path, _, attr = within.rpartition(".")
        path = native[path] if part == "unet" else path
        found[f"{LEADS[part]}{path}.{attr}"] = t.to(dtype).contiguous()
    save_file(found, file)
    return file


def pair(folder: Path, change: Change, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """The base in fp32 and the tuned one, both as folders."""
    return write_folder(folder / "base", tensors()), write_folder(folder / "tuned", tuned(change), dtype)


def difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], names: Callable[[str], bool]) -> float:
    """The root of the summed squares over the tensors of such names."""
    return sum(float((found[n] - wanted[n]).double().square().sum()) for n in wanted if names(n)) ** 0.5
