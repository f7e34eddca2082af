"""The same tensors through LyCORIS 4.1.3's functional module: values and gradients to 1e-5 in fp32, for each kind of
layer; and every place where its numbers are wrong or there are none, with what ours are."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from nerine.errors import OptionError, ShapeError
from nerine.lycoris.functional import boft, diag_oft, general, locon, loha, lokr

pytest.importorskip("lycoris", reason="needs lycoris-lora: pip install 'nerine[peers]'")

theirs: Any = pytest.importorskip("lycoris.functional")
THEIRS = {
    name: pytest.importorskip(f"lycoris.functional.{name}")
    for name in ("boft", "diag_oft", "general", "locon", "loha", "lokr")
}
pytestmark = [pytest.mark.peers, pytest.mark.no_device_guard]

CLOSE = 1e-5
OUT, IN = 12, 8
KERNELS: dict[str, tuple[int, ...]] = {
    "linear": (),
    "conv1d": (3,),
    "conv2d": (3, 2),
    "conv3d": (2, 3, 2),
    "point": (1, 1),
}
GEOMETRY: dict[str, dict[str, Any]] = {
    "linear": {},
    "conv1d": {"stride": 2, "padding": 1},
    "conv2d": {"stride": (2, 1), "padding": (1, 0), "dilation": 2},
    "conv3d": {"padding": 1},
    "point": {},
}
SPACE = {"linear": (5,), "conv1d": (9,), "conv2d": (9, 8), "conv3d": (5, 6, 4), "point": (4, 3)}


def near(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    error = float(((got - want).norm() / want.norm().clamp_min(1e-30)).detach())
    assert error < CLOSE, f"{error:.1e}"


def weight_of(kind: str, out: int = OUT) -> Tensor:
    return torch.randn((out, IN, *KERNELS[kind]), generator=torch.Generator().manual_seed(3))


def input_of(kind: str) -> Tensor:
    shape = (2, *SPACE[kind], IN) if kind == "linear" else (2, IN, *SPACE[kind])
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def stirred(tensors: Any) -> list[Tensor | None]:
    """Random values of the same shapes, to train."""
    generator = torch.Generator().manual_seed(5)
    return [None if t is None else torch.randn(t.shape, generator=generator).requires_grad_() for t in tensors]


def both(
    ours: Callable[..., Tensor], other: Callable[..., Tensor], tensors: list[Tensor | None], *first: Any, **named: Any
) -> None:
    """Values and gradients of two functions of the same tensors."""
    results = []
    trained = [t for t in tensors if t is not None]
    for function in (ours, other):
        value = function(*first, *tensors, **named)
        along = torch.randn(value.shape, generator=torch.Generator().manual_seed(6))
        inputs = trained + [t for t in first if isinstance(t, Tensor) and t.requires_grad]
        results.append([value, *torch.autograd.grad((value * along).sum(), inputs)])
    for got, want in zip(*results, strict=True):
        near(got, want)


LOW_RANK = {"locon": locon, "loha": loha, "lokr": lokr}
FACTORS = {
    "plain": {"tucker": False},
    "tucker": {"tucker": True},
}
LOKR: dict[str, dict[str, Any]] = {
    "whole": {"rank": 100, "tucker": False},
    "w2 in parts": {"rank": 1, "tucker": False},
    "both in parts": {"rank": 1, "tucker": False, "decompose_both": True, "factor": 4},
    "unbalanced": {"rank": 2, "tucker": False, "factor": 2, "unbalanced_factorization": True},
}


def made(name: str, kind: str, **settings: Any) -> list[Tensor | None]:
    return stirred(LOW_RANK[name].weight_gen(weight_of(kind), settings.pop("rank", 3), **settings))


# -- LoCon and LoHa --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", FACTORS)
@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("name", ["locon", "loha"])
def test_low_rank_weights_and_their_gradients(name: str, kind: str, form: str) -> None:
    tensors = made(name, kind, **FACTORS[form])
    gamma = torch.tensor(0.7)  # LyCORIS's LoHa takes no plain number where something is trained
    both(LOW_RANK[name].diff_weight, THEIRS[name].diff_weight, tensors, gamma=gamma)
    assert LOW_RANK[name].diff_weight(*tensors).shape == weight_of(kind).shape


@pytest.mark.parametrize("form", FACTORS)
@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("name", ["locon", "loha"])
def test_low_rank_outputs_and_their_gradients(name: str, kind: str, form: str) -> None:
    tensors, x = made(name, kind, **FACTORS[form]), input_of(kind).requires_grad_()
    named = {"gamma": torch.tensor(0.7), "extra_args": GEOMETRY[kind]}
    both(LOW_RANK[name].bypass_forward_diff, THEIRS[name].bypass_forward_diff, tensors, x, None, **named)


@pytest.mark.parametrize("name", ["locon", "loha"])
def test_gamma_may_be_trained(name: str) -> None:
    tensors = made(name, "conv2d", tucker=True)
    gamma, x = torch.tensor(0.7, requires_grad=True), input_of("conv2d")
    changed = LOW_RANK[name].diff_weight(*tensors, gamma=gamma)
    outputs = LOW_RANK[name].bypass_forward_diff(x, None, *tensors, gamma=gamma)
    for value in (changed, outputs):
        (found,) = torch.autograd.grad(value.sum(), gamma, retain_graph=True)
        near(found, (value / gamma).sum().detach())


def test_lohas_gamma_may_be_a_number() -> None:
    """LyCORIS keeps gamma for the backward pass, and a number cannot be kept there."""
    tensors = made("loha", "linear")
    with pytest.raises(TypeError, match="save_for_backward"):
        THEIRS["loha"].diff_weight(*tensors, gamma=0.7)
    near(loha.diff_weight(*tensors, gamma=0.7), THEIRS["loha"].diff_weight(*tensors, gamma=torch.tensor(0.7)))


def test_lohas_two_makers() -> None:
    with torch.no_grad():
        w1d, w1u, w2d, w2u, *_ = made("loha", "linear")
        near(
            loha.make_weight(w1d, w1u, w2d, w2u, 0.7), THEIRS["loha"].make_weight(w1d, w1u, w2d, w2u, torch.tensor(0.7))
        )
        w1d, w1u, w2d, w2u, t1, t2 = made("loha", "conv2d", tucker=True)
        arguments = (t1, w1d, w1u, t2, w2d, w2u)
        near(loha.make_weight_tucker(*arguments, 0.7), THEIRS["loha"].make_weight_tucker(*arguments, torch.tensor(0.7)))


# -- LoKr ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", LOKR)
@pytest.mark.parametrize("kind", KERNELS)
def test_kronecker_weights_and_their_gradients(kind: str, form: str) -> None:
    tensors = made("lokr", kind, **LOKR[form])
    both(lokr.diff_weight, THEIRS["lokr"].diff_weight, tensors, gamma=0.7)
    both(lokr.kron_weight, THEIRS["lokr"].kron_weight, tensors, scale=0.7)
    assert lokr.diff_weight(*tensors).shape == weight_of(kind).shape


@pytest.mark.parametrize("form", LOKR)
@pytest.mark.parametrize("kind", KERNELS)
def test_kronecker_outputs_and_their_gradients(kind: str, form: str) -> None:
    tensors, x = made("lokr", kind, **LOKR[form]), input_of(kind).requires_grad_()
    named = {"gamma": 0.7, "extra_args": GEOMETRY[kind]}
    both(lokr.bypass_forward_diff, THEIRS["lokr"].bypass_forward_diff, tensors, x, None, **named)
    named = {"scale": 0.7, "extra_args": GEOMETRY[kind]}
    both(lokr.kron_bypass, THEIRS["lokr"].kron_bypass, tensors, x, **named)


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "conv3d"])
def test_a_tucker_core_has_one_rank_on_both_faces(kind: str) -> None:
    """LyCORIS divides by the outputs of w2 where it should by the rank, and its output face fails."""
    rank, tensors = 2, made("lokr", kind, rank=2, factor=2, tucker=True)
    whole = lokr.kron_weight(*tensors, scale=1.0)
    near(lokr.diff_weight(*tensors, gamma=0.7), whole * (0.7 / rank))
    near(THEIRS["lokr"].diff_weight(*tensors, gamma=0.7), whole * (0.7 / (OUT // 2)))
    x, args = input_of(kind), GEOMETRY[kind]
    with pytest.raises(RuntimeError):
        THEIRS["lokr"].bypass_forward_diff(x, None, *tensors, gamma=0.7, extra_args=args)
    want = general.FUNC_LIST[x.dim()](x, whole * (0.7 / rank), **args)
    near(lokr.bypass_forward_diff(x, None, *tensors, gamma=0.7, extra_args=args), want)


def test_gamma_is_alpha_and_nothing_without_a_rank() -> None:
    """Kept: who calls LyCORIS's LoKr passes alpha."""
    parts, whole = made("lokr", "linear", rank=1, tucker=False), made("lokr", "linear", rank=99, tucker=False)
    for mine in (lokr, THEIRS["lokr"]):
        near(mine.diff_weight(*parts, gamma=3.0), mine.kron_weight(*parts, scale=3.0))
        near(mine.diff_weight(*whole, gamma=3.0), mine.kron_weight(*whole, scale=1.0))
    with pytest.raises(ZeroDivisionError):
        THEIRS["lokr"].diff_weight(*whole, gamma=0.0)
    near(lokr.diff_weight(*whole, gamma=0.0), lokr.kron_weight(*whole))


def test_make_kron() -> None:
    w1, w2 = torch.randn(3, 2), torch.randn(4, 5, 3, 3)
    near(lokr.make_kron(w1, w2, 0.7), THEIRS["lokr"].make_kron(w1, w2, 0.7))
    near(lokr.make_kron(w1, w2[..., 0, 0], 1), torch.kron(w1, w2[..., 0, 0]))


# -- Diag-OFT and BOFT -----------------------------------------------------------------------------------------------
def blocks_of(module: Any, kind: str, rescale: bool, out: int = 24) -> list[Tensor | None]:
    made = module.weight_gen(weight_of(kind, out), 6, rescale=True)
    blocks, gain = stirred(made)
    assert gain is not None
    assert blocks is not None
    return [(blocks * 0.3).detach().requires_grad_(), (1 + 0.2 * gain).detach().requires_grad_() if rescale else None]


ROTATIONS = {"diag_oft": diag_oft, "boft": boft}


@pytest.mark.parametrize("constraint", [None, 0.5, 50.0])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations_of_weights_and_of_outputs(name: str, kind: str, rescale: bool, constraint: float | None) -> None:
    module, tensors = ROTATIONS[name], blocks_of(ROTATIONS[name], kind, rescale)
    weight = weight_of(kind, 24).requires_grad_()
    both(module.diff_weight, THEIRS[name].diff_weight, tensors, weight, constraint=constraint)
    out = general.FUNC_LIST[weight.dim()](input_of(kind), weight.detach(), **GEOMETRY[kind]).requires_grad_()
    first = (None, out) if name == "diag_oft" else (out,)
    named = {"constraint": constraint, "need_transpose": kind != "linear"}
    both(module.bypass_forward_diff, THEIRS[name].bypass_forward_diff, tensors, *first, **named)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_the_multiplier_of_boft_is_in_every_stage(kind: str) -> None:
    tensors, weight = blocks_of(boft, kind, False), weight_of(kind, 24)
    both(boft.diff_weight, THEIRS["boft"].diff_weight, tensors, weight, scale=0.6)
    out = general.FUNC_LIST[weight.dim()](input_of(kind), weight)
    named = {"scale": 0.6, "need_transpose": kind != "linear"}
    both(boft.bypass_forward_diff, THEIRS["boft"].bypass_forward_diff, tensors, out, **named)


def test_no_multiplier_is_no_change_with_rescaled_outputs_too() -> None:
    """LyCORIS leaves the factors at their full strength."""
    tensors, weight = blocks_of(boft, "linear", True), weight_of("linear", 24)
    near(THEIRS["boft"].diff_weight(weight, *tensors, scale=0), weight * (tensors[1] - 1))
    assert not boft.diff_weight(weight, *tensors, scale=0).any()


@pytest.mark.parametrize("name", ROTATIONS)
def test_the_bias_is_not_turned(name: str) -> None:
    """LyCORIS turns whatever the layer's output holds: with a bias, outputs and weights disagree."""
    module, tensors, x = ROTATIONS[name], blocks_of(ROTATIONS[name], "linear", True), input_of("linear")
    weight, bias = weight_of("linear", 24), torch.randn(24)
    want = x @ module.diff_weight(weight, *tensors).mT
    out = torch.nn.functional.linear(x, weight, bias)
    first = (None, out) if name == "diag_oft" else (out,)
    near(module.bypass_forward_diff(*first, *tensors, bias=bias), want)
    wrong = THEIRS[name].bypass_forward_diff(*first, *tensors)
    assert float(((wrong - want).norm() / want.norm()).detach()) > 0.1
    near(module.bypass_forward_diff(*first, *tensors), wrong)  # without the bias there is no telling


def test_the_matrices() -> None:
    blocks = torch.randn(3, 5, 5)
    near(diag_oft.get_r(blocks), THEIRS["diag_oft"].get_r(blocks))
    near(diag_oft.get_r(blocks, torch.eye(5), 0.4), THEIRS["diag_oft"].get_r(blocks, torch.eye(5), 0.4))


def test_fp64_stays_fp64() -> None:
    """LyCORIS inverts in fp32 and fails on what comes of it."""
    blocks = torch.randn(3, 5, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        THEIRS["diag_oft"].get_r(blocks)
    r = diag_oft.get_r(blocks)
    assert float((r @ r.mT - torch.eye(5, dtype=torch.float64)).abs().max()) < 1e-13


# -- fresh tensors ---------------------------------------------------------------------------------------------------
def same(ours: Callable[..., Any], other: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    """The same tensors from the same random numbers."""
    results = []
    for function in (ours, other):
        torch.manual_seed(7)
        results.append(function(*arguments, **named))
    for got, want in itertools.zip_longest(*results):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("name", ["locon", "loha"])
def test_fresh_low_rank_tensors(name: str, kind: str, tucker: bool) -> None:
    module, weight = LOW_RANK[name], weight_of(kind)
    if tucker or kind == "linear":
        same(module.weight_gen, THEIRS[name].weight_gen, weight, 3, tucker=tucker)
    else:  # LyCORIS makes those of a linear layer, whose product has no kernel
        wrong = THEIRS[name].diff_weight(*THEIRS[name].weight_gen(weight, 3, tucker=False))
        assert wrong.shape == weight.shape[:2]
        assert module.diff_weight(*module.weight_gen(weight, 3, tucker=False)).shape == weight.shape


@pytest.mark.parametrize("form", [*LOKR, "tucker"])
@pytest.mark.parametrize("kind", KERNELS)
def test_fresh_kronecker_tensors(kind: str, form: str) -> None:
    settings = {"tucker": True, "rank": 2, "factor": 2} if form == "tucker" else LOKR[form]
    if kind == "linear" and form == "tucker":  # LyCORIS's default: it fails on every linear layer
        with pytest.raises(AttributeError):
            THEIRS["lokr"].weight_gen(weight_of(kind), **settings)
        assert [t is None for t in lokr.weight_gen(weight_of(kind), **settings)] == [0, 1, 1, 1, 0, 0, 1]
    else:
        same(lokr.weight_gen, THEIRS["lokr"].weight_gen, weight_of(kind), **settings)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_a_whole_matrix_is_whole_on_linear_layers_too(kind: str) -> None:
    settings = {"rank": 1, "tucker": False, "full_matrix": True, "decompose_both": True}
    parts = [t is None for t in lokr.weight_gen(weight_of(kind), **settings)]
    assert parts == [False, True, True, False, True, True, True]
    theirs = [t is None for t in THEIRS["lokr"].weight_gen(weight_of(kind), **settings)]
    assert (theirs == parts) == (kind == "conv2d")


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_fresh_rotations(kind: str) -> None:
    weight = weight_of(kind, 24)
    for rescale in (False, True):
        for size in (-1, 4, 5, 24):
            same(diag_oft.weight_gen, THEIRS["diag_oft"].weight_gen, weight, size, rescale=rescale)
    for size, stages in ((-1, -1), (6, -1), (6, 2), (6, 9), (7, -1)):
        same(boft.weight_gen, THEIRS["boft"].weight_gen, weight, size, stages, rescale=True)
    assert boft.weight_gen(weight, 6)[1] is None
    assert THEIRS["boft"].weight_gen(weight, 6)[1] is not None  # rescale=False gives factors all the same


def test_blocks_of_boft_where_none_is_small_enough() -> None:
    """LyCORIS fails at 320 or 1280 outputs with blocks of 4; ours have the smallest size that there is."""
    with pytest.raises(ValueError, match="invalid literal"):
        THEIRS["boft"].weight_gen(torch.randn(320, 4), 4)
    assert boft.weight_gen(torch.randn(320, 4), 4)[0].shape == (6, 32, 10, 10)
    with pytest.raises(OptionError, match="15 outputs do not split"):
        boft.weight_gen(torch.randn(15, 4), 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_fresh_tensors_are_where_the_weight_is(dtype: torch.dtype) -> None:
    weight = torch.empty((12, 8, 3, 3), device="meta", dtype=dtype)
    wanted = torch.float64 if dtype is torch.float64 else torch.float32
    for tensors in (
        locon.weight_gen(weight, 2),
        loha.weight_gen(weight, 2),
        lokr.weight_gen(weight, 2),
        diag_oft.weight_gen(weight, 2, True),
        boft.weight_gen(weight, 6, rescale=True),
    ):
        assert {(t.device.type, t.dtype) for t in tensors if t is not None} == {("meta", wanted)}


# -- general ---------------------------------------------------------------------------------------------------------
@hypothesis.given(st.integers(1, 5000), st.one_of(st.just(-1), st.integers(0, 200)))
def test_factorizations(dimension: int, factor: int) -> None:
    assert general.factorization(dimension, factor) == THEIRS["general"].factorization(dimension, factor)
    assert general.power2factorization(dimension, factor) == THEIRS["general"].power2factorization(dimension, factor)


@pytest.mark.parametrize("kernel", [(3,), (3, 2), (2, 3, 2)])
def test_tucker_products(kernel: tuple[int, ...]) -> None:
    t, wa, wb = torch.randn(3, 4, *kernel), torch.randn(3, 6), torch.randn(4, 5)
    near(general.rebuild_tucker(t, wa, wb), theirs.rebuild_tucker(t, wa, wb))
    near(general.tucker_weight(wa, wb, t), theirs.tucker_weight(wa, wb, t))
    up, down = (m.reshape(*m.shape, *[1] * len(kernel)) for m in (wa.mT, wb))
    near(general.tucker_weight_from_conv(up, down, t), theirs.tucker_weight_from_conv(up, down, t))


def test_a_scaled_sum() -> None:
    base, delta = torch.randn(4, 3), torch.randn(4, 3)
    near(general.add_scaled(base, delta, 0.7), theirs.add_scaled(base, delta, 0.7))


@pytest.mark.parametrize("on_out", [True, False])
@pytest.mark.parametrize("multiplier", [1, 0.6])
@pytest.mark.parametrize("kind", KERNELS)
def test_dora_on_a_finished_weight(kind: str, multiplier: float, on_out: bool) -> None:
    weight = weight_of(kind).requires_grad_()
    shape = (OUT, *[1] * (weight.dim() - 1)) if on_out else (1, IN, *[1] * (weight.dim() - 2))
    scale = (1 + torch.rand(shape, generator=torch.Generator().manual_seed(8))).requires_grad_()
    for function in (general.weight_decompose, theirs.weight_decompose):
        both(function, theirs.weight_decompose, [weight, scale], multiplier=multiplier, wd_on_out=on_out)
    if not on_out:
        near(
            general.apply_dora_scale(weight, weight * 0.1, scale, multiplier),
            theirs.apply_dora_scale(weight, weight * 0.1, scale, multiplier),
        )


def test_magnitudes_of_outputs_are_of_outputs() -> None:
    """LyCORIS divides by the norms of the input channels and multiplies by the magnitudes of the outputs."""
    weight, rebuild = torch.randn(4, 3), torch.randn(4, 3)
    scale = (weight + rebuild).norm(dim=1, keepdim=True)
    near(general.apply_dora_scale(weight, rebuild, scale, 1.0), weight + rebuild)
    wrong = theirs.apply_dora_scale(weight, rebuild, scale, 1.0)
    assert float((wrong - weight - rebuild).norm() / (weight + rebuild).norm()) > 0.1
    with pytest.raises(ShapeError, match=r"expected 4 magnitudes, one for each output of a weight of shape \(4, 3\)"):
        general.weight_decompose(weight, torch.ones(1, 3))


def test_columns_of_zeros_stay_zero() -> None:
    weight = torch.randn(4, 3)
    weight[:, 1] = 0
    scale = weight.norm(dim=0, keepdim=True)
    assert theirs.apply_dora_scale(weight, torch.zeros(4, 3), scale, 1.0).isnan().any()
    near(general.apply_dora_scale(weight, torch.zeros(4, 3), scale, 1.0), weight)


def test_dora_in_half_precision_is_rounded_once() -> None:
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(1)).bfloat16()
    scale = weight.norm(dim=1, keepdim=True)
    exact = general.weight_decompose(weight.double(), scale.double())
    errors = [
        float((function(weight, scale).double() - exact).norm() / exact.norm())
        for function in (general.weight_decompose, theirs.weight_decompose)
    ]
    assert general.weight_decompose(weight, scale).dtype == torch.bfloat16
    assert errors[0] < errors[1]


# -- outputs of grouped and padded convolutions ----------------------------------------------------------------------
@pytest.mark.parametrize("args", [{"groups": 2}, {"padding": "same", "dilation": 2}, {"padding": "valid", "stride": 2}])
@pytest.mark.parametrize("name", LOW_RANK)
def test_the_output_face_is_the_weight_face(name: str, args: dict[str, Any]) -> None:
    weight = torch.randn(12, 8 // args.get("groups", 1), 3, 2)
    tensors = stirred(LOW_RANK[name].weight_gen(weight, 2, tucker=name != "lokr"))
    x = torch.randn(2, 8, 9, 7)
    want = torch.nn.functional.conv2d(x, LOW_RANK[name].diff_weight(*tensors, gamma=0.7), **args)
    near(LOW_RANK[name].bypass_forward_diff(x, None, *tensors, gamma=0.7, extra_args=args), want)
    if "groups" in args and name == "locon":  # in LyCORIS down takes a whole input, which it was not made for
        with pytest.raises(RuntimeError, match="groups"):
            THEIRS[name].bypass_forward_diff(x, None, *tensors, gamma=0.7, extra_args=args)


@pytest.mark.parametrize("module", [locon, loha, lokr])
def test_arguments_that_nobody_knows(module: Any) -> None:
    tensors = stirred(module.weight_gen(weight_of("conv2d"), 2, tucker=False))
    with pytest.raises(OptionError, match=r"no argument 'strides'. Did you mean 'stride'\?"):
        module.bypass_forward_diff(input_of("conv2d"), None, *tensors, extra_args={"strides": 2})
    with pytest.raises(OptionError, match=r"got 'tritan'. Did you mean 'triton'\?"):
        module.diff_weight(*tensors, backend="tritan")
    for backend in (None, "auto", "torch", "compile", "triton", "tilelang"):
        near(module.diff_weight(*tensors, backend=backend), module.diff_weight(*tensors))


def test_tensors_that_are_missing_or_do_not_fit() -> None:
    down, up, _ = locon.weight_gen(weight_of("linear"), 2)
    assert locon.diff_weight(down, up).shape == (OUT, IN)  # LyCORIS wants the None as well
    with pytest.raises(OptionError, match="up: expected a tensor, got None"):
        locon.diff_weight(down)
    with pytest.raises(OptionError, match="expected the tensors down, up, mid, got 4"):
        locon.diff_weight(down, up, None, None)
    with pytest.raises(OptionError, match="w1a: expected a tensor"):
        lokr.diff_weight(None, None, None, torch.ones(2, 2), None, None, None)
    with pytest.raises(ShapeError, match="4 blocks of 3 are 12 channels, expected 24"):
        diag_oft.diff_weight(torch.randn(24, 3), torch.zeros(4, 3, 3), None)
