"""Presets: which layers a word such as "attn-only" means, as data beside this file and not as lists of classes.

Each TOML file has a section for the denoiser of a pipeline and one for its text encoders; a section that is not there
takes nothing. What the words in it stand for is worked out by `nerine.model.structure`, so that a preset means the same
in a model that nobody has seen yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import nn

from nerine.errors import OptionError, TargetError, nearest
from nerine.model.candidates import Candidate, candidates_of
from nerine.model.patterns import lineage, matches
from nerine.model.structure import ROLES, WEIGHTS, Structure
from nerine.model.toml import check_keys, parse, words_of

__all__ = ["PRESETS", "Chosen", "Preset", "choose", "is_preset", "preset_of", "select", "why_nothing"]

_HOME = files("nerine.model.presets")
PRESETS = tuple(sorted(file.name[:-5] for file in _HOME.iterdir() if file.name.endswith(".toml")))
_COMPONENTS = ("denoiser", "text_encoder")
_DENOISERS = ("unet", "transformer", "transformer_2", "prior", "decoder", "denoiser", "diffusion_model", "dit")
_KINDS = ("linear", "pointwise", "conv")


@dataclass(frozen=True)
class Section:
    """What a preset takes of one kind of model.

    `where` are roles of `nerine.model.structure` or "model", and `kinds` what is taken there: "linear",
    "pointwise" (convolutions of 1x1) and "conv" (larger ones). `unet` are paths taken besides where a model has blocks
    of convolutions, `leave_out` patterns never taken. `otherwise` stands for `where` in a model without blocks.
    On the layers of the roles `on_input`, an algorithm that can act on the input does.
    """

    where: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    unet: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    on_input: tuple[str, ...] = ()
    otherwise: str = ""


@dataclass(frozen=True)
class Preset:
    """A preset by its name, with a sentence about it and its sections by component."""

    name: str
    about: str
    sections: Mapping[str, Section] = field(default_factory=dict)

    @property
    def takes_all(self) -> bool:
        """Whether it takes everything of whatever it is put to, so that nothing has to be worked out."""
        whole = Section(where=("model",), kinds=_KINDS)
        return all(self.sections.get(part) == whole for part in _COMPONENTS)

    @staticmethod
    def read(text: str, name: str) -> Preset:
        """The preset of a TOML text.

        Raises:
            OptionError: it is no preset; the message says which key of which section is wrong.
        """
        data = parse(text, name)
        check_keys(data, ("about", *_COMPONENTS), name)
        return Preset(
            name,
            str(data.get("about", "")),
            {part: _section(data[part], f"{name}, [{part}]") for part in _COMPONENTS if part in data},
        )


@dataclass(frozen=True)
class Chosen:
    """Paths that a preset takes, in the order of the model, and those of them that are adapted on their input."""

    paths: tuple[str, ...]
    on_input: frozenset[str] = frozenset()


def is_preset(word: object) -> bool:
    """Whether a word stands for a preset: one of ours, or a TOML file of one's own."""
    return isinstance(word, str) and (word in PRESETS or word.endswith(".toml"))


def preset_of(word: str) -> Preset:
    """The preset of that name or in that file.

    Raises:
        OptionError: there is none.
    """
    if word in PRESETS:
        return Preset.read(_HOME.joinpath(f"{word}.toml").read_text(encoding="utf-8"), word)
    if not word.endswith(".toml"):
        raise OptionError(f"no preset is called {word!r}. {nearest(word, PRESETS)}")
    try:
        return Preset.read(Path(word).read_text(encoding="utf-8"), word)
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{word}: the preset cannot be read: {error}") from error


def select(model: nn.Module, preset: str, component: str = "") -> tuple[str, ...]:
    """The paths of the layers that a preset chooses, in the order of the model.

    `component` says what the model is, "denoiser" or "text_encoder"; "" works it out. In an nn.ModuleDict of the parts
    of a pipeline (unet, transformer, text_encoder, text_encoder_2, ...) each part has its own section, and parts of
    other names get nothing.

    Raises:
        OptionError: no such preset or component.
        TargetError: it chooses nothing here.
    """
    found = preset_of(preset)
    paths = choose(model, found, component).paths
    if not paths:
        raise TargetError(why_nothing(model, found, component))
    return paths


def choose(model: nn.Module, preset: Preset, component: str = "") -> Chosen:
    """As `select`, with what is adapted on its input; nothing is no error."""
    if component not in ("", *_COMPONENTS):
        raise OptionError(f"component must be 'denoiser', 'text_encoder' or '', got {component!r}")
    parts = {} if component or preset.takes_all else _parts(model)
    paths: list[str] = []
    on_input: set[str] = set()
    for name, part in parts.items() if parts else [("", component)]:
        lead = f"{name}." if name else ""
        found = _choose_in(model.get_submodule(name), preset, part)
        paths += [f"{lead}{path}" for path in found.paths]
        on_input |= {f"{lead}{path}" for path in found.on_input}
    return Chosen(tuple(paths), frozenset(on_input))


def _choose_in(model: nn.Module, preset: Preset, component: str) -> Chosen:
    if preset.takes_all:
        return Chosen(tuple(c.path for c in candidates_of(model) if c.layer_kind in WEIGHTS))
    structure = Structure(model)
    component = component or ("text_encoder" if structure.is_text_encoder() else "denoiser")
    section = preset.sections.get(component, Section())
    where = set(section.where)
    if not structure.has_blocks and section.otherwise:
        where = {section.otherwise}
    is_unet = any("convolution" in roles for roles in structure.roles.values())
    paths = []
    for path, candidate in structure.candidates.items():
        roles = structure.roles[path] | {"model"}
        above = lineage(model, path)
        taken = bool(where & roles) and _kind(candidate) in section.kinds
        besides = is_unet and path in section.unet
        left = any(matches(pattern, path, candidate.module, above) for pattern in section.leave_out)
        if (taken or besides) and not left:
            paths.append(path)
    return Chosen(tuple(paths), frozenset(p for p in paths if structure.roles[p] & set(section.on_input)))


def _section(table: Any, where: str) -> Section:
    if not isinstance(table, dict):
        raise OptionError(f"{where}: expected a table, got {table!r}")
    check_keys(table, Section.__dataclass_fields__, where)
    places = ("model", *ROLES)
    otherwise = table.get("otherwise", "")
    if otherwise not in ("", *places):
        raise OptionError(f"{where}: otherwise knows no {otherwise!r}. {nearest(str(otherwise), places)}")
    return Section(
        words_of(table, "where", where, places),
        words_of(table, "kinds", where, _KINDS),
        words_of(table, "unet", where),
        words_of(table, "leave_out", where),
        words_of(table, "on_input", where, ROLES),
        otherwise,
    )


def _parts(model: nn.Module) -> dict[str, str]:
    """The parts of a pipeline in a ModuleDict and which component each is; empty for any other model."""
    if not isinstance(model, nn.ModuleDict):
        return {}
    found = {name: "denoiser" if name in _DENOISERS else "" for name in model}
    found |= {name: "text_encoder" for name in model if name.startswith("text_encoder")}
    return {name: part for name, part in found.items() if part}


def _kind(candidate: Candidate) -> str:
    if candidate.layer_kind == "linear":
        return "linear"
    return "conv" if any(k > 1 for k in candidate.holder.kernel_size) else "pointwise"  # type: ignore[union-attr]


def why_nothing(model: nn.Module, preset: Preset, component: str = "") -> str:
    """What to say where a preset chooses nothing."""
    candidates = [c for c in candidates_of(model) if c.layer_kind in WEIGHTS]
    name = type(model).__name__
    if not candidates:
        return f"{name} has no layer of a kind that nerine knows, so there is nothing to adapt"
    shown = ", ".join(f"{c.path} ({c.kind})" for c in candidates[:6])
    end = f"Candidates: {shown}{', ...' if len(candidates) > 6 else ''} ({len(candidates)} in all)"
    if "text_encoder" not in preset.sections and not component and not _parts(model):
        end = (
            f"It takes nothing of text encoders, as which a model counts that embeds tokens and has no time step. {end}"
        )
    return f"the preset {preset.name!r} ({preset.about}) chooses no layer of {name}. {end}"
