"""Random programs of what a user may do to a model and its adapters, in any order, on several devices.

After each step the model computes what a plain model with the same adapters computes on the CPU, or nerine has raised
one of its own errors. What must never be seen is torch's own complaint about devices or formats.
"""

from __future__ import annotations

import copy

import hypothesis
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_submodules
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import nerine
from devices.models import CPU, SETTINGS, Mixed, algorithms_of, close, folder, input_of, model_of, stir
from nerine.algorithms import Algorithm
from nerine.errors import DeviceError
from nerine.model.network import Network

DEVICES = [CPU, torch.device("cuda", 0), torch.device("cuda", 1)]
ALGORITHMS = [algorithm for name in SETTINGS for algorithm in algorithms_of(name)]


class Programs(RuleBasedStateMachine):
    """A model under test, and the plain one on the CPU that it must agree with."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.plain = model_of(Mixed), model_of(Mixed)
        self.at = CPU  # where the model computes
        self.hooked = ""
        self.networks: dict[str, tuple[Network, Network]] = {}
        self.steps = 0

    # -- adapters
    @precondition(lambda self: len(self.networks) < 2)
    @rule(algorithm=st.sampled_from(ALGORITHMS), own=st.booleans())
    def attach(self, algorithm: Algorithm, own: bool) -> None:
        name = next(n for n in ("one", "two") if n not in self.networks)
        if any(pair[0].is_merged for pair in self.networks.values()):
            return
        pair = []
        for model in (self.model, self.plain):
            torch.manual_seed(5)
            pair.append(stir(nerine.attach(model, algorithm, name=name, own=own)))
        self.networks[name] = (pair[0], pair[1])

    @precondition(lambda self: self.networks)
    @rule(data=st.data())
    def save_and_load(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.networks)))
        ours, _ = self.networks[name]
        file = folder() / "adapter.safetensors"
        nerine.save(ours, file)
        if not ours.is_merged:
            nerine.load(ours, file)
            nerine.load(ours, file)

    @precondition(lambda self: self.networks)
    @rule(data=st.data())
    def load_anew(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.networks)))
        if any(n.is_merged for pair in self.networks.values() for n in pair):
            return
        file = folder() / "adapter.safetensors"
        nerine.save(self.networks[name][1], file)
        for network in self.networks[name]:
            network.detach()
        own = data.draw(st.booleans())
        ours, plain = (nerine.load(model, file, name=name, own=own) for model in (self.model, self.plain))
        self.networks[name] = (ours, plain)

    @precondition(lambda self: self.networks)
    @rule(data=st.data())
    def detach(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.networks)))
        for network in self.networks.pop(name):
            network.detach()

    @precondition(lambda self: self.networks)
    @rule()
    def merge(self) -> None:
        if any(pair[0].is_merged for pair in self.networks.values()):
            return
        for model in (self.model, self.plain):
            Network.of(model).merge()

    @rule()
    def unmerge(self) -> None:
        for model in (self.model, self.plain):
            if self.networks and Network.of(model).is_merged:
                Network.of(model).unmerge()

    @precondition(lambda self: self.networks)
    @rule(data=st.data(), value=st.sampled_from([0.0, 0.5, 1.0, -1.0]))
    def strength(self, data: st.DataObject, value: float) -> None:
        name = data.draw(st.sampled_from(sorted(self.networks)))
        for network in self.networks[name]:
            if not network.is_merged:
                network.strength = value

    @precondition(lambda self: self.networks and not any(p[0].is_merged for p in self.networks.values()))
    @rule()
    def train(self) -> None:
        if not any(a.strength for pair in self.networks.values() for *_, a in pair[0].adapters()):
            return  # nothing that is trained takes part
        for model, x, side in ((self.model, self.x(), 0), (self.plain, input_of(), 1)):
            model.eval()  # without chance
            for pair in self.networks.values():
                pair[side].eval()
            networks = [pair[side] for pair in self.networks.values()]
            optimizer = torch.optim.SGD([p for n in networks for p in n.parameters()], lr=0.01)
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    # -- places
    def x(self) -> torch.Tensor:
        return input_of(self.at)

    @precondition(lambda self: not self.hooked)
    @rule(device=st.sampled_from(DEVICES))
    def move(self, device: torch.device) -> None:
        self.model.to(device)
        self.at = device

    @precondition(lambda self: self.networks)
    @rule(data=st.data(), device=st.sampled_from(DEVICES))
    def move_adapters(self, data: st.DataObject, device: torch.device) -> None:
        name = data.draw(st.sampled_from(sorted(self.networks)))
        ours = self.networks[name][0]
        ours.to(device)
        if not any(adapter.belongs for *_, adapter in ours.adapters()):
            return  # the host's adapters may be anywhere
        if device != self.at and not ours.is_merged and ours.strength:
            with pytest.raises(DeviceError, match="its adapter is on"):
                self.model(self.x())
        ours.to(self.at)

    @precondition(lambda self: not self.hooked)
    @rule(kind=st.sampled_from(["cpu", "disk"]), device=st.sampled_from(DEVICES[1:]))
    def offload(self, kind: str, device: torch.device) -> None:
        self.model.to(CPU)
        if kind == "cpu":
            cpu_offload(self.model, device)
        else:
            disk_offload(self.model, str(folder()), device)
        self.hooked, self.at = kind, device

    @precondition(lambda self: self.hooked)
    @rule()
    def take_hooks_off(self) -> None:
        remove_hook_from_submodules(self.model)
        if any(p.is_meta for p in self.model.parameters()):
            raise AssertionError("a parameter was left on meta")
        self.hooked = ""
        self.move(self.at)

    @rule(dtype=st.sampled_from([torch.bfloat16, torch.float16]))
    def cast_there_and_back(self, dtype: torch.dtype) -> None:
        """A half-precision excursion of the adapters' base must not round the adapters."""
        if self.hooked or any(n.is_merged for pair in self.networks.values() for n in pair):
            return
        state = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.model.to(dtype)
        y = self.model(self.x().to(dtype))
        assert y.dtype == dtype
        self.model.float()
        own = self.model.state_dict()
        for key, value in state.items():
            if "nerine" in key:
                assert torch.equal(own[key], value), f"{key} was rounded"
        self.model.load_state_dict(state)

    @precondition(lambda self: not self.hooked)
    @rule()
    def copied(self) -> None:
        names = list(self.networks)
        self.model = copy.deepcopy(self.model)
        self.networks = {n: (Network.of(self.model)[n], self.networks[n][1]) for n in names}

    # -- what must hold
    @invariant()
    def computes_as_on_the_cpu(self) -> None:
        for model in (self.model, self.plain):
            model.eval()
        for pair in self.networks.values():
            for network in pair:
                network.eval()
        with torch.no_grad():
            close(self.model(self.x()), self.plain(input_of()), "output", 2e-3)


def run(programs: int, seed: int = 0) -> int:
    """So many random programs; returns how many ran. Raises the smallest that fails, in its steps."""
    count = 0

    class Counted(Programs):
        def __init__(self) -> None:
            nonlocal count
            count += 1
            super().__init__()

    settings = hypothesis.settings(
        max_examples=programs,
        stateful_step_count=12,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    run_state_machine_as_test(hypothesis.seed(seed)(Counted), settings=settings)
    return count
