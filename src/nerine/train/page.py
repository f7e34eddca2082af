"""The page of a run: what came of it, one HTML file that needs nothing else, in light and dark, on a desk or a phone.

It is made from the folder of the run and a few numbers, and knows nothing of models or optimisers. Captions, prompts
and paths are texts to be read and never markup: all of them go through `words` and `mark`.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

from nerine.errors import MissingExtra, NerineError
from nerine.files.atomic import write_text
from nerine.tools.inspect import inspect
from nerine.tools.inspect.text import bytes_of
from nerine.tools.pages.heat import heat_map
from nerine.tools.pages.marks import Markup, joined, mark, words
from nerine.tools.pages.plots import depth_plot, rank_histogram, spectra_plot
from nerine.tools.pages.sections import facts as adapter_facts
from nerine.tools.pages.sections import findings, section
from nerine.train.config import to_toml
from nerine.train.curve import curve_svg, draw_curve, is_empty, smoothing
from nerine.train.film import evenly, film
from nerine.train.history import History, spoken
from nerine.train.settings import Subset, TrainSettings, keys
from nerine.version import __version__

__all__ = ["RunSummary", "page", "write_report"]

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
MOST_ROWS, MOST_TRIES = 200, 60  # of a table of the data, and of validations
CHANCE = "A step's loss depends on the noise and the times drawn for it: what the run learns is in the averages."
RISEN = 1.05  # a validation above its best times this is worth a word


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A run as its page tells it. `steps` are those that were planned; how many were made the history says. `folder` is
    the run's own, `adapter` the file that came of it, `data` a DataReport as a dict, `params` the trained numbers."""

    settings: TrainSettings
    history: History
    folder: Path
    adapter: Path | None
    data: Mapping[str, Any]
    steps: int
    seconds: float
    layers: int
    params: int
    base: str
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.settings.output.name

    @property
    def made(self) -> int:
        """Steps that were made."""
        return max((step for step, _ in self.history.losses()), default=0)

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the best validation after the beginning."""
        tried = [(step, loss) for step, loss in self.history.validations() if step and math.isfinite(loss)]
        return min(tried, key=lambda one: (one[1], one[0]), default=None)


def write_report(run: RunSummary) -> tuple[Path, tuple[str, ...]]:
    """Write report.html, and loss.png where matplotlib is installed, into the folder of the run: (the page, notes), of
    which one says so where there is no picture of the curve.

    Raises:
        MissingExtra: there are samples and Pillow is not installed.
        FormatError: the folder does not exist.
    """
    notes = run.notes
    try:
        if is_empty(run.history):
            notes = (*notes, "loss.png was left out: no step has a finite loss")
        else:
            draw_curve(run.history, run.folder / "loss.png", run.name)
    except MissingExtra as error:
        notes = (*notes, f"loss.png was left out: {error}")
    file = run.folder / "report.html"
    write_text(file, page(run, notes))
    return file, notes


def page(run: RunSummary, notes: Sequence[str] | None = None) -> str:
    """The HTML; nothing is fetched and nothing runs, and the page says so to the browser, too. `notes` in place of the
    run's own.

    Raises:
        MissingExtra: there are samples and Pillow is not installed.
    """
    styles = [("nerine.tools.pages", "page.css"), ("nerine.train", "page.css")]
    style = "".join(resources.files(package).joinpath(name).read_text(encoding="utf-8") for package, name in styles)
    head = [
        Markup('<meta charset="utf-8">'),
        mark("meta", name="viewport", content="width=device-width, initial-scale=1"),
        mark("meta", name="color-scheme", content="light dark"),
        mark("meta", http_equiv="Content-Security-Policy", content=POLICY),
        mark("title", words(f"{run.name} · nerine train", 200)),
        Markup(f"<style>{style}</style>"),
    ]
    content = [
        _facts(run),
        section("Loss", CHANCE, curve_svg(run.history)),
        section("Pictures on the way", "", film(run.folder / "samples", run.settings.samples.prompts)),
        section("Validation", "The loss of pictures that are kept out of the training.", _validations(run)),
        section("Notes", "", _list(run.notes if notes is None else notes)),
        *_adapter(run),
        section("Data", "", *_data(run.data)),
        section("Settings", "", *_settings(run.settings)),
        section("To run it again", "", *_again(run)),
    ]
    footer = mark("footer", mark("p", f"Made by nerine {__version__}."))
    html = mark("html", mark("head", *head), mark("body", _header(run), mark("main", *content), footer), lang="en")
    return f"<!doctype html>\n{html}\n"


# -- at a glance -------------------------------------------------------------------------------------------------------
def _header(run: RunSummary) -> Markup:
    broken = sum(not math.isfinite(loss) for _, loss in run.history.losses())
    is_wrong = bool(broken) or run.made < run.steps
    verdict = [mark("span", "!" if is_wrong else "✓", aria_hidden="true"), mark("span", words(_verdict(run, broken)))]
    return mark(
        "header",
        mark("h1", words(run.name, 160)),
        mark("p", words(f"{run.folder}, fine-tuned from {run.base}", 400), class_="path"),
        mark("p", *verdict, class_="verdict wrong" if is_wrong else "verdict"),
    )


def _verdict(run: RunSummary, broken: int) -> str:
    """One line: steps, time, the loss at the end, the best validation."""
    made = f"{run.made:,}" if run.made == run.steps else f"{run.made:,} of {run.steps:,}"
    said = [f"{made} step{'s' if run.steps != 1 else ''} in {_time(run.seconds)}"]
    last = smoothing(run.history.losses()).last
    said += [f"loss {spoken(last)} at the end"] if last is not None else []
    if run.best is not None:
        said.append(f"best validation {spoken(run.best[1])} at step {run.best[0]:,}")
    said += [f"the loss was not finite in {broken} step{'s' if broken != 1 else ''}"] if broken else []
    return "; ".join(said)


def _facts(run: RunSummary) -> Markup:
    losses, optimizer, adapter = run.history.losses(), run.settings.optimizer, run.settings.adapter
    average = smoothing(losses)
    seconds, memory = ([value for _, value in run.history.column(name)] for name in ("seconds", "memory"))
    rates, norms = ([v for _, v in run.history.column(n) if math.isfinite(v)] for n in ("lr", "grad_norm"))
    rules = adapter.rules is not None
    rank = f"rank {adapter.rank}" if adapter.rank is not None and not rules else ""
    together = optimizer.batch_size * optimizer.accumulate
    found: list[tuple[str, object, str]] = [
        ("base", Path(run.base).name, ""),
        ("adapter", "by rules" if rules else ("DoRA of " if adapter.dora else "") + adapter.algo, rank),
        ("trained numbers", f"{run.params:,}", f"in {run.layers} layer{'s' if run.layers != 1 else ''}"),
        ("pictures", run.data.get("pictures", ""), f"{together} a step in each process"),
        ("time a step", f"{median(seconds):.3g} s" if seconds else "", "median"),
        ("most memory", bytes_of(int(max(memory))) if memory and max(memory) > 0 else "", ""),
        ("loss", spoken(average.last), f"at first {spoken(average.points[0][1])}" if average.points else ""),
        ("learning rate", f"{max(rates):.3g}" if rates else "", f"{optimizer.optimizer}, {optimizer.schedule}"),
        ("gradients' norm", spoken(median(norms)) if norms else "", f"median; most {spoken(max(norms, default=0.0))}"),
        ("seed", f"{optimizer.seed}", ""),
    ]
    tiles = [
        mark(
            "div", mark("dt", label), mark("dd", words(value, 80), *([mark("small", words(more, 80))] if more else []))
        )
        for label, value, more in found
        if value != ""
    ]
    return mark("dl", *tiles, class_="facts run")


def _small(more: str) -> list[Markup]:
    return [mark("small", words(more, 80))] if more else []


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


# -- validation --------------------------------------------------------------------------------------------------------
def _validations(run: RunSummary) -> Markup:
    tried, averaged = run.history.validations(), dict(run.history.validations(ema=True))
    if not tried:
        return Markup()
    said, best = [], run.best
    if best is not None and tried[-1][0] > best[0] and not tried[-1][1] <= best[1] * RISEN:
        text = f"It was best at step {best[0]:,} ({spoken(best[1])}) and is {spoken(tried[-1][1])} at the end: "
        said.append(mark("p", text + "fewer steps, or a checkpoint from about there, may serve better."))
    shown = [tried[at] for at in evenly(len(tried), MOST_TRIES)]
    if best is not None and best not in shown:
        shown = sorted([*shown, best])
    heads = ["step", "loss", *(["of the averaged values (EMA)"] if averaged else []), ""]
    rows = []
    for step, loss in shown:
        cells = [spoken(loss, 4), *([spoken(averaged.get(step), 4)] if averaged else [])]
        note = "best" if (step, loss) == best else "before the training" if step == 0 else ""
        rows.append([f"{step:,}", *cells, note])
    return joined([*said, _table("Validations", heads, rows)])


def _table(label: str, heads: Sequence[str], rows: Iterable[Sequence[str]], class_: str = "fit") -> Markup:
    """A table whose first column names the rows."""
    top = [mark("thead", mark("tr", *(mark("th", words(head), scope="col") for head in heads)))] if any(heads) else []
    body = [
        mark("tr", mark("th", words(first, 400), scope="row"), *(mark("td", _cell(text)) for text in rest))
        for first, *rest in rows
    ]
    place = {"class_": f"tall {class_}", "tabindex": "0", "role": "region", "aria_label": f"{label}, can be scrolled"}
    return mark("div", mark("table", *top, mark("tbody", *body)), **place)


def _cell(text: str) -> Markup:
    return text if isinstance(text, Markup) else words(text, 2000)


# -- the adapter -------------------------------------------------------------------------------------------------------
def _adapter(run: RunSummary) -> Iterator[Markup]:
    """What `nerine inspect` says of the file, in short."""
    if run.adapter is None:
        return
    try:
        report = inspect(run.adapter)
    except (NerineError, OSError) as error:
        text = f"{run.adapter} could not be inspected: {error}"
        yield section("The adapter", "", mark("p", words(text, 1000)))
        return
    bad = len({finding.layer for finding in report.findings})
    verdict = f"{bad} suspicious layer{'s' if bad != 1 else ''}" if bad else "No suspicious layers"
    where = mark("p", words(f"{run.adapter}. {verdict}; nerine inspect tells more.", 500))
    yield section("The adapter", "", where, adapter_facts(report), findings(report.findings))
    maps = []
    for component in sorted(report.components):
        drawn = heat_map(report, "" if component == "model" else component)
        named = [mark("h3", words(component))] if len(report.components) > 1 and drawn else []
        maps += [mark("div", *named, drawn)] if drawn else []
    yield section("Where it acts", "The norm of the change, by block and kind of layer.", *maps)
    yield section("By depth", "The norm of each layer's change, in the order of the model.", depth_plot(report))
    small = [
        section("Spectra", "Singular values of the change, each layer's divided by its largest.", spectra_plot(report)),
        section("Effective ranks", "How many directions of each layer really do something.", rank_histogram(report)),
    ]
    if any(small):
        yield mark("div", *small, class_="pair")


# -- data --------------------------------------------------------------------------------------------------------------
def _data(data: Mapping[str, Any]) -> list[Markup]:
    """Numbers, buckets, and what was skipped and why; what is not known here by name is told as it is."""
    plain = [(name, value) for name, value in data.items() if isinstance(value, bool | int | float | str)]
    lines = [mark("div", mark("dt", _spaced(name)), mark("dd", words(value, 2000))) for name, value in plain]
    content = [mark("div", mark("dl", *lines), class_="told")] if lines else []
    for name, value in data.items():
        if isinstance(value, Mapping | list | tuple) and value:
            content += _several(name, value)
    return content


def _several(name: str, value: Mapping[str, Any] | Sequence[Any]) -> Iterator[Markup]:
    rows = (
        [[str(key), *_cells(one)] for key, one in value.items()] if isinstance(value, Mapping) else list(_rows(value))
    )
    wide = max(map(len, rows))
    known = {"buckets": ("width × height", "pictures"), "skipped": ("picture", "why")}
    heads = (*known.get(name, ()), *[""] * wide)[:wide]
    rows = [[*row, *[""] * (wide - len(row))] for row in rows]
    title = f"{_spaced(name)}: {len(rows)}"
    table = _table(_spaced(name), heads, rows[:MOST_ROWS])
    more = [mark("p", f"and {len(rows) - MOST_ROWS} more, in data.json")] if len(rows) > MOST_ROWS else []
    if len(rows) > 12:
        yield mark("details", mark("summary", words(title)), table, *more)
    else:
        yield joined([mark("h3", words(title)), table])


def _rows(values: Mapping[str, Any] | Sequence[Any]) -> Iterator[list[str]]:
    if isinstance(values, Mapping):
        values = [(key, *_cells(one)) for key, one in values.items()]
    for value in values:
        yield list(map(str, value.values())) if isinstance(value, Mapping) else _cells(value)


def _cells(value: Any) -> list[str]:
    return list(map(str, value)) if isinstance(value, list | tuple) else [str(value)]


def _spaced(name: str) -> Markup:
    return words(str(name).replace("_", " "), 80)


# -- settings ----------------------------------------------------------------------------------------------------------
def _settings(settings: TrainSettings) -> list[Markup]:
    """Those that differ from the defaults, and, folded, all others."""
    own: list[list[str]] = []
    others: list[list[str]] = []
    for one in keys():
        value = getattr(getattr(settings, one.section), one.name)
        differs = value != one.default
        row = [f"{one.section}.{one.name}", _shown(value), *([_shown(one.default)] if differs else []), one.about]
        (own if differs else others).append(row)
    content = [_table("Settings", ("setting", "value", "default", "what it is"), own, "settings")] if own else []
    for number, subset in enumerate(settings.subsets, 1):
        given = ((field.name, getattr(subset, field.name)) for field in fields(Subset))
        rows = [[name, _shown(value)] for name, value in given if value is not None and value is not False]
        content += [mark("h3", f"subset {number}"), _table(f"Subset {number}", ("setting", "value"), rows, "settings")]
    rest = _table("Settings at their defaults", ("setting", "value", "what it is"), others, "settings")
    folded = mark("details", mark("summary", f"{len(others)} settings are as the defaults"), rest)
    return [*content, folded] if others else content


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} = {_shown(one)}" for name, one in value.items()) or "none"
    if isinstance(value, tuple):
        return joined([words(one, 2000) for one in value], "\n") or "none"
    return str(value) or '""'


def _again(run: RunSummary) -> list[Markup]:
    command = f"nerine train {shlex.quote(str(run.folder / 'settings.toml'))} --out another-folder"
    lines = [words(line, 100_000) for line in to_toml(run.settings).splitlines()]
    return [
        mark("p", "The same seed, data and number of processes give the same run."),
        mark("pre", words(command, 10_000), tabindex="0"),
        mark("details", mark("summary", "settings.toml"), mark("pre", joined(lines, "\n"), tabindex="0")),
    ]


def _list(notes: Sequence[str]) -> Markup:
    return mark("ul", *(mark("li", words(note, 1000)) for note in notes), class_="notes") if notes else Markup()
