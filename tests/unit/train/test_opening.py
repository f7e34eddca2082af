"""Bases from folders and files, quantised, offloaded, checkpointed; and each of them trained for some steps."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import nerine
from nerine.errors import FormatError, OptionError, UnsupportedBase
from nerine.tiny import style_set
from nerine.tiny.load import MODEL
from nerine.train.config import settings_of
from nerine.train.opening import open_base
from nerine.train.placing import checkpoint_activations, quantize
from nerine.train.running import train
from nerine.train.settings import BaseSettings
from tiny_pipelines import PIPELINES, unet

pytestmark = [pytest.mark.no_device_guard, pytest.mark.filterwarnings("ignore::FutureWarning")]
FAMILIES = ["sd", "sdxl", "sd3", "flux"]


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of diffusers for each family, and pictures."""
    place = tmp_path_factory.mktemp("bases")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in FAMILIES:
            pipe = PIPELINES[name]()
            if name in ("sd3", "flux"):
                pipe.vae.register_to_config(shift_factor=0.1, scaling_factor=0.7)
            pipe.save_pretrained(place / name)
    style_set("neon").write(place / "pictures")
    return place


def run(folders: Path, out: Path, base: str, **more: Any) -> Any:
    common: dict[str, Any] = {
        "base": str(folders / base),
        "data": (folders / "pictures",),
        "out": out,
        "resolution": 16,
        "bucket_step": 8,
        "targets": ("attn-only",),
        "rank": 2,
        "steps": 3,
        "batch_size": 2,
        "lr": 1e-2,
        "clip": 0,
        "warmup": 0,
        "save_every": 10,
    }
    return train(settings_of({**common, **more}))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_trained_from_its_folder(folders: Path, tmp_path: Path, family: str) -> None:
    report = run(
        folders, tmp_path / "run", family, prompts=("a cat",), sample_steps=2, sample_width=16, sample_height=8
    )
    assert report.is_finished
    assert report.layers > 0
    assert (tmp_path / "run" / "samples" / "000003" / "00.png").is_file()
    base = open_base(BaseSettings(base=str(folders / family)))
    network = nerine.load(base.pipeline, report.adapter[0], strict=True)
    assert any(t.abs().max() > 0 for name, t in network.state_dict().items() if name.endswith("up"))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_text_encoders_are_trained_too(folders: Path, tmp_path: Path, family: str) -> None:
    report = run(folders, tmp_path / "run", family, text_encoder=True, dialect="kohya")
    keys = load_file(report.adapter[0]).keys()
    assert any(key.startswith("lora_unet_") for key in keys)
    assert any(key.startswith("lora_te") for key in keys)


def test_the_little_model_may_lie_in_a_folder() -> None:
    base = open_base(BaseSettings(base=str(MODEL)))
    assert base.family == "tiny"
    assert base.denoiser.dtype == torch.float32
    assert open_base(BaseSettings(dtype="bf16")).denoiser.dtype == torch.bfloat16


def single_file(folders: Path, file: Path) -> Path:
    """The UNet, VAE and text encoder of the SD folder as one file, under the names that such files have."""
    from diffusers.loaders import single_file_utils  # noqa: F401  (only to skip where diffusers is too old)

    tensors = {}
    for part, prefix in (("unet", "model.diffusion_model."), ("vae", "first_stage_model.")):
        weights = load_file(folders / "sd" / part / "diffusion_pytorch_model.safetensors")
        tensors |= {prefix + key: t for key, t in weights.items()}
    save_file(tensors, file)
    return file


def test_a_single_file_wants_configurations(folders: Path, tmp_path: Path) -> None:
    file = single_file(folders, tmp_path / "model.safetensors")
    with pytest.raises(OptionError, match=r"--base-config .* or allow --download"):
        open_base(BaseSettings(base=str(file)))
    with pytest.raises(OptionError, match=r"has no model_index\.json"):
        open_base(BaseSettings(base=str(file), config=tmp_path))


def test_what_is_no_base_is_named(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="nothing is at"):
        open_base(BaseSettings(base=str(tmp_path / "gone")))
    with pytest.raises(OptionError, match=r"has no model_index\.json"):
        open_base(BaseSettings(base=str(tmp_path)))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(FormatError, match="cannot be opened"):
        open_base(BaseSettings(base=str(tmp_path)))


def test_a_family_that_is_not_known_is_named(folders: Path) -> None:
    class Other:
        pass

    from nerine.train.families import family_of

    with pytest.raises(UnsupportedBase, match="Other"):
        family_of(Other())


# -- memory ------------------------------------------------------------------------------------------------------------
def wide() -> Any:
    """A UNet whose attention is wide enough for blocks of 32."""
    import diffusers

    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=4,
    ).eval()


def losses(denoiser: Any, steps: int = 6) -> list[float]:
    network = nerine.attach(denoiser, nerine.LoRA(rank=4), targets="attn-only")
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    x, text, target = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32), torch.randn(2, 4, 8, 8)
    found = []
    for _ in range(steps):
        loss = (denoiser(x, torch.tensor([10, 500]), text, return_dict=False)[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
    return found


@pytest.mark.parametrize(
    ("how", "package"), [("nf4", "bitsandbytes"), ("int8", "torchao"), ("int4", "torchao"), ("fp8", "")]
)
def test_quantised_denoisers_are_trained(how: str, package: str) -> None:
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    torch.manual_seed(3)
    denoiser, plain = wide(), wide()
    asked = (torch.ones(1, 4, 8, 8), torch.tensor([10]), torch.ones(1, 5, 32))
    with torch.no_grad():
        before = denoiser(*asked, return_dict=False)[0]
    count = quantize(denoiser, how)
    assert count >= 10
    assert type(denoiser.conv_in) is type(plain.conv_in)
    with torch.no_grad():
        after = denoiser(*asked, return_dict=False)[0]
    error = float((after - before).norm() / before.norm())
    assert 0 < error < {"nf4": 0.2, "int4": 0.2, "int8": 0.03, "fp8": 0.08}[how]
    found = losses(denoiser)
    assert found[-1] < found[0]


def test_nothing_to_quantise_is_named() -> None:
    with pytest.raises(OptionError, match="no linear layers in blocks that could be nf4"):
        quantize(torch.nn.Sequential(torch.nn.Linear(32, 32)), "nf4")


@pytest.mark.parametrize("more", [{"quantize": "fp8"}, {"offload": "group"}, {"gradient_checkpointing": True}])
def test_runs_under_little_memory(folders: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    plain = run(folders, tmp_path / "plain", "sd", save_dtype="fp32")
    own = run(folders, tmp_path / "own", "sd", save_dtype="fp32", **more)
    assert own.is_finished
    if "quantize" not in more:  # the same numbers
        assert own.loss == pytest.approx(plain.loss, rel=1e-5)
    else:
        assert own.loss == pytest.approx(plain.loss, rel=0.05)


def test_half_precision_bases_are_trained(folders: Path, tmp_path: Path) -> None:
    report = run(folders, tmp_path / "run", "sd", dtype="bf16", mixed_precision="bf16")
    assert report.is_finished
    assert torch.isfinite(torch.tensor(report.loss))


def test_activations_that_cannot_be_computed_again_are_named() -> None:
    with pytest.raises(OptionError, match="Linear cannot compute activations again"):
        checkpoint_activations(torch.nn.Linear(2, 2))
    model = unet()
    checkpoint_activations(model)
    assert model.is_gradient_checkpointing
