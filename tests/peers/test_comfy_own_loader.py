"""Files for whole pipelines, read by ComfyUI's own loader: every key is found, or the report has said that it is not.

Needs a checkout: `NERINE_COMFYUI=/path/to/ComfyUI scripts/test tests/peers/test_comfy_own_loader.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import nerine
from nerine import DoRA, GLoRA, LoHa, LoKr, LoRA
from peers.comfy_models import DENOISERS, ENCODERS, MARKS, clip_of, comfyui, inner, model_of, patcher_of
from peers.stirred import stir

pytestmark = MARKS

ALGORITHMS: dict[str, Any] = {
    "LoRA": LoRA(rank=2, alpha=1.5),
    "LoHa": LoHa(rank=2, alpha=1.5),
    "LoKr": LoKr(rank=2, alpha=3),
    "GLoRA": GLoRA(rank=2, alpha=1.5),
    "DoRA": DoRA(LoRA(rank=2, alpha=1.5), axis="in"),
}
UNREAD = {
    ("Wan", "kohya"),
    ("Qwen-Image", "kohya"),
    ("Qwen-Image", "comfy"),
    ("Z-Image", "kohya"),
    ("Z-Image", "comfy"),
}


@pytest.fixture(scope="module")
def comfy() -> Iterator[Any]:
    with comfyui() as found:
        yield found


class Pipe(nn.Module):
    """The parts of a pipeline."""

    def __init__(self, comfy: Any, name: str) -> None:
        super().__init__()
        setattr(self, "unet" if name.startswith("SD1") or name == "SDXL" else "transformer", inner(comfy, name))
        clip = clip_of(comfy, name)
        for i, own in enumerate(ENCODERS[name]):
            setattr(self, "text_encoder" if i == 0 else f"text_encoder_{i + 1}", clip.get_submodule(own).transformer)


def patched(patcher: Any, patches: Any) -> dict[str, Tensor]:
    patcher.add_patches(patches, 1.0)
    return {key: t.clone() for key, t in patcher.patch_model().state_dict().items()}


def wrong(got: dict[str, Tensor], want: dict[str, Tensor], leads: dict[str, str]) -> set[str]:
    """The parts of a pipeline in which a weight is not as wanted; `leads` are their paths in ComfyUI."""
    found = set()
    for key, t in want.items():
        part, _, rest = key.partition(".")
        if part in leads and float((got[f"{leads[part]}.{rest}"] - t).abs().max()) > 1e-5 * max(
            float(t.abs().max()), 1
        ):
            found.add(part)
    return found


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dialect", ["comfy", "kohya"])
@pytest.mark.parametrize("name", DENOISERS)
def test_whole_pipelines(
    comfy: Any, name: str, dialect: str, algorithm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = Pipe(comfy, name)
    network = nerine.attach(pipe, ALGORITHMS[algorithm], targets="full")
    stir(network.parameters())
    report = nerine.save(network, tmp_path / "a.safetensors", dialect=dialect)
    network.merge()
    want = {key: t for key, t in pipe.state_dict().items() if "nerine" not in key}
    model, clip = patcher_of(comfy, model_of(comfy, name)), patcher_of(comfy, clip_of(comfy, name))
    names: dict[str, Any] = {}
    comfy.lora.model_lora_keys_unet(model.model, names)
    comfy.lora.model_lora_keys_clip(clip.model, names)
    with caplog.at_level(logging.WARNING):
        patches = comfy.lora.load_lora(safetensors.torch.load_file(tmp_path / "a.safetensors"), names)
    missed = [r.getMessage() for r in caplog.records if "not loaded" in r.getMessage()]

    denoiser = next(part for part in ("unet", "transformer") if hasattr(pipe, part))
    assert wrong(patched(model, patches), want, {denoiser: "diffusion_model"}) == set()
    encoders = {
        "text_encoder" if i == 0 else f"text_encoder_{i + 1}": f"{own}.transformer"
        for i, own in enumerate(ENCODERS[name])
    }
    unread = {"text_encoder"} if (name, dialect) in UNREAD else set()
    assert wrong(patched(clip, patches), want, encoders) == unread
    assert bool(missed) == bool(unread)
    (row,) = (row for row in report.readers if row.reader == "ComfyUI")
    lost = {message.split(": ")[1].rpartition(".alpha")[0] for message in missed if message.endswith(".alpha")}
    assert (row.exactly, row.approximately, row.not_at_all) == (report.layers - len(lost), 0, len(lost))


def test_a_file_in_comfyuis_names_comes_back(comfy: Any, tmp_path: Path) -> None:
    for name in ("Flux", "Wan"):
        pipe = Pipe(comfy, name)
        network = nerine.attach(pipe, LoRA(rank=2, alpha=1.5), targets="full")
        stir(network.parameters())
        nerine.save(network, tmp_path / "a.safetensors", dialect="comfy")
        network.merge()
        again = Pipe(comfy, name)
        loaded = nerine.load(again, tmp_path / "a.safetensors", strict=True)
        loaded.merge()
        want, got = pipe.state_dict(), again.state_dict()
        assert all(torch.allclose(got[key], t, atol=1e-6) for key, t in want.items() if "nerine" not in key)
