"""Adapters as patches of ComfyUI's, with a small stand-in for its ModelPatcher: the same weights as `nerine.load`.

`tests/peers/test_comfy_nodes.py` does the like with ComfyUI itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nerine
from nerine import (
    BOFT,
    IA3,
    DiagOFT,
    DoRA,
    DyLoRA,
    FormatError,
    Full,
    GLoRA,
    LoHa,
    LoKr,
    LoRA,
    Norm,
    OFTv2,
    OptionError,
    Rule,
    ShapeError,
    TargetError,
    TLoRA,
    UnsupportedBase,
)
from nerine.integrations.comfy import Patch, adapter_patches, describe, originals_of, patched
from nerine.integrations.comfy_layers import encoders_of, slots_of
from peers.stirred import stir


class Patcher:
    """What a ModelPatcher does with weights: patches beside the model, applied one after the other to a copy."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.patches: dict[str, list[tuple[Any, ...]]] = {}
        self.backup: dict[str, Tensor] = {}

    def clone(self) -> Patcher:
        new = Patcher(self.model)
        new.patches = {key: entries[:] for key, entries in self.patches.items()}
        new.backup = self.backup
        return new

    def add_patches(
        self, patches: dict[str, Any], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[str]:
        state = self.model.state_dict()
        for key, patch in patches.items():
            if key in state:
                self.patches.setdefault(key, []).append((strength_patch, patch, strength_model, None, None))
        return [key for key in patches if key in state]

    def get_key_patches(self, filter_prefix: str = "") -> dict[str, list[Any]]:
        state = {key: t for key, t in self.model.state_dict().items() if key.startswith(filter_prefix)}
        return {
            key: [(self.backup.get(key, t), lambda a, **kwargs: a), *self.patches.get(key, [])]
            for key, t in state.items()
        }

    def calculate(self, key: str, weight: Tensor) -> Tensor:
        for strength, patch, strength_model, offset, function in self.patches.get(key, []):
            weight *= strength_model
            if isinstance(patch, Patch):
                weight = patch.calculate_weight(weight, key, strength, strength_model, offset, function)
            else:
                weight += strength * patch[1][0]
        return weight

    @torch.no_grad()
    def patch_model(self) -> nn.Module:
        for key, p in self.model.named_parameters():
            if key in self.patches:
                self.backup[key] = p.detach().clone()
                p.copy_(self.calculate(key, p.detach().to(torch.float32, copy=True)))
        return self.model

    @torch.no_grad()
    def unpatch_model(self) -> None:
        for key, p in self.model.named_parameters():
            if key in self.backup:
                p.copy_(self.backup.pop(key))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.lin = nn.Linear(width, 30)
        self.out = nn.Linear(30, width, bias=False)


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(24) for _ in range(3)])
        self.conv = nn.Conv2d(12, 20, 3, padding=1)
        self.turned = nn.ConvTranspose2d(6, 8, 2, groups=2)
        self.words = nn.Embedding(7, 12)
        self.to(dtype)


class Text(nn.Module):
    """The layers of CLIP's text encoder that its names are told by."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.text_model = nn.Module()
        self.text_model.encoder = nn.Module()
        self.text_model.encoder.layers = nn.ModuleList([nn.Module() for _ in range(2)])
        for layer in self.text_model.encoder.layers:
            layer.self_attn = nn.Module()
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                setattr(layer.self_attn, name, nn.Linear(width, width))
            layer.mlp = nn.Module()
            layer.mlp.fc1, layer.mlp.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)


def loaded(inner: nn.Module) -> nn.Module:
    """A model as ComfyUI has it."""
    model = nn.Module()
    model.diffusion_model = inner
    return model


def encoders(**parts: nn.Module) -> nn.Module:
    """Text encoders as ComfyUI has them."""
    clip = nn.Module()
    for name, part in parts.items():
        child = nn.Module()
        child.transformer = part
        setattr(clip, name, child)
    return clip


LAYERS = ["blocks.0.lin", "blocks.1.out", "conv"]
ALGORITHMS: dict[str, Any] = {
    "LoRA": LoRA(rank=4, alpha=3),
    "LoRA, Tucker": LoRA(rank=4, alpha=3, tucker=True),
    "DyLoRA": DyLoRA(rank=4, alpha=3),
    "T-LoRA": TLoRA(rank=4, alpha=3),
    "LoHa": LoHa(rank=4, alpha=3),
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
WHOLE = {"Full"}  # which DoRA does not go around
CASES = [(name, axis) for name in ALGORITHMS for axis in (None, "out", "in") if axis is None or name not in WHOLE]


def trained(algorithm: Any, file: Path, dialect: str = "lycoris", targets: Any = tuple(LAYERS)) -> Path:
    network = nerine.attach(Model(), algorithm, targets=list(targets))
    stir(network.parameters())
    nerine.save(network, file, dialect=dialect)
    return file


def merged(*files: Path, strength: float = 1.0, model: Callable[[], nn.Module] = Model) -> dict[str, Tensor]:
    """The weights that nerine makes of them."""
    base = model()
    for i, file in enumerate(files):
        nerine.load(base, file, strength=strength, name=f"n{i}")
    nerine.Network.of(base).merge()
    return {key: t for key, t in base.state_dict().items() if "nerine" not in key}


def after(model: nn.Module) -> dict[str, Tensor]:
    return {key.removeprefix("diffusion_model."): t.clone() for key, t in model.state_dict().items()}


def check(got: dict[str, Tensor], want: dict[str, Tensor], base: dict[str, Tensor], moved: int) -> None:
    assert sum(not torch.equal(want[key], base[key]) for key in base) == moved
    for key, t in base.items():
        size = max(float((want[key] - t).abs().max()), 1e-3)
        assert float((got[key] - want[key]).abs().max()) < 1e-5 * size, key


@pytest.mark.parametrize(("name", "axis"), CASES, ids=str)
@pytest.mark.parametrize("strength", [1.0, -0.6])
def test_weights_are_those_of_load_and_merge(name: str, axis: Any, strength: float, tmp_path: Path) -> None:
    inner = ALGORITHMS[name]
    file = trained(inner if axis is None else DoRA(inner, axis=axis), tmp_path / "a.safetensors")
    patcher = Patcher(loaded(Model()))
    before = after(patcher.model)
    patches = adapter_patches(file, patcher.model)
    clone = patched(patcher, patches.model, strength)
    assert patcher.patches == {}
    assert patches.report.unmatched == {}
    check(after(clone.patch_model()), merged(file, strength=strength), before, 3 + 2 * (name in WHOLE))
    clone.unpatch_model()
    assert all(torch.equal(t, before[key]) for key, t in after(patcher.model).items())


@pytest.mark.parametrize("dialect", ["kohya", "comfy", "lycoris", "diffusers", "onetrainer", "hcp"])
@pytest.mark.parametrize("axis", [None, "out"])
def test_dialects(dialect: str, axis: Any, tmp_path: Path) -> None:
    inner = LoRA(rank=4, alpha=3)
    file = tmp_path / "a.safetensors"
    try:
        trained(inner if axis is None else DoRA(inner, axis=axis), file, dialect)
    except FormatError as error:
        pytest.skip(str(error))
    patcher = Patcher(loaded(Model()))
    before = after(patcher.model)
    patches = adapter_patches(file, patcher.model, originals={"model": originals_of(patcher)})
    check(after(patched(patcher, patches.model, 1.0).patch_model()), merged(file), before, 3)


def test_norms_and_embeddings_and_turned_convolutions(tmp_path: Path) -> None:
    rules = [Rule("blocks.*.norm", Norm()), Rule("words", LoRA(rank=3, alpha=2)), Rule("turned", LoKr(rank=1, alpha=2))]
    file = trained(rules, tmp_path / "a.safetensors", targets=["norm", "words", "turned"])
    patcher = Patcher(loaded(Model()))
    before = after(patcher.model)
    patches = adapter_patches(file, patcher.model)
    check(after(patched(patcher, patches.model, 1.0).patch_model()), merged(file), before, 8)


def test_rows_of_a_weight(tmp_path: Path) -> None:
    rules = [Rule("blocks.0.lin", LoRA(rank=2, alpha=1), rows=(0, 10)), Rule("blocks.0.lin", Full(), rows=(12, 30))]
    file = trained(rules, tmp_path / "a.safetensors", targets=["blocks.0.lin"])
    patcher = Patcher(loaded(Model()))
    before = after(patcher.model)
    patches = adapter_patches(file, patcher.model)
    assert set(patches.model) == {"diffusion_model.blocks.0.lin.weight", "diffusion_model.blocks.0.lin.bias"}
    check(after(patched(patcher, patches.model, 0.5).patch_model()), merged(file, strength=0.5), before, 2)


def test_a_compensated_magnitude_is_restored_from_the_weight_as_it_was_loaded(tmp_path: Path) -> None:
    """The node may run while the model is patched."""
    file = trained(DoRA(LoKr(rank=2, alpha=3)), tmp_path / "a.safetensors", "comfy")
    patcher = Patcher(loaded(Model()))
    before = after(patcher.model)
    now = patched(patcher, adapter_patches(file, patcher.model).model, 3.0)
    now.patch_model()
    assert not torch.equal(after(now.model)["conv.weight"], before["conv.weight"])
    patches = adapter_patches(file, now.model, originals={"model": originals_of(now)})
    now.unpatch_model()
    check(after(patched(patcher, patches.model, 1.0).patch_model()), merged(file), before, 3)


def test_without_base_factors_t_lora_takes_them_from_the_weight(tmp_path: Path) -> None:
    file = trained(TLoRA(rank=4, alpha=3), tmp_path / "a.safetensors")
    tensors = {key: t for key, t in load_file(file).items() if "base_" not in key}
    assert len(tensors) < len(load_file(file))
    save_file(tensors, file)
    patcher = Patcher(loaded(Model()))
    before = after(patcher.model)
    patches = adapter_patches(file, patcher.model)
    assert sum("principal directions" in note for note in patches.report.notes) == 3
    check(after(patched(patcher, patches.model, 1.0).patch_model()), merged(file), before, 3)


def test_strength_zero_is_the_base_bit_by_bit(tmp_path: Path) -> None:
    file = trained(DoRA(LoRA(rank=4, alpha=3)), tmp_path / "a.safetensors")
    patcher = Patcher(loaded(Model(torch.bfloat16)))
    before = after(patcher.model)
    for blocks, strength in (("", 0.0), ("diffusion_model=0", 1.0)):
        clone = patched(patcher, adapter_patches(file, patcher.model, blocks=blocks).model, strength)
        assert clone is not patcher
        assert all(torch.equal(t, before[key]) for key, t in after(clone.patch_model()).items())
        clone.unpatch_model()


def test_strength_per_block(tmp_path: Path) -> None:
    file = trained(Full(), tmp_path / "a.safetensors", targets=["lin", "out"])
    blocks = "blocks.0-1.lin=0.5, out=0  # none\nre:.*2[.]li{1,2}n=-2"
    patcher = Patcher(loaded(Model()))
    before = after(patcher.model)
    patches = adapter_patches(file, patcher.model, blocks=blocks)
    got = after(patched(patcher, patches.model, 0.5).patch_model())
    full = merged(file)
    for key, t in before.items():
        factor = {"lin": 0.5, "out": 0.0}.get(key.split(".")[-2], 0.0) * 0.5
        factor = -1.0 if key.startswith("blocks.2.lin") else factor
        assert torch.allclose(got[key], t + factor * (full[key] - t), rtol=1e-5, atol=1e-6), key
    assert [note for note in patches.report.notes if note.startswith("strength")] == [
        "strength blocks.0-1.lin=0.5: 2 layers",
        "strength out=0: 3 layers",
        "strength re:.*2[.]li{1,2}n=-2: 1 layers",
    ]


@pytest.mark.parametrize("blocks", ["lin", "lin=", "=0.5", "lin=much", "lin=nan", "lin 0.5"])
def test_strengths_that_cannot_be_read(blocks: str, tmp_path: Path) -> None:
    file = trained(LoRA(rank=4), tmp_path / "a.safetensors")
    with pytest.raises(OptionError, match="expected name=number as in"):
        adapter_patches(file, loaded(Model()), blocks=blocks)


def test_a_name_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    file = trained(LoRA(rank=4), tmp_path / "a.safetensors")
    with pytest.raises(TargetError, match=r"'block\.0-1=0\.5' matches no layer of this model\. Did you mean 'blocks'"):
        adapter_patches(file, loaded(Model()), blocks="lin=1, block.0-1=0.5")
    with pytest.raises(TargetError, match="matches no layer"):
        adapter_patches(file, loaded(Model()), blocks="blocks.3-7=0.5")


def test_two_adapters_act_beside_each_other(tmp_path: Path) -> None:
    """Maps that turn or rescale the weight do not commute: neither sees the other's work, as with two loads."""
    one = trained(DoRA(LoRA(rank=4, alpha=3)), tmp_path / "a.safetensors")
    two = trained(DiagOFT(block_size=2), tmp_path / "b.safetensors", "kohya", [*LAYERS, "blocks.2.lin"])
    patcher = Patcher(loaded(Model()))
    before = after(patcher.model)
    found = [adapter_patches(file, patcher.model).model for file in (one, two)]
    for order in (found, found[::-1]):
        clone = patched(patched(patcher, order[0], 0.7), order[1], 0.7)
        assert patcher.patches == {}
        check(after(clone.patch_model()), merged(one, two, strength=0.7), before, 4)
        clone.unpatch_model()


def test_beside_another_loaders_patches(tmp_path: Path) -> None:
    """Those see what the patches before them leave, as ComfyUI has it."""
    file = trained(Full(), tmp_path / "a.safetensors", targets=["conv"])
    patcher = Patcher(loaded(Model()))
    base, key = after(patcher.model)["conv.weight"], "diffusion_model.conv.weight"
    other = torch.randn(base.shape)
    patcher.add_patches({key: ("diff", (other,))}, 0.5)
    clone = patched(patcher, adapter_patches(file, patcher.model).model, 2.0)
    clone.add_patches({key: ("diff", (other,))}, 0.25)
    clone = patched(clone, adapter_patches(file, patcher.model).model, 1.0)
    want = base + 0.75 * other + 3.0 * (merged(file)["conv.weight"] - base)
    assert torch.allclose(after(clone.patch_model())["conv.weight"], want, atol=1e-5)


def test_a_half_precision_weight_is_computed_in_full_and_rounded_once(tmp_path: Path) -> None:
    """As ComfyUI patches a weight that it keeps in memory: the copy that it casts has the format of the layer."""
    file = trained(DoRA(LoHa(rank=4, alpha=3)), tmp_path / "a.safetensors")
    patches = adapter_patches(file, loaded(Model())).model
    key = "diffusion_model.conv.weight"
    weight = Model().conv.weight.detach()
    exact = patches[key].calculate_weight(weight.bfloat16().float(), key, 0.8, 1.0, None, None)
    half = weight.bfloat16()
    got = patches[key].calculate_weight(half, key, 0.8, 1.0, None, None, intermediate_dtype=torch.bfloat16)
    assert got is half
    assert torch.equal(got, exact.bfloat16())


def test_comfyui_may_make_the_patch_anew_with_its_tensors_elsewhere(tmp_path: Path) -> None:
    file = trained(LoKr(rank=2, alpha=3), tmp_path / "a.safetensors")
    key = "diffusion_model.conv.weight"
    patch = adapter_patches(file, loaded(Model())).model[key]

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone()
        return type(value)(map(moved, value)) if isinstance(value, list | tuple) else value

    again = type(patch)(patch.loaded_keys, moved(patch.weights))
    weights = [Model().conv.weight.detach().clone() for _ in range(2)]
    for one, weight in zip((patch, again), weights, strict=True):
        one.calculate_weight(weight, key, 1.0, 1.0, None, None)
    assert torch.equal(*weights)
    assert patch.loaded_keys == {name for name in load_file(file) if "conv" in name}


def test_tensors_are_kept_as_the_file_has_them(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    network = nerine.attach(Model(), LoRA(rank=4), targets=LAYERS)
    stir(network.parameters())
    nerine.save(network, file, dtype=torch.float16)
    held = [t for patch in adapter_patches(file, loaded(Model())).model.values() for _, ts in patch.weights for t in ts]
    assert {t.dtype for t in held} == {torch.float16}
    assert sum(t.numel() for t in held) == sum(p.numel() for p in network.parameters())


def test_a_layer_that_has_changed_since_is_an_error(tmp_path: Path) -> None:
    file = trained(LoRA(rank=4), tmp_path / "a.safetensors")
    key = "diffusion_model.conv.weight"
    patch = adapter_patches(file, loaded(Model())).model[key]
    with pytest.raises(ShapeError, match=r"conv.weight: the adapter was loaded for a weight of"):
        patch.calculate_weight(torch.zeros(20, 14, 3, 3), key, 1.0, 1.0, None, None)


def test_what_cannot_be_completed_says_so(tmp_path: Path) -> None:
    file = trained(DoRA(LoRA(rank=4)), tmp_path / "a.safetensors", "comfy")
    packed = {"model": lambda key: torch.zeros(8, dtype=torch.uint8)}
    with pytest.raises(UnsupportedBase, match="Load the model unquantised"):
        adapter_patches(file, loaded(Model()), originals=packed)


def test_a_bias_that_a_layer_lacks_is_told(tmp_path: Path) -> None:
    file = trained(Full(), tmp_path / "a.safetensors", targets=["conv"])
    model = loaded(Model())
    model.diffusion_model.conv.bias = None
    patches = adapter_patches(file, model)
    assert set(patches.model) == {"diffusion_model.conv.weight"}
    assert "the adapter moves a bias, and this layer has none" in "\n".join(patches.report.notes)


# -- text encoders -----------------------------------------------------------------------------------------------------
class Pipe(nn.Module):
    """A pipeline to train for: a transformer and two text encoders."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer, self.text_encoder, self.text_encoder_2 = Model(), Text(12), Text(16)


@pytest.mark.parametrize("dialect", ["kohya", "comfy", "lycoris", "onetrainer"])
def test_model_and_text_encoders_from_one_file(dialect: str, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    network = nerine.attach(Pipe(), LoRA(rank=4, alpha=3), targets=[*LAYERS, "fc1"])
    stir(network.parameters())
    nerine.save(network, file, dialect=dialect)
    model, clip = loaded(Model()), encoders(clip_l=Text(12), clip_g=Text(16))
    patches = adapter_patches(file, model, clip, blocks="clip_g=0.5")
    assert patches.report.unmatched == {}
    assert (len(patches.model), len(patches.clip)) == (3, 4)
    want = merged(file, model=Pipe)
    got = after(patched(Patcher(clip), patches.clip, 1.0).patch_model())
    for own, part, factor in (("clip_l", "text_encoder", 1.0), ("clip_g", "text_encoder_2", 0.5)):
        base = getattr(Pipe(), part).state_dict()
        for key, t in base.items():
            exact = t + factor * (want[f"{part}.{key}"] - t)
            assert torch.allclose(got[f"{own}.transformer.{key}"], exact, rtol=1e-5, atol=1e-6), key
    assert sum(torch.equal(t, got[f"clip_l.transformer.{key}"]) for key, t in Text(12).state_dict().items()) == 22
    check(
        after(patched(Patcher(model), patches.model, 1.0).patch_model()),
        {key.removeprefix("transformer."): t for key, t in want.items() if key.startswith("transformer.")},
        Model().state_dict(),
        3,
    )


def test_without_a_clip_its_keys_are_reported_and_not_used(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    network = nerine.attach(Pipe(), LoRA(rank=4, alpha=3), targets=[*LAYERS, "fc1"])
    nerine.save(network, file, dialect="kohya")
    patches = adapter_patches(file, loaded(Model()))
    assert patches.clip == {}
    assert len(patches.report.unmatched) == 12
    assert all("lora_te" in key for key in patches.report.unmatched)


def test_a_text_encoder_that_is_not_loaded_is_not_taken_for_another(tmp_path: Path) -> None:
    """SD 3 runs without some of its encoders: names of CLIP's larger one must not land on the smaller."""
    file = tmp_path / "a.safetensors"
    network = nerine.attach(Pipe(), LoRA(rank=4, alpha=3), targets=[*LAYERS, "fc1"])
    nerine.save(network, file, dialect="kohya")
    clip = encoders(clip_l=Text(12))
    clip.clip_g = None
    patches = adapter_patches(file, loaded(Model()), clip)
    assert {key.split(".")[0] for key in patches.clip} == {"clip_l"}
    assert {key.split("_")[1] for key in patches.report.unmatched} == {"te2"}


@pytest.mark.parametrize(
    ("names", "absent", "want"),
    [
        (["clip_l"], [], {"text_encoder": "clip_l"}),
        (["clip_g"], [], {"text_encoder": "clip_g"}),
        (["clip_l", "clip_g"], [], {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}),
        (["clip_l", "t5xxl"], [], {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"}),
        (["t5xxl", "clip_g"], ["clip_l"], {"text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}),
        (["umt5xxl"], [], {"text_encoder": "umt5xxl"}),
        (["qwen25_7b"], [], {"text_encoder": "qwen25_7b"}),
    ],
)
def test_which_text_encoder_is_which(names: list[str], absent: list[str], want: dict[str, str]) -> None:
    clip = encoders(**{name: Text(4) for name in names})
    for name in absent:
        setattr(clip, name, None)
    assert encoders_of(clip) == {part: f"{name}.transformer" for part, name in want.items()}


# -- what is given ---------------------------------------------------------------------------------------------------
def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    file = trained(LoRA(rank=4), tmp_path / "a.safetensors")
    for model, clip, words in (
        (Model(), None, r"expected a ComfyUI model with \.diffusion_model, found Model"),
        (None, Text(4), "expected the text encoders of a ComfyUI CLIP"),
        (None, None, "expected a MODEL, a CLIP, or both"),
    ):
        with pytest.raises(OptionError, match=words):
            adapter_patches(file, model, clip)


def test_a_file_for_another_model_is_refused(tmp_path: Path) -> None:
    file = trained(LoRA(rank=4), tmp_path / "a.safetensors")
    with pytest.raises(FormatError):
        adapter_patches(file, None, encoders(clip_l=Text(12)))


def test_slots_need_no_values_and_no_forward() -> None:
    """Shapes alone are read, also of layers that are like nn.Linear and none, with packed weights."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 8, 6
            self.weight = nn.Parameter(torch.zeros(24, dtype=torch.uint8), requires_grad=False)
            self.bias = nn.Parameter(torch.zeros(6))

    with torch.device("meta"):
        inner = Model()
    inner.packed = Packed()
    inner.alone = nn.Parameter(torch.zeros(2, 5))
    slots = slots_of(loaded(inner), None)
    whole = {path: slot for path, slot in slots.items() if "blocks" not in path}
    assert {path.removeprefix("diffusion_model."): (s.site.kind, s.site.shape) for path, s in whole.items()} == {
        "conv": ("conv", (20, 12, 3, 3)),
        "turned": ("transposed", (8, 3, 2, 2)),
        "words": ("embedding", (12, 7)),
        "packed": ("linear", (6, 8)),
        "alone": ("linear", (2, 5)),
    }
    assert whole["diffusion_model.alone"].key == "diffusion_model.alone"
    assert copy.copy(whole["diffusion_model.packed"]).site.has_bias


def test_describe_needs_no_model(tmp_path: Path) -> None:
    text = describe(trained(DoRA(LoKr(rank=2)), tmp_path / "a.safetensors", "kohya"))
    assert "3 layers matched" in text
    assert "LoKr" in text
