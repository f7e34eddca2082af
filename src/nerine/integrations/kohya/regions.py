"""Regional prompts of `gen_img.py`: each network acts in its region of the picture, on the sub-prompt that is its own.

The batch holds unconditional samples first, then `sub-prompts` samples a picture; cross-attention works on all of them
and comes out as one picture, weighted by the masks. What a network adds is computed apart from its layer, so that it
can be masked.
Source: the protocol of sd-scripts' `networks/lora.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nerine.integrations.lycoris.hosted import Hosted
from nerine.model.forward import added
from nerine.model.mount import MOUNTS, Mount

__all__ = ["Region"]

Forward = Callable[..., Tensor]


class _InRegion:
    """A layer's forward with one network's share; `base` is the forward within, `before` what the layer had set."""

    def __init__(self, act: Forward, lora: Hosted, mount: Mount, base: Any, before: Any) -> None:
        self.act, self.lora, self.mount, self.base, self.before = act, lora, mount, base, before

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.act(self.lora, self.mount, self.base, x, *args, **kwargs)


class Region:
    """One network's share of a picture."""

    def __init__(self, index: int, is_last: bool, mask: Tensor) -> None:
        self.index, self.is_last, self.mask = index, is_last, mask
        self.masks: dict[int, Tensor] = {}  # by number of positions
        self.batch, self.prompts = 1, 1
        self.shared: dict[str, Any] = {}
        self._entered: list[tuple[nn.Module, _InRegion, Mount, str]] = []

    # -- in and out ----------------------------------------------------------------------------------------------
    def enter(self, loras: Sequence[Hosted], encoders: Collection[str]) -> None:
        """Take over what the adapters add to their layers."""
        for lora in loras:
            layer, name = lora.spot.caller or lora.spot.holder, lora.applied_as
            mount: Mount = lora.spot.holder.__dict__[MOUNTS][lora.spot.key]
            mount.off.add(name)
            in_text = any(lora.lora_name.startswith(f"{prefix}_") for prefix in encoders)
            act = self._forward(lora.lora_name, in_text)
            own = layer.__dict__["forward"] = _InRegion(act, lora, mount, layer.forward, layer.__dict__.get("forward"))
            self._entered.append((layer, own, mount, name))

    def leave(self) -> None:
        """Give the layers back; others that have come since stay around them."""
        for layer, own, mount, name in self._entered:
            outer = layer.__dict__["forward"]
            if outer is own:
                layer.__dict__["forward"] = own.before
                if own.before is None:
                    del layer.__dict__["forward"]
            while isinstance(outer, _InRegion) and outer is not own:
                if outer.base is own:
                    outer.base, outer.before = own.base, own.before
                    break
                outer = outer.base
            mount.off.discard(name)
        self._entered = []

    def begin(
        self,
        batch: int,
        prompts: int,
        size: tuple[int, int],
        shared: dict[str, Any],
        ratio: float | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """A new picture of `size` (height, width) in pixels: the mask at every resolution that the denoiser has."""
        self.batch, self.prompts, self.shared = batch, prompts, shared
        self.masks = {}

        def add(height: int, width: int) -> None:
            scaled = nn.functional.interpolate(self.mask[None, None].float(), (height, width), mode="bilinear")
            self.masks[height * width] = scaled.to(device, dtype)

        height, width = size[0] // 8, size[1] // 8
        for _ in range(4):
            add(height, width)
            if height % 2 or width % 2:
                add(height + height % 2, width + width % 2)
            if ratio is not None:
                add(int(height * ratio), int(width * ratio))
            height, width = (height + 1) // 2, (width + 1) // 2

    # -- one call of a layer -------------------------------------------------------------------------------------
    def _forward(self, name: str, in_text: bool) -> Forward:
        if in_text:
            return self._in_text
        if "attn2_to_k" in name or "attn2_to_v" in name:
            return self._sub_prompt
        if "time_emb" in name:
            return self._everywhere
        if "attn2_to_out" in name:
            return self._combined
        return self._masked_query if "attn2_to_q" in name else self._masked

    def _change(self, lora: Hosted, mount: Mount, x: Tensor, y: Tensor) -> Tensor:
        if not lora.multiplier:
            return torch.zeros_like(y)
        return added(lora.spot.holder, mount, lora.adapter, x, y).to(y.dtype)

    def _everywhere(self, lora: Hosted, mount: Mount, base: Forward, x: Tensor, *args: Any) -> Tensor:
        y = base(x, *args)
        return y + self._change(lora, mount, x, y)

    def _rows(self, lora: Hosted, mount: Mount, base: Forward, x: Tensor, args: Any, first: int) -> Tensor:
        """The layer, with the change on every `prompts`-th sample from `first` on."""
        y = base(x, *args)
        mine = slice(first, None, self.prompts)
        y = y.clone()
        y[mine] = y[mine] + self._change(lora, mount, x[mine], y[mine])
        return y

    def _in_text(self, lora: Hosted, mount: Mount, base: Forward, x: Tensor, *args: Any) -> Tensor:
        if x.shape[0] == self.batch:  # the unconditional prompt
            return base(x, *args)
        return self._rows(lora, mount, base, x, args, self.index)

    def _sub_prompt(self, lora: Hosted, mount: Mount, base: Forward, x: Tensor, *args: Any) -> Tensor:
        if x.shape[0] == self.batch:
            return base(x, *args)
        return self._rows(lora, mount, base, x, args, self.index + self.batch)

    def _mask_for(self, t: Tensor) -> Tensor:
        """The mask at the resolution of an output; an even share where there is none."""
        area = t.shape[2:].numel() if t.dim() == 4 else t.shape[1]
        mask = self.masks.get(area)
        if mask is None or t.dim() == 2:
            shape = (1, t.shape[1]) if t.dim() == 2 else (1, *t.shape[1:-1], 1)
            return torch.ones(shape, dtype=t.dtype, device=t.device) / self.prompts
        return (mask.reshape(1, -1, 1) if t.dim() == 3 else mask).to(t.dtype)

    def _masked(self, lora: Hosted, mount: Mount, base: Forward, x: Tensor, *args: Any) -> Tensor:
        y = base(x, *args)
        change = self._change(lora, mount, x, y)
        return y + change * self._mask_for(change)

    def _masked_query(self, lora: Hosted, mount: Mount, base: Forward, x: Tensor, *args: Any) -> Tensor:
        """Queries of cross-attention: one for each sub-prompt."""
        y = self._masked(lora, mount, base, x, *args)
        if not self.is_last:
            return y
        parts = [y[: self.batch], y[self.batch : 2 * self.batch].repeat_interleave(self.prompts, 0)]
        return torch.cat([*parts, y[-self.batch :]] if len(y) // self.batch == 3 else parts)

    def _combined(self, lora: Hosted, mount: Mount, base: Forward, x: Tensor, *args: Any) -> Tensor:
        """The output of cross-attention: the sub-prompts' samples put together to one, weighted by the masks."""
        y = base(x, *args)
        mine = slice(self.batch + self.index, self.batch * (1 + self.prompts), self.prompts)
        change = self._change(lora, mount, x[mine], y[mine])
        waiting: dict[int, tuple[Tensor, Tensor]] = self.shared.setdefault(lora.lora_name, {})
        waiting[self.index] = change, self._mask_for(change)
        if not self.is_last:
            return y
        del self.shared[lora.lora_name]
        own = y[self.batch : self.batch * (1 + self.prompts)].unflatten(0, (self.batch, self.prompts))
        total = sum(mask for _, mask in waiting.values()) + 1e-4
        picture = sum(own[:, i] * mask for i, (_, mask) in waiting.items()) / total
        picture = picture + sum(change * mask for change, mask in waiting.values())
        has_third = len(y) // self.batch == self.prompts + 2
        parts = [y[: self.batch], picture]
        return torch.cat([*parts, y[-self.batch :]] if has_third else parts)
