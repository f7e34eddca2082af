"""What `import nerine` adds to `import torch`: the library, and everything public in it, each in a fresh process.

    python benchmarks/import_time.py [--rounds 10] [--limit-ms 50] [--json]

The contestants take turns, and processor time is counted, not the clock, so that a busy machine changes little; modules
are compiled once, as pip compiles what it installs. The figure is the difference of the fastest runs. Names are found
when they are first asked for: "everything public" is what a program pays that asks for all of them. Exit code 3:
`import nerine` adds more than the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

PROGRAMS = {
    "torch": "import torch",
    "nerine": "import torch, nerine",
    "everything public": "import torch, nerine\nfor name in nerine.__all__: getattr(nerine, name)",
}


def milliseconds(code: str, compiled: str) -> float:
    """Processor time of a new Python that runs `code`, user and system together; bytecode is kept in `compiled`."""
    told = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": compiled}
    told.pop("PYTHONDONTWRITEBYTECODE", None)
    child = subprocess.Popen([sys.executable, "-c", code], env=told)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{code!r} failed with exit code {child.returncode}")
    return 1000 * (used.ru_utime + used.ru_stime)


def measured(rounds: int) -> dict[str, list[float]]:
    """The times of each program, in milliseconds, one a round; the first round compiles and is left out."""
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    with tempfile.TemporaryDirectory() as compiled:
        for turn in range(rounds + 1):
            for name, code in PROGRAMS.items():
                spent = milliseconds(code, compiled)
                if turn:
                    times[name].append(spent)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--limit-ms", type=float, default=50.0)
    parser.add_argument("--json", action="store_true")
    told = parser.parse_args()
    times = measured(told.rounds)
    base = min(times["torch"])
    rows = [
        {"import": name, "best_ms": min(own), "median_ms": statistics.median(own), "more_ms": min(own) - base}
        for name, own in times.items()
    ]
    if told.json:
        print(json.dumps({"rounds": told.rounds, "limit_ms": told.limit_ms, "rows": rows}, indent=2))
    else:
        for row in rows:
            print(f"{row['import']:<18} {row['best_ms']:8.0f} ms best {row['median_ms']:8.0f} ms median "
                  f"{row['more_ms']:+8.0f} ms beside torch")  # fmt: skip
    if min(times["nerine"]) - base > told.limit_ms:
        raise SystemExit(3)


if __name__ == "__main__":
    main()
