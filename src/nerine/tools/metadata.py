"""`metadata`: what the header of an adapter file says, shown, changed and stripped; the tensors stay as they are."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from nerine.errors import FormatError, OptionError, nearest
from nerine.files.folder import open_adapter
from nerine.files.pickles import is_safetensors
from nerine.files.store import Source
from nerine.tools.inspect.text import printable
from nerine.tools.output import check_output
from nerine.tools.verbatim import HASHES, as_they_are, differences, size_of, write_verbatim

__all__ = ["MetadataReport", "edit_metadata", "show_metadata", "strip_metadata"]

PathLike = str | os.PathLike[str]
KEPT = frozenset(
    {
        "nerine",
        "format",
        "lora_adapter_metadata",
        "lycoris_config",
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
        "ss_network_args",
        "ss_v2",
        "ss_base_model_version",
        *HASHES,
    }
)
KEPT_LEADS = ("modelspec.",)  # title, author and license of a work are no training settings
DECIDING = ("nerine", "lora_adapter_metadata")  # entries that tell how tensors are to be read


@dataclass(frozen=True)
class MetadataReport:
    """The metadata of a file as it is, or as it was written to `written` (empty where nothing was written)."""

    file: str
    metadata: Mapping[str, str]
    written: str = ""
    bytes: int = 0
    set: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{printable(key, 80)}: {printable(value, 400)}" for key, value in sorted(self.metadata.items())]
        if self.written:
            lines = [f"{self.written}: {self.bytes:,} bytes, {len(self.metadata)} entries"]
            lines += [f"set: {printable(key, 80)}" for key in self.set]
            lines += [f"removed: {printable(key, 80)}" for key in self.removed]
        return "\n".join([*(lines or [f"{self.file}: no metadata"]), *self.notes])


def show_metadata(file: PathLike, *, allow_pickle: bool = False) -> MetadataReport:
    """The metadata of an adapter file; of a PEFT folder, that of the tensors in it.

    Raises:
        FormatError: it cannot be read.
    """
    with open_adapter(file, allow_pickle=allow_pickle) as source:
        return MetadataReport(os.fspath(file), dict(source.metadata))


def edit_metadata(
    file: PathLike,
    target: PathLike | None,
    *,
    set: Mapping[str, str] | None = None,
    delete: Iterable[str] = (),
    force: bool = False,
    dry_run: bool = False,
) -> MetadataReport:
    """Write `file` to `target` (None: in its own place) with entries set and deleted, where `*` in `delete` stands for
    anything. Hashes that the metadata has are worked out anew.

    Raises:
        FormatError: the file cannot be read, or is a pickle, which has no metadata.
        OptionError: an entry to delete is not there, "nerine" would be set, or the target exists.
    """
    told = dict(set or {})
    for key in told:
        if key == "nerine" or key in HASHES:
            raise OptionError(f"metadata: {key!r} is worked out from the tensors; it is not set by hand")
    with open_adapter(file) as source:
        gone = _chosen(source, delete)
        kept = {key: value for key, value in source.metadata.items() if key not in gone}
        return _written(source, Path(file), target, {**kept, **told}, force, dry_run)


def strip_metadata(
    file: PathLike, target: PathLike | None, *, everything: bool = False, force: bool = False, dry_run: bool = False
) -> MetadataReport:
    """Write `file` to `target` (None: in its own place) without what it tells of its training: folders, captions, file
    names, settings, prompts. What programs read the tensors by stays, and so do `modelspec` entries (title, author,
    license). With `everything` only that stays without which the tensors would be read otherwise.

    Raises:
        FormatError: the file cannot be read, or is a pickle, which has no metadata.
        OptionError: the target exists.
    """
    with open_adapter(file) as source:
        if everything:
            kept = {key: value for key, value in source.metadata.items() if key == "format"}
            deciding = {key: source.metadata[key] for key in DECIDING if key in source.metadata}
            if deciding and differences(source, kept):
                kept |= deciding
        else:
            kept = {k: v for k, v in source.metadata.items() if k in KEPT or k.startswith(KEPT_LEADS)}
        return _written(source, Path(file), target, kept, force, dry_run)


def _chosen(source: Source, patterns: Iterable[str]) -> frozenset[str]:
    """The entries to delete."""
    found: list[str] = []
    for pattern in patterns:
        matching = [key for key in source.metadata if key == pattern or fnmatchcase(key, pattern)]
        if not matching:
            raise OptionError(f"{source.path}: no metadata entry {pattern!r}. {nearest(pattern, source.metadata)}")
        found += matching
    return frozenset(found)


def _written(
    source: Source, file: Path, target: PathLike | None, metadata: Mapping[str, str], force: bool, dry_run: bool
) -> MetadataReport:
    with open(source.path, "rb") as stream:
        if not is_safetensors(stream.read(9)):
            raise FormatError(f"{source.path}: a pickle has no metadata; convert it to .safetensors first")
    is_folder = file.is_dir() and target is not None
    place = source.path if target is None else check_output(target, [file], force)
    tensors = as_they_are(source)
    notes = [f"note: {text}" for text in differences(source, metadata)]
    size = size_of(tensors, metadata)
    if not dry_run:
        size = write_verbatim(source, place, metadata, tensors, is_folder=is_folder)
    return MetadataReport(
        os.fspath(file),
        dict(metadata),
        os.fspath(place),
        size,
        tuple(sorted(key for key, value in metadata.items() if source.metadata.get(key) != value)),
        tuple(sorted(key for key in source.metadata if key not in metadata)),
        tuple(notes),
    )
