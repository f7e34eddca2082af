"""nerine.kohya on denoisers that are transformers: the arguments of sd-scripts' networks for Flux, SD3 and Lumina."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nerine import kohya
from nerine.errors import OptionError

WIDTH = 12


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        y: Tensor = self.proj((q @ k.mT).softmax(-1) @ v)
        return y


class Modulation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_mod", Modulation())
            self.add_module(f"{stream}_attn", Attention())
            self.add_module(f"{stream}_mlp", nn.Sequential(nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        for stream in ("img", "txt"):
            x = x + self.get_submodule(f"{stream}_attn")(x + self.get_submodule(f"{stream}_mod").lin(x))
            x = x + self.get_submodule(f"{stream}_mlp")(x)
        return x


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(WIDTH, 3 * WIDTH + 20), nn.Linear(WIDTH + 20, WIDTH)
        self.modulation = Modulation()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, h = self.linear1(x + self.modulation.lin(x)).split([WIDTH, WIDTH, WIDTH, 20], -1)
        y: Tensor = x + self.linear2(torch.cat([(q @ k.mT).softmax(-1) @ v, h.tanh()], -1))
        return y


class Flux(nn.Module):
    """The names of Flux's layers, in a model that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.img_in, self.txt_in = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.double_blocks = nn.ModuleList([Double() for _ in range(3)])
        self.single_blocks = nn.ModuleList([Single() for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.img_in(x)
        for block in (*self.double_blocks, *self.single_blocks):
            x = block(x)
        return x


def flux() -> Flux:
    torch.manual_seed(0)
    return Flux().requires_grad_(False)


def ranks(**given: Any) -> dict[str, int]:
    network = kohya.create_network(1.0, 4, 2.0, None, None, flux(), **given)
    return {lora.lora_name.removeprefix("lora_unet_"): lora.lora_dim for lora in network.loras}


def stirred(network: Any) -> Any:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return network


def test_ranks_by_the_kind_of_layer() -> None:
    found = ranks(img_attn_dim="8", txt_mlp_dim="0", single_dim="6", single_mod_dim="2", img_mod_dim="3")
    assert found["double_blocks_0_img_attn_qkv"] == 8
    assert found["double_blocks_0_txt_attn_qkv"] == 4
    assert not any("txt_mlp" in name for name in found)
    assert found["single_blocks_1_linear1"] == found["single_blocks_1_linear2"] == 6
    assert found["single_blocks_1_modulation_lin"] == 2
    assert found["double_blocks_2_img_mod_lin"] == 3


def test_blocks_by_kind_and_number() -> None:
    assert all("single" in name for name in ranks(train_blocks="single"))
    chosen = ranks(train_double_block_indices="0,2", train_single_block_indices="1-2")
    assert {name.split("_")[2] for name in chosen if "double" in name} == {"0", "2"}
    assert {name.split("_")[2] for name in chosen if "single" in name} == {"1", "2"}
    assert not any("double" in name for name in ranks(train_double_block_indices="none"))
    assert any("double_blocks_2" in name for name in ranks(train_double_block_indices="all"))


def test_layers_before_the_blocks_are_asked_for() -> None:
    assert "img_in" not in ranks()
    found = ranks(in_dims="[5,0,0,0,3]")
    assert (found["img_in"], found["txt_in"]) == (5, 3)
    with pytest.raises(OptionError, match="in_dims: expected 5 ranks"):
        ranks(in_dims="5")


@pytest.mark.parametrize("algo", ["lora", "locon"])
def test_split_projections_are_one_layer_in_the_file(tmp_path: Path, algo: str) -> None:
    file = tmp_path / "x.safetensors"
    model = flux()
    network = kohya.create_network(1.0, 4, 2.0, None, None, model, algo=algo, split_qkv="True")
    network.apply_to(None, model)
    names = [lora.lora_name for lora in network.loras if "single_blocks_0_linear1" in lora.lora_name]
    assert names == [f"lora_unet_single_blocks_0_linear1[{a}:{b}]" for a, b in ((0, 12), (12, 24), (24, 36), (36, 56))]
    stirred(network)
    x = torch.randn(2, 5, WIDTH)
    want = model(x)
    network.save_weights(file, torch.float32, {})
    state = load_file(file)
    assert not any("[" in key for key in state)
    assert state["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape == (12, WIDTH)

    whole = flux()
    plain, _ = kohya.create_network_from_weights(1.0, file, None, None, whole, for_inference=True)
    plain.apply_to(None, whole)
    torch.testing.assert_close(whole(x), want, rtol=0, atol=1e-5)

    again = flux()
    resumed = kohya.create_network(1.0, 4, 2.0, None, None, again, algo=algo, split_qkv="True")
    resumed.apply_to(None, again)
    assert resumed.load_weights(file) == {}
    torch.testing.assert_close(again(x), want, rtol=0, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), network.parameters(), strict=True))


def test_splitting_is_for_lora() -> None:
    with pytest.raises(OptionError, match=r"split_qkv.*lokr"):
        ranks(algo="lokr", split_qkv="True")


def test_the_calls_of_the_inference_scripts(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    model = flux()
    network = kohya.create_network(1.0, 4, 2.0, None, None, model, algo="lokr", factor="4", dora_wd="True")
    network.apply_to(None, model)
    stirred(network)
    x = torch.randn(2, 5, WIDTH)
    want = model(x)
    network.save_weights(str(file), None, {"ss_base_model_version": "flux1"})
    tensors = load_file(file)
    ways: list[Any] = [
        lambda n, m, sd: n.merge_to([None, None], m, sd),
        lambda n, m, sd: n.merge_to(None, m, sd, torch.float32, "cpu"),
        lambda n, m, sd: n.merge_to(None, m, sd, device="cpu", non_blocking=True),
        lambda n, m, sd: n.merge_to(None, m, sd, dtype=None, device="cpu"),
        lambda n, m, sd: n.apply_to([None, None], m),
    ]
    for way in ways:
        fresh = flux()
        module, sd = kohya.create_network_from_weights(1.0, None, None, [None, None], fresh, tensors, True)
        assert module.is_mergeable()
        way(module, fresh, sd)
        torch.testing.assert_close(fresh(x), want, rtol=0, atol=1e-5)
    half = flux()
    module, sd = kohya.create_network_from_weights(0.5, None, None, None, half, weights_sd=tensors)
    module.merge_to(None, half, sd)
    assert not torch.allclose(half(x), want, atol=1e-3)  # the multiplier counts
