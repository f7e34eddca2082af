"""The kernels as a whole: off and unimported unless asked for, described, and equal to their references.

A process either interprets kernels or does not, from the moment triton is imported. So the comparisons (check_*.py) run
in a process of their own: interpreted on the CPU, and compiled where there is a GPU.
"""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nerine.errors import MissingExtra
from nerine.ops.triton import kernels

ROOT = Path(__file__).resolve().parents[4]
MODULES = sorted({kernel.module for kernel in kernels().values()})


def in_a_process(*arguments: str, **variables: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]), **variables}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def compare(**variables: str) -> None:
    """Runs every comparison; one of each module must have run."""
    plugins = ("-p", "no:cacheprovider", "-p", "no:xdist")
    folder = str(Path(__file__).parent.relative_to(ROOT))
    out = in_a_process("-m", "pytest", *plugins, "-v", "-o", "python_files=check_*.py", folder, **variables)
    for module in MODULES:
        assert f"check_{module}.py::test_values_and_gradients" in out
    assert "skipped" not in out


@pytest.mark.slow
def test_every_kernel_agrees_with_its_reference_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    compare(TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_every_kernel_agrees_with_its_reference_on_the_gpu() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    compare(TRITON_INTERPRET="0")


def test_nothing_imports_triton_unasked() -> None:
    names = "nerine, nerine.ops.triton, nerine.algorithms, nerine.model.network, nerine.api"
    in_a_process("-c", f"import sys, {names}; nerine.ops.triton.kernels(); assert 'triton' not in sys.modules")


def test_without_triton_a_kernel_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    kernel = kernels()["cayley"]
    with pytest.raises(MissingExtra, match="pip install triton"):
        _ = kernel.function
    with pytest.raises(MissingExtra, match="cayley"):
        kernel.unsuited(torch.zeros(1, 2, 2))


@pytest.mark.parametrize("name", kernels())
def test_a_kernel_has_the_arguments_of_its_reference(name: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    kernel = kernels()[name]
    own = inspect.signature(kernel.function).parameters
    asked = inspect.signature(getattr(importlib.import_module(f"nerine.ops.triton.{kernel.module}"), kernel.check))
    assert list(own) == list(asked.parameters)[: len(own)]
    module, _, function = kernel.replaces.rpartition(".")
    if function == name:
        reference = getattr(importlib.import_module(module), function)
        assert inspect.signature(kernel.function) == inspect.signature(reference)
    else:
        assert name in ("kron_linear", "butterfly_deviation", "hadamard")  # for several steps of the reference


def test_a_cpu_is_refused_where_kernels_are_not_interpreted() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    assert "kernels run on cuda" in kernels()["cayley"].unsuited(torch.zeros(1, 2, 2))


def test_every_kernel_is_in_the_docs() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert [name for name in kernels() if f"`{name}`" not in text] == []


def argument_types(names: list[str], arguments: tuple, constants: dict) -> tuple[dict, dict]:
    """What triton's compiler asks for: the type of every argument, and the value of those it takes as constants."""
    formats = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
    types = {}
    for name, value in zip(names, arguments, strict=False):
        types[name] = formats[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        types[name] = "fp32" if isinstance(value, float) else types[name]
    types.update(dict.fromkeys(constants, "constexpr"))
    return types, {(names.index(name),): value for name, value in constants.items()}


class Compiled:
    """Stands where a kernel stood: a launch compiles it for two generations of GPUs, and runs nothing."""

    def __init__(self, kernel: object, capabilities: tuple[int, ...]) -> None:
        self.kernel, self.capabilities = kernel, capabilities
        self.memory: list[int] = []

    def __getitem__(self, grid: tuple[int, ...]):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        def launch(*arguments, **named) -> None:
            options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
            source = ASTSource(self.kernel, *argument_types(self.kernel.arg_names, arguments, named))
            for capability in self.capabilities:
                target = GPUTarget("cuda", capability, 32)
                self.memory.append(triton.compile(source, target=target, options=options).metadata.shared)

        return launch


LAUNCHED = ("_forward", "_backward", "_forward_last", "_forward_apart", "_backward_last", "_backward_apart")
LAUNCHES = {
    "row_norm": lambda o, e, half: (
        o.low_rank_row_square(e(64, 64, dtype=half), e(64, 128), e(128, 64), True),
        o.low_rank_row_square_grad(e(64, 64, dtype=half), e(64, 16), e(16, 64), e(64)),
    ),
    "rescale": lambda o, e, half: (
        o.rescale_grad(e(64, 64, dtype=half), e(64, 64, dtype=half), e(64, dtype=half), -1, True),
        o.rescale_grad(e(2, 3, 4, 4), e(2, 3, 4, 4), e(3), -3, True),
        o.rescale(e(64, 64, dtype=half), e(64), e(64), -1),
        o.rescale(e(2, 3, 4, 4, dtype=half), e(3), e(3), -3),
    ),
    "cayley": lambda o, e, half: [(o.cayley(e(2, s, s)), o.cayley_grad(e(2, s, s), e(2, s, s))) for s in (8, 64)],
    "blocks": lambda o, e, half: [
        (
            o.turn_channels(e(64, 64, dtype=d), e(1, 64, 64), e(64)),
            o.turn_channels_grad(e(64, 64, dtype=d), e(1, 64, 64), e(64, 64, dtype=d), True),
        )
        for d in (half, torch.float32)
    ],
    "kron": lambda o, e, half: [
        (
            o.kron_linear(e(64, 64, dtype=d), e(16, 16), e(4, 4), e(64, 64, dtype=d)),
            o.kron_linear_grad(e(64, 64, dtype=d), e(16, 16), e(4, 4), e(64, 64, dtype=d), True),
        )
        for d in (half, torch.float32)
    ],
    "butterfly": lambda o, e, half: [
        o.butterfly_grad(e(64, 96, dtype=d), e(2, 2, 48, 48), e(64, 96, dtype=d), deviation)
        for d, deviation in ((half, True), (torch.float32, False))
    ],
    "hadamard": lambda o, e, half: (
        o.hadamard(e(64, 16), e(16, 64), e(64, 16), e(16, 64), 0.5),
        o.hadamard_grad(e(64, 16), e(16, 64), e(64, 16), e(16, 64), e(64, 64), 0.5),
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("name", MODULES)
def test_a_kernel_compiles_for_gpus_without_having_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes what the compiler refuses; and blocks must fit into the 99 KB that small cards have."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    module = importlib.import_module(f"nerine.ops.triton.{name}")
    launched = [key for key, value in vars(module).items() if isinstance(value, triton.JITFunction) and key in LAUNCHED]
    stand_ins = {key: Compiled(getattr(module, key), (80, 90)) for key in launched}
    for key, value in stand_ins.items():
        monkeypatch.setattr(module, key, value)
    LAUNCHES[name](torch.ops.nerine, torch.zeros, torch.bfloat16)
    assert stand_ins
    assert all(stand_in.memory and max(stand_in.memory) < 99 * 1024 for stand_in in stand_ins.values())
