"""The same tensors through LyCORIS 4.1.3: files go both ways, and where the numbers differ it is on purpose.

Every deliberate difference has its own test, which asserts what LyCORIS does, what nerine does, and says why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import nerine
from nerine import DoRA, LoHa, LoKr, LoRA
from peers.stirred import stir

lycoris = pytest.importorskip("lycoris", reason="needs lycoris-lora: pip install 'nerine[peers]'")

pytestmark = [pytest.mark.peers, pytest.mark.no_device_guard]
CLOSE = 1e-5  # of the deviation's norm, in fp32

INPUTS = {"lin": (3, 24), "conv": (2, 12, 5, 6), "one": (2, 12, 4, 3), "long": (2, 6, 9)}


def model_of(*names: str) -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = {
        "lin": nn.Linear(24, 30),
        "conv": nn.Conv2d(12, 20, 3, padding=1, stride=2),
        "one": nn.Conv2d(12, 20, 1),
        "long": nn.Conv1d(6, 8, 3, dilation=2, padding=2, bias=False),
    }
    return nn.ModuleDict({name: layers[name] for name in names or layers})


def outputs(model: nn.ModuleDict) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in INPUTS.items()}
    with torch.no_grad():
        return {name: layer(inputs[name].to(layer.weight.dtype)) for name, layer in model.items()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    for name, y in want.items():
        error = float((got[name] - y).norm() / (y - base[name]).norm())
        assert error < CLOSE, f"{name}: {error:.1e}"


def ours(algorithm: Any, file: Path, *names: str, **options: Any) -> tuple[nn.ModuleDict, nerine.Network]:
    """A model with stirred adapters, saved to `file`."""
    model = model_of(*names)
    network = nerine.attach(model, algorithm)
    stir(network.parameters())
    nerine.save(network, file, **options)
    return model, network


def theirs(*names: str, algo: str = "lora", **options: Any) -> tuple[nn.ModuleDict, Any]:
    """A model with LyCORIS's stirred adapters applied."""
    model = model_of(*names)
    settings = {"linear_dim": 2, "linear_alpha": 1.0, "conv_dim": 2, "conv_alpha": 1.0, **options}
    network = lycoris.create_lycoris(model, 1.0, algo=algo, **settings)
    network.apply_to()
    stir(network.parameters())
    return model, network


def read_by_them(file: Path, *names: str, multiplier: float = 1.0) -> tuple[nn.ModuleDict, Any]:
    model = model_of(*names)
    network, _ = lycoris.create_lycoris_from_weights(multiplier, str(file), model)
    assert len(network.loras) == len(model)
    network.apply_to()
    return model, network


READABLE = [
    LoRA(rank=2, alpha=1.0),
    LoRA(rank=40, alpha=3.0),
    LoRA(rank=2, alpha=1.0, tucker=True),
    LoRA(rank=2, alpha=3.0, scalar=True),
    LoRA(rank=4, alpha=3.0, rs=True),
    LoHa(rank=2, alpha=1.0),
    LoHa(rank=2, alpha=1.0, tucker=True),
    LoHa(rank=3, alpha=1.0, scalar=True),
    LoKr(rank=1, alpha=2.0),
    LoKr(rank=1, alpha=2.0, factor=2),
    LoKr(rank=1, alpha=2.0, decompose_both=True, scalar=True),
    LoKr(rank=16, alpha=4.0),
    LoKr(full_matrix=True, factor=4),
]


@pytest.mark.parametrize("algorithm", [a for r in READABLE for a in (r, DoRA(r))], ids=str)
def test_they_read_what_we_write(algorithm: Any, tmp_path: Path) -> None:
    model, network = ours(algorithm, tmp_path / "a.safetensors")
    want = outputs(model)
    network.detach()
    other, _ = read_by_them(tmp_path / "a.safetensors")
    assert_same(outputs(other), want, outputs(model))


WRITTEN = [
    {},
    {"algo": "loha"},
    {"algo": "lokr"},
    {"algo": "lokr", "factor": 2},
    {"algo": "lokr", "full_matrix": True},
    {"algo": "lokr", "decompose_both": True},
    {"algo": "lokr", "unbalanced_factorization": True},
    {"algo": "lokr", "linear_dim": 100000, "conv_dim": 100000},
    {"use_tucker": True},
    {"algo": "loha", "use_tucker": True},
    {"algo": "lokr", "use_tucker": True},
    {"use_scalar": True},
    {"algo": "loha", "use_scalar": True},
    {"algo": "lokr", "use_scalar": True},
]
DORA = [{}, {"dora_wd": True}, {"dora_wd": True, "wd_on_output": False}]


@pytest.mark.parametrize("dora", DORA, ids=["plain", "DoRA out", "DoRA in"])
@pytest.mark.parametrize("options", WRITTEN, ids=str)
def test_we_read_what_they_write(options: dict[str, Any], dora: dict[str, Any], tmp_path: Path) -> None:
    model, network = theirs(**options, **dora)
    want = outputs(model)
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
    again = model_of()
    base = outputs(again)
    nerine.load(again, tmp_path / "a.safetensors", strict=True)
    assert_same(outputs(again), want, base)


def test_gradients_are_theirs(tmp_path: Path) -> None:
    """DoRA over LoRA, whose norm lets gradients through in both."""
    model, _ = ours(DoRA(LoRA(rank=2, alpha=1.0)), tmp_path / "a.safetensors", "lin")
    other, network = read_by_them(tmp_path / "a.safetensors", "lin")
    x = torch.randn(3, 24)
    for m in (model, other):
        m["lin"](x).square().sum().backward()
    adapter = model["lin"].nerine["default"]
    (lora,) = network.loras
    pairs = [
        (adapter.magnitude.grad, lora.dora_scale.grad),
        (adapter.down.grad, lora.lora_down.weight.grad),
        (adapter.up.grad, lora.lora_up.weight.grad),
    ]
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_they_read_our_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    ours(DoRA(LoKr(rank=1, alpha=2.0)), tmp_path / "a.safetensors", dtype=dtype)
    other, _ = read_by_them(tmp_path / "a.safetensors")
    again = model_of()
    base = outputs(again)
    nerine.load(again, tmp_path / "a.safetensors")
    assert_same(outputs(other), outputs(again), base)


# -- differences on purpose ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("algorithm", [LoHa(rank=2, alpha=1.0), LoKr(rank=1, alpha=2.0, factor=2)], ids=str)
def test_d1_they_merge_with_the_scale_twice(algorithm: Any, tmp_path: Path) -> None:
    """D1: their merged image is not the trained one unless alpha is the rank. Ours is."""
    model, network = ours(algorithm, tmp_path / "a.safetensors", "lin")
    other, reader = read_by_them(tmp_path / "a.safetensors", "lin")
    base = model_of("lin")["lin"].weight
    want = outputs(model)["lin"]
    torch.testing.assert_close(outputs(other)["lin"], want, rtol=1e-4, atol=1e-5)
    reader.restore()
    reader.merge_to()
    network.merge()
    torch.testing.assert_close(outputs(model)["lin"], want, rtol=1e-4, atol=1e-5)
    scale = algorithm.alpha / algorithm.rank
    delta, their_delta = model["lin"].weight - base, other["lin"].weight - base
    torch.testing.assert_close(their_delta, scale * delta, rtol=1e-3, atol=1e-5)
    assert scale != 1


def test_d2_they_lose_small_deltas_on_a_bf16_base() -> None:
    """D2: (W + dW) - W in bf16 turns most of a small delta into zeros; ours is computed beside the layer."""
    x = torch.randn(64, 24).bfloat16()
    down, up = torch.randn(2, 24), torch.randn(30, 2) * 1e-4
    errors = []
    for who in ("ours", "theirs"):
        model = model_of("lin").bfloat16()
        base = model["lin"].weight.detach().double()
        if who == "ours":
            network = nerine.attach(model, LoRA(rank=2))
            network.load_state_dict({"lin.down": down, "lin.up": up})
            ((*_, adapter),) = network.adapters()
            params = adapter(x).params
            merged = adapter.algorithm.delta(params, (30, 24)).detach().double()
        else:
            network = lycoris.create_lycoris(model, 1.0, algo="lora", linear_dim=2, linear_alpha=2.0)
            network.apply_to()
            (lora,) = network.loras
            with torch.no_grad():
                lora.lora_down.weight.copy_(down)
                lora.lora_up.weight.copy_(up)
                merged = lora.bfloat16().get_merged_weight(1.0, (30, 24), "cpu")[0].double() - base
        exact = (up @ down).double()
        errors.append(float((merged - exact).norm() / exact.norm()))
    assert errors[0] < 0.01
    assert errors[1] > 0.5


def test_strength_zero_is_the_base_for_dora(tmp_path: Path) -> None:
    """Their multiplier interpolates the magnitude only: at 0 the inner delta stays. Ours scales the whole deviation."""
    model, network = ours(DoRA(LoRA(rank=2, alpha=1.0)), tmp_path / "a.safetensors", "lin")
    base = outputs(model_of("lin"))["lin"]
    other, reader = read_by_them(tmp_path / "a.safetensors", "lin", multiplier=0.0)
    reader.set_multiplier(0.0)
    network.strength = 0
    assert torch.equal(outputs(model)["lin"], base)
    assert not torch.allclose(outputs(other)["lin"], base, atol=1e-2)


def test_d7_merging_while_applied_counts_twice_there(tmp_path: Path) -> None:
    """D7: merged weight plus applied adapter. Ours rests while it is merged."""
    model, network = ours(LoRA(rank=2, alpha=1.0), tmp_path / "a.safetensors", "lin")
    other, reader = read_by_them(tmp_path / "a.safetensors", "lin")
    base, want = outputs(model_of("lin"))["lin"], outputs(model)["lin"]
    network.merge()
    reader.merge_to()
    torch.testing.assert_close(outputs(model)["lin"], want, rtol=1e-4, atol=1e-5)
    assert torch.allclose(outputs(other)["lin"] - base, 2 * (want - base), atol=0.1)


def test_d11_alpha_of_a_file_is_obeyed(tmp_path: Path) -> None:
    """D11: a file of alpha 16 in a network made with alpha 1: theirs runs it 16 times too weak."""
    model, network = ours(LoRA(rank=2, alpha=16.0), tmp_path / "a.safetensors", "lin")
    base, want = outputs(model_of("lin"))["lin"], outputs(model)["lin"]
    other, reader = theirs("lin", linear_alpha=1.0)
    reader.load_weights(str(tmp_path / "a.safetensors"))
    torch.testing.assert_close(outputs(other)["lin"] - base, (want - base) / 16, rtol=1e-3, atol=1e-4)
    again = model_of("lin")
    nerine.load(nerine.attach(again, LoRA(rank=2, alpha=1.0)), tmp_path / "a.safetensors")
    torch.testing.assert_close(outputs(again)["lin"], want)
    network.detach()


def test_d16_circular_padding_is_the_layers_own(tmp_path: Path) -> None:
    """D16: their forward pads with zeros what their merge pads around."""
    x = torch.randn(1, 12, 5, 6)

    def circular() -> nn.ModuleDict:
        torch.manual_seed(0)
        return nn.ModuleDict({"conv": nn.Conv2d(12, 20, 3, padding=1, padding_mode="circular")})

    model = circular()
    network = nerine.attach(model, LoRA(rank=2, alpha=1.0))
    stir(network.parameters())
    nerine.save(network, tmp_path / "a.safetensors")
    other = circular()
    reader, _ = lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "a.safetensors"), other)
    reader.apply_to()
    want = model["conv"](x)
    wrong = other["conv"](x)
    network.merge()
    torch.testing.assert_close(model["conv"](x), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(wrong[..., 1:-1, 1:-1], want[..., 1:-1, 1:-1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wrong, want, atol=1e-2)


def test_d20_rows_of_zeros_can_learn() -> None:
    """D20: a zero-initialised layer under DoRA gets no gradient at all there; here its rows are additive."""
    x = torch.randn(3, 24)

    def silent() -> nn.ModuleDict:
        model = model_of("lin")
        nn.init.zeros_(model["lin"].weight)
        return model

    model, other = silent(), silent()
    network = nerine.attach(model, DoRA(LoRA(rank=2, alpha=1.0)))
    reader = lycoris.create_lycoris(other, 1.0, algo="lora", linear_dim=2, linear_alpha=1.0, dora_wd=True)
    reader.apply_to()
    (model["lin"](x) - 1).square().sum().backward()
    (other["lin"](x) - 1).square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in network.parameters())
    assert not any(p.grad is not None and p.grad.any() for p in reader.parameters())


def test_d21_colliding_names_are_an_error() -> None:
    """D21: `a_b` and `a.b` get one name; there the second is skipped without a word."""

    def colliding() -> nn.ModuleDict:
        return nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(4, 3)}), "a_b": nn.Linear(4, 3)})

    reader = lycoris.create_lycoris(colliding(), 1.0, algo="lora", linear_dim=2)
    assert len(reader.loras) == 1
    network = nerine.attach(colliding(), LoRA(rank=2))
    assert len(network) == 2
    with pytest.raises(nerine.FormatError, match="would both be called lycoris_a_b"):
        nerine.save(network, "never.safetensors")


@pytest.mark.parametrize(
    "algorithm",
    [
        DoRA(LoRA(rank=2, alpha=1.0), axis="in"),  # D23: the axis is not saved, the default assumed
        DoRA(LoHa(rank=2, alpha=1.0), axis="in"),
        DoRA(LoKr(rank=1, alpha=2.0), axis="in"),
        LoKr(rank=1, alpha=2.0, unbalanced=True),  # D24: shapes are guessed again from the balanced rule
        LoKr(rank=1, alpha=2.0, tucker=True),
    ],
    ids=str,
)
def test_d23_d24_what_they_write_they_cannot_reload_and_we_can(algorithm: Any, tmp_path: Path) -> None:
    model, _ = ours(algorithm, tmp_path / "a.safetensors", "conv")
    with pytest.raises((RuntimeError, AttributeError)):
        read_by_them(tmp_path / "a.safetensors", "conv")
    again = model_of("conv")
    nerine.load(again, tmp_path / "a.safetensors", strict=True)
    assert torch.equal(outputs(again)["conv"], outputs(model)["conv"])


def test_d27_a_file_without_alpha(tmp_path: Path) -> None:
    """D27: float(None) there; here alpha is the rank, and the report says so."""
    ours(LoRA(rank=2), tmp_path / "a.safetensors", "lin")
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    del tensors["lycoris_lin.alpha"]
    safetensors.torch.save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(TypeError):
        read_by_them(tmp_path / "b.safetensors", "lin")
    network = nerine.load(model_of("lin"), tmp_path / "b.safetensors")
    assert network.report.rows[0].note == "no alpha in the file: read as the rank"


def test_d28_alpha_is_not_rounded(tmp_path: Path) -> None:
    """D28: casting a file casts alpha as well there, and with it the strength of everything."""
    _, reader = theirs("lin", linear_alpha=154.43)
    reader.save_weights(str(tmp_path / "a.safetensors"), torch.bfloat16, {})
    assert safetensors.torch.load_file(tmp_path / "a.safetensors")["lycoris_lin.alpha"].item() == 154.0
    ours(LoRA(rank=2, alpha=154.43), tmp_path / "b.safetensors", "lin", dtype=torch.bfloat16)
    alpha = safetensors.torch.load_file(tmp_path / "b.safetensors")["lycoris_lin.alpha"].item()
    assert alpha == pytest.approx(154.43, rel=1e-6)


def test_d33_an_unknown_option_is_an_error() -> None:
    """D33: `weight_decompose` is accepted and ignored there."""
    _, reader = theirs("lin", weight_decompose=True)
    assert not any("dora" in name for name, _ in reader.named_parameters())
    with pytest.raises(nerine.OptionError, match="has no setting 'weight_decompose'"):
        LoRA(rank=2, weight_decompose=True)
