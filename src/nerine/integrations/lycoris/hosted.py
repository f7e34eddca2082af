"""One adapter as LyCORIS shows it: a module that a host owns, under LyCORIS's names for its tensors and settings.

`state_dict` speaks LyCORIS's keys and `load_state_dict` takes them; inside there is an ordinary `Adapter`, which the
layer refers to once `apply_to` has put it there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nerine.algorithms import Params
from nerine.axes import Layout
from nerine.errors import ShapeError
from nerine.files.checkpoint import Record
from nerine.files.dialects.base import canonical, rank_of
from nerine.files.pieces import ALPHA
from nerine.model.adapter import Adapter, check_strength
from nerine.model.attach import take_off
from nerine.model.fitting import put_in
from nerine.model.forward import added
from nerine.model.mount import MOUNTS, Mount, Spot, bias_at, names_in, original_at, weight_at
from nerine.model.network import Network
from nerine.ops.precision import full_precision, same_dtype, wide

__all__ = ["Hosted", "free_name", "strengths"]

Pair = tuple[Tensor, Tensor | None]


def free_name(model: nn.Module, stem: str) -> str:
    """A name that no adapter of `model` has: `stem`, or `stem` with a number."""
    taken = names_in(model)
    number = 1
    while (found := stem if number == 1 else f"{stem}_{number}") in taken:
        number += 1
    return found


class Hosted(nn.Module):
    """An adapter for one layer. `multiplier` is its strength; `org_module[0]` the layer; `adapter` holds the tensors.

    The tensors are reached under LyCORIS's names as well: `module.lokr_w1`, `module.lora_up.weight`.
    """

    not_supported = False
    algo: ClassVar[str] = ""

    def _hold(self, lora_name: str, spot: Spot, adapter: Adapter) -> None:
        self.lora_name = lora_name
        self.adapter = adapter
        self.spot = spot
        self.org_module = [spot.holder]  # in a list, where torch does not register it: it belongs to the model
        self.applied_as = ""
        self.register_state_dict_post_hook(_speak)
        self.register_load_state_dict_pre_hook(_listen)

    @classmethod
    def of(cls, lora_name: str, spot: Spot, adapter: Adapter) -> Hosted:
        """A module around an adapter that is made already."""
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._hold(lora_name, spot, adapter)
        return module

    def _apply(self, fn: Any, recurse: bool = True) -> Hosted:
        """Move with the host's network; a change of number format, said of the network itself, is meant."""
        super()._apply(fn, recurse)
        meant = fn(torch.empty(0, dtype=self.dtype)).dtype
        if meant != self.dtype:
            self.adapter.cast(meant)
        return self

    # -- what it is ----------------------------------------------------------------------------------------------
    @property
    def multiplier(self) -> float:
        """The strength; 0 is the base."""
        return self.adapter.strength

    @multiplier.setter
    def multiplier(self, value: float) -> None:
        check_strength(value)
        self.adapter.strength = float(value)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the layer's weight, `[out, in/groups, *k]`."""
        return self.adapter.site.shape

    @property
    def dim(self) -> int:
        """The number of outputs."""
        return self.shape[0]

    @property
    def module(self) -> type[nn.Module]:
        """The class of the layer."""
        return type(self.spot.holder)

    @property
    def lora_dim(self) -> int:
        """The rank, or the size of the blocks of a rotation."""
        layout = self.layout
        p = self.adapter.params()
        for name, spec in layout.specs.items():
            if "s" in spec.words:
                return int(p.tensors[name].shape[spec.words.index("s")])
        return rank_of(p, layout, self.adapter.site)

    @property
    def scale(self) -> float:
        """alpha over the rank."""
        return self.adapter.scale

    @property
    def alpha(self) -> Tensor:
        """alpha as files have it, 0-d."""
        rank = rank_of(self.adapter.params(), self.layout, self.adapter.site) if self.layout.alpha == "scale" else 1
        return torch.tensor(self.adapter.scale * rank)

    @property
    def layout(self) -> Layout:
        """The layout of the tensors."""
        return self.adapter.algorithm.layout_of(self.adapter.params().without("scalar").tensors)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(self.adapter, self.adapter.names[0]).dtype
        return dtype

    @property
    def device(self) -> torch.device:
        return self.adapter.device

    @property
    def org_weight(self) -> Tensor:
        """The weight of the layer, as it is without any adapter."""
        return self._original().detach()

    def _original(self) -> Tensor:
        mount = self._mount()
        return weight_at(self.spot.holder, self.spot) if mount is None else original_at(self.spot.holder, mount)

    def _mount(self) -> Mount | None:
        mounts: Mapping[str, Mount] = self.spot.holder.__dict__.get(MOUNTS, {})
        return mounts.get(self.spot.key)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "adapter" not in self._modules:
                raise
        for own, spec in self.layout.specs.items():
            if spec.key == name:
                return getattr(self.adapter, own)
            if spec.key == f"{name}.weight":
                return SimpleNamespace(weight=getattr(self.adapter, own))
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    # -- on and off ----------------------------------------------------------------------------------------------
    def apply_to(self, **_: Any) -> None:
        """Put the adapter on its layer."""
        if not self.applied_as:
            name = free_name(self.spot.holder, "lycoris")
            put_in(self.spot.caller or self.spot.holder, [(self.spot, self.adapter)], name, own=False, freeze=False)
            self.applied_as = name

    def restore(self) -> None:
        """Take it off; the layer is bitwise what it was."""
        if self.applied_as:
            take_off(self.spot.caller or self.spot.holder, self.applied_as)
            self.applied_as = ""

    @contextmanager
    def _on(self) -> Iterator[Network]:
        """On the layer at least for the length of a `with` block."""
        was = self.applied_as
        self.apply_to()
        try:
            yield Network(self.spot.caller or self.spot.holder, [self.applied_as])
        finally:
            if not was:
                self.restore()

    def merge_to(self, multiplier: float = 1.0) -> None:
        """Put it into the weight for good, at this strength."""
        with self._on() as network, strengths([self], multiplier):
            network.merge(keep_original=False)

    # -- what it does --------------------------------------------------------------------------------------------
    @torch.no_grad()
    def get_diff_weight(self, multiplier: float = 1.0, shape: Any = None, device: Any = None) -> Pair:
        """(multiplier·(W' - W), that of the bias or None), in at least fp32."""
        weight = wide(self._original().detach())
        p = self.adapter.ready(weight.device)
        with full_precision(weight):
            change = self.adapter.weight_deviation(p, weight) * multiplier
        shift = self.adapter.algorithm.shift(p)
        return _shaped(change, shape, device), None if shift is None else (shift * multiplier).to(device)

    @torch.no_grad()
    def get_merged_weight(self, multiplier: float = 1.0, shape: Any = None, device: Any = None) -> Pair:
        """(W + multiplier·(W' - W), the bias likewise or None), in at least fp32."""
        change, shift = self.get_diff_weight(multiplier, None, None)
        bias = bias_at(self.spot.holder, self.spot)
        moved = bias if shift is None or bias is None else wide(bias.detach()) + shift
        whole = _shaped(wide(self._original().detach()) + change, shape, device)
        return whole, None if moved is None else moved.to(device)

    def bypass_forward_diff(self, x: Tensor, scale: float = 1) -> Tensor:
        """scale·(what it adds to the layer's output for the input `x`)."""
        with self._off():
            y = self.spot.holder(x)
        mount = Mount(self.spot.path, self.spot.site, self.spot.attr, self.spot.rows)
        change = added(self.spot.holder, mount, self.adapter, x, y)
        return same_dtype(change / self.multiplier * scale if self.multiplier else change * 0, y)

    def bypass_forward(self, x: Tensor, scale: float = 1) -> Tensor:
        """The layer's output with scale·(what it adds)."""
        with self._off():
            y: Tensor = self.spot.holder(x)
        return y + self.bypass_forward_diff(x, scale)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with this adapter in it."""
        with self._on():
            y: Tensor = self.spot.holder(x, *args, **kwargs)
        return y

    @contextmanager
    def _off(self) -> Iterator[None]:
        mount, name = self._mount(), self.applied_as
        if mount is None or not name or name in mount.off:
            yield
            return
        mount.off.add(name)
        try:
            yield
        finally:
            mount.off.discard(name)

    @torch.no_grad()
    def apply_max_norm(self, max_norm: float, device: Any = None) -> tuple[int, float]:
        """Shrink it where |W' - W| is larger; (1 where it was, the norm now)."""
        with self._on() as network:
            found = network.max_norm(max_norm)
        return found.shrunk, found.mean

    def file_tensors(self) -> dict[str, Tensor]:
        """The tensors by LyCORIS's suffixes, as a file has them."""
        original, adapter = self._original().detach(), self.adapter
        with torch.no_grad():
            p = adapter.folded()
            if not adapter.site.experts:
                p = adapter.algorithm.for_file(p, original)
        return {key: t.detach() for key, t in canonical(Record(adapter.algorithm, adapter.site, p)).items()}


def _shaped(t: Tensor, shape: Any, device: Any) -> Tensor:
    return (t if shape is None else t.reshape(shape)).to(device)


@contextmanager
def strengths(modules: list[Hosted], value: float) -> Iterator[None]:
    """All of them at one strength for the length of a `with` block."""
    before = [module.multiplier for module in modules]
    for module in modules:
        module.multiplier = value
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            module.multiplier = own


# -- LyCORIS's keys in state dicts -----------------------------------------------------------------------------------
def _speak(module: Hosted, state: dict[str, Any], prefix: str, meta: Any) -> None:
    """Say the tensors of a module under LyCORIS's keys."""
    inner = f"{prefix}adapter."
    for key in [key for key in state if key.startswith(inner)]:
        del state[key]
    state.update({f"{prefix}{suffix}": t for suffix, t in module.file_tensors().items()})


def _listen(
    module: Hosted,
    state: dict[str, Any],
    prefix: str,
    meta: Any,
    strict: bool,
    missing: Any,
    unexpected: Any,
    errors: Any,
) -> None:
    """Take LyCORIS's keys for the tensors of a module; what is of another shape is left for torch to complain of."""
    adapter, layout = module.adapter, module.layout
    given = {key[len(prefix) :]: state.pop(key) for key in list(state) if key.startswith(prefix)}
    tensors = {name: given.pop(spec.key) for name, spec in layout.specs.items() if spec.key in given}
    alpha = given.pop(ALPHA, None)
    for mark in layout.marks:
        given.pop(mark, None)
    state.update({f"{prefix}{suffix}": t for suffix, t in given.items()})  # nobody's: unexpected
    if len(tensors) == len(layout.specs):
        scale = adapter.scale
        if alpha is not None and layout.alpha:
            rank = rank_of(Params(tensors, 1.0), layout, adapter.site) if layout.alpha == "scale" else 1
            scale = float(alpha.reshape(-1)[0]) / rank
        try:
            p = adapter.algorithm.from_file(Params(tensors, scale))
            adapter.check_same(adapter.algorithm, p)
        except ShapeError as error:
            errors.append(str(error))
            p = adapter.params().without("scalar")
        adapter.scale = p.scale
        tensors = dict(p.tensors)
    state.update({f"{prefix}adapter.{name}": t for name, t in tensors.items()})
    if "scalar" in adapter.names and tensors:
        state[f"{prefix}adapter.scalar"] = torch.ones_like(getattr(adapter, "scalar"))  # noqa: B009 (it is in its carrier)
