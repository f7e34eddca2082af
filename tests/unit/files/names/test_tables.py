"""The little language in which names are written down."""

from __future__ import annotations

from nerine.files.names import Alias, renamed
from nerine.files.names.families.base import Family, Shapes, table


def _aliases(text: str, shapes: Shapes, own: str = "a") -> list[Alias]:
    (found,) = Family("test", ("a", "b"), {}, table(text)).aliases(shapes, own).values()
    return list(found)


def test_numbers_keep_their_order_and_written_ones_go_first() -> None:
    text = "x.*.y.*.z  p.*.q.*\n x.*.y.0.z  first.*\n x.**  rest.**"
    shapes = dict.fromkeys(("x.3.y.12.z", "x.3.y.0.z", "x.3.w", "x", "xx.3"), (4, 2))
    assert _aliases(text, shapes) == [
        Alias("p.3.q.12", "x.3.y.12.z"),
        Alias("first.3", "x.3.y.0.z"),
        Alias("rest.3.w", "x.3.w"),
    ]


def test_a_prefix_may_be_all_of_a_path() -> None:
    assert _aliases("**  inner.**", {"x.1": (2, 2)}) == [Alias("inner.x.1", "x.1")]
    assert _aliases("inner.**  **", {"inner.x.1": (2, 2), "x": (2, 2)}) == [Alias("x.1", "inner.x.1")]


def test_what_is_not_there_has_no_name() -> None:
    assert _aliases("x  -", {"x": (2, 2)}) == []
    assert _aliases("x  -", {"x": (2, 2)}, own="b") == []


def test_pieces_follow_each_other() -> None:
    split = {"l.1.q": (6, 4), "l.1.k": (2, 4), "l.1.v": (2, 4)}
    found = _aliases("l.*.{q,k,v}  m.*.qkv:1", {**split, "l.2.q": (6, 4)})
    assert found == [
        Alias("m.1.qkv", "l.1.q", rows=(0, 6)),
        Alias("m.1.qkv", "l.1.k", rows=(6, 8)),
        Alias("m.1.qkv", "l.1.v", rows=(8, 10)),
    ]
    assert renamed(split, found) == {"m.1.qkv": (10, 4)}


def test_a_fused_layer_is_cut_evenly_or_by_its_inputs() -> None:
    assert _aliases("{q,k,v}  qkv", {"qkv": (9, 5)}, own="b") == [
        Alias("q", "qkv", (0, 3)),
        Alias("k", "qkv", (3, 6)),
        Alias("v", "qkv", (6, 9)),
    ]
    assert _aliases("{q,k,v}  qkv:1", {"qkv": (9, 5)}, own="b") == [
        Alias("q", "qkv", (0, 5)),
        Alias("k", "qkv", (5, 7)),
        Alias("v", "qkv", (7, 9)),
    ]
    assert _aliases("{q,k,v}  qkv", {"qkv": (10, 5)}, own="b") == []
    assert _aliases("{q,k,v}  qkv:1", {"qkv": (3, 5)}, own="b") == []


def test_halves_are_turned() -> None:
    turned = [Alias("y", "x", (0, 3), (3, 6)), Alias("y", "x", (3, 6), (0, 3))]
    assert _aliases("x  y~", {"x": (6, 3)}) == turned
    assert _aliases("x~  y", {"x": (6, 3)}) == turned
    assert _aliases("x~  y~", {"x": (6, 3)}) == [Alias("y", "x")]
    assert _aliases("x  y~", {"x": (12, 3)}) == [Alias("y", "x")]
    assert _aliases("x  y~~", {"x": (6, 5)}) == turned


def test_a_line_may_stand_for_several() -> None:
    assert table("<W>.x  <W>.y\n\n  z  z", W=["a", "b"]) == (("a.x", "a.y"), ("b.x", "b.y"), ("z", "z"))
