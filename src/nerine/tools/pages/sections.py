"""The sections of the page that are words and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nerine.tools.inspect.report import Finding, InspectReport, LayerRow
from nerine.tools.inspect.text import bytes_of, counted, number, spread
from nerine.tools.pages.marks import Markup, joined, mark, words

__all__ = ["facts", "findings", "layers", "leftovers", "measures", "section", "training"]

MOST_TAGS, MOST_FINDINGS, MOST_RAW = 60, 100, 400


def section(title: str, about: str, *content: Markup) -> Markup:
    """A section with a heading; nothing where there is no content."""
    inside = joined(content)
    if not inside:
        return Markup()
    intro = [mark("p", about)] if about else []
    return mark("section", mark("h2", title), *intro, inside)


def facts(report: InspectReport) -> Markup:
    """What there is to know at a glance."""
    found: list[tuple[str, str, str]] = [
        ("layers", f"{len(report.rows)}", _several(report.components)),
        ("algorithm", _spelled(list(report.algorithms)[:3]), _several(report.algorithms)),
        ("rank", *_spread(report.ranks)),
        ("alpha", *_spread(report.alphas)),
        ("DoRA norm over", ", ".join(f"{axis}puts" for axis in report.axes), ""),
        ("trained numbers", f"{report.parameters:,}", _formats(report)),
        ("size", bytes_of(report.bytes), report.container),
        ("dialect", report.dialect, ""),
    ]
    tiles = [
        mark("div", mark("dt", label), mark("dd", value, *([mark("small", more)] if more else [])))
        for label, value, more in found
        if value
    ]
    return mark("dl", *tiles, class_="facts")


def _spelled(algorithms: Iterable[str]) -> str:
    """Names of algorithms in words that can be broken: "DoRA of LoKr"."""
    return ", ".join(name.replace("(", " of ").replace(")", "") for name in algorithms)


def _several(counts: Mapping[str, int]) -> str:
    """How many there are of each, where there are several."""
    return counted(counts) if len(counts) > 1 else ""


def _formats(report: InspectReport) -> str:
    """The number format of the layers; how many have which, where there are several."""
    found: dict[str, int] = {}
    for row in report.rows:
        found[row.dtype] = found.get(row.dtype, 0) + 1
    return _several(found) or next(iter(found), "")


def _spread(counts: Mapping[int, int] | Mapping[float, int]) -> tuple[str, str]:
    text = spread(counts)
    value, _, rest = text.partition(",")
    return value, rest.strip()


def findings(found: Iterable[Finding]) -> Markup:
    """The suspicious layers, each with all that is said against it."""
    whys: dict[str, list[str]] = {}
    for finding in found:
        whys.setdefault(finding.layer, []).append(f"{finding.problem}: {finding.reason}")
    items = []
    for layer, said in list(whys.items())[:MOST_FINDINGS]:
        items.append(mark("li", mark("b", words(layer)), *(mark("span", words(why)) for why in said)))
    if len(whys) > MOST_FINDINGS:
        items.append(mark("li", f"and {len(whys) - MOST_FINDINGS} more, marked in the table of layers"))
    return mark("ul", *items, class_="findings") if items else Markup()


# -- training ----------------------------------------------------------------------------------------------------------
def training(report: InspectReport) -> Markup:
    """Settings, folders and words of the captions."""
    told = report.training
    groups = [mark("div", mark("h3", words(name)), _pairs(pairs)) for name, pairs in told.groups.items()]
    if told.datasets:
        pairs = {d.name: f"{d.images} pictures, {d.repeats} times" for d in told.datasets}
        groups.append(mark("div", mark("h3", "folders"), _pairs(pairs)))
    if report.settings or report.written_by:
        pairs = {"written by": report.written_by} if report.written_by else {}
        pairs |= {"algorithm" if not i else f"algorithm {i + 1}": text for i, text in enumerate(report.settings[:12])}
        groups.append(mark("div", mark("h3", "nerine"), _pairs(pairs)))
    content = [mark("div", *groups, class_="told")] if groups else []
    if told.triggers:
        chips = [mark("li", words(word, 120)) for word in told.triggers]
        content = [mark("h3", "trigger words"), mark("ul", *chips, class_="chips"), *content]
    content += [mark("h3", "words of the captions"), _tags(report)] if told.tags else []
    content += [mark("p", words(note), class_="quiet") for note in told.notes]
    return joined(content)


def _pairs(pairs: Mapping[str, str]) -> Markup:
    lines = [mark("div", mark("dt", words(name, 80)), mark("dd", words(text, 2000))) for name, text in pairs.items()]
    return mark("dl", *lines)


def _tags(report: InspectReport) -> Markup:
    tags = report.training.tags[:MOST_TAGS]
    most = max(tag.count for tag in tags)
    items = []
    for tag in tags:
        share = mark("i", style=f"width:{100 * tag.count / most:.0f}%")
        track = mark("span", share, class_="track", aria_hidden="true")
        items.append(mark("li", mark("span", words(tag.word, 80)), track, mark("span", f"{tag.count}", class_="quiet")))
    return mark("ol", *items, class_="tags")


# -- layers ------------------------------------------------------------------------------------------------------------
def layers(report: InspectReport) -> Markup:
    """Every layer, in a table that can be sorted and searched."""
    if not report.rows:
        return Markup()
    bad: dict[str, list[str]] = {}
    for finding in report.findings:
        bad.setdefault(finding.layer, []).append(finding.problem)
    shown = [column for column in _COLUMNS if any(_cell(column, row) for row in report.rows)]
    heads = [_head("layer", False), *(_head(name, name in _NUMBERS) for name in shown)]
    if bad or any(row.lacking or row.note for row in report.rows):
        heads.append(_head("note", False))
    body = [_row(row, shown, bad.get(row.layer, []), len(heads) > len(shown) + 1) for row in report.rows]
    caption = mark("caption", f"{len(report.rows)} layers in the order of the model")
    table = mark("table", caption, mark("thead", mark("tr", *heads)), mark("tbody", *body), id="layers")
    status = mark("span", f"{len(report.rows)} of {len(report.rows)} layers", id="found", class_="quiet", role="status")
    field = mark("input", id="find", type="search", placeholder="attn2, mid_block, …", autocomplete="off")
    search = mark("div", mark("label", "Show layers with ", field), status, class_="find")
    holder = mark("div", table, class_="tall", tabindex="0", role="region", aria_label="Layers, can be scrolled")
    return joined([search, holder])


_COLUMNS = ("algorithm", "rank", "alpha", "norm", "of weight", "σ₁", "eff. rank", "stable rank", "shape", "dtype")
_NUMBERS = frozenset({"rank", "alpha", "norm", "of weight", "σ₁", "eff. rank", "stable rank"})


def _cell(column: str, row: LayerRow) -> str:
    texts = {
        "algorithm": row.algorithm,
        "rank": "" if row.rank is None else str(row.rank),
        "alpha": number(row.alpha),
        "norm": number(row.norm),
        "of weight": number(row.relative),
        "σ₁": number(row.spectral),
        "eff. rank": number(row.effective_rank),
        "stable rank": number(row.stable_rank),
        "shape": " × ".join(map(str, row.shape)),
        "dtype": row.dtype,
    }
    return texts[column]


def _head(name: str, is_number: bool) -> Markup:
    return mark("th", mark("button", name, type="button"), scope="col", class_="n" if is_number else None)


def _row(row: LayerRow, columns: Iterable[str], problems: list[str], has_note: bool) -> Markup:
    cells = [mark("th", words(row.layer), scope="row")]
    cells += [mark("td", _cell(name, row), class_="n" if name in _NUMBERS else None) for name in columns]
    if has_note:
        cells.append(mark("td", words("; ".join(text for text in [*problems, row.lacking, row.note] if text))))
    return mark("tr", *cells, class_="wrong" if problems else None)


# -- the rest ----------------------------------------------------------------------------------------------------------
def leftovers(report: InspectReport) -> Markup:
    """Embeddings, tensors that were not used, and the metadata as it stands in the file."""
    content = []
    for word, own in report.embeddings.items():
        sizes = {name: " × ".join(map(str, shape)) for name, shape in own.items()}
        content += [mark("h3", "embedding ", words(word)), mark("div", _pairs(sizes), class_="told")]
    if report.unmatched:
        listed = dict(list(report.unmatched.items())[:MOST_RAW])
        content.append(_folded(f"tensors that were not used: {len(report.unmatched)}", listed))
    if report.missing:
        listed = dict.fromkeys(report.missing[:MOST_RAW], "named by the metadata, and not in the file")
        content.append(_folded(f"layers that are missing: {len(report.missing)}", listed))
    if report.metadata:
        listed = dict(list(report.metadata.items())[:MOST_RAW])
        content.append(_folded(f"all {len(report.metadata)} entries of the metadata", listed))
    return joined([mark("p", words(note, 500)) for note in report.notes] + content)


def _folded(title: str, pairs: Mapping[str, str]) -> Markup:
    return mark("details", mark("summary", title), mark("div", _pairs(pairs), class_="told raw"))


def measures(report: InspectReport) -> Markup:
    """What the numbers mean."""
    base = report.base
    said = {
        "norm": "the root of the sum of the squares of all entries of the change W′ − W that a layer's adapter makes, "
        "alpha and magnitudes in it",
        "of weight": "that norm divided by the norm of the weight itself"
        + ("" if base else "; it needs the base, which was not given"),
        "σ₁": "the largest singular value: by how much the change can stretch an input",
        "effective rank": "exp of the entropy of the shares σ²/Σσ²: how many directions really do something",
        "stable rank": "norm²/σ₁²: the same question, answered more strictly",
    }
    return mark("dl", *(part for name, text in said.items() for part in (mark("dt", name), mark("dd", text))))
