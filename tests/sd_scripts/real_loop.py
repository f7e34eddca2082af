"""sd-scripts' real trainer with nerine.kohya: train, save, resume, take the ranks from the file, merge, compare.

    python tests/sd_scripts/real_loop.py <sd-scripts checkout> [algo ...] [--quick]

Runs in an environment with sd-scripts' own requirements. One line a case, JSON at the end; exit status 1 where a case
fails. The models are sd-scripts' own classes at small sizes; nothing else of it is changed.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import accelerate
import tiny_models
import torch
from accelerate.utils import extract_model_from_parallel

ALGORITHMS = ("lora", "loha", "lokr", "dylora", "glora", "full", "diag-oft", "boft", "ia3", "tlora", "locon")
BASE = ("--network_module=nerine.kohya", "--network_dim=4", "--network_alpha=2", "--seed=7")
VARIANTS: dict[str, tuple[list[str], list[str]]] = {  # network_args, further arguments
    "plain": ([], []),
    "dora": (["dora_wd=True"], []),
    "train_norm": (["train_norm=True"], []),
    "dropout": (["rank_dropout=0.2", "module_dropout=0.1"], ["--network_dropout=0.2"]),
    "scale_weight_norms": ([], ["--scale_weight_norms=0.05"]),
    "full_bf16": ([], ["--full_bf16", "--mixed_precision=bf16"]),
    "fp8_base": ([], ["--fp8_base", "--mixed_precision=bf16"]),
    "checkpointing": ([], ["--gradient_checkpointing"]),
    "lora_plus": (["loraplus_lr_ratio=4"], []),
}
QUICK = ("plain", "dora")
FORMATS = {"full_bf16": (torch.bfloat16,), "fp8_base": (torch.bfloat16, torch.float8_e4m3fn)}


class Loop:
    """One checkout of sd-scripts, its trainer patched to small models."""

    def __init__(self, checkout: Path, work: Path) -> None:
        sys.path.insert(0, str(checkout))
        import library.original_unet as original_unet
        import library.strategy_base as strategy_base
        import library.strategy_sd as strategy_sd
        import train_network

        self.strategy_base = strategy_base

        tiny_models.patch(original_unet)
        self.unet_class, self.train_network = original_unet.UNet2DConditionModel, train_network
        self.work = work
        self.tokenizer = tiny_models.tokenizer(work)
        self.data = tiny_models.pictures(work / "data")
        tokenizer = self.tokenizer
        strategy_sd.SdTokenizeStrategy._load_tokenizer = lambda *_, **__: tokenizer
        loop = self

        class Trainer(train_network.NetworkTrainer):
            def load_target_model(self, args: Any, weight_dtype: Any, accelerator: Any) -> Any:
                text_encoder, vae, unet = loop.models()
                return "sd_v1", text_encoder.to(weight_dtype), vae.to(weight_dtype), unet.to(weight_dtype)

            def prepare_unet_with_accelerator(self, args: Any, accelerator: Any, unet: Any) -> Any:
                if args.fp8_base and accelerator.device.type == "cpu":  # where autocast has no norms for fp8
                    for module in unet.modules():
                        if "Norm" in type(module).__name__:
                            module.float()
                return super().prepare_unet_with_accelerator(args, accelerator, unet)

            def post_process_network(self, args: Any, accelerator: Any, network: Any, encoders: Any, unet: Any) -> None:
                self.network, self.unet, self.encoder = network, unet, encoders[0]

        self.Trainer = Trainer

    def models(self) -> Any:
        return tiny_models.models(self.unet_class, len(self.tokenizer))

    def train(self, name: str, network_args: list[str], more: list[str], steps: int = 3, lr: float = 1e-2) -> Any:
        """Train for some steps with the real command line; the trainer afterwards."""
        command = [
            *BASE,
            f"--train_data_dir={self.data}",
            f"--output_dir={self.work}",
            f"--output_name={name}",
            f"--max_train_steps={steps}",
            f"--learning_rate={lr}",
            "--resolution=64",
            "--pretrained_model_name_or_path=none",
            "--save_model_as=safetensors",
            "--optimizer_type=AdamW",
            "--max_data_loader_n_workers=0",
            "--lr_scheduler=constant",
            *more,
        ]
        if network_args:
            command += ["--network_args", *network_args]
        parser = self.train_network.setup_parser()
        args = parser.parse_args(command)
        self.train_network.train_util.verify_command_line_training_args(args)
        for kind in ("Tokenize", "LatentsCaching", "TextEncoding", "TextEncoderOutputsCaching"):  # once a process
            getattr(self.strategy_base, f"{kind}Strategy")._strategy = None
        for state in (accelerate.state.AcceleratorState, accelerate.state.GradientState):
            state._reset_state(*([True] if state is accelerate.state.AcceleratorState else []))
        trainer = self.Trainer()
        trainer.train(args)
        return trainer

    def file(self, name: str) -> Path:
        return self.work / f"{name}.safetensors"

    def output(self, unet: Any, encoder: Any) -> torch.Tensor:
        """What the pair computes of a fixed input, in fp32."""
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(0, 90, (1, 77), generator=generator)
        unet, encoder = (
            extract_model_from_parallel(m, keep_fp32_wrapper=False) for m in (unet, encoder)
        )  # no autocast
        x, time_step = torch.randn(1, 4, 8, 8, generator=generator), torch.tensor([400])
        unet.eval(), encoder.eval()
        with torch.no_grad():
            return unet.float()(x, time_step, encoder.float()(ids)[0]).sample


def distance(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).norm() / two.norm())


def check(loop: Loop, algo: str, variant: str) -> dict[str, Any]:
    """All that is asked of one algorithm in one setting; the largest relative distance of each comparison."""
    args, more = VARIANTS[variant]
    args = [f"algo={algo}", "preset=ia3" if algo == "ia3" else "preset=full", *args]
    args += ["block_size=2"] if algo == "dylora" else []
    args += ["constraint=0.5"] if algo in ("diag-oft", "boft") else []
    name = f"{algo}-{variant}"
    trainer = loop.train(name, args, more)
    network = trainer.network
    network.eval().float().cpu()
    trained = loop.output(trainer.unet, trainer.encoder)
    file = loop.file(name)
    kohya = __import__("nerine.kohya").kohya

    encoder, _, unet = loop.models()
    for dtype in FORMATS.get(variant, ()):  # the base as the trainer had it
        unet.to(dtype)
        encoder.to(dtype if dtype.itemsize > 1 else torch.bfloat16)  # on a CPU sd-scripts leaves the encoder in bf16
    base = loop.output(unet, encoder)
    merged, tensors = kohya.create_network_from_weights(1.0, file, None, encoder, unet, for_inference=True)
    encoder.float(), unet.float()
    merged.merge_to(encoder, unet, tensors, torch.float32, "cpu")
    found = {"moved": distance(trained, base), "merged": distance(loop.output(unet, encoder), trained)}
    for what, extra in {"resumed": [], "dim_from_weights": ["--dim_from_weights"]}.items():
        again = loop.train(f"{name}-{what}", args, [*more, f"--network_weights={file}", *extra], 1, 1e-12)
        again.network.eval().float().cpu()
        found[what] = distance(loop.output(again.unet, again.encoder), trained)
    onto = loop.train(f"{name}-onto", args, [*more, f"--base_weights={file}", "--base_weights_multiplier=1"], 1, 1e-12)
    onto.network.eval().float().cpu()
    found["base_weights"] = distance(loop.output(onto.unet, onto.encoder), trained)
    return {**found, "modules": len(network.loras), "keys": len(tensors)}


def limit(variant: str, what: str) -> float:
    """How far two outputs may be apart: by the order of sums in fp32, or where merged weights are rounded to bf16
    (2^-9 each) or then to fp8 (2^-4 each) by that rounding."""
    return {"full_bf16": 2e-2, "fp8_base": 0.25}.get(variant, 2e-5) if what == "base_weights" else 2e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("algorithms", nargs="*", default=ALGORITHMS)
    parser.add_argument("--quick", action="store_true", help="two variants instead of all")
    parser.add_argument("--variants", default="", help="some variants, with commas")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    work = Path(tempfile.mkdtemp(prefix="nerine-sd-scripts-"))
    loop = Loop(given.checkout, work)
    rows, failed = [], 0
    variants = given.variants.split(",") if given.variants else QUICK if given.quick else VARIANTS
    for algo in given.algorithms or ALGORITHMS:
        for variant in variants:
            start = time.perf_counter()
            try:
                row = check(loop, algo, variant)
                bad = {w: d for w, d in row.items() if w in _COMPARED and not d <= limit(variant, w)}
                bad |= {"moved": row["moved"]} if not row["moved"] > 1e-4 else {}
                row |= {"bad": bad}
            except Exception as error:
                row = {"bad": {"error": f"{type(error).__name__}: {error}"}, "trace": traceback.format_exc()}
            failed += bool(row["bad"])
            shown = {key: f"{v:.1e}" if isinstance(v, float) else v for key, v in row.items() if key != "trace"}
            print(f"{algo} {variant} {time.perf_counter() - start:.1f} s {shown}", flush=True)
            rows.append({"algo": algo, "variant": variant, **row})
    shutil.rmtree(work)
    print(json.dumps({"cases": rows, "failed": failed}))
    return 1 if failed else 0


_COMPARED = ("merged", "resumed", "dim_from_weights", "base_weights")

if __name__ == "__main__":
    sys.exit(main())
