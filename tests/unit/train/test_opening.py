"""Bases from folders and files, quantised, offloaded, checkpointed; and each of them trained for some steps."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import nerine
from nerine.errors import FormatError, MissingExtra, OptionError, UnsupportedBase
from nerine.files.names.families.unet import UNET
from nerine.tiny import style_set
from nerine.tiny.load import MODEL
from nerine.train.config import settings_of
from nerine.train.opening import open_base
from nerine.train.placing import checkpoint_activations, quantize
from nerine.train.running import train
from nerine.train.settings import BaseSettings
from tiny_pipelines import PIPELINES, clip, t5, unet

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


VAE_NAMES = (  # of one resolution, from diffusers to the original
    ("down_blocks.0.resnets.", "down.0.block."),
    ("up_blocks.0.resnets.", "up.0.block."),
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
    ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
    ("mid_block.attentions.0.to_", "mid.attn_1."),
    ("conv_norm_out", "norm_out"),
)


def single_file(folders: Path, file: Path, without: str = "") -> Path:
    """UNet, VAE and text encoder of the SD folder in one file, under the names of the original program."""
    unet_ = load_file(folders / "sd" / "unet" / "diffusion_pytorch_model.safetensors")
    shapes = {key.removesuffix(".weight"): tuple(t.shape) for key, t in unet_.items() if key.endswith(".weight")}
    names = {alias.own: alias.name for alias in UNET.aliases(shapes, "diffusers")["native"]}
    tensors = {}
    for key, t in unet_.items():
        path, end = key.rsplit(".", 1)
        tensors[f"model.diffusion_model.{names[path]}.{end}"] = t
    for key, t in load_file(folders / "sd" / "vae" / "diffusion_pytorch_model.safetensors").items():
        for ours, theirs in VAE_NAMES:
            key = key.replace(ours, theirs)
        tensors[f"first_stage_model.{key}"] = t
    for key, t in load_file(folders / "sd" / "text_encoder" / "model.safetensors").items():
        tensors[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = t
    save_file({key: t for key, t in tensors.items() if not without or not key.startswith(without)}, file)
    return file


def configurations(folders: Path, folder: Path) -> Path:
    shutil.copytree(folders / "sd", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_a_single_file_is_the_model_of_the_folder(folders: Path, tmp_path: Path) -> None:
    file = single_file(folders, tmp_path / "model.safetensors")
    base = open_base(BaseSettings(base=str(file), config=configurations(folders, tmp_path / "configs")))
    whole = open_base(BaseSettings(base=str(folders / "sd")))
    asked: dict[str, Any] = {"steps": 2, "size": (16, 8)}
    assert base.draw(["a cat"], **asked)[0].tobytes() == whole.draw(["a cat"], **asked)[0].tobytes()
    for name, t in whole.pipeline.text_encoder.state_dict().items():
        assert torch.equal(t, base.pipeline.text_encoder.state_dict()[name]), name


def test_a_single_file_wants_configurations_and_all_parts(folders: Path, tmp_path: Path) -> None:
    file = single_file(folders, tmp_path / "model.safetensors")
    with pytest.raises(OptionError, match=r"--base-config .* or allow --download"):
        open_base(BaseSettings(base=str(file)))
    with pytest.raises(OptionError, match=r"has no model_index\.json"):
        open_base(BaseSettings(base=str(file), config=tmp_path))
    configs = configurations(folders, tmp_path / "configs")
    with pytest.raises(FormatError, match="Weights for this component appear to be missing"):
        open_base(
            BaseSettings(base=str(single_file(folders, tmp_path / "a.safetensors", "model.diff")), config=configs)
        )
    (tmp_path / "b.safetensors").write_bytes(b"no tensors")
    with pytest.raises(FormatError, match=r"b\.safetensors cannot be opened"):
        open_base(BaseSettings(base=str(tmp_path / "b.safetensors"), config=configs))


def test_what_a_file_holds_is_asked_before_it_is_opened(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a download, the pipeline is that of the model whose configurations fit, and not always the same."""
    import diffusers

    file = tmp_path / "xl.safetensors"
    save_file({"conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": torch.zeros(2)}, file)
    asked: dict[str, Any] = {}

    def load_config(model: str) -> dict[str, str]:
        asked["model"] = model
        return {"_class_name": "StableDiffusionXLPipeline"}

    def from_single_file(path: str, **options: Any) -> Any:
        asked.update(options)
        return PIPELINES["sdxl"]()

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", load_config)
    monkeypatch.setattr(diffusers.StableDiffusionXLPipeline, "from_single_file", from_single_file)
    assert open_base(BaseSettings(base=str(file), download=True)).family == "sdxl"
    assert asked["model"] == asked["config"] == "stabilityai/stable-diffusion-xl-base-1.0"
    assert asked["local_files_only"] is False

    def offline(model: str) -> dict[str, str]:
        raise OSError("no way out")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", offline)
    with pytest.raises(OptionError, match=r"cannot be fetched \(no way out\); give a folder with --base-config"):
        open_base(BaseSettings(base=str(file), download=True))


def test_what_is_no_base_is_named(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="nothing is at"):
        open_base(BaseSettings(base=str(tmp_path / "gone")))
    with pytest.raises(OptionError, match=r"has no model_index\.json"):
        open_base(BaseSettings(base=str(tmp_path)))
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(FormatError, match="cannot be opened"):
        open_base(BaseSettings(base=str(tmp_path)))
    for name in ("StableConfusionPipeline", "UNet2DConditionModel"):
        index.write_text(json.dumps({"_class_name": name}))
        with pytest.raises(FormatError, match=f"names '{name}', which is no pipeline of diffusers"):
            open_base(BaseSettings(base=str(tmp_path)))
    for damaged in (b"\xff{", b"[]", b"{}", b"{"):
        index.write_bytes(damaged)
        with pytest.raises(FormatError, match="expected a JSON object with the name of a pipeline"):
            open_base(BaseSettings(base=str(tmp_path)))


def test_opening_says_nothing_and_leaves_no_trace(folders: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No progress bars, no advice; and diffusers speaks as loud as before."""
    from diffusers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    capfd.readouterr()
    base = open_base(BaseSettings(base=str(folders / "sdxl"), dtype="fp16"))
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert (base.denoiser.dtype, base.vae.dtype) == (torch.float16, torch.float32)  # type: ignore[union-attr]
    assert base.draw(["a cat"], steps=1, size=(16, 8))[0].size == (16, 8)


@pytest.mark.parametrize("name", ["tiny", "sd", "sd3"])
def test_what_is_opened_is_frozen(folders: Path, name: str) -> None:
    base = open_base(BaseSettings(base=name if name == "tiny" else str(folders / name)))
    for part in (base.denoiser, base.vae, *base.text_encoders.values()):
        if part is not None:
            assert not any(p.requires_grad for p in part.parameters())
            assert not any(module.training for module in part.modules())


def test_the_little_model_is_opened_without_a_word_of_diffusers() -> None:
    """In a process of its own, for what diffusers says on being imported it says once."""
    script = "from nerine.train.opening import open_base; from nerine.train.settings import BaseSettings\n"
    script += "import logging; from diffusers.utils import logging as spoken; said = []\n"
    script += (
        "spoken.add_handler(type('Ear', (logging.Handler,), {'emit': lambda self, one: said.append(one.msg)})())\n"
    )
    script += "open_base(BaseSettings()); print(said)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_diffusers_may_not_be_there(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtra, match=r'pip install "nerine\[train\]"'):
        open_base(BaseSettings(base=str(folders / "sd")))
    with pytest.raises(MissingExtra, match=r'pip install "nerine\[train\]"'):
        open_base(BaseSettings())


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


@pytest.mark.parametrize(("how", "package"), [("nf4", "bitsandbytes"), ("int8", "torchao.quantization")])
def test_packages_that_quantise_may_not_be_there(how: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf'quantize = "{how}" .*{package}.*pip install "nerine\[quant\]"'):
        quantize(wide(), how)


def test_a_format_that_is_not_known_is_named() -> None:
    with pytest.raises(OptionError, match=r"there is no format 'nf5'\. Did you mean 'nf4'"):
        quantize(wide(), "nf5")


@pytest.mark.parametrize("more", [{"quantize": "fp8"}, {"offload": "group"}, {"gradient_checkpointing": True}])
def test_runs_under_little_memory(folders: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    plain = run(folders, tmp_path / "plain", "sd", save_dtype="fp32")
    own = run(folders, tmp_path / "own", "sd", save_dtype="fp32", **more)
    assert own.is_finished
    if "quantize" not in more:  # the same numbers
        assert own.loss == pytest.approx(plain.loss, rel=1e-5)
    else:
        assert own.loss == pytest.approx(plain.loss, rel=0.05)


def test_trained_text_encoders_keep_their_dropouts_asleep(folders: Path, tmp_path: Path) -> None:
    """Computing activations again needs blocks in training; the dropouts of the base stay off all the same."""
    shutil.copytree(folders / "sd", tmp_path / "sd")
    config = tmp_path / "sd" / "text_encoder" / "config.json"
    told = json.loads(config.read_text()) | {"attention_dropout": 0.5, "dropout": 0.5}
    config.write_text(json.dumps(told))
    more: dict[str, Any] = {"data": (folders / "pictures",), "text_encoder": True, "save_dtype": "fp32"}
    plain = run(tmp_path, tmp_path / "plain", "sd", **more)
    again = run(tmp_path, tmp_path / "again", "sd", **more, gradient_checkpointing=True)
    assert again.loss == pytest.approx(plain.loss, rel=1e-6)


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


@pytest.mark.parametrize("make", [clip, t5])
def test_text_encoders_compute_again_without_dropouts(make: Any) -> None:
    """Its blocks are run twice, and gradients are those of a model at rest, to the bit."""
    ids = torch.tensor([[3, 4, 5, 6, 1]])

    def gradients(model: Any) -> tuple[int, list[torch.Tensor]]:
        runs: list[int] = []
        layers = [one for one in model.modules() if type(one).__name__ in ("CLIPMLP", "T5LayerFF")]
        handles = [one.register_forward_pre_hook(lambda *given: runs.append(1)) for one in layers]
        model(ids).last_hidden_state.square().sum().backward()
        for handle in handles:
            handle.remove()
        return len(runs) // len(layers), [p.grad for p in model.parameters() if p.grad is not None]

    plain, again = make().eval(), make().eval()
    checkpoint_activations(again)
    (once, expected), (twice, found) = gradients(plain), gradients(again)
    assert (once, twice) == (1, 2)
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
