"""What encoders said, kept under names that are made of what was encoded and of the encoder itself.

A picture that changes, another frame or another encoder gets another name, so that nothing stale is ever met. On the
disk each entry is a file of safetensors, there whole or not at all; a damaged one is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from nerine.errors import FormatError
from nerine.files.atomic import replacing, write_json
from nerine.train.batch import Frame

__all__ = ["Cache", "Digests", "fingerprint", "key_of"]

_LOOKED_AT = 64  # values of each tensor that a fingerprint is made of


class Cache:
    """{key: tensors by name}, in `folder` or, where that is None, in memory. `damaged` counts what was made anew."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.damaged = 0
        self._kept: dict[str, Mapping[str, Tensor]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._kept if self.folder is None else self._file(key).is_file()

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        """The tensors, on the CPU; None where there are none, or damaged ones."""
        if self.folder is None:
            return self._kept.get(key)
        try:
            found: dict[str, Tensor] = load(self._file(key).read_bytes())
            return found
        except FileNotFoundError:
            return None
        except SafetensorError:
            self.damaged += 1
            return None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep them. Two processes may do so at once: the files are the same."""
        plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        if self.folder is None:
            self._kept[key] = plain
            return
        file = self._file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as out:
            out.write(save(plain))

    def _file(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.safetensors"


class Digests:
    """Digests of files, read once for as long as their sizes and times do not change. `kept` is the file where they are
    remembered from run to run; without it, or where it is damaged, each run reads all files once."""

    def __init__(self, kept: Path | None = None) -> None:
        self.kept = kept
        self._known: dict[str, tuple[int, int, str]] = {} if kept is None else _remembered(kept)
        self._is_new = False

    def of(self, file: Path) -> str:
        """The SHA-256 of what is in the file.

        Raises:
            FormatError: it cannot be read.
        """
        try:
            stat = file.stat()
            mark = (stat.st_size, stat.st_mtime_ns)
            name = ascii(os.path.abspath(file))  # a name need not be text in UTF-8
            known = self._known.get(name)
            if known is None or known[:2] != mark:
                known = self._known[name] = (*mark, _digest(file))
                self._is_new = True
        except OSError as error:
            raise FormatError(f"{file}: the picture cannot be read: {error}") from error
        return known[2]

    def save(self) -> None:
        """Remember them, if there is something new."""
        if self.kept is not None and self._is_new:
            self.kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.kept, self._known)
            self._is_new = False


def _remembered(kept: Path) -> dict[str, tuple[int, int, str]]:
    """What such a file says; nothing where it is missing or says something else."""
    try:
        rows = json.loads(kept.read_bytes())
        return {str(name): (int(size), int(time), str(digest)) for name, (size, time, digest) in rows.items()}
    except (FileNotFoundError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def key_of(*words: str | int | bool | Frame) -> str:
    """A name for what these words say."""
    return hashlib.sha256("\0".join(map(repr, words)).encode()).hexdigest()[:40]


@torch.no_grad()
def fingerprint(module: nn.Module | None, *words: str) -> str:
    """A short name of a module: its tensors' names, shapes and formats, and some of their values. It does not depend on
    where they are."""
    digest = hashlib.sha256("\0".join(words).encode())
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())} if module is not None else {}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        if flat.numel() and flat.device.type != "meta":
            step = max(1, flat.numel() // _LOOKED_AT)
            digest.update(flat[::step][:_LOOKED_AT].cpu().double().numpy().tobytes())
    return digest.hexdigest()[:20]
