"""Help as nerine shows it: what a command does, how it is called, examples to paste, and its options in panels.

`Command` and `Group` are what typer builds commands and groups of them from. They know how parameters look, and nothing
of what a command does. The examples stand at the end of a docstring, under "Examples:", one command a line.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from typer.core import TyperCommand, TyperGroup

from nerine.cli.terminal import fitted, has_colours, paint, paragraph, say, width_of

__all__ = ["Command", "Group", "columns", "command_lines", "paint_heading", "parts_of", "summary_of", "usage_of"]

_WIDEST = 100  # columns: longer lines are not read easily
_MARKUP = re.compile(r"\[/?(?:bold|dim|italic)\]")
_EXAMPLES = re.compile(r"^Examples?:", re.MULTILINE)
_LABELS = {"str": "TEXT", "int": "N", "float": "X", "path": "PATH", "file": "PATH", "directory": "PATH", "bool": ""}
_LONGEST = 67  # letters of the line that a command has in the list of all
_TOO_LONG = 26  # columns: an option of more has its explanation on the next line


def parts_of(text: str) -> tuple[list[str], list[str]]:
    """(paragraphs, commands of the examples) of a docstring; an example goes on while its lines are indented more."""
    plain = _MARKUP.sub("", text.split("\f")[0])
    match = _EXAMPLES.search(plain)
    about, shown = (plain, "") if match is None else (plain[: match.start()], plain[match.end() :])
    commands: list[str] = []
    for line in textwrap.dedent(shown.strip("\n")).splitlines():
        if line.strip().startswith("nerine") or not commands:
            commands.append(line.strip())
        else:
            commands[-1] += f" {line.strip()}"
    paragraphs = [" ".join(one.split()) for one in re.split(r"\n\s*\n", about.strip())]
    return [one for one in paragraphs if one], [one for one in commands if one]


def summary_of(text: str) -> str:
    """The first sentence of a docstring, without its full stop."""
    paragraphs, _ = parts_of(text)
    sentence = re.split(r"(?<=\.)\s", paragraphs[0], maxsplit=1)[0].rstrip(".") if paragraphs else ""
    return sentence if len(sentence) <= _LONGEST else sentence.split(": ")[0]


def columns(rows: Iterable[tuple[str, str, str]], width: int, at: int | None = None) -> Iterator[str]:
    """Lines of (name, how it is painted, explanation) in two columns; `at` is where the second one begins."""
    found = list(rows)
    if at is None:
        at = max((len(name) for name, _, _ in found if len(name) <= _TOO_LONG), default=0) + 4
    is_stacked = width - at < 28
    for name, style, about in found:
        head = f"  {paint(name, style, sys.stdout)}"
        indent = " " * (6 if is_stacked else at)
        lines = paragraph(about, width, indent).splitlines() if about else []
        if lines and not is_stacked and len(name) + 4 <= at:
            yield head + " " * (at - len(name) - 2) + lines.pop(0).lstrip()
        else:
            yield head
        yield from lines


def usage_of(ctx: Any) -> str:
    """How a command is called: what it needs by name, and that it has options."""
    command = ctx.command
    pieces = [ctx.command_path, "[OPTIONS]"]
    if hasattr(command, "list_commands"):
        return " ".join([*pieces, "COMMAND [ARGS]..."])
    for param in command.get_params(ctx):
        if param.param_type_name == "argument":
            name = _argument(param)[0]
            pieces.append(name if param.required else f"[{name}]")
        elif param.required:
            pieces.append(f"{param.opts[0]} {_label(param, ctx)}")
    return " ".join(pieces)


def paint_heading(title: str) -> str:
    """The line over a panel."""
    return paint(f"{title}:", "bold", sys.stdout)


def command_lines(command: str, width: int, indent: str = "  ") -> Iterator[str]:
    """A command to paste: on one line, or on several that the shell takes as one, cut between its options."""
    rest = f"{indent}{command}"
    while len(rest) > width:
        at = rest.rfind(" -", len(indent) + 1, width - 2)
        if at < 0:
            at = rest.rfind(" ", len(indent) + 1, width - 2)
        if at < 0 or not rest[:at].strip():
            break
        yield f"{rest[:at]} \\"
        rest = f"{indent}    {rest[at + 1 :]}"
    yield rest


class _Helped:
    """How help looks, for commands and groups alike."""

    params: list[Any]
    help: str | None

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help; typer calls this."""
        ctx.color = has_colours(sys.stdout)
        text = "\n".join(self.lines(ctx, min(_WIDEST, width_of(sys.stdout))))
        formatter.write(fitted(text, sys.stdout) + "\n")

    def lines(self, ctx: Any, width: int) -> Iterator[str]:
        """The help, line by line."""
        paragraphs, commands = parts_of(self.help or "")
        for one in paragraphs:
            yield from (*paragraph(one, width).splitlines(), "")
        yield paint_heading("Usage")
        yield from textwrap.wrap(
            usage_of(ctx),
            width,
            initial_indent="  ",
            subsequent_indent="      ",
            break_on_hyphens=False,
        )
        if commands:
            yield from ("", paint_heading("Examples"))
            for command in commands:
                yield from command_lines(command, width)
        yield from self.members(ctx, width)
        yield from self.options(ctx, width)

    def members(self, ctx: Any, width: int) -> Iterator[str]:
        """The commands of a group; a command has none."""
        return iter(())

    def options(self, ctx: Any, width: int) -> Iterator[str]:
        """Arguments and options in their panels."""
        panels: dict[str, list[tuple[str, str, str]]] = {}
        for param in self.get_params(ctx):  # type: ignore[attr-defined]
            if getattr(param, "hidden", False):
                continue
            is_option = param.param_type_name == "option"
            panel = getattr(param, "rich_help_panel", None) or ("Options" if is_option else "Arguments")
            row = (_option_name(param, ctx), "cyan", _about(param)) if is_option else _argument(param)
            panels.setdefault(panel, []).append(row)
        last = {"Options": 1}
        for panel in sorted(panels, key=lambda name: last.get(name, 0)):
            rows = panels[panel]
            if all(name.startswith("    ") for name, _, _ in rows):  # no short names that long ones would line up with
                rows = [(name.lstrip(), style, about) for name, style, about in rows]
            yield from ("", paint_heading(panel))
            yield from columns(rows, width)


class Command(_Helped, TyperCommand):
    """A command whose help is ours."""


class Group(_Helped, TyperGroup):
    """A group of commands whose help is ours; alone it shows that and ends well."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            say("\n".join(self.alone(ctx, min(_WIDEST, width_of(sys.stdout)))))
            ctx.exit()
        rest: list[str] = super().parse_args(ctx, args)
        return rest

    def alone(self, ctx: Any, width: int) -> Iterator[str]:
        """What is shown where no command is given."""
        return self.lines(ctx, width)

    def members(self, ctx: Any, width: int) -> Iterator[str]:
        panels: dict[str, list[tuple[str, str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is None or command.hidden:
                continue
            panel = getattr(command, "rich_help_panel", None) or "Commands"
            panels.setdefault(panel, []).append((name, "cyan", summary_of(command.help or "")))
        at = max((len(row[0]) for rows in panels.values() for row in rows), default=0) + 4
        for panel, rows in panels.items():
            yield from ("", paint_heading(panel))
            yield from columns(rows, width, at)


def _argument(param: Any) -> tuple[str, str, str]:
    name = (param.metavar or param.name.upper()).strip("[]")
    return f"{name}..." if param.nargs == -1 else name, "cyan", _about(param)


def _option_name(param: Any, ctx: Any) -> str:
    """`-o, --out PATH`; a switch has no kind of value."""
    short = [one for one in param.opts if not one.startswith("--")]
    long = [one for one in param.opts if one.startswith("--")]
    names = ", ".join([*short, *long]) if short else f"    {', '.join(long)}"
    if param.secondary_opts:
        names += f" / {', '.join(param.secondary_opts)}"
    return f"{names} {_label(param, ctx)}".rstrip()


def _label(param: Any, ctx: Any) -> str:
    """What kind of value an option takes: TEXT, PATH, N, X, or nothing."""
    if param.metavar:
        return str(param.metavar)
    if param.is_flag or getattr(param, "count", False):
        return ""
    kind = param.display_type(ctx) if hasattr(param, "display_type") else getattr(param.type, "name", "text")
    word = re.sub(r"^list\[|\]$| range$", "", kind.strip("<>")).split(" ")[0].lower()
    return _LABELS.get(word, {"text": "TEXT", "integer": "N"}.get(word, "TEXT"))


def _about(param: Any) -> str:
    """The explanation, with the default where it says something."""
    text = _MARKUP.sub("", param.help or "")
    if param.required and param.param_type_name == "option":
        return f"{text} [required]"
    default = param.default
    if not param.show_default or default is None or default in ("", (), [], False, {}) or callable(default):
        return text
    if default is True and param.secondary_opts:
        return f"{text} [default: {param.opts[0]}]"
    return f"{text} [default: {default}]" if not isinstance(default, bool) else text
