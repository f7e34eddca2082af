"""The nodes in ComfyUI itself: weights that its ModelPatcher patches with them are the weights that nerine merges.

Needs a checkout: `NERINE_COMFYUI=/path/to/ComfyUI scripts/test tests/peers/test_comfy_nodes.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import nerine
from nerine import BOFT, IA3, DiagOFT, DoRA, DyLoRA, Full, GLoRA, LoHa, LoKr, LoRA, Norm, OFTv2, TLoRA
from nerine.integrations.comfy_layers import encoders_of
from peers.comfy_models import DENOISERS, ENCODERS, MARKS, Clip, clip_of, comfyui, inner, model_of, patcher_of
from peers.stirred import stir

pytestmark = MARKS
FAMILIES = list(DENOISERS)


@pytest.fixture(scope="module")
def comfy() -> Iterator[Any]:
    with comfyui() as found:
        yield found


@pytest.fixture(autouse=True)
def folder(comfy: Any, tmp_path: Path) -> Path:
    """The folder of ComfyUI's LoRAs."""
    comfy.folder_paths.folder_names_and_paths["loras"] = ([str(tmp_path)], {".safetensors"})
    comfy.folder_paths.filename_list_cache.clear()
    return tmp_path


def trained(model: nn.Module, algorithm: Any, file: Path, targets: Any = "full", dialect: str = "lycoris") -> Path:
    network = nerine.attach(model, algorithm, targets=targets)
    stir(network.parameters())
    nerine.save(network, file, dialect=dialect)
    return file


def state(model: nn.Module, lead: str = "") -> dict[str, Tensor]:
    return {key.removeprefix(lead): t.clone() for key, t in model.state_dict().items() if "nerine" not in key}


def merged(model: nn.Module, *files: Path, strength: float = 1.0, component: str | None = None) -> dict[str, Tensor]:
    for i, file in enumerate(files):
        nerine.load(model, file, strength=strength, name=f"n{i}", component=component)
    nerine.Network.of(model).merge()
    return state(model)


def load(comfy: Any, patcher: Any, file: Path, strength: float = 1.0, **more: Any) -> tuple[Any, Any, str]:
    """What the node returns."""
    node = comfy.nodes.NODE_CLASS_MAPPINGS["NerineLoadAdapter"]
    return getattr(node(), node.FUNCTION)(patcher, file.name, strength, more.pop("strength_clip", strength), **more)


def check(got: dict[str, Tensor], want: dict[str, Tensor], base: dict[str, Tensor]) -> int:
    """How many weights have moved; all are as wanted."""
    moved = 0
    for key, t in base.items():
        size = float((want[key] - t).abs().max())
        moved += size > 0
        assert float((got[key] - want[key]).abs().max()) < 1e-5 * max(size, 1.0), key
        assert size or torch.equal(got[key], t), key
    return moved


# -- every family, in the names of every program -----------------------------------------------------------------------
@pytest.mark.parametrize("dialect", ["comfy", "kohya", "lycoris", "diffusers"])
@pytest.mark.parametrize("name", FAMILIES)
def test_families(comfy: Any, name: str, dialect: str, folder: Path) -> None:
    file = trained(inner(comfy, name), LoRA(rank=2, alpha=1.5), folder / "a.safetensors", dialect=dialect)
    patcher = patcher_of(comfy, model_of(comfy, name))
    before = state(patcher.model, "diffusion_model.")
    clone, clip, report = load(comfy, patcher, file, 0.8)
    assert clip is None
    assert "0 keys not used" in report
    assert patcher.patches == {}
    got = state(clone.patch_model(), "diffusion_model.")
    assert check(got, merged(inner(comfy, name), file, strength=0.8), before) > 15
    clone.unpatch_model()
    assert all(torch.equal(t, before[key]) for key, t in state(patcher.model, "diffusion_model.").items())


ALGORITHMS: dict[str, Any] = {
    "LoRA": LoRA(rank=4, alpha=3),
    "LoRA, Tucker": LoRA(rank=4, alpha=3, tucker=True),
    "DyLoRA": DyLoRA(rank=4, alpha=3),
    "T-LoRA": TLoRA(rank=4, alpha=3),
    "LoHa": LoHa(rank=4, alpha=3),
    "LoHa, Tucker": LoHa(rank=4, alpha=3, tucker=True),
    "LoKr": LoKr(rank=2, alpha=3),
    "LoKr, both full": LoKr(full_matrix=True),
    "GLoRA": GLoRA(rank=4, alpha=3),
    "IA3": IA3(),
    "IA3 on inputs": IA3(on_input=True),
    "Diag-OFT": DiagOFT(block_size=4, constraint=0.01, rescale=True),
    "BOFT": BOFT(block_size=4, constraint=0.01, rescale=True),
    "OFT v2": OFTv2(block_size=4),
    "Full": Full(),
}
CASES = [(name, axis) for name in ALGORITHMS for axis in (None, "out", "in") if axis is None or name != "Full"]
FEW = {
    "SDXL": ["input_blocks.1.0.in_layers.2", "input_blocks.4.1.transformer_blocks.0.attn2.to_k", "label_emb.0.0"],
    "Flux": ["double_blocks.0.img_attn.qkv", "single_blocks.1.linear1"],
    "Wan": ["blocks.1.self_attn.q", "blocks.0.ffn.0"],
}


@pytest.mark.parametrize(("algorithm", "axis"), CASES, ids=str)
@pytest.mark.parametrize("name", FEW)
def test_algorithms(comfy: Any, name: str, algorithm: str, axis: Any, folder: Path) -> None:
    kind = ALGORITHMS[algorithm]
    if axis is not None:
        kind = DoRA(kind, axis=axis)
    file = trained(inner(comfy, name), kind, folder / "a.safetensors", FEW[name])
    patcher = patcher_of(comfy, model_of(comfy, name))
    before = state(patcher.model, "diffusion_model.")
    clone, _, report = load(comfy, patcher, file, 0.7)
    assert "0 keys not used" in report
    assert type(kind).__name__ in report
    got = state(clone.patch_model(), "diffusion_model.")
    moved = check(got, merged(inner(comfy, name), file, strength=0.7), before)
    biases = sum(f"{path}.bias" in before for path in FEW[name]) if algorithm == "Full" else 0
    assert moved == len(FEW[name]) + biases


def test_norms_whose_weight_is_called_scale(comfy: Any, folder: Path) -> None:
    """As Flux has them in ComfyUI; in diffusers the same are ordinary norms."""
    shift = torch.linspace(-1, 1, 12)
    safetensors.torch.save_file(
        {
            "lycoris_transformer_blocks_1_attn_norm_q.w_norm": shift,
            "lycoris_single_transformer_blocks_0_attn_norm_k.w_norm": 2 * shift,
        },
        folder / "a.safetensors",
    )
    patcher = patcher_of(comfy, model_of(comfy, "Flux"))
    before = state(patcher.model, "diffusion_model.")
    clone, _, report = load(comfy, patcher, folder / "a.safetensors", 0.5)
    assert "0 keys not used" in report
    want = dict(before)
    want["double_blocks.1.img_attn.norm.query_norm.scale"] = (
        before["double_blocks.1.img_attn.norm.query_norm.scale"] + 0.5 * shift
    )
    want["single_blocks.0.norm.key_norm.scale"] = before["single_blocks.0.norm.key_norm.scale"] + shift
    assert check(state(clone.patch_model(), "diffusion_model."), want, before) == 2


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "Flux"])
def test_norms(comfy: Any, name: str, folder: Path) -> None:
    file = trained(inner(comfy, name), Norm(), folder / "a.safetensors", "full")
    patcher = patcher_of(comfy, model_of(comfy, name))
    before = state(patcher.model, "diffusion_model.")
    clone, _, _ = load(comfy, patcher, file)
    assert check(state(clone.patch_model(), "diffusion_model."), merged(inner(comfy, name), file), before)


def test_where_comfyui_itself_deviates(comfy: Any, folder: Path) -> None:
    """The same file through ComfyUI's own loader: what it computes is not what was trained, and the node is needed."""
    file = trained(inner(comfy, "Wan"), DoRA(LoRA(rank=4, alpha=3)), folder / "a.safetensors", FEW["Wan"], "kohya")
    patcher = patcher_of(comfy, model_of(comfy, "Wan"))
    names: dict[str, str] = {}
    comfy.lora.model_lora_keys_unet(patcher.model, names)
    other = patcher.clone()
    other.add_patches(comfy.lora.load_lora(safetensors.torch.load_file(file), names), 1.0)
    theirs = state(other.patch_model(), "diffusion_model.")
    other.unpatch_model()
    ours = state(load(comfy, patcher, file)[0].patch_model(), "diffusion_model.")
    key, want = f"{FEW['Wan'][0]}.weight", merged(inner(comfy, "Wan"), file)
    base = inner(comfy, "Wan").state_dict()[key]
    assert float((theirs[key] - want[key]).norm() / (want[key] - base).norm()) > 0.05
    assert torch.allclose(ours[key], want[key], atol=1e-5)


# -- as a patch among others -------------------------------------------------------------------------------------------
def test_strength_zero_changes_nothing(comfy: Any, folder: Path) -> None:
    file = trained(inner(comfy, "Wan"), DoRA(LoRA(rank=4)), folder / "a.safetensors", FEW["Wan"])
    patcher = patcher_of(comfy, model_of(comfy, "Wan"))
    before = state(patcher.model)
    for strength, blocks in ((0.0, ""), (1.0, "blocks=0")):
        clone, _, _ = load(comfy, patcher, file, strength, blocks=blocks)
        after = state(clone.patch_model())
        assert all(torch.equal(t, before[key]) for key, t in after.items())
        clone.unpatch_model()


def test_strength_per_block(comfy: Any, folder: Path) -> None:
    file = trained(inner(comfy, "Flux"), LoRA(rank=2), folder / "a.safetensors", ["double_blocks", "single_blocks"])
    patcher = patcher_of(comfy, model_of(comfy, "Flux"))
    before = state(patcher.model, "diffusion_model.")
    blocks = "double_blocks.0-0=0.5, single_blocks.1.linear1=0"
    clone, _, report = load(comfy, patcher, file, 2.0, blocks=blocks)
    assert "strength single_blocks.1.linear1=0: 1 layers" in report
    full, got = merged(inner(comfy, "Flux"), file), state(clone.patch_model(), "diffusion_model.")
    for key, t in before.items():
        factor = 1.0 if key.startswith("double_blocks.0") else 0.0 if "single_blocks.1.linear1" in key else 2.0
        assert torch.allclose(got[key], t + factor * (full[key] - t), atol=1e-5), key


def test_two_nodes_in_a_row_are_two_loads(comfy: Any, folder: Path) -> None:
    one = trained(inner(comfy, "Wan"), DoRA(LoRA(rank=4, alpha=3)), folder / "a.safetensors", FEW["Wan"])
    two = trained(inner(comfy, "Wan"), DiagOFT(block_size=4), folder / "b.safetensors", ["q", "k"], "comfy")
    patcher = patcher_of(comfy, model_of(comfy, "Wan"))
    before = state(patcher.model, "diffusion_model.")
    want = merged(inner(comfy, "Wan"), one, two, strength=0.7)
    for files in ((one, two), (two, one)):
        first, _, _ = load(comfy, patcher, files[0], 0.7)
        kept = {key: list(entries) for key, entries in first.patches.items()}
        both, _, _ = load(comfy, first, files[1], 0.7)
        assert first.patches == kept
        assert check(state(both.patch_model(), "diffusion_model."), want, before) > 4
        both.unpatch_model()
    assert all(torch.equal(t, before[key]) for key, t in state(patcher.model, "diffusion_model.").items())


def test_beside_comfyuis_own_loader_and_a_merged_model(comfy: Any, folder: Path) -> None:
    """A LoRA of ComfyUI's adds the same wherever it stands; after a merge of models the adapter sees the merged one."""
    plain = trained(inner(comfy, "Wan"), LoRA(rank=4, alpha=3), folder / "a.safetensors", FEW["Wan"], "comfy")
    turn = trained(inner(comfy, "Wan"), DiagOFT(block_size=4), folder / "b.safetensors", FEW["Wan"])
    patcher = patcher_of(comfy, model_of(comfy, "Wan"))
    names: dict[str, str] = {}
    comfy.lora.model_lora_keys_unet(patcher.model, names)
    theirs = comfy.lora.load_lora(safetensors.torch.load_file(plain), names)
    key = f"{FEW['Wan'][0]}.weight"
    base, lora = inner(comfy, "Wan").state_dict()[key], merged(inner(comfy, "Wan"), plain)[key]

    after = load(comfy, patcher, turn)[0]
    after.add_patches(theirs, 0.5)
    got = state(after.patch_model(), "diffusion_model.")[key]
    after.unpatch_model()
    torch.testing.assert_close(got, merged(inner(comfy, "Wan"), turn)[key] + 0.5 * (lora - base), rtol=0, atol=1e-5)

    merge = patcher.clone()
    other = torch.randn(base.shape)
    merge.add_patches({f"diffusion_model.{key}": (other,)}, 0.25, 0.75)
    clone = load(comfy, merge, turn)[0]
    got = state(clone.patch_model(), "diffusion_model.")[key]
    model = inner(comfy, "Wan")
    model.get_parameter(key).data.copy_(0.75 * base + 0.25 * other)
    assert torch.allclose(got, merged(model, turn)[key], atol=1e-5)


def test_compensated_magnitudes_while_the_model_is_patched(comfy: Any, folder: Path) -> None:
    file = trained(inner(comfy, "Wan"), DoRA(LoKr(rank=2, alpha=3)), folder / "a.safetensors", FEW["Wan"], "comfy")
    patcher = patcher_of(comfy, model_of(comfy, "Wan"))
    before = state(patcher.model, "diffusion_model.")
    first, _, _ = load(comfy, patcher, file, 3.0)
    first.patch_model()
    second, _, _ = load(comfy, patcher, file)
    first.unpatch_model()
    check(state(second.patch_model(), "diffusion_model."), merged(inner(comfy, "Wan"), file), before)


# -- where the weights are elsewhere -----------------------------------------------------------------------------------
@pytest.mark.parametrize("algorithm", ["LoKr", "Diag-OFT", "IA3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_are_patched_when_they_are_called(
    comfy: Any, algorithm: str, dtype: torch.dtype, folder: Path
) -> None:
    """Where memory is short ComfyUI leaves weights as they are, and patches a copy in every call."""
    file = trained(inner(comfy, "Flux"), DoRA(ALGORITHMS[algorithm]), folder / "a.safetensors", FEW["Flux"])
    model = model_of(comfy, "Flux", "manual_cast").to(dtype)
    patcher = patcher_of(comfy, model)
    before = state(model)
    clone, _, _ = load(comfy, patcher, file, 0.7)
    clone.patch_model(device_to=torch.device("cpu"), lowvram_model_memory=1)
    assert model.lowvram_patch_counter == len(FEW["Flux"])
    want = merged(inner(comfy, "Flux").to(dtype), file, strength=0.7)
    for path in FEW["Flux"]:
        layer = model.get_submodule(f"diffusion_model.{path}")
        assert torch.equal(layer.weight, before[f"diffusion_model.{path}.weight"])
        x = torch.eye(layer.in_features, dtype=dtype)
        got = layer(x) - layer.bias
        exact = nn.functional.linear(x, want[f"{path}.weight"], layer.bias) - layer.bias
        assert torch.allclose(got, exact, atol=1e-5 if dtype == torch.float32 else 2e-2)
        assert not torch.allclose(got, x @ layer.weight.T, atol=5e-2)
    clone.unpatch_model()
    assert all(torch.equal(t, before[key]) for key, t in state(model).items())


def test_a_model_that_is_unloaded_piece_by_piece(comfy: Any, folder: Path) -> None:
    file = trained(inner(comfy, "Flux"), LoHa(rank=4, alpha=3), folder / "a.safetensors", FEW["Flux"])
    model = model_of(comfy, "Flux", "manual_cast")
    clone, _, _ = load(comfy, patcher_of(comfy, model), file)
    cpu = torch.device("cpu")
    clone.patch_model(device_to=cpu)
    want = merged(inner(comfy, "Flux"), file)
    layer, key = model.get_submodule(f"diffusion_model.{FEW['Flux'][0]}"), f"{FEW['Flux'][0]}.weight"
    assert torch.allclose(layer.weight, want[key], atol=1e-5)
    clone.partially_unload(cpu, 10**9)
    assert not torch.allclose(layer.weight, want[key], atol=1e-3)
    x = torch.eye(layer.in_features)
    assert torch.allclose(layer(x), nn.functional.linear(x, want[key], layer.bias), atol=1e-5)


def test_eight_bit_weights_are_rounded_as_comfyui_rounds(comfy: Any, folder: Path) -> None:
    file = trained(inner(comfy, "Wan"), DoRA(LoRA(rank=4, alpha=3)), folder / "a.safetensors", FEW["Wan"], "comfy")
    model = model_of(comfy, "Wan").to(torch.float8_e4m3fn)
    clone, _, _ = load(comfy, patcher_of(comfy, model), file)
    got = state(clone.patch_model(), "diffusion_model.")
    base = inner(comfy, "Wan").to(torch.float8_e4m3fn).float()
    want = merged(base, file)
    for path in FEW["Wan"]:
        key = f"{path}.weight"
        seed = comfy.model_patcher.string_to_seed(f"diffusion_model.{key}")
        exact = comfy.float.stochastic_rounding(want[key], torch.float8_e4m3fn, seed=seed)
        assert (got[key].float() != exact.float()).float().mean() < 0.002  # at the edge between two numbers


# -- text encoders -----------------------------------------------------------------------------------------------------
class Pipe(nn.Module):
    """The parts of a pipeline, to train them together."""

    def __init__(self, comfy: Any, name: str) -> None:
        super().__init__()
        setattr(self, "unet" if name.startswith("SD1") or name == "SDXL" else "transformer", inner(comfy, name))
        clip = clip_of(comfy, name)
        for i, own in enumerate(ENCODERS[name]):
            setattr(self, "text_encoder" if i == 0 else f"text_encoder_{i + 1}", clip.get_submodule(own).transformer)


@pytest.mark.parametrize("dialect", ["comfy", "kohya", "lycoris", "onetrainer"])
@pytest.mark.parametrize("name", FAMILIES)
def test_model_and_text_encoders(comfy: Any, name: str, dialect: str, folder: Path) -> None:
    targets = [*FEW.get(name, ["proj_out", "attn", "attention"]), "q", "q_proj", "self_attn.q_proj", "mlp.fc1"]
    file = trained(Pipe(comfy, name), LoRA(rank=2, alpha=1.5), folder / "a.safetensors", targets, dialect)
    patcher, clip = patcher_of(comfy, model_of(comfy, name)), Clip(patcher_of(comfy, clip_of(comfy, name)))
    before = state(clip.cond_stage_model)
    clone, encoders, report = load(comfy, patcher, file, 0.8, clip=clip, strength_clip=0.5)
    assert "0 keys not used" in report
    assert clip.patcher.patches == {}
    want = merged(Pipe(comfy, name), file, strength=0.5)
    got = state(encoders.patcher.patch_model())
    parts = encoders_of(clip.cond_stage_model)
    assert len(parts) == len(ENCODERS[name])
    for i, own in enumerate(ENCODERS[name]):
        part, lead = ("text_encoder" if i == 0 else f"text_encoder_{i + 1}"), f"{own}.transformer."
        moved = check(
            {key.removeprefix(lead): t for key, t in got.items() if key.startswith(lead)},
            {key.removeprefix(f"{part}."): t for key, t in want.items() if key.startswith(f"{part}.")},
            {key.removeprefix(lead): t for key, t in before.items() if key.startswith(lead)},
        )
        assert moved >= 2
    encoders.patcher.unpatch_model()
    assert all(torch.equal(t, before[key]) for key, t in state(clip.cond_stage_model).items())
    whole = state(clone.patch_model(), "diffusion_model.")
    strong = merged(Pipe(comfy, name), file, strength=0.8)
    part = "unet" if "unet.out.2.weight" in strong else "transformer"
    base = state(inner(comfy, name))
    assert check(whole, {k.removeprefix(f"{part}."): t for k, t in strong.items() if k.startswith(f"{part}.")}, base)


# -- what a node is ----------------------------------------------------------------------------------------------------
def test_nodes_are_what_comfyui_asks_for(comfy: Any, folder: Path) -> None:
    trained(inner(comfy, "Wan"), DoRA(LoKr(rank=2)), folder / "a.safetensors", FEW["Wan"])
    comfy.folder_paths.filename_list_cache.clear()
    mappings = comfy.nodes.NODE_CLASS_MAPPINGS
    assert set(mappings) == set(comfy.nodes.NODE_DISPLAY_NAME_MAPPINGS)
    for node in mappings.values():
        inputs = node.INPUT_TYPES()
        assert inputs["required"]["adapter"][0] == ["a.safetensors"]
        assert hasattr(node, node.FUNCTION)
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
    shown = mappings["NerineAdapterReport"]().describe("a.safetensors")
    assert "2 layers matched" in shown["result"][0]
    assert shown["ui"]["text"] == [shown["result"][0]]
