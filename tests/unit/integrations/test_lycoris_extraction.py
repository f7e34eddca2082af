"""A difference cut down to a low-rank product, by each of the five modes; flags."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nerine.errors import OptionError, ShapeError
from nerine.integrations.lycoris.extraction import extract_conv, extract_linear, str_bool


def spectrum(values: list[float], shape: tuple[int, ...]) -> Tensor:
    """A weight with these singular values."""
    generator = torch.Generator().manual_seed(0)
    out, inputs = shape[0], torch.Size(shape[1:]).numel()
    u, v = (torch.linalg.qr(torch.randn(n, len(values), generator=generator))[0] for n in (out, inputs))
    return ((u * torch.tensor(values)) @ v.mT).reshape(shape)


@pytest.mark.parametrize(
    ("mode", "param", "rank"),
    [
        ("fixed", 3, 3),
        ("threshold", 1.5, 3),
        ("ratio", 0.15, 3),
        ("quantile", 0.9, 3),
        ("quantile", 1.0, 4),
        ("fixed", 0, 1),
    ],
)
@pytest.mark.parametrize("kernel", [(), (3,), (3, 2), (2, 1, 2)])
def test_the_rank_of_each_mode(mode: str, param: float, rank: int, kernel: tuple[int, ...]) -> None:
    weight = spectrum([8.0, 4.0, 2.0, 1.0], (24, 10, *kernel))
    (down, up, rest), kind = (extract_conv if kernel else extract_linear)(weight, mode, param)
    assert kind == "low rank"
    assert down.shape == (rank, 10, *kernel)
    assert up.shape == (24, rank, *[1] * len(kernel))
    left = torch.tensor([8.0, 4.0, 2.0, 1.0][rank:]).norm()
    torch.testing.assert_close(rest.norm(), left, rtol=1e-4, atol=1e-5)
    product = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    torch.testing.assert_close(product + rest, weight)


def test_what_would_be_larger_than_the_difference_is_given_back() -> None:
    weight = torch.randn(6, 20)
    for mode, param in (("full", 0), ("fixed", 3), ("threshold", 0.0)):
        found, kind = extract_linear(weight, mode, param)
        assert (kind, torch.equal(found, weight)) == ("full", True)
    wide = torch.randn(6, 5, 3, 3)
    assert extract_conv(wide, "fixed", 4)[1] == "full"
    assert extract_conv(wide, "fixed", 4, is_cp=True)[1] == "low rank"


def test_half_precision() -> None:
    (down, up, rest), _ = extract_linear(spectrum([8.0, 4.0], (24, 10)).bfloat16(), "fixed", 2)
    assert {down.dtype, up.dtype, rest.dtype} == {torch.bfloat16}
    assert float(rest.float().norm()) < 0.05


@pytest.mark.parametrize(
    ("mode", "param", "words"),
    [
        ("fixd", 1, "there is no mode 'fixd'. Did you mean 'fixed'"),
        ("fixed", 1.5, "mode 'fixed' expects a rank, got 1.5"),
        ("threshold", -1, "mode 'threshold' expects a number of at least 0"),
        ("ratio", 2, "mode 'ratio' expects a number from 0 to 1, got 2"),
        ("quantile", -0.1, "mode 'quantile' expects a number from 0 to 1"),
    ],
)
def test_what_cannot_be_asked_for(mode: str, param: float, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        extract_linear(torch.randn(24, 10), mode, param)


def test_weights_of_the_wrong_kind() -> None:
    with pytest.raises(ShapeError, match=r"expected a weight \[out, in\], got \(4, 3, 1\)"):
        extract_linear(torch.randn(4, 3, 1))
    with pytest.raises(ShapeError, match=r"expected a weight \[out, in, \*k\], got \(4, 3\)"):
        extract_conv(torch.randn(4, 3))


def test_flags() -> None:
    assert [str_bool(value) for value in ("True", "1", "yes", True, 1)] == [True] * 5
    assert [str_bool(value) for value in ("False", "0", "None", "", "no", None, 0, False)] == [False] * 8
    with pytest.raises(OptionError, match="expected true or false, got 'maybe'"):
        str_bool("maybe")
