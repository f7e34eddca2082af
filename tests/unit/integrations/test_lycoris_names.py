"""`import nerine.lycoris as lycoris`: every name is there, under every path by which LyCORIS's are imported."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import nerine.lycoris

EXPORTED = [
    "AlgoOverride",
    "DiagOFTModule",
    "DyLoraModule",
    "FullModule",
    "GLoRAModule",
    "LoConModule",
    "LohaModule",
    "LokrModule",
    "LycorisNetwork",
    "NormModule",
    "PresetConfig",
    "PresetValidationError",
    "TLoraModule",
    "clear_timestep_mask",
    "compute_timestep_mask",
    "create_lycoris",
    "create_lycoris_from_weights",
    "describe_algo",
    "get_timestep_mask",
    "kohya",
    "list_algorithms",
    "list_builtin_presets",
    "logger",
    "make_module",
    "modules",
    "set_timestep_mask",
    "utils",
    "ButterflyOFTModule",
    "IA3Module",
]


@pytest.mark.parametrize("name", sorted({*EXPORTED, *nerine.lycoris.__all__}))
def test_a_name_is_there(name: str) -> None:
    assert getattr(nerine.lycoris, name) is not None
    assert name in dir(nerine.lycoris)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("config", "PRESET BUILTIN_PRESET_CONFIGS list_builtin_presets"),
        ("config_sdk", "PresetConfig AlgoOverride AlgoSpec ALGO_REGISTRY VALID_PRESET_KEYS describe_algo"),
        ("functional", "FUNC_LIST factorization power2factorization rebuild_tucker tucker_weight weight_decompose"),
        ("functional.general", "apply_dora_scale add_scaled tucker_weight_from_conv"),
        ("functional.locon", "weight_gen diff_weight bypass_forward_diff"),
        ("functional.loha", "weight_gen diff_weight bypass_forward_diff"),
        ("functional.lokr", "weight_gen diff_weight bypass_forward_diff kron_weight make_kron kron_bypass"),
        ("functional.diag_oft", "weight_gen diff_weight bypass_forward_diff get_r"),
        ("functional.boft", "weight_gen diff_weight bypass_forward_diff"),
        ("kohya", "create_network create_network_from_weights"),
        ("modules", "LoConModule get_module make_module MODULE_LIST"),
        ("utils", "str_bool extract_linear extract_conv precalculate_safetensors_hashes"),
        ("wrapper", "LycorisNetwork create_lycoris"),
    ],
)
def test_a_module_is_there(module: str, names: str) -> None:
    found = importlib.import_module(f"nerine.lycoris.{module}")
    assert [name for name in names.split() if not hasattr(found, name)] == []


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match=r"module 'nerine\.lycoris' has no attribute 'create_lycoriss'"):
        _ = nerine.lycoris.create_lycoriss
    with pytest.raises(ImportError):
        from nerine.lycoris.kohya import nothing_of_the_kind  # noqa: F401


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, nerine.lycoris; print(*sorted({'torch', 'lycoris', 'diffusers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
