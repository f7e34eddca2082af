"""A shelf: tensors put aside on the disk until the file that they are for is laid out and written, so that a tool whose
ranks are known only afterwards holds one layer in memory and computes each once.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from nerine.algorithms import Params
from nerine.errors import FormatError
from nerine.files.checkpoint import Base, Layer, Record, of_record
from nerine.ops.precision import is_finite

__all__ = ["Shelf", "open_shelf", "sketched"]

EXACT = frozenset({"magnitude"})  # kept in at least fp32 whatever the tensors are cast to


class Shelf:
    """Keeps tensors in an unnamed file; without one (a dry run) only their shapes."""

    def __init__(self, stream: BinaryIO | None) -> None:
        self._stream = stream

    def put(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Put a tensor aside; what is returned brings it back."""
        shape, dtype = tuple(tensor.shape), tensor.dtype
        stream = self._stream
        if stream is None:
            return lambda: torch.empty(shape, dtype=dtype, device="meta")
        stream.seek(0, os.SEEK_END)
        at = stream.tell()
        stream.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

        def read() -> Tensor:
            found = torch.empty(shape, dtype=dtype, device="cpu")
            stream.seek(at)
            stream.readinto(found.reshape(-1).view(torch.uint8).numpy().data)  # type: ignore[attr-defined]
            return found

        return read

    def layer(self, path: str, record: Record, dtype: torch.dtype, base: Base | None = None) -> Layer:
        """A layer to write whose tensors are put aside, rounded to `dtype` (magnitudes are not).

        Raises:
            FormatError: a number is too large for that format.
        """
        readers, shapes, dtypes = {}, {}, {}
        for name, tensor in record.params.tensors.items():
            kept = tensor.dtype if name in EXACT else dtype
            rounded = tensor.to(kept)
            if not is_finite(rounded):
                raise FormatError(
                    f"{path}: {name} reaches {float(tensor.abs().max()):.3g}, which is more than "
                    f"{str(kept).removeprefix('torch.')} holds; write bf16 or fp32 (--dtype)"
                )
            readers[name] = self.put(rounded)
            shapes[name], dtypes[name] = tuple(tensor.shape), kept
        return Layer(
            record.algorithm,
            record.site,
            shapes,
            record.params.scale,
            _loader(readers, record.params.scale),
            base=base,
            dtypes=dtypes,
        )


def sketched(record: Record, dtype: torch.dtype, base: Base | None = None) -> Layer:
    """The layer that a shelf would give, of tensors without values."""
    tensors = {name: t if name in EXACT else t.to(dtype) for name, t in record.params.tensors.items()}
    return of_record(replace(record, params=Params(tensors, record.params.scale)), base)


def _loader(readers: Mapping[str, Callable[[], Tensor]], scale: float) -> Callable[[], Params]:
    return lambda: Params({name: read() for name, read in readers.items()}, scale)


@contextmanager
def open_shelf(beside: Path | None) -> Iterator[Shelf]:
    """A shelf on the disk on which `beside` lies; None for one that keeps nothing."""
    if beside is None:
        yield Shelf(None)
        return
    with tempfile.TemporaryFile(dir=beside.parent) as stream:
        yield Shelf(stream)
