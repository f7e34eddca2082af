"""A run that is killed at random moments and gone on with arrives at the same bits as one that was left alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "killed_training.py"
COMMON = "--rank 2 --targets attn-only --steps 12 --save-every 3 --batch-size 2 --ema 0.9"
VALIDATED = "--validation-share 0.05 --validation-times 1 --validate-every 4"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither fork nor SIGKILL"),
]


@pytest.mark.parametrize(
    ("tries", "settings"),
    [
        (3, f"{COMMON} {VALIDATED} --algo lora --dropout 0.2 --caption-dropout 0.3 --flip"),
        (2, f"{COMMON} --algo lokr --dora --module-dropout 0.2 --optimizer prodigy --lr 1 --accumulate 2"),
    ],
    ids=["lora", "dora-lokr"],
)
def test_killed_runs_arrive_at_the_same_bits(tmp_path: Path, tries: int, settings: str) -> None:
    command = [sys.executable, str(PROGRAM), str(tmp_path), str(tries), *settings.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["broken"] == []
    assert found["killed"] >= tries, "most of the runs were killed at least once"
    assert len(found["steps"]) >= 2, "they were killed at different places"
