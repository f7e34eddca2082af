"""sd-scripts' two hashes, against its own way to make them: of a serialisation by safetensors itself."""

from __future__ import annotations

import hashlib
import weakref
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from nerine import FormatError
from nerine.files.store import Outgoing, open_file, write_file

META = {"format": "pt", "ss_network_dim": "4", "ss_output_name": "ü", "author": "me"}


def tensors_of(size: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "b.lora_up.weight": torch.randn(size // 4, 2).half(),
        "a.lora_down.weight": torch.randn(size // 8).bfloat16(),
        "a.alpha": torch.tensor(4.0),
        "c.on_input": torch.tensor(1),
        "c.flag": torch.tensor([True]),
        "c.lora_up.weight": torch.randn(size // 8),
    }


def expected(tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[str, str]:
    content = safetensors.torch.save(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    data = content[8 + int.from_bytes(content[:8], "little") :]
    return hashlib.sha256(data).hexdigest(), hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]


@pytest.mark.parametrize("size", [64, 0x100000 - 700, 0x108000, 0x300000])
def test_the_hashes_are_those_of_sd_scripts(size: int, tmp_path: Path) -> None:
    tensors = tensors_of(size)
    write_file(tmp_path / "a.safetensors", tensors, META, hashes=True)
    with open_file(tmp_path / "a.safetensors") as source:
        found = source.metadata["sshs_model_hash"], source.metadata["sshs_legacy_hash"]
        assert all(torch.equal(source.read(key), tensor) for key, tensor in tensors.items())
    assert found == expected(tensors, META)
    loaded = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors.items())


def test_the_payload_is_byte_for_byte_that_of_safetensors(tmp_path: Path) -> None:
    tensors = tensors_of(4096)
    write_file(tmp_path / "a.safetensors", tensors, {})
    ours, theirs = (tmp_path / "a.safetensors").read_bytes(), safetensors.torch.save(tensors, {})
    assert ours == theirs


# -- one at a time ---------------------------------------------------------------------------------------------------
def test_a_tensor_is_made_when_its_turn_comes_and_dropped_after_it(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def make() -> Tensor:
        assert sum(t() is not None for t in alive) <= 1
        tensor = torch.zeros(100, 100)
        alive.append(weakref.ref(tensor))
        return tensor

    outgoing = (Outgoing(f"t{i}", (100, 100), torch.float32, make) for i in range(6))
    write_file(tmp_path / "a.safetensors", outgoing, {})
    assert len(alive) == 6


def test_a_tensor_that_is_not_as_announced_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"t was to be torch.float32 \(2,\) and has become torch.float32 \(3,\)"):
        write_file(tmp_path / "a.safetensors", [Outgoing("t", (2,), torch.float32, lambda: torch.zeros(3))], {})
    assert list(tmp_path.iterdir()) == []


def test_two_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = [Outgoing("t", (), torch.float32, lambda: torch.zeros(()))] * 2
    with pytest.raises(FormatError, match="two tensors would have the same name"):
        write_file(tmp_path / "a.safetensors", twice, {})


def test_what_was_read_does_not_change_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_file(path, {"a": torch.arange(5000.0), "b": torch.arange(5000.0)}, {})
    with open_file(path) as source:
        first = source.read("a")
        with path.open("r+b") as handle:
            handle.truncate(300)
        assert torch.equal(first, torch.arange(5000.0))
        with pytest.raises(FormatError, match="cut short while it was read, within b"):
            source.read("b")
