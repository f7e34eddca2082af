"""Network: the handle on the adapters that one call of `attach` or `load` put into a model.

It holds no tensors of its own (those live in the layers, or in the adapters it keeps for a host), only the list of
layers and the names it commands. Several networks, with several algorithms, may share a model and its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nerine.errors import MergeError, OptionError, ShapeError, TargetError, nearest
from nerine.model.adapter import Adapter
from nerine.model.attach import take_off
from nerine.model.fast_path import restore_fast_paths
from nerine.model.measure import Located, norms_of, shrink_to
from nerine.model.merge import check_unchanged, forget_original, merge_layer, unmerge_layer
from nerine.model.mount import Kept, Mount, adapters_of, mounts_of, names_in, path_in, settle
from nerine.model.offload import Groups
from nerine.model.patterns import Match
from nerine.model.pipeline import HasComponents, as_model, named_layers
from nerine.model.reports import MaxNorm, MergeReport, NormReport
from nerine.model.saving import free_saving
from nerine.model.sharded import at_rest, copy_into, shape_of
from nerine.model.strengths import Strength, strengths_at
from nerine.ops.kernel_choice import chosen

__all__ = ["Network"]


class Network:
    """The adapters called `names` in `model`. Made by `attach` and `load`; `Network.of(model)` has all of them.

    `report` says what was done to make it (an `AttachReport` or a `LoadReport`).
    """

    def __init__(self, model: nn.Module, names: Sequence[str], report: Any = None) -> None:
        self.model = model
        self.names = tuple(names)
        self._report = report
        self._unfreeze: list[nn.Parameter] = []
        self._holders: dict[str, str] = {}  # path and class of the modules that got adapters, to notice their loss

    @classmethod
    def of(cls, model: nn.Module | HasComponents) -> Network:
        """A handle on every adapter in `model`, a module or a pipeline.

        Raises:
            TargetError: there is none.
        """
        model = as_model(model, "Network.of")
        names = names_in(model)
        if not names:
            raise TargetError(f"{type(model).__name__} has no adapters; attach or load one first")
        return cls(model, names)

    def __getitem__(self, name: str) -> Network:
        """The handle on one of the names."""
        if name not in self.names:
            raise TargetError(f"no adapter called {name!r}. {nearest(name, self.names)}")
        return Network(self.model, [name])

    @property
    def report(self) -> Any:
        """What was done to make it; layers that were not executed while others were are named in its `idle`."""
        return None if self._report is None else replace(self._report, idle=self.idle())

    @report.setter
    def report(self, value: Any) -> None:
        self._report = value

    def idle(self) -> tuple[str, ...]:
        """The adapted layers that no forward has executed yet, once one has executed others (compiled ones do not
        count): their adapters learn nothing and change nothing."""
        mounts = [(path, mount.has_run) for path, _, mount in self._mounts()]
        return tuple(path for path, has_run in mounts if not has_run) if any(has_run for _, has_run in mounts) else ()

    # -- what it holds -------------------------------------------------------------------------------------------
    def _mounts(self) -> Iterator[tuple[str, nn.Module, Mount]]:
        self._check_still_there()
        for path, holder in named_layers(self.model):
            for mount in mounts_of(holder):
                yield path_in(path, mount), holder, mount

    def _check_still_there(self) -> None:
        """Whether each adapted module is still in the model; some tools put others in the place of layers.

        Raises:
            TargetError: a module of another class, without adapters, is in the place of one.
        """
        for path, kind in self._holders.items():
            try:
                there = self.model.get_submodule(path)
            except AttributeError:  # below something that was put around it
                continue
            found = type(there).__name__
            if found != kind and not any(mounts_of(module) for module in there.modules()):
                raise TargetError(
                    f"{path or 'the model'}: the {kind} that has adapters was replaced by {found}, and they are lost "
                    "with it; quantise the model before adapters are attached or loaded"
                )

    def adapters(self) -> Iterator[tuple[str, str, Adapter]]:
        """(path of the layer, adapter name, adapter), in the order of the model."""
        for path, _, _, name, adapter in self.located():
            yield path, name, adapter

    def placed(self) -> Iterator[tuple[nn.Module, Mount, str, Adapter]]:
        """The same with the module that holds the weight and its mount, for who works on weights."""
        for _, holder, mount, name, adapter in self.located():
            yield holder, mount, name, adapter

    def located(self) -> Iterator[Located]:
        """Both: path, holder, mount, name and adapter."""
        for path, holder, mount in self._mounts():
            for name, adapter in adapters_of(holder, mount):
                if name in self.names:
                    yield path, holder, mount, name, adapter

    def __len__(self) -> int:
        return sum(1 for _ in self.adapters())

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        return f"Network({', '.join(self.names)}: {len(self)} adapters, {count:,} values)"

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """("<layer>.<tensor>", parameter); with several names "<layer>.<name>.<tensor>"."""
        for path, name, adapter in self.adapters():
            owner = (path, name) if len(self.names) > 1 else (path,)
            for key, parameter in adapter.named_parameters(recurse=False):
                yield ".".join(filter(None, (*owner, key))), parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained tensors, for an optimiser."""
        for _, parameter in self.named_parameters():
            yield parameter

    def param_groups(self, lr: float, lora_plus: float = 1.0) -> list[dict[str, Any]]:
        """Optimiser groups: rules with their own `lr` apart, and with `lora_plus` the tensors that carry the size of
        the deviation (LoRA's `up`) at that multiple of the rate (Hayou et al., arXiv:2402.12354)."""
        groups: dict[float, list[nn.Parameter]] = {}
        for _, _, adapter in self.adapters():
            rate = lr if adapter.lr is None else adapter.lr
            for key, parameter in adapter.named_parameters(recurse=False):
                own = rate * lora_plus if key in adapter.carriers else rate
                groups.setdefault(own, []).append(parameter)
        return [{"params": params, "lr": rate} for rate, params in groups.items()]

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """`named_parameters`, and the constants of algorithms that have some."""
        for path, name, adapter in self.adapters():
            owner = (path, name) if len(self.names) > 1 else (path,)
            for key in adapter.names:
                yield ".".join(filter(None, (*owner, key))), getattr(adapter, key)

    def state_dict(self) -> dict[str, Tensor]:
        """Detached tensors under the keys of `named_tensors`."""
        return {key: tensor.detach() for key, tensor in self.named_tensors()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` (as `state_dict` gave it) into the existing tensors; all keys and shapes must agree.

        Raises:
            ShapeError: keys or shapes differ; nothing was copied then.
        """
        at_rest(self.model)
        own = dict(self.named_tensors())
        if own.keys() != state.keys():
            odd = sorted(own.keys() ^ state.keys())
            raise ShapeError(f"the state does not belong to this network: {len(odd)} keys differ, for example {odd[0]}")
        for key, parameter in own.items():
            if shape_of(parameter) != shape_of(state[key]):
                raise ShapeError(f"{key}: expected shape {shape_of(parameter)}, got {tuple(state[key].shape)}")
        self.not_merged("load tensors")
        with torch.no_grad():
            for key, parameter in own.items():
                copy_into(parameter, state[key])

    # -- training ------------------------------------------------------------------------------------------------
    def set_timestep(self, timestep: Tensor | float | None) -> None:
        """Tell the adapters the timesteps of the coming batch: one number, or one for each sample `[batch]`.

        Only algorithms whose rank follows time (T-LoRA) listen, and only in training. None: all ranks again.
        """
        if timestep is not None and not isinstance(timestep, Tensor):
            timestep = torch.tensor(float(timestep))
        if timestep is not None and timestep.dim() > 1:
            raise ShapeError(f"timestep: expected one number or one for each sample, got shape {tuple(timestep.shape)}")
        for context in {id(a.context): a.context for *_, a in self.adapters()}.values():
            context.timestep = timestep

    def penalty(self) -> Tensor:
        """What the algorithms ask to have added to the loss, weighted as the user sees fit, 0-d: for T-LoRA how far its
        factors are from orthogonal ones (arXiv:2507.05964 §3.3), zero for the others."""
        found = [p for p in (a.algorithm.penalty(a.ready(a.device)) for *_, a in self.adapters()) if p is not None]
        first = next(self.parameters())
        return torch.stack([p.to(first.device) for p in found]).sum() if found else first.new_zeros(())

    @torch.no_grad()
    def max_norm(self, limit: float) -> MaxNorm:
        """Shrink every adapter whose |W' - W| exceeds `limit`, through the tensors that carry its size; for after an
        optimiser step. With DoRA the inner deviation counts, with a rescaled rotation the rotation.

        Source: `--scale_weight_norms` of sd-scripts, which knows it for LoRA.
        """
        at_rest(self.model)
        return shrink_to(limit, self.located())

    @torch.no_grad()
    def settle(self) -> None:
        """Give adapters that were attached while the base was on meta their values, now that it has its own.

        The first forward does so too, except under `fully_shard`: there every process must call this before it.
        """
        at_rest(self.model)
        for _, holder, mount in self._mounts():
            settle(holder, mount)

    @torch.no_grad()
    def norms(self) -> NormReport:
        """How far each adapter has moved its weight, and the gradients it has now."""
        return norms_of(self.located())

    # -- strength, on and off ------------------------------------------------------------------------------------
    @property
    def strength(self) -> float:
        """Strength of the adapters; setting it sets all. With differing strengths reading it is an error."""
        found = {adapter.strength for *_, adapter in self.adapters()}
        if len(found) != 1:
            raise OptionError(f"the adapters have different strengths ({sorted(found)}); read them one by one")
        return found.pop()

    @strength.setter
    def strength(self, value: float) -> None:
        self.set_strength(value)

    def set_strength(self, value: Strength, match: Match | None = None) -> int:
        """Set the strength of all adapters, or of those at layers that `match`; returns how many were set.

        `value` may be numbers by pattern, {"unet": 0.8, "unet.up_blocks": 1.0}; the last that matches a layer counts,
        and layers that none matches stay as they are.

        Raises:
            MergeError: they are merged, so their strength is fixed in the weights.
            TargetError: no layer matches.
        """
        self.not_merged("change the strength")
        if match is not None:
            if isinstance(value, Mapping):
                raise OptionError("set_strength: strengths by pattern say which layers they mean; leave match out")
            value = {match: value}
        found = list(self.located())
        wanted = strengths_at(value, [(path, holder) for path, holder, *_ in found], self.model)
        for (*_, adapter), strength in zip(found, wanted, strict=True):
            adapter.strength = adapter.strength if strength is None else strength
        return sum(strength is not None for strength in wanted)

    @contextmanager
    def at_strength(self, value: Strength, match: Match | None = None) -> Iterator[None]:
        """Another strength for the length of a `with` block."""
        before = [(adapter, adapter.strength) for *_, adapter in self.adapters()]
        self.set_strength(value, match)
        try:
            yield
        finally:
            for adapter, strength in before:
                adapter.strength = strength

    def off(self) -> None:
        """Switch the adapters off; the model is bitwise the base again (unless they are merged)."""
        self.not_merged("switch off")
        for *_, mount in self._mounts():
            mount.off.update(self.names)

    def on(self) -> None:
        """Switch the adapters on again."""
        for *_, mount in self._mounts():
            mount.off.difference_update(self.names)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Without the adapters for the length of a `with` block."""
        before = [(mount, set(mount.off)) for *_, mount in self._mounts()]
        self.off()
        try:
            yield
        finally:
            for mount, off in before:
                mount.off = off

    # -- while nothing changes -----------------------------------------------------------------------------------
    def cache(self, *, weights: bool = False) -> None:
        """Promise that no tensor of the adapters or of their layers changes until `drop_cache`: calls without gradients
        then work out once what depends on those alone (norms of DoRA, rotations of OFT). In-place changes that torch
        counts are noticed; those through `.data`, and by optimisers with kernels of their own, are not, which is why
        this has to be asked for.

        With `weights` layers that compute in fp32 also keep their changed weight, as fast as merged and at the price of
        its memory. In half precision a weight loses small deviations; there `merge` is the one to ask.
        """
        for *_, mount in self._mounts():
            mount.kept = Kept(weights)

    def drop_cache(self) -> None:
        """Forget what `cache` has kept."""
        for *_, mount in self._mounts():
            mount.kept = None

    @contextmanager
    def cached(self, *, weights: bool = False) -> Iterator[None]:
        """`cache` for the length of a `with` block."""
        self.cache(weights=weights)
        try:
            yield
        finally:
            self.drop_cache()

    def use_kernels(self, *names: str) -> None:
        """Let kernels in Triton (docs/kernels.md) stand in for operations in the calls of these adapters: "stretch" and
        "low_rank_row_norm" (DoRA), "cayley" and "turn_channels" (rotations), "rescale". No names: none. What a kernel
        cannot take, such as tensors on a CPU, is computed as without it, and so are compiled models.

        Raises:
            OptionError: no kernel of that name stands in for an operation.
            MissingExtra: triton is not installed.
        """
        choice = chosen(names)
        for context in {id(a.context): a.context for *_, a in self.adapters()}.values():
            context.kernels = choice

    # -- merging and taking off ----------------------------------------------------------------------------------
    @property
    def is_merged(self) -> bool:
        """Whether any of the adapters is in the weights now."""
        return any(set(self.names) & set(mount.merged) for *_, mount in self._mounts())

    def not_merged(self, doing: str) -> None:
        """Raise `MergeError` where the adapters are merged, for work that would have no effect then."""
        if self.is_merged:
            raise MergeError(f"{', '.join(self.names)} is merged into the weights: unmerge first, then {doing}")

    def merge(self, *, keep_original: bool = True) -> MergeReport:
        """Put the adapters into the weights: one sum in at least fp32 a layer, rounded once. The adapters stay as they
        are and rest. With `keep_original` the old bits are kept for `unmerge`, at the price of their memory; without,
        `detach` leaves the merged weights behind. Without, a merge that was done before becomes final.

        Raises:
            MergeError: merged already, not finite, or another active adapter works on a weight that would change.
                The weights are then as they were.
        """
        if self.is_merged and not keep_original:
            return self._finish_merge()
        if self.is_merged:
            raise MergeError(f"{', '.join(self.names)} is merged already; unmerge before merging again")
        if Groups(self.model).on_disk():
            raise MergeError(
                "diffusers keeps weights of this model in files, which a merge would not change: take the group "
                "offloading off first, or load the model without it to merge"
            )
        at_rest(self.model)
        names = set(self.names)
        done: list[tuple[nn.Module, Mount]] = []
        rows = []
        try:
            for path, holder, mount in self._mounts():
                if any(name in names and name not in mount.off for name, _ in adapters_of(holder, mount)):
                    largest, relative = merge_layer(holder, mount, names - mount.off)
                    done.append((holder, mount))
                    rows.append((path, largest, relative))
        except BaseException:
            for holder, mount in done:
                unmerge_layer(holder, mount, names)
            raise
        if not keep_original:
            for _, mount in done:
                forget_original(mount)
        return MergeReport(tuple(rows))

    def _finish_merge(self) -> MergeReport:
        """Drop the old bits of what is merged already."""
        for *_, mount in self._mounts():
            if set(self.names) & set(mount.merged):
                forget_original(mount)
        return MergeReport(())

    def _check_unchanged(self) -> None:
        for _, holder, mount in self._mounts():
            if set(self.names) & set(mount.merged):
                check_unchanged(holder, mount)

    def unmerge(self) -> None:
        """Give the weights back their exact bits.

        Raises:
            MergeError: nothing is merged, or it was merged with `keep_original=False`.
        """
        if not self.is_merged:
            raise MergeError(f"{', '.join(self.names)} is not merged")
        at_rest(self.model)
        self._check_unchanged()
        for _, holder, mount in self._mounts():
            unmerge_layer(holder, mount, set(self.names))

    def detach(self) -> None:
        """Take the adapters off: forward, weights, keys and requires_grad of the model are as before."""
        at_rest(self.model)
        self._check_unchanged()
        for module in list(self.model.modules()):
            for name in self.names:
                take_off(module, name)
        restore_fast_paths(self.model)
        free_saving(self.model)
        for parameter in self._unfreeze:
            parameter.requires_grad_(True)
        self._unfreeze = []
        self._holders = {}

    # -- for hosts that own the network ---------------------------------------------------------------------------
    def to(self, *args: Any, **kwargs: Any) -> Network:
        """Move or cast the adapters alone (`own=True` adapters move with their layers by themselves)."""
        return self._each(lambda adapter: adapter.to(*args, **kwargs))

    def train(self, mode: bool = True) -> Network:
        """Switch dropouts on or off (`own=True` adapters follow their layers by themselves)."""
        return self._each(lambda adapter: adapter.train(mode))

    def eval(self) -> Network:
        return self.train(False)

    def requires_grad_(self, value: bool = True) -> Network:
        return self._each(lambda adapter: adapter.requires_grad_(value))

    def _each(self, act: Callable[[Adapter], object]) -> Network:
        for *_, adapter in self.adapters():
            act(adapter)
        return self
