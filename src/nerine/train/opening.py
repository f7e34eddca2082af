"""Opening a base: the model that comes with nerine, a folder of diffusers, or a checkpoint in one file.

Nothing is fetched unless the settings allow it, and nothing is printed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nerine.errors import FormatError, MissingExtra, OptionError
from nerine.tiny import load_pipeline
from nerine.train.families import Base, family_of
from nerine.train.settings import BaseSettings

__all__ = ["open_base", "place"]

INDEX = "model_index.json"
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def open_base(settings: BaseSettings) -> Base:
    """The model of the settings, on the CPU, in the number format that they say.

    Raises:
        OptionError: there is no such folder or file, or configurations are missing that may not be fetched.
        FormatError: it is damaged, or no pipeline of diffusers.
        UnsupportedBase: its family is not known.
        MissingExtra: diffusers is not installed.
    """
    dtype = dtype_of(settings)
    if settings.base == "tiny":
        return family_of(load_pipeline(dtype))
    path = Path(settings.base)
    if not path.exists():
        raise OptionError(f'base: nothing is at {path}; expected a folder of diffusers, a checkpoint, or "tiny"')
    with _quiet():
        pipeline = _folder(path, dtype) if path.is_dir() else _file(path, settings, dtype)
    base = family_of(pipeline)
    if base.vae is not None and dtype == torch.float16:  # SDXL's VAE overflows in fp16
        base.vae.to(torch.float32)
    return base


def dtype_of(settings: BaseSettings) -> torch.dtype:
    """The number format of the frozen weights."""
    if settings.dtype != "auto":
        return _DTYPES[settings.dtype]
    on_gpu = settings.device not in ("cpu", "mps") and torch.cuda.is_available()
    return torch.bfloat16 if on_gpu else torch.float32


def place(base: Base, device: str) -> None:
    """Put all parts of the base on a device, "auto" being the fastest that there is, ready to draw.

    Raises:
        OptionError: there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    for part in (base.denoiser, base.vae, *base.text_encoders.values()):
        if part is not None:
            try:
                part.to(device).eval().requires_grad_(False)
            except (RuntimeError, AssertionError) as error:
                raise OptionError(f"--device {device}: {error}") from error


def _folder(path: Path, dtype: torch.dtype) -> Any:
    if not (path / INDEX).is_file():
        raise OptionError(f"base: {path} has no {INDEX}; expected the folder of a whole pipeline of diffusers")
    diffusers = _diffusers()
    if _is_tiny(path):
        return load_pipeline(dtype, path)
    try:
        return diffusers.DiffusionPipeline.from_pretrained(path, torch_dtype=dtype, local_files_only=True)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise FormatError(f"base: the pipeline in {path} cannot be opened: {error}") from error


def _is_tiny(path: Path) -> bool:
    return '"TinyPipeline"' in (path / INDEX).read_text(encoding="utf-8")


def _file(path: Path, settings: BaseSettings, dtype: torch.dtype) -> Any:
    """A checkpoint in one file. Its configurations are beside it in a folder, or fetched."""
    if settings.config is None and not settings.download:
        raise OptionError(
            f"base: {path} holds weights and no configurations. Give the folder that has them with --base-config (in "
            "diffusers' layout; no weights are needed in it), or allow --download to fetch them"
        )
    if settings.config is not None and not (settings.config / INDEX).is_file():
        raise OptionError(f"config: {settings.config} has no {INDEX}; expected a folder of configurations")
    diffusers = _diffusers()
    where = {"config": str(settings.config)} if settings.config is not None else {}
    kind = _class_in(settings.config) if settings.config is not None else diffusers.StableDiffusionPipeline
    try:
        return kind.from_single_file(str(path), torch_dtype=dtype, local_files_only=not settings.download, **where)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise FormatError(f"base: the checkpoint {path} cannot be opened: {error}") from error


def _class_in(config: Path) -> Any:
    import json

    diffusers = _diffusers()
    name = json.loads((config / INDEX).read_text(encoding="utf-8")).get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if kind is None or not hasattr(kind, "from_single_file"):
        raise FormatError(f"config: {config / INDEX} names {name!r}, which cannot be opened from a single file")
    return kind


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtra(f'training needs diffusers ({error}): pip install "nerine[train]"') from error
    return diffusers


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars, advice and warnings that loading gives."""
    from diffusers.utils import logging as spoken
    from transformers.utils import logging as said

    before = spoken.get_verbosity(), said.get_verbosity()
    bars = spoken.is_progress_bar_enabled(), said.is_progress_bar_enabled()
    for each in (spoken, said):
        each.set_verbosity(logging.ERROR)
        each.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level, shown in zip((spoken, said), before, bars, strict=True):
            each.set_verbosity(level)
            if shown:
                each.enable_progress_bar()
