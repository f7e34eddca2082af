"""The first save and the first load of a process are no slower than they must be: they import no compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys

import torch
from torch import nn

import nerine
from nerine.algorithms import REGISTRY
from nerine.algorithms.dora import DoRA

for name, kind in REGISTRY.items():
    for dora in (False, True):
        if kind is DoRA or (dora and name in ("norm", "full")):
            continue
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(16, 24), nn.LayerNorm(24))
        what = nerine.DoRA(kind()) if dora else kind()
        network = nerine.attach(layers, what, targets=["1" if name == "norm" else "0"])
        nerine.save(network, f"{name}.safetensors")
        nerine.load(layers, f"{name}.safetensors", name="again")
        if "torch._dynamo" in sys.modules:
            sys.exit(f"{name}, dora={dora}: imported torch._dynamo")
print("done", len(REGISTRY))
"""


def test_no_compiler_is_imported(tmp_path: Path) -> None:
    """torch imports it where an operation on a meta tensor is written in Python, which takes seconds once."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("done")
