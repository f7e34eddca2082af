"""An inspection as text: a few tables that fit 80 columns, plain for `str()`, and as data for whoever has colours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from nerine.tables import table
from nerine.tools.inspect.report import InspectReport, LayerRow

__all__ = ["Sheet", "bar", "bytes_of", "layer_sheets", "number", "printable", "sheets_of", "shortened", "text_of"]

WIDTH = 80
BAR = 12
EIGHTHS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True)
class Sheet:
    """A table with a title, not yet drawn. `free` is the column that may be broken into several lines."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    free: int | None = None


def text_of(report: InspectReport, layers: bool = False) -> str:
    """The report in plain text; with `layers`, every layer of it."""
    found = [*sheets_of(report), *(layer_sheets(report) if layers else ())]
    return "\n\n".join(map(_drawn, found))


def sheets_of(report: InspectReport) -> list[Sheet]:
    """The report in tables: what it is, its making, its blocks, and what is suspicious."""
    found = [Sheet(printable(report.file, 200), ("", ""), _summary(report), free=1)]
    told = _told(report)
    if told:
        found.append(Sheet("Training", ("", ""), told, free=1))
    found += _blocks(report)
    found.append(_findings(report))
    return found


# -- small things ------------------------------------------------------------------------------------------------------
def printable(text: object, longest: int = 60) -> str:
    """A text from a file as a terminal may show it: nothing that moves the cursor or turns the direction of writing."""
    whole = str(text)[: longest + 1]
    plain = "".join(c if c.isprintable() else " " if c in "\n\t" else f"\\x{ord(c):02x}" for c in whole)
    return plain if len(plain) <= longest else plain[: longest - 1] + "…"


def shortened(text: str, longest: int) -> str:
    """A long name without its middle."""
    text = printable(text, 400)
    if len(text) <= longest:
        return text
    head = (longest - 1) // 2
    return f"{text[:head]}…{text[head + 1 - longest :]}"


def number(value: float | None) -> str:
    """Three digits; nothing where there is none."""
    return "" if value is None else f"{value:.3g}"


def bar(share: float) -> str:
    """A bar of up to `BAR` columns, in eighths of a column; something to see wherever there is something."""
    eighths = round(min(max(share, 0.0), 1.0) * BAR * 8)
    eighths = max(eighths, 1) if share > 0 else 0
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (EIGHTHS[rest] if rest else "")


def bytes_of(count: int) -> str:
    """A size for people."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def spread(counts: Mapping[int, int] | Mapping[float, int]) -> str:
    """What numbers there are: the one, or the least, the middle and the most of them."""
    if not counts:
        return ""
    values = sorted(value for value, count in counts.items() for _ in range(count))
    if len(counts) == 1:
        return f"{values[0]:g}"
    return f"{values[0]:g} to {values[-1]:g}, median {values[len(values) // 2]:g} ({len(counts)} different)"


def counted(counts: Mapping[str, int], most: int = 6) -> str:
    """Names with how many there are of each."""
    shown = [f"{name} {count}" for name, count in list(counts.items())[:most]]
    return ", ".join([*shown, *([f"and {len(counts) - most} more"] if len(counts) > most else [])])


# -- the tables --------------------------------------------------------------------------------------------------------
def _summary(report: InspectReport) -> list[tuple[str, str]]:
    total = len(report.rows)
    rivals = [f"{name} {score:.0%}" for name, score in report.scores.items() if name != report.dialect and score > 0.5]
    lines = [
        ("container", f"{report.container}, {bytes_of(report.bytes)}"),
        ("dialect", report.dialect + (f" (also explained by {', '.join(rivals)})" if rivals else "")),
        ("layers", f"{total} ({counted(report.components)})"),
        ("algorithm", counted(report.algorithms)),
        ("rank", spread(report.ranks)),
        ("alpha", spread(report.alphas)),
        ("DoRA over", counted({f"{axis}puts of": count for axis, count in report.axes.items()})),
        ("parameters", f"{report.parameters:,} ({counted(report.dtypes)} tensors)"),
        ("settings", "; ".join(report.settings[:4])),
        ("written by", report.written_by),
        ("base", printable(report.base, 200)),
        ("embeddings", _embeddings(report)),
        ("not used", _unused(report)),
        ("missing", counted({printable(path, 200): 1 for path in report.missing}, 3) if report.missing else ""),
        *(("note", printable(note, 300)) for note in report.notes),
    ]
    return [(label, printable(text, 400)) for label, text in lines if text]


def _embeddings(report: InspectReport) -> str:
    found = []
    for word, own in report.embeddings.items():
        sizes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in own.items())
        found.append(f"{printable(word, 40)} ({printable(sizes, 80)})")
    return ", ".join(found)


def _unused(report: InspectReport) -> str:
    if not report.unmatched:
        return ""
    key, why = next(iter(report.unmatched.items()))
    return f"{len(report.unmatched)} tensors, first {printable(key)}: {printable(why, 120)}"


def _told(report: InspectReport) -> list[tuple[str, str]]:
    training = report.training
    lines = [
        (printable(group, 20), "; ".join(f"{printable(k, 30)}: {printable(v, 80)}" for k, v in list(told.items())[:12]))
        for group, told in training.groups.items()
    ]
    if training.datasets:
        sets = [f"{printable(d.name, 40)} ({d.images} x {d.repeats})" for d in training.datasets[:6]]
        lines.append(("folders", ", ".join(sets)))
    if training.tags:
        lines.append(("captions", ", ".join(f"{printable(tag.word, 30)} {tag.count}" for tag in training.tags[:12])))
    if training.triggers:
        lines.append(("triggers", ", ".join(printable(word, 60) for word in training.triggers)))
    return [*lines, *(("note", printable(note, 200)) for note in training.notes)]


def _blocks(report: InspectReport) -> Iterator[Sheet]:
    relative = any(block.relative is not None for block in report.blocks)
    for component in report.components:
        own = [block for block in report.blocks if (block.component or "model") == component]
        sizes = [(block.relative if relative else block.norm) or 0.0 for block in own]
        most = max(sizes, default=0.0) or 1.0
        rows = [
            (
                shortened(block.name, 30),
                str(block.layers),
                number(block.norm),
                number(block.relative),
                number(block.effective_rank),
                bar(size / most),
            )
            for block, size in zip(own, sizes, strict=True)
        ]
        head = ("block", "layers", "norm", "of weight", "eff. rank", "")
        yield Sheet(f"Blocks of the {component}, medians over layers", head, rows)


def _findings(report: InspectReport) -> Sheet:
    if report.healthy:
        return Sheet("Suspicious layers: none", (), ())
    rows = [(shortened(f.layer, 44), f"{f.problem}: {printable(f.reason, 200)}") for f in report.findings[:20]]
    more = len(report.findings) - len(rows)
    if more:
        rows.append(("", f"and {more} more"))
    return Sheet(f"Suspicious layers: {len({f.layer for f in report.findings})}", ("layer", "why"), rows, free=1)


def layer_sheets(report: InspectReport) -> Iterator[Sheet]:
    """All layers, block by block."""
    head = ("layer", "algorithm", "rank", "alpha", "norm", "of weight", "eff. rank")
    groups: dict[tuple[str, str], list[LayerRow]] = {}
    for row in report.rows:
        groups.setdefault((row.component, row.block), []).append(row)
    for (component, block), own in groups.items():
        rows = [
            (
                shortened(_below(row), 34),
                row.algorithm,
                "" if row.rank is None else str(row.rank),
                number(row.alpha),
                number(row.norm),
                number(row.relative),
                number(row.effective_rank),
            )
            for row in own
        ]
        yield Sheet(" ".join(part for part in (component, block) if part) or "model", head, rows)


def _below(row: LayerRow) -> str:
    """The path of a layer below its block."""
    at = row.layer.find(row.block) if row.block else -1
    return row.layer[at + len(row.block) + 1 :] if at >= 0 else row.layer


def _drawn(sheet: Sheet) -> str:
    if not sheet.rows:
        return sheet.title
    if sheet.free is None:
        return f"{sheet.title}\n{table(sheet.head, sheet.rows)}"
    wide = max(len(row[0]) for row in sheet.rows)
    lines = [sheet.title]
    for row in sheet.rows:
        lines += _folded(row[0].ljust(wide) + "  ", row[1], wide + 2)
    return "\n".join(lines)


def _folded(lead: str, text: str, indent: int) -> Iterable[str]:
    """A text in lines of at most `WIDTH` columns, all but the first indented."""
    line = lead
    for word in text.split(" "):
        if len(line) + len(word) > WIDTH and line.strip() and line != " " * indent:
            yield line.rstrip()
            line = " " * indent
        line += word + " "
    yield line.rstrip()
