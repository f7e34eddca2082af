"""The command line in this process, as `nerine ARGUMENTS` would run."""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest

from nerine.cli import main

__all__ = ["Ran", "run"]


class Ran(NamedTuple):
    """What a command came to."""

    code: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Ran:
    """Run a command, and give back its exit code and what it wrote."""
    before, sys.argv = sys.argv, ["nerine", *map(str, arguments)]
    capsys.readouterr()
    code = 0
    try:
        main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        sys.argv = before
    return Ran(code, *capsys.readouterr())
