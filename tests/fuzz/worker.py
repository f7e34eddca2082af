"""One process of the fuzzer: feeds its share of the inputs to every target and prints a line of JSON for each finding.

Memory is bounded by the system, time by an alarm; the number of the input under way is kept in a file, so that the
parent knows it when this process dies.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from fuzz.mutations import damaged
from fuzz.seeds import seeds
from fuzz.targets import TARGETS, printable
from nerine import NerineError

LONGEST = 10  # seconds
MEMORY = 2**30  # bytes beyond what the process has at its start


class Hang(BaseException):
    """An input took too long. No `Exception`, so that nothing catches it on the way."""


def _ring(*_: object) -> NoReturn:
    raise Hang(f"more than {LONGEST} s")


def judged(target: Callable[[Path], None], path: Path) -> tuple[str, str]:
    """The outcome of one input, and what is wrong with it ("" if nothing is)."""
    signal.signal(signal.SIGALRM, _ring)
    signal.alarm(LONGEST)
    try:
        target(path)
        return "loaded", ""
    except NerineError as error:
        try:
            printable(str(error))
        except AssertionError as wrong:
            return "finding", str(wrong)
        return type(error).__name__, ""
    except (Exception, Hang):
        return "finding", traceback.format_exc()
    finally:
        signal.alarm(0)


def bound_memory() -> None:
    """From here on, an allocation beyond the bound fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("first", "stop", "step", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--state", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("nerine").addHandler(logging.NullHandler())
    warnings.simplefilter("error")
    targets = {name: make() for name, make in TARGETS.items()}
    path = options.state.with_name("a.safetensors")
    for name, data in seeds().items():  # valid files are loaded as such, and memory is taken that is taken once
        path.write_bytes(data)
        for title, target in targets.items():
            outcome, wrong = judged(target, path)
            if wrong or (title != "resume" and outcome != "loaded"):
                sys.exit(f"the valid file {name} fails at {title}: {outcome} {wrong}")
    if sys.platform == "linux":
        bound_memory()
    counts: collections.Counter[str] = collections.Counter()
    state = os.open(options.state, os.O_RDWR | os.O_CREAT)
    for done, index in enumerate(range(options.first, options.stop, options.step)):
        os.pwrite(state, index.to_bytes(8, "little"), 0)
        name, data = damaged(options.seed, index)
        path.write_bytes(data)
        for title, target in targets.items():
            outcome, wrong = judged(target, path)
            counts[f"{title}: {outcome}"] += 1
            if wrong:
                print(json.dumps({"index": index, "target": title, "seed": name, "wrong": wrong}), flush=True)
                targets[title] = TARGETS[title]()
        if done % 100 == 99:
            print(json.dumps({"counts": counts}), flush=True)
            counts.clear()
    print(json.dumps({"counts": counts, "done": True}), flush=True)


if __name__ == "__main__":
    main()
