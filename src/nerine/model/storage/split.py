"""Weights of which every process holds a piece: those of FSDP2 and tensor parallelism, and those of ZeRO-3."""

from __future__ import annotations

from nerine.model.sharded import is_partitioned, is_split, whole, whole_at_rest, written
from nerine.model.storage.kind import Storage

__all__ = ["PARTITIONED", "SPLIT"]

SPLIT = Storage(
    "split", lambda module, stored: is_split(stored), lambda module, stored: whole(stored), written, in_place=True
)
PARTITIONED = Storage(
    "partitioned",
    lambda module, stored: is_partitioned(stored),
    lambda module, stored: whole_at_rest(stored),
    refusal="under ZeRO-3 the engine keeps the weight in pieces of its own: save(network, file), and merge the file "
    "into a model that is not partitioned",
)
