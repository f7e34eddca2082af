"""nerine.lycoris beside LyCORIS 4.1.3: names, shapes and keys, files that either reads, and the same script."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nerine.lycoris as ours
from nerine import TargetError

theirs = pytest.importorskip("lycoris", reason="needs lycoris-lora: pip install 'nerine[peers]'")
pytestmark = [pytest.mark.peers, pytest.mark.no_device_guard]

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora dora": {"algo": "lora", "dora_wd": True},
    "lora tucker": {"algo": "lora", "use_tucker": True},
    "locon": {},
    "loha": {},
    "loha tucker dora": {"algo": "loha", "use_tucker": True, "dora_wd": True},
    "lokr": {"factor": 4},
    "lokr both": {"algo": "lokr", "decompose_both": True, "factor": 6},
    "lokr dora": {"algo": "lokr", "factor": 4, "dora_wd": True},
    "lokr full": {"algo": "lokr", "full_matrix": True, "factor": 4},
    "lokr unbalanced": {"algo": "lokr", "unbalanced_factorization": True},
    "glora": {},
    "full": {"train_norm": True},
    "diag-oft": {"constraint": 0.1, "rescaled": True},
    "boft": {"linear_dim": 16, "constraint": 0.1},
    "ia3": {},
    "tlora": {"kernels": False},
    "dylora": {"kernels": False},
}
# What LyCORIS 4.1.3's own loader fails on, in files of its own as well.
FAILS = {"ia3": TypeError, "lokr both": RuntimeError, "lokr unbalanced": RuntimeError}


class Model(nn.Module):
    """Linear layers, norms and convolutions of odd sizes."""

    def __init__(self, kernels: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(24, 40)
        self.norm = nn.LayerNorm(40)
        self.conv = nn.Conv2d(10, 12, 3 if kernels else 1, padding=int(kernels))
        self.point = nn.Conv2d(12, 16, 1)
        self.down = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.up(x)).unflatten(1, (10, 2, 2))
        y: Tensor = self.down(self.point(torch.tanh(self.conv(h))).flatten(1))
        return y


@pytest.fixture(autouse=True)
def presets() -> Iterator[None]:
    """Both packages keep presets on a class."""
    kept = [
        {name: getattr(network, name) for name in vars(ours.LycorisNetwork) if name.isupper() and name[0] != "_"}
        for network in (ours.LycorisNetwork, theirs.LycorisNetwork)
    ]
    yield
    for network, values in zip((ours.LycorisNetwork, theirs.LycorisNetwork), kept, strict=True):
        for name, value in values.items():
            setattr(network, name, value)


def model(kernels: bool = True) -> Model:
    torch.manual_seed(0)
    return Model(kernels)


def made(package: Any, name: str) -> tuple[Model, Any]:
    given = {"algo": name, "linear_dim": 4, "linear_alpha": 2, **SETTINGS[name]}
    plain = model(given.pop("kernels", True))
    network = package.create_lycoris(plain, 1.0, given.pop("linear_dim"), given.pop("linear_alpha"), **given)
    network.apply_to()
    return plain, network


def stir(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.mark.parametrize("name", SETTINGS)
def test_names_keys_and_shapes_are_lycoris_own(name: str) -> None:
    (_, mine), (_, other) = made(ours, name), made(theirs, name)
    shapes = [{key: tuple(t.shape) for key, t in network.state_dict().items()} for network in (mine, other)]
    if name == "dylora":  # theirs has a factor of two dimensions for a convolution, which few programs read
        shapes[0] = {key: tuple(n for n in shape if n != 1) for key, shape in shapes[0].items()}
        shapes[1] = {key: tuple(n for n in shape if n != 1) for key, shape in shapes[1].items()}
    if name.startswith("tlora"):  # ours has the tensors that training started from
        shapes[0] = {key: shape for key, shape in shapes[0].items() if ".base_" not in key}
        shapes[1] = {key: shape for key, shape in shapes[1].items() if ".base_" not in key}
    assert shapes[0] == shapes[1]
    assert [lora.lora_name for lora in mine.loras] == [lora.lora_name for lora in other.loras]
    kinds = [type(lora).__name__ for lora in other.loras]
    assert mine.algo_table == {kind: kinds.count(kind) for kind in kinds}
    for one, two in zip(mine.loras, other.loras, strict=True):
        assert tuple(one.shape) == tuple(two.shape)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_file_of_ours_loads_in_theirs(tmp_path: Path, name: str) -> None:
    plain, network = made(ours, name)
    stir(network)
    network.eval()
    x = torch.randn(3, 24)
    want = plain(x).detach()
    network.save_weights(str(tmp_path / "x.safetensors"), torch.float32, {"about": "a test"})
    reader = model(SETTINGS[name].get("kernels", True))
    if name in FAILS:
        made_theirs = made(theirs, name)[1]
        made_theirs.save_weights(str(tmp_path / "own.safetensors"), torch.float32, {})
        for file in ("x.safetensors", "own.safetensors"):
            with pytest.raises(FAILS[name]):
                theirs.create_lycoris_from_weights(1.0, str(tmp_path / file), reader)
        return
    other, _ = theirs.create_lycoris_from_weights(1.0, str(tmp_path / "x.safetensors"), reader)
    other.apply_to()
    torch.testing.assert_close(reader(x), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_file_of_theirs_loads_in_ours(tmp_path: Path, name: str) -> None:
    plain, network = made(theirs, name)
    stir(network)
    network.eval()
    x = torch.randn(3, 24)
    want = plain(x).detach()
    network.save_weights(str(tmp_path / "x.safetensors"), torch.float32, {})
    if name == "dylora":  # it trains at another scale than its files have; here the file counts
        again, state = model(False), network.state_dict()  # (which its own loader fails to read for convolutions)
        for name_in_file in {key.split(".")[0] for key in state}:
            weight = again.get_submodule(name_in_file.removeprefix("lycoris_")).weight
            up, down = (state[f"{name_in_file}.lora_{part}.weight"].flatten(1) for part in ("up", "down"))
            weight.data += (up @ down).view_as(weight) * 2 / 4
        assert not torch.allclose(again(x), want, atol=1e-3)
        want = again(x).detach()
    for way in ("apply", "merge", "load_weights"):
        reader = model(SETTINGS[name].get("kernels", True))
        if way == "load_weights":
            reader, other = made(ours, name)
            assert other.load_weights(str(tmp_path / "x.safetensors")) == {}
        else:
            other, _ = ours.create_lycoris_from_weights(1.0, str(tmp_path / "x.safetensors"), reader)
            other.apply_to() if way == "apply" else other.merge_to(1.0)
        torch.testing.assert_close(reader(x), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("package", [ours, theirs])
def test_a_script_of_simpletuner_runs_with_one_import_changed(tmp_path: Path, package: Any) -> None:
    config = {
        "algo": "lokr",
        "multiplier": 1,
        "linear_dim": 16,
        "linear_alpha": 1,
        "factor": 4,
        "full_matrix": True,
        "bypass_mode": True,
        "apply_preset": {"target_module": ["Linear"], "module_algo_map": {"Linear": {"factor": 2}}},
    }
    file = str(tmp_path / "pytorch_lora_weights.safetensors")
    transformer = model()
    transformer.requires_grad_(False)
    package.LycorisNetwork.apply_preset(config["apply_preset"])
    given = {key: value for key, value in config.items() if key not in ("multiplier", "linear_dim", "linear_alpha")}
    network = package.create_lycoris(transformer, 1, 16, 1, **given)
    for lora in network.loras:  # what its `init_lokr_norm` does
        lora.lokr_w1.data.fill_(1.0)
        noise = torch.randn(lora.lokr_w2.shape, generator=torch.Generator().manual_seed(1))
        lora.lokr_w2.data.copy_(noise * lora.org_weight.std() * 1e-2)
    network.apply_to()
    network = network.to("cpu", dtype=torch.float32)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-2)
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(2))
    for _ in range(3):
        transformer(x).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    network.set_multiplier(1.0)
    want = transformer(x).detach()
    kept = [p.detach().clone() for p in network.parameters()]  # its moving averages
    dtype = next(iter(network.parameters())).dtype
    network.save_weights(file, dtype, {"lycoris_config": json.dumps(config)})
    assert network.load_weights(file) == {}
    assert all(torch.equal(a, b) for a, b in zip(kept, network.parameters(), strict=True))
    fresh = model()
    loaded = package.create_lycoris_from_weights(1, file, fresh, weights_sd=None, **given)[0]
    loaded.merge_to()
    torch.testing.assert_close(fresh(x), want, rtol=0, atol=1e-5)
    network.restore()
    torch.testing.assert_close(transformer(x), model()(x), rtol=0, atol=0)
    assert {lora.lora_name for lora in network.loras} == {"lycoris_up", "lycoris_down"}


def test_the_same_script_gives_the_same_weights() -> None:
    """Two steps from the same tensors: where both compute alike, training does too."""
    outputs = []
    for package in (ours, theirs):
        plain, network = made(package, "lokr full")
        if package is ours:
            stir(network)
            start = {key: t.clone() for key, t in network.state_dict().items()}
        else:
            network.load_state_dict(start, strict=False)
        optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
        x = torch.randn(5, 24, generator=torch.Generator().manual_seed(2))
        for _ in range(2):
            plain(x).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
        outputs.append(plain(x).detach())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-5)


def test_modules_are_found_and_made_from_tensors() -> None:
    plain, network = made(theirs, "lora dora")
    stir(network)
    state = network.state_dict()
    for lora in network.loras:
        kind, tensors = ours.get_module(state, lora.lora_name)
        assert kind is ours.LoConModule
        module = ours.make_module(kind, tensors, lora.lora_name, lora.org_module[0])
        want, _ = lora.get_merged_weight(1.0, lora.shape)
        got, _ = module.get_merged_weight(1.0, lora.shape)
        torch.testing.assert_close(got, want.detach(), rtol=0, atol=1e-5)
    assert ours.get_module(state, "lycoris_nothing") == (None, None)
    assert ours.make_module(None, (), "x", plain.up) is None


def test_two_networks_are_taken_off_in_any_order() -> None:
    plain = model()
    x = torch.randn(3, 24)
    base = plain(x)
    networks = []
    for algo in ("lokr", "loha"):
        network = ours.create_lycoris(plain, 1.0, 4, 2, algo=algo)
        network.apply_to()
        stir(network)
        networks.append(network)
    both = plain(x)
    networks[0].restore()
    second = plain(x)
    assert not torch.allclose(both, second)
    assert not torch.allclose(second, base)
    networks[1].restore()
    assert torch.equal(plain(x), base)


def test_onfly_and_precise_merges_give_the_bits_back() -> None:
    plain, network = made(ours, "lokr dora")
    plain.bfloat16()
    bits = {key: t.clone() for key, t in plain.state_dict().items()}
    stir(network)
    network.restore()
    network.onfly_merge(0.7)
    assert any(not torch.equal(t, bits[key]) for key, t in plain.state_dict().items())
    network.onfly_restore()
    assert all(torch.equal(t, bits[key]) for key, t in plain.state_dict().items())
    network.merge_to(0.3, precise=True)
    network.merge_to(0.4, precise=True)
    stepwise = {key: t.clone() for key, t in plain.state_dict().items()}
    network.merge_to(-0.7, precise=True)
    assert all(torch.equal(t, bits[key]) for key, t in plain.state_dict().items())
    network.merge_to(0.7, precise=True)
    assert all(torch.equal(t, stepwise[key]) for key, t in plain.state_dict().items())


def test_what_no_target_matches_is_an_error_that_names_classes() -> None:
    with pytest.raises(TargetError, match="chooses no layer of Model"):
        ours.create_lycoris(model(), 1.0, 4, 2, apply_preset={"target_module": ["Attention"]})
    with pytest.raises(KeyError, match="target_module"):
        ours.LycorisNetwork.apply_preset({"target_modul": []})


@pytest.mark.parametrize("strength", [0.0, 0.4])
def test_dora_at_part_strength_lies_between_base_and_trained(strength: float) -> None:
    """LyCORIS leaves W + dW at strength 0 (docs/migrating-from-lycoris.md); here it is the base."""
    plain, network = made(ours, "lora dora")
    stir(network)
    network.set_multiplier(strength)
    network.restore()
    x = torch.randn(3, 24)
    base = plain(x)
    lora = network.loras[0]
    full, _ = lora.get_diff_weight(1.0)
    part, _ = lora.get_diff_weight(strength)
    torch.testing.assert_close(part, full * strength)
    network.apply_to()
    assert torch.equal(plain(x), base) is (strength == 0)
