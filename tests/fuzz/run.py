"""Fuzzes everything that reads files: `scripts/fuzz [N]`.

Valid files of every algorithm are damaged in N ways and given to every target. Each must succeed or raise a
`NerineError`; any other exception, a hang, a death, memory beyond 1 GiB, or a model that is not as before is a
finding: the input is saved, and the exit status is 1. The same seed gives the same inputs; `--only INDEX` repeats one.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from fuzz.mutations import damaged

MEMORY = "/dev/shm"  # files there cost no disk
PATIENCE = 60  # seconds without a sign of life, beyond the alarm of the worker


class Worker:
    """A process with its share of the inputs, started again behind the input that killed it."""

    def __init__(self, inputs: range, seed: int, module: str, lines: queue.Queue[dict[str, Any]]) -> None:
        self.next, self.stop, self.step = inputs.start, inputs.stop, inputs.step
        self.seed, self.module, self.lines = seed, module, lines
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        while self.next < self.stop:
            with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as folder:
                if self.run_once(Path(folder) / "state"):
                    break
        self.lines.put({"over": True})

    def run_once(self, state: Path) -> bool:
        """Whether the worker came to its end; otherwise `next` is behind the input that killed it."""
        command = [sys.executable, "-m", self.module, "--state", str(state), "--seed", str(self.seed)]
        command += ["--first", str(self.next), "--stop", str(self.stop), "--step", str(self.step)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        watch = threading.Thread(target=self.watch, args=(child, state), daemon=True)
        watch.start()
        assert child.stdout is not None
        done = False
        for text in child.stdout:
            line = json.loads(text)
            done = done or "done" in line
            self.lines.put(line)
        child.wait()
        if done:
            return True
        if not state.exists():
            self.lines.put({"broken": f"a worker ended with status {child.returncode} before its first input"})
            return True
        index = int.from_bytes(state.read_bytes()[:8], "little")
        wrong = f"the process ended with status {child.returncode}"
        self.lines.put({"index": index, "target": "any", "seed": "", "wrong": wrong})
        self.next = index + self.step
        return False

    def watch(self, child: subprocess.Popen[str], state: Path) -> None:
        """Kill a worker that even its alarm does not wake."""
        last, since = b"", time.monotonic()
        while child.poll() is None:
            now = state.read_bytes() if state.exists() else b""
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > PATIENCE:
                child.kill()
            time.sleep(1)


def save(finding: dict[str, Any], seed: int, folder: Path) -> Path:
    """The input of a finding and what was wrong with it, as two files."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{seed}-{finding['index']}-{finding['target']}.safetensors"
    path.write_bytes(damaged(seed, finding["index"])[1])
    path.with_suffix(".txt").write_text(finding["wrong"])
    return path


def fuzz(inputs: range, options: argparse.Namespace) -> tuple[collections.Counter[str], int]:
    """Counts by target and outcome, and the number of findings."""
    lines: queue.Queue[dict[str, Any]] = queue.Queue()
    workers = max(1, min(options.workers, len(inputs)))
    print(f"seed {options.seed}, {len(inputs):,} inputs, {workers} processes", flush=True)
    crew = [Worker(inputs[i::workers], options.seed, options.worker, lines) for i in range(workers)]
    counts: collections.Counter[str] = collections.Counter()
    findings, started, over = 0, time.monotonic(), 0
    while over < len(crew):
        line = lines.get()
        counts.update(line.get("counts", {}))
        over += line.get("over", False)
        if "broken" in line:
            sys.exit(line["broken"])
        if "wrong" in line:
            findings += 1
            path = save(line, options.seed, options.out)
            last = line["wrong"].strip().splitlines()[-1]
            print(
                f"\nfinding: {line['target']}, input {line['index']} from {line['seed']}: {last}\n  {path}", flush=True
            )
        if sys.stdout.isatty():
            done = sum(n for outcome, n in counts.items() if outcome.startswith("read"))
            rate = done / max(time.monotonic() - started, 1e-9)
            print(
                f"\r{done:,} of {len(inputs):,} inputs, {rate:.0f} a second, {findings} findings ", end="", flush=True
            )
    return counts, findings


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("inputs", nargs="?", type=int, default=100_000, help="how many inputs (default 100,000)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default 0)")
    parser.add_argument("--only", type=int, help="the one input with this number")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"), help="folder for inputs of findings")
    parser.add_argument("--worker", default="fuzz.worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    inputs = range(options.inputs) if options.only is None else range(options.only, options.only + 1)
    counts, findings = fuzz(inputs, options)
    print()
    for outcome, number in sorted(counts.items()):
        print(f"{outcome:<24} {number:>9,}")
    print(f"{findings} findings with seed {options.seed}" + (f", in {options.out}" if findings else ""))
    sys.exit(findings > 0)


if __name__ == "__main__":
    main()
