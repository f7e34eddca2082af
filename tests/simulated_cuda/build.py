"""Compiles `device.cpp` into a library, once for each machine, source and release of torch.

The library is kept under `~/.cache/nerine-tests`. Processes that want it at the same time wait for the one
that builds it; the lock dies with its process, so an interrupted build blocks nobody.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("device.cpp")
OLDEST_TORCH = (2, 13)  # the C++ interfaces that the source fills in are younger than those of Python
NAME = "simulated_cuda"

_BUILD = """
import sys
from torch.utils import cpp_extension

name, source, folder = sys.argv[1:]
cpp_extension.load(name, [source], extra_cflags=["-O1", "-w"], build_directory=folder, is_python_module=False)
"""


class CannotBuild(Exception):
    """This machine lacks something that the library is built with or for; the message says what to install."""


def library() -> Path:
    """The compiled library, built now if it has not been.

    Raises:
        CannotBuild: the machine lacks the tools.
    """
    _check_tools()
    folder = _cache() / f"{NAME}-{_key()}"
    built = folder / f"{NAME}.so"
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / "lock"):
            if not built.exists():
                _compile(folder, built)
    return built


def _check_tools() -> None:
    if sys.platform != "linux":
        raise CannotBuild("the simulated CUDA device is built on Linux only")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        raise CannotBuild(f"the simulated CUDA device needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer")
    if not shutil.which(os.environ.get("CXX", "c++"), path=_path()):
        raise CannotBuild("the simulated CUDA device is built with g++; install it (for instance: apt install g++)")
    if not shutil.which("ninja", path=_path()):
        raise CannotBuild("the simulated CUDA device is built with ninja; install it: pip install ninja")


def _path() -> str:
    """PATH, after the folder where pip put `ninja` if the virtual environment is not activated."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nerine-tests"


def _key() -> str:
    ingredients = [SOURCE.read_text(encoding="utf-8"), _BUILD, torch.__version__, os.environ.get("CXX", "c++")]
    return hashlib.sha256("\0".join(ingredients).encode()).hexdigest()[:16]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    import fcntl  # not on Windows, where nothing gets this far

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(folder: Path, built: Path) -> None:
    """Builds in a process of its own, since building loads, and moves what is finished into place."""
    with tempfile.TemporaryDirectory(dir=folder) as workshop:
        done = subprocess.run(
            [sys.executable, "-c", _BUILD, NAME, str(SOURCE), workshop],
            env={**os.environ, "PATH": _path()},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{SOURCE} does not compile:\n{done.stdout}{done.stderr}")
        os.replace(Path(workshop) / f"{NAME}.so", built)
