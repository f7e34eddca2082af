"""What the page shows: nothing that comes from a file or a user is markup, and errors are one paragraph."""

from __future__ import annotations

import pytest

from nerine.errors import FormatError, OptionError
from nerine.ui.panels import error_panel, facts, grid, linked, notes, progress_panel, verdict

EVIL = '<img src=x onerror="alert(1)">${alert(2)}{{alert(3)}}\u202e'


def test_texts_are_never_markup() -> None:
    panels = [
        error_panel(FormatError(EVIL)),
        error_panel(RuntimeError(EVIL)),
        progress_panel(1, 2, EVIL),
        verdict(EVIL, more=EVIL),
        facts([(EVIL, EVIL, EVIL)]),
        grid((EVIL, "x"), [(EVIL, 1)], EVIL),
        notes([EVIL]),
        linked("download/x", EVIL),
    ]
    for panel in panels:
        assert "<img" not in panel
        assert "&lt;img" in panel
        assert "\u202e" not in panel


def test_errors_are_told_in_the_words_of_the_page() -> None:
    told = error_panel(FormatError("give the base with --base, or a rank with --rank or --nonsense"))
    assert "the field &quot;Checkpoint&quot;" in told
    assert "the field &quot;Rank&quot;" in told
    assert "--nonsense" in told
    assert "This file cannot be used" in told
    assert 'role="alert"' in told


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OptionError("no"), "This cannot be done as asked"),
        (OSError(28, "No space left on device", "/x/y"), "/x/y: No space left on device; nothing was changed"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero. Nothing was written"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_every_error_has_a_title_and_a_sentence(error: Exception, words: str) -> None:
    assert words in error_panel(error)
    assert "Traceback" not in error_panel(error)


def test_progress_is_told_in_numbers_where_they_are_known() -> None:
    known = progress_panel(30, 120, "block.to_q")
    assert "30 of 120" in known
    assert 'aria-valuenow="25"' in known
    assert "width:25.0%" in known
    unknown = progress_panel(0, 0, "")
    assert "ne-moving" in unknown
    assert "aria-valuenow" not in unknown
    assert "this one is next" in progress_panel(0, 0, "", waits=True)


def test_long_tables_are_cut_and_empty_columns_left_out() -> None:
    drawn = grid(("layer", "note", "values"), [(f"layer {i}", "", i) for i in range(450)], "Layers", numbers=(2,))
    assert drawn.count("<tr>") == 401
    assert "and 50 more" in drawn
    assert "note" not in drawn
    assert grid(("a",), []) == ""
