"""T-LoRA's masks: one for each group, for all threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from nerine.errors import OptionError, ShapeError
from nerine.integrations.lycoris.timesteps import (
    MASKS,
    clear_timestep_mask,
    compute_timestep_mask,
    get_timestep_mask,
    mask_for,
    set_timestep_mask,
)


@pytest.fixture(autouse=True)
def _no_masks() -> Iterator[None]:
    yield
    for group in (0, 1):
        clear_timestep_mask(group)


def test_a_mask_is_there_until_it_is_cleared() -> None:
    one, other = torch.ones(1, 4), torch.zeros(3, 4)
    assert get_timestep_mask() is None
    set_timestep_mask(one)
    set_timestep_mask(other, group_id=1)
    assert get_timestep_mask() is mask_for(0) is MASKS.get(0) is one
    assert mask_for(1) is other
    clear_timestep_mask()
    clear_timestep_mask()
    assert (mask_for(0), mask_for(1)) == (None, other)


def test_another_thread_finds_the_same_mask() -> None:
    """As autograd's do, when gradient checkpointing calls a layer again."""
    set_timestep_mask(torch.ones(1, 4))
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(mask_for(0)))
    thread.start()
    thread.join()
    assert found == [mask_for(0)]


def test_the_ranks_of_a_timestep() -> None:
    counts = [int(compute_timestep_mask(t, 1000, 16, 2).sum()) for t in (0, 250, 500, 999, 1000)]
    assert counts == [16, 12, 9, 2, 2]
    mask = compute_timestep_mask(500, 1000, 16, 2, alpha=2.0)
    assert mask.shape == (1, 16)
    assert mask[0, :5].all()
    assert not mask[0, 5:].any()


@pytest.mark.parametrize("timestep", [-1, 1001])
def test_a_timestep_beyond_the_last(timestep: int) -> None:
    with pytest.raises(OptionError, match=f"expected a number from 0 to max_timestep 1000, got {timestep}"):
        compute_timestep_mask(timestep, 1000, 16)


def test_what_is_no_mask() -> None:
    with pytest.raises(ShapeError, match=r"got \(2, 3, 4\)"):
        set_timestep_mask(torch.ones(2, 3, 4))
    with pytest.raises(ShapeError, match="got None"):
        set_timestep_mask(None)  # type: ignore[arg-type]
