"""Regional prompts: each network acts in its region and on its sub-prompt, as gen_img.py of sd-scripts means it.

The layers are those of one cross-attention, whose output is worked out by hand beside. Against sd-scripts' own network
on a whole UNet: tests/peers/test_sd_scripts.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nerine import kohya

PROMPTS, WIDTH, TOKENS = 2, 6, 16  # sub-prompts; channels; positions of a 4x4 picture
MULTIPLIERS = (0.9, 0.6)


class Attention(nn.Module):
    """The projections of a cross-attention, under the names by which regions tell them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(WIDTH, 8), nn.Linear(5, 8)
        self.to_out = nn.ModuleList([nn.Linear(8, WIDTH)])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn2, self.ff = Attention(), nn.Linear(WIDTH, WIDTH)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])


@pytest.fixture
def made() -> tuple[Denoiser, list[Any], list[Tensor]]:
    """A denoiser, two networks on it in their regions, and their masks by position."""
    torch.manual_seed(0)
    model = Denoiser()
    networks, masks, shared = [], [], {}
    for i in range(PROMPTS):
        network = kohya.create_network(1.0, 2, 1.0, None, None, model, algo="lokr" if i else "lora", factor="2")
        network.apply_to(None, model)
        network.eval()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.3)
        mask = torch.zeros(32, 32)
        mask[:, 16 * i : 16 * (i + 1)] = 1 - 0.25 * i
        network.set_region(i, i == PROMPTS - 1, mask)
        network.set_multiplier(MULTIPLIERS[i])
        network.set_current_generation(1, PROMPTS, 32, 32, shared)
        networks.append(network)
        small = nn.functional.interpolate(mask[None, None], (4, 4), mode="bilinear")
        masks.append(small.reshape(1, TOKENS, 1))
    return model, networks, masks


def change(network: Any, layer: nn.Module, x: Tensor) -> Tensor:
    """What a network adds to a layer's output."""
    lora = next(lora for lora in network.loras if lora.org_module[0] is layer)
    return x @ lora.get_diff_weight(lora.multiplier)[0].T


def plain(layer: nn.Module, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def test_a_layer_of_the_picture_is_changed_within_the_masks(made: Any) -> None:
    model, networks, masks = made
    layer, x = model.blocks[0].ff, torch.randn(2, TOKENS, WIDTH)
    want = plain(layer, x) + sum(change(n, layer, x) * m for n, m in zip(networks, masks, strict=True))
    torch.testing.assert_close(layer(x), want)


def test_each_network_changes_the_keys_of_its_own_sub_prompt(made: Any) -> None:
    model, networks, _ = made
    layer, text = model.blocks[0].attn2.to_k, torch.randn(1 + PROMPTS, 7, 5)
    want = plain(layer, text)
    for i, network in enumerate(networks):
        want[1 + i] += change(network, layer, text[1 + i])
    torch.testing.assert_close(layer(text), want)
    assert torch.equal(layer(text[:1]), plain(layer, text[:1]))  # the unconditional prompt


def test_queries_are_repeated_for_every_sub_prompt(made: Any) -> None:
    model, networks, masks = made
    layer, x = model.blocks[0].attn2.to_q, torch.randn(2, TOKENS, WIDTH)
    once = plain(layer, x) + sum(change(n, layer, x) * m for n, m in zip(networks, masks, strict=True))
    torch.testing.assert_close(layer(x), once[[0, *[1] * PROMPTS]])


def test_the_outputs_of_the_sub_prompts_become_one_picture(made: Any) -> None:
    model, networks, masks = made
    layer, x = model.blocks[0].attn2.to_out[0], torch.randn(1 + PROMPTS, TOKENS, 8)
    y, total = plain(layer, x), sum(masks) + 1e-4
    picture = sum(y[1 + i] * mask / total for i, mask in enumerate(masks))
    picture = picture + sum(change(n, layer, x[1 + i]) * masks[i] for i, n in enumerate(networks))
    torch.testing.assert_close(layer(x), torch.cat([y[:1], picture.reshape(1, TOKENS, WIDTH)]))


def test_leaving_the_regions_gives_the_model_back(made: Any) -> None:
    model, networks, _ = made
    layer, x = model.blocks[0].ff, torch.randn(2, TOKENS, WIDTH)
    for network in networks:
        network.restore()
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert "forward" not in layer.__dict__
