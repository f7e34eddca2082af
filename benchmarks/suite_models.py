"""Whole models in the performance suite: a small UNet of SD1's structure, and one block of a transformer.

Adapters go on all Linear and Conv2d layers, by the front doors of the three libraries. The values are nobody's in
particular (the start plus a little noise), so that only nerine's output is checked: against the model into which the
same adapters are merged. A model's distinct layers can be had one by one, to be timed alone.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from floor_counts import Size
from step_contestants import CACHED, NERINE
from step_maps import BLOCK, FACTOR, RANK
from step_measure import Contestant, say
from step_peers import quiet
from step_rows import DTYPES, Row
from torch import Tensor, nn

import nerine

__all__ = [
    "ADAPTED",
    "MODELS",
    "Alone",
    "ModelProblem",
    "layers_of",
    "model_contestants",
    "model_problem",
    "nerine_on",
    "plain",
]

ADAPTED = (nn.Linear, nn.Conv2d)
TEXT = 77


# -- the models --------------------------------------------------------------------------------------------------
class UNet(nn.Module):
    """diffusers' UNet with the blocks of SD1 at a tenth of its width, with its text and its timestep."""

    shape = (1, 4, 32, 32)

    def __init__(self) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel

        self.inner = UNet2DConditionModel(
            sample_size=32, block_out_channels=(32, 64, 128, 128), cross_attention_dim=64, attention_head_dim=4
        )
        self.register_buffer("text", torch.randn(1, TEXT, 64))
        self.register_buffer("time", torch.tensor([500]))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x, self.time, self.text, return_dict=False)[0]
        return out


class Block(nn.Module):
    """diffusers' joint transformer block of width 768 on 77 tokens of text and 256 of the picture, in this order."""

    shape = (1, TEXT + 256, 768)

    def __init__(self) -> None:
        super().__init__()
        from diffusers.models.attention import JointTransformerBlock

        self.inner = JointTransformerBlock(768, 12, 64)
        self.register_buffer("time", torch.randn(1, 768))

    def forward(self, x: Tensor) -> Tensor:
        text, picture = self.inner(x[:, TEXT:], x[:, :TEXT], self.time)
        return torch.cat([text, picture], 1)


MODELS: dict[str, type[UNet] | type[Block]] = {"unet": UNet, "block": Block}


@dataclass
class ModelProblem:
    """One frozen model with its input; each contestant has modules of its own around the very same weights."""

    model: nn.Module
    x: Tensor
    grad: Tensor
    precision: str = "fp32"

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")

    def frozen_tensors(self) -> list[Tensor]:
        return [self.x, *self.model.parameters(), *self.model.buffers()]

    def fresh_model(self) -> nn.Module:
        return copy.deepcopy(self.model, {id(t): t for t in self.frozen_tensors()})


def model_problem(name: str, precision: str = "fp32") -> ModelProblem:
    """The model of that name, frozen, with a seeded input that needs its gradient."""
    torch.manual_seed(0)
    kind, dtype = MODELS[name], DTYPES[precision]
    model = kind().requires_grad_(False).to(dtype)
    x = torch.randn(kind.shape).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        grad = torch.randn_like(model(x))
    return ModelProblem(model, x.requires_grad_(), grad, precision)


# -- the contestants ---------------------------------------------------------------------------------------------
def plain(p: ModelProblem, name: str = "frozen") -> Contestant:
    model = p.fresh_model()
    return Contestant(name, model, modules=[model])


def _stirred(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The trained ones, moved a little from their start."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for t in tensors.values():
            t.add_(torch.randn(t.shape, generator=rng).to(t.dtype) * 0.01)
    return {name: t for name, t in tensors.items() if t.requires_grad}


def model_contestants(p: ModelProblem, row: Row, peers: bool = True) -> Iterator[tuple[Contestant, Tensor | None]]:
    """All who can have the algorithm of `row` on all layers, nerine first, with the output of its merged model."""
    yield nerine_on(p, row)
    builders: dict[str, Callable[[], Contestant]] = {}
    if peers and row.kind in LYCORIS and (row.axis in (None, "out")):
        builders["LyCORIS"] = lambda: _lycoris(p, row, bypass=False)
        if row.axis is None and row.kind != "full":
            builders["LyCORIS bypass"] = lambda: _lycoris(p, row, bypass=True)
    if peers and row.kind in PEFT and (row.axis is None or (row.kind == "lora" and row.axis == "out")):
        builders["PEFT"] = lambda: _peft(p, row)
    for name, build in builders.items():
        try:
            with quiet():
                found = build()
        except Exception as problem:
            found = Contestant(name, failure=say(problem))
        found.peer = found.guest = True
        yield found, None


def nerine_on(p: ModelProblem, row: Row, cached: bool = False) -> tuple[Contestant, Tensor]:
    """nerine on all layers, with the output of its merged model; with `cached` it may keep changed weights in eval."""
    inner = NERINE[row.kind]()
    model = p.fresh_model()
    network = nerine.attach(model, inner if row.axis is None else nerine.DoRA(inner, axis=row.axis))
    trained = _stirred({name: t for name, t in network.named_tensors() if t.requires_grad})
    network.merge()
    with torch.no_grad(), p.autocast():
        merged = model(p.x)
    network.unmerge()
    if cached:
        network.cache(weights=True)
    return Contestant(CACHED if cached else "nerine", model, trained, modules=[model]), merged.float()


LYCORIS: dict[str, dict[str, Any]] = {
    "lora": {"network_module": "lora"},
    "lokr": {"network_module": "lokr", "factor": FACTOR, "full_matrix": True},
    "loha": {"network_module": "loha"},
    "glora": {"network_module": "glora"},
    "full": {"network_module": "full"},
    "ia3": {"network_module": "ia3"},
    "diag-oft": {"network_module": "diag-oft", "lora_dim": BLOCK, "conv_lora_dim": BLOCK},
    "boft": {"network_module": "boft", "lora_dim": BLOCK, "conv_lora_dim": BLOCK},
}


def _lycoris(p: ModelProblem, row: Row, bypass: bool) -> Contestant:
    from lycoris import LycorisNetwork

    model = p.fresh_model()
    settings: dict[str, Any] = {"lora_dim": RANK, "alpha": RANK, "conv_lora_dim": RANK, "conv_alpha": RANK}
    settings |= {"bypass_mode": bypass, "weight_decompose": row.axis is not None, "wd_on_out": True}
    # their presets name the blocks of some models; this one means every layer
    LycorisNetwork.apply_preset({"target_module": [], "target_name": ["*"], "use_fnmatch": True, "enable_conv": True})
    network = LycorisNetwork(model, **(settings | LYCORIS[row.kind]))
    found, wanted = len(network.loras), sum(isinstance(m, ADAPTED) for m in model.modules())
    if found != wanted:
        raise RuntimeError(f"adapts {found} of {wanted} layers")
    network.apply_to()
    trained = _stirred({name: t for name, t in network.named_parameters() if t.requires_grad})
    return Contestant("LyCORIS bypass" if bypass else "LyCORIS", model, trained, modules=[model, network])


PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": RANK, "lora_alpha": RANK}),
    "loha": ("LoHaConfig", {"r": RANK, "alpha": RANK}),
    "lokr": ("LoKrConfig", {"r": 10**6, "alpha": 10**6, "decompose_factor": FACTOR}),
}


def _peft(p: ModelProblem, row: Row) -> Contestant:
    import peft

    model = p.fresh_model()
    kind, settings = PEFT[row.kind]
    names = [name for name, module in model.named_modules() if isinstance(module, ADAPTED)]
    extra = {"use_dora": True} if row.axis else {}
    model = peft.inject_adapter_in_model(getattr(peft, kind)(target_modules=names, **settings, **extra), model)
    trained = _stirred({name: t for name, t in model.named_parameters() if t.requires_grad})
    return Contestant("PEFT", model, trained, modules=[model])


# -- their layers, one by one ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Alone:
    """One layer as it is called in a model: what it is, and the shape of its input."""

    weight: tuple[int, ...]
    bias: bool
    x: tuple[int, ...]
    stride: tuple[int, ...] = field(default=())
    padding: tuple[int, ...] = field(default=())
    needs_grad: bool = True

    def build(self) -> nn.Module:
        out, inputs, *kernel = self.weight
        if not kernel:
            return nn.Linear(inputs, out, bias=self.bias)
        return nn.Conv2d(inputs, out, tuple(kernel), self.stride, self.padding, bias=self.bias)

    @property
    def size(self) -> Size:
        out, inputs, *kernel = self.weight
        entries = torch.Size(self.x).numel() // inputs
        positions = entries
        for stride in self.stride:
            positions //= stride
        return Size(out, inputs, torch.Size(kernel).numel(), positions, entries)


def layers_of(model: nn.Module, x: Tensor, as_trained: bool = False) -> Counter[Alone]:
    """The distinct adapted layers of `model` that a forward calls, and how often.

    With `as_trained` they are told apart by whether their input needs its gradient as well, which else all are taken to
    need.
    """
    found: Counter[Alone] = Counter()

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        weight, bias = tuple(module.weight.shape), module.bias is not None
        conv = (module.stride, module.padding) if isinstance(module, nn.Conv2d) else ((), ())
        needs_grad = args[0].requires_grad or not as_trained
        found[Alone(weight, bias, tuple(args[0].shape), *conv, needs_grad)] += 1

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, ADAPTED)]
    try:
        with torch.set_grad_enabled(as_trained):
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found
