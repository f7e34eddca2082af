"""Files between nerine and PEFT itself, both ways: the weights that PEFT merges are the weights that nerine merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nerine
from nerine import IA3, DoRA, FormatError, Full, LoHa, LoKr, LoRA, Norm, OFTv2, Rule, TLoRA
from peers.stirred import stir

peft = pytest.importorskip("peft", reason="needs peft: pip install 'nerine[peers]'")

pytestmark = [
    pytest.mark.peers,
    pytest.mark.no_device_guard,
    pytest.mark.filterwarnings("ignore:Unscaling operation"),  # PEFT's own
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:.*invalid shape"),  # PEFT takes the biases that it has made for damage
]
TOLERANCE = 1e-5  # of the largest entry of the difference, in fp32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(24, 30)
        self.plain = nn.Linear(30, 12, bias=False)
        self.norm = nn.LayerNorm(30)


class Model(nn.Module):
    """One layer is called as another ends, so that patterns must be exact."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = Block()
        self.lin = nn.Linear(8, 6)
        self.conv = nn.Conv2d(12, 20, 3, padding=1, stride=2)
        self.point = nn.Conv2d(12, 8, 1)
        self.emb = nn.Embedding(11, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.block.plain(self.block.norm(self.block.lin(x)))


LINEARS, CONVS = ["block.lin", "block.plain"], ["conv", "point"]
MIXED = [
    Rule("re:lin", LoRA(rank=2, alpha=3)),
    Rule("block.lin", LoRA(rank=4, alpha=1, rs=True)),
    Rule("conv", LoRA(rank=3, alpha=0.5)),
]
SENT: dict[str, tuple[Any, list[str]]] = {
    "LoRA": (LoRA(rank=4, alpha=3), [*LINEARS, *CONVS, "emb", "re:lin"]),
    "LoRA of two settings": (MIXED, ["re:lin", "block.lin", "conv"]),
    "LoRA, Tucker": (LoRA(rank=4, alpha=3, tucker=True), CONVS),
    "LoRA, PiSSA": (LoRA(rank=4, alpha=3, init="pissa"), LINEARS),
    "T-LoRA": (TLoRA(rank=4, alpha=3), LINEARS),
    "DoRA": (DoRA(LoRA(rank=4, alpha=3)), [*LINEARS, *CONVS, "emb"]),
    "LoHa": (LoHa(rank=4, alpha=3), [*LINEARS, *CONVS]),
    "LoHa, Tucker": (LoHa(rank=4, alpha=3, tucker=True), [*LINEARS, *CONVS]),
    "LoKr": (LoKr(rank=2, alpha=3), [*LINEARS, *CONVS]),
    "LoKr of factor 2": (LoKr(rank=2, alpha=3, factor=2), [*LINEARS, *CONVS]),
    "LoKr, both decomposed": (LoKr(rank=1, alpha=3, decompose_both=True), LINEARS),
    "LoKr, Tucker": (LoKr(rank=1, alpha=3, tucker=True), CONVS),
    "LoKr, both full": (LoKr(full_matrix=True), [*LINEARS, *CONVS]),
    "IA3 on inputs": (IA3(on_input=True), [*LINEARS, *CONVS]),
    "IA3 on outputs": (IA3(), ["block.plain"]),
    "OFT": (OFTv2(block_size=6), ["block.lin", "block.plain", "conv"]),
    "OFT, exact": (OFTv2(block_size=6, terms=0), ["block.lin", "block.plain"]),
    "LoRA and modules trained whole": (
        [Rule("norm", Norm()), Rule("emb", Full()), Rule("point", Full()), Rule("*", LoRA(rank=4, alpha=3))],
        ["block.lin", "block.norm", "emb", "point"],
    ),
}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {k: t.detach().clone() for k, t in model.state_dict().items() if ".nerine" not in f".{k}"}


def compare(got: dict[str, Tensor], want: dict[str, Tensor], moved: int) -> None:
    """Every weight, against how far it has moved; at least `moved` of them have."""
    base = weights_of(Model())
    assert base.keys() <= got.keys(), sorted(base.keys() - got.keys())
    seen = 0
    for key, before in base.items():
        size = float((want[key] - before).abs().max())
        seen += size > 0
        assert float((got[key] - want[key]).abs().max()) <= TOLERANCE * max(size, 1e-3), key
    assert seen >= moved


@pytest.mark.parametrize("case", SENT)
def test_peft_reads_what_nerine_wrote(case: str, tmp_path: Path) -> None:
    what, targets = SENT[case]
    model = Model()
    network = nerine.attach(model, what, targets=targets)
    stir(network.parameters())
    nerine.save(network, tmp_path / "adapter", dialect="peft")
    theirs = peft.PeftModel.from_pretrained(Model(), str(tmp_path / "adapter"))
    network.merge()
    compare(weights_of(theirs.merge_and_unload()), weights_of(model), moved=len(targets))


L = {"lora_alpha": 3, "r": 4}
RECEIVED: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoRA": (peft.LoraConfig, {**L, "target_modules": ["lin", "plain", "conv", "point", "emb"]}),
    "rsLoRA": (peft.LoraConfig, {**L, "use_rslora": True, "target_modules": ["lin", "plain", "conv"]}),
    "DoRA": (peft.LoraConfig, {**L, "use_dora": True, "target_modules": ["lin", "plain", "conv", "point", "emb"]}),
    "patterns": (
        peft.LoraConfig,
        {
            **L,
            "target_modules": ["lin", "plain", "conv"],
            "rank_pattern": {"^lin": 2, "plain": 6},
            "alpha_pattern": {"^lin": 5, "block.*": 7},
        },
    ),
    "LoRA with bias": (peft.LoraConfig, {**L, "lora_bias": True, "target_modules": ["lin"]}),
    "modules to save": (
        peft.LoraConfig,
        {**L, "target_modules": ["plain"], "modules_to_save": ["norm", "emb", "point"]},
    ),
    "LoHa": (peft.LoHaConfig, {"r": 4, "alpha": 3, "target_modules": ["lin", "plain", "conv", "point"]}),
    "LoHa, effective": (
        peft.LoHaConfig,
        {"r": 4, "alpha": 3, "use_effective_conv2d": True, "target_modules": ["lin", "conv"]},
    ),
    "LoKr": (peft.LoKrConfig, {"r": 2, "alpha": 3, "target_modules": ["lin", "plain", "conv", "point"]}),
    "LoKr, both": (
        peft.LoKrConfig,
        {"r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 2, "target_modules": ["lin", "plain"]},
    ),
    "LoKr, effective": (
        peft.LoKrConfig,
        {"r": 1, "alpha": 3, "use_effective_conv2d": True, "target_modules": ["conv"]},
    ),
    "LoKr, both full": (peft.LoKrConfig, {"r": 64, "alpha": 16, "target_modules": ["lin", "plain", "conv"]}),
    "IA3": (peft.IA3Config, {"target_modules": ["lin", "plain", "conv"], "feedforward_modules": ["plain"]}),
    "OFT": (peft.OFTConfig, {"oft_block_size": 6, "r": 0, "target_modules": ["block.lin", "plain", "conv"]}),
    "OFT, three terms": (
        peft.OFTConfig,
        {"oft_block_size": 6, "r": 0, "num_cayley_neumann_terms": 3, "target_modules": ["block.lin"]},
    ),
    "OFT, exact": (
        peft.OFTConfig,
        {"oft_block_size": 6, "r": 0, "use_cayley_neumann": False, "target_modules": ["block.lin", "plain"]},
    ),
}


@pytest.mark.parametrize("case", RECEIVED)
def test_nerine_reads_what_peft_wrote(case: str, tmp_path: Path) -> None:
    kind, settings = RECEIVED[case]
    theirs = peft.get_peft_model(Model(), kind(**settings))
    stir(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    model = Model()
    network = nerine.load(model, tmp_path / "adapter", strict=True)
    assert network.report.dialect == "peft"
    network.merge()
    want = weights_of(theirs.merge_and_unload())
    compare(weights_of(model), want, moved=len(settings["target_modules"]))


def test_what_one_folder_cannot_hold(tmp_path: Path) -> None:
    rules = [Rule("block.lin", LoRA(rank=2)), Rule("block.plain", LoHa(rank=2))]
    network = nerine.attach(Model(), rules, targets=LINEARS)
    with pytest.raises(FormatError, match="adapters of one kind, and these are LOHA, LORA"):
        nerine.save(network, tmp_path / "adapter", dialect="peft")
    assert not (tmp_path / "adapter").exists()


def test_the_settings_are_those_that_peft_asks_for(tmp_path: Path) -> None:
    network = nerine.attach(Model(), MIXED, targets=["re:lin", "block.lin", "conv"])
    nerine.save(network, tmp_path / "adapter", dialect="peft")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["block.lin", "conv", "lin"]
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "adapter")).peft_type == "LORA"
