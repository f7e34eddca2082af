"""Every route by which tensors used to end up apart, and random programs: on a GPU, or the simulated one."""

from __future__ import annotations

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
def test_no_route_leads_apart(names: list[str], run_on_simulated_cuda, tmp_path) -> None:
    report = tmp_path / "report.json"
    run_on_simulated_cuda(
        f"""{QUIET}
from devices import routes

rows = list(routes.run({names!r}))
open({str(report)!r}, "w").write(json.dumps(rows))
"""
    )
    import json

    rows = json.loads(report.read_text())
    failures = [f"{route}: {form}\n{failure}" for route, _, form, failure in rows if failure]
    assert not failures, f"{len(failures)} of {len(rows)}:\n" + "\n".join(failures[:5])
    documented = recorded()
    for key, cell in cells(rows).items():
        assert documented.get(key) == cell, f"docs/devices.md: {key}; write it anew with tests/devices/table.py"


@pytest.mark.parametrize("seed", [1, 2])
def test_random_programs_agree_with_the_cpu(seed: int, run_on_simulated_cuda) -> None:
    run_on_simulated_cuda(
        f"""{QUIET}
from devices import machine

assert machine.run(250, seed={seed}) >= 250
"""
    )
