"""Two processes that train together, over gloo, on one machine without a GPU.

A test hands functions of its own module to the fixture `run_on_two`, which runs them, one after the other, in two
fresh processes with a process group around them; their warnings are errors, as here. One call may check many cases:
two imports of torch cost more than all of them. `Failures` lets every case have its say before the process gives up.

    def equal(rank: int, folder: Path) -> None:
        assert ...

    def test_equal(run_on_two):
        run_on_two(equal)
"""

from __future__ import annotations

import functools
import importlib.util
import os
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

WORLD = 2
LIMIT = 240  # seconds

Work = Callable[[int, Path], None]


class Failures:
    """Collects what goes wrong in the cases of one run."""

    def __init__(self) -> None:
        self.found: list[str] = []

    @contextmanager
    def case(self, name: object) -> Iterator[None]:
        """One case; what it raises is told at the end, with its name."""
        try:
            yield
        except Exception:
            self.found.append(f"--- {name}\n{traceback.format_exc(limit=-3)}")

    def tell(self) -> None:
        if self.found:
            raise AssertionError(f"{len(self.found)} cases failed\n" + "\n".join(self.found[:4]))


def run(path: str, names: str, folder: str) -> None:
    """One of the two processes: load the test module at `path` and call its functions `names`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("error")
    for noise in os.environ.get("NERINE_TEST_IGNORE", "").split("\n"):
        if noise:
            warnings.filterwarnings("ignore", message=noise)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    specification = importlib.util.spec_from_file_location("on_two", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["on_two"] = module
    specification.loader.exec_module(module)
    failures = Failures()
    for name in names.split(","):
        with failures.case(name):
            getattr(module, name)(torch.distributed.get_rank(), Path(folder))
    failures.tell()
    sys.stdout.flush()
    os._exit(0)  # what is checked is over; engines need not be taken down in order


@functools.cache
def the_mesh() -> DeviceMesh:
    """Both processes in a row, made once."""
    return init_device_mesh("cpu", (WORLD,))


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
    return port


def _start(path: str, names: str, folder: Path, rank: int, port: int, ignore: tuple[str, ...]) -> subprocess.Popen[str]:
    here = str(Path(__file__).parent)
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "LOCAL_WORLD_SIZE": str(WORLD),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "ACCELERATE_USE_CPU": "true",
        "NERINE_TEST_IGNORE": "\n".join(ignore),
    }
    code = f"import two_processes; two_processes.run({path!r}, {names!r}, {str(folder)!r})"
    with (folder / f"rank-{rank}.log").open("w", encoding="utf-8") as log:
        return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=log, stderr=log, text=True)


def _finish(processes: list[subprocess.Popen[str]]) -> bool:
    """Wait for all; once one has failed, or time is up, the others get a moment to fail by themselves."""
    deadline = time.monotonic() + LIMIT
    while any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes):
            deadline = min(deadline, time.monotonic() + 3)
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
                process.wait()
        time.sleep(0.05)
    return not any(process.returncode for process in processes)


@pytest.fixture
def run_on_two(tmp_path: Path) -> Callable[..., None]:
    """Runs functions of the test's module as `function(rank, folder)` in two processes of one group; fails with what
    they wrote. `ignore` are the beginnings of warnings that other packages raise there."""

    def run_functions(*functions: Work, ignore: tuple[str, ...] = ()) -> None:
        path, port = functions[0].__code__.co_filename, _free_port()
        names = ",".join(function.__name__ for function in functions)
        processes = [_start(path, names, tmp_path, rank, port, ignore) for rank in range(WORLD)]
        if not _finish(processes):
            logs = [(tmp_path / f"rank-{rank}.log").read_text(encoding="utf-8")[-12000:] for rank in range(WORLD)]
            same = logs[0] == logs[1]
            told = logs[:1] if same else logs
            pytest.fail("\n".join(f"rank {rank}:\n{log}" for rank, log in enumerate(told)), pytrace=False)

    return run_functions
