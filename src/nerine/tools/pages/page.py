"""`page`: an inspection as one HTML file that needs nothing else, in light and dark, on a desk or a phone."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from pathlib import PurePath

from nerine.tools.inspect.report import InspectReport
from nerine.tools.pages.heat import heat_map
from nerine.tools.pages.marks import Markup, mark, words
from nerine.tools.pages.plots import depth_plot, rank_histogram, spectra_plot
from nerine.tools.pages.sections import facts, findings, layers, leftovers, measures, section, training
from nerine.version import __version__

__all__ = ["page"]


def page(report: InspectReport, title: str | None = None) -> str:
    """The HTML of a report. `title` stands above it; without, what the file calls itself, or its name.

    Nothing is fetched and nothing runs but the sorting of the table: the page says so to the browser, too.
    """
    name = title or report.training.groups.get("about", {}).get("title") or PurePath(report.file).name
    style, script = _asset("page.css"), _asset("page.js")
    head = [
        Markup('<meta charset="utf-8">'),
        mark("meta", name="viewport", content="width=device-width, initial-scale=1"),
        mark("meta", name="color-scheme", content="light dark"),
        mark("meta", http_equiv="Content-Security-Policy", content=_policy(script)),
        mark("title", words(f"{name} · nerine", 200)),
        Markup(f"<style>{style}</style>"),
    ]
    body = [
        mark("a", "To the layers", href="#layers", class_="skip"),
        _header(report, name),
        mark("main", facts(report), *_pictures(report), *_words(report)),
        mark(
            "footer", mark("h2", "What the numbers mean"), measures(report), mark("p", f"Made by nerine {__version__}.")
        ),
        Markup(f"<script>{script}</script>"),
    ]
    html = mark("html", mark("head", *head), mark("body", *body), lang="en")
    return f"<!doctype html>\n{html}\n"


def _asset(name: str) -> str:
    return resources.files(__package__ or "nerine.tools.pages").joinpath(name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """What the browser may do with the page: show it, and run this one script."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"{allowed}; base-uri 'none'; form-action 'none'"


def _header(report: InspectReport, name: str) -> Markup:
    count = len({finding.layer for finding in report.findings})
    said = f"{count} suspicious layer{'s' if count > 1 else ''}" if count else "No suspicious layers"
    verdict = mark(
        "p",
        mark("span", "!" if count else "✓", aria_hidden="true"),
        said,
        class_="verdict wrong" if count else "verdict",
    )
    base = f", measured against {report.base}" if report.base else ""
    return mark(
        "header", mark("h1", words(name, 160)), mark("p", words(report.file + base, 400), class_="path"), verdict
    )


def _pictures(report: InspectReport) -> list[Markup]:
    relative = any(row.relative is not None for row in report.rows)
    what = "change relative to the weight" if relative else "norm of the change"
    maps = []
    for component in sorted(report.components):
        drawn = heat_map(report, "" if component == "model" else component)
        named = [mark("h3", component)] if len(report.components) > 1 else []
        maps += [mark("div", *named, drawn)] if drawn else []
    both = [mark("div", *maps[1:], class_="maps")] if maps[1:] else []
    small = [
        section("Spectra", "Singular values of the change, each layer's divided by its largest.", spectra_plot(report)),
        section("Effective ranks", "How many directions of each layer really do something.", rank_histogram(report)),
    ]
    return [
        section("Suspicious layers", "", findings(report.findings)),
        section(
            "Where it acts",
            f"The {what}, by block and kind of layer. Hover over a field for its number.",
            *maps[:1],
            *both,
        ),
        section("By depth", f"The {what} of each layer, in the order in which the model runs.", depth_plot(report)),
        mark("div", *small, class_="pair") if any(small) else Markup(),
    ]


def _words(report: InspectReport) -> list[Markup]:
    return [
        section("Training", "What the file says of its making.", training(report)),
        section("Layers", "", layers(report)),
        section("The rest of the file", "", leftovers(report)),
    ]
