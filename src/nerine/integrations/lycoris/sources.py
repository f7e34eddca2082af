"""Files and tensors in memory, as hosts hand them over, as one thing to read from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nerine.errors import OptionError
from nerine.files.folder import open_adapter
from nerine.files.store import Source

__all__ = ["PICKLED", "source_of"]

PICKLED = (".pt", ".ckpt", ".bin", ".pth")


def source_of(file: Any, tensors: Mapping[str, Tensor] | None) -> Any:
    """A file, or tensors in memory, as something to read from; a context."""
    if tensors is not None:
        return _Memory(Source.of(tensors, path=file or "(memory)"))
    if file is None:
        raise OptionError("expected a file or its tensors, got neither")
    return open_adapter(file, allow_pickle=Path(file).suffix.lower() in PICKLED)


class _Memory:
    """Tensors in memory as an open file."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __enter__(self) -> Source:
        return self._source

    def __exit__(self, *_: object) -> None:
        return None
