"""Every algorithm on every kind of quantised base: as on an ordinary layer that holds the same values."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import nerine
from contract.cases import ONE_OF_EACH
from nerine.algorithms import Algorithm, DoRA
from nerine.errors import MergeError, TargetError, UnsupportedBase
from nerine.model import mount as mounts
from nerine.model.storage import storage_of
from nerine.testing.battery import stir
from quantised import KINDS, SHAPE, Kind, linear

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*MatMul8bitLt.*"),  # bitsandbytes casts inputs to fp16 and says so
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the packages, in what they import
]
ALGORITHMS = [algorithm for algorithm in ONE_OF_EACH if "linear" in getattr(algorithm, "inner", algorithm).kinds]
LORA = nerine.LoRA(rank=4, alpha=3.0)


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


def values(layer: nn.Module) -> Tensor:
    """What the stored weight of a layer stands for, in fp32."""
    storage = storage_of(layer, layer.weight)
    assert storage is not None
    return storage.read(layer, layer.weight).detach().float()


def plain(layer: nn.Module) -> nn.Linear:
    """An ordinary layer with the values of a quantised one."""
    made = linear()
    made.weight = nn.Parameter(values(layer), requires_grad=False)
    return made


def inputs() -> Tensor:
    return torch.randn(5, SHAPE[1], generator=torch.Generator().manual_seed(3))


def adapted(layer: nn.Module, algorithm: Algorithm, amount: float = 0.1) -> tuple[nn.Sequential, nerine.Network]:
    model = nn.Sequential(layer).eval()
    network = nerine.attach(model, algorithm, targets=nn.Module)
    stir(network, amount=amount)
    return model, network


def change(model: nn.Module, network: nerine.Network) -> tuple[Tensor, dict[str, Tensor]]:
    """What the adapters add, and the gradients of that to the input and to each of their tensors."""
    x = inputs().requires_grad_()
    y = model(x)
    with network.paused():
        d = y - model(x)
    sources = {"x": x, **dict(network.named_parameters())}
    found = torch.autograd.grad((d * torch.linspace(-1, 1.5, d.numel()).reshape(d.shape)).sum(), list(sources.values()))
    return d.detach(), dict(zip(sources, found, strict=True))


def near(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    error, size = float((got - want).norm()), max(float(want.norm()), 1e-9)
    assert error <= tolerance * size, f"{what}: off by {error / size:.2e} of {size:.2e}"


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_adapters_are_those_of_a_plain_layer(kind: Kind, algorithm: Algorithm) -> None:
    model, network = adapted(kind.make(), algorithm)
    other, twin = adapted(plain(model[0]), algorithm)
    twin.load_state_dict(network.state_dict())
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert model(inputs()).dtype is torch.float32
    d, gradients = change(model, network)
    want, wanted = change(other, twin)
    near(d, want, kind.exact, "deviation")
    for name, gradient in gradients.items():
        if wanted[name].norm() < 1e-5 * wanted["x"].norm():  # DoRA undoes what IA3 does to whole rows: only rounding
            assert gradient.norm() < 1e-5 * wanted["x"].norm(), name
            continue
        near(gradient, wanted[name], kind.exact, name)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
@pytest.mark.parametrize("name", ["float8", "bitsandbytes nf4", "torchao int8"])
def test_nothing_read_outlives_its_call(name: str, algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch) -> None:
    model, network = adapted(next(kind for kind in KINDS if kind.name == name).make(), algorithm)
    model.train()
    x = inputs().requires_grad_()
    model(x)
    read: list[StorageWeakRef] = []
    before = mounts._read

    def spy(*args: object) -> Tensor:
        weight = before(*args)
        if weight.untyped_storage().data_ptr() != model[0].weight.data_ptr():
            read.append(StorageWeakRef(weight.untyped_storage()))
        return weight

    monkeypatch.setattr(mounts, "_read", spy)
    y = model(x)
    assert all(one.expired() for one in read)
    y.square().sum().backward()
    assert all(one.expired() for one in read)
    assert all(p.grad is not None for p in network.parameters())


def test_merge_and_exact_unmerge(kind: Kind) -> None:
    model, network = adapted(kind.make(), LORA, amount=0.01)  # a scale beside the weight has little room
    layer, x = model[0], inputs()
    model(x)  # packages move their state in the first call
    stored, before = layer.weight, values(layer)
    with network.paused(), torch.no_grad():
        first = model(x)
    report = network.merge()
    assert layer.weight is not stored
    merged = values(layer)
    with torch.no_grad():
        got = model(x)
    near(got, nn.functional.linear(x, merged, layer.bias), max(kind.exact, 1e-3), "merged forward")
    exact = nerine_weight(before, network)
    error = float((merged - exact).norm() / (exact - before).norm())
    assert report.rows[0][2] == pytest.approx(error, rel=1e-3)
    assert bool(report.lossy) == (error > 0.5) == ("not the adapted one" in str(report))
    network.unmerge()
    assert layer.weight is stored
    assert torch.equal(values(layer), before)
    with network.paused(), torch.no_grad():
        assert torch.equal(model(x), first)


def nerine_weight(weight: Tensor, network: nerine.Network) -> Tensor:
    ((_, _, adapter),) = network.adapters()
    return adapter.algorithm.weight(adapter.folded(), weight).detach()


def test_files_are_those_of_a_plain_base(kind: Kind, tmp_path: Path) -> None:
    model, network = adapted(kind.make(), DoRA(LORA))
    other, twin = adapted(plain(model[0]), DoRA(LORA))
    twin.load_state_dict(network.state_dict())
    nerine.save(network, tmp_path / "one.safetensors")
    nerine.save(twin, tmp_path / "two.safetensors")
    x = inputs()
    with torch.no_grad():
        want = model(x)
    network.detach()
    twin.detach()
    nerine.load(model, tmp_path / "two.safetensors")
    with torch.no_grad():
        near(model(x), want, 1e-5, "read from the other's file")
    nerine.load(other, tmp_path / "one.safetensors")


def test_copies_train_on(kind: Kind) -> None:
    if not kind.copies:
        pytest.skip(f"{kind}: its package cannot deepcopy such a parameter, adapters or not")
    model, _ = adapted(kind.make(), DoRA(LORA))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        near(twin(inputs()), model(inputs()), 1e-6, "copy")


def test_several_adapters_add_up(kind: Kind) -> None:
    model, first = adapted(kind.make(), LORA)
    second = nerine.attach(model, DoRA(nerine.LoKr(rank=2), axis="in"), name="second", targets=nn.Module)
    stir(second, seed=4, amount=0.1)
    x = inputs()
    with torch.no_grad():
        both = model(x)
        with first.paused():
            one = model(x)
        with second.paused():
            two = model(x)
        with first.paused(), second.paused():
            none = model(x)
    near(both - none, (one - none) + (two - none), max(kind.exact, 1e-4), "sum")


# -- before and after ------------------------------------------------------------------------------------------------
def test_quantising_under_adapters() -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao comes with the extra [quant]")
    model, network = adapted(linear(), DoRA(LORA))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(version=2))
    assert storage_of(model[0], model[0].weight) is not None
    d, gradients = change(model, network)
    other, twin = adapted(plain(model[0]), DoRA(LORA))
    twin.load_state_dict(network.state_dict())
    near(d, change(other, twin)[0], 2e-5, "deviation")
    assert all(g.abs().max() > 0 for g in gradients.values())


def test_replacing_layers_under_adapters_is_noticed() -> None:
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto comes with the extra [quant]")
    model, network = adapted(linear(), LORA)
    quanto.quantize(model, weights=quanto.qint8)
    with pytest.raises(TargetError, match=r"replaced by QLinear.*quantise the model before"):
        list(network.parameters())


def test_freezing_under_adapters() -> None:
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto comes with the extra [quant]")
    model = nn.Sequential(linear())
    quanto.quantize(model, weights=quanto.qint8)
    network = nerine.attach(model, DoRA(LORA))
    stir(network)
    with torch.no_grad():
        before = model(inputs())
        quanto.freeze(model)
        near(model(inputs()), before, 1e-5, "frozen")
    assert {type(p) for p in network.parameters()} == {nn.Parameter}


def test_convolutions_of_quanto() -> None:
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto comes with the extra [quant]")
    model = nn.Sequential(nn.Conv2d(8, 8, 3)).requires_grad_(False)
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    network = nerine.attach(model, DoRA(nerine.LoKr(rank=2)))
    stir(network)
    x = torch.randn(1, 8, 5, 5)
    d = model(x)
    d.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in network.parameters())
    network.merge()
    with torch.no_grad():
        near(model(x), d, 2e-2, "merged")


def test_norms_stay_with_their_format() -> None:
    norm = nn.LayerNorm(4)
    norm.weight = nn.Parameter(norm.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TargetError, match="leave it in bf16 or fp32"):
        nerine.attach(nn.Sequential(norm), nerine.Norm(), targets=nn.Module)


# -- what is refused -------------------------------------------------------------------------------------------------
def test_a_merge_beyond_the_scale_is_refused() -> None:
    kind = next(kind for kind in KINDS if kind.name == "float8 scale_weight")
    model, network = adapted(kind.make(), LORA, amount=0.5)
    stored = model[0].weight
    with pytest.raises(MergeError, match=r"^0: the merged weight reaches .* keep the adapter beside it"):
        network.merge()
    assert model[0].weight is stored
    assert not network.is_merged


def test_a_merge_into_blocks_that_gguf_only_reads_is_refused() -> None:
    gguf = pytest.importorskip("gguf", reason="gguf comes with the extra [quant]")
    utils = pytest.importorskip("diffusers.quantizers.gguf.utils", reason="diffusers comes with the extra [train]")
    layer = utils.GGUFLinear(256, 4, True, compute_dtype=torch.float32)
    blocks = torch.zeros(4, 144, dtype=torch.uint8)
    layer.weight = utils.GGUFParameter(blocks, quant_type=gguf.GGMLQuantizationType.Q4_K)
    network = nerine.attach(nn.Sequential(layer), LORA)
    stir(network)
    with pytest.raises(MergeError, match=r"^0: the gguf package reads Q4_K and does not write it"):
        network.merge()


def test_a_base_without_a_gradient_to_its_input_is_refused_in_training() -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao comes with the extra [quant]")
    model = nn.Sequential(linear())
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig(version=2))
    network = nerine.attach(model, DoRA(LORA))
    stir(network)
    assert model(inputs()).requires_grad  # nothing before it wants a gradient
    with torch.no_grad():
        assert model(inputs()).shape == (5, SHAPE[0])
    with pytest.raises(UnsupportedBase, match=r"^0: the layer \(torchao\) passes no gradient to its input"):
        model(inputs().requires_grad_())


def test_a_weight_that_evaluation_on_a_cpu_has_packed_anew() -> None:
    """With AVX512-BF16, bitsandbytes changes the order of a four-bit weight in place; reading it must not say so."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(nn.Linear(64, 32).state_dict())
    layer = layer.to("cpu").requires_grad_(False)
    storage = storage_of(layer, layer.weight)
    assert storage is not None
    before = storage.read(layer, layer.weight).clone()
    layer.weight.data, state = bnb.functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    assert state.packing_format_for_cpu
    for _ in range(2):  # the first reading once left the layer as if it were not packed
        again = storage.read(layer, layer.weight)
        assert float((again - before).abs().max()) < 1e-2 * float(before.abs().max())
        assert layer.weight.quant_state.packing_format_for_cpu
    written = storage.write(layer, layer.weight, before)
    assert written.quant_state.dtype == torch.float32
    assert not getattr(written.quant_state, "packing_format_for_cpu", False)
