"""The valid files from which the damaged ones are made, and the model that they belong to."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import nerine
from nerine.algorithms import IA3, REGISTRY, Algorithm, DoRA, LoHa, LoKr, LoRA, OFTv2
from nerine.files.dialects import DIALECTS

SETTINGS = {
    "lora": {"rank": 2, "alpha": 1.5},
    "loha": {"rank": 2, "alpha": 1.5},
    "lokr": {"rank": 1, "alpha": 0.75, "factor": 2},
    "dylora": {"rank": 4, "alpha": 3.0, "block_size": 2},
    "tlora": {"rank": 2, "alpha": 1.5},
    "glora": {"rank": 2, "alpha": 1.5},
    "full": {},
    "norm": {},
    "ia3": {},
    "diag-oft": {"block_size": 2, "constraint": 5.0, "rescale": True},
    "boft": {"block_size": 2},
    "oft-v2": {"block_size": 2},
}
assert SETTINGS.keys() == REGISTRY.keys(), "a new algorithm needs an entry here"
LAYERS = ["tokens", "conv", "inner.point", "inner.lin_ear", "inner.square"]
NORMS = ["inner.group", "inner.layer"]


class Inner(nn.Module):
    """A pointwise convolution and two linear layers, one of them square, with norms between."""

    def __init__(self) -> None:
        super().__init__()
        self.group = nn.GroupNorm(2, 6)
        self.point = nn.Conv2d(6, 6, 1)
        self.layer = nn.LayerNorm(6)
        self.lin_ear = nn.Linear(6, 8)
        self.square = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.group(x)).flatten(2).mT
        y: Tensor = self.square(torch.tanh(self.lin_ear(self.layer(x))))
        return y


class Model(nn.Module):
    """One layer of every kind that adapters know."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, 4)
        self.conv = nn.Conv2d(4, 6, (3, 2))
        self.inner = Inner()

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens `[batch, height, width]`."""
        y: Tensor = self.inner(self.conv(self.tokens(tokens).movedim(-1, 1)))
        return y


def model() -> Model:
    """The model, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model().requires_grad_(False).eval()


def tokens() -> Tensor:
    """An input for the model."""
    return torch.arange(40).reshape(2, 5, 4) % 10


def _saved(
    algorithm: Algorithm, layers: list[str], dtype: torch.dtype | None = None, dialect: str = "lycoris"
) -> bytes:
    base = model()
    rng = torch.Generator().manual_seed(1)
    network = nerine.attach(base, algorithm, targets=layers, generator=rng)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
    with tempfile.TemporaryDirectory() as folder:
        folded = DIALECTS[dialect].folder
        file = Path(folder) / ("a" if folded else "a.safetensors")
        nerine.save(network, file, dtype=dtype, dialect=dialect)
        return (file / "adapter_model.safetensors" if folded else file).read_bytes()


@functools.cache
def seeds() -> dict[str, bytes]:
    """Valid files by name: every algorithm, DoRA over both axes, Tucker forms, half precision, every dialect."""
    found = {
        name: _saved(REGISTRY[name](**settings), NORMS if name == "norm" else LAYERS)
        for name, settings in SETTINGS.items()
    }
    lora = LoRA(rank=2, alpha=1.5)
    found["dora-out"] = _saved(DoRA(lora), LAYERS)
    found["dora-in"] = _saved(DoRA(lora, axis="in"), LAYERS)
    found["dora-lokr"] = _saved(DoRA(LoKr(rank=1, factor=2)), LAYERS)
    found["tucker-lora"] = _saved(LoRA(rank=2, tucker=True), LAYERS)
    found["tucker-loha"] = _saved(LoHa(rank=2, tucker=True), LAYERS)
    found["tucker-lokr"] = _saved(LoKr(rank=1, factor=2, tucker=True), LAYERS)
    found["full-lokr"] = _saved(LoKr(factor=2, full_matrix=True), LAYERS)
    found["both-lokr"] = _saved(LoKr(rank=1, factor=2, decompose_both=True), LAYERS)
    found["half-lora"] = _saved(lora, LAYERS, torch.float16)
    found["brain-loha"] = _saved(LoHa(rank=2), LAYERS, torch.bfloat16)
    for dialect in DIALECTS:
        if dialect != "lycoris":
            found[f"{dialect}-lora"] = _saved(lora, LAYERS[1:], dialect=dialect)
    for dialect in ("kohya", "comfy", "hcp"):
        found[f"{dialect}-dora-lokr"] = _saved(DoRA(LoKr(rank=1, factor=2), axis="in"), LAYERS[1:], dialect=dialect)
    found["peft-ia3"] = _saved(IA3(on_input=True), LAYERS[1:], dialect="peft")
    found["onetrainer-oft"] = _saved(OFTv2(block_size=2), LAYERS[1:], dialect="onetrainer")
    found["diffusers-dora"] = _saved(DoRA(lora), LAYERS[1:], dialect="diffusers")
    return found
