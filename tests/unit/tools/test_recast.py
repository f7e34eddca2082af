"""`convert(to=...)`: what is exact is exact, what is fitted says how well, and what needs the base says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nerine
from nerine import BOFT, IA3, DiagOFT, DoRA, DyLoRA, FormatError, Full, GLoRA, LoHa, LoKr, LoRA, Norm, TLoRA
from nerine.algorithms import Algorithm
from nerine.files.store import open_file
from nerine.tools import convert
from tool_adapters import LAYERS, Model, adapter_of, assert_close, base_of, distance, moved, weights

TIGHT = 3e-6  # of the largest entry: sums of a few hundred fp32 products, and alpha in fp32

# Adapters that are a LoRA: {name: (algorithm, rank of the LoRA at to_q, at the 3x3 convolution, needs the base)}
EXACT: dict[str, tuple[Algorithm, int, int, bool]] = {
    "lora": (LoRA(rank=3, alpha=2.0), 3, 3, False),
    "tucker": (LoRA(rank=3, alpha=2.0, tucker=True), 3, 3, False),
    "dylora": (DyLoRA(rank=4, alpha=3.0), 4, 4, False),
    "tlora": (TLoRA(rank=2, alpha=3.0), 4, 4, False),
    "loha": (LoHa(rank=2, alpha=1.5), 4, 4, False),
    "loha, tucker": (LoHa(rank=2, alpha=1.5, tucker=True), 4, 4, False),
    "loha, more ranks than rows": (LoHa(rank=4, alpha=1.5), 12, 10, False),
    "lokr": (LoKr(rank=1, alpha=2.0, factor=3), 3, 2, False),
    "lokr, full": (LoKr(full_matrix=True, factor=2), 12, 10, False),
    "lokr, both": (LoKr(rank=1, alpha=2.0, factor=6, decompose_both=True), 1, 1, False),
    "lokr, tucker": (LoKr(rank=1, alpha=2.0, factor=2, tucker=True), 2, 2, False),
    "glora": (GLoRA(rank=2, alpha=1.5), 4, 2 * 9 + 2, True),
}


@pytest.mark.parametrize("around", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("name", EXACT)
def test_low_rank_adapters_become_loras_exactly(name: str, around: bool, tmp_path: Path) -> None:
    algorithm, rank, conv_rank, _ = EXACT[name]
    file = adapter_of(tmp_path / "a.safetensors", DoRA(algorithm) if around else algorithm)
    base = base_of(tmp_path)
    report = convert(file, tmp_path / "b.safetensors", to="lora", base=base)
    assert_close(moved((tmp_path / "b.safetensors", 1.0)), moved((file, 1.0)), TIGHT)
    rows = {row.layer: row for row in report.rows}
    assert set(rows) == set(LAYERS)
    assert {row.after for row in rows.values()} == {"DoRA(LoRA)" if around else "LoRA"}
    assert rows["block.conv"].method == ("kept" if name == "lora" else "exact")
    assert (rows["block.to_q"].rank, rows["block.conv"].rank) == (rank, conv_rank)
    assert report.error == report.worst == 0.0
    with open_file(tmp_path / "b.safetensors") as source:
        suffixes = {key.split(".", 1)[1] for key in source.keys}
        assert suffixes == {"lora_up.weight", "lora_down.weight", "alpha", *(["dora_scale"] if around else [])}
        if name not in ("lora", "tucker"):
            assert float(source.read("lycoris_block_to_q.alpha")) == rank  # at scale one


@pytest.mark.parametrize("name", EXACT)
def test_they_do_so_without_the_base_where_nothing_hides_in_it(name: str, tmp_path: Path) -> None:
    algorithm, _, _, needs_base = EXACT[name]
    file = adapter_of(tmp_path / "a.safetensors", algorithm, [nn.Linear])
    if needs_base:
        with pytest.raises(FormatError, match=r"block\.ff: what GLoRA changes .* --base"):
            convert(file, tmp_path / "b.safetensors", to="lora")
        assert not (tmp_path / "b.safetensors").exists()
        return
    convert(file, tmp_path / "b.safetensors", to="lora")
    assert_close(moved((tmp_path / "b.safetensors", 1.0)), moved((file, 1.0)), TIGHT)


def test_a_convolution_whose_kernel_is_hidden_is_not_taken_for_a_linear_layer(tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", LoHa(rank=2), "conv")
    with pytest.raises(FormatError, match=r"conv: the kernel of this convolution .* --base"):
        convert(file, tmp_path / "b.safetensors", to="lora")
    tucker = adapter_of(tmp_path / "c.safetensors", LoHa(rank=2, tucker=True), "conv")
    convert(tucker, tmp_path / "b.safetensors", to="lora")  # its core shows the kernel
    assert_close(moved((tmp_path / "b.safetensors", 1.0)), moved((tucker, 1.0)), TIGHT)


@pytest.mark.parametrize("to", ["dylora", "loha", "lokr", "glora", "full"])
@pytest.mark.parametrize("around", [False, True], ids=["plain", "dora"])
def test_a_lora_becomes_whatever_holds_one(to: str, around: bool, tmp_path: Path) -> None:
    algorithm = LoRA(rank=3, alpha=2.0)
    file = adapter_of(tmp_path / "a.safetensors", DoRA(algorithm) if around else algorithm)
    report = convert(file, tmp_path / "b.safetensors", to=to, base=base_of(tmp_path))
    assert_close(moved((tmp_path / "b.safetensors", 1.0)), moved((file, 1.0)), TIGHT)
    kind = {"dylora": "DyLoRA", "loha": "LoHa", "lokr": "LoKr", "glora": "GLoRA", "full": "Full"}[to]
    assert {row.after for row in report.rows} == {f"DoRA({kind})" if around and to != "full" else kind}
    assert {row.method for row in report.rows} == {"exact"}


ANY = (
    IA3(),
    IA3(on_input=True),
    DiagOFT(block_size=2),
    BOFT(block_size=2),
    GLoRA(rank=2, alpha=3.0),
    DoRA(LoKr(rank=1, factor=3)),
    DoRA(LoHa(rank=2), axis="in"),
)


@pytest.mark.parametrize("algorithm", ANY, ids=str)
def test_anything_becomes_a_full_difference_beside_the_base(algorithm: Algorithm, tmp_path: Path) -> None:
    is_hidden = isinstance(algorithm, BOFT) or getattr(algorithm, "axis", "") == "in"  # unread without the base
    targets = [nn.Linear] if is_hidden else [nn.Linear, nn.Conv2d]
    file = adapter_of(tmp_path / "a.safetensors", algorithm, targets)
    with pytest.raises(FormatError, match=r"known only beside the weight of its layer; give the base with --base"):
        convert(file, tmp_path / "b.safetensors", to="full")
    report = convert(file, tmp_path / "b.safetensors", to="full", base=base_of(tmp_path))
    assert_close(moved((tmp_path / "b.safetensors", 1.0)), moved((file, 1.0)), TIGHT)
    assert {(row.after, row.method) for row in report.rows} == {("Full", "exact")}


def test_norms_pass_as_they_are(tmp_path: Path) -> None:
    model = Model()
    rules = [nerine.Rule("norm", Norm()), nerine.Rule("to_q", LoHa(rank=2))]
    nerine.save(_stirred(nerine.attach(model, rules)), tmp_path / "a.safetensors")
    report = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="lora", base=base_of(tmp_path))
    assert_close(moved((tmp_path / "b.safetensors", 1.0)), moved((tmp_path / "a.safetensors", 1.0)), TIGHT)
    assert {row.layer: row.method for row in report.rows} == {"block.to_q": "exact", "block.norm": "kept"}


def _stirred(network: nerine.Network) -> nerine.Network:
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return network


# -- fitted ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("algorithm", [LoHa(rank=2), LoKr(rank=2, factor=3), LoRA(rank=5), Full()], ids=str)
def test_the_best_lora_of_a_rank_and_its_error(algorithm: Algorithm, tmp_path: Path) -> None:
    """As good as the singular values say, and the report says the error that the file has."""
    file = adapter_of(tmp_path / "a.safetensors", algorithm)
    report = convert(file, tmp_path / "b.safetensors", to="lora", rank=2, base=base_of(tmp_path))
    wanted = {key: t for key, t in moved((file, 1.0)).items() if key.endswith("weight")}
    found = moved((tmp_path / "b.safetensors", 1.0))
    for row in report.rows:
        key = f"{row.layer}.weight"
        s = torch.linalg.svdvals(wanted[key].flatten(1).double())
        best = float(s[2:].square().sum().sqrt() / s.norm())
        assert row.rank == min(2, row.rank or 0)
        assert row.error == pytest.approx(best, rel=1e-3, abs=2e-6)
        assert distance(found, wanted, [key]) == pytest.approx(row.error, rel=1e-3, abs=2e-6)
        assert row.size == pytest.approx(float(wanted[key].norm()), rel=1e-4)
    assert report.error == pytest.approx(distance(found, wanted), rel=1e-3)
    assert report.worst == max(row.error for row in report.rows)


@pytest.mark.parametrize("algorithm", [LoHa(rank=3), Full()], ids=str)
def test_the_least_rank_that_keeps_an_error(algorithm: Algorithm, tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", algorithm)
    report = convert(file, tmp_path / "b.safetensors", to="lora", tol=0.2, base=base_of(tmp_path))
    changes = moved((file, 1.0))
    for row in report.rows:
        s = torch.linalg.svdvals(changes[f"{row.layer}.weight"].flatten(1).double())
        left = s.square().flip(0).cumsum(0).flip(0).sqrt() / s.norm()
        assert row.rank == int((left > 0.2).sum())
        assert row.error <= 0.2
    assert 0 < report.worst <= 0.2


def test_a_decomposition_is_multiplied_in(tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", DoRA(LoRA(rank=2, alpha=3.0)))
    with pytest.raises(FormatError, match="what DoRA changes"):
        convert(file, tmp_path / "b.safetensors", to="lora", rank=4, dora=False)
    report = convert(file, tmp_path / "b.safetensors", to="lora", tol=1e-3, dora=False, base=base_of(tmp_path))
    assert {row.after for row in report.rows} == {"LoRA"}
    assert distance(moved((tmp_path / "b.safetensors", 1.0)), moved((file, 1.0))) < 1.1e-3


def test_a_fit_keeps_the_decomposition_and_its_magnitudes(tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", DoRA(LoRA(rank=4, alpha=3.0)))
    convert(file, tmp_path / "b.safetensors", to="lora", rank=3)
    before, after = weights((file, 1.0)), weights((tmp_path / "b.safetensors", 1.0))
    for layer in LAYERS:
        norms = [w[f"{layer}.weight"].flatten(1).norm(dim=1) for w in (before, after)]
        torch.testing.assert_close(norms[0], norms[1], rtol=1e-5, atol=1e-6)
    assert not torch.equal(before["block.ff.weight"], after["block.ff.weight"])


@pytest.mark.parametrize(
    ("to", "options", "needs_base"),
    [
        ("lokr", {"rank": 16, "settings": {"factor": 4}}, False),
        ("lokr", {"rank": 1, "settings": {"factor": 2}}, False),
        ("loha", {"rank": 2}, False),
        ("ia3", {}, True),
        ("ia3", {"settings": {"on_input": True}}, True),
        ("diag-oft", {"settings": {"block_size": 4}}, True),
    ],
)
def test_other_algorithms_are_fitted(to: str, options: dict[str, Any], needs_base: bool, tmp_path: Path) -> None:
    """The report says the error that the file has, and where the weight plays a part it is asked for."""
    file = adapter_of(tmp_path / "a.safetensors", LoRA(rank=4, alpha=0.5))
    if needs_base:
        with pytest.raises(FormatError, match=r"is fitted beside the weight; give the base with --base"):
            convert(file, tmp_path / "b.safetensors", to=to, **options)
        options = {**options, "base": base_of(tmp_path)}
    report = convert(file, tmp_path / "b.safetensors", to=to, **options)
    wanted, found = moved((file, 1.0)), moved((tmp_path / "b.safetensors", 1.0))
    assert {row.method for row in report.rows} == {"fitted"}
    for row in report.rows:
        assert 0 < row.error < 1.05
        assert distance(found, wanted, [f"{row.layer}.weight"]) == pytest.approx(row.error, rel=1e-3)
    assert report.error == pytest.approx(distance(found, wanted), rel=1e-3)


def test_what_the_bias_loses_is_said(tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", Full(), "to_q")
    report = convert(file, tmp_path / "b.safetensors", to="lora", rank=20)
    (row,) = report.rows
    assert row.note.startswith("its change of the bias (size")
    assert row.method == "fitted"
    found, wanted = moved((tmp_path / "b.safetensors", 1.0)), moved((file, 1.0))
    assert found.keys() == {"block.to_q.weight"}
    torch.testing.assert_close(found["block.to_q.weight"], wanted["block.to_q.weight"], rtol=1e-4, atol=1e-5)


# -- refusals and surroundings -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "lroa"}, "no algorithm is called 'lroa'. Did you mean"),
        ({"to": "tlora"}, "nothing is converted to tlora"),
        ({"to": "lora", "rank": 2, "tol": 0.1}, "not both"),
        ({"to": "loha", "tol": 0.1}, "found for lora alone"),
        ({"to": "lora", "tol": 1.5}, "from 0 to 1"),
        ({"to": "lora", "settings": {"alpha": 3}}, "leave out alpha"),
        ({"to": "lokr", "settings": {"factr": 3}}, "Did you mean 'factor'"),
        ({"rank": 4}, "say which with `to`"),
        ({}, "nothing to convert to"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, object], words: str, tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", LoRA(rank=2), "to_q")
    with pytest.raises(nerine.OptionError, match=words):
        convert(file, tmp_path / "b.safetensors", **options)  # type: ignore[arg-type]


def test_a_full_difference_needs_a_rank(tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", Full(bias=False), "to_q")
    with pytest.raises(nerine.OptionError, match=r"to_q: Full is no low-rank product.*give a rank or the error"):
        convert(file, tmp_path / "b.safetensors", to="lora")


def test_a_dry_run_says_what_a_run_would(tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", LoHa(rank=2, alpha=1.5))
    dry = convert(file, tmp_path / "b.safetensors", to="lora", base=base_of(tmp_path), dry_run=True)
    assert not (tmp_path / "b.safetensors").exists()
    assert "not written" in str(dry)
    real = convert(file, tmp_path / "b.safetensors", to="lora", base=base_of(tmp_path))
    assert dry.rows == real.rows
    assert dry.written == real.written
    assert real.written.bytes == (tmp_path / "b.safetensors").stat().st_size


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", LoHa(rank=2), "to_q")
    with pytest.raises(nerine.OptionError, match="this is what is read"):
        convert(file, file, to="lora", force=True)
    convert(file, tmp_path / "b.safetensors", to="lora")
    with pytest.raises(nerine.OptionError, match="there is a file of that name"):
        convert(file, tmp_path / "b.safetensors", to="lora")
    convert(file, tmp_path / "b.safetensors", to="lora", force=True)


def test_what_the_header_says_follows(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    network = _stirred(nerine.attach(Model(), LoHa(rank=2, alpha=1.0), targets="to_q"))
    told = {"ss_network_dim": "2", "ss_network_module": "lycoris.kohya", "sshs_model_hash": "0", "mine": "kept"}
    nerine.save(network, file, dialect="kohya", metadata=told)
    convert(file, tmp_path / "b.safetensors", to="lora", metadata={"more": "said"})
    with open_file(tmp_path / "b.safetensors") as source:
        told = dict(source.metadata)
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("4", "4.0")
    assert told["ss_network_module"] == "nerine.kohya"
    assert (told["mine"], told["more"]) == ("kept", "said")
    assert "sshs_model_hash" not in told
    again = nerine.load(Model(), tmp_path / "b.safetensors")
    assert str(again.report.rows[0].algorithm) == "LoRA(rank=4)"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_format_is_that_of_the_file_or_the_one_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", DoRA(LoHa(rank=2, alpha=1.5)), "to_q")
    convert(file, tmp_path / "half.safetensors", dialect="lycoris", dtype=torch.float16)
    convert(tmp_path / "half.safetensors", tmp_path / "b.safetensors", to="lora")
    convert(tmp_path / "half.safetensors", tmp_path / "c.safetensors", to="lora", dtype=dtype)
    for name, kept in (("b", torch.float16), ("c", dtype)):
        with open_file(tmp_path / f"{name}.safetensors") as source:
            found = {key.split(".", 1)[1]: source.dtype(key) for key in source.keys}
        assert found["lora_up.weight"] == found["lora_down.weight"] == kept
        assert found["alpha"] == found["dora_scale"] == torch.float32


def test_numbers_beyond_a_format_are_refused(tmp_path: Path) -> None:
    network = nerine.attach(Model(), LoHa(rank=1), targets="to_q")
    with torch.no_grad():
        for p in network.parameters():
            p.fill_(300.0)
    nerine.save(network, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match=r"to_q: down reaches .*more than float16 holds"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="lora", dtype=torch.float16)
    assert {p.name for p in tmp_path.iterdir()} == {"a.safetensors"}


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    network = _stirred(nerine.attach(Model(), LoHa(rank=1), targets="to_q"))
    with torch.no_grad():
        next(network.parameters())[0, 0] = float("nan")
    nerine.save(network, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match=r"to_q: w1_a has entries that are no numbers"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="lora")


def test_progress_names_the_layers(tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", LoHa(rank=2), [nn.Linear])
    seen: list[tuple[int, int, str]] = []
    convert(file, tmp_path / "b.safetensors", to="lora", progress=lambda *step: seen.append(step))
    assert seen == [(0, 2, "block.ff"), (1, 2, "block.to_q"), (2, 2, "")]


def test_comfyuis_magnitudes_are_compensated_anew(tmp_path: Path) -> None:
    base = base_of(tmp_path)
    file = adapter_of(tmp_path / "a.safetensors", DoRA(LoHa(rank=2, alpha=1.5)), [nn.Linear], dialect="comfy")
    with pytest.raises(FormatError, match="what it is in full is known only beside"):
        convert(file, tmp_path / "b.safetensors", to="lora")
    convert(file, tmp_path / "b.safetensors", to="lora", base=base)
    assert_close(moved((tmp_path / "b.safetensors", 1.0)), moved((file, 1.0)), 1e-5)
    report = convert(file, tmp_path / "c.safetensors", to="lora", rank=1, base=base)
    assert 0 < report.worst < 1
    after = weights((tmp_path / "c.safetensors", 1.0))["block.ff.weight"].norm(dim=1)
    torch.testing.assert_close(after, weights((file, 1.0))["block.ff.weight"].norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "algorithm", [LoHa(rank=2, alpha=0.02), LoKr(full_matrix=True), GLoRA(rank=2, alpha=0.02)], ids=str
)
def test_half_precision_holds_what_is_small(algorithm: Algorithm, tmp_path: Path) -> None:
    """Both factors of a rank are brought to one size: products of small numbers alone would be zero in fp16."""
    network = nerine.attach(Model(), algorithm, targets=[nn.Linear])
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape) * 2e-3)
        for name, p in network.named_parameters():
            if name.endswith(("w1_b", "w2_b", "b2", "a2")):
                p.mul_(2e4)
    nerine.save(network, tmp_path / "a.safetensors")
    convert(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="lora", dtype=torch.float16, base=base_of(tmp_path)
    )
    wanted, found = deviation(tmp_path / "a.safetensors"), deviation(tmp_path / "b.safetensors")
    assert distance(found, wanted) < 2**-10


def deviation(file: Path) -> dict[str, torch.Tensor]:
    """W' - W of the linear layers as the adapters compute it, not rounded to the weight."""
    network = nerine.load(Model(), file)
    found = {}
    for path, _, adapter in network.adapters():
        weight = network.model.get_submodule(path).weight.detach()
        found[path] = adapter.weight_deviation(adapter.params(), weight).detach()
    return found


def test_a_live_model_is_a_base(tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", DoRA(GLoRA(rank=2, alpha=1.5)))
    convert(file, tmp_path / "b.safetensors", to="lora", base=Model())
    assert_close(moved((tmp_path / "b.safetensors", 1.0)), moved((file, 1.0)), TIGHT)
    with pytest.raises(FormatError, match="its weight is needed, and the model has none"):
        convert(file, tmp_path / "c.safetensors", to="lora", base=Model().to("meta"))


class Rare(nn.Module):
    """Layers that are seldom adapted."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.wte = nn.Embedding(30, 8)
        self.up = nn.ConvTranspose2d(6, 10, 3)
        self.conv1d = nn.Conv1d(5, 7, 3, bias=False)


@pytest.mark.parametrize("to", ["lora", "full", "lokr"])
@pytest.mark.parametrize("algorithm", [LoHa(rank=2, alpha=1.5), LoKr(rank=1, factor=2), LoRA(rank=3)], ids=str)
def test_rare_layers(algorithm: Algorithm, to: str, tmp_path: Path) -> None:
    network = _stirred(nerine.attach(Rare(), algorithm, targets=["wte", "up", "conv1d"]))
    nerine.save(network, tmp_path / "a.safetensors")
    report = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to=to, base=Rare())
    assert len(report.rows) == 3
    found = []
    for name in "ab":
        model = Rare()
        nerine.load(model, tmp_path / f"{name}.safetensors", strict=True).merge()
        found.append([model.wte.weight.detach(), model.up.weight.detach(), model.conv1d.weight.detach()])
    own = Rare()
    for before, after, layer in zip(*found, (own.wte, own.up, own.conv1d), strict=True):
        assert float((before - layer.weight).detach().abs().max()) > 0.05
        torch.testing.assert_close(after, before, rtol=0, atol=TIGHT * float(before.abs().max()))
