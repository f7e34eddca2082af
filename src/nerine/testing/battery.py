"""The contracts that every algorithm keeps, as functions: `check_faces(algorithm, place)` and so on.

Each takes an algorithm and a `Place` and raises `AssertionError` where the contract is broken, so that an algorithm
written elsewhere can be put through them as well. Numbers are fp64 unless a contract is about another format, and no
tensor has the value that it starts with. The layer's own class, with another weight put in, is the judge of what
`op(x, W')` is; nothing here uses nerine's own operations for that.
"""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import nerine
from nerine.algorithms import Algorithm, Call, DoRA, Params
from nerine.model.adapter import Adapter, start
from nerine.model.layer import site_of
from nerine.testing.places import PLACES, TINY, Place, places_of, site_at

EXACT = 1e-11  # of two ways to compute the same in fp64, relative to the largest entry


def close(got: Tensor, want: Tensor, what: str, tolerance: float = EXACT) -> None:
    """The largest difference, against the largest entry of `want`."""
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)} instead of {tuple(want.shape)}"
    got, want = got.detach().double(), want.detach().double()
    error = float((got - want).abs().max()) if want.numel() else 0.0
    size = float(want.abs().max()) if want.numel() else 0.0
    assert error <= tolerance * max(size, 1e-2), f"{what}: off by {error:.3e}, entries up to {size:.3e}"


def layer_at(place: Place, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The frozen layer of `place`, the same at each call."""
    return copy.deepcopy(_built(place)).to(dtype)


@functools.cache
def _built(place: Place) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return place.make().to(torch.float64).requires_grad_(False)


def input_at(place: Place, dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> Tensor:
    """An input for the layer at `place`; tokens are whole numbers, whatever the format."""
    generator = torch.Generator().manual_seed(12)
    if place.tokens:
        return torch.randint(0, place.tokens, place.input, generator=generator)
    return torch.randn(place.input, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)


def stir(network: nerine.Network, seed: int = 13, amount: float = 0.3) -> None:
    """Move every tensor away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((amount * noise).to(parameter.dtype))


def adapted(
    algorithm: Algorithm, place: Place, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[nn.Sequential, nerine.Network, Adapter]:
    """A model of one layer with stirred adapters."""
    model = nn.Sequential(layer_at(place, dtype))
    network = nerine.attach(model, algorithm, targets=nn.Module, **options)
    stir(network)
    ((_, _, adapter),) = network.adapters()
    return model.train(not is_random(algorithm)), network, adapter


def is_random(algorithm: Algorithm) -> bool:
    """Whether the algorithm itself draws in training, so that only outside it the two faces can be compared."""
    inner: Algorithm = getattr(algorithm, "inner", algorithm)
    return type(inner).draw is not Algorithm.draw


@contextmanager
def path_of(adapter: Adapter, through_weight: bool) -> Iterator[None]:
    """One of the two ways to compute: beside the layer, or with the changed weight."""
    before = adapter.prefers_weight
    adapter.prefers_weight = through_weight
    try:
        yield
    finally:
        adapter.prefers_weight = before


def by_weight(algorithm: Algorithm, params: Params, layer: nn.Module, x: Tensor, strength: float = 1.0) -> Tensor:
    """What the layer's own class computes with the weight W + strength·(W' - W), and the bias likewise."""
    plain = layer_like(layer)
    site = site_of(plain)
    weight = site.canonical(plain.weight)  # type: ignore[arg-type]
    changed = weight + strength * (algorithm.weight(params, weight) - weight)
    tensors = {**plain._parameters, "weight": site.native(changed)}
    shift = algorithm.shift(params)
    if shift is not None:
        tensors["bias"] = plain.bias + strength * shift  # type: ignore[operator]
    found: Tensor = functional_call(plain, {name: t for name, t in tensors.items() if t is not None}, (x,))
    return found


def layer_like(layer: nn.Module) -> nn.Module:
    """`layer` without nerine on it: its class with the same geometry."""
    plain = copy.copy(layer)
    plain.__dict__ = {k: v for k, v in layer.__dict__.items() if k != "forward" and not k.startswith("_nerine")}
    plain._parameters = dict(layer._parameters)
    plain._buffers = {name: None if b is None else b.clone() for name, b in layer._buffers.items()}
    plain._modules = {}
    return plain


def _gradients(y: Tensor, sources: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = torch.linspace(-1, 1.5, y.numel(), dtype=y.dtype).reshape(y.shape)
    sources = {key: t for key, t in sources.items() if t.requires_grad}
    found = torch.autograd.grad((y * weights).sum(), list(sources.values()), allow_unused=True)
    return {k: torch.zeros_like(s) if g is None else g for (k, s), g in zip(sources.items(), found, strict=True)}


# -- the two faces ---------------------------------------------------------------------------------------------------
def check_faces(algorithm: Algorithm, place: Place) -> None:
    """Activation face == weight face: output, gradient to x, to each tensor, and to the base, on either path."""
    model, network, adapter = adapted(algorithm, place)
    layer = model[0]
    for parameter in layer.parameters(recurse=False):
        parameter.requires_grad_(True)
    x = input_at(place, requires_grad=not place.tokens)
    sources = {"x": x, **dict(network.named_parameters()), **dict(layer.named_parameters(recurse=False))}
    want = by_weight(algorithm, adapter.folded(), layer, x)
    wanted = _gradients(want, sources)
    for through_weight in (False, True):
        with path_of(adapter, through_weight):
            got = model(x)
        where = f"{algorithm} at {place}, {'weight' if through_weight else 'factored'} path"
        close(got, want, f"{where}: output")
        for key, gradient in _gradients(got, sources).items():
            close(gradient, wanted[key], f"{where}: gradient to {key}")


def call_of(layer: nn.Module, x: Tensor, fresh: bool = False) -> Call:
    plain = layer_like(layer)
    site = site_of(plain)
    return Call(site, x, plain(x), getattr(plain, "bias", None), lambda: site.canonical(plain.weight), fresh)  # type: ignore[arg-type]


def check_output(algorithm: Algorithm, place: Place) -> None:
    """`output` == y + `deviation`; nothing to see where only the module can use its weight."""
    if site_at(place).opaque:
        return
    model, _, adapter = adapted(algorithm, place)
    x, params = input_at(place), adapter.folded()
    call = call_of(model[0], x)
    before = call.y.clone()
    want = call.y + algorithm.deviation(params, call)
    close(algorithm.output(params, call), want, f"{algorithm} at {place}")
    assert torch.equal(call.y, before), f"{algorithm} at {place}: changed an output that was not its own"
    with torch.no_grad():
        close(algorithm.output(params, call_of(model[0], x, fresh=True)), want, f"{algorithm} at {place}, fresh")


def check_row_norm(algorithm: Algorithm, place: Place) -> None:
    """The norms of the rows of W', and their gradients, as those of the dense W'."""
    if site_at(place).kind == "norm":
        return
    model, network, adapter = adapted(algorithm, place)
    weight = site_at(place).canonical(model[0].weight).detach().requires_grad_(True)  # type: ignore[arg-type]
    sources = {"W": weight, **dict(network.named_parameters())}
    want = algorithm.weight(adapter.folded(), weight).flatten(1).square().sum(1).sqrt()
    got = algorithm.row_norm(adapter.folded(), weight)
    close(got, want, f"{algorithm} at {place}: row norm")
    wanted = _gradients(want, sources)
    for key, gradient in _gradients(got, sources).items():
        close(gradient, wanted[key], f"{algorithm} at {place}: gradient of the row norm to {key}", 1e-9)


def check_gradients(algorithm: Algorithm, place: Place) -> None:
    """Gradients against finite differences, on either path."""
    model, network, adapter = adapted(algorithm, place)
    names = {key.removeprefix("0."): f"0.nerine.default.{key.removeprefix('0.')}" for key in network.state_dict()}
    tensors = [t.clone().requires_grad_() for t in network.state_dict().values()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        found: Tensor = functional_call(model, dict(zip(names.values(), values, strict=True)), (x,))
        return found

    x = input_at(place, requires_grad=not place.tokens)
    for through_weight in (False, True):
        with path_of(adapter, through_weight):
            assert torch.autograd.gradcheck(run, (x, *tensors), fast_mode=True)


# -- deviations ------------------------------------------------------------------------------------------------------
def starts_exact(algorithm: Algorithm) -> bool:
    """Whether the first deviation is zero bit by bit: not through DoRA's dense norm, which sums in another order."""
    return not isinstance(algorithm, DoRA)


def check_zero_at_first(algorithm: Algorithm, place: Place, dtype: torch.dtype = torch.float64) -> None:
    """A fresh adapter changes nothing."""
    model = nn.Sequential(layer_at(place, dtype))
    x = input_at(place, dtype)
    before = model(x)
    network = nerine.attach(model, algorithm, targets=nn.Module)
    ((_, _, adapter),) = network.adapters()
    for through_weight in (False, True):
        with path_of(adapter, through_weight):
            after = model(x)
        if starts_exact(algorithm):
            assert torch.equal(after, before), f"{algorithm} at {place}"
        else:
            close(after, before, f"{algorithm} at {place}", 1e-12 if dtype is torch.float64 else 1e-6)


def check_moves_at_first(algorithm: Algorithm, place: Place) -> None:
    """A fresh adapter can learn: some gradient is not zero, and none is NaN."""
    model = nn.Sequential(layer_at(place))
    network = nerine.attach(model, algorithm, targets=nn.Module)
    y = model(input_at(place))
    (y * torch.linspace(-1, 1.5, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert all(torch.isfinite(g).all() for g in gradients), f"{algorithm} at {place}"
    assert any(g.any() for g in gradients), f"{algorithm} at {place} cannot learn"


def check_strength(algorithm: Algorithm, place: Place) -> None:
    """Strength 0 is the base bit by bit; any other multiplies the deviation."""
    model, network, adapter = adapted(algorithm, place)
    x = input_at(place)
    base = layer_like(model[0])(x)
    whole = by_weight(algorithm, adapter.folded(), model[0], x) - base
    for through_weight in (False, True):
        with path_of(adapter, through_weight):
            network.strength = 0
            assert torch.equal(model(x), base), f"{algorithm} at {place}"
            for strength in (0.3, 1, -1, 2.5):
                network.strength = strength
                close(model(x) - base, strength * whole, f"{algorithm} at {place}, strength {strength}")
    network.off()
    assert torch.equal(model(x), base), f"{algorithm} at {place}"
    network.on()
    with network.paused():
        assert torch.equal(model(x), base), f"{algorithm} at {place}"
    assert not torch.equal(model(x), base), f"{algorithm} at {place}"


def check_stack(algorithms: tuple[Algorithm, ...], place: Place) -> None:
    """Adapters on one layer add up, in whatever order they were put on; some belong to a host."""
    x = input_at(place)
    outputs = []
    for order in (range(len(algorithms)), reversed(range(len(algorithms)))):
        model = nn.Sequential(layer_at(place))
        want = base = layer_like(model[0])(x)
        for i in order:
            network = nerine.attach(model, algorithms[i], targets=nn.Module, name=f"n{i}", own=i != 1)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(i)  # the start of adapter i does not depend on the order
                ((_, _, adapter),) = network.adapters()
                fresh = start(adapter.algorithm, adapter.site, adapter.site.canonical(layer_at(place).weight), None)  # type: ignore[arg-type]
            network.load_state_dict({f"0.{k}": t for k, t in fresh.tensors.items()})
            stir(network, seed=20 + i)
            network.strength = 0.5 + i
            want = want + by_weight(adapter.algorithm, adapter.folded(), model[0], x, network.strength) - base
        nerine.Network.of(model).eval()  # what draws by itself is compared without
        close(model(x), want, f"{', '.join(map(str, algorithms))} at {place}")
        outputs.append(model(x))
    close(outputs[0], outputs[1], "the order of adapters")


# -- merging ---------------------------------------------------------------------------------------------------------
def check_merge(algorithm: Algorithm, place: Place) -> None:
    """The merged weight computes what the adapted layer computes, at any strength."""
    model, network, _ = adapted(algorithm, place)
    x = input_at(place)
    for strength in (1.0, -0.7):
        network.strength = strength
        before = model(x)
        network.merge()
        close(model(x), before, f"{algorithm} at {place}: merged at {strength}")
        network.unmerge()
        assert torch.equal(model(x), before), f"{algorithm} at {place}"


def check_unmerge(algorithm: Algorithm, place: Place, dtype: torch.dtype) -> None:
    """Merging and unmerging leaves the bits of the weight, and those of the adapter, as they were."""
    model, network, adapter = adapted(algorithm, place, dtype)
    own, tensors = (
        dict(model[0].named_parameters(recurse=False)),
        {k: t.clone() for k, t in network.state_dict().items()},
    )
    bits, addresses = {k: t.detach().clone() for k, t in own.items()}, {k: t.data_ptr() for k, t in own.items()}
    params = adapter.folded()
    wide = params.filled(t.detach().double() for t in params.tensors.values())
    exact = adapter.site.native(algorithm.weight(wide, adapter.site.canonical(bits["weight"].double())))
    where = f"{algorithm} at {place}"
    for _ in range(2):
        network.merge()
        assert own["weight"].dtype == dtype
        assert any(not torch.equal(t, bits[k]) for k, t in own.items()), where
        error = (own["weight"].double() - exact).abs()
        assert (error <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all(), f"{where}: rounded more than once"
        network.unmerge()
        for key, t in own.items():
            assert torch.equal(t.detach().contiguous().view(torch.uint8), bits[key].contiguous().view(torch.uint8)), (
                where
            )
            assert t.data_ptr() == addresses[key]
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor.view(torch.uint8), tensors[key].view(torch.uint8)), key
            assert tensor.dtype == torch.float32


# -- files -----------------------------------------------------------------------------------------------------------
def check_file(algorithm: Algorithm, place: Place, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Save, load into a fresh model: equal tensors (a scalar in its carrier), equal output."""
    model, network, adapter = adapted(algorithm, place)
    file = folder / "adapter.safetensors"
    nerine.save(network, file, dtype=dtype)
    again = nn.Sequential(layer_at(place)).train(model.training)
    own: Algorithm = getattr(algorithm, "inner", algorithm)
    loaded = nerine.load(again, file, strict=True, algorithms=[type(own)])
    ((_, _, other),) = loaded.adapters()
    where = f"{algorithm} at {place}"
    assert str(other.algorithm) == str(algorithm)
    assert other.scale == adapter.scale, where
    with torch.no_grad():
        filed = algorithm.for_file(adapter.folded(), adapter.site.canonical(model[0].weight))  # type: ignore[arg-type]
        filed = filed.replaced(
            **{n: t.to(dtype).double() for n, t in filed.tensors.items() if dtype is not None and n != "magnitude"}
        )
        want = algorithm.from_file(filed).tensors
    assert set(other.folded().tensors) == set(want)
    for name, tensor in other.folded().tensors.items():
        assert torch.equal(tensor.double(), want[name]), f"{where}: {name}"
    x = input_at(place)
    if dtype is None:
        close(again(x), model(x), f"{algorithm} at {place}: loaded")
    else:
        assert (
            0 < float((again(x) - model(x)).detach().norm() / (model(x) - layer_at(place)(x)).detach().norm()) < 0.05
        ), where


def check_fit(algorithm: Algorithm, place: Place, share: float = 0.0) -> float:
    """`fit` finds again what the algorithm itself has made of a weight; where only an iteration finds it, up to a
    `share` of the change. Returns the share that is left."""
    model, _, adapter = adapted(algorithm, place)
    where = f"{algorithm} at {place}"
    with torch.no_grad():
        weight = adapter.site.canonical(model[0].weight)  # type: ignore[arg-type]
        target = algorithm.weight(adapter.folded(), weight)
        found = algorithm.fit(adapter.site, weight, target)
        assert set(found.tensors) <= set(adapter.folded().tensors), where
        assert {n: t.shape for n, t in found.tensors.items()} == {
            n: t.shape for n, t in adapter.folded().tensors.items() if n in found.tensors
        }, where
        fitted = algorithm.weight(found, weight)
        left = float((fitted - target).norm() / (target - weight).norm())
        if share:
            assert left <= share, f"{where}: {left:.3f} of the change is not found"
        else:
            close(fitted, target, f"{where}: fitted", 1e-9)
    return left


# -- copies and machinery --------------------------------------------------------------------------------------------
def check_copies(algorithm: Algorithm, place: Place) -> None:
    """deepcopy, pickle and torch.save give a model that computes the same and shares nothing."""
    model, network, _ = adapted(algorithm, place, own=True)
    x = input_at(place)
    want = model(x)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    for twin in copies:
        assert torch.equal(twin(x), want), f"{algorithm} at {place}"
        of_twin = nerine.Network.of(twin)
        of_twin.detach()
        assert torch.equal(twin(x), layer_at(place)(x))
    copy.deepcopy(network.state_dict())


def check_checkpointing(algorithm: Algorithm, place: Place, reentrant: bool, **noise: float) -> None:
    """Gradients under checkpointing are those without it, also when chance is at work."""
    if reentrant and place.tokens:
        return  # it wants an input that requires gradients
    model, network, _ = adapted(algorithm, place, torch.float64, **noise)
    model.train()
    x = input_at(place, requires_grad=not place.tokens)
    sources = {"x": x, **dict(network.named_parameters())}
    sources = {key: t for key, t in sources.items() if t.requires_grad}

    def run(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        for tensor in sources.values():
            tensor.grad = None
        call(x).square().sum().backward()
        return [torch.zeros_like(t) if t.grad is None else t.grad for t in sources.values()]

    want = run(model)
    got = run(lambda x: checkpoint(model, x, use_reentrant=reentrant))
    for key, a, b in zip(sources, got, want, strict=True):
        close(a, b, f"{algorithm} at {place}: gradient to {key}", 1e-13)  # sums may take another order


@contextmanager
def _new_tensors() -> Iterator[Callable[[], list[Tensor]]]:
    """A function that lists the tensors that Python has made since and still holds."""
    gc.freeze()
    try:
        yield lambda: [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    finally:
        gc.unfreeze()


def check_memory(algorithm: Algorithm, layer: nn.Module, x: Tensor, limit: int) -> None:
    """Nothing of `limit` or more values is kept for backward but the base and the trained tensors themselves."""
    model = nn.Sequential(layer.requires_grad_(False))
    network = nerine.attach(model, algorithm, targets=nn.Module)
    stir(network)
    ((_, _, adapter),) = network.adapters()
    known = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *network.state_dict().values())}
    for through_weight in (False, True):
        kept: list[Tensor] = []

        def pack(t: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(t)
            return t

        with _new_tensors() as living:
            with path_of(adapter, through_weight), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                y = model(x)
            kept += living()  # those that closures hold
        large = {
            (*t.shape, t.dtype) for t in kept if t.numel() >= limit and t.untyped_storage().data_ptr() not in known
        }
        assert not large, f"{algorithm}, {'weight' if through_weight else 'factored'} path: kept {large}"
        y.sum().backward()


def around(algorithm: Algorithm) -> tuple[Algorithm, ...]:
    """`algorithm` plain, and with DoRA around it on either axis where it acts on weights of two axes."""
    if algorithm.kinds == {"norm"}:
        return (algorithm,)
    return algorithm, DoRA(algorithm), DoRA(algorithm, axis="in")


# -- all of them -----------------------------------------------------------------------------------------------------
def check_algorithm(algorithm: Algorithm, places: tuple[Place, ...] = PLACES) -> None:
    """Every contract, on each of `places` on which `algorithm` acts; also with DoRA around it where that makes sense.

    Raises:
        AssertionError: a contract is broken; the message names it, the algorithm and the layer.
    """
    for each in around(algorithm):
        for place in places_of(each, places):
            check_faces(each, place)
            check_output(each, place)
            check_zero_at_first(each, place)
            check_moves_at_first(each, place)
            check_strength(each, place)
            check_merge(each, place)
            check_unmerge(each, place, torch.bfloat16)
            check_copies(each, place)
            with tempfile.TemporaryDirectory() as folder:
                check_file(each, place, Path(folder))
            if getattr(each, "axis", "out") != "in":
                check_row_norm(each, place)
            for reentrant in (False, True):
                check_checkpointing(each, place, reentrant, dropout=0.2, rank_dropout=0.2, module_dropout=0.2)
        for place in places_of(each, TINY):
            check_gradients(each, place)
