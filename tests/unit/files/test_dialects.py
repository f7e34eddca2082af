"""Files of other programs as they really are: their names, aliases, habits and omissions, one small file for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import nerine
from nerine import DoRA, FormatError, LoRA
from nerine.files.dialects import DIALECTS
from nerine.files.store import open_file
from nerine.tools import convert, embeddings

pytestmark = pytest.mark.no_device_guard
UP, DOWN = torch.linspace(-1, 1, 12).reshape(6, 2), torch.linspace(1, 2, 16).reshape(2, 8).sin()
DELTA = UP @ DOWN
Write = Callable[..., Path]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(8, 6)
        self.to_out = nn.ModuleList([nn.Linear(8, 6)])


class Model(nn.Module):
    """As much of a diffusers model as these files are for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.transformer_blocks = nn.ModuleList([nn.ModuleDict({"attn1": Attention(), "norm": nn.LayerNorm(6)})])
        self.conv = nn.Conv2d(4, 6, 3)


Q, OUT = "transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_out.0"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, name: str = "a") -> Path:
        path = tmp_path / f"{name}.safetensors"
        safetensors.torch.save_file({k: t.contiguous().clone() for k, t in tensors.items()}, path, dict(metadata or {}))
        return path

    return write


def moved(path: Path, layer: str = Q, **options: Any) -> tuple[Tensor, nerine.Network]:
    """W' - W of a layer, as merging has it."""
    model = Model()
    before = model.get_submodule(layer).weight.detach().clone()
    network = nerine.load(model, path, **options)
    network.merge()
    return model.get_submodule(layer).weight.detach() - before, network


FLAT = Q.replace(".", "_")
# One LoRA at scale one in the spelling of each program, and the dialect that it is.
SPELLED: dict[str, tuple[str, dict[str, Tensor]]] = {
    "LyCORIS": ("lycoris", {f"lycoris_{FLAT}.lora_up.weight": UP, f"lycoris_{FLAT}.lora_down.weight": DOWN}),
    "sd-scripts": ("kohya", {f"lora_unet_{FLAT}.lora_up.weight": UP, f"lora_unet_{FLAT}.lora_down.weight": DOWN}),
    "diffusers, UNet": ("diffusers", {f"unet.{Q}.lora_B.weight": UP, f"unet.{Q}.lora_A.weight": DOWN}),
    "diffusers, transformer": (
        "diffusers",
        {f"transformer.{Q}.lora_B.weight": UP, f"transformer.{Q}.lora_A.weight": DOWN},
    ),
    "diffusers, with the name of the adapter": (
        "diffusers",
        {f"transformer.{Q}.lora_B.default.weight": UP, f"transformer.{Q}.lora_A.default.weight": DOWN},
    ),
    "diffusers, attention processors": (
        "diffusers",
        {
            "unet.transformer_blocks.0.attn1.processor.to_q_lora.up.weight": UP,
            "unet.transformer_blocks.0.attn1.processor.to_q_lora.down.weight": DOWN,
        },
    ),
    "diffusers, between": ("diffusers", {f"unet.{Q}.lora.up.weight": UP, f"unet.{Q}.lora.down.weight": DOWN}),
    "diffusers, LoRA layers": (
        "diffusers",
        {f"unet.{Q}.lora_linear_layer.up.weight": UP, f"unet.{Q}.lora_linear_layer.down.weight": DOWN},
    ),
    "ComfyUI": (
        "comfy",
        {f"diffusion_model.{Q}.lora_up.weight": UP, f"diffusion_model.{Q}.lora_down.weight": DOWN},
    ),
    "official Wan and LTX": (
        "comfy",
        {f"diffusion_model.{Q}.lora_B.weight": UP, f"diffusion_model.{Q}.lora_A.weight": DOWN},
    ),
    "PEFT, without its folder": (
        "peft",
        {f"base_model.model.{Q}.lora_B.weight": UP, f"base_model.model.{Q}.lora_A.weight": DOWN},
    ),
    "PEFT around PEFT": (
        "peft",
        {
            f"base_model.model.{Q}.base_layer.lora_B.weight": UP,
            f"base_model.model.{Q}.base_layer.lora_A.weight": DOWN,
        },
    ),
    "OneTrainer": (
        "onetrainer",
        {f"lora_transformer_{FLAT}.lora_up.weight": UP, f"lora_transformer_{FLAT}.lora_down.weight": DOWN},
    ),
    "HCP-Diffusion": ("hcp", {f"lora:{Q}.___.layer.W_up": UP, f"lora:{Q}.___.layer.W_down": DOWN}),
    "HCP-Diffusion, as it was": (
        "hcp",
        {f"{Q}.___.layer.lora_up.weight": UP, f"{Q}.___.layer.lora_down.weight": DOWN},
    ),
    "Mochi": ("bare", {f"{Q}.lora_B": UP, f"{Q}.lora_A": DOWN}),
    "DiffSynth": ("bare", {f"{Q}.lora_B.default.weight": UP, f"{Q}.lora_A.default.weight": DOWN}),
}


@pytest.mark.parametrize("program", SPELLED)
def test_one_lora_in_every_spelling(program: str, write: Write) -> None:
    dialect, tensors = SPELLED[program]
    delta, network = moved(write(tensors))
    assert torch.allclose(delta, DELTA, atol=1e-6)
    assert network.report.dialect == dialect
    assert dict(network.report.used) == dict.fromkeys(tensors, Q)
    assert max(network.report.scores, key=network.report.scores.__getitem__) == dialect
    assert network.report.counts == {"layers": 1, "keys used": 2, "keys not used": 0, "layers missing": 0}


def lora(stem: str, **more: Tensor) -> dict[str, Tensor]:
    return {f"{stem}.{key}": t for key, t in {"lora_up.weight": UP, "lora_down.weight": DOWN, **more}.items()}


ALPHAS = {
    "()": (torch.tensor(1.0), 0.5),
    "(1,)": (torch.tensor([1.0]), 0.5),
    "a whole number": (torch.tensor(4), 2.0),
    "fp16": (torch.tensor(1.0).half(), 0.5),
    "zero": (torch.tensor(0.0), 1.0),
}


@pytest.mark.parametrize("case", ALPHAS)
@pytest.mark.parametrize("stem", [f"lycoris_{FLAT}", f"lora_unet_{FLAT}", f"diffusion_model.{Q}"])
def test_alpha(case: str, stem: str, write: Write) -> None:
    alpha, scale = ALPHAS[case]
    delta, _ = moved(write(lora(stem, alpha=alpha)))
    assert torch.allclose(delta, scale * DELTA, atol=1e-6)


def test_a_negative_alpha_turns_the_adapter_round_and_is_kept(write: Write, tmp_path: Path) -> None:
    path = write(lora(f"lora_unet_{FLAT}", alpha=torch.tensor(-1.0)))
    assert torch.allclose(moved(path)[0], -0.5 * DELTA, atol=1e-6)
    convert(path, tmp_path / "b.safetensors", dialect="kohya")
    assert torch.allclose(moved(tmp_path / "b.safetensors")[0], -0.5 * DELTA, atol=1e-6)


def test_what_a_kohya_file_says_of_itself(tmp_path: Path) -> None:
    network = nerine.attach(Model(), DoRA(LoRA(rank=2, alpha=1)), targets=["to_q", "to_out"])
    nerine.save(network, tmp_path / "a.safetensors", dialect="kohya", metadata={"ss_output_name": "cat"}, hashes=True)
    with open_file(tmp_path / "a.safetensors") as source:
        told = source.metadata
    assert (told["ss_network_dim"], told["ss_network_alpha"], told["ss_output_name"]) == ("2", "1.0", "cat")
    assert "dora_wd" in told["ss_network_args"]
    assert len(told["sshs_model_hash"]) == 64
    assert told["sshs_model_hash"] != "0" * 64


def test_the_alpha_of_hcp_is_a_scale(write: Write) -> None:
    tensors = {**SPELLED["HCP-Diffusion"][1], f"lora:{Q}.___.alpha": torch.tensor(0.25)}
    assert torch.allclose(moved(write(tensors))[0], 0.25 * DELTA, atol=1e-6)
    plugin = {f"plugin:{Q}.___.{k}": t for k, t in {"lora_up.weight": UP, "lora_down.weight": DOWN}.items()}
    assert torch.allclose(
        moved(write({**plugin, f"plugin:{Q}.___.alpha": torch.tensor(1.0)}))[0], 0.5 * DELTA, atol=1e-6
    )


def test_a_scale_is_taken_as_it_is(write: Write) -> None:
    delta, _ = moved(write(lora(f"lora_unet_{FLAT}", scale=torch.tensor(0.3), alpha=torch.tensor(9.0))))
    assert torch.allclose(delta, 0.3 * DELTA, atol=1e-6)


def test_the_alpha_of_a_lokr_with_both_factors_whole_counts_for_nothing(write: Write) -> None:
    w1, w2 = torch.randn(2, 2), torch.randn(3, 4)
    stem = f"transformer.{Q}"
    tensors = {f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2, f"{stem}.alpha": torch.tensor(1e10)}
    assert torch.allclose(moved(write(tensors))[0], torch.kron(w1, w2), atol=1e-5)


# -- DoRA ------------------------------------------------------------------------------------------------------------
def decomposed(magnitude: Tensor, axis: str) -> Tensor:
    weight = Model().get_submodule(Q).weight.detach()
    v = weight + DELTA
    norm = v.norm(dim=1, keepdim=True) if axis == "out" else v.norm(dim=0, keepdim=True)
    return v * magnitude.reshape(norm.shape) / norm - weight


M_OUT, M_IN = torch.linspace(1, 2, 6), torch.linspace(1, 2, 8)
MAGNITUDES: dict[str, tuple[str, str, Tensor, str]] = {
    "LyCORIS": (f"lycoris_{FLAT}", "dora_scale", M_OUT[:, None], "out"),
    "LyCORIS before 3.2": (f"lycoris_{FLAT}", "dora_scale", M_IN[None], "in"),
    "kohya, 1-D": (f"lora_unet_{FLAT}", "dora_scale", M_OUT, "out"),
    "diffusers": (f"unet.{Q}", "lora_magnitude_vector", M_OUT, "out"),
    "PEFT": (f"base_model.model.{Q}", "lora_magnitude_vector", M_OUT, "out"),
    "PEFT, in memory": (f"base_model.model.{Q}", "lora_magnitude_vector.default.weight", M_OUT, "out"),
    "ai-toolkit": (f"transformer.{Q}", "magnitude", M_OUT, "out"),
}


@pytest.mark.parametrize("program", MAGNITUDES)
def test_magnitudes(program: str, write: Write) -> None:
    stem, suffix, magnitude, axis = MAGNITUDES[program]
    delta, network = moved(write(lora(stem, **{suffix: magnitude})))
    assert network.report.rows[0].axis == axis
    assert torch.allclose(delta, decomposed(magnitude, axis), atol=1e-5)


def test_a_magnitude_for_comfyui_is_one_over_the_norm_of_the_base(write: Write) -> None:
    """What ComfyUI would show of it: V·m/|W|."""
    path = write(lora(f"diffusion_model.{Q}", dora_scale=M_OUT[:, None]))
    weight = Model().get_submodule(Q).weight.detach()
    v = weight + DELTA
    want = v * M_OUT[:, None] / weight.norm(dim=1, keepdim=True) - weight
    assert torch.allclose(moved(path)[0], want, atol=1e-5)
    flat = write(lora(f"lycoris_{FLAT}", dora_scale=M_OUT[:, None]), name="b")
    model = Model()
    with pytest.raises(FormatError, match="none of its"):  # told to be of a dialect whose names it does not have
        nerine.load(model, flat, dialect="comfy")


# -- dense parts -----------------------------------------------------------------------------------------------------
def test_differences_of_weights_biases_and_norms(write: Write) -> None:
    norm = "transformer_blocks.0.norm"
    diff, diff_b = torch.randn(6, 8), torch.randn(6)
    tensors = {f"diffusion_model.{Q}.diff": diff, f"diffusion_model.{Q}.diff_b": diff_b}
    tensors |= {f"diffusion_model.{norm}.diff": diff_b, f"diffusion_model.{OUT}.diff_b": diff_b}
    model = Model()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    nerine.load(model, write(tensors), strict=True).merge()
    change = {k: model.state_dict()[k] - t for k, t in before.items() if not torch.equal(model.state_dict()[k], t)}
    want = {f"{Q}.weight": diff, f"{Q}.bias": diff_b, f"{norm}.weight": diff_b, f"{OUT}.bias": diff_b}
    assert change.keys() == want.keys()
    assert all(torch.allclose(change[k], t, atol=1e-6) for k, t in want.items())


def test_a_sparse_part_beside_a_low_rank_one(write: Write) -> None:
    """The extraction of LyCORIS keeps what is left in 16 bits, indices included."""
    sparse = {
        "bias_indices": torch.tensor([[0, 5], [7, 0]], dtype=torch.int16),
        "bias_values": torch.tensor([0.5, -2.0]).half(),
        "bias_size": torch.tensor([6, 8], dtype=torch.int16),
    }
    delta, network = moved(write(lora(f"lora_unet_{FLAT}", alpha=torch.tensor([1.0]), **sparse)))
    want = 0.5 * DELTA
    want[0, 7] += 0.5
    want[5, 0] -= 2.0
    assert torch.allclose(delta, want, atol=1e-6)
    assert "read as the dense difference" in network.report.rows[0].note
    outside = {**sparse, "bias_indices": torch.tensor([[0, 6], [7, 0]], dtype=torch.int16)}
    with pytest.raises(FormatError, match="point outside of the layer's"):
        moved(write(lora(f"lora_unet_{FLAT}", **outside)))


def test_ia3_and_oft_of_onetrainer(write: Write) -> None:
    upper = 0.1 * torch.randn(4, 1)
    stem = f"lora_unet_{FLAT}"
    plain = {f"{stem}.oft_R.weight": upper / (2 * 1**0.5)}
    scaled = {f"{stem}.oft_R.weight": upper, f"{stem}.oft_R.scaled_oft": torch.tensor(True)}
    one, network = moved(write(plain))
    other, _ = moved(write(scaled, name="b"))
    assert network.report.dialect == "onetrainer"
    assert float(one.abs().max()) > 0.01
    assert torch.allclose(one, other, atol=1e-6)


def test_the_oft_of_sd_scripts_with_a_bound_of_zero_turns_nothing(write: Write) -> None:
    blocks = torch.randn(3, 2, 2)
    for alpha, turns in ((0.0, False), (1.0, True)):
        tensors = {f"oft_unet_{FLAT}.oft_blocks": blocks, f"oft_unet_{FLAT}.alpha": torch.tensor(alpha)}
        delta, network = moved(write(tensors))
        assert network.report.dialect == "kohya"
        assert bool(delta.abs().max() > 1e-3) is turns


# -- parts of a pipeline ---------------------------------------------------------------------------------------------
def encoder(width: int) -> nn.Module:
    layer = nn.ModuleDict(
        {"self_attn": nn.ModuleDict({"q_proj": nn.Linear(width, width), "k_proj": nn.Linear(width, 4)})}
    )
    inner = nn.ModuleDict({"layers": nn.ModuleList([layer])})
    return nn.ModuleDict({"text_model": nn.ModuleDict({"encoder": inner})})


PATH = "text_model.encoder.layers.0.self_attn.q_proj"


def for_width(stem: str, width: int, value: float = 1.0) -> dict[str, Tensor]:
    up, down = torch.full((width, 2), value), torch.ones(2, width)
    return {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}


@pytest.fixture
def two_encoders(write: Write) -> Path:
    name = PATH.replace(".", "_")
    return write({**for_width(f"lora_te1_{name}", 5), **for_width(f"lora_te2_{name}", 7), **lora(f"lora_unet_{FLAT}")})


@pytest.mark.parametrize(("width", "part", "other"), [(5, "te1", "te2"), (7, "te2", "te1")])
def test_shapes_tell_which_text_encoder_a_model_is(two_encoders: Path, width: int, part: str, other: str) -> None:
    report = nerine.load(encoder(width), two_encoders).report
    assert [row.layer for row in report.rows] == [PATH]
    assert all(key.startswith(f"lora_{part}_") for key in report.used)
    left = {key.split("_")[1]: why for key, why in report.unmatched.items()}
    assert left.keys() == {"unet", other}
    assert "of a pipeline, and this model was taken for its" in left[other]


def test_where_shapes_do_not_tell_the_user_must(write: Write) -> None:
    name = PATH.replace(".", "_")
    path = write({**for_width(f"lora_te1_{name}", 5, 1.0), **for_width(f"lora_te2_{name}", 5, 2.0)})
    with pytest.raises(FormatError, match=r"for text_encoder and for text_encoder_2.*component='text_encoder'"):
        nerine.load(encoder(5), path)
    for component, value in (("text_encoder", 1.0), ("text_encoder_2", 2.0)):
        model = encoder(5)
        ((_, _, adapter),) = nerine.load(model, path, component=component).adapters()
        assert float(adapter.params().tensors["up"].detach()[0, 0]) == value


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "comfy"])
def test_a_whole_pipeline_in_one_file(dialect: str, tmp_path: Path) -> None:
    """Several models in one, each under the name of its part."""

    def pipeline() -> nn.ModuleDict:
        torch.manual_seed(0)
        return nn.ModuleDict({"unet": Model(), "text_encoder": encoder(5), "text_encoder_2": encoder(7)})

    model = pipeline()
    network = nerine.attach(model, LoRA(rank=2, alpha=3), targets=["to_q", "q_proj"])
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p))
    nerine.save(network, tmp_path / "a.safetensors", dialect=dialect)
    tops = {key.split("." if "." in key.split(".lora")[0] else "_text_model")[0] for key in keys(tmp_path)}
    assert len(tops) >= 2
    again = pipeline()
    nerine.load(again, tmp_path / "a.safetensors", strict=True)
    network.merge()
    nerine.Network.of(again).merge()
    for path in (f"unet.{Q}", f"text_encoder.{PATH}", f"text_encoder_2.{PATH}"):
        got, want = again.get_submodule(path).weight, model.get_submodule(path).weight
        assert torch.allclose(got, want, atol=1e-6)
        assert not torch.allclose(want, pipeline().get_submodule(path).weight)
    alone = encoder(7)
    assert [row.layer for row in nerine.load(alone, tmp_path / "a.safetensors").report.rows] == [PATH]


def keys(folder: Path) -> list[str]:
    return list(safetensors.torch.load_file(folder / "a.safetensors"))


# -- detection -------------------------------------------------------------------------------------------------------
def test_a_file_put_together_from_two_dialects_is_not_guessed_at(write: Write) -> None:
    tensors = lora(f"lora_unet_{FLAT}") | lora(f"diffusion_model.{OUT}")
    with pytest.raises(FormatError, match=r"kohya and comfy explain this file equally well; say which .* dialect="):
        moved(write(tensors))
    model = Model()
    report = nerine.load(model, write(tensors), dialect="kohya").report
    assert set(report.unmatched.values()) == {"not a name in the kohya dialect"}


def test_a_few_strange_keys_change_nothing(write: Write) -> None:
    tensors = lora(f"lora_unet_{FLAT}", alpha=torch.tensor(1.0)) | lora(f"diffusion_model.{OUT}")
    report = nerine.load(Model(), write(tensors)).report
    assert report.dialect == "kohya"
    assert report.scores["kohya"] == pytest.approx(3 / 5)


def test_a_file_that_is_no_adapter(write: Write) -> None:
    with pytest.raises(FormatError, match="none of its 1 keys is one of an adapter in any of the dialects"):
        moved(write({"model.weight_g": torch.ones(2)}))


def test_an_unknown_dialect_is_named_with_the_nearest(write: Write, tmp_path: Path) -> None:
    path = write(lora(f"lora_unet_{FLAT}"))
    for act in (
        lambda: nerine.load(Model(), path, dialect="khoya"),
        lambda: convert(path, tmp_path / "b.safetensors", dialect="khoya"),
    ):
        with pytest.raises(nerine.OptionError, match="Did you mean 'kohya'"):
            act()


def test_two_keys_for_one_tensor(write: Write) -> None:
    tensors = lora(f"transformer.{Q}") | {f"transformer.{Q}.lora_A.weight": DOWN}
    with pytest.raises(FormatError, match=r"both are the lora_down\.weight of one layer"):
        moved(write(tensors))


def test_two_names_for_one_layer(write: Write) -> None:
    tensors = lora(f"unet.{Q}") | lora(f"transformer.{Q}")
    with pytest.raises(FormatError, match="two adapters for the layer"):
        moved(write(tensors))


# -- embeddings, pickles ---------------------------------------------------------------------------------------------
def test_embeddings_travel_with_the_file(write: Write, tmp_path: Path) -> None:
    vectors = torch.randn(2, 8)
    tensors = {**lora(f"lora_unet_{FLAT}"), "bundle_emb.neon cat.clip_l": vectors}
    path = write(tensors)
    report = nerine.load(Model(), path, strict=True).report
    assert report.used["bundle_emb.neon cat.clip_l"] == "embedding neon cat"
    convert(path, tmp_path / "b.safetensors", dialect="kohya")
    found = embeddings(tmp_path / "b.safetensors")
    assert found.keys() == {"neon cat"}
    assert torch.equal(found["neon cat"]["clip_l"], vectors)
    with pytest.raises(FormatError, match="carries embeddings, for which the peft dialect has no place"):
        convert(path, tmp_path / "c", dialect="peft")


def test_a_pickle_is_read_by_choice(tmp_path: Path) -> None:
    path = tmp_path / "adapter.pt"
    torch.save(lora(f"lora_unet_{FLAT}"), path)
    with pytest.raises(FormatError, match="a pickle can run code"):
        moved(path)
    assert torch.allclose(moved(path, allow_pickle=True)[0], DELTA, atol=1e-6)


# -- rows ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dialect", ["lycoris", "kohya", "peft", "comfy", "bare"])
def test_adapters_on_some_rows_become_one_of_the_layer_where_nobody_knows_rows(dialect: str, tmp_path: Path) -> None:
    rules = [nerine.Rule(Q, LoRA(rank=2, alpha=3), rows=(1, 3)), nerine.Rule(Q, LoRA(rank=1), rows=(4, 6))]
    model = Model()
    network = nerine.attach(model, rules, targets=Q)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p))
    file = tmp_path / ("a" if DIALECTS[dialect].folder else "a.safetensors")
    report = nerine.save(network, file, dialect=dialect)
    assert report.layers == 2
    again = Model()
    loaded = nerine.load(again, file, strict=dialect == "lycoris")
    want = [f"{Q}[1:3]", f"{Q}[4:6]"] if dialect == "lycoris" else [Q]
    assert [row.layer for row in loaded.report.rows] == want
    network.merge()
    loaded.merge()
    got, base = again.get_submodule(Q).weight, Model().get_submodule(Q).weight
    assert torch.allclose(got, model.get_submodule(Q).weight, atol=1e-6)
    assert torch.equal(got[[0, 3]], base[[0, 3]])
    assert not torch.allclose(got, base)


# -- options ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None])
def test_adapters_are_kept_in_the_format_that_is_asked_for(dtype: torch.dtype | None, write: Write) -> None:
    delta, network = moved(write(lora(f"lora_unet_{FLAT}")), dtype=dtype)
    ((_, _, adapter),) = network.adapters()
    assert {p.dtype for p in adapter.parameters()} == {dtype or torch.float32}
    assert torch.allclose(delta, DELTA, atol=2e-2)
    with pytest.raises(nerine.OptionError, match="dtype must be"):
        nerine.load(Model(), write(lora(f"lora_unet_{FLAT}")), dtype=torch.int8)


def test_numbers_that_are_none_are_reported_with_their_layer(write: Write) -> None:
    bad = DOWN.clone()
    bad[0, 0] = float("nan")
    stem = f"lora_unet_{FLAT}"
    path = write({f"{stem}.lora_up.weight": UP, f"{stem}.lora_down.weight": bad})
    assert nerine.load(Model(), path).report.notes == (f"{Q}: not finite: down",)


def test_saving_says_who_reads_it(tmp_path: Path) -> None:
    network = nerine.attach(Model(), DoRA(LoRA(rank=2)), targets=["to_q", "to_out"])
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn_like(p))
    report = nerine.save(network, tmp_path / "a.safetensors", dialect="kohya")
    rows = {row.reader: row for row in report.readers}
    assert list(rows) == ["ComfyUI", "A1111", "Forge", "diffusers", "PEFT", "sd-scripts", "InvokeAI"]
    assert (rows["ComfyUI"].approximately, rows["ComfyUI"].better) == (2, "comfy")
    assert rows["ComfyUI"].worst is not None
    assert rows["ComfyUI"].worst > 0.01
    assert (rows["PEFT"].not_at_all, rows["PEFT"].better) == (2, "peft")
    assert (rows["diffusers"].approximately, rows["diffusers"].better) == (2, "diffusers")
    assert "read by" in str(report)
    assert "comfy" in str(report)
    assert report.to_dict()["readers"][0]["reader"] == "ComfyUI"


def test_every_dialect_says_what_it_is() -> None:
    for name, dialect in DIALECTS.items():
        assert dialect.name == name
        assert dialect.about
        assert dialect.prefixes
