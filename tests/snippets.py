"""Snippets of tests that run in a process of their own, on a device which is installed there for good.

`torch`, `nn`, `F` and `DEVICE` are there without an import. A process costs seconds (more with diffusers), so one
snippet may hold several checks: functions named `check_...`. Each is called, seeded alike, also when one before it
has failed; the test fails with the tracebacks of all that did.

This module must not import torch: a device may have to be there before.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import traceback
import types
import warnings
from pathlib import Path

import pytest


def run_snippet(code: str, folder: Path, *, device: str) -> None:
    """Executes the snippet in a new process; the test fails with what it printed, traceback included, if it fails.

    `device` is the expression `module.function(...)` that installs the device and returns it.
    """
    snippet = folder / "snippet.py"
    snippet.write_text(textwrap.dedent(code), encoding="utf-8")
    module = device.partition(".")[0]
    # Past the snippet, torch sometimes aborts while it tears down the autograd threads of a device that lives in
    # Python; what the snippet checks is over by then, so leave without the teardown.
    program = (
        f"import os, sys, {module}, snippets; failures = snippets.execute({str(snippet)!r}, {device}); "
        "sys.stdout.flush(); sys.stderr.flush(); os._exit(min(failures, 1))"
    )
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        pytest.fail(f"{device}, exit {done.returncode}:\n{done.stdout}", pytrace=False)


def execute(path: str, device: object) -> int:
    """Runs the file at `path` and the checks in it; how many of them failed. Prints their tracebacks."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    module = types.ModuleType("snippet")  # a module, so that what the snippet defines can be pickled
    module.__dict__.update(torch=torch, nn=torch.nn, F=torch.nn.functional, DEVICE=device, __file__=path)
    sys.modules[module.__name__] = module

    def run_file() -> None:
        exec(compile(Path(path).read_text(encoding="utf-8"), path, "exec"), module.__dict__)

    if failed := _fails(run_file):
        return failed
    checks = [value for name, value in vars(module).items() if name.startswith("check_") and callable(value)]
    return sum(_fails(check) for check in checks)


def _fails(check) -> bool:
    import torch

    gc.collect()  # what the check before left is not this one's memory
    torch.manual_seed(0)
    try:
        check()
    except Exception:
        print(f"\n-- {check.__name__}\n{traceback.format_exc()}", flush=True)
        return True
    return False
