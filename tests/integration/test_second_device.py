"""Training steps on a device other than the CPU, with real values (see tests/second_device.py)."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

import pytest


def test_mixed_devices_raise_the_sentence_of_cuda(run_on_second_device) -> None:
    run_on_second_device(
        """
        import pytest

        sentence = "Expected all tensors to be on the same device, but found at least two devices"
        mixed = [
            lambda: nn.Linear(4, 4).to(DEVICE)(torch.randn(2, 4)),
            lambda: nn.Linear(4, 4)(torch.randn(2, 4, device=DEVICE)),
            lambda: nn.Conv2d(2, 3, 3).to(DEVICE)(torch.randn(1, 2, 5, 5)),
            lambda: torch.einsum("ij,jk", torch.ones(2, 3), torch.ones(3, 4, device=DEVICE)),
            lambda: torch.ones(4, device=DEVICE) + torch.ones(4),
            lambda: torch.ones(4).mul_(torch.ones(4, device=DEVICE)),
            lambda: torch.ones(4, device=DEVICE) + torch.ones(4, device="fakegpu:1"),
            lambda: torch.ones(4) * torch.tensor(2.0, device=DEVICE),
            lambda: torch.ones(4)[torch.tensor([0], device=DEVICE)],
        ]
        for operation in mixed:
            with pytest.raises(RuntimeError, match=sentence):
                operation()
        """
    )


def test_what_cuda_allows_is_allowed(run_on_second_device) -> None:
    run_on_second_device(
        """
        ones = torch.ones(2, 2, device=DEVICE)
        assert (ones * torch.tensor(3.0)).cpu().tolist() == [[3, 3], [3, 3]]
        assert ones[torch.tensor([1])].device == DEVICE
        assert ones.to("fakegpu:1").device == torch.device("fakegpu:1")
        assert torch.zeros(2, 2).copy_(ones).tolist() == [[1, 1], [1, 1]]
        assert ones.clone().copy_(torch.zeros(2, 2)).sum().item() == 0

        rows = torch.arange(6.0, device=DEVICE).view(2, 3)
        rows[1].add_(1)
        rows.t()[0].mul_(2)
        rows.view(-1)[1:3].zero_()
        assert rows.cpu().tolist() == [[0, 0, 0], [8, 5, 6]]

        factories = torch.zeros, torch.ones, torch.empty, torch.rand, torch.randn
        made = [factory(2, 3, device=DEVICE) for factory in factories]
        made += [torch.eye(2, device=DEVICE), torch.tensor([1.0], device=DEVICE), torch.zeros_like(ones)]
        made += [torch.kron(ones, ones), torch.linalg.svd(ones)[1], torch.linalg.solve(made[5] + ones, ones)]
        assert all(t.device == DEVICE for t in made)
        """
    )


def test_training_equals_the_cpu(run_on_second_device) -> None:
    run_on_second_device(
        """
        import copy

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 16, 3, padding=1)
                self.norm = nn.GroupNorm(4, 16)
                self.up = nn.Linear(16, 32)
                self.layer_norm = nn.LayerNorm(32)
                self.out = nn.Linear(32, 8)

            def forward(self, x):
                x = self.norm(self.conv(x)).mean((2, 3))
                return self.out(self.layer_norm(torch.relu(self.up(x))))

        def step(net, x):
            optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
            losses = []
            for _ in range(3):
                optimizer.zero_grad()
                loss = net(x).square().mean()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            return losses

        on_cpu = Net()
        on_device = copy.deepcopy(on_cpu)
        parameters = list(on_device.parameters())
        on_device.to(DEVICE)
        assert all(a is b for a, b in zip(parameters, on_device.parameters()))
        assert all(isinstance(p, nn.Parameter) and p.device == DEVICE for p in parameters)

        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(step(on_device, x.to(DEVICE)), step(on_cpu, x))
        for ours, theirs in zip(on_device.parameters(), on_cpu.parameters()):
            assert ours.grad.device == DEVICE
            torch.testing.assert_close(ours.grad.cpu(), theirs.grad)
            torch.testing.assert_close(ours.detach().cpu(), theirs.detach())

        on_device.load_state_dict(on_cpu.state_dict())
        assert on_device.cpu().up.weight.device.type == "cpu"
        """
    )


def test_the_machinery_around_a_model_works(run_on_second_device) -> None:
    run_on_second_device(
        """
        from torch.utils.checkpoint import checkpoint

        layer = nn.Linear(4, 3).to(DEVICE)
        x = torch.randn(2, 4, device=DEVICE, requires_grad=True)

        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            y = layer(x)
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32

        x.grad = None
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        assert x.grad.device == DEVICE

        with torch.device(DEVICE):
            assert nn.Linear(3, 3).weight.device == DEVICE

        layer.weight.data = layer.weight.data.cpu()
        assert layer.weight.device.type == "cpu" and isinstance(layer.weight, nn.Parameter)
        layer.weight.data = layer.weight.data.to("fakegpu:1")
        assert layer.weight.device == torch.device("fakegpu:1")
        """
    )


def test_a_failing_snippet_fails_the_test_with_its_traceback(run_on_second_device) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"assert 1 == 2(.|\n)*AssertionError"):
        run_on_second_device("assert 1 == 2")


# -- adapters on the device ------------------------------------------------------------------------------------------
ADAPTED = """
import copy, itertools, os
import nerine
from nerine import BOFT, IA3, DiagOFT, DoRA, DyLoRA, Full, GLoRA, LoHa, LoKr, LoRA, Norm, OFTv2, TLoRA
from nerine.algorithms import REGISTRY
from nerine.testing.battery import around

PLAIN = {
    "lora": [LoRA(rank=2, alpha=1.0), LoRA(rank=2, alpha=1.0, tucker=True, scalar=True)],
    "loha": [LoHa(rank=2, alpha=1.0), LoHa(rank=2, alpha=1.0, tucker=True, scalar=True)],
    "lokr": [LoKr(rank=1, alpha=2.0), LoKr(rank=1, alpha=2.0, decompose_both=True, tucker=True), LoKr(factor=2)],
    "dylora": [DyLoRA(rank=2, alpha=1.0, block_size=2)],
    "tlora": [TLoRA(rank=2, alpha=1.0)],
    "glora": [GLoRA(rank=2, alpha=1.0)],
    "full": [Full()],
    "norm": [Norm()],
    "ia3": [IA3(), IA3(on_input=True)],
    "diag-oft": [DiagOFT(block_size=2, constraint=0.0625, rescale=True)],
    "boft": [BOFT(block_size=2, constraint=0.0625, rescale=True)],
    "oft-v2": [OFTv2(block_size=2), OFTv2(block_size=2, terms=0)],
}
assert PLAIN.keys() == REGISTRY.keys()
ALGORITHMS = [w for a in sum(PLAIN.values(), []) for w in around(a)]
NOISES = [{}, {"dropout": 0.2, "rank_dropout": 0.2, "module_dropout": 0.2}]

def model_of():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, (3, 2), padding=1, stride=2)
    return nn.Sequential(conv, nn.Flatten(2), nn.Linear(6, 10), nn.LayerNorm(10)).double()

def stir(network, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_((0.3 * torch.randn(p.shape, generator=generator)).to(p.dtype).to(p.device))

def paths(network, through_weight):
    for *_, adapter in network.adapters():
        adapter.prefers_weight = through_weight

def step(model, network, device):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 4, 4, 5, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    torch.manual_seed(3)
    y = model(x)
    y.square().sum().backward()
    found = {"y": y, "x": x.grad, **{k: p.grad for k, p in network.named_parameters()}}
    for p in network.parameters():
        p.grad = None
    assert y.device.type == torch.device(device).type
    return {k: t.detach().cpu() for k, t in found.items() if t is not None}

def same(got, want, what):
    assert got.keys() == want.keys(), what
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-9, atol=1e-11, msg=lambda m: f"{what}: {key}: {m}")
"""


@pytest.fixture
def run_adapted(run_on_second_device) -> Callable[[str], None]:
    """Executes a snippet with small models, every algorithm, and a training step to compare."""
    return lambda code: run_on_second_device(ADAPTED + textwrap.dedent(code))


def test_a_generator_of_the_cpu_gives_the_same_start_there(run_adapted) -> None:
    run_adapted(
        """
        for algorithm in ALGORITHMS:
            starts = []
            for device in ("cpu", DEVICE):
                model = model_of().to(device)
                network = nerine.attach(model, algorithm, generator=torch.Generator().manual_seed(5))
                assert all(p.device.type == torch.device(device).type for p in network.parameters())
                starts.append([p.detach().cpu() for p in network.parameters()])
            assert all(torch.equal(one, two) for one, two in zip(*starts, strict=True)), algorithm
            assert len(starts[0]) > 0
        """
    )


@pytest.mark.slow
def test_adapters_train_there_as_on_the_cpu(run_adapted) -> None:
    run_adapted(
        """
        for algorithm, noise, weight in itertools.product(ALGORITHMS, NOISES, (False, True)):
            what = f"{algorithm}, {noise}, through weight: {weight}"
            on_cpu = model_of()
            network = nerine.attach(on_cpu, algorithm, **noise)
            stir(network)
            paths(network, weight)
            want = step(on_cpu, network, "cpu")

            moved = model_of()
            network = nerine.attach(moved, algorithm, **noise)
            stir(network)
            moved.to(DEVICE)
            assert all(p.device == DEVICE and p.is_leaf for p in network.parameters())
            paths(network, weight)
            same(step(moved, network, DEVICE), want, f"attached, then moved: {what}")

            there = model_of().to(DEVICE)
            network = nerine.attach(there, algorithm, **noise)
            assert all(p.device == DEVICE and p.is_leaf for p in network.parameters())
            network.load_state_dict(nerine.Network.of(moved).state_dict())
            paths(network, weight)
            same(step(there, network, DEVICE), want, f"moved, then attached: {what}")
        """
    )


def test_merging_there(run_adapted) -> None:
    run_adapted(
        """
        x = torch.randn(2, 4, 4, 5, dtype=torch.float64)
        for algorithm in ALGORITHMS:
            model = model_of()
            network = nerine.attach(model, algorithm)
            stir(network)
            want = model(x).detach()
            model.to(DEVICE)
            bits = model[2].weight.detach().clone()
            network.merge()
            assert model[2].weight.device == DEVICE
            torch.testing.assert_close(model(x.to(DEVICE)).cpu().detach(), want)
            model.cpu()
            torch.testing.assert_close(model(x).detach(), want)
            model.to(DEVICE)
            network.unmerge()
            assert torch.equal(model[2].weight.cpu(), bits.cpu())
            torch.testing.assert_close(model(x.to(DEVICE)).cpu().detach(), want)
        """
    )


def test_files_of_the_cpu_there_and_back(run_adapted, tmp_path) -> None:
    run_adapted(
        f"""
        os.chdir({str(tmp_path)!r})
        x = torch.randn(2, 4, 4, 5, dtype=torch.float64)
        for algorithm in ALGORITHMS:
            model = model_of()
            network = nerine.attach(model, algorithm)
            stir(network)
            want = model(x).detach()
            nerine.save(network, "cpu.safetensors")

            there = model_of().to(DEVICE)
            network = nerine.load(there, "cpu.safetensors", strict=True)
            assert all(p.device == DEVICE for p in network.parameters())
            torch.testing.assert_close(there(x.to(DEVICE)).cpu().detach(), want)
            nerine.load(network, "cpu.safetensors")
            assert all(p.device == DEVICE for p in network.parameters())
            torch.testing.assert_close(there(x.to(DEVICE)).cpu().detach(), want)

            nerine.save(network, "there.safetensors")
            same_bytes = open("there.safetensors", "rb").read() == open("cpu.safetensors", "rb").read()
            assert same_bytes or "scalar" in str(algorithm)
            back = model_of()
            nerine.load(back, "there.safetensors")
            torch.testing.assert_close(back(x).detach(), want)
        """
    )


@pytest.mark.slow
def test_an_adapter_left_behind_never_gives_the_mixed_device_error(run_adapted) -> None:
    """A host that owns the adapters moves the model alone; the adapters follow the activations, or are merged."""
    run_adapted(
        """
        for algorithm, weight in itertools.product(ALGORITHMS, (False, True)):
            on_cpu = model_of()
            network = nerine.attach(on_cpu, algorithm, own=False, rank_dropout=0.1)
            stir(network)
            paths(network, weight)
            want = step(on_cpu, network, "cpu")
            merged = copy.deepcopy(on_cpu)

            on_cpu.to(DEVICE)
            assert all(p.device.type == "cpu" for p in network.parameters())
            same(step(on_cpu, network, DEVICE), want, f"{algorithm}, left behind")
            network.to(DEVICE)
            same(step(on_cpu, network, DEVICE), want, f"{algorithm}, moved after")

            merged.to(DEVICE)
            calm = nerine.Network.of(merged)
            calm.eval()
            x = torch.randn(2, 4, 4, 5, dtype=torch.float64).to(DEVICE)
            before = merged(x).cpu().detach()
            calm.merge()
            torch.testing.assert_close(merged(x).cpu().detach(), before)
        """
    )


def test_autocast_and_half_precision_there(run_adapted) -> None:
    run_adapted(
        """
        for algorithm, weight in itertools.product(ALGORITHMS, (False, True)):
            model = model_of().float().to(DEVICE)
            network = nerine.attach(model, algorithm, **NOISES[1])
            paths(network, weight)
            x = torch.randn(2, 4, 4, 5).to(DEVICE)
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
                y = model(x)
            assert y.dtype == torch.bfloat16 and y.device == DEVICE
            y.float().sum().backward()
            assert all(p.grad is None or torch.isfinite(p.grad.cpu()).all() for p in network.parameters())

            half = model_of().bfloat16().to(DEVICE)
            network = nerine.attach(half, algorithm)
            assert all(p.dtype == torch.float32 and p.device == DEVICE for p in network.parameters())
            half(x.bfloat16()).float().sum().backward()
        """
    )


def test_layers_on_different_devices(run_adapted) -> None:
    """As a device map has it: each adapter lives with its layer."""
    run_adapted(
        """
        for algorithm, (first, second) in itertools.product(
            ALGORITHMS, ((DEVICE, torch.device("fakegpu:1")), (DEVICE, torch.device("cpu")))
        ):
            model = model_of()
            model[0].to(first)
            model[2].to(second)
            network = nerine.attach(model, algorithm)
            where = {path: next(a.parameters()).device for path, _, a in network.adapters()}
            assert where.items() <= {"0": first, "2": second, "3": torch.device("cpu")}.items() and where
            if algorithm.kinds == {"norm"}:
                continue
            x = torch.randn(2, 4, 4, 5, dtype=torch.float64).to(first)
            y = model[2](model[1](model[0](x)).to(second))
            assert y.device == second
            if second.type == "cpu":  # autograd has no queue for a second device of Python's
                y.sum().backward()
        """
    )


def test_checkpointing_there(run_adapted) -> None:
    run_adapted(
        """
        from torch.utils.checkpoint import checkpoint

        for algorithm in ALGORITHMS:
            model = model_of().to(DEVICE)
            network = nerine.attach(model, algorithm, **NOISES[1])
            stir(network)
            want = step(model, network, DEVICE)
            got = step(lambda x: checkpoint(model, x, use_reentrant=False), network, DEVICE)
            same(got, want, f"{algorithm}, checkpointed")
        """
    )
