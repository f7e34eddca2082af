"""sd-scripts' order of things in two processes: the network alone is prepared by accelerate, and gradients are averaged
by the trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from nerine import kohya
from sd_scripts import stand_in

pytest.importorskip("accelerate", reason="needs the extra: pip install nerine[train]")
pytest.importorskip("diffusers", reason="needs the extra: pip install nerine[train]")

ARGUMENTS = {"algo": "lokr", "factor": "4", "dora_wd": "True", "preset": "attn-mlp"}


def sample(number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 48, (1, 8), generator=generator)
    return ids, torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 4, 8, 8, generator=generator)


def loss_of(encoder: torch.nn.Module, unet: torch.nn.Module, number: int) -> torch.Tensor:
    ids, x, target = sample(number)
    found = unet(x, torch.tensor([500]), encoder(ids)[0]).sample
    return (found - target).square().mean()


def equal_to_one_process(rank: int, folder: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    encoder, unet = stand_in.text_encoder(), stand_in.unet()
    torch.manual_seed(7)
    network = kohya.create_network(1.0, 4, 2.0, None, encoder, unet, **ARGUMENTS)
    network.apply_to(encoder, unet, True, True)
    params, _ = network.prepare_optimizer_params_with_multiple_te_lrs([0.1], 0.2, 0.1)
    optimiser = torch.optim.SGD(params)
    unet.requires_grad_(False)
    encoder.requires_grad_(False)
    prepared, optimiser = accelerator.prepare(network, optimiser)
    assert isinstance(prepared, DistributedDataParallel)
    own = accelerator.unwrap_model(prepared)
    own.prepare_grad_etc(encoder, unet)
    own.on_epoch_start(encoder, unet)
    for step in range(2):
        accelerator.backward(loss_of(encoder, unet, 2 * step + rank))
        for parameter in own.parameters():
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, reduction="mean")
        accelerator.clip_grad_norm_(own.get_trainable_params(), 1e9)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    state = {key: t.clone() for key, t in own.state_dict().items()}
    accelerator.save_state(str(folder / "state"))
    if accelerator.is_main_process:
        own.save_weights(str(folder / "adapter.safetensors"), None, {})
    accelerator.wait_for_everyone()
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.zero_()
    accelerator.load_state(str(folder / "state"))
    assert all(torch.equal(t, state[key]) for key, t in own.state_dict().items())

    alone_encoder, alone_unet = stand_in.text_encoder(), stand_in.unet()
    torch.manual_seed(7)
    alone = kohya.create_network(1.0, 4, 2.0, None, alone_encoder, alone_unet, **ARGUMENTS)
    alone.apply_to(alone_encoder, alone_unet)
    groups, _ = alone.prepare_optimizer_params_with_multiple_te_lrs([0.1], 0.2, 0.1)
    single = torch.optim.SGD(groups)
    for step in range(2):
        losses = [loss_of(alone_encoder, alone_unet, 2 * step + other) for other in range(2)]
        torch.stack(losses).mean().backward()
        single.step()
        single.zero_grad(set_to_none=True)
    want = alone.state_dict()
    for key, t in state.items():
        torch.testing.assert_close(t, want[key], rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow
def test_equal_to_one_process(run_on_two: Callable[..., None]) -> None:
    run_on_two(equal_to_one_process)
