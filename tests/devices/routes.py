"""The ways in which an adapter and its layer used to end up on different devices or in formats that do not go together.

Each route is a function of an algorithm and its dropouts that raises where nerine would fail a user there. They run on
a GPU, or on the simulated one. `run` tries all of them on all algorithms.
"""

from __future__ import annotations

import copy
import io
import pickle
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from torch import nn
from torch.utils.checkpoint import checkpoint

import nerine
import simulated_cuda
from devices.models import (
    CPU,
    SETTINGS,
    Linears,
    Mixed,
    algorithms_of,
    attached,
    close,
    dropouts_of,
    folder,
    input_of,
    model_of,
    same_network,
    sgd,
    stir,
    train,
)
from nerine.algorithms import Algorithm
from nerine.errors import DeviceError, MergeError
from nerine.model.network import Network
from nerine.model.offload import Groups

G = torch.device("cuda", 0)
HALVES = (torch.float16, torch.bfloat16)
Options = dict[str, float]
Route = Callable[[Algorithm, Options], None]

# Random draws are the CPU's own only on the simulated device.
SAME_DRAWS = simulated_cuda.is_simulated()


def plain_run(algorithm: Algorithm, options: Options, kind: type[nn.Module] = Mixed) -> tuple[nn.Module, Network, Any]:
    """The same training on the CPU: what every route is compared with."""
    model = model_of(kind)
    network = attached(model, algorithm, **options)
    return model, network, train(model, input_of(), network)


def compare(
    algorithm: Algorithm,
    options: Options,
    place: Callable[[nn.Module], object],
    order: str,
    kind: type[nn.Module] = Mixed,
) -> None:
    """Train, merge, save, unmerge and detach a model under `place`, done before or after attaching; as on the CPU."""
    want_model, want_network, want = plain_run(algorithm, options, kind)
    model, optimizer = model_of(kind), None
    if order == "attach first":
        network = attached(model, algorithm, **options)
        optimizer = sgd(network)
        place(model)
    else:
        place(model)
        network = attached(model, algorithm, **options)
    got = train(model, input_of(G), network, optimizer)
    if SAME_DRAWS or not options:
        close(got, want, "losses")
        same_network(network, want_network)
    for m in (model, want_model):
        Network.of(m).eval()
        m.eval()
    with torch.no_grad():
        y = model(input_of(G)).cpu()
        if SAME_DRAWS or not options:
            close(y, want_model(input_of()), "output", 1e-3)
        file = folder() / "adapter.safetensors"
        nerine.save(network, file)
        if may_merge(network):
            close(model(input_of(G)), y, "merged", 1e-3)
            network.unmerge()
        assert torch.equal(model(input_of(G)).cpu(), y), "unmerged is not what was there"
        network.detach()
        close(model(input_of(G)), model_of(kind).eval()(input_of()), "detached")


class Small(Mixed):
    """One block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = self.blocks[:1]


def may_merge(network: Network) -> bool:
    """Merge; not where diffusers keeps the weights in files, which is refused."""
    if not Groups(network.model).on_disk():
        network.merge()
        return True
    with pytest.raises(MergeError, match="keeps weights of this model in files"):
        network.merge()
    return False


def is_norm(algorithm: Algorithm) -> bool:
    return algorithm.kinds == {"norm"}


def moved(algorithm: Algorithm, options: Options) -> None:
    """The base is moved, before or after attaching; no step copies anything across devices."""
    for order in ("attach first", "attach last"):
        compare(algorithm, options, lambda model: model.to(G), order)


def adapter_alone(algorithm: Algorithm, options: Options) -> None:
    """Only the adapter is moved: an error that names the layer; adapters of a host come along."""
    model = model_of()
    network = attached(model, algorithm, **options)
    network.to(G)
    mended = r'blocks\.0\.\w+: its adapter is on cuda:0, .* on cpu: call network\.to\("cpu"\)'
    with pytest.raises(DeviceError, match=mended):
        model(input_of())
    network.to(CPU)
    model(input_of())
    if not is_norm(algorithm):  # the layers before a norm are none of ours
        model.to(G)
        with pytest.raises(DeviceError, match="the weight is on cuda:0 and its input on cpu"):
            model(input_of())

    want_model, _, want = plain_run(algorithm, options)
    hosted = model_of()
    network = attached(hosted, algorithm, own=False, **options)
    hosted.to(G)
    got = train(hosted, input_of(G), network)
    if SAME_DRAWS or not options:
        close(got, want)
    assert all(p.device == CPU for p in network.parameters())
    del want_model


def on_device_already(algorithm: Algorithm, options: Options) -> None:
    """The base is on the device when the adapter is made: so is every tensor of the adapter."""
    model = model_of().to(G)
    network = attached(model, algorithm, **options)
    assert all(t.device == G for _, t in network.named_tensors())
    assert all(b.device == G for b in model.buffers())
    with torch.device("cpu"):
        train(model, input_of(G), network)


def half_base(algorithm: Algorithm, options: Options) -> None:
    """A half-precision base: every tensor is a registered fp32 parameter, moves, and learns."""
    for dtype in HALVES:
        model = model_of().to(dtype)
        network = nerine.attach(model, algorithm, **options)
        stir(network)
        model.to(G)
        registered = {id(p) for p in model.parameters()}
        before = {}
        for key, parameter in network.named_parameters():
            assert id(parameter) in registered, f"{key} is not registered"
            assert parameter.device == G, key
            assert parameter.dtype == torch.float32, key
            assert parameter.is_leaf, key
            before[key] = parameter.detach().clone()
        optimizer = torch.optim.AdamW(list(network.parameters()), lr=0.01)
        for _ in range(8 if options else 1):  # ranks that chance leaves out learn in another step
            optimizer.zero_grad()
            model(input_of(G, dtype)).float().square().mean().backward()
            optimizer.step()
        for key, parameter in network.named_parameters():
            assert torch.isfinite(parameter).all(), key
            assert not torch.equal(parameter, before[key]), f"{key} has not learnt"
        model.half().bfloat16()
        assert all(p.dtype == torch.float32 for p in network.parameters()), "a cast of the base has cast the adapter"


def on_meta(algorithm: Algorithm, options: Options) -> None:
    """A base without weights yet: the adapter starts with the first real ones."""
    real = model_of()
    with torch.device("meta"):
        model = Mixed()
    network = nerine.attach(model, algorithm, **options)
    assert all(t.is_meta for _, t in network.named_tensors())
    model.to_empty(device=G)
    state = {k: v for k, v in model.state_dict().items() if ".nerine." not in k}
    assert state.keys() == real.state_dict().keys()
    model.load_state_dict(real.state_dict(), strict=False)
    y = model.eval()(input_of(G))
    close(y, real.eval()(input_of()), "an adapter changes nothing at first")
    stir(network)
    train(model.train(), input_of(G), network)
    assert all(t.device == G for _, t in network.named_tensors())

    file = folder() / "adapter.safetensors"
    source, trained, _ = plain_run(algorithm, {})
    nerine.save(trained, file)
    with torch.device("meta"):
        model = Mixed()
    loaded = nerine.load(model, file, **options)
    model.to_empty(device=G)
    model.load_state_dict(real.state_dict(), strict=False)
    close(model.eval()(input_of(G)), source.eval()(input_of()), "loaded before the weights")
    same_network(loaded, trained)


def offloaded(algorithm: Algorithm, options: Options) -> None:
    """accelerate keeps the weights in memory or on disk and brings them for each call."""
    for order in ("attach first", "attach last"):
        compare(algorithm, options, lambda model: cpu_offload(model, G), order)
        if not options:
            compare(algorithm, options, lambda model: disk_offload(model, str(folder()), G), order)


class Checkpointed(Mixed):
    """The blocks compute again in backward instead of keeping what they have computed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x.requires_grad_(x.is_leaf or x.requires_grad), use_reentrant=False)
        return self.out(x)


def checkpointed(algorithm: Algorithm, options: Options) -> None:
    """Gradient checkpointing, on the device and with weights that accelerate brings for each call."""
    compare(algorithm, options, lambda model: model.to(G), "attach last", Checkpointed)
    if not options:
        compare(algorithm, options, lambda model: cpu_offload(model, G), "attach first", Checkpointed)


def grouped(algorithm: Algorithm, options: Options) -> None:
    """diffusers brings groups of layers, with and without streams, from memory and from disk."""
    for order in ("attach first", "attach last"):
        for level in ("leaf_level", "block_level"):
            for extra in ({"use_stream": False}, {"use_stream": True}, {"offload_to_disk_path": "new"}):

                def place(model: nn.Module, level: str = level, extra: dict[str, Any] = extra) -> None:
                    more = {key: str(folder()) if key == "offload_to_disk_path" else v for key, v in extra.items()}
                    apply_group_offloading(model, G, CPU, offload_type=level, num_blocks_per_group=1, **more)

                if not options:
                    inference_under(algorithm, options, place, order)
                if not options or (order, level) == ("attach first", "block_level"):
                    trained_under(algorithm, options, place, order)


def inference_under(algorithm: Algorithm, options: Options, place: Callable[[nn.Module], object], order: str) -> None:
    want_model = model_of()
    attached(want_model, algorithm, **options)
    model = model_of()
    if order == "attach first":
        network = attached(model, algorithm, **options)
        place(model)
    else:
        place(model)
        network = attached(model, algorithm, **options)
    for m in (model, want_model):
        m.eval()
    with torch.no_grad():
        want = want_model(input_of())
        close(model(input_of(G)), want, "output")
        nerine.save(network, folder() / "adapter.safetensors")
        close(model(input_of(G)), want, "output after saving")
        if may_merge(network):
            close(model(input_of(G)), want, "merged", 1e-3)
            network.unmerge()
            close(model(input_of(G)), want, "unmerged")
        network.detach()
        close(model(input_of(G)), model_of().eval()(input_of()), "detached")


def trained_under(algorithm: Algorithm, options: Options, place: Callable[[nn.Module], object], order: str) -> None:
    if is_norm(algorithm):
        return  # PyTorch itself cannot train norms this way
    compare(algorithm, options, place, order, Linears)


def cast_by_layer(algorithm: Algorithm, options: Options) -> None:
    """Weights stored in fp8 and cast for each call: the adapter is cast neither way."""
    kind = Mixed if is_norm(algorithm) else Linears  # PyTorch cannot train a conv this way
    for order in ("attach first", "attach last"):
        model = model_of(kind).to(G)

        def place(model: nn.Module = model) -> None:
            apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=("norm",))

        if order == "attach first":
            network = attached(model, algorithm, **options)
            place()
        else:
            place()
            network = attached(model, algorithm, **options)
        same = model_of(kind)
        with torch.no_grad():
            for module in same.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    for p in module.parameters():
                        p.copy_(p.to(torch.float8_e4m3fn))
        want_network = attached(same, algorithm, **options)
        if order == "attach first":  # there it was made from the weights before they were rounded
            want_network.load_state_dict({k: t.cpu() for k, t in network.state_dict().items()})
        assert all(p.dtype == torch.float32 for p in network.parameters())
        if kind is Linears:
            got, want = train(model, input_of(G), network), train(same, input_of(), want_network)
            if SAME_DRAWS or not options:
                close(got, want, order)
        model.eval(), same.eval()
        with torch.no_grad():
            y = model(input_of(G))
            report = network.merge()
            assert report.rows
            network.unmerge()
            assert torch.equal(model(input_of(G)), y)


def autocast(algorithm: Algorithm, options: Options) -> None:
    """Every mix of formats of input, weight and adapter: finite, of the base's format, near the exact numbers."""
    if options:
        return  # chance is drawn in the formats of `masks`
    exact = model_of(Small).double()
    exact_network = attached(exact, algorithm)
    want = exact.eval()(input_of().double())
    for weights in (torch.float32, *HALVES):
        for adapters in (torch.float32, torch.bfloat16):
            for mode in (None, *HALVES):
                inputs = (torch.float32, *HALVES) if mode else (weights,)
                for kind in inputs:
                    model = model_of(Small).to(weights).to(G)
                    network = nerine.attach(model, algorithm)
                    network.load_state_dict({k: t.float().to(G) for k, t in exact_network.state_dict().items()})
                    network.to(adapters)
                    with torch.autocast("cuda", dtype=mode or torch.bfloat16, enabled=mode is not None):
                        with network.paused():
                            plain = model.eval()(input_of(G, kind))
                        y = model(input_of(G, kind))
                        y.float().square().mean().backward()
                    what = f"x {kind}, W {weights}, adapter {adapters}, autocast {mode}"
                    assert y.dtype == plain.dtype, what
                    assert torch.isfinite(y).all(), what
                    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters()), what
                    worst = max(torch.finfo(d).eps for d in (kind, weights, adapters, mode or kind))
                    error = float((y.detach().double().cpu() - want.detach()).norm() / want.detach().norm())
                    assert error < 12 * worst, f"{what}: {error:.1e}"


def masks(algorithm: Algorithm, options: Options) -> None:
    """Chance is drawn where the activations are."""
    model = model_of().to(G)
    network = attached(model, algorithm, **options)
    model.train()
    network.set_timestep(300)
    y = model(input_of(G))
    y.square().mean().backward()
    assert all(p.grad is None or p.grad.device == G for p in network.parameters())


def merged_across(algorithm: Algorithm, options: Options) -> None:
    """A merge reads the adapter wherever it is, and changes no bit of it."""
    for weights in (torch.float32, *HALVES):
        for adapter_at, base_at in ((CPU, G), (G, CPU)):
            model = model_of().to(base_at, weights)
            network = attached(model, algorithm, own=False, **options)
            network.to(adapter_at)
            before = {k: t.clone() for k, t in network.state_dict().items()}
            bits = {k: t.clone() for k, t in model.state_dict().items()}
            network.merge()
            model(input_of(base_at, weights))
            network.unmerge()
            network.max_norm(0.5)
            network.load_state_dict(before)
            for key, tensor in network.state_dict().items():
                assert tensor.device == adapter_at
                assert torch.equal(tensor, before[key]), key
            assert all(torch.equal(t, bits[k]) for k, t in model.state_dict().items())


def loaded(algorithm: Algorithm, options: Options) -> None:
    """A file into a model on the device, before or after it is moved, once or twice: the same."""
    source, trained, _ = plain_run(algorithm, options)
    file = folder() / "adapter.safetensors"
    nerine.save(trained, file)
    want = source.eval()(input_of())

    first = model_of()
    nerine.load(first, file, **options)
    first.to(G)
    later = model_of().to(G)
    network = nerine.load(later, file, **options)
    assert all(t.device == G for _, t in network.named_tensors())
    resumed = model_of().to(G)
    network = nerine.attach(resumed, algorithm, **options)
    for _ in range(2):
        nerine.load(network, file)
    for model in (first, later, resumed):
        close(model.eval()(input_of(G)), want)
    again = nerine.attach(model_of().to(G), algorithm, **options)
    again.load_state_dict({k: t.cpu() for k, t in trained.state_dict().items()})
    same_network(again, trained, 0.0)


def taken_off(algorithm: Algorithm, options: Options) -> None:
    """Detaching gives back device, format, requires_grad and memory of every parameter."""
    model = model_of().to(G)
    for p in list(model.parameters())[::2]:
        p.requires_grad_(False)
    before = {k: (p.device, p.dtype, p.requires_grad, p.data_ptr(), id(p)) for k, p in model.named_parameters()}
    y = model(input_of(G))
    network = attached(model, algorithm, **options)
    train(model, input_of(G), network)
    network.merge()
    network.unmerge()
    network.detach()
    assert before == {k: (p.device, p.dtype, p.requires_grad, p.data_ptr(), id(p)) for k, p in model.named_parameters()}
    assert torch.equal(model(input_of(G)), y)
    assert not any("forward" in m.__dict__ for m in model.modules())


def compiled(algorithm: Algorithm, options: Options) -> None:
    """One graph with everything in it."""
    if options:
        return  # every option is compiled in the contracts, on the CPU
    torch._dynamo.reset()
    model = model_of(Mixed if is_norm(algorithm) else Linears).to(G)
    attached(model, algorithm, **options)
    run = torch.compile(model, backend="eager", fullgraph=True)
    torch.manual_seed(2)
    got = run(input_of(G))
    torch.manual_seed(2)
    close(got, model(input_of(G)))
    got.square().mean().backward()


def several_devices(algorithm: Algorithm, options: Options) -> None:
    """Layers spread over two devices and the CPU."""
    parts = {"blocks.0": 0, "blocks.1": 1, "out": "cpu"}
    for order in ("attach first", "attach last"):
        compare(algorithm, options, lambda model: dispatch_model(model, dict(parts), main_device=0), order)


def copies(algorithm: Algorithm, options: Options) -> None:
    """deepcopy, pickle, torch.save, and an average of weights over time."""
    model = model_of().to(G)
    network = attached(model, algorithm, **options)
    train(model, input_of(G), network)
    want = model.eval()(input_of(G))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    others = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(copy.deepcopy(model).cpu())).to(G),
        torch.load(file, map_location="cpu", weights_only=False).to(G),
    ]
    for other in others:
        assert torch.equal(other(input_of(G)), want)
        twin = Network.of(other)
        assert all(t.device == G for _, t in twin.named_tensors())
        train(other.train(), input_of(G), twin)
        twin.detach()
    assert torch.equal(model(input_of(G)), want), "training a copy has changed the original"
    copy.deepcopy(network.state_dict())
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    before = {k: p.detach().clone() for k, p in network.named_parameters()}
    train(model.train(), input_of(G), network)
    average.update_parameters(model)
    for key, averaged in Network.of(average.module).named_parameters():
        now = dict(network.named_parameters())[key]
        close(averaged, (before[key] + now) / 2, key)
    average.eval()(input_of(G))


ROUTES: dict[str, Route] = {
    "base moved before or after": moved,
    "adapter moved alone": adapter_alone,
    "base on the device already": on_device_already,
    "half-precision base": half_base,
    "base on meta": on_meta,
    "accelerate: CPU, disk": offloaded,
    "diffusers: groups": grouped,
    "gradient checkpointing": checkpointed,
    "fp8 cast layer by layer": cast_by_layer,
    "autocast, mixed formats": autocast,
    "random masks": masks,
    "merge across devices": merged_across,
    "load, resume": loaded,
    "detach": taken_off,
    "compile": compiled,
    "several devices": several_devices,
    "deepcopy, pickle, EMA": copies,
}


def run(names: Iterable[str] = SETTINGS, routes: Iterable[str] = ROUTES) -> Iterator[tuple[str, str, str, str]]:
    """(route, algorithm, which of its forms, what went wrong or nothing) for every combination."""
    for name in names:
        for algorithm in algorithms_of(name):
            for options in dropouts_of(algorithm):
                for route in routes:
                    failure = ""
                    try:
                        ROUTES[route](algorithm, options)
                    except Exception:
                        failure = traceback.format_exc(limit=-4)
                    yield route, name, f"{algorithm}, {'dropouts' if options else 'no dropout'}", failure
