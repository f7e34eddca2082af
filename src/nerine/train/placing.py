"""How the frozen denoiser lies in memory: in 4 or 8 bits, in the CPU's memory, without its activations.

Packages are known here that the rest of the trainer need not know: bitsandbytes, torchao, and diffusers' offloading.
Quantising comes before adapters are put on, for it makes other layers of the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nerine.errors import MissingExtra, OptionError, nearest

__all__ = ["Float8Linear", "checkpoint_activations", "offload", "quantize"]

GROUP = 32  # values that share a scale in four bits
_LARGEST = 448.0  # of float8_e4m3fn


def quantize(denoiser: nn.Module, how: str) -> int:
    """Put the linear layers of the denoiser's blocks into "nf4", "int4", "int8" or "fp8"; how many there are. The first
    and last layers, embeddings and norms, which are few and matter most, stay as they are.

    Raises:
        MissingExtra: the package that does it is not installed.
        OptionError: there is no layer that could be, or no such format.
    """
    if how not in _MAKERS:
        raise OptionError(f"quantize: there is no format {how!r}. {nearest(how, _MAKERS)}")
    layers = [(parent, name, layer) for parent, name, layer in _block_layers(denoiser) if _fits(layer, how)]
    if not layers:
        raise OptionError(f"quantize: {type(denoiser).__name__} has no linear layers in blocks that could be {how}")
    try:
        make = _MAKERS[how]()
    except ImportError as error:
        raise MissingExtra(
            f'quantize = "{how}" needs a package that is not installed ({error}): pip install "nerine[quant]"'
        ) from error
    for parent, name, layer in layers:
        setattr(parent, name, make(layer).requires_grad_(False))
    return len(layers)


def offload(denoiser: Any, device: torch.device, how: str) -> None:
    """Let the denoiser's weights wait in the CPU's memory: "group" brings one block after the other."""
    if how != "group":
        raise OptionError(f"offload: expected none or group, found {how!r}")
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        denoiser, onload_device=device, offload_type="block_level", num_blocks_per_group=1, non_blocking=True
    )


def checkpoint_activations(module: Any) -> None:
    """Let activations be computed again in backward; dropouts stay as they are.

    Raises:
        OptionError: the model cannot do so.
        MissingExtra: transformers is too old for a text encoder.
    """
    for name in ("enable_gradient_checkpointing", "gradient_checkpointing_enable"):
        if hasattr(module, name):
            getattr(module, name)()
            if name == "gradient_checkpointing_enable":
                _wake_blocks(module)
            return
    raise OptionError(f"gradient_checkpointing: {type(module).__name__} cannot compute activations again")


def _wake_blocks(encoder: nn.Module) -> None:
    """Put the blocks of an encoder into training, and not what is in them: a block computes again only where it is in
    training itself, and the dropouts in it would draw from torch's own generator."""
    try:
        from transformers.modeling_layers import GradientCheckpointingLayer
    except ImportError as error:
        raise MissingExtra(
            f"gradient_checkpointing: text encoders need a newer transformers ({error}); pip install -U transformers"
        ) from error
    for block in encoder.modules():
        if isinstance(block, GradientCheckpointingLayer):
            block.training = True


class Float8Linear(nn.Linear):
    """A linear layer whose weight is kept in float8, with a scale for each row, and computed in the format of its
    inputs. `weight` and `weight_scale` are named as transformers names them."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        weight = layer.weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / _LARGEST
        self.weight = nn.Parameter((weight / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.bias = layer.bias  # the same parameter, or None
        self.register_buffer("weight_scale", scale)

    def forward(self, input: Tensor) -> Tensor:
        scale: Any = self.weight_scale
        weight = self.weight.to(input.dtype) * scale.to(input.dtype)
        return F.linear(input, weight, None if self.bias is None else self.bias.to(input.dtype))


def _block_layers(denoiser: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name, layer) of the linear layers below a list of modules, or below something that is called a block."""
    for path, parent in denoiser.named_modules():
        in_block = "block" in path or any(isinstance(denoiser.get_submodule(p), nn.ModuleList) for p in _above(path))
        for name, layer in parent.named_children():
            if in_block and type(layer) is nn.Linear:
                yield parent, name, layer


def _above(path: str) -> Iterator[str]:
    pieces = path.split(".")
    for end in range(1, len(pieces) + 1):
        yield ".".join(pieces[:end])


def _fits(layer: nn.Linear, how: str) -> bool:
    return how == "fp8" or how == "int8" or layer.in_features % GROUP == 0


def _nf4() -> Callable[[nn.Linear], nn.Module]:
    import bitsandbytes as bnb

    def make(layer: nn.Linear) -> nn.Module:
        made = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=layer.weight.dtype,
            quant_type="nf4",
        )
        made.load_state_dict(layer.state_dict())
        made.support_avx512bf16_for_cpu = False  # it would pack the weight in place, in a layout of its own
        return made.to(layer.weight.device)  # type: ignore[no-any-return]

    return make


def _torchao(bits: int) -> Callable[[], Callable[[nn.Linear], nn.Module]]:
    def maker() -> Callable[[nn.Linear], nn.Module]:
        import torchao.quantization as ao

        config: Any = ao.Int8WeightOnlyConfig(version=2)
        if bits == 4:
            four: Any = vars(torch)["int4"]
            config = ao.IntxWeightOnlyConfig(weight_dtype=four, granularity=ao.PerGroup(GROUP))

        def make(layer: nn.Linear) -> nn.Module:
            holder = nn.Sequential(layer)
            ao.quantize_(holder, config)
            return holder[0]

        return make

    return maker


def _float8() -> Callable[[nn.Linear], nn.Module]:
    return Float8Linear


_MAKERS: dict[str, Callable[[], Callable[[nn.Linear], nn.Module]]] = {
    "nf4": _nf4,
    "int8": _torchao(8),
    "int4": _torchao(4),
    "fp8": _float8,
}
