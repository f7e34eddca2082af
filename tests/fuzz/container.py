"""A safetensors file in pieces, and put together again without any check, so that it can be made wrong."""

from __future__ import annotations

import json
import math
import random
import struct
from dataclasses import dataclass
from typing import Any

import torch

ITEM = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
ITEM |= {"U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1}
TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TORCH |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool, "I8": torch.int8}
TORCH |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


@dataclass
class Tensor:
    dtype: str
    shape: list[int]
    data: bytes


@dataclass
class File:
    """A valid container in pieces."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @classmethod
    def of(cls, data: bytes) -> File:
        header, payload = split(data)
        table = json.loads(header)
        metadata = table.pop("__metadata__", {})
        tensors = {
            key: Tensor(e["dtype"], list(e["shape"]), payload[slice(*e["data_offsets"])]) for key, e in table.items()
        }
        return cls(tensors, metadata)

    def table(self) -> tuple[list[tuple[str, Any]], bytes]:
        """Entries of the header in order, and the data."""
        entries: list[tuple[str, Any]] = [("__metadata__", self.metadata)]
        payload = b""
        for key, tensor in self.tensors.items():
            end = len(payload) + len(tensor.data)
            entry = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [len(payload), end]}
            entries.append((key, entry))
            payload += tensor.data
        return entries, payload


def split(data: bytes) -> tuple[bytes, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + length], data[8 + length :]


def join(header: bytes, payload: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + payload


def spelled(entries: list[tuple[str, Any]]) -> bytes:
    """A header in which a name may come twice."""
    return ("{" + ",".join(f"{json.dumps(k)}:{json.dumps(v)}" for k, v in entries) + "}").encode()


def filled(dtype: str, shape: list[int], rng: random.Random) -> Tensor:
    """Fresh numbers in a format and shape."""
    count = math.prod(shape)
    if dtype in TORCH and rng.random() < 0.7:
        values = torch.tensor([rng.uniform(-1, 1) for _ in range(count)]).to(TORCH[dtype])
        return Tensor(dtype, shape, raw(values))
    return Tensor(dtype, shape, rng.randbytes(count * ITEM[dtype]))


def raw(values: torch.Tensor) -> bytes:
    return bytes(values.reshape(-1).view(torch.uint8).numpy().tobytes())


def values_of(tensor: Tensor) -> torch.Tensor | None:
    """Its numbers as one row, where PyTorch computes with the format."""
    if tensor.dtype not in TORCH or not tensor.data:
        return None
    return torch.frombuffer(bytearray(tensor.data), dtype=TORCH[tensor.dtype])
