"""Files between nerine and diffusers itself, on a whole (tiny) pipeline: what diffusers fuses is what nerine merges."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nerine
from nerine import IA3, DoRA, FormatError, LoHa, LoKr, LoRA, Rule, TLoRA
from peers.stirred import stir

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'nerine[train]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'nerine[train]'")
peft = pytest.importorskip("peft", reason="needs peft: pip install 'nerine[peers]'")

pytestmark = [
    pytest.mark.peers,
    pytest.mark.no_device_guard,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Already unmerged"),
    pytest.mark.filterwarnings("ignore:The following alpha_pattern keys"),
]
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    names = ("diffusers", "transformers", "peft")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


def unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def encoder() -> Any:
    torch.manual_seed(1)
    config = transformers.CLIPTextConfig(
        hidden_size=12,
        intermediate_size=20,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=50,
        max_position_embeddings=10,
        projection_dim=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    return transformers.CLIPTextModel(config)


def pipeline() -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        text_encoder=encoder(),
        tokenizer=None,
        unet=unet(),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        key.replace(".base_layer", ""): t.detach().clone()
        for key, t in model.state_dict().items()
        if ".nerine" not in f".{key}" and "lora_" not in key
    }


def compare(got: nn.Module, want: nn.Module, base: nn.Module, moved: int) -> None:
    ours, theirs, before = weights_of(want), weights_of(got), weights_of(base)
    assert before.keys() == ours.keys() == theirs.keys()
    seen = 0
    for key, start in before.items():
        size = float((ours[key] - start).abs().max())
        seen += size > 0
        assert float((theirs[key] - ours[key]).abs().max()) <= TOLERANCE * max(size, 1e-3), key
    assert seen >= moved


SENT: dict[str, Any] = {
    "LoRA": LoRA(rank=2, alpha=3),
    "LoRA, Tucker": LoRA(rank=2, alpha=3, tucker=True),
    "T-LoRA": TLoRA(rank=2, alpha=3),
    "DoRA": DoRA(LoRA(rank=2, alpha=3)),
    "LoRA of two ranks": [Rule("attn1", LoRA(rank=3, alpha=2)), Rule("*", LoRA(rank=2, alpha=1))],
}


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
@pytest.mark.parametrize("case", SENT)
def test_a_pipeline_reads_what_nerine_wrote(case: str, dialect: str, tmp_path: Path) -> None:
    if dialect == "kohya" and case != "LoRA":
        pytest.skip("diffusers takes less from files with these names, as the save report says")
    pipe, own = pipeline(), unet()
    network = nerine.attach(own, SENT[case])
    stir(network.parameters())
    report = nerine.save(network, tmp_path / "a.safetensors", dialect=dialect)
    (row,) = (row for row in report.readers if row.reader == "diffusers")
    assert row.exactly == report.layers
    pipe.load_lora_weights(tmp_path, weight_name="a.safetensors")
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    network.merge()
    compare(pipe.unet, own, unet(), moved=report.layers)


def test_the_deviation_that_is_foretold_for_unequal_alphas(tmp_path: Path) -> None:
    """diffusers loses all alphas of a kohya file but the most frequent one, with a warning of PEFT's."""
    pipe, own = pipeline(), unet()
    network = nerine.attach(own, SENT["LoRA of two ranks"])
    stir(network.parameters())
    report = nerine.save(network, tmp_path / "a.safetensors", dialect="kohya")
    (row,) = (row for row in report.readers if row.reader == "diffusers")
    assert (row.approximately, row.worst, row.better) == (16, 0.5, "diffusers")
    pipe.load_lora_weights(tmp_path, weight_name="a.safetensors")
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    network.merge()
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    got, want, base = (weights_of(model)[path] for model in (pipe.unet, own, unet()))
    assert float((got - want).norm() / (want - base).norm()) == pytest.approx(row.worst, rel=1e-3)


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_and_its_text_encoder(dialect: str, tmp_path: Path) -> None:
    """In files the layers stand below `text_model`, whether this version of transformers has that level or not."""
    pipe, own = pipeline(), encoder()
    network = nerine.attach(own, LoRA(rank=2, alpha=3), targets=["self_attn", "mlp"])
    stir(network.parameters())
    report = nerine.save(network, tmp_path / "a.safetensors", dialect=dialect)
    pipe.load_lora_weights(tmp_path, weight_name="a.safetensors")
    pipe.fuse_lora(components=["text_encoder"])
    pipe.unload_lora_weights()
    network.merge()
    compare(pipe.text_encoder, own, encoder(), moved=report.layers)


@pytest.mark.parametrize("use_dora", [False, True])
def test_nerine_reads_what_a_pipeline_wrote(use_dora: bool, tmp_path: Path) -> None:
    pipe = pipeline()
    targets = ["to_q", "to_k", "conv1", "to_out.0"]
    config = peft.LoraConfig(
        r=2,
        lora_alpha=5,
        target_modules=targets,
        use_dora=use_dora,
        rank_pattern={"to_q": 3},
        alpha_pattern={"to_k": 1},
    )
    pipe.unet.add_adapter(config)
    stir(p for p in pipe.unet.parameters() if p.requires_grad)
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers

    pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(pipe.unet)),
        **_collate_lora_metadata({"unet": pipe.unet}),
    )
    own = unet()
    network = nerine.load(own, tmp_path / "pytorch_lora_weights.safetensors", strict=True)
    assert network.report.dialect == "diffusers"
    network.merge()
    pipe.unet.fuse_lora()
    compare(pipe.unet, own, unet(), moved=len(network.report.rows))


@pytest.mark.parametrize("algorithm", [LoHa(rank=2), LoKr(rank=2), IA3(), DoRA(LoRA(rank=2), axis="in")], ids=str)
def test_what_diffusers_cannot_hold_is_refused_with_those_who_can(algorithm: Any, tmp_path: Path) -> None:
    network = nerine.attach(unet(), algorithm, targets="attn1")
    with pytest.raises(FormatError, match=r"the diffusers dialect cannot hold .* dialects that can: lycoris, kohya"):
        nerine.save(network, tmp_path / "a.safetensors", dialect="diffusers")
    assert list(tmp_path.iterdir()) == []
