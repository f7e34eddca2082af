"""Files and tensors in memory, as hosts hand them over, as one thing to read from."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nerine.api import Choice, read_fittings
from nerine.errors import OptionError
from nerine.files.folder import open_adapter
from nerine.files.reports import LoadReport
from nerine.files.store import Source
from nerine.model.fitting import Fitting

__all__ = ["PICKLED", "read_for", "source_of"]

PICKLED = (".pt", ".ckpt", ".bin", ".pth")


def source_of(file: Any, tensors: Mapping[str, Tensor] | None) -> AbstractContextManager[Source]:
    """A file, or tensors in memory, as something to read from."""
    if tensors is not None:
        return nullcontext(Source.of(tensors, path=file or "(memory)"))
    if file is None:
        raise OptionError("expected a file or its tensors, got neither")
    return open_adapter(file, allow_pickle=Path(file).suffix.lower() in PICKLED)


def read_for(
    model: nn.Module, file: Any, tensors: Mapping[str, Tensor] | None
) -> tuple[LoadReport, list[Fitting], Mapping[str, Tensor]]:
    """The adapters for `model` of a file or of its tensors, the report of reading them, and the tensors."""
    with source_of(file, tensors) as source:
        report, fittings = read_fittings(model, source, Choice())
        return report, fittings, {key: source.read(key) for key in source.keys} if tensors is None else tensors
