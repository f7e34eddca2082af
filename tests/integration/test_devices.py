"""Every route by which tensors used to end up apart, and random programs: on a GPU, or the simulated one."""

from __future__ import annotations

import json

import pytest

from devices.table import cells, recorded
from nerine.algorithms import REGISTRY

NAMES = sorted(REGISTRY)
PARTS = [NAMES[i::4] for i in range(4)]  # one process each; in a process they share what importing costs

QUIET = """
import json, logging, warnings

logging.disable(logging.WARNING)
warnings.filterwarnings("ignore", module="(torch|accelerate|diffusers|transformers|torchao|deepspeed|importlib|ast)")
"""


@pytest.mark.parametrize("names", PARTS, ids=",".join)
@pytest.mark.slow
def test_no_route_leads_apart(names: list[str], run_on_simulated_cuda, tmp_path) -> None:
    report = tmp_path / "report.json"
    run_on_simulated_cuda(
        f"""{QUIET}
from devices import routes

rows = list(routes.run({names!r}))
open({str(report)!r}, "w").write(json.dumps(rows))
"""
    )
    rows = json.loads(report.read_text())
    failures = [f"{route}: {form}\n{failure}" for route, _, form, failure in rows if failure]
    assert not failures, f"{len(failures)} of {len(rows)}:\n" + "\n".join(failures[:5])
    documented = recorded()
    for key, cell in cells(rows).items():
        assert documented.get(key) == cell, f"docs/devices.md: {key}; write it anew with tests/devices/table.py"


def test_offloading_saves_the_memory_that_it_is_for(run_on_simulated_cuda) -> None:
    """Peak of a training step, in sizes of the base: more than the weights when they stay, little when they come."""
    run_on_simulated_cuda(
        f"""{QUIET}
import gc, tempfile
import nerine
from accelerate import cpu_offload, disk_offload
from diffusers.hooks import apply_group_offloading

ALGORITHMS = [
    (nerine.LoRA(rank=4), 1.10, 0.20), (nerine.LoKr(rank=4, factor=8), 1.10, 0.20),
    (nerine.IA3(), 1.10, 0.20), (nerine.DoRA(nerine.LoRA(rank=4)), 1.15, 0.25),
]
ENGINES = [
    lambda model: cpu_offload(model, DEVICE),
    lambda model: disk_offload(model, tempfile.mkdtemp(), DEVICE),
    lambda model: apply_group_offloading(model, DEVICE, offload_type="leaf_level"),
    lambda model: apply_group_offloading(model, DEVICE, offload_type="block_level", num_blocks_per_group=1),
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(512, 512), nn.GELU()) for _ in range(12)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def peak(algorithm, place):
    gc.collect()
    model = Net()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    place(model)
    nerine.attach(model, algorithm)
    x = torch.randn(4, 512, device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    model(x).square().mean().backward()
    return torch.cuda.max_memory_allocated() / size


for algorithm, resident, away in ALGORITHMS:
    assert 1 < peak(algorithm, lambda model: model.to(DEVICE)) < resident, algorithm
    for engine in ENGINES:
        assert peak(algorithm, engine) < away, algorithm
"""
    )


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.slow
def test_random_programs_agree_with_the_cpu(seed: int, run_on_simulated_cuda) -> None:
    run_on_simulated_cuda(
        f"""{QUIET}
from devices import machine

assert machine.run(250, seed={seed}) >= 250
"""
    )
