"""`pack`, `unpack` and `contents`: textual inversions that travel in an adapter file, put in and taken out.

In the file they are `bundle_emb.<trigger word>.<name>`, where the name says for which text encoder: `clip_l` and
`clip_g` for SDXL, `string_to_param.*` for models with one. By itself an embedding is a file named by its trigger word,
with the same names, or `emb_params` for the one.
Source: LyCORIS's bundles and the files that AUTOMATIC1111, ComfyUI and diffusers read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nerine.errors import FormatError, OptionError, shown
from nerine.files.dialects.base import EMBEDDINGS
from nerine.files.folder import open_adapter
from nerine.files.pickles import SUFFIXES, is_pickle
from nerine.files.store import Outgoing, Source, open_file, write_file
from nerine.tables import table
from nerine.tools.inspect.text import printable
from nerine.tools.output import check_output
from nerine.tools.verbatim import as_they_are, size_of, write_verbatim

__all__ = ["BundleReport", "Embedding", "Written", "contents", "file_name", "pack", "unpack"]

PathLike = str | os.PathLike[str]
ONE = "string_to_param.*"  # of models with one text encoder, in a bundle
ALONE = "emb_params"  # and in a file of its own
ENCODERS = frozenset(
    {"clip_l", "clip_g", "clip_h", "t5xxl", "t5", "qwen", "llama", "text_encoders_0", "text_encoders_1"}
)
RESERVED = frozenset({"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))})
LONGEST = 100  # characters of a file name made of a trigger word


@dataclass(frozen=True)
class Embedding:
    """The vectors of one trigger word for one text encoder."""

    trigger: str
    name: str
    tokens: int
    width: int
    dtype: str


@dataclass(frozen=True)
class Written:
    """A file that was written, or would be in a dry run: what it is, and its bytes."""

    file: str
    what: str
    bytes: int


@dataclass(frozen=True)
class BundleReport:
    """The embeddings of a bundle, the files that were written, and what else is to be said."""

    file: str
    embeddings: tuple[Embedding, ...]
    written: tuple[Written, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        head = ("trigger word", "for", "tokens", "width", "format")
        rows = [(printable(e.trigger, 30), printable(e.name, 24), e.tokens, e.width, e.dtype) for e in self.embeddings]
        lines = [table(head, rows) if rows else f"{printable(self.file, 200)}: no embeddings in it"]
        lines += [f"{one.file}: {one.what}, {one.bytes:,} bytes" for one in self.written]
        return "\n".join([*lines, *self.notes])


def contents(file: PathLike, *, allow_pickle: bool = False) -> BundleReport:
    """The embeddings that an adapter file carries.

    Raises:
        FormatError: the file cannot be read.
    """
    with open_adapter(file, allow_pickle=allow_pickle) as source:
        return BundleReport(os.fspath(file), tuple(_listed(_bundled(source))))


def pack(
    adapter: PathLike,
    target: PathLike,
    embeddings: Mapping[str, PathLike],
    *,
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> BundleReport:
    """Write `adapter` to `target` with the embeddings of files in it, by trigger word: {trigger: file}.

    The tensors of the adapter stay as they are, bit by bit; the embeddings that it has already stay, too.

    Raises:
        FormatError: a file cannot be read, or holds no embedding.
        OptionError: a trigger word cannot stand in a bundle or is in it already, or the target exists.
    """
    place = check_output(target, [adapter, *embeddings.values()], force)
    with ExitStack() as stack:
        source = stack.enter_context(open_adapter(adapter, allow_pickle=allow_pickle))
        if Path(adapter).is_dir() or source.config:
            raise FormatError(f"{adapter}: a PEFT folder has no place for embeddings; convert it to a file first")
        there = _bundled(source)
        tensors = as_they_are(source)
        for trigger, file in embeddings.items():
            _check_trigger(trigger, there)
            found = _read_embedding(Path(file), allow_pickle)
            there[trigger] = {name: Outgoing(name, tuple(t.shape), t.dtype, _given(t)) for name, t in found.items()}
            tensors += [o._replace(key=f"{EMBEDDINGS}{trigger}.{name}") for name, o in there[trigger].items()]
        size = size_of(tensors, source.metadata)
        if not dry_run:
            size = write_verbatim(source, place, source.metadata, tensors)
        written = Written(os.fspath(place), f"adapter with embeddings for {len(there)} trigger words", size)
        return BundleReport(os.fspath(adapter), tuple(_listed(there)), (written,))


def unpack(
    file: PathLike, folder: PathLike, *, allow_pickle: bool = False, force: bool = False, dry_run: bool = False
) -> BundleReport:
    """Write the embeddings of a bundle into `folder` (made where it is missing), a file for each trigger word, and the
    adapter without them beside those.

    Raises:
        FormatError: the file cannot be read.
        OptionError: it carries no embeddings, or a file of that name exists.
    """
    target = Path(folder)
    with open_adapter(file, allow_pickle=allow_pickle) as source:
        there = _bundled(source)
        if not there:
            raise OptionError(f"{file}: it carries no embeddings; there is nothing to take out")
        if not target.parent.is_dir() or (target.exists() and not target.is_dir()):
            raise OptionError(f"{target}: expected the name of a folder, in one that exists")
        jobs, notes = _jobs(source, there, target, Path(file).stem)
        if target.is_dir():
            for place, _, _, _ in jobs:
                check_output(place, [source.path], force)
        elif not dry_run:
            target.mkdir()
        written = []
        for place, what, tensors, metadata in jobs:
            size = size_of(tensors, metadata) if dry_run else _write(source, place, what, tensors, metadata)
            written.append(Written(os.fspath(place), what, size))
        return BundleReport(os.fspath(file), tuple(_listed(there)), tuple(written), tuple(notes))


Job = tuple[Path, str, list[Outgoing], Mapping[str, str]]


def _jobs(
    source: Source, there: Mapping[str, Mapping[str, Outgoing]], target: Path, stem: str
) -> tuple[list[Job], list[str]]:
    """The files to write, and which of them could not bear the name of their trigger word."""
    jobs: list[Job] = []
    notes: list[str] = []
    taken: set[str] = set()
    rest = [key for key in source.keys if not key.startswith(EMBEDDINGS)]
    if rest:
        name = file_name(stem, taken)
        jobs.append((target / f"{name}.safetensors", "adapter", as_they_are(source, rest), source.metadata))
    for trigger, own in there.items():
        name = file_name(trigger, taken)
        if name != trigger:
            notes.append(f"note: the trigger word {shown(trigger)} cannot be the name of a file; it is in {name}")
        tensors = [o._replace(key=key) for key, o in _by_itself(own).items()]
        jobs.append((target / f"{name}.safetensors", f"embedding {printable(trigger)}", tensors, {"format": "pt"}))
    return jobs, notes


def _write(source: Source, place: Path, what: str, tensors: list[Outgoing], metadata: Mapping[str, str]) -> int:
    if what == "adapter":
        return write_verbatim(source, place, metadata, tensors)
    return write_file(place, tensors, metadata)


# -- what is in a bundle -----------------------------------------------------------------------------------------------
def _bundled(source: Source) -> dict[str, dict[str, Outgoing]]:
    """{trigger word: {name: tensor}}."""
    found: dict[str, dict[str, Outgoing]] = {}
    for outgoing in as_they_are(source, [key for key in source.keys if key.startswith(EMBEDDINGS)]):
        if outgoing.key.count(".") >= 2:
            _, trigger, name = outgoing.key.split(".", 2)
            found.setdefault(trigger, {})[name] = outgoing
    return found


def _listed(there: Mapping[str, Mapping[str, Outgoing]]) -> Iterable[Embedding]:
    for trigger, own in there.items():
        for name, o in own.items():
            tokens, width = o.shape if len(o.shape) == 2 else (1, o.shape[-1] if o.shape else 1)
            yield Embedding(trigger, name, tokens, width, str(o.dtype).removeprefix("torch."))


def _by_itself(own: Mapping[str, Outgoing]) -> dict[str, Outgoing]:
    """The tensors under the names that they have in a file of their own."""
    if len(own) == 1:
        name, outgoing = next(iter(own.items()))
        return {name if name in ENCODERS else ALONE: outgoing}
    return {ALONE if name == ONE else name: outgoing for name, outgoing in own.items()}


def _check_trigger(trigger: str, there: Collection[str]) -> None:
    if not trigger.strip() or "." in trigger or not trigger.isprintable():
        raise OptionError(f"a trigger word is text without dots, for the names in a bundle; got {shown(trigger)!r}")
    if trigger in there:
        raise OptionError(f"the bundle has an embedding {shown(trigger)!r} already; give the new one another name")


def file_name(text: str, taken: set[str]) -> str:
    """A name for a file, made of a text that nobody has checked: one that no system takes for a path, a device or a
    hidden file, and that is not among `taken`, which it joins."""
    name = re.sub(r"[^\w \-+()\[\]!@#&=,.]", "_", text).strip(" .")[:LONGEST].rstrip(" .")
    name = "".join(c if c.isprintable() else "_" for c in name) or "embedding"
    if name.split(".")[0].lower() in RESERVED:
        name = f"_{name}"
    found, number = name, 2
    while found.casefold() in taken:
        found, number = f"{name} ({number})", number + 1
    taken.add(found.casefold())
    return found


# -- files of embeddings -----------------------------------------------------------------------------------------------
def _given(tensor: Tensor) -> Any:
    return lambda: tensor


def _read_embedding(file: Path, allow_pickle: bool) -> dict[str, Tensor]:
    """The vectors `[tokens, width]` in a file, under the names that they have in a bundle.

    Raises:
        FormatError: there is no such file, it holds something else, or it is a pickle and those are not allowed.
    """
    if not file.is_file():
        raise FormatError(f"{file}: expected the file of an embedding, found nothing of that name")
    with open(file, "rb") as stream:
        pickled = is_pickle(stream.read(9)) or file.suffix.lower() in SUFFIXES
    if pickled and allow_pickle:
        found = _read_pickled(file)
    else:
        with open_file(file) as source:  # refuses pickles, and says why
            found = {key: source.read(key) for key in source.keys}
    tensors = {name: t[None] if t.dim() == 1 else t for name, t in found.items()}
    if not tensors or any(t.dim() != 2 or not t.is_floating_point() for t in tensors.values()):
        shapes = ", ".join(f"{shown(name, 40)} {tuple(t.shape)}" for name, t in list(found.items())[:3]) or "nothing"
        raise FormatError(f"{file}: expected the vectors of an embedding, [tokens, width], found {shapes}")
    if len(tensors) == 1 and not ENCODERS & set(tensors):
        return {ONE: next(iter(tensors.values()))}
    return tensors


def _read_pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of PyTorch's: {token: vectors}, or AUTOMATIC1111's with `string_to_param` in it."""
    try:
        with open(file, "rb") as stream:
            content = torch.load(stream, weights_only=True, map_location="cpu")
    except Exception as error:  # whatever torch trips over in a damaged or hostile file
        raise FormatError(
            f"{file}: cannot be read as a PyTorch file of tensors alone ({shown(error)}); "
            "convert it to .safetensors with the program that wrote it"
        ) from error
    inner = content.get("string_to_param") if isinstance(content, dict) else None
    if isinstance(inner, dict):
        content = inner
    if not isinstance(content, dict):
        raise FormatError(f"{file}: expected a dictionary of tensors, found {type(content).__name__}")
    return {str(name): t.detach() for name, t in content.items() if isinstance(t, Tensor)}
