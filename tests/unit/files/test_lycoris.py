"""The LyCORIS dialect: exactly its names and shapes when writing, patience with its relatives when reading."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import nerine
from nerine import DoRA, FormatError, LoHa, LoKr, LoRA, NerineError, ShapeError

CONV, LINEAR, SQUARE, POINT = "conv", "block.lin_ear", "block.square", "point"


def model_of() -> nn.ModuleDict:
    torch.manual_seed(3)
    return nn.ModuleDict(
        {
            "conv": nn.Conv2d(4, 6, (3, 2)),
            "block": nn.ModuleDict({"lin_ear": nn.Linear(8, 6), "square": nn.Linear(5, 5)}),
            "point": nn.Conv2d(4, 6, 1),
        }
    )


def lora_file(layer: str, rank: int = 2, **extra: Tensor) -> dict[str, Tensor]:
    """A LoRA for one layer of the model, as LyCORIS writes it."""
    out, inputs, *kernel = model_of().get_submodule(layer).weight.shape
    stem = "lycoris_" + layer.replace(".", "_")
    tensors = {
        "lora_down.weight": torch.randn(rank, inputs, *kernel),
        "lora_up.weight": torch.randn(out, rank, *[1] * len(kernel)),
        "alpha": torch.tensor(1.0),
        **extra,
    }
    return {f"{stem}.{key}": t for key, t in tensors.items()}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
        path = tmp_path / "other.safetensors"
        safetensors.torch.save_file({k: t.contiguous() for k, t in tensors.items()}, path, dict(metadata or {}))
        return path

    return write


@contextmanager
def untouched(model: nn.Module, refusing: bool = False) -> Iterator[None]:
    """`model` is as it was afterwards; with `refusing`, where the library raised an error, and only then it matters."""
    before = {k: t.clone() for k, t in model.state_dict().items()}
    try:
        yield
    except NerineError:
        if not refusing:
            raise
    else:
        if refusing:
            return
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[k]) for k, t in before.items())
    assert all(p.requires_grad for p in model.parameters())
    assert all("forward" not in m.__dict__ for m in model.modules())


def delta(model: nn.Module, layer: str) -> Tensor:
    """W' - W of the only adapter at `layer`, as merging has it."""
    module = model.get_submodule(layer)
    before = module.weight.detach().double()
    nerine.Network.of(model).merge()
    return module.weight.detach().double() - before


def stir(network: nerine.Network) -> nerine.Network:
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return network


# -- writing ---------------------------------------------------------------------------------------------------------
WRITTEN = [
    (LoRA(rank=2), CONV, {"lora_down.weight": (2, 4, 3, 2), "lora_up.weight": (6, 2, 1, 1)}),
    (
        LoRA(rank=2, tucker=True),
        CONV,
        {"lora_down.weight": (2, 4, 1, 1), "lora_mid.weight": (2, 2, 3, 2), "lora_up.weight": (6, 2, 1, 1)},
    ),
    (LoRA(rank=2), LINEAR, {"lora_down.weight": (2, 8), "lora_up.weight": (6, 2)}),
    (
        LoHa(rank=2),
        CONV,
        {"hada_w1_a": (6, 2), "hada_w1_b": (2, 24), "hada_w2_a": (6, 2), "hada_w2_b": (2, 24)},
    ),
    (
        LoHa(rank=2, tucker=True),
        CONV,
        {
            "hada_t1": (2, 2, 3, 2),
            "hada_w1_a": (2, 6),
            "hada_w1_b": (2, 4),
            "hada_t2": (2, 2, 3, 2),
            "hada_w2_a": (2, 6),
            "hada_w2_b": (2, 4),
        },
    ),
    (LoKr(rank=1), LINEAR, {"lokr_w1": (2, 2), "lokr_w2_a": (3, 1), "lokr_w2_b": (1, 4)}),
    (LoKr(full_matrix=True), CONV, {"lokr_w1": (2, 2), "lokr_w2": (3, 2, 3, 2)}),
    (
        LoKr(rank=1, tucker=True),
        CONV,
        {"lokr_w1": (2, 2), "lokr_t2": (1, 1, 3, 2), "lokr_w2_a": (1, 3), "lokr_w2_b": (1, 2)},
    ),
    (
        LoKr(rank=1, decompose_both=True, unbalanced=True),
        LINEAR,
        {"lokr_w1_a": (3, 1), "lokr_w1_b": (1, 2), "lokr_w2_a": (2, 1), "lokr_w2_b": (1, 4)},
    ),
    (DoRA(LoRA(rank=2)), LINEAR, {"lora_down.weight": (2, 8), "lora_up.weight": (6, 2), "dora_scale": (6, 1)}),
    (
        DoRA(LoRA(rank=2), axis="in"),
        CONV,
        {"lora_down.weight": (2, 4, 3, 2), "lora_up.weight": (6, 2, 1, 1), "dora_scale": (1, 4, 1, 1)},
    ),
]


@pytest.mark.parametrize(
    ("algorithm", "layer", "shapes"), WRITTEN, ids=lambda v: str(v) if not isinstance(v, dict) else ""
)
def test_written_keys_and_shapes(algorithm: Any, layer: str, shapes: dict[str, Any], tmp_path: Path) -> None:
    network = nerine.attach(model_of(), algorithm, targets=layer)
    nerine.save(network, tmp_path / "a.safetensors")
    found = safetensors.torch.load_file(tmp_path / "a.safetensors")
    stem = f"lycoris_{layer.replace('.', '_')}"
    want = {f"{stem}.{key}": shape for key, shape in shapes.items()} | {f"{stem}.alpha": ()}
    assert {k: tuple(t.shape) for k, t in found.items()} == want
    assert all(t.dtype == torch.float32 for t in found.values())


@pytest.mark.parametrize(
    ("algorithm", "alpha"),
    [
        (LoRA(rank=4, alpha=3.0), 3.0),
        (LoRA(rank=4, alpha=3.0, rs=True), 6.0),
        (LoHa(rank=4, alpha=0.5), 0.5),
        (LoKr(rank=1, alpha=0.25), 0.25),
        (LoKr(full_matrix=True), 1.0),
    ],
    ids=str,
)
def test_alpha_over_rank_is_the_scale_for_every_reader(algorithm: Any, alpha: float, tmp_path: Path) -> None:
    nerine.save(nerine.attach(model_of(), algorithm, targets=LINEAR), tmp_path / "a.safetensors", dtype=torch.bfloat16)
    found = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert found["lycoris_block_lin_ear.alpha"].dtype == torch.float32
    assert found["lycoris_block_lin_ear.alpha"].item() == alpha


def test_zero_magnitudes_are_written_as_what_they_stand_for(tmp_path: Path) -> None:
    """Rows of a zero-initialised layer: other readers have no rule for them, and need none."""
    model = model_of()
    with torch.no_grad():
        model["block"]["lin_ear"].weight[2] = 0
    network = stir(nerine.attach(model, DoRA(LoRA(rank=2)), targets=LINEAR))
    with torch.no_grad():
        magnitude = network.state_dict()[f"{LINEAR}.magnitude"]
        magnitude[2] = 0
    layer = model["block"]["lin_ear"]
    x = torch.randn(3, 8)
    want = layer(x)
    nerine.save(network, tmp_path / "a.safetensors")
    assert magnitude[2] == 0, "saving changed the adapter"
    written = safetensors.torch.load_file(tmp_path / "a.safetensors")["lycoris_block_lin_ear.dora_scale"]
    assert (written > 0).all()
    network.detach()
    nerine.load(model, tmp_path / "a.safetensors")
    torch.testing.assert_close(layer(x), want)


# -- reading what others write ---------------------------------------------------------------------------------------
ALPHAS = [
    ("missing", None, 1.0, "no alpha in the file"),
    ("zero", torch.tensor(0.0), 1.0, "alpha is 0 in the file"),
    ("int", torch.tensor(1), 0.5, ""),
    ("one axis", torch.tensor([1.0]), 0.5, ""),
    ("half", torch.tensor(1.0, dtype=torch.float16), 0.5, ""),
    ("bf16, one axis", torch.tensor([3.0], dtype=torch.bfloat16), 1.5, ""),
    ("negative", torch.tensor(-1.0), -0.5, ""),
]


@pytest.mark.parametrize(("name", "alpha", "scale", "note"), ALPHAS, ids=lambda v: v if isinstance(v, str) else "")
def test_alpha(write: Callable[..., Path], name: str, alpha: Tensor | None, scale: float, note: str) -> None:
    tensors = lora_file(LINEAR)
    del tensors["lycoris_block_lin_ear.alpha"]
    if alpha is not None:
        tensors["lycoris_block_lin_ear.alpha"] = alpha
    model = model_of()
    network = nerine.load(model, write(tensors))
    (row,) = network.report.rows
    assert (row.layer, row.algorithm, row.rank, row.scale) == (LINEAR, "LoRA", 2, scale)
    assert row.note.startswith(note)
    assert bool(row.note) == bool(note)
    want = scale * tensors["lycoris_block_lin_ear.lora_up.weight"] @ tensors["lycoris_block_lin_ear.lora_down.weight"]
    torch.testing.assert_close(delta(model, LINEAR), want.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [torch.tensor([1.0, 2.0]), torch.ones(0)])
def test_alpha_is_one_number(write: Callable[..., Path], alpha: Tensor) -> None:
    with untouched(model := model_of()), pytest.raises(ShapeError, match=r"lin_ear\.alpha: expected a single number"):
        nerine.load(model, write(lora_file(LINEAR, alpha=alpha)))


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_alpha_is_finite(write: Callable[..., Path], alpha: float) -> None:
    with untouched(model := model_of()), pytest.raises(FormatError, match="the file is damaged"):
        nerine.load(model, write(lora_file(LINEAR, alpha=torch.tensor(alpha))))


def test_a_kronecker_product_of_full_factors_ignores_alpha(write: Callable[..., Path]) -> None:
    """Some programs write a huge alpha there."""
    w1, w2 = torch.randn(2, 2), torch.randn(3, 4)
    stem = "lycoris_block_lin_ear"
    model = model_of()
    nerine.load(model, write({f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2, f"{stem}.alpha": torch.tensor(1e10)}))
    torch.testing.assert_close(delta(model, LINEAR), torch.kron(w1, w2).double(), rtol=1e-4, atol=1e-5)


FORMS = {
    "2-D up for a convolution": (CONV, {"lora_up.weight": (6, 2)}),
    "2-D up and down for 1x1": (POINT, {"lora_up.weight": (6, 2), "lora_down.weight": (2, 4)}),
    "trailing ones for a linear layer": (LINEAR, {"lora_up.weight": (6, 2, 1, 1), "lora_down.weight": (2, 8, 1, 1)}),
    "one trailing one": (LINEAR, {"lora_up.weight": (6, 2, 1)}),
    "1-D magnitude": (LINEAR, {"dora_scale": (6,)}),
    "1-D magnitude of the inputs": (LINEAR, {"dora_scale": (8,)}),
    "1-D magnitude of a convolution": (CONV, {"dora_scale": (6,)}),
    "2-D magnitude of a convolution": (CONV, {"dora_scale": (6, 1)}),
    "a magnitude with too many ones": (LINEAR, {"dora_scale": (6, 1, 1, 1)}),
    "a row of magnitudes with too many ones": (LINEAR, {"dora_scale": (1, 8, 1, 1)}),
}


@pytest.mark.parametrize("name", FORMS)
def test_other_forms_of_the_same(write: Callable[..., Path], name: str) -> None:
    layer, shapes = FORMS[name]
    stem = "lycoris_" + layer.replace(".", "_")
    tensors = lora_file(layer)
    if "dora_scale" in shapes:
        tensors[f"{stem}.dora_scale"] = torch.rand(shapes["dora_scale"]) + 1
    plain = model_of()
    reference = nerine.load(plain, write(tensors)) if "dora_scale" not in shapes else None
    for key, shape in shapes.items():
        tensors[f"{stem}.{key}"] = tensors[f"{stem}.{key}"].reshape(shape)
    model = model_of()
    network = nerine.load(model, write(tensors))
    if reference is not None:
        assert torch.equal(delta(model, layer), delta(plain, layer))
        return
    ((_, _, adapter),) = network.adapters()
    weight = model.get_submodule(layer).weight
    out = 6 in shapes["dora_scale"]
    assert adapter.algorithm.axis == ("out" if out else "in")
    size = 6 if out else weight.shape[1]
    ones = [1] * (weight.dim() - 2)
    assert tuple(adapter.magnitude.shape) == ((size, 1, *ones) if out else (1, size, *ones))
    assert torch.equal(adapter.magnitude.flatten(), tensors[f"{stem}.dora_scale"].flatten())


@pytest.mark.parametrize(
    ("shape", "axis", "note"),
    [
        ((5,), "out", "1-D dora_scale on a square layer"),
        ((5, 1), "out", ""),
        ((1, 5), "in", ""),
        ((5, 1, 1, 1), "out", ""),
    ],
)
def test_magnitudes_of_a_square_layer(write: Callable[..., Path], shape: Any, axis: str, note: str) -> None:
    network = nerine.load(model_of(), write(lora_file(SQUARE, dora_scale=torch.rand(shape) + 1)))
    ((_, _, adapter),) = network.adapters()
    assert adapter.algorithm.axis == axis
    assert network.report.rows[0].note.startswith(note)
    assert bool(network.report.rows[0].note) == bool(note)


def test_our_own_metadata_tells_the_axis_of_a_square_layer(tmp_path: Path, write: Callable[..., Path]) -> None:
    network = stir(nerine.attach(model_of(), DoRA(LoRA(rank=2), axis="in"), targets=SQUARE))
    nerine.save(network, tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as handle:
        metadata = handle.metadata()
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    tensors["lycoris_block_square.dora_scale"] = tensors["lycoris_block_square.dora_scale"].flatten()
    network = nerine.load(model_of(), write(tensors, metadata))
    ((_, _, adapter),) = network.adapters()
    assert str(adapter.algorithm) == "DoRA(LoRA(rank=2), axis='in')"


@pytest.mark.parametrize("shape", [(7,), (7, 1), (1, 7), (2, 3, 2)])
def test_a_magnitude_of_another_layer(write: Callable[..., Path], shape: Any) -> None:
    with (
        untouched(model := model_of()),
        pytest.raises(ShapeError, match=r"lin_ear\.dora_scale: expected \(6, 1, \.\.\.\) for output rows"),
    ):
        nerine.load(model, write(lora_file(LINEAR, dora_scale=torch.ones(shape))))


@pytest.mark.parametrize("shape", [(2, 8, 1, 3), (2, 7), (8, 2), (2,), (), (2, 8, 2)])
def test_a_wrong_shape_names_key_and_axis(write: Callable[..., Path], shape: Any) -> None:
    tensors = lora_file(LINEAR)
    tensors["lycoris_block_lin_ear.lora_down.weight"] = torch.ones(shape)
    with untouched(model := model_of()), pytest.raises(ShapeError, match=r"block\.lin_ear\.lora_(down|up)\.weight: "):
        nerine.load(model, write(tensors))


def test_ranks_that_disagree(write: Callable[..., Path]) -> None:
    tensors = lora_file(LINEAR, rank=2)
    tensors["lycoris_block_lin_ear.lora_up.weight"] = torch.ones(6, 3)
    with pytest.raises(
        ShapeError,
        match=r"block\.lin_ear\.lora_up\.weight: axis 'rank' is 3 here but 2 in lora_down\.weight "
        r"\(expected 'out rank \*1', got \(6, 3\)\)",
    ):
        nerine.load(model_of(), write(tensors))


def test_one_bad_layer_of_many_leaves_the_model_untouched(write: Callable[..., Path]) -> None:
    tensors = lora_file(CONV) | lora_file(LINEAR) | lora_file(POINT)
    tensors["lycoris_point.lora_up.weight"] = torch.ones(5, 2, 1, 1)
    with untouched(model := model_of()), pytest.raises(ShapeError):
        nerine.load(model, write(tensors))


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        ("lora_up.weight", "the closest is lora, which also has lora_up.weight"),
        ("lora_down.weight", "which also has lora_down"),
    ],
)
def test_incomplete_sets(write: Callable[..., Path], lacking: str, words: str) -> None:
    tensors = lora_file(LINEAR)
    del tensors[f"lycoris_block_lin_ear.{lacking}"]
    with (
        untouched(model := model_of()),
        pytest.raises(FormatError, match=rf"block\.lin_ear has .*no complete .*{words}"),
    ):
        nerine.load(model, write(tensors))


def test_alpha_alone_is_no_adapter(write: Callable[..., Path]) -> None:
    with pytest.raises(FormatError, match="has no tensors, which is no complete adapter"):
        nerine.load(model_of(), write({"lycoris_block_lin_ear.alpha": torch.tensor(1.0)}))


def test_two_algorithms_on_one_layer(write: Callable[..., Path]) -> None:
    extra = {"hada_w1_a": torch.ones(6, 2)}
    with pytest.raises(FormatError, match="which has no hada_w1_a"):
        nerine.load(model_of(), write(lora_file(LINEAR, **extra)))


def test_unknown_suffixes_and_layers_are_reported(write: Callable[..., Path]) -> None:
    tensors = lora_file(LINEAR, bias_values=torch.ones(3)) | {
        "lycoris_block_other.lora_up.weight": torch.ones(2, 2),
        "emb_params": torch.ones(2),
        "lora_unet_x.lora_up.weight": torch.ones(2, 2),
    }
    network = nerine.load(model_of(), path := write(tensors))
    assert network.report.unmatched == {
        "emb_params": "no known algorithm has such a tensor",
        "lora_unet_x.lora_up.weight": "not a name in the lycoris dialect",
        "lycoris_block_lin_ear.bias_values": (
            "a sparse part is bias_indices, bias_values, bias_size, and not all are there"
        ),
        "lycoris_block_other.lora_up.weight": "the model has no layer block_other",
    }
    assert "not used: emb_params" in str(network.report)
    with (
        untouched(model := model_of()),
        pytest.raises(FormatError, match="4 keys were not used and 0 layers are missing"),
    ):
        nerine.load(model, path, strict=True)


def test_the_file_of_another_model(write: Callable[..., Path]) -> None:
    with untouched(model := model_of()), pytest.raises(FormatError) as caught:
        nerine.load(model, write({"lycoris_down_blocks_0.lora_up.weight": torch.ones(2, 2)}))
    words = str(caught.value)
    assert "none of its 1 keys belongs to this model, so nothing was loaded" in words
    assert "In the file (lycoris): lycoris_down_blocks_0.lora_up.weight" in words
    assert "would be called lycoris_conv, " in words


def test_an_empty_file(write: Callable[..., Path]) -> None:
    with untouched(model := model_of()), pytest.raises(FormatError, match="no keys at all"):
        nerine.load(model, write({}, {"made": "by hand"}))


def test_broken_metadata_is_a_note_and_the_tensors_speak(write: Callable[..., Path]) -> None:
    network = nerine.load(model_of(), write(lora_file(LINEAR), {"nerine": "{broken"}))
    assert len(network) == 1
    assert "metadata cannot be read" in str(network.report)


def test_metadata_of_other_tensors_is_not_believed(tmp_path: Path, write: Callable[..., Path]) -> None:
    """The settings say LoKr, the tensors are LoRA."""
    nerine.save(nerine.attach(model_of(), LoKr(rank=1), targets=LINEAR), tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as handle:
        metadata = handle.metadata()
    network = nerine.load(model_of(), write(lora_file(LINEAR), metadata))
    ((_, _, adapter),) = network.adapters()
    assert isinstance(adapter.algorithm, LoRA)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int32, torch.bool], ids=str
)
def test_any_format_of_tensors_is_read_or_refused(write: Callable[..., Path], dtype: torch.dtype) -> None:
    tensors = {k: t.to(dtype) if "lora" in k else t for k, t in lora_file(LINEAR).items()}
    path = write(tensors)
    with untouched(model := model_of(), refusing=True):
        network = nerine.load(model, path)
        assert all(p.dtype == torch.float32 for p in network.parameters())


def test_a_rank_of_zero(write: Callable[..., Path]) -> None:
    with untouched(model := model_of()), pytest.raises(NerineError):
        nerine.load(model, write(lora_file(LINEAR, rank=0)))


# -- names -----------------------------------------------------------------------------------------------------------
def colliding() -> nn.ModuleDict:
    torch.manual_seed(3)
    return nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(4, 3)}), "a_b": nn.Linear(4, 3), "c": nn.Linear(4, 3)})


def test_two_layers_of_one_name_are_not_saved_over_each_other(tmp_path: Path) -> None:
    network = nerine.attach(colliding(), LoRA(rank=2))
    with pytest.raises(FormatError, match=r"the layers a\.b and a_b would both be called lycoris_a_b"):
        nerine.save(network, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_layers_of_one_name_do_not_stand_in_the_way_of_others(tmp_path: Path) -> None:
    """A file for `c` alone is as good as any, whatever its neighbours are called."""
    model = colliding()
    network = stir(nerine.attach(model, LoRA(rank=2), targets="c"))
    nerine.save(network, tmp_path / "a.safetensors")
    loaded = nerine.load(colliding(), tmp_path / "a.safetensors")
    assert [path for path, *_ in loaded.adapters()] == ["c"]


NAMES = st.sampled_from(["a", "b", "a_b", "a_", "_a", "b_a", "lora_up", "weight", "alpha"])
PATHS = st.lists(st.lists(NAMES, min_size=1, max_size=3).map(tuple), min_size=1, max_size=4, unique=True)


@settings(max_examples=50)
@given(PATHS)
def test_names_round_trip_or_are_refused(
    tmp_path_factory: pytest.TempPathFactory, paths: list[tuple[str, ...]]
) -> None:
    def build() -> nn.Module:
        root = nn.Module()
        for path in paths:
            parent = root
            for name in path[:-1]:
                if name not in parent._modules:
                    parent.add_module(name, nn.Module())
                parent = parent._modules[name]
            if path[-1] not in parent._modules:
                parent.add_module(path[-1], nn.Linear(3, 2))
        return root

    model = build()
    file = tmp_path_factory.getbasetemp() / "names.safetensors"
    network = stir(nerine.attach(model, LoRA(rank=1)))
    layers = [path for path, *_ in network.adapters()]
    flat = [path.replace(".", "_") for path in layers]
    if len(set(flat)) < len(flat):
        with pytest.raises(FormatError, match="would both be called"):
            nerine.save(network, file)
        return
    nerine.save(network, file)
    loaded = nerine.load(build(), file, strict=True)
    state = network.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[k]) for k, t in loaded.state_dict().items())


# -- any layer, any damage -------------------------------------------------------------------------------------------
@st.composite
def cases(draw: st.DrawFn) -> tuple[Callable[[], nn.Module], Any]:
    out, inputs, groups = draw(st.integers(1, 13)), draw(st.integers(1, 13)), draw(st.integers(1, 3))
    kernel = draw(st.lists(st.integers(1, 3), max_size=3))
    rank, alpha = draw(st.integers(1, 20)), draw(st.floats(0.01, 100))
    tucker = draw(st.booleans())
    algorithm = draw(
        st.sampled_from(
            [
                LoRA(rank=rank, alpha=alpha, tucker=tucker, scalar=draw(st.booleans()), rs=draw(st.booleans())),
                LoHa(rank=min(rank, 6), alpha=alpha, tucker=tucker),
                LoKr(
                    rank=rank,
                    alpha=alpha,
                    tucker=tucker,
                    factor=draw(st.sampled_from([-1, 2, 4])),
                    decompose_both=draw(st.booleans()),
                    unbalanced=draw(st.booleans()),
                ),
            ]
        )
    )
    algorithm = draw(st.sampled_from([algorithm, DoRA(algorithm), DoRA(algorithm, axis="in")]))
    if not kernel:
        return lambda: nn.Linear(inputs, out), algorithm
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1]
    return lambda: kind(inputs * groups, out * groups, tuple(kernel), groups=groups), algorithm


@settings(max_examples=80)
@given(cases())
def test_any_layer_round_trips(tmp_path_factory: pytest.TempPathFactory, case: Any) -> None:
    make, algorithm = case
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    first = nn.ModuleDict({"l": make()})
    network = stir(nerine.attach(first, algorithm))
    nerine.save(network, file)
    second = nn.ModuleDict({"l": make()})
    second["l"].load_state_dict({k: t for k, t in first["l"].state_dict().items() if "nerine" not in k})
    loaded = nerine.load(second, file, strict=True)
    ((_, _, a),), ((_, _, b),) = network.adapters(), loaded.adapters()
    assert str(b.algorithm) == str(algorithm)
    assert abs(a.scale - b.scale) <= 1e-7 * abs(a.scale)
    for name, tensor in a.folded().tensors.items():
        assert torch.equal(b.folded().tensors[name], tensor)
    network.merge()
    loaded.merge()
    torch.testing.assert_close(first["l"].weight, second["l"].weight, rtol=1e-5, atol=1e-6)


WHOLE = [DoRA(LoRA(rank=2)), LoHa(rank=2), DoRA(LoKr(rank=1, tucker=True), axis="in"), LoRA(rank=2, tucker=True)]
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn])


@functools.cache
def whole_file(which: int, folder: Path) -> bytes:
    nerine.save(nerine.attach(model_of(), WHOLE[which]), folder / "whole.safetensors")
    return (folder / "whole.safetensors").read_bytes()


@settings(max_examples=100)
@given(st.integers(0, len(WHOLE) - 1), st.data())
def test_damage_raises_nothing_but_our_own_errors(
    tmp_path_factory: pytest.TempPathFactory, which: int, data: st.DataObject
) -> None:
    """Tensors lost, renamed, reshaped, recast: a readable file with wrong content."""
    file = tmp_path_factory.getbasetemp() / f"damaged{which}.safetensors"
    file.write_bytes(whole_file(which, tmp_path_factory.getbasetemp()))
    tensors = safetensors.torch.load_file(file)
    with safetensors.safe_open(file, "pt") as handle:
        metadata = handle.metadata()
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(tensors)))
        act = data.draw(st.sampled_from(["drop", "rename", "reshape", "recast", "fill"]))
        tensor = tensors.pop(key) if act in ("drop", "rename") else tensors[key]
        if act == "rename":
            tensors[
                data.draw(st.sampled_from([key + "x", key.rpartition(".")[0] + ".alpha", "lycoris_conv.lokr_w1"]))
            ] = tensor
        elif act == "reshape":
            tensors[key] = torch.ones(data.draw(st.lists(st.integers(0, 6), max_size=5)))
        elif act == "recast":
            tensors[key] = tensor.to(data.draw(DTYPES))
        elif act == "fill":
            tensors[key] = torch.full_like(
                tensor.float(), data.draw(st.sampled_from([0.0, float("nan"), float("inf")]))
            )
        if not tensors:
            break
    safetensors.torch.save_file({k: t.contiguous() for k, t in tensors.items()}, file, metadata)
    with untouched(model := model_of(), refusing=True):
        nerine.load(model, file)


@settings(max_examples=100)
@given(st.data())
def test_flipped_bytes_raise_nothing_but_our_own_errors(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    file = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    content = bytearray(whole_file(0, tmp_path_factory.getbasetemp()))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 1500))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    with untouched(model := model_of(), refusing=True):
        nerine.load(model, file)
