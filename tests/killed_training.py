"""Training that is killed again and again, in a process of its own that forks one for each try.

    python tests/killed_training.py FOLDER TRIES SETTINGS...

A run is made without a disturbance; the same run is then killed (SIGKILL) at random moments and gone on with, until it
is at its end, TRIES times over. The moments follow the run's own history and not a clock, so that no run slips by on a
busy machine: its first process dies in the first half of the steps, those after it wherever chance has it. Prints as
JSON how often it was killed, and every difference between the two: in the files of the adapters (bytes), in the state
of the last checkpoint (bits), in the history of losses (digits).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nerine.cli import main as nerine_main
from nerine.tiny import style_set


def started(arguments: list[str]) -> int:
    """The number of a process that runs a command, its output left aside."""
    child = os.fork()
    if child:
        return child
    with open("child.log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.argv = ["nerine", *arguments]
    code = 1
    try:
        nerine_main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int:
    """The exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def reached(out: Path) -> int:
    """The last step in the history of a run; 0 before there is one."""
    file = out / "history.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def killed_after(child: int, out: Path, step: int, delay: float) -> int:
    """The exit code of a process that is killed `delay` seconds after it did `step`, unless it is over by then."""
    while reached(out) < step:
        over, status = os.waitpid(child, os.WNOHANG)
        if over:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return ended(child)


def differences(one: Any, two: Any, where: str) -> list[str]:
    """Where two nests of dicts, lists and tensors are not the same to the bit."""
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return [line for key in one for line in differences(one[key], two[key], f"{where}.{key}")]
    if isinstance(one, list | tuple) and type(one) is type(two) and len(one) == len(two):
        return [
            line for n, (a, b) in enumerate(zip(one, two, strict=True)) for line in differences(a, b, f"{where}.{n}")
        ]
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return [] if torch.equal(one, two) else [f"{where}: {float((one - two).abs().max()):.1e} apart"]
    return [] if one == two else [f"{where}: {one!r} and {two!r}"]


def state_of(out: Path) -> dict[str, Any]:
    """The last checkpoint without the clock and the paths."""
    last = sorted((out / "checkpoints").iterdir())[-1]
    state: dict[str, Any] = torch.load(last / "state.pt", weights_only=True)
    return {key: value for key, value in state.items() if key not in ("seconds", "settings")}


def history_of(out: Path) -> list[dict[str, Any]]:
    """The rows without what the clock and the machine say."""
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "memory")} for row in rows]


def compared(one: Path, two: Path) -> list[str]:
    files = sorted(p.name for p in one.glob("*.safetensors"))
    found = [] if files == sorted(p.name for p in two.glob("*.safetensors")) else ["other files"]
    found += [f"{name}: other bytes" for name in files if (one / name).read_bytes() != (two / name).read_bytes()]
    found += differences(state_of(one), state_of(two), "state")
    return found + differences(history_of(one), history_of(two), "history")


def main() -> None:
    folder, tries, settings = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    style_set("neon").write(folder / "pictures")
    os.chdir(folder)
    common = ["train", "--data", "pictures", *settings]
    steps_in_all, began = int(settings[settings.index("--steps") + 1]), time.monotonic()
    if ended(started([*common, "--out", "whole"])):
        sys.exit(Path("child.log").read_text())
    a_step = (time.monotonic() - began) / steps_in_all  # the start has its share in it: enough for what follows a step
    rng, killed, broken, steps = random.Random(1), 0, [], set()
    for attempt in range(tries):
        out = Path(f"again{attempt}")
        code, last = -signal.SIGKILL, steps_in_all // 2
        while code != 0:
            done = reached(out)
            child = started([*common, "--out", str(out), *(["--resume"] if (out / "settings.toml").exists() else [])])
            if done < last and rng.random() < (0.8 if done else 1):  # else it may go to its end
                code = killed_after(child, out, rng.randint(done + 1, last), rng.uniform(0, a_step))
            else:
                code = ended(child)
            last = steps_in_all
            killed += code == -signal.SIGKILL
            if code not in (0, -signal.SIGKILL):
                sys.exit(Path("child.log").read_text())
            if (out / "checkpoints").is_dir():
                steps |= {p.name for p in (out / "checkpoints").iterdir()}
        broken += [f"try {attempt}: {line}" for line in compared(Path("whole"), out)]
        left = [str(p) for p in out.rglob("*") if ".part" in p.name]
        broken += [f"try {attempt}: left behind {left}"] if left else []
        shutil.rmtree(out)
    print(json.dumps({"killed": killed, "steps": sorted(steps), "broken": broken, "tries": tries}))


if __name__ == "__main__":
    main()
