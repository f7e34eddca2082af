"""The presets of LyCORIS: by structure the same layers are chosen, but for differences that are listed here.

Theirs are lists of class names, so that small models with those names and the same trees show what they choose.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from nerine import TargetError
from nerine.model.presets import select
from target_models import denoiser, language

kohya = pytest.importorskip("lycoris.kohya")
config = pytest.importorskip("lycoris.config")

pytestmark = pytest.mark.peers
PRESETS = ("full", "full-lin", "attn-mlp", "attn-only", "unet-only", "unet-transformer-only", "unet-convblock-only")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """A preset of theirs is state of a class, and stays."""
    owner = kohya.LycorisNetworkKohya
    before = {key: value for key, value in vars(owner).items() if key.isupper()}
    yield
    for key, value in before.items():
        setattr(owner, key, value)


def theirs(model: nn.Module, preset: str, component: str = "denoiser", leave_out: tuple[str, ...] = ()) -> set[str]:
    """What they choose; `leave_out` are classes without which they do not stop at a layer met twice."""
    settings = {key: value for key, value in config.PRESET[preset].items() if value is not None}
    key = "unet_target_module"
    settings[key] = [name for name in settings[key] if name not in leave_out]
    kohya.LycorisNetworkKohya.apply_preset(settings)
    parts: dict[str, Any] = {"text_encoder": None, "unet": model}
    if component == "text_encoder":
        parts = {"text_encoder": model, "unet": nn.Module()}
    with torch.device("meta"):
        network = kohya.LycorisNetworkKohya(
            **parts,
            lora_dim=2,
            conv_lora_dim=2 if settings["enable_conv"] else 0,
            conv_alpha=1,
            network_module="locon",
            warn_on_unmatched=False,
        )
    found = {id(lora.org_module[0]) for lora in (*network.unet_loras, *network.text_encoder_loras)}
    return {path for path, module in model.named_modules() if id(module) in found}


def ours(model: nn.Module, preset: str) -> set[str]:
    try:
        return set(select(model, preset))
    except TargetError:
        return set()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["Stable Diffusion 1", "Stable Diffusion 2", "SDXL"])
def test_a_unet_of_diffusers(name: str, preset: str) -> None:
    """Their list has TimestepEmbedding for another model: with it they stop at time_embedding, which they also name,
    and take the embedders of SDXL. `CrossAttention` and `SelfAttention` are no classes of diffusers."""
    model = denoiser(name)
    if preset.startswith("full"):
        with pytest.raises(AssertionError, match="duplicated lora name"):
            theirs(model, preset)
    found = theirs(model, preset, leave_out=("TimestepEmbedding",))
    if preset == "attn-only":
        assert not found
        assert ours(model, preset)
    else:
        assert ours(model, preset) == found


@pytest.mark.parametrize("preset", ["full", "full-lin", "attn-mlp", "unet-only", "unet-transformer-only"])
@pytest.mark.parametrize("name", ["Qwen-Image", "HunyuanVideo", "Z-Image"])
def test_transformers_of_diffusers_that_they_list(name: str, preset: str) -> None:
    """Beside blocks they take what has the class name of an embedder or a last layer of another model."""
    model = denoiser(name)
    found = theirs(model, preset)
    strangers = {path for path in found if any(word in path for word in ("embed", "final_layer"))}
    assert ours(model, preset) == found - strangers


@pytest.mark.parametrize("preset", ["full", "full-lin", "attn-mlp", "attn-only", "unet-only"])
@pytest.mark.parametrize("name", ["CLIP text", "CLIP text, with projection", "BERT", "Gemma 2", "Qwen 3"])
def test_text_encoders(name: str, preset: str) -> None:
    """`attn-only` of theirs lacks Qwen 3."""
    model = language(name)
    found = theirs(model, preset, "text_encoder")
    if (name, preset) == ("Qwen 3", "attn-only"):
        assert not found
        assert len(ours(model, preset)) == 8
    else:
        assert ours(model, preset) == found


class Tree(nn.Module):
    def __init__(self, /, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def kind(name: str) -> type[Tree]:
    return type(name, (Tree,), {})


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))


def norms() -> nn.Module:
    return Tree(query_norm=nn.LayerNorm(4), key_norm=nn.LayerNorm(4))


def attention() -> nn.Module:
    return kind("SelfAttention")(qkv=nn.Linear(8, 24), norm=norms(), proj=nn.Linear(8, 8))


def last(name: str) -> nn.Module:
    adaptive = nn.Sequential(nn.SiLU(), nn.Linear(8, 16))
    return kind(name)(norm_final=nn.Identity(), linear=nn.Linear(8, 3), adaLN_modulation=adaptive)


def embedder() -> nn.Module:
    return kind("MLPEmbedder")(in_layer=nn.Linear(4, 8), silu=nn.SiLU(), out_layer=nn.Linear(8, 8))


def flux() -> nn.Module:
    def modulation(width: int) -> nn.Module:
        return kind("Modulation")(lin=nn.Linear(8, width))

    double = [
        kind("DoubleStreamBlock")(
            img_mod=modulation(48), img_attn=attention(), img_mlp=mlp(), txt_attn=attention(), txt_mlp=mlp()
        )
        for _ in range(2)
    ]
    single = [
        kind("SingleStreamBlock")(
            linear1=nn.Linear(8, 56), linear2=nn.Linear(32, 8), norm=norms(), modulation=modulation(24)
        )
        for _ in range(2)
    ]
    return Tree(
        img_in=nn.Linear(3, 8),
        time_in=embedder(),
        double_blocks=nn.ModuleList(double),
        single_blocks=nn.ModuleList(single),
        final_layer=last("LastLayer"),
    )


def chroma() -> nn.Module:
    model = flux()
    layers = nn.ModuleList([embedder() for _ in range(3)])
    model.add_module("distilled_guidance_layer", Tree(in_proj=nn.Linear(4, 8), layers=layers))
    return model


def lumina() -> nn.Module:
    def block() -> nn.Module:
        feed = Tree(w1=nn.Linear(8, 24), w2=nn.Linear(24, 8), w3=nn.Linear(8, 24))
        attn = kind("JointAttention")(qkv=nn.Linear(8, 16), out=nn.Linear(8, 8), q_norm=nn.LayerNorm(4))
        adaptive = nn.Sequential(nn.SiLU(), nn.Linear(8, 32))
        return kind("JointTransformerBlock")(attention=attn, feed_forward=feed, adaLN_modulation=adaptive)

    return Tree(
        x_embedder=nn.Linear(3, 8),
        noise_refiner=nn.ModuleList([block()]),
        t_embedder=Tree(mlp=mlp()),
        layers=nn.ModuleList([block(), block()]),
        final_layer=last("FinalLayer"),
    )


def hunyuan() -> nn.Module:
    def linear(**shapes: tuple[int, int]) -> dict[str, nn.Module]:
        return {name: nn.Linear(*shape) for name, shape in shapes.items()}

    double = kind("MMDoubleStreamBlock")(
        **linear(img_attn_qkv=(8, 24), img_attn_proj=(8, 8)),
        img_mod=Tree(linear=nn.Linear(8, 48)),
        img_attn_q_norm=nn.LayerNorm(4),
        img_mlp=Tree(**linear(fc1=(8, 24), fc2=(24, 8))),
    )
    single = kind("MMSingleStreamBlock")(
        **linear(linear1=(8, 48), linear2=(32, 8)), q_norm=nn.LayerNorm(4), k_norm=nn.LayerNorm(4)
    )
    refiner = kind("IndividualTokenRefinerBlock")(self_attn_qkv=nn.Linear(8, 24), self_attn_proj=nn.Linear(8, 8))
    return Tree(
        txt_in=Tree(individual_token_refiner=Tree(blocks=nn.ModuleList([refiner]))),
        double_blocks=nn.ModuleList([double]),
        single_blocks=nn.ModuleList([single]),
        final_layer=last("FinalLayer"),
    )


def sdxl() -> nn.Module:
    def cross() -> nn.Module:
        parts = {name: nn.Linear(8, 8) for name in ("to_q", "to_k", "to_v")}
        return kind("CrossAttention")(**parts, to_out=nn.ModuleList([nn.Linear(8, 8)]))

    def resnet() -> nn.Module:
        emb = nn.Sequential(nn.SiLU(), nn.Linear(8, 8))
        into = nn.Sequential(nn.GroupNorm(1, 8), nn.SiLU(), nn.Conv2d(8, 8, 3))
        return kind("ResnetBlock2D")(in_layers=into, emb_layers=emb, skip_connection=nn.Conv2d(8, 8, 1))

    def spatial() -> nn.Module:
        ff = Tree(net=nn.ModuleList([Tree(proj=nn.Linear(8, 48)), nn.Identity(), nn.Linear(24, 8)]))
        block = kind("BasicTransformerBlock")(attn1=cross(), attn2=cross(), ff=ff)
        blocks = nn.ModuleList([block])
        return kind("Transformer2DModel")(proj_in=nn.Linear(8, 8), transformer_blocks=blocks, proj_out=nn.Linear(8, 8))

    steps = [
        nn.Sequential(nn.Conv2d(3, 8, 3)),
        nn.Sequential(resnet()),
        nn.Sequential(kind("Downsample2D")(op=nn.Conv2d(8, 8, 3))),
        nn.Sequential(resnet(), spatial()),
    ]
    up = [nn.Sequential(resnet(), spatial(), kind("Upsample2D")(conv=nn.Conv2d(8, 8, 3)))]
    return Tree(
        time_embed=mlp(),
        label_emb=nn.Sequential(mlp()),
        input_blocks=nn.ModuleList(steps),
        middle_block=nn.ModuleList([resnet(), spatial(), resnet()]),
        output_blocks=nn.ModuleList(up),
        out=nn.ModuleList([nn.GroupNorm(1, 8), nn.SiLU(), nn.Conv2d(8, 3, 3)]),
    )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("build", [flux, chroma, lumina, hunyuan, sdxl], ids=lambda build: build.__name__)
def test_models_of_sd_scripts(build: Any, preset: str) -> None:
    """They take the last layer of Lumina and HunyuanImage by the name of its class, and that of Flux not. In Lumina and
    HunyuanImage `attn-only` of theirs finds nothing."""
    model = build()
    found = theirs(model, preset)
    if build in (lumina, hunyuan):
        last_layer = {"final_layer.linear", "final_layer.adaLN_modulation.1"}
        assert found >= last_layer or preset in ("attn-only", "unet-convblock-only")
        found -= last_layer
    if preset == "attn-only" and build in (lumina, hunyuan):
        assert not found
        assert {path.rpartition(".")[2] for path in ours(model, preset)} in (
            {"qkv", "out"},
            {"img_attn_qkv", "img_attn_proj"},
        )
    else:
        assert ours(model, preset) == found
        assert found or (preset == "unet-convblock-only" and build is not sdxl)


def test_their_ia3_trains_nothing_in_a_unet_and_ours_does() -> None:
    model = denoiser("Stable Diffusion 1")
    assert not theirs(model, "ia3")
    assert len(ours(model, "ia3")) == 80
