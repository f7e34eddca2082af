"""The rectified-flow loss: exact on a known field, the same for the same seed, and fixed where it must be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nerine.tiny import denoising_loss, drop_prompts, held_out_loss
from nerine.tiny.losses import flow_error


class Field(nn.Module):
    """A stand-in for the UNet: the velocity is a multiple of the noisy picture; keeps the times."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.0))
        self.times: list[Tensor] = []

    def forward(
        self, noisy: Tensor, time: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        self.times.append(time)
        return (self.factor * noisy + encoder_hidden_states.mean(),)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.zeros(6, 4, 8), torch.randn(6, 3, 16, 16, generator=seeded(9))


def test_a_perfect_field_has_no_error() -> None:
    pictures, noise = torch.zeros(2, 3, 4, 4), torch.randn(2, 3, 4, 4, generator=seeded())
    error = flow_error(Field(), torch.zeros(2, 1, 1), pictures, noise, torch.ones(2))
    assert error == 0  # at t = 1 the noisy picture is the noise, and v = noise - 0


def test_the_training_loss_follows_its_generator(batch: tuple[Tensor, Tensor]) -> None:
    field = Field()
    first, again, other = (denoising_loss(field, *batch, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    first.backward()
    assert field.factor.grad is not None
    assert torch.cat(field.times).aminmax().min > 0
    assert torch.cat(field.times).aminmax().max < 1000


def test_the_held_out_loss_is_one_number(batch: tuple[Tensor, Tensor]) -> None:
    field = Field().train()
    value = held_out_loss(field, *batch)
    assert value == held_out_loss(field, *batch)
    assert field.training
    assert value == pytest.approx(held_out_loss(field, *batch, batch=6), rel=1e-6)


def test_the_held_out_times_stand_for_the_logit_normal_law(batch: tuple[Tensor, Tensor]) -> None:
    field = Field()
    held_out_loss(field, *batch, times=4)
    times = torch.cat(field.times).unique() / 1000
    torch.testing.assert_close(times, 1 - times.flip(0))
    torch.testing.assert_close(times[2], torch.tensor(0.3186394).sigmoid())


def test_prompts_are_dropped_at_their_chance() -> None:
    states, empty = torch.ones(4000, 2, 3), torch.zeros(1, 2, 3)
    kept = drop_prompts(states, empty, 0.1, seeded()).mean()
    assert kept == pytest.approx(0.9, abs=0.02)
    assert torch.equal(drop_prompts(states, empty, 0.0, seeded()), states)
    assert torch.equal(drop_prompts(states, empty, 1.0, seeded()), empty.expand_as(states))
