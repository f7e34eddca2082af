"""What the machine and the installation are: versions, devices, memory, disks, extras, and pairs known to be bad.

Asks the system and the packages' own records; of the packages it imports torch alone.
"""

from __future__ import annotations

import importlib.metadata as records
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from nerine.tools.doctor.report import Extra, Finding
from nerine.version import __version__

__all__ = ["PURPOSES", "devices", "disks", "environment", "extras", "findings", "system", "versions"]

PURPOSES = {
    "train": "train, generate, demo",
    "optimizers": "prodigy and the schedule-free optimizers",
    "trackers": "TensorBoard",
    "plots": "loss curves, plots of suggest",
    "ui": "nerine ui, in the browser",
    "quant": "bases in 4 and 8 bits, GGUF",
    "dist": "DeepSpeed",
}
_PACKAGES = ("torch", "torchvision", "safetensors", "numpy", "typer", "rich", "triton", "peft", "lycoris-lora")
_VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ENABLE_MPS_FALLBACK", "CUDA_LAUNCH_BLOCKING"),
    *("OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TMPDIR", "XDG_CACHE_HOME"),
    *("NERINE_TRACEBACK", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LC_ALL", "PYTHONIOENCODING", "PYTHONPATH"),
)
_OLDEST_TORCH = (2, 4)
_LITTLE = 2 * 10**9  # bytes of free disk: less than an adapter with its checkpoints may take


def versions() -> dict[str, str]:
    """{package: version}, of those that are installed."""
    found = {"nerine": __version__, "python": f"{platform.python_version()} ({sys.executable})"}
    return {**found, **{name: version for name in _PACKAGES if (version := version_of(name))}}


def version_of(package: str) -> str:
    """The version of an installed package, or ""."""
    try:
        return records.version(package)
    except records.PackageNotFoundError:
        return ""


def system() -> dict[str, str]:
    """The system, its processors and its memory."""
    memory = memory_bytes()
    return {
        "platform": platform.platform(),
        "processors": f"{os.cpu_count() or 1}, {torch.get_num_threads()} threads in torch",
        "memory": f"{memory / 1e9:.1f} GB" if memory else "unknown",
    }


def memory_bytes() -> int:
    """Bytes of memory; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


def devices() -> dict[str, str]:
    """{device: what it is}, the CPU among them."""
    found = {"cpu": platform.processor() or platform.machine() or "yes"}
    for at in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(at)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        found[f"cuda:{at}"] = (
            f"{card.name}, {card.total_memory / 1e9:.1f} GB, compute {card.major}.{card.minor}, {bf16}"
        )
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU, memory shared with the processor"
    for at in range(torch.xpu.device_count() if torch.xpu.is_available() else 0):
        found[f"xpu:{at}"] = str(torch.xpu.get_device_name(at))
    return found


def disks() -> dict[str, str]:
    """Free room in the folder one is in, and in that of temporary files."""
    return {
        name: f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free ({folder})"
        for name, folder in {"here": Path.cwd(), "temporary": Path(tempfile.gettempdir())}.items()
    }


def environment() -> dict[str, str]:
    """The variables that change what nerine and torch do, of those that are set."""
    return {name: os.environ[name] for name in _VARIABLES if name in os.environ}


def extras() -> list[Extra]:
    """Every extra of nerine that a user installs, with what is there of it."""
    wanted: dict[str, list[str]] = {name: [] for name in PURPOSES}
    try:
        told = records.requires("nerine") or []
    except records.PackageNotFoundError:
        told = []
    for line in told:
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        package = re.match(r"[\w.-]+", line)
        if extra is not None and package is not None and extra[1] in wanted:
            wanted[extra[1]].append(package[0])
    return [
        Extra(
            name=name,
            purpose=PURPOSES[name],
            versions={package: version for package in packages if (version := version_of(package))},
            missing=[package for package in packages if not version_of(package)],
        )
        for name, packages in wanted.items()
        if packages
    ]


def findings() -> Iterator[Finding]:
    """What is known to be bad, or good to know, about what is installed."""
    torch_version = _numbers(torch.__version__)
    if torch_version < _OLDEST_TORCH:
        yield Finding(f"torch {torch.__version__} is too old: nerine needs 2.4 or newer (pip install -U torch)", True)
    vision = version_of("torchvision")
    if vision and torch_version[0] == 2 and _numbers(vision) != (0, torch_version[1] + 15):
        yield Finding(
            f"torchvision {vision} does not belong to torch {torch.__version__}, which goes with "
            f"0.{torch_version[1] + 15}: install the two together (pip install -U torch torchvision)",
            True,
        )
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        yield Finding(
            "there is an NVIDIA driver, and torch finds no CUDA: this torch was built for CPUs, or "
            "CUDA_VISIBLE_DEVICES hides the cards"
        )
    if version_of("lycoris-lora"):
        yield Finding(
            "LyCORIS is installed beside nerine. The two do not touch each other; one model should have the "
            "adapters of one of them"
        )
    if not records_know_nerine():
        yield Finding("nerine runs from its source and is not installed, so its extras cannot be checked")
    script = shutil.which("nerine")
    if script and Path(script).resolve().parent != Path(sys.executable).parent.resolve():
        yield Finding(f"the command nerine on the path ({script}) belongs to another Python than {sys.executable}")
    free = shutil.disk_usage(Path.cwd()).free
    if free < _LITTLE:
        yield Finding(f"there are {free / 1e9:.1f} GB free here, which a training run with checkpoints may fill")


def records_know_nerine() -> bool:
    """Whether nerine was installed as a package."""
    return bool(version_of("nerine"))


def _numbers(version: str) -> tuple[int, int]:
    """(major, minor) of a version."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)
