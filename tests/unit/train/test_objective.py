"""Schedules, noise, targets and weights: against diffusers' schedulers, and against numbers worked out by hand."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import pytest
import torch

from nerine.errors import OptionError
from nerine.train.batch import Latents
from nerine.train.objective import Objective
from nerine.train.randomness import Dice
from nerine.train.schedules import cumulated_alphas, signal_to_noise
from nerine.train.settings import ObjectiveSettings
from nerine.train.timesteps import draw_times, fixed_times

SCHEDULES: list[dict[str, Any]] = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
    {"trained_betas": [0.0001 + 0.00001 * i for i in range(1000)]},
]
WHERE = ((0, 0), (0, 1), (7, 3))


def ddpm(**settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return diffusers.DDPMScheduler(**settings)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(3, 4, 6, 5), torch.randn(3, 4, 6, 5)


@pytest.mark.parametrize("settings", SCHEDULES)
def test_alphas_are_those_of_diffusers(settings: dict[str, Any]) -> None:
    scheduler = ddpm(**settings)
    found = cumulated_alphas(scheduler.config)
    assert found.dtype == torch.float64
    expected = scheduler.alphas_cumprod.double()
    if settings.get("rescale_betas_zero_snr"):
        assert found[-1] == 0
    assert torch.allclose(found, expected, atol=2e-6)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(OptionError, match="sigmoid"):
        cumulated_alphas({"beta_schedule": "sigmoid"})
    with pytest.raises(OptionError, match="counts 50 timesteps"):
        cumulated_alphas({"num_train_timesteps": 50})


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_noise_and_targets_are_those_of_diffusers(prediction: str) -> None:
    scheduler = ddpm(**SCHEDULES[1])
    objective = Objective(ObjectiveSettings(), prediction, scheduler.config)
    latents, noise = batch()
    times = torch.tensor([0.0, 500.0, 999.0])
    assert torch.allclose(
        objective.noisy(latents, noise, times), scheduler.add_noise(latents, noise, times.long()), atol=1e-5
    )
    expected = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, times.long())
    assert torch.allclose(objective.target(latents, noise, times), expected, atol=1e-5)


def test_flow_is_that_of_diffusers() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    objective = Objective(ObjectiveSettings(), "flow", scheduler.config)
    latents, noise = batch()
    times = scheduler.timesteps[[10, 500, 900]]
    expected = scheduler.scale_noise(latents, times, noise)
    assert torch.allclose(objective.noisy(latents, noise, times), expected, atol=1e-6)
    assert torch.equal(objective.target(latents, noise, times), noise - latents)


def test_what_is_predicted_leads_back_to_the_picture() -> None:
    latents, noise = batch()
    times = torch.tensor([100.0, 400.0, 800.0])
    alphas = cumulated_alphas(ddpm().config)[times.long()].float().reshape(-1, 1, 1, 1)
    for prediction in ("epsilon", "v", "flow"):
        objective = Objective(ObjectiveSettings(), prediction, ddpm().config)
        noisy, target = objective.noisy(latents, noise, times), objective.target(latents, noise, times)
        level = (times / 1000).reshape(-1, 1, 1, 1)
        back = {
            "epsilon": (noisy - (1 - alphas).sqrt() * target) / alphas.sqrt(),
            "v": alphas.sqrt() * noisy - (1 - alphas).sqrt() * target,
            "flow": noisy - level * target,
        }[prediction]
        assert torch.allclose(back, latents, atol=2e-4), prediction


@pytest.mark.parametrize("weighting", ["min-snr", "debiased"])
def test_weights_of_all_predictions_are_one_weight_of_the_picture(weighting: str) -> None:
    """An error of x0 counts the same, whatever the denoiser predicts: what the papers give, carried over."""
    scheduler = ddpm(**SCHEDULES[1])
    times = torch.tensor([50.0, 400.0, 900.0])
    alphas = cumulated_alphas(scheduler.config)[times.long()]
    ratio = signal_to_noise(alphas)
    settings = ObjectiveSettings(weighting=weighting)
    epsilon = Objective(settings, "epsilon", scheduler.config).weight(times).double()
    v = Objective(settings, "v", scheduler.config).weight(times).double()
    expected = ratio.clamp(max=5) / ratio if weighting == "min-snr" else ratio.rsqrt()
    assert torch.allclose(epsilon, expected, rtol=1e-5)
    assert torch.allclose(epsilon * ratio, v * (ratio + 1), rtol=1e-5)
    level = times.double() / 1000
    flow_ratio = ((1 - level) / level).square()
    flow = Objective(settings, "flow", {}).weight(times).double()
    as_picture = flow / level.square()  # weight of the error of x0
    expected = flow_ratio.clamp(max=5) if weighting == "min-snr" else flow_ratio.sqrt()
    assert torch.allclose(as_picture, expected, rtol=1e-4)


def test_min_snr_by_hand() -> None:
    """At a ratio of 4 and gamma 1: 1/4 for epsilon, 1/5 for v."""
    config = {"trained_betas": [0.2, *[1e-9] * 999]}  # the first cumulated alpha is 0.8: a ratio of 4
    settings = ObjectiveSettings(weighting="min-snr", min_snr_gamma=1.0)
    times = torch.tensor([0.0])
    assert Objective(settings, "epsilon", config).weight(times).item() == pytest.approx(0.25, rel=1e-5)
    assert Objective(settings, "v", config).weight(times).item() == pytest.approx(0.2, rel=1e-5)


def test_zero_terminal_snr_ends_in_noise_alone() -> None:
    scheduler = ddpm(**SCHEDULES[1])
    objective = Objective(ObjectiveSettings(zero_terminal_snr=True), "v", scheduler.config)
    latents, noise = batch()
    times = torch.full((3,), 999.0)
    assert torch.equal(objective.noisy(latents, noise, times), noise)
    assert torch.equal(objective.target(latents, noise, times), -latents)
    assert torch.isfinite(
        Objective(ObjectiveSettings(zero_terminal_snr=True, weighting="min-snr"), "v", scheduler.config).weight(times)
    ).all()
    with pytest.raises(OptionError, match="zero_terminal_snr"):
        Objective(ObjectiveSettings(zero_terminal_snr=True), "epsilon", scheduler.config)


@pytest.mark.parametrize(("loss", "expected"), [("l2", 4.0), ("l1", 2.0), ("huber", 2 * 0.5 * (2 - 0.25))])
def test_losses_by_hand(loss: str, expected: float) -> None:
    objective = Objective(ObjectiveSettings(loss=loss, huber_c=0.5), "flow", {})
    found = objective.loss(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 2.0), torch.tensor([500.0, 1.0]))
    assert found.shape == (2,)
    assert torch.allclose(found, torch.tensor(expected))


def test_losses_are_in_fp32_for_half_predictions() -> None:
    objective = Objective(ObjectiveSettings(), "flow", {})
    found = objective.loss(torch.full((1, 3, 4, 4), 300.0).half(), torch.zeros(1, 3, 4, 4), torch.tensor([1.0]))
    assert found.item() == 90000  # which fp16 cannot hold


def test_noise_depends_on_the_place_alone() -> None:
    objective = Objective(ObjectiveSettings(noise_offset=0.3), "flow", {})
    latents, _ = batch()
    dice = Dice(4)
    whole = objective.noise(latents, dice, "train", WHERE)
    parts = [objective.noise(latents[i : i + 1], dice, "train", WHERE[i : i + 1]) for i in (2, 0, 1)]
    assert torch.equal(whole, torch.cat([parts[1], parts[2], parts[0]]))
    assert not torch.equal(whole, objective.noise(latents, dice, "validate", WHERE))


def test_the_offset_moves_whole_channels() -> None:
    latents = torch.zeros(64, 4, 16, 16)
    where = [(n, 0) for n in range(64)]
    means = [
        Objective(ObjectiveSettings(noise_offset=offset), "flow", {})
        .noise(latents, Dice(0), "train", where)
        .mean((2, 3))
        .std()
        .item()
        for offset in (0.0, 0.5)
    ]
    assert means[0] == pytest.approx(1 / 16, rel=0.15)
    assert means[1] == pytest.approx((0.25 + 1 / 256) ** 0.5, rel=0.15)


def test_latents_are_drawn_from_their_distribution() -> None:
    objective = Objective(ObjectiveSettings(), "flow", {})
    mean = torch.full((200, 1, 8, 8), 3.0)
    where = [(n, 1) for n in range(200)]
    found = objective.sample(Latents(mean, torch.full_like(mean, 0.5)), Dice(1), "train", where)
    assert found.mean().item() == pytest.approx(3.0, abs=0.02)
    assert found.std().item() == pytest.approx(0.5, rel=0.03)
    assert torch.equal(objective.sample(Latents(mean), Dice(1), "train", where), mean)


# -- times -------------------------------------------------------------------------------------------------------------
MANY = [(n, i) for n in range(1250) for i in range(8)]


def drawn(prediction: str, **settings: Any) -> torch.Tensor:
    return draw_times(ObjectiveSettings(**settings), prediction, Dice(2), MANY)


def test_uniform_times_are_whole_numbers_for_epsilon() -> None:
    found = drawn("epsilon")
    assert torch.equal(found, found.round())
    assert found.min() >= 0
    assert found.max() <= 999
    assert found.mean().item() == pytest.approx(499.5, abs=9)  # three standard errors
    assert len(found.unique()) > 990


def test_logit_normal_times() -> None:
    found = drawn("flow") / 1000
    logits = found.double().logit()
    assert logits.mean().item() == pytest.approx(0, abs=0.03)
    assert logits.std().item() == pytest.approx(1, abs=0.03)
    moved = (drawn("flow", timestep_mean=-1.0, timestep_std=0.5) / 1000).double().logit()
    assert moved.mean().item() == pytest.approx(-1, abs=0.02)
    assert moved.std().item() == pytest.approx(0.5, abs=0.02)


def test_shifted_times_are_shifted_uniform_ones() -> None:
    found = drawn("flow", timesteps="shifted", timestep_shift=3.0).double() / 1000
    back = found / (3 - 2 * found)
    assert back.mean().item() == pytest.approx(0.5, abs=0.01)
    assert back.std().item() == pytest.approx(12**-0.5, abs=0.01)


def test_times_keep_within_their_bounds() -> None:
    for prediction in ("epsilon", "flow"):
        found = drawn(prediction, min_timestep=200, max_timestep=700)
        assert 200 <= found.min() < 215
        assert 680 < found.max() <= 700


def test_fixed_times_have_the_mean_of_the_law() -> None:
    settings = ObjectiveSettings()
    few = fixed_times(settings, "flow", 4)
    assert torch.allclose(few, 1000 - few.flip(0))
    assert few.unique().shape == (4,)
    assert fixed_times(settings, "epsilon", 4).tolist() == [125, 375, 625, 875]
