"""The tables of docs/files.md are what the code does."""

from __future__ import annotations

from files_tables import DOCUMENT, KINDS, held, read, written


def test_the_document_has_the_tables_of_the_code() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert written(text) == text, "cd tests && PYTHONPATH=. python -m files_tables"


def test_every_kind_has_a_dialect_and_most_have_a_reader() -> None:
    for line in held().splitlines()[2:]:
        assert "yes" in line
    assert sum("|  |  |  |  |  |  |  |" in line for line in read().splitlines()) <= 1
    assert len(held().splitlines()) == len(KINDS) + 2
