"""sd-scripts itself with nerine.kohya, where NERINE_SD_SCRIPTS names a checkout of it.

NERINE_SD_SCRIPTS_PYTHON is the interpreter of an environment with its requirements; without, that of the tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CHECKOUT = os.environ.get("NERINE_SD_SCRIPTS", "")

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not CHECKOUT, reason="needs a checkout of sd-scripts: set NERINE_SD_SCRIPTS to it"),
]


def run(script: str, *arguments: str) -> Any:
    """What a script of tests/sd_scripts prints last."""
    python = os.environ.get("NERINE_SD_SCRIPTS_PYTHON", sys.executable)
    command = [python, str(ROOT / "tests" / "sd_scripts" / script), CHECKOUT, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip(), done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_regional_prompts_are_sd_scripts_own() -> None:
    found = run("regions.py")
    assert min(found["moved"]) > 0.1
    assert found["text encoder"] < 1e-5
    assert found["unet"] < 1e-5


@pytest.mark.parametrize("algorithm", ["lora", "lokr", "diag-oft"])
def test_the_real_trainer(algorithm: str) -> None:
    found = run("real_loop.py", algorithm, "--quick")
    assert [case["bad"] for case in found["cases"]] == [{}, {}]
    assert found["failed"] == 0
