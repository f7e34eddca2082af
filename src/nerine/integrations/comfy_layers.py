"""The weights of a model as ComfyUI has it loaded, under the names by which nerine finds layers.

ComfyUI's modules compute in ways of their own (casting, patching, offloading), and a model may lie anywhere when a node
runs; shapes are all that is looked at here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from nerine.errors import OptionError, UnsupportedBase
from nerine.files.rows import rows_in
from nerine.model.candidates import check_rows
from nerine.model.layer import bias_name, layer_kind
from nerine.site import Site

__all__ = ["Slot", "encoders_of", "rows_of", "slots_of"]

DENOISER, SCALE = "diffusion_model", "scale"
TEXT = ("clip_l", "clip_h", "clip_g", "t5xxl")  # in the order of pipelines; whatever else there is comes after them


@dataclass(frozen=True)
class Slot:
    """A weight: its key and that of its bias in the state dict of the model or of the text encoders ("model", "clip"),
    its path there for people, and its site."""

    where: str
    key: str
    bias: str
    shown: str
    site: Site


def slots_of(model: nn.Module | None, clip: nn.Module | None) -> dict[str, Slot]:
    """{path as nerine reads it: weight} of a model with its `diffusion_model`, and of the module of text encoders.

    Raises:
        OptionError: neither is given, or one is no such module.
    """
    found: dict[str, Slot] = {}
    if model is not None:
        inner = getattr(model, DENOISER, None)
        if not isinstance(inner, nn.Module):
            raise OptionError(f"expected a ComfyUI model with .{DENOISER}, found {type(model).__name__} without one")
        found |= _slots(inner, "model", DENOISER, DENOISER)
    if clip is not None:
        encoders = encoders_of(clip)
        if not encoders:
            raise OptionError(
                f"expected the text encoders of a ComfyUI CLIP, each with .transformer, found {type(clip).__name__}"
            )
        for part, own in encoders.items():
            inner = clip.get_submodule(own)
            found |= _slots(inner, "clip", part, own)
    if not found:
        raise OptionError("expected a MODEL, a CLIP, or both, found neither")
    return found


def encoders_of(clip: nn.Module) -> dict[str, str]:
    """{part of a pipeline: path of the text encoder}, in the numbering of the files: the first two are CLIP's, of which
    a model that may have the larger keeps the place free, and T5 comes after them."""
    held = [name for name, child in clip.named_children() if isinstance(getattr(child, "transformer", None), nn.Module)]
    names = sorted(held, key=lambda name: TEXT.index(name) if name in TEXT else len(TEXT))
    places = [name for name in TEXT if hasattr(clip, name)]  # also those that were not loaded
    places += [name for name in names if name not in places]
    numbers = {name: places.index(name) + 1 for name in names}
    return {f"text_encoder_{n}" if n > 1 else "text_encoder": f"{name}.transformer" for name, n in numbers.items()}


def _slots(root: nn.Module, where: str, part: str, own: str) -> Iterator[tuple[str, Slot]]:
    """The weights below a module: those of layers, and parameters that stand alone."""
    for name, module in root.named_modules():
        lead = f"{own}.{name}" if name else own
        site = _layer_site(module)
        if site is not None:
            path = f"{part}.{name}" if name else part
            yield path, Slot(where, f"{lead}.{_attr(module)}", f"{lead}.bias", lead, site)
        elif not layer_kind(module):
            for attr, parameter in module._parameters.items():
                if parameter is not None and parameter.dim() in (2, 3) and parameter.is_floating_point():
                    shape = tuple(parameter.shape)
                    bias = module._parameters.get(bias_name(attr))
                    has_bias = len(shape) == 2 and bias is not None and tuple(bias.shape) == shape[:1]
                    alone = Site("linear", shape[-2:], has_bias=has_bias, experts=shape[0] if len(shape) == 3 else 0)
                    path = ".".join(word for word in (part, name, attr) if word)
                    yield path, Slot(where, f"{lead}.{attr}", f"{lead}.{bias_name(attr)}", f"{lead}.{attr}", alone)


def _attr(module: nn.Module) -> str:
    """What the weight of a layer is called; that of a norm may be called its scale, as in Flux."""
    return SCALE if "norm" in type(module).__name__.lower() and SCALE in module._parameters else "weight"


def _layer_site(module: nn.Module) -> Site | None:
    """Kind and shape of a layer's weight; None where it is no layer, or has no weight."""
    shape = getattr(getattr(module, _attr(module), None), "shape", None)
    if shape is None:
        return None
    shape = tuple(int(size) for size in shape)
    has_bias = getattr(module, "bias", None) is not None
    kind = "norm" if _attr(module) == SCALE else layer_kind(module)
    if kind in ("linear", "") and hasattr(module, "in_features") and hasattr(module, "out_features"):
        sizes: tuple[int, int] = (module.out_features, module.in_features)  # type: ignore[assignment]
        return Site("linear", sizes, has_bias=has_bias)  # whatever is stored
    if kind == "linear":
        return Site("linear", shape[::-1], has_bias=has_bias, flipped=True)
    if kind == "conv":
        return Site("conv", shape, groups=module.groups, has_bias=has_bias)  # type: ignore[arg-type]
    if kind == "transposed":
        groups: int = module.groups  # type: ignore[assignment]
        turned = (shape[1] * groups, shape[0] // groups, *shape[2:])
        return Site("transposed", turned, groups=groups, has_bias=has_bias)
    if kind == "embedding":
        return Site("embedding", shape[::-1], flipped=True)
    if kind == "norm":
        return Site("norm", shape, has_bias=has_bias, opaque=True)
    return None


def rows_of(slots: Mapping[str, Slot], keys: Iterable[str]) -> dict[str, Site]:
    """The sites of adapters on some rows of a weight, whose names in a file end in [start:stop]."""
    sites = {}
    for start, stop in rows_in(keys):
        for path, slot in slots.items():
            try:
                check_rows(slot.site, (start, stop), path, False)
            except (UnsupportedBase, OptionError):
                continue  # this layer is not the one that the name means
            sites[f"{path}[{start}:{stop}]"] = slot.site.rows(stop - start)
    return sites
