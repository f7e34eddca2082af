"""Plain text tables for reports. No colour, no terminal: whoever prints decides about those."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["listing", "table"]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns under their heads, numbers to the right; columns without any content are left out."""
    body = [[str(cell) for cell in row] for row in rows]
    keep = [i for i in range(len(head)) if any(row[i] for row in body)] if body else range(len(head))
    lines = [[head[i] for i in keep], *[[row[i] for i in keep] for row in body]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    numeric = [all(_is_number(line[i]) for line in lines[1:]) and len(lines) > 1 for i in range(len(widths))]
    text = [
        "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def _is_number(cell: str) -> bool:
    return (
        cell.strip("+-%x~").replace(",", "").replace(".", "").replace("e-", "").replace("e+", "").isdigit() or not cell
    )


def listing(rows: Iterable[tuple[str, object]]) -> str:
    """Names and what belongs to them, one pair a line."""
    pairs = [(name, str(value)) for name, value in rows]
    width = max((len(name) for name, _ in pairs), default=0)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in pairs)
