"""What a user may import, and what importing it costs."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys

import pytest

from source_tree import PACKAGE, ROOT

pytestmark = pytest.mark.skipif(not (PACKAGE / "__init__.py").exists(), reason="no package yet")

PUBLIC = {
    "attach",
    "plan",
    "parametrize",
    "load",
    "save",
    "LoRA",
    "LoHa",
    "LoKr",
    "DoRA",
    "DyLoRA",
    "TLoRA",
    "GLoRA",
    "Full",
    "Norm",
    "IA3",
    "DiagOFT",
    "BOFT",
    "OFTv2",
    "Rule",
    "Network",
    "NerineError",
    "ShapeError",
    "OptionError",
    "TargetError",
    "DeviceError",
    "FormatError",
    "UnsupportedBase",
    "MergeError",
    "MissingExtra",
    "__version__",
}
HEAVY = {
    "diffusers",
    "transformers",
    "typer",
    "rich",
    "peft",
    "accelerate",
    "PIL",
    "matplotlib",
}


def test_public_names() -> None:
    nerine = importlib.import_module("nerine")
    assert set(nerine.__all__) == PUBLIC
    assert len(nerine.__all__) == len(PUBLIC)
    assert set(dir(nerine)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name_is_importable(name: str) -> None:
    assert getattr(importlib.import_module("nerine"), name) is not None


def test_version_is_the_one_of_the_installation() -> None:
    """One place has it (src/nerine/version.py); an installation that says otherwise is out of date."""
    nerine = importlib.import_module("nerine")
    assert nerine.__version__ == importlib.metadata.version("nerine")
    assert f"\nversion: {nerine.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")


def test_import_loads_nothing_heavy() -> None:
    code = f"import sys, nerine; print(*sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
