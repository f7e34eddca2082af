"""The fixture through which tests use the devices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from simulated_cuda import build
from snippets import run_snippet


@pytest.fixture
def run_on_simulated_cuda(tmp_path: Path) -> Callable[[str], None]:
    """Executes a snippet in a process where `cuda` is a GPU if there is one, and two simulated ones if not."""
    if torch.cuda.is_available():
        return lambda code: run_snippet(code, tmp_path, device="torch.device('cuda', 0)")
    try:
        library = build.library()
    except build.CannotBuild as missing:
        pytest.skip(str(missing))
    return lambda code: run_snippet(code, tmp_path, device=f"simulated_cuda.install({str(library)!r})")
