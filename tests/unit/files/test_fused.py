"""One model in two implementations, one with a fused qkv and one without: adapters go both ways unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nerine
from nerine import BOFT, IA3, DiagOFT, DoRA, FormatError, Full, GLoRA, LoHa, LoKr, LoRA, OFTv2
from nerine.files.names import Alias, aliases, renamed
from nerine.files.store import open_file
from nerine.tools import convert

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'nerine[train]'")

pytestmark = pytest.mark.no_device_guard


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=6,
        guidance_embeds=True,
        axes_dims_rope=(2, 1, 1),
    )


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=8,
        pooled_projection_dim=6,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


MODELS = {"flux": flux, "sd3": sd3}


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    weights = ((path, getattr(module, "weight", None)) for path, module in model.named_modules())
    return {path: tuple(w.shape) for path, w in weights if isinstance(w, Tensor)}


def linear_names(model: nn.Module) -> list[Alias]:
    """The native names of the linear layers."""
    shapes = shapes_of(model)
    return [alias for alias in aliases(shapes)["native"] if len(shapes[alias.own]) == 2]


def split_model(name: str) -> nn.Module:
    """The one with diffusers' names."""
    torch.manual_seed(4)
    model: nn.Module = MODELS[name]().double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, dtype=torch.float64))
    return model


def put(root: nn.Module, path: str, layer: nn.Module) -> None:
    *above, last = path.split(".")
    for word in above:
        if word not in root._modules:
            root.add_module(word, nn.Module())
        root = root._modules[word]  # type: ignore[assignment]
    root.add_module(last, layer)


def fused_model(name: str) -> nn.Module:
    """The same weights under native names: its linear layers alone."""
    source = split_model(name)
    root = nn.Module()
    for path, shape in renamed(shapes_of(source), linear_names(source)).items():
        put(root, path, nn.Linear(shape[1], shape[0], dtype=torch.float64))
    with torch.no_grad():
        for alias in linear_names(source):
            own, there = source.get_submodule(alias.own), root.get_submodule(alias.name)
            rows, place = slice(*(alias.own_rows or (None,))), slice(*(alias.rows or (None,)))
            there.weight[place] = own.weight[rows]
            there.bias[place] = own.bias[rows]
    return root


def merged(model: nn.Module) -> dict[str, Tensor]:
    nerine.Network.of(model).merge()
    return {k: t.detach() for k, t in model.state_dict().items() if ".nerine" not in k}


def stirred(network: nerine.Network) -> nerine.Network:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return network


def assert_same(split: nn.Module, fused: nn.Module, name: str) -> None:
    """Merged, both have the same weights, and they have moved."""
    base = fused_model(name).state_dict()
    ours, theirs = merged(split), merged(fused)
    moved = 0
    for alias in linear_names(split_model(name)):
        rows, place = slice(*(alias.own_rows or (None,))), slice(*(alias.rows or (None,)))
        got, want = theirs[f"{alias.name}.weight"][place], ours[f"{alias.own}.weight"][rows]
        assert torch.allclose(got, want, rtol=1e-6, atol=1e-6), alias
        moved += not torch.equal(got, base[f"{alias.name}.weight"][place])
    assert moved > 4


FROM_SPLIT: dict[str, Any] = {"LoRA": LoRA(rank=2, alpha=3), "DoRA": DoRA(LoRA(rank=2, alpha=3)), "Full": Full()}
FROM_FUSED: dict[str, Any] = {
    **FROM_SPLIT,
    "LoHa": LoHa(rank=2, alpha=3),
    "GLoRA": GLoRA(rank=2, alpha=3),
    "IA3": IA3(),
    "IA3 on inputs": IA3(on_input=True),
    "LoKr": LoKr(rank=1, alpha=3, factor=3),
    "Diag-OFT": DiagOFT(block_size=4),
    "OFT": OFTv2(block_size=4),
}


@pytest.mark.parametrize("dialect", ["kohya", "comfy"])
@pytest.mark.parametrize("algorithm", FROM_SPLIT)
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_from_split_to_fused(name: str, algorithm: str, dialect: str, tmp_path: Path) -> None:
    split, fused = split_model(name), fused_model(name)
    stirred(nerine.attach(split, FROM_SPLIT[algorithm], targets=[nn.Linear]))
    nerine.save(nerine.Network.of(split), tmp_path / "a.safetensors", dialect=dialect)
    network = nerine.load(fused, tmp_path / "a.safetensors")
    assert network.report.unmatched == {}
    assert_same(split, fused, name)


@pytest.mark.parametrize("algorithm", FROM_FUSED)
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_from_fused_to_split(name: str, algorithm: str, tmp_path: Path) -> None:
    """The reader of the model that has it in pieces takes what it needs of each."""
    split, fused = split_model(name), fused_model(name)
    targets = "qkv" if algorithm == "LoKr" else "all"  # whose pieces are whole blocks of it
    stirred(nerine.attach(fused, FROM_FUSED[algorithm], targets=targets))
    nerine.save(nerine.Network.of(fused), tmp_path / "a.safetensors", dialect="kohya")
    network = nerine.load(split, tmp_path / "a.safetensors")
    assert network.report.unmatched == {}
    assert_same(split, fused, name)


def test_a_file_of_the_split_model_for_the_fused_one(tmp_path: Path) -> None:
    """Names of diffusers are read by a model with native ones: adapters on some rows of its layers."""
    split, fused = split_model("flux"), fused_model("flux")
    stirred(nerine.attach(split, LoRA(rank=2, alpha=3), targets=[nn.Linear]))
    nerine.save(nerine.Network.of(split), tmp_path / "a.safetensors", dialect="diffusers")
    network = nerine.load(fused, tmp_path / "a.safetensors")
    assert "double_blocks.0.img_attn.qkv[8:16]" in {row.layer for row in network.report.rows}
    assert_same(split, fused, "flux")


def test_and_its_adapters_on_some_rows_are_written_as_layers_again(tmp_path: Path) -> None:
    split, fused = split_model("flux"), fused_model("flux")
    stirred(nerine.attach(split, LoRA(rank=2, alpha=3), targets=[nn.Linear]))
    for file, of in (("a", split), ("b", fused)):
        nerine.save(nerine.Network.of(of), tmp_path / f"{file}.safetensors", dialect="diffusers")
        if file == "a":
            nerine.load(fused, tmp_path / "a.safetensors")
    again = split_model("flux")
    nerine.load(again, tmp_path / "b.safetensors", strict=True)
    assert_same(again, fused, "flux")


def test_from_file_to_file_without_a_model(tmp_path: Path) -> None:
    split, fused = split_model("flux"), fused_model("flux")
    stirred(nerine.attach(fused, LoRA(rank=2, alpha=3)))
    nerine.save(nerine.Network.of(fused), tmp_path / "a.safetensors", dialect="kohya")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", dialect="diffusers")
    nerine.load(split, tmp_path / "b.safetensors", strict=True)
    assert_same(split, fused, "flux")


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        (BOFT(block_size=4), "turns all rows together"),
        (DiagOFT(block_size=4, constraint=0.01), "the constraint of Diag-OFT is one of all blocks"),
        (DoRA(LoRA(rank=2), axis="in"), "a DoRA norm over input channels is one of all rows"),
        (LoKr(rank=1, factor=2), "cut through the blocks of"),
    ],
    ids=str,
)
def test_what_cannot_be_taken_apart_is_refused(algorithm: Any, words: str, tmp_path: Path) -> None:
    fused = fused_model("flux")
    stirred(nerine.attach(fused, algorithm, targets="img_attn.qkv"))
    nerine.save(nerine.Network.of(fused), tmp_path / "a.safetensors", dialect="kohya")
    split = split_model("flux")
    with pytest.raises(FormatError, match=words):
        nerine.load(split, tmp_path / "a.safetensors")
    assert all("forward" not in m.__dict__ for m in split.modules())


def test_what_cannot_be_put_together_is_refused(tmp_path: Path) -> None:
    split = split_model("flux")
    network = nerine.attach(split, LoHa(rank=2), targets="attn.to_q")
    with pytest.raises(FormatError, match="only low-rank adapters can be put together exactly"):
        nerine.save(network, tmp_path / "a.safetensors", dialect="kohya")
    assert not (tmp_path / "a.safetensors").exists()


# -- the UNets of Stable Diffusion -----------------------------------------------------------------------------------
def unet(depth: int) -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=depth,
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )


@pytest.mark.parametrize(
    ("depth", "dialect", "start"),
    [
        (1, "kohya", "lora_unet_down_blocks_1_attentions_0_"),
        (2, "kohya", "lora_unet_input_blocks_3_1_"),
        (1, "comfy", "diffusion_model.input_blocks.3.1."),
        (2, "diffusers", "unet.down_blocks.1.attentions.0."),
        (2, "onetrainer", "lora_unet_down_blocks_1_attentions_0_"),
        (2, "lycoris", "lycoris_down_blocks_1_attentions_0_"),
    ],
)
def test_whose_names_a_unet_gets(depth: int, dialect: str, start: str, tmp_path: Path) -> None:
    """SDXL, which is known by its deep transformers, has native names in files of sd-scripts, the others have not."""
    model = unet(depth)
    network = nerine.attach(model, LoRA(rank=2, alpha=3))
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p))
    report = nerine.save(network, tmp_path / "a.safetensors", dialect=dialect)
    with open_file(tmp_path / "a.safetensors") as source:
        assert any(key.startswith(f"{start}transformer_blocks") for key in source.keys)
    again = unet(depth)
    loaded = nerine.load(again, tmp_path / "a.safetensors", strict=True)
    assert len(loaded.report.rows) == report.layers
    network.merge()
    loaded.merge()
    assert all(
        torch.allclose(t, model.state_dict()[k], atol=1e-6) for k, t in again.state_dict().items() if "nerine" not in k
    )
