"""`combine`: one file that adds what several would add together, each at its strength."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nerine
from nerine import (
    IA3,
    DiagOFT,
    DoRA,
    DyLoRA,
    FormatError,
    Full,
    GLoRA,
    LoHa,
    LoKr,
    LoRA,
    Norm,
    OptionError,
    TargetError,
    TLoRA,
)
from nerine.algorithms import Algorithm
from nerine.files.names import aliases
from nerine.files.store import open_file, write_file
from nerine.tools.combine import combine
from nerine.tools.embeddings import embeddings
from tool_adapters import LAYERS, Model, adapter_of, assert_close, base_of, distance, moved, stirred

TIGHT = 3e-6  # of the largest entry: fp32 sums, and alpha in fp32
LOW_RANK = (
    LoRA(rank=3, alpha=2.0),
    LoRA(rank=3, alpha=2.0, tucker=True),
    DyLoRA(rank=4, alpha=3.0),
    TLoRA(rank=2, alpha=3.0),
    LoHa(rank=2, alpha=1.5),
    LoKr(rank=1, alpha=2.0, factor=3),
    GLoRA(rank=2, alpha=1.5),
)


def two(folder: Path, first: Algorithm, second: Algorithm, *where: Any) -> tuple[Path, Path]:
    places = where or ((nn.Linear, nn.Conv2d),) * 2
    files = (folder / "a.safetensors", folder / "b.safetensors")
    for number, (file, algorithm, targets) in enumerate(zip(files, (first, second), places, strict=True)):
        adapter_of(file, algorithm, targets, seed=number + 1)
    return files


# -- sums --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("second", LOW_RANK, ids=str)
@pytest.mark.parametrize("first", [LOW_RANK[0], LOW_RANK[4]], ids=str)
def test_low_rank_adapters_add_up_exactly(first: Algorithm, second: Algorithm, tmp_path: Path) -> None:
    """The same as both merged into the model at these strengths."""
    a, b = two(tmp_path, first, second)
    report = combine([(a, 0.7), (b, -0.4)], tmp_path / "c.safetensors", base=base_of(tmp_path))
    assert_close(moved((tmp_path / "c.safetensors", 1.0)), moved((a, 0.7), (b, -0.4)), TIGHT)
    assert {row.method for row in report.rows} == {"exact"}
    assert {row.after for row in report.rows} == {"LoRA"}
    assert {row.layer for row in report.rows} == set(LAYERS)


@pytest.mark.parametrize(
    "algorithm",
    [*LOW_RANK, DoRA(LoKr(rank=1)), DiagOFT(block_size=2), IA3(), Full(), LoKr(full_matrix=True)],
    ids=str,
)
def test_one_adapter_at_strength_one_is_itself(algorithm: Algorithm, tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", algorithm)
    report = combine([file], tmp_path / "c.safetensors")
    with open_file(file) as old, open_file(tmp_path / "c.safetensors") as new:
        assert old.keys == new.keys
        assert all(torch.equal(old.read(key), new.read(key)) for key in old.keys)
    assert {row.method for row in report.rows} == {"kept"}


@pytest.mark.parametrize("algorithm", [*LOW_RANK, IA3(), IA3(on_input=True), Full(), LoKr(full_matrix=True)], ids=str)
def test_one_adapter_at_another_strength(algorithm: Algorithm, tmp_path: Path) -> None:
    """Its own kind, without the base: the strength goes into the tensors that carry it."""
    targets = [nn.Linear] if isinstance(algorithm, TLoRA) else [nn.Linear, nn.Conv2d]
    file = adapter_of(tmp_path / "a.safetensors", algorithm, targets)
    report = combine([(file, -0.6)], tmp_path / "c.safetensors")
    assert_close(moved((tmp_path / "c.safetensors", 1.0)), moved((file, -0.6)), TIGHT)
    assert {row.after for row in report.rows} == {type(algorithm).__name__}


def test_layers_that_one_file_has_alone_are_kept(tmp_path: Path) -> None:
    a, b = two(tmp_path, LoRA(rank=2, alpha=1.0), DoRA(LoHa(rank=2)), ["to_q", "conv"], ["ff", "point"])
    report = combine([(a, 0.5), b], tmp_path / "c.safetensors")
    assert_close(moved((tmp_path / "c.safetensors", 1.0)), moved((a, 0.5), (b, 1.0)), TIGHT)
    assert {row.layer: (row.files, row.method) for row in report.rows} == {
        "block.to_q": ((0,), "exact"),
        "block.conv": ((0,), "exact"),
        "block.ff": ((1,), "kept"),
        "block.point": ((1,), "kept"),
    }
    assert any("no layer in common" in note for note in report.notes)


@pytest.mark.parametrize("algorithm", [Full(), Norm(), IA3(), IA3(on_input=True)], ids=str)
def test_what_adds_up_by_itself_needs_nothing(algorithm: Algorithm, tmp_path: Path) -> None:
    targets = ["norm"] if isinstance(algorithm, Norm) else [nn.Linear, nn.Conv2d]
    a, b = two(tmp_path, algorithm, algorithm, targets, targets)
    report = combine([(a, 0.7), (b, 0.4)], tmp_path / "c.safetensors")
    assert_close(moved((tmp_path / "c.safetensors", 1.0)), moved((a, 0.7), (b, 0.4)), TIGHT)
    assert {(row.after, row.method) for row in report.rows} == {(type(algorithm).__name__, "exact")}


MOVING = (DoRA(LoRA(rank=3, alpha=2.0)), DiagOFT(block_size=2), IA3(), DoRA(LoHa(rank=2), axis="in"))


@pytest.mark.parametrize("algorithm", MOVING, ids=str)
def test_what_depends_on_the_weight_adds_up_beside_it(algorithm: Algorithm, tmp_path: Path) -> None:
    a, b = two(tmp_path, algorithm, LoRA(rank=2, alpha=3.0), [nn.Linear], [nn.Linear, nn.Conv2d])
    wanted = moved((a, 0.7), (b, 0.4))
    with pytest.raises(OptionError, match=r"is no low-rank product. Say what to make of it"):
        combine([(a, 0.7), (b, 0.4)], tmp_path / "c.safetensors")
    with pytest.raises(FormatError, match=r"known only beside the weight of its layer; give the base with --base"):
        combine([(a, 0.7), (b, 0.4)], tmp_path / "c.safetensors", to="full")
    base = base_of(tmp_path)
    combine([(a, 0.7), (b, 0.4)], tmp_path / "c.safetensors", to="full", base=base)
    assert_close(moved((tmp_path / "c.safetensors", 1.0)), wanted, TIGHT)
    report = combine([(a, 0.7), (b, 0.4)], tmp_path / "d.safetensors", to="lora", rank=4, base=base)
    found = moved((tmp_path / "d.safetensors", 1.0))
    assert {(row.after, row.rank) for row in report.rows} == {("LoRA", 4), ("LoRA", 2)}
    for row in report.rows:
        s = torch.linalg.svdvals(wanted[f"{row.layer}.weight"].flatten(1).double())
        assert row.error == pytest.approx(float(s[4:].norm() / s.norm()), rel=2e-3, abs=2e-6)
        assert distance(found, wanted, [f"{row.layer}.weight"]) == pytest.approx(row.error, rel=1e-3, abs=2e-6)
    assert report.error == pytest.approx(distance(found, wanted), rel=1e-3)


@pytest.mark.parametrize("method", ["svd", "linear"])
def test_a_sum_is_cut_down_in_its_factors(method: str, tmp_path: Path) -> None:
    a, b = two(tmp_path, LoRA(rank=4, alpha=2.0), LoHa(rank=2, alpha=3.0))
    options: dict[str, Any] = {"base": base_of(tmp_path), "rank": 3, "method": method}
    report = combine([(a, 0.7), (b, 0.4)], tmp_path / "c.safetensors", **options)
    wanted, found = moved((a, 0.7), (b, 0.4)), moved((tmp_path / "c.safetensors", 1.0))
    for row in report.rows:
        s = torch.linalg.svdvals(wanted[f"{row.layer}.weight"].flatten(1).double())
        assert row.rank == 3
        assert row.error == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-4)
        assert distance(found, wanted, [f"{row.layer}.weight"]) == pytest.approx(row.error, rel=1e-4)


def test_more_ranks_than_a_layer_has_are_none_too_many(tmp_path: Path) -> None:
    a, b = two(tmp_path, LoRA(rank=10, alpha=2.0), LoRA(rank=7, alpha=3.0))
    report = combine([a, b], tmp_path / "c.safetensors")
    assert {row.layer: row.rank for row in report.rows} == {
        "block.to_q": 12,
        "block.conv": 10,
        "block.point": 8,
        "block.ff": 16,
    }
    assert report.error == 0.0
    assert_close(moved((tmp_path / "c.safetensors", 1.0)), moved((a, 1.0), (b, 1.0)), 1e-5)


def test_what_cancels_is_said_to(tmp_path: Path) -> None:
    file = adapter_of(tmp_path / "a.safetensors", LoRA(rank=4))
    report = combine([(file, 0.5), (file, -0.5)], tmp_path / "c.safetensors", method="svd", rank=2)
    assert {row.note for row in report.rows} == {"they cancel: what is left is rounding"}
    assert report.worst == 0.0
    network = nerine.load(Model(), tmp_path / "c.safetensors")
    for _, _, adapter in network.adapters():
        weight = torch.zeros(adapter.site.shape)
        assert float(adapter.weight_deviation(adapter.params(), weight).detach().abs().max()) < 1e-5


def test_concat_fits_nothing_but_what_it_has_to(tmp_path: Path) -> None:
    a, b = two(tmp_path, LoRA(rank=3, alpha=2.0), LoRA(rank=3))
    c = adapter_of(tmp_path / "x.safetensors", Full(bias=False), "ff", seed=4)
    report = combine([a, b, c], tmp_path / "c.safetensors", to="lora", rank=4)
    assert {row.layer: (row.rank, row.method) for row in report.rows} == {
        "block.to_q": (6, "exact"),
        "block.conv": (6, "exact"),
        "block.point": (6, "exact"),
        "block.ff": (4, "fitted"),
    }


def test_three_files_and_the_difference_of_two(tmp_path: Path) -> None:
    a, b = two(tmp_path, LoRA(rank=2, alpha=1.0), LoRA(rank=3))
    c = adapter_of(tmp_path / "x.safetensors", LoHa(rank=2), [nn.Linear], seed=9)
    combine([(a, 0.2), (b, 0.3), (c, 0.4)], tmp_path / "c.safetensors")
    assert_close(moved((tmp_path / "c.safetensors", 1.0)), moved((a, 0.2), (b, 0.3), (c, 0.4)), TIGHT)
    combine([(a, 1.0), (b, 1.0), (b, -1.0)], tmp_path / "d.safetensors", method="svd", rank=2)
    assert distance(moved((tmp_path / "d.safetensors", 1.0)), moved((a, 1.0))) < 1e-5


# -- votes -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "dare", "dare_ties"])
def test_a_vote_is_one_on_the_changes_of_a_layer(method: str, tmp_path: Path) -> None:
    """Against the definition, entry by entry, on the changes that each makes by itself."""
    a, b = two(tmp_path, DoRA(LoRA(rank=2)), LoHa(rank=2, alpha=3.0))
    base = base_of(tmp_path)
    options: dict[str, Any] = {"method": method, "density": 0.3, "to": "full", "base": base, "seed": 3}
    combine([(a, 0.8), (b, 0.5)], tmp_path / "c.safetensors", **options)
    found = moved((tmp_path / "c.safetensors", 1.0))
    combine([(a, 0.8), (b, 0.5)], tmp_path / "d.safetensors", **options)
    assert_close(moved((tmp_path / "d.safetensors", 1.0)), found, 1e-9)
    one, other = moved((a, 1.0)), moved((b, 1.0))
    for key, t in found.items():
        if method in ("ties", "magnitude_prune"):
            assert float((t - by_hand(method, one[key], other[key])).abs().max()) < 1e-5 * float(t.abs().max())
        else:
            share = float((t != 0).float().mean())
            assert abs(share - (1 - 0.7**2)) < 0.15  # either of the two was drawn
    if method.startswith("dare"):
        combine([(a, 0.8), (b, 0.5)], tmp_path / "e.safetensors", **{**options, "seed": 4})
        assert distance(moved((tmp_path / "e.safetensors", 1.0)), found) > 0.1


def by_hand(method: str, one: Tensor, other: Tensor) -> Tensor:
    """TIES and pruning at density 0.3 and weights 0.8 and 0.5, one entry at a time."""
    pruned = []
    for change in (one, other):
        sizes = sorted(change.abs().flatten().tolist(), reverse=True)
        least = sizes[int(0.3 * len(sizes)) - 1]
        pruned.append([x if abs(x) >= least else 0.0 for x in change.flatten().tolist()])
    found = []
    for x, y in zip(*pruned, strict=True):
        if method == "magnitude_prune":
            found.append(0.8 * x + 0.5 * y)
            continue
        sign = 1 if x + y >= 0 else -1
        agree = [w * v for w, v in ((0.8, x), (0.5, y)) if v * sign > 0]
        found.append(sum(agree) / max(1, len(agree)))
    return torch.tensor(found).reshape(one.shape)


def test_dare_keeps_the_sum_on_average(tmp_path: Path) -> None:
    a, b = two(tmp_path, LoRA(rank=2), LoRA(rank=3), [nn.Linear], [nn.Linear])
    total: dict[str, Tensor] = {}
    for seed in range(40):
        combine([a, b], tmp_path / "c.safetensors", method="dare", to="full", density=0.8, seed=seed, force=True)
        for key, t in moved((tmp_path / "c.safetensors", 1.0)).items():
            total[key] = total.get(key, 0) + t / 40
    wanted = moved((a, 1.0), (b, 1.0))
    # entries have the variance (1/0.8 - 1)·x² each, a fortieth of it in the mean: a share of 0.08 is expected
    assert distance(total, wanted) < 0.12


def test_a_vote_becomes_a_lora_of_a_rank(tmp_path: Path) -> None:
    a, b = two(tmp_path, LoRA(rank=2), LoRA(rank=3))
    full = combine([a, b], tmp_path / "c.safetensors", method="ties", to="full")
    report = combine([a, b], tmp_path / "d.safetensors", method="ties", rank=4)
    wanted, found = moved((tmp_path / "c.safetensors", 1.0)), moved((tmp_path / "d.safetensors", 1.0))
    for row in report.rows:
        s = torch.linalg.svdvals(wanted[f"{row.layer}.weight"].flatten(1).double())
        assert row.error == pytest.approx(float(s[4:].norm() / s.norm()), rel=2e-3)
    assert report.error == pytest.approx(distance(found, wanted), rel=2e-3)
    assert {row.method for row in full.rows} == {"exact"}


# -- which layer is which ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("based", [False, True], ids=["alone", "beside the base"])
@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "comfy", "peft", "onetrainer"])
def test_files_of_different_programs(dialect: str, based: bool, tmp_path: Path) -> None:
    a = adapter_of(tmp_path / "a.safetensors", LoRA(rank=2, alpha=1.0))
    b = adapter_of(tmp_path / ("b" if dialect == "peft" else "b.safetensors"), LoRA(rank=3), seed=2, dialect=dialect)
    base = base_of(tmp_path) if based else None
    for first, second, out in ((a, b, "lycoris"), (b, a, dialect)):
        target = tmp_path / f"c-{out}{'' if out == 'peft' else '.safetensors'}"
        report = combine([(first, 0.7), (second, 0.4)], target, base=base, force=True)
        assert report.written.dialect == out
        assert {row.files for row in report.rows} == {(0, 1)}
        assert_close(moved((target, 1.0)), moved((first, 0.7), (second, 0.4)), TIGHT)


def test_names_of_two_implementations_without_a_base(tmp_path: Path) -> None:
    """Layers of SD 1.5 under diffusers' names and under the original ones: looked up in the first file."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'nerine[train]'")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel()
    shapes = {path: m.weight.shape for path, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    native = {
        alias.own: alias.name
        for alias in aliases({path: tuple(shape) for path, shape in shapes.items()})["native"]
        if alias.rows is None and alias.own_rows is None
    }
    generator = torch.Generator().manual_seed(0)

    def write(file: Path, names: dict[str, str]) -> None:
        tensors = {}
        for own, name in names.items():
            out, inputs, *kernel = shapes[own]
            stem = f"unet.{name}" if name == own else f"diffusion_model.{name}"
            tensors[f"{stem}.lora_down.weight"] = torch.randn(1, inputs, *kernel, generator=generator)
            tensors[f"{stem}.lora_up.weight"] = torch.randn(out, 1, *[1] * len(kernel), generator=generator)
        write_file(file, tensors, {})

    write(tmp_path / "a.safetensors", {own: own for own in native})
    write(tmp_path / "b.safetensors", native)
    report = combine([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tmp_path / "c.safetensors")
    assert len(report.rows) == len(native)
    assert {row.files for row in report.rows} == {(0, 1)}
    assert {row.rank for row in report.rows} == {2}


def flux() -> nn.Module:
    """A transformer whose query, key and value are layers of their own here and one in the original."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'nerine[train]'")
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=6,
        axes_dims_rope=(2, 1, 1),
    )


def test_layers_that_are_one_in_one_file_and_several_in_another(tmp_path: Path) -> None:
    """The base settles which rows are which layer; without it they are not guessed."""
    files = []
    for number, dialect in enumerate(("kohya", "diffusers")):
        network = stirred(nerine.attach(flux(), LoRA(rank=2, alpha=1.0), targets=["to_q", "to_k", "ff"]), number)
        files.append(tmp_path / f"{dialect}.safetensors")
        nerine.save(network, files[-1], dialect=dialect)
    write_file(tmp_path / "base.safetensors", {k: t.detach() for k, t in flux().state_dict().items()}, {})
    with pytest.raises(FormatError, match=r"has no layer in common .*give the base, which settles what is what"):
        combine([files[1], files[0]], tmp_path / "c.safetensors")
    for dialect in ("kohya", "diffusers"):  # enough of them to tell the family by
        network = stirred(nerine.attach(flux(), LoRA(rank=1)))
        nerine.save(network, tmp_path / f"all-{dialect}.safetensors", dialect=dialect)
    with pytest.raises(FormatError, match="is one layer here and several in the first file"):
        combine([tmp_path / f"all-{d}.safetensors" for d in ("diffusers", "kohya")], tmp_path / "c.safetensors")
    for first, second in ((files[0], files[1]), (files[1], files[0])):
        combine(
            [(first, 0.7), (second, 0.4)], tmp_path / "c.safetensors", base=tmp_path / "base.safetensors", force=True
        )
        one, both = flux(), flux()
        nerine.load(one, tmp_path / "c.safetensors", strict=True).merge()
        nerine.load(both, first, strength=0.7, name="a", strict=True)
        nerine.load(both, second, strength=0.4, name="b", strict=True)
        nerine.Network.of(both).merge()
        for (key, found), wanted, before in zip(
            _plain(one).items(), _plain(both).values(), flux().state_dict().values(), strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5, msg=key)
            moves = any(word in key for word in ("to_q.weight", "to_k.weight", "ff.net.2.weight"))
            assert not moves or float((found - before).abs().max()) > 1e-2


def _plain(model: nn.Module) -> dict[str, Tensor]:
    return {key: t for key, t in model.state_dict().items() if ".nerine" not in key}


def test_a_file_that_shows_a_kernel_tells_it_to_one_that_hides_it(tmp_path: Path) -> None:
    a, b = two(tmp_path, LoHa(rank=2), LoRA(rank=2), "conv", "conv")
    with pytest.raises(FormatError, match="the kernel of this convolution"):
        combine([a, a], tmp_path / "c.safetensors")
    combine([(a, 0.7), (b, 0.4)], tmp_path / "c.safetensors")
    assert_close(moved((tmp_path / "c.safetensors", 1.0)), moved((a, 0.7), (b, 0.4)), TIGHT)


def test_files_for_different_models(tmp_path: Path) -> None:
    a = adapter_of(tmp_path / "a.safetensors", LoRA(rank=2), "to_q")
    model = nn.ModuleDict({"block": nn.ModuleDict({"to_q": nn.Linear(10, 18)})})
    nerine.save(stirred(nerine.attach(model, LoRA(rank=2))), tmp_path / "b.safetensors")
    with pytest.raises(FormatError, match=r"block\.to_q: \(18, 12\) in .*a\.safetensors and \(18, 10\) in"):
        combine([a, tmp_path / "b.safetensors"], tmp_path / "c.safetensors")


# -- strengths ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("based", [False, True], ids=["alone", "beside the base"])
def test_strengths_by_pattern(based: bool, tmp_path: Path) -> None:
    a, b = two(tmp_path, LoRA(rank=2, alpha=1.0), LoRA(rank=3))
    strength = {"block": 0.5, "to_q": 0.0, "re:.*conv": -1.0}
    report = combine([(a, strength), (b, 0.4)], tmp_path / "c.safetensors", base=base_of(tmp_path) if based else None)
    assert_close(moved((tmp_path / "c.safetensors", 1.0)), moved((a, strength), (b, 0.4)), TIGHT)
    assert report.strengths == (strength, 0.4)
    with pytest.raises(TargetError, match="no adapted layer matches 'to_k'"):
        combine([(a, {"to_k": 1.0})], tmp_path / "d.safetensors")


def test_parts_of_a_pipeline_by_their_names(tmp_path: Path) -> None:
    """ "unet" is what people call what a kohya file knows as lora_unet_."""
    parts = nn.ModuleDict({"unet": Model(), "text_encoder": nn.ModuleDict({"proj": nn.Linear(6, 9)})})
    nerine.save(stirred(nerine.attach(parts, LoRA(rank=2))), tmp_path / "a.safetensors", dialect="kohya")
    strength = {"unet": 0.5, "text_encoder": 0.0}
    report = combine([(tmp_path / "a.safetensors", strength)], tmp_path / "c.safetensors")
    assert {row.layer: row.method for row in report.rows}["text_encoder.proj"] == "dropped"
    with open_file(tmp_path / "a.safetensors") as old, open_file(tmp_path / "c.safetensors") as new:
        assert {key for key in old.keys if key.startswith("lora_unet_")} == set(new.keys)
        for key in (key for key in new.keys if "lora_up" in key):
            torch.testing.assert_close(new.read(key), 0.5 * old.read(key))
    with pytest.raises(OptionError, match="every layer has the strength 0"):
        combine([(tmp_path / "a.safetensors", 0.0)], tmp_path / "d.safetensors")
    with pytest.raises(OptionError, match="for which the base is needed"):
        combine([(tmp_path / "a.safetensors", {"type:Linear": 1.0})], tmp_path / "d.safetensors")


# -- what goes with it -------------------------------------------------------------------------------------------------
def test_what_the_header_says(tmp_path: Path) -> None:
    files = []
    for number in range(2):
        network = stirred(nerine.attach(Model(), LoRA(rank=2), targets="to_q"), number)
        told = {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": str(bool(number)), "ss_tag_frequency": "secret"}
        files.append(tmp_path / f"{number}.safetensors")
        nerine.save(network, files[-1], dialect="kohya", metadata=told)
    report = combine([(files[0], 0.7), (files[1], 0.25)], tmp_path / "c.safetensors", metadata={"mine": "too"})
    with open_file(tmp_path / "c.safetensors") as source:
        told = dict(source.metadata)
    assert told["ss_base_model_version"] == "sdxl_base_v1-0"
    assert told["modelspec.merged_from"] == "0.safetensors at 0.7, 1.safetensors at 0.25"
    assert (told["ss_network_dim"], told["mine"]) == ("4", "too")
    assert not {"ss_v2", "ss_tag_frequency"} & set(told)
    assert "the metadata of training was left out" in str(report)


def test_embeddings_are_kept_and_must_not_differ(tmp_path: Path) -> None:
    vectors = {"cat": torch.ones(2, 8), "dog": torch.zeros(1, 8)}
    files = []
    for number, words in enumerate((["cat"], ["cat", "dog"], ["dog"])):
        file = adapter_of(tmp_path / f"{number}.safetensors", LoRA(rank=2), "to_q", seed=number)
        with open_file(file) as source:
            tensors = {key: source.read(key) for key in source.keys}
        own = {f"bundle_emb.{word}.clip_l": vectors[word] + (number == 2) for word in words}
        write_file(file, {**tensors, **own}, {})
        files.append(file)
    combine(files[:2], tmp_path / "c.safetensors")
    found = embeddings(tmp_path / "c.safetensors")
    assert found.keys() == {"cat", "dog"}
    assert torch.equal(found["cat"]["clip_l"], vectors["cat"])
    with pytest.raises(FormatError, match="another embedding for dog than a file before it"):
        combine(files, tmp_path / "d.safetensors")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "tie"}, "Did you mean 'ties'"),
        ({"method": "svd"}, "svd cuts down to a rank"),
        ({"rank": 4}, "concat keeps all ranks"),
        ({"method": "ties"}, "gives no low-rank product; give a rank, or to='full'"),
        ({"method": "ties", "to": "full", "density": 0.0}, "density is a share"),
        ({"method": "ties", "to": "full", "sign": "all"}, "sign is total or frequency"),
        ({"to": "loha"}, "is lora or full"),
        ({"to": "full", "rank": 3}, "a full difference has no rank"),
        ({"method": "svd", "rank": 0}, "rank must be a whole number"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    a, b = two(tmp_path, LoRA(rank=2), LoRA(rank=2), "to_q", "to_q")
    with pytest.raises(OptionError, match=words):
        combine([a, b], tmp_path / "c.safetensors", **options)
    assert not (tmp_path / "c.safetensors").exists()


def test_a_dry_run_and_progress(tmp_path: Path) -> None:
    a, b = two(tmp_path, LoRA(rank=2), LoHa(rank=2), [nn.Linear], [nn.Linear])
    seen: list[tuple[int, int, str]] = []
    dry = combine([a, (b, 0.5)], tmp_path / "c.safetensors", dry_run=True, progress=lambda *step: seen.append(step))
    assert not (tmp_path / "c.safetensors").exists()
    real = combine([a, (b, 0.5)], tmp_path / "c.safetensors")
    assert dry.rows == real.rows
    assert dry.written.bytes == real.written.bytes == (tmp_path / "c.safetensors").stat().st_size
    assert seen == [(0, 2, "block.ff"), (1, 2, "block.to_q"), (2, 2, "")]
    with pytest.raises(OptionError, match="this is what is read"):
        combine([a, b], b, force=True)
