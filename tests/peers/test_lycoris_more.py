"""LyCORIS 4.1.3 again, for everything beside LoRA, LoHa and LoKr: files both ways, differences, and its defects.

A test named after a D-number shows what LyCORIS computes there (its number is asserted) and that nerine does not.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import nerine
from nerine.algorithms import BOFT, IA3, DiagOFT, DyLoRA, Full, GLoRA, Norm, Params, TLoRA
from peers.stirred import stir

lycoris = pytest.importorskip("lycoris", reason="needs lycoris-lora: pip install 'nerine[peers]'")

from lycoris.functional import boft as functional_boft  # noqa: E402
from lycoris.functional import lokr as functional_lokr  # noqa: E402
from lycoris.modules.boft import ButterflyOFTModule  # noqa: E402
from lycoris.modules.diag_oft import DiagOFTModule  # noqa: E402
from lycoris.modules.dylora import DyLoraModule  # noqa: E402
from lycoris.modules.glora import GLoRAModule  # noqa: E402
from lycoris.modules.ia3 import IA3Module  # noqa: E402
from lycoris.modules.norms import NormModule  # noqa: E402
from lycoris.modules.tlora import TLoraModule, clear_timestep_mask, compute_timestep_mask, set_timestep_mask  # noqa: E402

pytestmark = [pytest.mark.peers, pytest.mark.no_device_guard]
CLOSE = 1e-5  # of the deviation's norm, in fp32

INPUTS = {
    "lin": (3, 18),
    "bare": (3, 18),
    "conv": (2, 12, 5, 6),
    "one": (2, 12, 4, 3),
    "long": (2, 6, 9),
    "grouped": (2, 12, 5, 6),
    "layer": (3, 5, 12),
    "group": (2, 12, 4),
}
LAYERS = ("lin", "conv", "one", "long")
GROUPED = (*LAYERS, "grouped")  # BOFT mixes the outputs of its two groups


def model_of(*names: str) -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = {
        "lin": nn.Linear(18, 24),
        "bare": nn.Linear(18, 24, bias=False),
        "conv": nn.Conv2d(12, 16, 3, padding=1, stride=2),
        "one": nn.Conv2d(12, 16, 1),
        "long": nn.Conv1d(6, 8, 3, dilation=2, padding=2, bias=False),
        "grouped": nn.Conv2d(12, 16, 3, groups=2),
        "layer": nn.LayerNorm(12),
        "group": nn.GroupNorm(3, 12),
    }
    with torch.no_grad():
        for norm in ("layer", "group"):
            layers[norm].weight.add_(0.2 * torch.randn(12))
            layers[norm].bias.add_(0.2 * torch.randn(12))
    return nn.ModuleDict({name: layers[name] for name in names or LAYERS})


def inputs(*names: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    everything = {name: torch.randn(shape, generator=generator) for name, shape in INPUTS.items()}
    return {name: everything[name] for name in names or LAYERS}


def outputs(model: nn.ModuleDict) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: model[name](x) for name, x in inputs(*model).items()}


def both_faces(network: nerine.Network, model: nn.ModuleDict) -> Iterator[dict[str, Tensor]]:
    """The outputs of nerine through changed weights, and through activations beside the layer."""
    for prefers_weight in (True, False):
        for *_, adapter in network.adapters():
            adapter.prefers_weight = prefers_weight
        yield outputs(model)


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    for name, y in want.items():
        assert (y - base[name]).norm() > 1e-2 * base[name].norm(), f"{name}: nothing to compare"
        error = float((got[name] - y).norm() / (y - base[name]).norm())
        assert error < CLOSE, f"{name}: {error:.1e}"


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((got - want).norm() <= tolerance * want.norm())


def ours(algorithm: Any, file: Path, *names: str, **options: Any) -> tuple[nn.ModuleDict, nerine.Network]:
    """A model with stirred adapters (in eval mode, for DyLoRA draws while it trains), saved to `file`."""
    model = model_of(*names)
    network = nerine.attach(model, algorithm, **options).eval()
    stir(network.parameters())
    nerine.save(network, file)
    return model, network


def theirs(*names: str, algo: str, **options: Any) -> tuple[nn.ModuleDict, Any]:
    """A model with LyCORIS's stirred adapters applied."""
    model = model_of(*names)
    settings = {"linear_dim": 4, "linear_alpha": 3.0, "conv_dim": 4, "conv_alpha": 3.0, **options}
    network = lycoris.create_lycoris(model, 1.0, algo=algo, **settings)
    network.apply_to()
    stir(network.parameters())
    return model, network


def module_of(kind: Any, name: str, *args: Any, **options: Any) -> tuple[nn.ModuleDict, Any]:
    """One layer with a stirred module of LyCORIS made by hand, for settings that its networks do not pass on."""
    model = model_of(name)
    module = kind(f"lycoris_{name}", model[name], 1.0, *args, **options)
    module.apply_to()
    stir(module.parameters())
    return model, module


def save_module(module: Any, file: Path) -> None:
    tensors = {f"{module.lora_name}.{key}": t.detach().contiguous() for key, t in module.state_dict().items()}
    safetensors.torch.save_file(tensors, file)


def read_by_them(file: Path, *names: str, multiplier: float = 1.0) -> tuple[nn.ModuleDict, Any]:
    model = model_of(*names)
    network, _ = lycoris.create_lycoris_from_weights(multiplier, str(file), model)
    assert len(network.loras) == len(model)
    network.apply_to()
    return model, network


def read_by_us(file: Path, *names: str, **options: Any) -> tuple[nn.ModuleDict, nerine.Network]:
    model = model_of(*names)
    return model, nerine.load(model, file, strict=True, **options)


# -- files that nerine writes ----------------------------------------------------------------------------------------
EXACT = ("lin", "one")  # T-LoRA of LyCORIS knows no kernels
READABLE: list[tuple[Any, tuple[str, ...]]] = [
    (GLoRA(rank=4, alpha=3.0), LAYERS),
    (GLoRA(rank=4, alpha=3.0, rs=True), LAYERS),
    (GLoRA(rank=20, alpha=3.0, scalar=True), LAYERS),
    (Full(), (*GROUPED, "bare")),
    (Norm(), ("layer", "group")),
    (DyLoRA(rank=4, alpha=3.0, block_size=2), GROUPED),
    (TLoRA(rank=4, alpha=3.0), EXACT),
    *((DiagOFT(block_size=3, constraint=c, rescale=r), GROUPED) for c in (0.0, 0.02, 1.0) for r in (False, True)),
    *((BOFT(block_size=6, constraint=c, rescale=r), GROUPED) for c in (0.0, 0.02, 1.0) for r in (False, True)),
    (BOFT(block_size=2), ("conv", "one", "long")),
]


@pytest.mark.parametrize(("algorithm", "names"), READABLE, ids=str)
def test_they_read_what_we_write(algorithm: Any, names: tuple[str, ...], tmp_path: Path) -> None:
    model, network = ours(algorithm, tmp_path / "a.safetensors", *names)
    other, _ = read_by_them(tmp_path / "a.safetensors", *names)
    for got in both_faces(network, model):
        assert_same(got, outputs(other), outputs(model_of(*names)))


def test_the_constraints_of_these_tests_bind(tmp_path: Path) -> None:
    """Of the bounds above, 0.02 shrinks every rotation and 1.0 none."""
    found = {}
    for bound in (0.0, 0.02, 1.0):
        found[bound] = outputs(ours(DiagOFT(block_size=3, constraint=bound), tmp_path / "a.safetensors")[0])
    for name in LAYERS:
        assert torch.equal(found[0.0][name], found[1.0][name])
        assert not torch.allclose(found[0.0][name], found[0.02][name], atol=1e-2)


GRADIENTS = [GLoRA(rank=4, alpha=3.0), DiagOFT(block_size=3, rescale=True), BOFT(block_size=6, constraint=0.02)]


@pytest.mark.parametrize("name", ["lin", "conv"])
@pytest.mark.parametrize("algorithm", [*GRADIENTS, TLoRA(rank=4, alpha=3.0)], ids=str)
def test_gradients_are_theirs(algorithm: Any, name: str, tmp_path: Path) -> None:
    if isinstance(algorithm, TLoRA):
        name = {"conv": "one"}.get(name, name)
    model, _ = ours(algorithm, tmp_path / "a.safetensors", name)
    other, network = read_by_them(tmp_path / "a.safetensors", name)
    x = inputs(name)[name]
    adapter = model[name].nerine["default"]
    adapter.prefers_weight = False
    for m in (model, other):
        m[name](x).square().sum().backward()
    (module,) = network.loras
    layout = adapter.algorithm.layout_of(adapter.names)
    for key, parameter in adapter.named_parameters(recurse=False):
        want = operator.attrgetter(layout.specs[key].key)(module).grad
        assert want.norm() > 0
        assert close(parameter.grad, want, 1e-4), key


# -- files that LyCORIS writes ---------------------------------------------------------------------------------------
WRITTEN: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"algo": "glora"}, LAYERS),
    ({"algo": "glora", "use_scalar": True}, LAYERS),
    ({"algo": "glora", "linear_dim": 40, "conv_dim": 40}, LAYERS),
    ({"algo": "full"}, (*GROUPED, "bare")),
    ({"algo": "full", "train_norm": True}, ("lin", "layer", "group")),
    ({"algo": "ia3"}, GROUPED),
    ({"algo": "tlora"}, EXACT),
    *(({"algo": "diag-oft", "constraint": c, "rescaled": r}, GROUPED) for c in (0.0, 0.02, 1.0) for r in (False, True)),
    *(
        ({"algo": "boft", "linear_dim": 6, "conv_dim": 6, "constraint": c, "rescaled": r}, GROUPED)
        for c in (0.0, 0.02, 1.0)
        for r in (False, True)
    ),
]


@pytest.mark.parametrize(("options", "names"), WRITTEN, ids=str)
def test_we_read_what_they_write(options: dict[str, Any], names: tuple[str, ...], tmp_path: Path) -> None:
    model, network = theirs(*names, **options)
    assert len(network.loras) == len(names)
    want = outputs(model)
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
    base = outputs(model_of(*names))
    again, reader = read_by_us(tmp_path / "a.safetensors", *names)
    for got in both_faces(reader, again):
        assert_same(got, want, base)


@pytest.mark.parametrize("name", LAYERS)
def test_we_read_their_ia3_on_inputs(name: str, tmp_path: Path) -> None:
    model, module = module_of(IA3Module, name, train_on_input=True)
    want = outputs(model)
    save_module(module, tmp_path / "a.safetensors")
    again, network = read_by_us(tmp_path / "a.safetensors", name)
    assert_same(outputs(again), want, outputs(model_of(name)))
    assert network.report.rows[0].algorithm == "IA3"


def test_our_ia3_on_inputs_is_marked_as_theirs(tmp_path: Path) -> None:
    for on_input in (False, True):
        ours(IA3(on_input=on_input), tmp_path / "a.safetensors", "lin", "conv")
        tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
        _, module = module_of(IA3Module, "conv", train_on_input=on_input)
        for key, t in module.state_dict().items():
            own = tensors[f"lycoris_conv.{key}"]
            assert (own.shape, own.dtype) == (t.shape, t.dtype)
        assert int(tensors["lycoris_lin.on_input"]) == on_input


def test_we_read_their_dylora(tmp_path: Path) -> None:
    """With blocks of one rank, their scale for the last block is that of the file; `up` is 2-D for convolutions."""
    _, network = theirs(algo="dylora", block_size=1)
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
    assert safetensors.torch.load_file(tmp_path / "a.safetensors")["lycoris_conv.lora_up.weight"].dim() == 2
    again, reader = read_by_us(tmp_path / "a.safetensors")
    base = model_of()
    reader.merge()
    for module, name in zip(network.loras, LAYERS, strict=True):
        want, _ = module.get_diff_weight(rank=3)
        assert close(again[name].weight - base[name].weight, want, 1e-5)
    assert not any(row.note for row in reader.report.rows)


@pytest.mark.parametrize(("rank", "low", "power"), [(4, 1, 1.0), (11, 3, 1.5), (16, 1, 2.0)])
def test_their_timestep_mask_is_our_gate(rank: int, low: int, power: float) -> None:
    """The ranks of T-LoRA that take part, at every timestep."""
    algorithm = TLoRA(rank=rank, min_rank=low, power=power)
    p = Params({"q": torch.zeros(rank, 3), "lambda": torch.zeros(1, rank)})
    gates = algorithm.gate(p, torch.arange(1001))
    for timestep in range(1001):
        mask = compute_timestep_mask(timestep, 1000, rank, low, alpha=power)[0]
        assert torch.equal(gates[timestep], mask)
        assert torch.equal(algorithm.gate(p, torch.tensor(timestep)), mask)


def test_outputs_at_a_timestep_are_theirs(tmp_path: Path) -> None:
    """T-LoRA in training, told the timestep."""
    algorithm = TLoRA(rank=4, alpha=3.0, power=1.5)
    model, network = ours(algorithm, tmp_path / "a.safetensors", "lin")
    other, _ = read_by_them(tmp_path / "a.safetensors", "lin")
    base = outputs(model_of("lin"))
    network.train()
    seen = set()
    for timestep in (0, 10, 300, 500, 900, 1000):
        mask = compute_timestep_mask(timestep, 1000, 4, 1, alpha=1.5)
        set_timestep_mask(mask)
        try:
            want = outputs(other)
        finally:
            clear_timestep_mask()
        network.set_timestep(timestep)
        assert_same(outputs(model), want, base)
        seen.add(int(mask.sum()))
    assert seen == {1, 2, 3, 4}


HALF = [GLoRA(rank=4, alpha=3.0), Full(), DiagOFT(block_size=3, constraint=0.3, rescale=True), BOFT(block_size=6)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("algorithm", HALF, ids=str)
def test_they_read_our_half_precision(algorithm: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """Alpha, which is the bound of a rotation, is not rounded."""
    _, network = ours(algorithm, tmp_path / "a.safetensors")
    nerine.save(network, tmp_path / "a.safetensors", dtype=dtype)
    other, _ = read_by_them(tmp_path / "a.safetensors", *LAYERS)
    again, _ = read_by_us(tmp_path / "a.safetensors")
    assert_same(outputs(other), outputs(again), outputs(model_of()))


@pytest.mark.parametrize("algo", ["glora", "full", "ia3", "diag-oft", "boft"])
def test_we_read_their_half_precision(algo: str, tmp_path: Path) -> None:
    """They round everything, the mark of IA3 among it."""
    model, network = theirs(algo=algo, linear_dim=6, conv_dim=6, constraint=0.25)
    want, base = outputs(model), outputs(model_of())
    network.save_weights(str(tmp_path / "a.safetensors"), torch.bfloat16, {})
    again, _ = read_by_us(tmp_path / "a.safetensors")
    for name, y in outputs(again).items():
        assert close(y - base[name], want[name] - base[name], 0.02)


def test_a_bias_alone_is_read(tmp_path: Path) -> None:
    """Some trainers write `diff_b` without `diff`, which LyCORIS does not know: it fails on the whole file."""
    shift = torch.randn(24)
    safetensors.torch.save_file({"lycoris_lin.diff_b": shift}, tmp_path / "a.safetensors")
    with pytest.raises(AttributeError, match="make_module_from_state_dict"):
        read_by_them(tmp_path / "a.safetensors", "lin")
    model, network = read_by_us(tmp_path / "a.safetensors", "lin")
    want = outputs(model_of("lin"))["lin"] + shift
    torch.testing.assert_close(outputs(model)["lin"], want)
    network.merge()
    torch.testing.assert_close(outputs(model)["lin"], want)


def test_a_bias_for_a_layer_that_has_none(tmp_path: Path) -> None:
    """They apply it, as a new bias. Ours adds it too, and what it merges to is what it computed, or a refusal."""
    diff, shift = torch.randn(24, 18), torch.randn(24)
    safetensors.torch.save_file({"lycoris_bare.diff": diff, "lycoris_bare.diff_b": shift}, tmp_path / "a.safetensors")
    other, _ = read_by_them(tmp_path / "a.safetensors", "bare")
    model, network = read_by_us(tmp_path / "a.safetensors", "bare")
    want = outputs(other)
    assert_same(outputs(model), want, outputs(model_of("bare")))
    try:
        network.merge()
    except nerine.MergeError:
        return
    assert_same(outputs(model), want, outputs(model_of("bare")))


def test_an_offset_for_a_norm_that_has_none(tmp_path: Path) -> None:
    """It is not left out without a word: it acts, or the file is refused, or the report says so."""
    change = {"lycoris_norm.w_norm": torch.randn(12), "lycoris_norm.b_norm": torch.randn(12)}
    safetensors.torch.save_file(change, tmp_path / "a.safetensors")
    model = nn.ModuleDict({"norm": nn.LayerNorm(12, bias=False)})
    try:
        network = nerine.load(model, tmp_path / "a.safetensors", strict=True)
    except nerine.NerineError:
        return
    x = torch.randn(3, 12)
    want = nn.functional.layer_norm(x, (12,), 1 + change["lycoris_norm.w_norm"], change["lycoris_norm.b_norm"])
    said = [*network.report.notes, *(row.note for row in network.report.rows), *network.report.unmatched]
    assert close(model["norm"](x).detach(), want) or any("b_norm" in text for text in said)


# -- the old layout of GLoRA -----------------------------------------------------------------------------------------
def with_old_keys(file: Path, target: Path) -> dict[str, Tensor]:
    """The same adapter as files before 2024 have it: a1 and a2 are exchanged, and b1 and b2."""
    swap = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    tensors = {}
    for key, t in safetensors.torch.load_file(file).items():
        stem, _, suffix = key.partition(".")
        first, _, rest = suffix.partition(".")
        tensors[f"{stem}.{swap[first]}.{rest}" if first in swap else key] = t
    safetensors.torch.save_file(tensors, target)
    return tensors


def test_glora_of_the_old_layout(tmp_path: Path) -> None:
    """delta = alpha/r·((W·a2)·a1 + b2·b1), as the readers of that time have it; LyCORIS 4 refuses the file."""
    ours(GLoRA(rank=4, alpha=3.0), tmp_path / "new.safetensors", "lin", "conv")
    old = with_old_keys(tmp_path / "new.safetensors", tmp_path / "old.safetensors")
    with pytest.raises(RuntimeError, match="must match the size"):
        read_by_them(tmp_path / "old.safetensors", "lin", "conv")
    model, network = read_by_us(tmp_path / "old.safetensors", "lin", "conv")
    other, _ = read_by_them(tmp_path / "new.safetensors", "lin", "conv")
    base = model_of("lin", "conv")
    assert_same(outputs(model), outputs(other), outputs(base))
    network.merge()
    for name in ("lin", "conv"):
        t = {key: old[f"lycoris_{name}.{key}.weight"].flatten(1) for key in ("a1", "a2", "b1", "b2")}
        weight = base[name].weight
        inner = torch.einsum("oi...,ij->oj...", weight, t["a2"] @ t["a1"])
        delta = 3 / 4 * (inner + (t["b2"] @ t["b1"]).reshape(weight.shape))
        assert close(model[name].weight - weight, delta, 1e-5)


def test_glora_whose_layout_its_shapes_do_not_tell(tmp_path: Path) -> None:
    """Rank = inputs = outputs: both layouts fit, and the newer one is taken, as LyCORIS does; the report says so."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"sq": nn.Linear(5, 5)})
    plain = {k: t.clone() for k, t in model.state_dict().items()}
    network = nerine.attach(model, GLoRA(rank=5, alpha=3.0))
    stir(network.parameters())
    nerine.save(network, tmp_path / "a.safetensors")
    x = torch.randn(3, 5)
    want = model["sq"](x)
    other, again = (nn.ModuleDict({"sq": nn.Linear(5, 5)}) for _ in range(2))
    for m in (other, again):
        m.load_state_dict(plain)
    reader, _ = lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "a.safetensors"), other)
    reader.apply_to()
    report = nerine.load(again, tmp_path / "a.safetensors", strict=True).report
    torch.testing.assert_close(again["sq"](x), want)
    torch.testing.assert_close(other["sq"](x), want)
    assert "older layout" in report.rows[0].note


# -- strength --------------------------------------------------------------------------------------------------------
LINEAR = [
    (GLoRA(rank=4, alpha=3.0), LAYERS),
    (Full(), LAYERS),
    (Norm(), ("layer", "group")),
    (TLoRA(rank=4, alpha=3.0), EXACT),
    (DiagOFT(block_size=3, constraint=0.02), LAYERS),
]


@pytest.mark.parametrize("strength", [0.4, -1.0])
@pytest.mark.parametrize(("algorithm", "names"), LINEAR, ids=str)
def test_their_multiplier_is_our_strength(
    algorithm: Any, names: tuple[str, ...], strength: float, tmp_path: Path
) -> None:
    model, network = ours(algorithm, tmp_path / "a.safetensors", *names)
    network.strength = strength
    other, _ = read_by_them(tmp_path / "a.safetensors", *names, multiplier=strength)
    for got in both_faces(network, model):
        assert_same(got, outputs(other), outputs(model_of(*names)))


def test_rescale_goes_with_the_strength() -> None:
    """A difference on purpose: their multiplier leaves `rescale` as it is, and 0 is not the base. Ours is linear."""
    for kind, algorithm in ((DiagOFTModule, DiagOFT), (ButterflyOFTModule, BOFT)):
        other, module = module_of(kind, "lin", 6, rescaled=True)
        model = model_of("lin")
        size = module.oft_blocks.shape[-1]
        network = nerine.attach(model, algorithm(block_size=size, rescale=True))
        network.load_state_dict({"lin.blocks": module.oft_blocks.detach(), "lin.rescale": module.rescale.detach()})
        base = outputs(model_of("lin"))["lin"]
        full = outputs(model)["lin"]
        assert close(outputs(other)["lin"], full)
        network.strength = 0
        assert torch.equal(outputs(model)["lin"], base)
        network.strength = 0.5
        torch.testing.assert_close(outputs(model)["lin"], (base + full) / 2)
        module.multiplier = 0.0
        bias = model["lin"].bias.detach()
        wrong = (base - bias) * module.rescale.detach().flatten() + bias
        assert close(outputs(other)["lin"], wrong)
        assert not close(wrong, base, 0.1)


def test_boft_is_not_interpolated_stage_by_stage(tmp_path: Path) -> None:
    """A difference on purpose: their multiplier acts on each stage, so that its effect is a polynomial of it.

    Ours is W + s·(W' - W), as for every algorithm, and so are stacking and merging.
    """
    model, network = ours(BOFT(block_size=6), tmp_path / "a.safetensors", "lin")
    base, full = outputs(model_of("lin"))["lin"], outputs(model)["lin"]
    other, reader = read_by_them(tmp_path / "a.safetensors", "lin", multiplier=0.5)
    network.strength = 0.5
    torch.testing.assert_close(outputs(model)["lin"], (base + full) / 2)
    assert not close(outputs(other)["lin"] - base, (full - base) / 2, 0.05)
    reader.set_multiplier(0.0)  # with no stages turned, and no rescale, they are at the base as well
    torch.testing.assert_close(outputs(other)["lin"], base)


# -- other differences on purpose ------------------------------------------------------------------------------------
def test_ia3_leaves_the_bias(tmp_path: Path) -> None:
    """Their bypass mode multiplies the bias as well, their default and their merge do not. Ours never does."""
    other, module = module_of(IA3Module, "lin")
    want = outputs(other)
    module.bypass_mode = True
    bypassed = outputs(other)["lin"]
    save_module(module, tmp_path / "a.safetensors")
    model, network = read_by_us(tmp_path / "a.safetensors", "lin")
    assert_same(outputs(model), want, outputs(model_of("lin")))
    bias = model["lin"].bias.detach()
    torch.testing.assert_close(bypassed - want["lin"], (bias * module.weight.detach()).expand(3, -1))
    network.merge()
    assert torch.equal(model["lin"].bias, bias)
    assert_same(outputs(model), want, outputs(model_of("lin")))


@pytest.mark.parametrize(("kind", "algorithm"), [(DiagOFTModule, DiagOFT), (ButterflyOFTModule, BOFT)])
def test_rotations_leave_the_bias(kind: Any, algorithm: Any, tmp_path: Path) -> None:
    """The same for rotations (D16): their bypass mode turns the bias, their default and their merge do not."""
    other, module = module_of(kind, "lin", 6)
    want = outputs(other)
    module.bypass_mode = True
    bypassed = outputs(other)["lin"]
    save_module(module, tmp_path / "a.safetensors")
    model, network = read_by_us(tmp_path / "a.safetensors", "lin")
    assert [type(adapter.algorithm) for *_, adapter in network.adapters()] == [algorithm]
    assert_same(outputs(model), want, outputs(model_of("lin")))
    network.detach()
    bias = model["lin"].bias
    with torch.no_grad():  # the turn of the bias alone: that of a layer whose output is its bias
        model["lin"].weight.copy_(bias[:, None].expand(-1, 18))
        nerine.load(model, tmp_path / "a.safetensors").merge()
    turned = model["lin"].weight[:, 0].detach()
    torch.testing.assert_close(bypassed - want["lin"], (turned - bias.detach()).expand(3, -1), rtol=1e-4, atol=1e-5)
    assert not close(turned, bias.detach(), 0.1)


def test_block_size_means_the_size_of_a_block(tmp_path: Path) -> None:
    """Their `dim` is a hint, of which the smaller factor becomes the size: 8 of 24 outputs gives 8 blocks of 3.

    Ours is the size itself, or the nearest that fits, which the report then names. They cannot reload a file whose
    blocks are larger than their number.
    """
    _, module = module_of(DiagOFTModule, "lin", 8)
    assert tuple(module.oft_blocks.shape) == (8, 3, 3)
    model, network = ours(DiagOFT(block_size=8), tmp_path / "a.safetensors", "lin")
    assert tuple(network.state_dict()["lin.blocks"].shape) == (3, 8, 8)
    with pytest.raises(RuntimeError, match="must match the size"):
        read_by_them(tmp_path / "a.safetensors", "lin")
    again, _ = read_by_us(tmp_path / "a.safetensors", "lin")
    assert torch.equal(outputs(again)["lin"], outputs(model)["lin"])
    uneven = nerine.attach(model_of("lin"), DiagOFT(block_size=7))
    assert any("blocks of 6" in note or "blocks of 8" in note for note in uneven.report.notes)


def test_boft_of_some_stages_reads_as_itself(tmp_path: Path) -> None:
    """They always build all stages, and repeat a single one for all of them without a word; so a file has all, of which
    the missing ones turn nothing, and ours comes back with those that it had."""
    for stages in (1, 2):
        model, _ = ours(BOFT(block_size=6, stages=stages), tmp_path / f"{stages}.safetensors", "lin")
        again, reloaded = read_by_us(tmp_path / f"{stages}.safetensors", "lin")
        assert torch.equal(outputs(again)["lin"], outputs(model)["lin"])
        assert reloaded.state_dict()["lin.blocks"].shape[0] == stages
        other, reader = read_by_them(tmp_path / f"{stages}.safetensors", "lin")
        assert reader.loras[0].oft_blocks.shape[0] == 3
        assert close(outputs(other)["lin"], outputs(model)["lin"])


# -- defects ---------------------------------------------------------------------------------------------------------
def test_d8_loading_full_twice_is_loading_it_once(tmp_path: Path) -> None:
    """D8: their hook adds the difference to the current weight on each load; before `apply_to` the state is -W."""
    model, network = ours(Full(), tmp_path / "a.safetensors", "lin")
    want, base = outputs(model), outputs(model_of("lin"))
    fresh = model_of("lin")
    reader = lycoris.create_lycoris(fresh, 1.0, algo="full")
    (module,) = reader.loras
    torch.testing.assert_close(module.state_dict()["diff"], -fresh["lin"].weight.detach())
    reader.apply_to()
    reader.load_weights(str(tmp_path / "a.safetensors"))
    assert_same(outputs(fresh), want, base)
    reader.load_weights(str(tmp_path / "a.safetensors"))
    assert close(outputs(fresh)["lin"] - base["lin"], 2 * (want["lin"] - base["lin"]), 1e-4)
    for _ in range(2):
        nerine.load(network, tmp_path / "a.safetensors")
    assert torch.equal(outputs(model)["lin"], want["lin"])


def test_d9_dylora_is_trained_as_it_is_saved(tmp_path: Path) -> None:
    """D9: they divide alpha by the number of blocks drawn: with one block of four ranks, four times the file."""
    other, network = theirs("lin", algo="dylora", block_size=4)
    base, trained = outputs(model_of("lin"))["lin"], outputs(other)["lin"]
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
    saved, _ = read_by_them(tmp_path / "a.safetensors", "lin")
    assert close(trained - base, 4 * (outputs(saved)["lin"] - base))
    model = model_of("lin")
    adapters = nerine.attach(model, DyLoRA(rank=4, alpha=3.0, block_size=4)).train()
    nerine.load(adapters, tmp_path / "a.safetensors")
    assert close(outputs(model)["lin"], outputs(saved)["lin"])
    assert close(outputs(read_by_us(tmp_path / "a.safetensors", "lin")[0])["lin"], outputs(saved)["lin"])


def test_d9_dylora_is_whole_in_eval(tmp_path: Path) -> None:
    """D9: their evaluation and merge draw a random number of ranks at each call. Ours has them all."""
    other, network = theirs("lin", algo="dylora", block_size=1)
    network.eval()
    state = random.getstate()
    try:
        random.seed(0)
        drawn = {float(outputs(other)["lin"].norm()) for _ in range(20)}
        merged = {float(network.loras[0].get_merged_weight()[0].detach().norm()) for _ in range(20)}
    finally:
        random.setstate(state)
    assert len(drawn) == 4
    assert len(merged) == 4
    model, own = ours(DyLoRA(rank=4, alpha=3.0), tmp_path / "a.safetensors", "lin")
    own.eval()
    assert len({float(outputs(model)["lin"].norm()) for _ in range(20)}) == 1


def test_d9_dylora_replays_its_rank_under_checkpointing() -> None:
    """D9: their rank comes from Python's generator, which checkpointing does not restore: wrong gradients."""
    from torch.utils.checkpoint import checkpoint

    def differences(model: nn.ModuleDict, parameters: list[nn.Parameter]) -> int:
        x, found = inputs("lin")["lin"], 0
        for seed in range(8):
            gradients = []
            for way in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
                torch.manual_seed(seed)
                random.seed(seed)
                try:
                    loss = way(model["lin"], x).square().sum()
                    got = torch.autograd.grad(loss, parameters, allow_unused=True)
                except torch.utils.checkpoint.CheckpointError:
                    got = (None,)
                gradients.append([torch.zeros(()) if g is None else g for g in got])
            same = [a.shape == b.shape and torch.allclose(a, b) for a, b in zip(*gradients, strict=False)]
            found += not (all(same) and len(gradients[0]) == len(gradients[1]))
        return found

    state = random.getstate()
    try:
        other, network = theirs("lin", algo="dylora", block_size=1)
        assert differences(other, list(network.parameters())) > 2
        model = model_of("lin")
        own = nerine.attach(model, DyLoRA(rank=4, alpha=3.0)).train()
        stir(own.parameters())
        assert differences(model, list(own.parameters())) == 0
    finally:
        random.setstate(state)


def wide_norm() -> nn.ModuleDict:
    return nn.ModuleDict({"norm": nn.LayerNorm(2000)})


def test_d10_rank_dropout_of_norms_drops_what_it_says() -> None:
    """D10: `rand < p` keeps the p that should go: of 5 % they drop 95 %."""
    x = torch.randn(2, 2000)
    other = wide_norm()
    network = lycoris.create_lycoris(other, 1.0, algo="full", train_norm=True, rank_dropout=0.05)
    (module,) = network.loras
    assert isinstance(module, NormModule)
    network.apply_to()
    model = wide_norm()
    own = nerine.attach(model, Norm(), rank_dropout=0.05).train()
    with torch.no_grad():
        module.w_norm.fill_(1.0)
        next(iter(own.parameters())).fill_(1.0)
        kept = []
        for m in (other, model):
            m.train()
            change = m["norm"](x) / wide_norm()["norm"](x) - 1
            kept.append(float((change.abs() > 0.5).float().mean()))
    assert kept[0] == pytest.approx(0.05, abs=0.02)
    assert kept[1] == pytest.approx(0.95, abs=0.02)


def test_d10_rank_dropout_of_glora_drops_what_it_says() -> None:
    """D10: the same in GLoRA's bypass mode: at p = 0.05 almost nothing is left of the adapter."""
    sizes = []
    x = inputs("lin")["lin"]
    base = outputs(model_of("lin"))["lin"]
    for who in ("theirs", "ours"):
        if who == "theirs":
            model, network = theirs("lin", algo="glora", bypass_mode=True, rank_dropout=0.05, linear_dim=32)
            network.train()
        else:
            model = model_of("lin")
            network = nerine.attach(model, GLoRA(rank=32, alpha=3.0), rank_dropout=0.05).train()
            stir(network.parameters())
        torch.manual_seed(0)
        with torch.no_grad():
            dropped = [float((model["lin"](x) - base).norm()) for _ in range(50)]
            network.eval()
            whole = float((model["lin"](x) - base).norm())
        sizes.append(sum(dropped) / len(dropped) / whole)
    assert sizes[0] < 0.4
    assert sizes[1] == pytest.approx(1.0, abs=0.2)


SILENT = {
    "dropout": {
        "glora": (GLoRA(rank=4, alpha=3.0), {}),
        "full": (Full(), {}),
        "ia3": (IA3(), {}),
        "diag-oft": (DiagOFT(block_size=4), {}),
        "boft": (BOFT(block_size=6), {"linear_dim": 6}),
        "tlora": (TLoRA(rank=4, alpha=3.0), {}),
    },
    "rank_dropout": {
        "glora": (GLoRA(rank=4, alpha=3.0), {}),
        "ia3": (IA3(), {}),
        "boft": (BOFT(block_size=6), {"linear_dim": 6}),
        "tlora": (TLoRA(rank=4, alpha=3.0), {}),
    },
}


@pytest.mark.parametrize(("kind", "algo"), [(kind, algo) for kind, cases in SILENT.items() for algo in cases])
def test_d14_dropout_is_not_silently_left_out(kind: str, algo: str) -> None:
    """D14: in their default mode these take the option and do nothing with it. Here it acts in training alone."""
    algorithm, options = SILENT[kind][algo]
    other, network = theirs("lin", algo=algo, **{kind: 0.5}, **options)
    model = model_of("lin")
    own = nerine.attach(model, algorithm, **{kind: 0.5})
    stir(own.parameters())
    torch.manual_seed(0)
    for m, n, acts in ((other, network, False), (model, own, True)):
        n.eval()
        m.eval()
        still = outputs(m)["lin"]
        n.train()
        m.train()
        assert any(not torch.equal(outputs(m)["lin"], still) for _ in range(5)) == acts


def test_d18_tlora_keeps_what_it_started_with(tmp_path: Path) -> None:
    """D18: their file has no base factors, and they reload as if it had begun on the principal directions.

    Trained on the last ones, the reloaded adapter is off by many times itself. Files of nerine have the base factors;
    a file of theirs is read as they read it, and the report says that this is a guess.
    """
    other, module = module_of(TLoraModule, "lin", 4, 3.0, sig_type="last")
    base, trained = outputs(model_of("lin"))["lin"], outputs(other)["lin"]
    save_module(module, tmp_path / "theirs.safetensors")
    wrong = outputs(read_by_them(tmp_path / "theirs.safetensors", "lin")[0])["lin"]
    assert not close(wrong - base, trained - base, 0.5)
    guessed, network = read_by_us(tmp_path / "theirs.safetensors", "lin")
    assert close(outputs(guessed)["lin"], wrong)
    assert any("no base factors in the file" in note for note in network.report.notes)

    model, _ = ours(TLoRA(rank=4, alpha=3.0, init="last"), tmp_path / "ours.safetensors", "lin")
    again, network = read_by_us(tmp_path / "ours.safetensors", "lin")
    torch.testing.assert_close(outputs(again)["lin"], outputs(model)["lin"])
    assert not network.report.notes
    assert not close(outputs(read_by_them(tmp_path / "ours.safetensors", "lin")[0])["lin"], outputs(model)["lin"], 0.1)


def test_d18_the_guess_is_reported_when_resuming(tmp_path: Path) -> None:
    """D18: copied into a network that is attached already, their file leaves just as much to be guessed."""
    other, network = theirs("lin", algo="tlora")
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
    model = model_of("lin")
    own = nerine.load(nerine.attach(model, TLoRA(rank=4, alpha=3.0, init="last")), tmp_path / "a.safetensors")
    assert_same(outputs(model), outputs(other), outputs(model_of("lin")))
    assert any("no base factors in the file" in note for note in own.report.notes)


def test_d18_tlora_is_right_on_kernels(tmp_path: Path) -> None:
    """D18: their convolutions have 1x1 factors: forward and merge fail, and the weight they would merge has the change
    in one corner of the kernel."""
    other, module = module_of(TLoraModule, "conv", 4, 3.0)
    base = model_of("conv")["conv"].weight
    with pytest.raises(RuntimeError, match="must match the size"):
        outputs(other)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        module.merge_to()
    change = (module.get_merged_weight()[0] - base).detach()
    assert change[..., 0, 0].abs().max() > 0.01
    change[..., 0, 0] = 0
    assert not change.any()
    model, network = ours(TLoRA(rank=4, alpha=3.0), tmp_path / "a.safetensors", "conv")
    want = outputs(model)["conv"]
    network.merge()
    torch.testing.assert_close(outputs(model)["conv"], want, rtol=1e-4, atol=1e-5)
    assert (model["conv"].weight - base).flatten(2).norm(dim=(0, 1)).min() > 0.01  # every tap


def test_d19_glora_stores_the_alpha_that_readers_need(tmp_path: Path) -> None:
    """D19: with rs_lora they train with alpha/√r and store alpha itself: at rank 16, a quarter after reloading."""
    other, module = module_of(GLoRAModule, "lin", 16, 3.0, rs_lora=True)
    base, trained = outputs(model_of("lin"))["lin"], outputs(other)["lin"]
    save_module(module, tmp_path / "a.safetensors")
    reloaded = outputs(read_by_them(tmp_path / "a.safetensors", "lin")[0])["lin"]
    assert close(reloaded - base, (trained - base) / 4)
    model, _ = ours(GLoRA(rank=16, alpha=3.0, rs=True), tmp_path / "b.safetensors", "lin")
    assert float(safetensors.torch.load_file(tmp_path / "b.safetensors")["lycoris_lin.alpha"]) == 12.0
    again, _ = read_by_us(tmp_path / "b.safetensors", "lin")
    torch.testing.assert_close(outputs(again)["lin"], outputs(model)["lin"])


def test_d19_glora_adds_no_second_bias(tmp_path: Path) -> None:
    """D19: the difference that their bypass mode computes has the layer's bias in it."""
    model, network = ours(GLoRA(rank=4, alpha=3.0), tmp_path / "a.safetensors", "lin")
    _, reader = read_by_them(tmp_path / "a.safetensors", "lin")
    bias = model_of("lin")["lin"].bias
    with network.paused():
        base = outputs(model)["lin"]
    deviation = outputs(model)["lin"] - base
    with torch.no_grad():
        leaky = reader.loras[0].bypass_forward_diff(inputs("lin")["lin"])
    torch.testing.assert_close(leaky - bias.detach(), deviation, rtol=1e-4, atol=1e-5)
    assert not close(leaky, deviation, 0.01)


@pytest.mark.parametrize("on_input", [False, True])
def test_d22_ia3_can_be_reloaded(on_input: bool, tmp_path: Path) -> None:
    """D22: no file of IA3, theirs or ours, can be read by LyCORIS: it hands five arguments to a method of four."""
    other, module = module_of(IA3Module, "conv", train_on_input=on_input)
    save_module(module, tmp_path / "theirs.safetensors")
    model, _ = ours(IA3(on_input=on_input), tmp_path / "ours.safetensors", "conv")
    for file, want in (("theirs", outputs(other)), ("ours", outputs(model))):
        with pytest.raises(TypeError, match="positional arguments"):
            read_by_them(tmp_path / f"{file}.safetensors", "conv")
        again, _ = read_by_us(tmp_path / f"{file}.safetensors", "conv")
        assert_same(outputs(again), want, outputs(model_of("conv")))


def test_d25_dylora_can_be_resumed(tmp_path: Path) -> None:
    """D25: the keys of their file are not those of their parameters: nothing is loaded, and the network starts anew."""
    _, network = theirs("lin", algo="dylora", block_size=2)
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
    fresh = model_of("lin")
    again = lycoris.create_lycoris(fresh, 1.0, algo="dylora", linear_dim=4, linear_alpha=3.0, block_size=2)
    again.apply_to()
    state = again.load_weights(str(tmp_path / "a.safetensors"))
    assert any("up_list" in key for key in state["missing keys"])
    base = outputs(model_of("lin"))["lin"]
    torch.testing.assert_close(outputs(fresh)["lin"], base)
    model = model_of("lin")
    own = nerine.attach(model, DyLoRA(rank=4, alpha=3.0, block_size=2)).eval()
    nerine.load(own, tmp_path / "a.safetensors", strict=True)
    assert_same(outputs(model), outputs(read_by_them(tmp_path / "a.safetensors", "lin")[0]), {"lin": base})


def test_d25_their_dylora_of_a_convolution_is_read(tmp_path: Path) -> None:
    """Their own reader takes it for a LoRA and stumbles over its 2-D `up`."""
    _, network = theirs("conv", algo="dylora", block_size=1)
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
    with pytest.raises(RuntimeError, match="broadcast shape"):
        read_by_them(tmp_path / "a.safetensors", "conv")
    assert read_by_us(tmp_path / "a.safetensors", "conv")[1].report.rows[0].rank == 4


def test_d26_a_file_without_a_layer_of_full(tmp_path: Path) -> None:
    """D26: KeyError even where missing keys are allowed. Here the layer is reported, and an error if strict."""
    ours(Full(), tmp_path / "a.safetensors", "lin")
    _, network = theirs("lin", "bare", algo="full")
    with pytest.raises(KeyError):
        network.load_weights(str(tmp_path / "a.safetensors"))
    own = nerine.attach(model_of("lin", "bare"), Full())
    assert nerine.load(own, tmp_path / "a.safetensors").report.missing == ("bare",)
    with pytest.raises(nerine.FormatError, match="bare"):
        nerine.load(own, tmp_path / "a.safetensors", strict=True)


def test_d26_full_leaves_the_layer_its_weight() -> None:
    """D26: they take `weight` off the layer; models that look at `layer.weight.dtype` (T5) fail."""
    other, _ = theirs("lin", algo="full")
    with pytest.raises(AttributeError, match="weight"):
        _ = other["lin"].weight
    model = model_of("lin")
    before = model["lin"].weight
    stir(nerine.attach(model, Full()).parameters())
    assert model["lin"].weight is before


class Transformer2DModel(nn.Module):
    """A class that the trainer's preset asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(18, 24)


@pytest.mark.parametrize(
    ("algo", "algorithm", "carriers"),
    [
        ("glora", GLoRA(rank=4), {"a2", "b2"}),
        ("dylora", DyLoRA(rank=4), {"up"}),
        ("tlora", TLoRA(rank=4), {"lambda"}),
    ],
)
def test_d35_lora_plus_reaches_every_algorithm(algo: str, algorithm: Any, carriers: set[str]) -> None:
    """D35: they give the higher rate to tensors whose name has `lora_up` in it, and so to none of these."""
    kohya = pytest.importorskip("lycoris.kohya")

    def groups_of(algo: str) -> list[dict[str, Any]]:
        unet = nn.ModuleDict({"block": Transformer2DModel()})
        network = kohya.create_network(1.0, 4, 1.0, None, None, unet, algo=algo, loraplus_lr_ratio=4, preset="full")
        network.apply_to(None, unet, False, True)
        return list(network.prepare_optimizer_params(None, 0.5)[0])

    assert {group["lr"] for group in groups_of("lora")} == {0.5, 2.0}
    assert {group["lr"] for group in groups_of(algo)} == {0.5}
    own = nerine.attach(nn.ModuleDict({"block": Transformer2DModel()}), algorithm)
    names = {id(p): key.rpartition(".")[2] for key, p in own.named_parameters()}
    groups = {g["lr"]: {names[id(p)] for p in g["params"]} for g in own.param_groups(0.5, lora_plus=4)}
    assert groups.keys() == {0.5, 2.0}
    assert groups[2.0] == carriers


@pytest.mark.parametrize("size", [320, 640, 768, 1280])
def test_d36_boft_finds_a_block_size(size: int) -> None:
    """D36: with `dim` 4 they refuse the widths of every diffusion model. Ours takes the nearest size and says so."""
    with pytest.raises(ValueError, match="impossible to decompose"):
        ButterflyOFTModule("lycoris_lin", nn.Linear(3, size), 1.0, 4)
    model = nn.ModuleDict({"lin": nn.Linear(3, size)})
    network = nerine.attach(model, BOFT(block_size=4))
    stages, blocks, width, _ = network.state_dict()["lin.blocks"].shape
    assert blocks * width == size
    assert blocks & (blocks - 1) == 0
    assert stages == blocks.bit_length()
    assert any(f"blocks of {width}" in note for note in network.report.notes)


def odd_norms() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "plain": nn.LayerNorm(12, elementwise_affine=False),
            "no_bias": nn.LayerNorm(12, bias=False),
            "rms": nn.RMSNorm(12),
            "two": nn.LayerNorm((3, 4)),
        }
    )


def test_d38_norms_of_every_kind(tmp_path: Path) -> None:
    """D38: without an offset or a scale they fail when called, RMSNorm is passed over, two axes do not fit."""
    for name, error in (("plain", AttributeError), ("no_bias", AttributeError), ("two", RuntimeError)):
        other = nn.ModuleDict({name: odd_norms()[name]})
        network = lycoris.create_lycoris(other, 1.0, algo="full", train_norm=True)
        network.apply_to()
        with pytest.raises(error):
            other[name](torch.randn(2, 3, 4) if name == "two" else torch.randn(2, 12))
    other = nn.ModuleDict({"rms": nn.RMSNorm(12)})
    assert not lycoris.create_lycoris(other, 1.0, algo="full", train_norm=True).loras

    model = odd_norms()
    own = nerine.attach(model, Norm())
    assert [path for path, *_ in own.adapters()] == ["no_bias", "rms", "two"]
    assert "no weight of its own" in own.report.skipped["plain"]
    stir(own.parameters())
    nerine.save(own, tmp_path / "a.safetensors")
    again = odd_norms()
    nerine.load(again, tmp_path / "a.safetensors", strict=True)
    for name in ("no_bias", "rms", "two"):
        x = torch.randn(2, 3, 4) if name == "two" else torch.randn(2, 12)
        assert torch.equal(again[name](x), model[name](x))
        assert not torch.allclose(model[name](x), odd_norms()[name](x), atol=1e-2)


@pytest.mark.parametrize("bypass", [True, False], ids=["dilated, bypass", "grouped"])
def test_d40_glora_on_convolutions_with_a_geometry(bypass: bool, tmp_path: Path) -> None:
    """D40: dilated ones fail in their bypass mode, grouped ones in every mode."""

    def conv() -> nn.ModuleDict:
        torch.manual_seed(0)
        more = {"dilation": 2} if bypass else {"groups": 3}
        return nn.ModuleDict({"conv": nn.Conv2d(12, 6, 3, padding=1, **more)})

    x = torch.randn(2, 12, 7, 6)
    other = conv()
    network = lycoris.create_lycoris(other, 1.0, algo="glora", linear_dim=2, bypass_mode=bypass)
    network.apply_to()
    stir(network.parameters())
    with pytest.raises(RuntimeError, match="must match the size" if bypass else "invalid for input of size"):
        other["conv"](x)
    model = conv()
    own = nerine.attach(model, GLoRA(rank=4, alpha=3.0))
    stir(own.parameters())
    want = model["conv"](x)
    own.merge()
    torch.testing.assert_close(model["conv"](x), want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(want, conv()["conv"](x), atol=1e-2)


@pytest.mark.parametrize("algorithm", [DyLoRA(rank=4, alpha=3.0), Full(), IA3(), DiagOFT(block_size=5)], ids=str)
def test_d40_embeddings_and_transposed_convolutions(algorithm: Any) -> None:
    """D40: they pass over both without a word; here both are layers like any other."""

    def layers() -> nn.ModuleDict:
        torch.manual_seed(0)
        return nn.ModuleDict({"emb": nn.Embedding(7, 10), "up": nn.ConvTranspose2d(6, 10, 3, stride=2)})

    assert not lycoris.create_lycoris(layers(), 1.0, algo="lora", linear_dim=2).loras
    model = layers()
    network = nerine.attach(model, algorithm, targets=["emb", "up"]).eval()
    assert [path for path, *_ in network.adapters()] == ["emb", "up"]
    stir(network.parameters())
    x = {"emb": torch.tensor([[0, 3, 6]]), "up": torch.randn(2, 6, 3, 4)}
    want = {name: model[name](x[name]) for name in model}
    network.merge()
    for name, y in want.items():
        torch.testing.assert_close(model[name](x[name]), y, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(y, layers()[name](x[name]), atol=1e-2)


def test_d41_rescaled_oft_at_another_strength(tmp_path: Path) -> None:
    """D41: the difference of a rescaled OFT at a multiplier that is not 1 fails there, by a shape."""
    model, network = ours(DiagOFT(block_size=3, rescale=True), tmp_path / "a.safetensors", "lin")
    _, reader = read_by_them(tmp_path / "a.safetensors", "lin")
    with pytest.raises(RuntimeError, match="must match the size"):
        reader.loras[0].get_diff_weight(0.5)
    whole = outputs(model)["lin"]
    base = outputs(model_of("lin"))["lin"]
    network.strength = 0.5
    network.merge()
    torch.testing.assert_close(outputs(model)["lin"], (whole + base) / 2)


def test_d41_oft_with_dropout() -> None:
    """D41: their bypass mode with dropout fails, by a shape. Here the dropout acts on the deviation."""
    other, network = theirs("lin", algo="diag-oft", bypass_mode=True, dropout=0.5)
    network.train()
    with pytest.raises(RuntimeError, match="must match the size"):
        outputs(other)
    model = model_of("lin")
    own = nerine.attach(model, DiagOFT(block_size=4), dropout=0.5).train()
    stir(own.parameters())
    base = outputs(model_of("lin"))["lin"]
    torch.manual_seed(0)
    assert 0.2 < float(((outputs(model)["lin"] - base) == 0).float().mean()) < 0.8


def test_d41_dylora_beside_the_layer() -> None:
    """D41: their bypass mode of DyLoRA fails whenever it draws fewer ranks than all."""
    other, network = theirs("lin", algo="dylora", block_size=1, bypass_mode=True)
    state = random.getstate()
    try:
        random.seed(0)
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            [outputs(other) for _ in range(20)]
    finally:
        random.setstate(state)
    assert isinstance(network.loras[0], DyLoraModule)
    model = model_of("lin")
    own = nerine.attach(model, DyLoRA(rank=4, alpha=3.0)).train()
    stir(own.parameters())
    torch.manual_seed(0)
    assert len({float(outputs(model)["lin"].norm()) for _ in range(20)}) == 4


def test_d42_settings_that_their_functions_ignore() -> None:
    """D42: `rescale=False` gives a rescale of ones, `full_matrix=True` on a linear layer gives factors.

    Here the settings of an algorithm decide which tensors there are.
    """
    weight = torch.randn(24, 18)
    _, rescale = functional_boft.weight_gen(weight, 6, rescale=False)
    assert rescale is not None
    assert torch.equal(rescale, torch.ones(24, 1))
    with pytest.raises(AttributeError):  # its own default wants a Tucker core of a linear layer
        functional_lokr.weight_gen(weight, 1)
    found = functional_lokr.weight_gen(weight, 1, tucker=False, full_matrix=True)
    assert found[3] is None  # w2 itself, which was asked for
    plain = nerine.attach(model_of("lin"), BOFT(block_size=6))
    assert plain.state_dict().keys() == {"lin.blocks"}
    full = nerine.attach(model_of("lin"), nerine.LoKr(rank=1, full_matrix=True))
    assert full.state_dict().keys() == {"lin.w1", "lin.w2"}


def test_d42_lokr_tucker_beside_the_layer(tmp_path: Path) -> None:
    """D42: their functional bypass of a Tucker LoKr fails, by a shape. Ours is the merged weight."""
    weight = torch.randn(16, 12, 3, 3)
    tensors = [None if t is None else torch.randn(t.shape) for t in functional_lokr.weight_gen(weight, 1, tucker=True)]
    assert tensors[-1] is not None
    with pytest.raises(RuntimeError, match="channels"):
        functional_lokr.bypass_forward_diff(torch.randn(2, 12, 5, 6), None, *tensors)
    model, network = ours(nerine.LoKr(rank=1, alpha=2.0, tucker=True), tmp_path / "a.safetensors", "conv")
    want = outputs(model)["conv"]
    network.merge()
    torch.testing.assert_close(outputs(model)["conv"], want, rtol=1e-4, atol=1e-4)


def test_this_is_the_release_whose_defects_are_shown() -> None:
    """Another release of LyCORIS may have mended some of this; the tests above should then be read anew."""
    assert version("lycoris-lora") == "4.1.3"
