"""The hashes of other programs, against a file that is made as they make it."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from nerine.files.hashes import PLACEHOLDERS
from nerine.files.store import open_file, write_file

RNG = torch.Generator().manual_seed(0)
MIXED = {
    "b.half": torch.randn(300, 100, generator=RNG).half(),
    "a.brain": torch.randn(100, 70, generator=RNG).bfloat16(),
    "c.single": torch.randn(301, 77, generator=RNG),
    "d.count": torch.arange(3, dtype=torch.int32),
    "e.alpha": torch.tensor(4.0),
    "f.flag": torch.tensor([True]),
    "g.eight": torch.randn(7, generator=RNG).to(torch.float8_e4m3fn),
    "g.other": torch.randn(7, generator=RNG).to(torch.float8_e5m2),
    "h.none": torch.zeros(0, 3),
}
META = {"ss_network_dim": "4", "ss_tag": "ü\n\"'", "modelspec.title": "t" * 999, "format": "pt", "nerine": "{}"}
MB = 2**20


def numbers(count: int) -> Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=RNG)


def by_hand(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Serialise with the metadata of the training alone; hash the data, and 64 KiB of the whole at 1 MiB."""
    told = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    whole = safetensors.torch.save(dict(tensors), told)
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    return {
        "sshs_model_hash": hashlib.sha256(whole[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(whole[MB : MB + 65536]).hexdigest()[:8],
    }


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        MIXED,
        {"a": numbers(MB - 300)},  # ends before the window
        {"a": numbers(MB)},  # within it
        {"a": numbers(MB // 2), "b": numbers(MB // 2 + 30_000)},
        {"a": numbers(MB), "b": numbers(65_000), "c": numbers(9_000)},
        {**MIXED, "z": numbers(2 * MB)},
        {f"{i:0>500}": numbers(8) for i in range(1900)},  # a header that reaches into the window
        {f"{i:0>500}": numbers(8) for i in range(2100)},  # and one that covers it
    ],
    ids=range(9),
)
def test_they_are_those_of_sd_scripts(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = tmp_path / "a.safetensors"
    size = write_file(path, tensors, META, hashes=True)
    assert size == path.stat().st_size
    with open_file(path) as source:
        assert dict(source.metadata) == META | by_hand(tensors, META)
        assert all(
            torch.equal(source.read(k).view(torch.uint8), t.view(torch.uint8))
            for k, t in MIXED.items()
            if k in tensors and t.dim()
        )


def test_only_the_metadata_of_the_training_counts(tmp_path: Path) -> None:
    def hashes(metadata: dict[str, str]) -> dict[str, str]:
        write_file(tmp_path / "a.safetensors", {"a": numbers_of_two}, metadata, hashes=True)
        with open_file(tmp_path / "a.safetensors") as source:
            return {key: source.metadata[key] for key in PLACEHOLDERS}

    numbers_of_two = numbers(2 * MB)
    first = hashes(META)
    assert hashes({**META, "modelspec.title": "u", "more": "x" * 5000, "sshs_model_hash": "old"}) == first
    assert hashes({**META, "ss_network_dim": "5" * 1000})["sshs_legacy_hash"] != first["sshs_legacy_hash"]


def test_without_them_none_are_written(tmp_path: Path) -> None:
    write_file(tmp_path / "a.safetensors", MIXED, META)
    with open_file(tmp_path / "a.safetensors") as source:
        assert not PLACEHOLDERS.keys() & source.metadata.keys()
