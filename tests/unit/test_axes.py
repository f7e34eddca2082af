"""The axis mini-language: solving for sizes, and errors that say in words what disagrees."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nerine import ShapeError
from nerine.axes import Layout, Spec, bind, kernel_of, shape_of

LORA = Layout(
    {
        "down": Spec("rank in *k", "lora_down.weight"),
        "up": Spec("out rank *1", "lora_up.weight", carrier=True, gate="rank"),
    }
)
KRON = Layout(
    {"w1": Spec("a c", "lokr_w1", carrier=True), "w2": Spec("b d *k", "lokr_w2", gate="b")}, ("out = a b", "in = c d")
)
FLAT = Layout({"w": Spec("out rank", "w_a"), "v": Spec("rank flat", "w_b")}, ("flat = in *k",))
CONV = {"out": 6, "in": 4, "k0": 3, "k1": 2}
LINEAR = {"out": 6, "in": 4}


def test_solves_for_what_the_layer_does_not_say() -> None:
    sizes = bind(LORA, {"down": (5, 4, 3, 2), "up": (6, 5, 1, 1)}, CONV, "mid.conv")
    assert sizes == {**CONV, "rank": 5}
    assert kernel_of(sizes) == (3, 2)


def test_solves_without_a_layer() -> None:
    """A file alone says how large its layer is."""
    sizes = bind(LORA, {"down": (5, 4, 3, 2), "up": (6, 5, 1, 1)}, {}, "mid.conv")
    assert sizes == {**CONV, "rank": 5}
    assert bind(KRON, {"w1": (2, 2), "w2": (3, 2)}, {}, "q") == {"out": 6, "in": 4, "a": 2, "b": 3, "c": 2, "d": 2}


def test_relations_solve_one_unknown_or_the_whole() -> None:
    layout = Layout({"w": Spec("a c", "w")}, ("out = a b", "in = c d"))
    assert bind(layout, {"w": (2, 4)}, LINEAR, "q") == {**LINEAR, "a": 2, "b": 3, "c": 4, "d": 1}
    assert bind(FLAT, {"w": (6, 2), "v": (2, 24)}, CONV, "q")["flat"] == 24
    assert "d" not in bind(Layout({"w": Spec("a", "w")}, ("in = c d",)), {"w": (2,)}, {}, "q")


MESSAGES = {
    "another axis word, another witness": (
        LORA,
        {"down": (16, 4, 3, 2), "up": (6, 8, 1, 1)},
        CONV,
        "unet.mid.to_q.lora_up.weight: axis 'rank' is 8 here but 16 in lora_down.weight "
        "(expected 'out rank *1', got (6, 8, 1, 1))",
    ),
    "the layer": (
        LORA,
        {"down": (16, 5, 3, 2), "up": (6, 16, 1, 1)},
        CONV,
        "unet.mid.to_q.lora_down.weight: axis 'in' is 5 here but 4 in the layer "
        "(expected 'rank in *k', got (16, 5, 3, 2))",
    ),
    "the kernel": (
        LORA,
        {"down": (16, 4, 3, 3), "up": (6, 16, 1, 1)},
        CONV,
        "unet.mid.to_q.lora_down.weight: axis 'k1' is 3 here but 2 in the layer "
        "(expected 'rank in *k', got (16, 4, 3, 3))",
    ),
    "an axis of one": (
        LORA,
        {"down": (16, 4, 3, 2), "up": (6, 16, 3, 1)},
        CONV,
        "unet.mid.to_q.lora_up.weight: axis '1' is 3 here but 1 in this axis "
        "(expected 'out rank *1', got (6, 16, 3, 1))",
    ),
    "too few axes": (
        LORA,
        {"down": (16,), "up": (6, 16, 1, 1)},
        CONV,
        "unet.mid.to_q.lora_down.weight: expected 4 axes 'rank in *k', got 1 in (16,). "
        "Is this file for another layer or model?",
    ),
    "too many axes": (
        LORA,
        {"down": (16, 4, 3, 2), "up": (6, 16)},
        LINEAR,
        "unet.mid.to_q.lora_down.weight: expected 2 axes 'rank in *k', got 4 in (16, 4, 3, 2). "
        "Is this file for another layer or model?",
    ),
    "too many without a star": (
        FLAT,
        {"w": (6, 2, 1), "v": (2, 24)},
        CONV,
        "unet.mid.to_q.w_a: expected 2 axes 'out rank', got 3 in (6, 2, 1). Is this file for another layer or model?",
    ),
    "missing": (
        LORA,
        {"down": (16, 4, 3, 2)},
        CONV,
        "unet.mid.to_q.lora_up.weight: this tensor is missing (expected 'out rank *1')",
    ),
    "a product": (
        KRON,
        {"w1": (2, 2), "w2": (2, 2)},
        LINEAR,
        "unet.mid.to_q: out = a x b must be 6 (the layer) but is 2 x 2 = 4",
    ),
    "a factor that does not divide": (
        Layout({"w": Spec("a c", "w")}, ("out = a b",)),
        {"w": (4, 4)},
        LINEAR,
        "unet.mid.to_q: out = a x b must be 6 (the layer) but is 4 x ?",
    ),
    "a product with the kernel": (
        FLAT,
        {"w": (6, 2), "v": (2, 20)},
        CONV,
        "unet.mid.to_q: flat = in x k0 x k1 must be 20 (w_b) but is 4 x 3 x 2 = 24",
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(name: str) -> None:
    layout, shapes, known, words = MESSAGES[name]
    with pytest.raises(ShapeError) as caught:
        bind(layout, shapes, known, "unet.mid.to_q")
    assert str(caught.value) == words


def test_what_a_layout_says_of_itself() -> None:
    assert LORA.keys == {"lora_down.weight", "lora_up.weight"}
    assert (LORA.carriers, LORA.gates(True)) == (("up",), (("up", 1),))
    assert (KRON.carriers, KRON.gates(False)) == (("w1",), (("w2", 0),))


# -- any layout ------------------------------------------------------------------------------------------------------
WORDS = st.sampled_from(["out", "in", "rank", "a", "b", "1"])
AXES = st.builds(
    lambda words, star: " ".join([*words, *star]),
    st.lists(WORDS, min_size=1, max_size=3),
    st.sampled_from([[], ["*k"], ["*1"]]),
)
LAYOUTS = st.lists(AXES, min_size=1, max_size=4).map(
    lambda axes: Layout({f"t{i}": Spec(a, f"key{i}") for i, a in enumerate(axes)})
)


@st.composite
def sized(draw: st.DrawFn) -> tuple[Layout, dict[str, int]]:
    layout = draw(LAYOUTS)
    sizes = {word: draw(st.integers(1, 5)) for word in ("out", "in", "rank", "a", "b")}
    sizes |= {f"k{i}": draw(st.integers(1, 3)) for i in range(draw(st.integers(0, 3)))}
    return layout, sizes


@given(sized())
def test_shapes_made_from_sizes_bind_to_the_same_sizes(case: tuple[Layout, dict[str, int]]) -> None:
    layout, sizes = case
    shapes = {name: shape_of(spec, sizes) for name, spec in layout.specs.items()}
    known = {k: v for k, v in sizes.items() if k in ("out", "in") or k.startswith("k")}
    found = bind(layout, shapes, known, "x")
    assert all(sizes[word] == size for word, size in found.items())
    assert all(shape_of(spec, found) == shapes[name] for name, spec in layout.specs.items())


@given(sized(), st.data())
def test_a_wrong_size_is_never_accepted(case: tuple[Layout, dict[str, int]], data: st.DataObject) -> None:
    layout, sizes = case
    shapes = {name: list(shape_of(spec, sizes)) for name, spec in layout.specs.items()}
    name = data.draw(st.sampled_from(sorted(shapes)))
    axis = data.draw(st.integers(0, len(shapes[name]) - 1))
    shapes[name][axis] += 1
    known = {**sizes}
    with pytest.raises(ShapeError, match=layout.specs[name].key):
        bind(layout, {n: tuple(s) for n, s in shapes.items()}, known, "x")


@given(sized(), st.dictionaries(st.sampled_from(["t0", "t1", "t2"]), st.lists(st.integers(0, 4), max_size=5)))
def test_any_shapes_bind_or_raise_a_shape_error(
    case: tuple[Layout, dict[str, int]], shapes: dict[str, list[int]]
) -> None:
    layout, sizes = case
    try:
        found = bind(layout, {n: tuple(s) for n, s in shapes.items()}, {"out": sizes["out"], "in": sizes["in"]}, "x")
    except ShapeError:
        return
    for name, spec in layout.specs.items():
        assert math.prod(shape_of(spec, found)) == math.prod(shapes[name])
