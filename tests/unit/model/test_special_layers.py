"""Weights that no ordinary layer holds: attention, experts, rows of a fused projection, tied and idle layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nerine
from nerine import DiagOFT, DoRA, Full, LoKr, LoRA, MergeError, Norm, OptionError, Rule, TargetError, TLoRA
from nerine.testing.battery import close, stir

pytestmark = pytest.mark.no_device_guard  # one device only


def without(model: nn.Module) -> nn.Module:
    """A copy of the model without adapters."""
    twin = copy.deepcopy(model)
    nerine.Network.of(twin).detach()
    return twin


def check_life(model: nn.Module, network: nerine.Network, x: Any, base: Tensor, file: Path) -> None:
    """Trained = merged = saved and loaded, and strength 0 is the base."""
    stir(network)
    model.eval()
    y = model(x)
    assert float((y - base).detach().abs().max()) > 1e-3
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())
    network.merge()
    close(model(x), y, "merged")
    network.unmerge()
    assert torch.equal(model(x), y)
    network.strength = 0
    close(model(x), base, "strength 0")
    network.strength = 1
    nerine.save(network, file)
    again = without(model)
    close(again(x), base, "detached")
    nerine.load(again, file, strict=True)
    close(again(x), y, "reloaded")


# -- attention -------------------------------------------------------------------------------------------------------
class SelfAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x[..., : self.attn.kdim], x[..., : self.attn.vdim], need_weights=False)[0]


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6, "vdim": 4}], ids=str)
@pytest.mark.parametrize("algorithm", [LoRA(rank=2, alpha=1.0), DoRA(LoKr(factor=2)), Full()], ids=str)
def test_attention(algorithm: Any, options: dict[str, Any], tmp_path: Path) -> None:
    model = SelfAttention(**options).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    base = model(x)
    network = nerine.attach(model, algorithm)
    names = [row[0] for row in network.report.rows]
    split = ["attn.q_proj_weight", "attn.k_proj_weight", "attn.v_proj_weight"]
    assert names == [*(split if "kdim" in options else ["attn.in_proj_weight"]), "attn.out_proj"]
    assert torch.equal(model(x), base)
    check_life(model, network, x, base, tmp_path / "a.safetensors")


def test_torchs_shortcut_does_not_pass_adapters_by(tmp_path: Path) -> None:
    """In eval mode without gradients torch computes a whole encoder layer from its weights, and calls no part of it."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).double().eval()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    switches = [(m.activation_relu_or_gelu, model.use_nested_tensor) for m in model.layers]
    base = model(x)
    network = nerine.attach(model, LoRA(rank=2, alpha=1.0), train_norm=True)
    check_life(model, network, x, base, tmp_path / "a.safetensors")
    want = model(x)
    with torch.no_grad():
        close(model(x), want, "without gradients")
        network.merge()
        close(model(x), want, "merged")
    network.detach()
    assert [(m.activation_relu_or_gelu, model.use_nested_tensor) for m in model.layers] == switches
    assert not [k for m in model.modules() for k in m.__dict__ if k.startswith("_nerine")]


# -- parameters that stand alone -------------------------------------------------------------------------------------
class Experts(nn.Module):
    """A mixture whose experts are one parameter, as transformers keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 8, 12))
        self.down_proj = nn.Parameter(torch.randn(4, 6, 8))
        self.router = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        a, b = torch.einsum("bi,eio->beo", x, self.gate_up_proj).chunk(2, -1)
        return torch.einsum("beo,eoi,be->bi", a.sigmoid() * b, self.down_proj, weights)


EXPERTS = [LoRA(rank=2, alpha=1.0), LoKr(factor=2), DoRA(LoRA(rank=2)), DiagOFT(block_size=2), Full(), TLoRA(rank=2)]


@pytest.mark.parametrize("algorithm", EXPERTS, ids=str)
def test_one_adapter_for_each_expert(algorithm: Any, tmp_path: Path) -> None:
    model = nn.Sequential(Experts()).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    base = model(x)
    plan = nerine.plan(model, algorithm, targets=["gate_up_proj", "down_proj"])
    network = nerine.attach(model, algorithm, targets=["gate_up_proj", "down_proj"])
    assert [row.layer for row in plan.rows] == ["0.gate_up_proj", "0.down_proj"]
    assert plan.params == sum(p.numel() for p in network.parameters())
    assert all(t.shape[0] == 4 for t in network.state_dict().values())
    check_life(model, network, x, base, tmp_path / "a.safetensors")


def test_experts_start_apart() -> None:
    network = nerine.attach(nn.Sequential(Experts()), LoRA(rank=2), targets=["gate_up_proj"])
    down = network.state_dict()["0.gate_up_proj.down"]
    assert not torch.equal(down[0], down[1])


def test_a_parameter_is_only_adapted_by_its_name() -> None:
    """A pattern for something above it does not mean a table of positions that happens to be there."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.zeros(5, 8))
            self.to_q = nn.Linear(8, 8)

    model = nn.ModuleDict({"block": Model()})
    assert [row.layer for row in nerine.plan(model, LoRA(rank=2), targets="block").rows] == ["block.to_q"]
    assert [row.layer for row in nerine.plan(model, LoRA(rank=2), targets="positions").rows] == ["block.positions"]


# -- rows ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 12), lambda: nn.Conv1d(6, 12, 1)], ids=["linear", "conv"])
def test_adapters_on_some_rows(make: Any, tmp_path: Path) -> None:
    model = nn.Sequential(make()).double()
    x = torch.randn(2, 6, *([3] if isinstance(model[0], nn.Conv1d) else []), dtype=torch.float64)
    base = model(x)
    rules = [Rule("0", LoRA(rank=2, alpha=1.0), rows=(0, 4)), Rule("0", DoRA(LoKr(factor=2)), rows=(8, 12))]
    network = nerine.attach(model, rules, targets=nn.Module)
    assert [row[0] for row in network.report.rows] == ["0[0:4]", "0[8:12]"]
    check_life(model, network, x, base, tmp_path / "a.safetensors")
    moved = (model(x) - base).detach().abs().transpose(0, 1).flatten(1).amax(1) > 1e-9
    assert moved.tolist() == [True] * 4 + [False] * 4 + [True] * 4


def test_rows_of_a_fused_attention(tmp_path: Path) -> None:
    """Queries and values alone, as LoRA is often used; the keys stay as they are."""
    model = SelfAttention().double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    base = model(x)
    rules = [Rule("in_proj_weight", LoRA(rank=2), rows=rows) for rows in ((0, 8), (16, 24))]
    network = nerine.attach(model, rules)
    check_life(model, network, x, base, tmp_path / "a.safetensors")
    before = model.attn.in_proj_weight.detach().clone()
    network.merge()
    changed = (model.attn.in_proj_weight != before).any(1)
    assert changed.tolist() == [True] * 8 + [False] * 8 + [True] * 8


@pytest.mark.parametrize("rows", [(4, 2), (0, 0), (-1, 2), [0, 2], (0.0, 2)], ids=str)
def test_bad_rows(rows: Any) -> None:
    with pytest.raises(OptionError, match=r"rows must be \(start, stop\)"):
        Rule("0", LoRA(), rows=rows)


def test_rows_that_the_layer_does_not_have() -> None:
    with pytest.raises(OptionError, match=r"rows \(8, 16\) of a weight that has 12"):
        nerine.attach(nn.Sequential(nn.Linear(6, 12)), [Rule("0", LoRA(rank=2), rows=(8, 16))])
    with pytest.raises(TargetError, match="adapters on some rows need a plain Linear"):
        nerine.attach(nn.Sequential(nn.Conv1d(6, 12, 1, groups=2)), [Rule("0", LoRA(rank=2), rows=(0, 6))])


# -- shared and idle -------------------------------------------------------------------------------------------------
class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))


def test_a_tied_weight_trains_but_does_not_merge() -> None:
    model = Tied()
    network = nerine.attach(model, LoRA(rank=2))
    assert network.report.notes == ("shares its weight with embed.weight: head",)
    stir(network)
    before = model.embed.weight.detach().clone()
    with pytest.raises(MergeError, match=r"head shares its weight with embed\.weight, which a merge would change"):
        network.merge()
    assert torch.equal(model.embed.weight, before)
    with pytest.raises(TargetError, match="embed and head share one weight"):
        nerine.attach(Tied(), LoRA(rank=2), targets=[nn.Linear, nn.Embedding])


def test_layers_that_are_never_executed_are_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    network = nerine.attach(model, LoRA(rank=2))
    assert network.idle() == ()
    model["used"](torch.randn(2, 4))
    assert network.report.idle == ("unused",)
    assert "never executed: unused: its adapter has no effect" in str(network.report)
    model["unused"](torch.randn(2, 4))
    assert network.report.idle == ()


# -- norms and embeddings --------------------------------------------------------------------------------------------
def test_norms_only_where_asked() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.lin = nn.Linear(4, 4)
            self.norm = nn.LayerNorm(4)
            self.bare = nn.LayerNorm(4, elementwise_affine=False)

    model = nn.ModuleDict({"block": Block()})

    def chosen(*args: Any, **options: Any) -> list[str]:
        return [row.layer.removeprefix("block.") for row in nerine.plan(model, *args, **options).rows]

    assert chosen(LoRA(rank=2)) == ["lin"]
    assert chosen(LoRA(rank=2), targets="block") == ["lin"]
    assert chosen(LoRA(rank=2), train_norm=True) == ["lin", "norm"]
    assert chosen(Norm()) == ["norm"]
    assert chosen([Rule("norm", Norm()), Rule("lin", LoRA(rank=2))], targets=["norm", "lin"]) == ["lin", "norm"]
    assert chosen(LoRA(rank=2), targets=[nn.Embedding]) == ["embed"]
    assert chosen(LoRA(rank=2), targets="embed") == ["embed"]
    skipped = nerine.plan(model, LoRA(rank=2), train_norm=True).skipped
    assert skipped == {"block.bare": "it has no weight of its own to move"}


def test_batch_norm_counts_each_batch_once() -> None:
    model, plain = (nn.Sequential(nn.BatchNorm1d(4)).train() for _ in range(2))
    x = torch.randn(6, 4)
    network = nerine.attach(model, Norm(), dropout=0.5)  # dropout goes beside the layer, through a second call of it
    stir(network)
    model(x)
    plain(x)
    assert model[0].num_batches_tracked == 1
    torch.testing.assert_close(model[0].running_mean, plain[0].running_mean)
    torch.testing.assert_close(model[0].running_var, plain[0].running_var)
    assert not [k for k in model[0].__dict__ if k in ("running_mean", "weight", "bias")]


def test_a_call_that_fails_leaves_the_layer_as_it_was() -> None:
    model = nn.Sequential(nn.LayerNorm(4))
    network = nerine.attach(model, Norm())
    stir(network)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 3))
    assert isinstance(model[0].weight, nn.Parameter)


def test_an_output_size_is_the_layers_own() -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2).double()
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    model = nn.ModuleDict({"up": layer})
    network = nerine.attach(model, LoRA(rank=2, alpha=1.0))
    stir(network)
    y = layer(x, output_size=(8, 8))
    assert y.shape[-2:] == (8, 8)
    network.merge()
    close(layer(x, output_size=(8, 8)), y, "merged")


def test_rows_that_overlap_are_refused() -> None:
    """A merge of one would change what the other reads."""
    model = nn.Sequential(nn.Linear(6, 12))
    nerine.attach(model, [Rule("0", LoRA(rank=2), rows=(0, 6))], name="a")
    for rows in ((4, 8), None):
        with pytest.raises(OptionError, match="overlap: give adapters the same rows, or rows apart"):
            nerine.attach(model, [Rule("0", LoRA(rank=2), rows=rows)], name="b")
    assert nerine.Network.of(model).names == ("a",)
    nerine.attach(model, [Rule("0", LoRA(rank=2), rows=(0, 6))], name="c")


def test_dropout_that_cannot_act_is_in_the_report() -> None:
    report = nerine.attach(SelfAttention(), LoRA(rank=2), dropout=0.1).report
    assert report.notes == (
        "dropout does not act on attn.in_proj_weight, whose module shows no output of its own",
        "dropout does not act on attn.out_proj, whose module shows no output of its own",
    )
