"""The weights of a whole model on disk: one file, a file in pieces with an index, or a folder with parts of a pipeline.

Every tensor has one name here, whatever file it is in: that of its file, led by its folder where a pipeline has a
folder for each of its parts ("unet.conv_in.weight"). `layer_name` says which part of a pipeline the name of a tensor
in an all-in-one checkpoint belongs to. Nothing is read but headers until a tensor is asked for.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nerine.errors import FormatError, shown
from nerine.files.pickles import SUFFIXES
from nerine.files.store import Source, open_file

__all__ = ["ModelFile", "Piece", "layer_name", "open_model"]

LEADS = {  # what stands before the names of a part in files that hold a whole pipeline: how that part is called here
    "model.diffusion_model.": "diffusion_model.",
    "cond_stage_model.transformer.": "text_encoder.",
    "cond_stage_model.model.": "text_encoder.",
    "conditioner.embedders.0.transformer.": "text_encoder.",
    "conditioner.embedders.0.model.": "text_encoder_2.",
    "conditioner.embedders.1.model.": "text_encoder_2.",
    "text_encoders.clip_l.transformer.": "text_encoder.",
    "text_encoders.clip_g.transformer.": "text_encoder_2.",
    "text_encoders.t5xxl.transformer.": "text_encoder_3.",
    "first_stage_model.": "vae.",
}
PIPELINE, ADAPTER = "model_index.json", "adapter_config.json"
INDEX = re.compile(r"\.safetensors\.index(\.\w+)?\.json$")  # with the name of a variant, such as "fp16", in it
LARGEST_INDEX = 256 * 2**20  # bytes
WEIGHTS = (".safetensors", *sorted(SUFFIXES))
_OF_ADAPTERS = re.compile(r"(lora_(down|up|A|B|mid)(\.\w+)?(\.weight)?|hada_w[12]_[ab]|lokr_w[12](_[ab])?|dora_scale)$")


def layer_name(key: str) -> str:
    """The name of a tensor with the part of the pipeline in front, as a pipeline would call it."""
    for lead, part in LEADS.items():
        if key.startswith(lead):
            return part + key[len(lead) :]
    return key


@dataclass(frozen=True)
class Piece:
    """One file of a model: its place below the model's, its open content, and {name here: key there}."""

    place: str
    source: Source
    keys: Mapping[str, str]


class ModelFile:
    """Named tensors of a model, each read from whichever file it is in when it is asked for.

    `others` are the files of a folder that hold no weights (settings, tokenisers), by their place in it.
    """

    def __init__(self, path: Path, pieces: tuple[Piece, ...], others: tuple[str, ...] = ()) -> None:
        self.path, self.pieces, self.others = path, pieces, others
        self._at = {name: (piece.source, key) for piece in pieces for name, key in piece.keys.items()}
        self.keys: tuple[str, ...] = tuple(self._at)

    @property
    def is_folder(self) -> bool:
        return self.path.is_dir()

    @property
    def parts(self) -> frozenset[str]:
        """The parts of a pipeline that it holds, as `layer_name` calls them; none where it is one model alone."""
        folders = {piece.place.partition("/")[0] for piece in self.pieces if "/" in piece.place}
        return frozenset(folders or {layer_name(key).partition(".")[0] for key in self.keys if layer_name(key) != key})

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the header says, of a model in one file."""
        return self.pieces[0].source.metadata if len(self.pieces) == 1 else {}

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(self.nbytes(key) for key in self.keys)

    def __contains__(self, key: str) -> bool:
        return key in self._at

    def shape(self, key: str) -> tuple[int, ...]:
        source, own = self._find(key)
        return source.shape(own)

    def dtype(self, key: str) -> torch.dtype:
        source, own = self._find(key)
        return source.dtype(own)

    def nbytes(self, key: str) -> int:
        source, own = self._find(key)
        return source.nbytes(own)

    def read(self, key: str) -> Tensor:
        """One tensor on the CPU, in memory of its own.

        Raises:
            FormatError: there is none of that name, or its file has changed or is damaged.
        """
        source, own = self._find(key)
        return source.read(own)

    def _find(self, key: str) -> tuple[Source, str]:
        if key not in self._at:
            raise FormatError(f"{self.path}: has no tensor {shown(key)}")
        return self._at[key]


@contextmanager
def open_model(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> Iterator[ModelFile]:
    """Open a checkpoint: a file, the index of a file in pieces, or a folder of diffusers or transformers.

    Raises:
        FormatError: nothing of the kind is there, a piece that an index names is missing, a file is damaged, it is a
            pickle and those are not allowed, or it is an adapter.
    """
    place = Path(path)
    if place.suffix.lower() == ".gguf":
        raise FormatError(f"{place}: GGUF is not read; give the .safetensors that it was made from")
    with ExitStack() as stack:

        def opened(file: Path, lead: str = "", wanted: frozenset[str] | None = None) -> Piece:
            source = stack.enter_context(open_file(file, allow_pickle=allow_pickle))
            lacking = sorted((wanted or frozenset()) - set(source.keys))
            if lacking:
                raise FormatError(
                    f"{file}: the index says that {len(lacking)} tensors are in it (first {shown(lacking[0])}), and "
                    "they are not; download the model again"
                )
            root = place if place.is_dir() else file.parent
            return Piece(file.relative_to(root).as_posix(), source, {lead + key: key for key in source.keys})

        if place.is_dir():
            pieces = [opened(*one) for one in _files_of(place)]
            weights = {piece.place for piece in pieces}
            others = tuple(sorted(name for name in _all_files(place) if name not in weights))
        elif INDEX.search(place.name):
            pieces, others = [opened(file, "", keys) for file, keys in _indexed(place)], ()
        else:
            pieces, others = [opened(place)], ()
        _check_names(place, pieces)
        yield ModelFile(place, tuple(pieces), others)


def _check_names(place: Path, pieces: list[Piece]) -> None:
    """Refuse two tensors of one name, and what is no model."""
    seen: dict[str, str] = {}
    for piece in pieces:
        for key in piece.keys:
            name = layer_name(key)
            if name in seen:
                raise FormatError(f"{place}: {shown(name)} is in {seen[name]} and in {piece.place}; remove one of them")
            seen[name] = piece.place
    tensors = [key for piece in pieces for key in piece.keys]
    adapters = [key for key in tensors if _OF_ADAPTERS.search(key)]
    if not tensors:
        raise FormatError(f"{place}: expected a model, found a file without tensors")
    if 2 * len(adapters) >= len(tensors):
        raise FormatError(
            f"{place}: expected a model, found an adapter (it has {shown(adapters[0])}); give the model that it is for"
        )


def _all_files(folder: Path) -> Iterator[str]:
    for base, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith("."):
                yield (Path(base) / name).relative_to(folder).as_posix()


def _files_of(folder: Path) -> Iterator[tuple[Path, str, frozenset[str] | None]]:
    """The files with the weights of a folder, what leads the names of their tensors, and which those must be."""
    if (folder / ADAPTER).is_file():
        raise FormatError(f"{folder}: expected a model, found an adapter ({ADAPTER}); give the model that it is for")
    if not (folder / PIPELINE).is_file():
        yield from ((file, "", keys) for file, keys in _weights_in(folder))
        return
    found = 0
    for part in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if any(name.name.endswith(WEIGHTS) for name in part.iterdir()):
            for file, keys in _weights_in(part):
                found += 1
                yield file, f"{part.name}.", keys
    if not found:
        raise FormatError(f"{folder}: a pipeline whose folders hold no weights; download it with its .safetensors")


def _weights_in(folder: Path) -> Iterator[tuple[Path, frozenset[str] | None]]:
    """The weights of one model in a folder: those that an index names, or the one file that is there."""
    indexes = sorted(p for p in folder.iterdir() if INDEX.search(p.name))
    names = sorted(p for p in folder.iterdir() if p.is_file() and p.name.endswith(WEIGHTS))
    safe = [p for p in names if p.suffix == ".safetensors"] or names
    chosen = _without_variant(indexes)
    if chosen is not None:
        yield from _indexed(chosen)
        return
    one = _without_variant(safe)
    if one is None:
        there = ", ".join(p.name for p in safe[:4]) or ", ".join(sorted(p.name for p in folder.iterdir())[:4])
        expected = "one .safetensors file, or an index of several"
        raise FormatError(f"{folder}: expected {expected}, found {there or 'nothing'}; name the file that is meant")
    yield one, None


def _without_variant(files: list[Path]) -> Path | None:
    """The only file, or the one without a variant such as "fp16" in its name."""
    plain = [p for p in files if p.name.removesuffix(".safetensors.index.json").removesuffix(p.suffix).count(".") == 0]
    return files[0] if len(files) == 1 else plain[0] if len(plain) == 1 else None


def _indexed(index: Path) -> Iterator[tuple[Path, frozenset[str]]]:
    """The files that an index names, and the tensors that must be in each."""
    if not index.is_file():
        raise FormatError(f"{index}: expected the index of a model, found nothing there")
    if index.stat().st_size > LARGEST_INDEX:
        raise FormatError(f"{index}: {index.stat().st_size:,} bytes, more than any index has")
    files: dict[str, set[str]] = {}
    for key, name in _weight_map(index).items():
        if not isinstance(name, str) or Path(name).name != name:
            raise FormatError(f"{index}: expected the name of a file beside it, found {shown(name)}")
        files.setdefault(name, set()).add(key)
    for name, keys in sorted(files.items()):
        if not (index.parent / name).is_file():
            raise FormatError(
                f"{index}: it names {len(files)} files, and {name} is not there; download the model again"
            )
        yield index.parent / name, frozenset(keys)


def _weight_map(index: Path) -> Mapping[str, object]:
    """{tensor: the file that it is in}, as an index tells."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise FormatError(f"{index}: not readable as an index of safetensors files ({shown(error)})") from None
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not found:
        raise FormatError(f"{index}: expected weight_map with the file of every tensor, found none; download it again")
    return found
