"""What `import nerine` adds to `import torch`: the library, and everything public in it, each in a fresh process.

    python benchmarks/import_time.py [--rounds 10] [--limit-ms 50] [--json]

Processor time is counted, not the clock, and within each process from the end of `import torch` on, so that a busy
machine changes little; modules are compiled once, as pip compiles what it installs. Names are found when they are first
asked for: "everything public" is what a program pays that asks for all of them. Exit code 3: `import nerine` adds more
than the limit in the best round.
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
    "nerine": "import nerine",
    "everything public": "import nerine\nfor name in nerine.__all__: getattr(nerine, name)",
}
TIMED = "import time\n{before}\nbegan = time.process_time()\n{code}\nprint(time.process_time() - began)"


def milliseconds(name: str, compiled: str) -> float:
    """Processor time of a program in a new Python that has torch already; bytecode is kept in `compiled`."""
    told = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": compiled}
    told.pop("PYTHONDONTWRITEBYTECODE", None)
    code = TIMED.format(before="" if name == "torch" else "import torch", code=PROGRAMS[name])
    done = subprocess.run([sys.executable, "-c", code], env=told, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stderr}")
    return 1000 * float(done.stdout)


def measured(rounds: int) -> dict[str, list[float]]:
    """The times of each program, in milliseconds, one a round; the first round compiles and is left out."""
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    with tempfile.TemporaryDirectory() as compiled:
        for turn in range(rounds + 1):
            for name in PROGRAMS:
                spent = milliseconds(name, compiled)
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
    rows = [{"import": name, "best_ms": min(own), "median_ms": statistics.median(own)} for name, own in times.items()]
    if told.json:
        print(json.dumps({"rounds": told.rounds, "limit_ms": told.limit_ms, "rows": rows}, indent=2))
    else:
        for row in rows:
            print(f"{row['import']:<18} {row['best_ms']:8.1f} ms best {row['median_ms']:8.1f} ms median")
    if min(times["nerine"]) > told.limit_ms:
        raise SystemExit(3)


if __name__ == "__main__":
    main()
