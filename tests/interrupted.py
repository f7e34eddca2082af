"""Commands that are killed, interrupted or run out of room, in a process of its own that forks one for each try.

    python tests/interrupted.py FOLDER kill|interrupt|full TRIES

It makes its inputs in FOLDER, runs every command once to learn how long it takes and what it writes, then stops it at
random moments, and prints what it saw as JSON: {command: {outcome: count}}. Whatever breaks the promise is a line in
"broken": an input that changed, a target that is neither as before nor complete, rubbish that the next run leaves.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

import nerine.tools
from nerine.cli import main as nerine_main

WIDTH, LAYERS = 192, 12
OLD = b"what was there before"


def make_inputs(folder: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        f"blocks.{i}.{name}.weight": torch.randn(WIDTH * wide, WIDTH) * 0.05
        for i in range(LAYERS)
        for name, wide in (("to_q", 1), ("fc", 2))
    }
    save_file(tensors, folder / "base.safetensors")
    moved = {key: t + torch.randn(t.shape[0], 4) @ torch.randn(4, t.shape[1]) * 1e-3 for key, t in tensors.items()}
    save_file(moved, folder / "tuned.safetensors")
    pieces = folder / "pieces"
    pieces.mkdir()
    keys = sorted(tensors)
    where = {key: f"model-{i % 3}.safetensors" for i, key in enumerate(keys)}
    for name in sorted(set(where.values())):
        save_file({key: tensors[key] for key in keys if where[key] == name}, pieces / name)
    (pieces / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (pieces / "config.json").write_text("{}")
    for name in "ab":
        adapter = {}
        for key, t in tensors.items():
            stem = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
            adapter[f"{stem}.lora_down.weight"] = torch.randn(8, t.shape[1]) * 0.1
            adapter[f"{stem}.lora_up.weight"] = torch.randn(t.shape[0], 8) * 0.01
            adapter[f"{stem}.alpha"] = torch.tensor(4.0)
        save_file(adapter, folder / f"{name}.safetensors")


COMMANDS: dict[str, tuple[list[str], str]] = {
    "merge": (["merge", "base.safetensors", "a.safetensors:0.5", "b.safetensors"], "out.safetensors"),
    "merge a folder": (["merge", "pieces", "a.safetensors"], "out"),
    "extract": (["extract", "base.safetensors", "tuned.safetensors", "--rank", "4"], "out.safetensors"),
    "resize": (["resize", "a.safetensors", "--rank", "4"], "out.safetensors"),
    "combine": (["combine", "a.safetensors", "b.safetensors"], "out.safetensors"),
}


def content(path: Path) -> str:
    """What is at a path, in short."""
    if not path.exists():
        return "nothing"
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(path)).encode() + file.read_bytes())
    return digest.hexdigest()


def put_old(target: Path) -> None:
    """Something that the command is to replace."""
    if target.exists():
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    if target.suffix:
        target.write_bytes(OLD)
    else:
        target.mkdir()
        (target / "old.txt").write_bytes(OLD)


def started(arguments: list[str], before: Callable[[], None]) -> int:
    """The number of a process that runs a command, its output left aside."""
    child = os.fork()
    if child:
        return child
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    sys.argv = ["nerine", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts with & inherits that it is ignored
    code = 1
    try:
        before()
        nerine_main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        os._exit(code)


def ended(child: int) -> str:
    """How a process ended."""
    _, status = os.waitpid(child, 0)
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"


def tight(limit: int) -> None:
    """No file may grow beyond `limit` bytes: writing fails as it does on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


class Trial:
    """One command, stopped again and again."""

    def __init__(self, folder: Path, arguments: list[str], target: str) -> None:
        self.folder, self.target = folder, folder / target
        self.arguments = [*arguments, "-o", target, "--force"]
        self.seen: dict[str, int] = {}
        self.broken: list[str] = []
        self.inputs = {p.name: content(p) for p in folder.iterdir() if p != self.target}
        put_old(self.target)
        self.old = content(self.target)
        began = time.monotonic()
        how = ended(started(self.arguments, lambda: None))
        self.takes = time.monotonic() - began
        self.new = content(self.target)
        if how != "exit 0" or self.new == self.old:
            self.broken.append(f"the undisturbed run: {how}")

    def once(self, way: str, rng: random.Random) -> None:
        put_old(self.target)
        size = self.target.stat().st_size if self.target.is_file() else 0
        limit = rng.randrange(1, max(2, size, 100_000))
        child = started(self.arguments, (lambda: tight(limit)) if way == "full" else (lambda: None))
        if way != "full":
            time.sleep(rng.uniform(0, 1.1 * self.takes))
            os.kill(child, signal.SIGKILL if way == "kill" else signal.SIGINT)
        how = ended(child)
        self.seen[how] = self.seen.get(how, 0) + 1
        now = content(self.target)
        if now not in (self.old, self.new):
            self.broken.append(f"{how}: the target is neither as it was nor complete")
        if how == "exit 0" and now != self.new:
            self.broken.append("exit 0, and the target is not what the undisturbed run wrote")
        for name, known in self.inputs.items():
            if content(self.folder / name) != known:
                self.broken.append(f"{how}: {name} was changed")
        if way != "kill":  # a killed program cannot clear away; the next run does
            self.rubbish(how)

    def rubbish(self, when: str) -> None:
        left = {p.name for p in self.folder.iterdir()} - set(self.inputs) - {self.target.name}
        if left:
            self.broken.append(f"{when}: left behind {sorted(left)}")

    def finish(self) -> None:
        how = ended(started(self.arguments, lambda: None))
        if how != "exit 0" or content(self.target) != self.new:
            self.broken.append(f"the last undisturbed run: {how}")
        self.rubbish("the last undisturbed run")
        shutil.rmtree(self.target) if self.target.is_dir() else self.target.unlink()


def main() -> None:
    folder, way, tries = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    for tool in nerine.tools.__all__:
        getattr(nerine.tools, tool)  # imported here, so that the children need not
    make_inputs(folder)
    os.chdir(folder)
    rng = random.Random(1)
    found = {}
    for name, (arguments, target) in COMMANDS.items():
        trial = Trial(folder, arguments, target)
        for _ in range(max(1, tries // len(COMMANDS))):
            trial.once(way, rng)
        trial.finish()
        found[name] = {"seen": trial.seen, "broken": trial.broken}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
