"""sd-scripts' own resize_lora on one file.

    python tests/sd_scripts/resize.py <checkout> <file> <target> <rank> <conv rank> <method or -> <param or ->

Only its arithmetic runs: what it imports for reading and writing stays out, so that nothing but torch is needed. Prints
the number of layers as JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
from types import ModuleType

from safetensors.torch import load_file, save_file


def own(checkout: str) -> ModuleType:
    """networks/resize_lora.py with empty modules in the place of what it does not use here."""
    for name in ("library", "library.train_util", "library.model_util", "library.utils"):
        sys.modules[name] = ModuleType(name)
    library = sys.modules["library"]
    library.train_util, library.model_util = (sys.modules[f"library.{name}"] for name in ("train_util", "model_util"))
    sys.modules["library.utils"].setup_logging = lambda: None
    sys.path.insert(0, checkout)
    return importlib.import_module("networks.resize_lora")


def main() -> None:
    checkout, file, target, rank, conv_rank, method, param = sys.argv[1:]
    module = own(checkout)
    tensors = {key: t.float() for key, t in load_file(file).items()}
    dynamic = (None, None) if method == "-" else (method, float(param))
    resized, _, _ = module.resize_lora_model(
        tensors, int(rank), int(conv_rank), next(iter(tensors.values())).dtype, "cpu", *dynamic, False
    )
    save_file({key: t.contiguous() for key, t in resized.items()}, target)
    print(json.dumps({"layers": sum(key.endswith(".alpha") for key in resized)}))


if __name__ == "__main__":
    main()
