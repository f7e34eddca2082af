"""Checkpoints: bits there and back, whole or not at all, and which of them stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nerine.errors import FormatError
from nerine.train.checkpoints import Checkpoints, gathered


def write(folder: Path) -> None:
    (folder / "adapter.safetensors").write_bytes(b"x")


def state(step: int) -> dict[str, object]:
    return {"step": step, "network": {"a": torch.full((2, 3), step / 3)}, "optimizer": {"state": {0: {"n": 1}}}}


def steps(checkpoints: Checkpoints) -> list[int]:
    return [one.step for one in checkpoints.all()]


def test_what_was_saved_comes_back_bit_by_bit(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "new" / "checkpoints", keep=2)
    assert checkpoints.all() == []
    assert checkpoints.latest() is None
    checkpoints.save(7, None, state(7), write)
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 7
    found = latest.state()
    assert torch.equal(found["network"]["a"], torch.full((2, 3), 7 / 3))
    assert found["optimizer"] == {"state": {0: {"n": 1}}}
    assert (latest.folder / "adapter.safetensors").read_bytes() == b"x"


def test_the_latest_and_the_best_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, validation in ((1, 0.5), (2, 0.1), (3, 0.3), (4, None), (5, 0.2)):
        checkpoints.save(step, validation, state(step), write)
    assert steps(checkpoints) == [2, 4, 5]
    best = checkpoints.best()
    assert best is not None
    assert (best.step, best.validation) == (2, 0.1)


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(3, 0.5, state(3), write)
    checkpoints.save(3, 0.4, state(30), write)
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.validation == 0.4
    assert latest.state()["step"] == 30


def test_an_error_while_writing_leaves_the_one_before(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(3, None, state(3), write)

    def fail(folder: Path) -> None:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        checkpoints.save(4, None, state(4), fail)
    assert steps(checkpoints) == [3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000003"]


def test_steps_beyond_a_million_are_in_order(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (999_999, 1_000_000, 2_000_000):
        checkpoints.save(step, None, state(step), write)
    assert steps(checkpoints) == [999_999, 1_000_000, 2_000_000]


@pytest.mark.parametrize("file", ["state.pt", "checkpoint.json"])
def test_damage_is_named(tmp_path: Path, file: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    place = checkpoints.save(3, None, state(3), write).folder / file
    place.write_bytes(place.read_bytes()[:20])

    def read() -> None:
        latest = checkpoints.latest()
        assert latest is not None
        latest.state()

    with pytest.raises(FormatError, match=file):
        read()


def test_gathered_keeps_the_nest() -> None:
    nest = {"a": [torch.ones(2, requires_grad=True), 3], "b": ({"c": torch.zeros(1)}, None)}
    found = gathered(nest)
    assert not found["a"][0].requires_grad
    assert found["a"][1] == 3
    assert isinstance(found["b"], tuple)
    assert found["b"][1] is None
