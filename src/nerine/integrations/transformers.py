"""transformers: checkpoints of its Trainer that hold the adapters, and not the base.

The Trainer writes a checkpoint by calling the model's `save_pretrained`, and reads one by loading `model.safetensors`
into the model, without strictness. So it is enough to answer that call on the instance: with a `model.safetensors` of
the tensors that are trained, under the names that they have in the model. Optimiser, schedule and random numbers remain
the Trainer's own work, and resuming and `load_best_model_at_end` need no code here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nerine.api import save
from nerine.errors import OptionError
from nerine.files.detect import dialect_named
from nerine.model.network import Network
from nerine.model.saving import Saving, guard_saving
from nerine.model.sharded import is_split

__all__ = ["SaveAdapters"]

STATE, ADAPTERS = "model.safetensors", "adapters.safetensors"
_NAME = "save_pretrained"


class SaveAdapters:
    """A callback with which the Trainer saves adapters instead of whole models.

        trainer = Trainer(model, args, callbacks=[SaveAdapters(network)], ...)

    Each checkpoint then has two small files in place of the model's: `model.safetensors`, from which the Trainer
    resumes (the network's tensors and whatever else is trained, bit for bit), and `adapters.safetensors` in `dialect`,
    for `nerine.load` and other programs. `trainer.save_model(folder)` writes the same two. Once the adapters are merged
    or detached, the model saves itself again. `remove` undoes all of it.

    Raises:
        OptionError: the adapters are no part of the model that the Trainer trains.
    """

    def __init__(self, network: Network, *, dialect: str = "lycoris", dtype: torch.dtype | None = None) -> None:
        if not isinstance(network, Network):
            raise OptionError(f"SaveAdapters: expected a nerine.Network, got {type(network).__name__}")
        if len(network.names) != 1:
            raise OptionError(
                f'a file holds one adapter: hand over one of {", ".join(network.names)}, as network["..."]'
            )
        if dialect_named(dialect).folder:
            raise OptionError(f"SaveAdapters: the {dialect} dialect is a folder; choose one that is a file")
        self.network = network
        self.dialect = dialect
        self.dtype = dtype
        self.model: nn.Module | None = None
        self._hook: Any = None

    def __getattr__(self, event: str) -> Callable[..., None]:
        if event.startswith("on_"):  # the Trainer tells every callback of every event
            return _ignored
        raise AttributeError(f"{type(self).__name__!r} has no attribute {event!r}")

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Take over the saving of the Trainer's model."""
        own = {id(parameter) for parameter in model.parameters()}
        adapters = list(self.network.parameters())
        if not all(id(parameter) in own for parameter in adapters):
            raise OptionError(
                f"SaveAdapters: the adapters are no parameters of the {type(model).__name__} that the Trainer trains. "
                "Attach to that very model, with own=True, before the Trainer is made"
            )
        if not any(parameter.requires_grad for parameter in adapters):
            raise OptionError(
                "SaveAdapters: no adapter requires gradients, so none would be trained. Was the model frozen or "
                "wrapped after they were attached? network.requires_grad_() turns them on again"
            )
        self.remove()
        self.model = model
        model.__dict__[_NAME] = self.save_pretrained
        self._hook = model.register_load_state_dict_post_hook(self._expect_adapters_alone)

    def remove(self) -> None:
        """Give the model its own `save_pretrained` back."""
        if self.model is not None:
            self.model.__dict__.pop(_NAME, None)
            guard_saving(self.model)
            self._hook.remove()
            self.model = None

    def kept(self) -> set[str]:
        """The keys of the model's state that a checkpoint holds: of adapters, and of all else that is trained."""
        assert self.model is not None
        tensors = {id(t) for _, t in self.network.named_tensors()}
        trained = {id(p) for p in self.model.parameters() if p.requires_grad}
        state = self.model.state_dict(keep_vars=True)
        return {key for key, t in state.items() if id(t) in tensors or id(t) in trained}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **others: Any,
    ) -> None:
        """Write both files to a folder; stands in for the model's method of that name.

        Raises:
            OptionError: processes share the adapters' tensors, so that one alone cannot write them.
        """
        assert self.model is not None
        if not len(self.network) or self.network.is_merged:
            more = {} if state_dict is None else {"state_dict": state_dict}
            Saving(self.model)(save_directory, is_main_process=is_main_process, **more, **others)
            return
        if any(is_split(t) or hasattr(t, "ds_id") for _, t in self.network.named_tensors()):
            raise OptionError(
                "SaveAdapters: the adapters are split over processes, and the Trainer saves in one of them; leave the "
                "callback out, and call nerine.save(network, file) in every process"
            )
        folder = Path(save_directory)
        kept = self.kept()
        state = self.model.state_dict() if state_dict is None else state_dict
        if is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {key: t.detach().contiguous() for key, t in state.items() if key in kept}
            save_file(tensors, folder / STATE, metadata={"format": "pt"})
            save(self.network, folder / ADAPTERS, dialect=self.dialect, dtype=self.dtype)

    def _expect_adapters_alone(self, model: nn.Module, incompatible: Any) -> None:
        """Where a state had nothing but what is kept, the base is not missing from it."""
        kept, missing = self.kept(), set(incompatible.missing_keys)
        if not missing & kept and missing >= model.state_dict().keys() - kept:
            incompatible.missing_keys.clear()


def _ignored(*args: Any, **kwargs: Any) -> None:
    """An event that asks for nothing."""
