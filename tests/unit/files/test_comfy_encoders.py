"""What text encoders are called in ComfyUI's dialect, and what the report says where ComfyUI will not find them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
from torch import nn

import nerine
from nerine import LoRA


def nested(layers: dict[str, nn.Module]) -> nn.Module:
    root = nn.Module()
    for path, layer in layers.items():
        *above, last = path.split(".")
        at = root
        for name in above:
            if name not in at._modules:
                at.add_module(name, nn.Module())
            at = at._modules[name]  # type: ignore[assignment]
        at.add_module(last, layer)
    return root


def t5(biases: int = 1) -> nn.Module:
    lead = "encoder.block.{}.layer.0.SelfAttention"
    layers: dict[str, nn.Module] = {f"{lead.format(i)}.{n}": nn.Linear(6, 10) for i in range(2) for n in "qkv"}
    layers |= {f"{lead.format(i)}.relative_attention_bias": nn.Embedding(8, 2) for i in range(biases)}
    return nested(layers)


def umt5() -> nn.Module:
    """Every block of which has a bias of its own."""
    return t5(2)


def clip() -> nn.Module:
    lead = "text_model.encoder.layers.0"
    layers: dict[str, nn.Module] = {f"{lead}.self_attn.{n}_proj": nn.Linear(6, 10) for n in "qkv"}
    return nested({**layers, f"{lead}.mlp.fc1": nn.Linear(6, 8)})


def llm() -> nn.Module:
    return nested({f"model.layers.{i}.self_attn.q_proj": nn.Linear(6, 10) for i in range(2)})


@pytest.mark.parametrize(
    ("dialect", "parts", "leads", "unread"),
    [
        ("comfy", [clip, t5], {"text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer."}, 0),
        ("comfy", [umt5], {"text_encoders.umt5xxl.transformer."}, 0),
        ("comfy", [llm], {"text_encoders.clip_l.transformer."}, 2),
        ("kohya", [clip, t5], {"lora_te1_", "lora_te2_"}, 0),
        ("kohya", [umt5], {"lora_te_"}, 6),
        ("kohya", [llm], {"lora_te_"}, 2),
        ("lycoris", [clip], {"lycoris_text_encoder_"}, 4),
    ],
    ids=lambda v: "-".join(f.__name__ for f in v) if isinstance(v, list) else None,
)
def test_names_and_report(
    dialect: str, parts: list[Callable[[], nn.Module]], leads: set[str], unread: int, tmp_path: Path
) -> None:
    pipe = nn.Module()
    for i, part in enumerate(parts):
        setattr(pipe, "text_encoder" if i == 0 else f"text_encoder_{i + 1}", part())
    network = nerine.attach(pipe, LoRA(rank=2, alpha=1.5), targets=["q", "k", "v", "q_proj", "k_proj", "v_proj", "fc1"])
    report = nerine.save(network, tmp_path / "a.safetensors", dialect=dialect)
    network.detach()
    keys = list(safetensors.torch.load_file(tmp_path / "a.safetensors"))
    assert {lead for lead in leads for key in keys if key.startswith(lead)} == leads
    assert all(key.startswith(tuple(leads)) for key in keys)
    (row,) = (row for row in report.readers if row.reader == "ComfyUI")
    assert (row.exactly, row.not_at_all) == (report.layers - unread, unread)
    assert len(nerine.load(pipe, tmp_path / "a.safetensors", strict=True).report.rows) == report.layers
