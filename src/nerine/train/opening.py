"""Opening a base: the model that comes with nerine, a folder of diffusers, or a checkpoint in one file.

Nothing is fetched unless the settings allow it, and nothing is printed.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nerine.errors import FormatError, MissingExtra, OptionError, shown
from nerine.tiny import load_pipeline
from nerine.train.adapting import freeze
from nerine.train.families import Base, family_of
from nerine.train.settings import BaseSettings

__all__ = ["open_base", "place"]

INDEX = "model_index.json"
_DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
)  # what diffusers raises at such files
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def open_base(settings: BaseSettings) -> Base:
    """The model of the settings, frozen, on the CPU, in the number format that they say.

    Raises:
        OptionError: there is no such folder or file, or configurations are missing that may not be fetched.
        FormatError: it is damaged, or no pipeline of diffusers.
        UnsupportedBase: its family is not known.
        MissingExtra: diffusers is not installed.
    """
    path, dtype = Path(settings.base), dtype_of(settings)
    is_tiny = settings.base == "tiny"
    if not is_tiny and not path.exists():
        raise OptionError(f'base: nothing is at {path}; expected a folder of diffusers, a checkpoint, or "tiny"')
    diffusers = _diffusers()
    with _quiet():
        if is_tiny:
            pipeline = load_pipeline(dtype)
        else:
            pipeline = (_folder if path.is_dir() else _file)(diffusers, path, settings, dtype)
        base = family_of(pipeline)
        freeze(base)
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
    """Put all parts of the base on a device, "auto" being the fastest that there is.

    Raises:
        OptionError: there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    for part in base.parts:
        try:
            part.to(device)
        except (RuntimeError, AssertionError) as error:
            raise OptionError(f"--device {device}: {error}") from error


def _folder(diffusers: Any, path: Path, settings: BaseSettings, dtype: torch.dtype) -> Any:
    if not (path / INDEX).is_file():
        raise OptionError(f"base: {path} has no {INDEX}; expected the folder of a whole pipeline of diffusers")
    name = _class_name(path)
    if name == "TinyPipeline":
        return load_pipeline(dtype, path)
    kind = _class(diffusers, name, path / INDEX)
    try:
        return kind.from_pretrained(path, torch_dtype=dtype, local_files_only=True)
    except _DAMAGE as error:
        raise FormatError(f"base: the pipeline in {path} cannot be opened: {error}") from error


def _file(diffusers: Any, path: Path, settings: BaseSettings, dtype: torch.dtype) -> Any:
    """A checkpoint in one file. Its configurations are in a folder, or fetched."""
    config = settings.config
    if config is None and not settings.download:
        raise OptionError(
            f"base: {path} holds weights and no configurations. Give the folder that has them with --base-config (in "
            "diffusers' layout; no weights are needed in it), or allow --download to fetch them"
        )
    if config is not None and not (config / INDEX).is_file():
        raise OptionError(f"config: {config} has no {INDEX}; expected a folder of configurations")
    try:
        where = str(config) if config is not None else _likely_model(diffusers, path)
    except _DAMAGE as error:
        raise FormatError(f"base: the checkpoint {path} is of no model that is known: {error}") from error
    name = _class_name(config) if config is not None else _fetched_class_name(diffusers, where)
    kind = _class(diffusers, name, f"{where}/{INDEX}")
    if not hasattr(kind, "from_single_file"):
        raise FormatError(f"config: {where}/{INDEX} names {name}, which cannot be opened from a single file")
    options = {"torch_dtype": dtype, "local_files_only": not settings.download, "config": where}
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    try:
        return kind.from_single_file(str(path), **options)
    except (*_DAMAGE, SingleFileComponentError) as error:
        raise FormatError(f"base: the checkpoint {path} cannot be opened: {error}") from error


def _class_name(folder: Path) -> str:
    try:
        return str(json.loads((folder / INDEX).read_text(encoding="utf-8"))["_class_name"])
    except (ValueError, KeyError, TypeError) as error:  # bytes that are no text are a ValueError too
        raise FormatError(
            f"{folder / INDEX}: expected a JSON object with the name of a pipeline in _class_name"
        ) from error


def _class(diffusers: Any, name: str, where: Path | str) -> Any:
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        raise FormatError(
            f"{where}: names {shown(name)!r}, which is no pipeline of diffusers {diffusers.__version__}; a newer "
            "diffusers may know it"
        )
    return kind


def _likely_model(diffusers: Any, path: Path) -> str:
    """The name on the hub of the model whose configurations fit the weights in the file."""
    from diffusers.loaders import single_file_utils as single

    found: str = single.fetch_diffusers_config(single.load_single_file_checkpoint(str(path)))[
        "pretrained_model_name_or_path"
    ]
    return found


def _fetched_class_name(diffusers: Any, model: str) -> str:
    try:
        return str(diffusers.DiffusionPipeline.load_config(model)["_class_name"])
    except (OSError, ValueError, KeyError) as error:
        raise OptionError(
            f"download: the configurations of {model} cannot be fetched ({error}); give a folder with --base-config"
        ) from error


def _diffusers() -> Any:
    try:
        import diffusers
        import transformers  # noqa: F401  (the pipelines of diffusers need it, and say so late)
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
