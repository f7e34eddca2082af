"""Who looks on while the demo trains: sees pictures in time, can end it, and changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nerine.errors import OptionError
from nerine.model.fitting import attach
from nerine.tiny.data import style_set
from nerine.tiny.demo import DemoSettings, Watch, _Look, _train

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
DRAWN = torch.zeros(10, 3, 16, 16)


def train(watch: Watch, steps: int = 4) -> tuple[int, dict[str, Tensor], list[str]]:
    """Steps made, the trained tensors, and what happened in which order."""
    from nerine.tiny.load import load_pipeline

    said: list[str] = []
    settings = DemoSettings(algo="lora", dora=False, rank=1, steps=steps, batch=2)
    pipeline = load_pipeline()
    network = attach(pipeline.unet, settings.algorithm, generator=torch.Generator().manual_seed(0))

    def draw() -> Tensor:
        said.append(f"draw, training {pipeline.unet.training}")
        return DRAWN

    def progress(step: int, loss: float) -> None:
        said.append(f"step {step}")

    data = style_set("neon").train
    done, seconds = _train(pipeline, network, settings, data, progress, _Look(watch, draw))
    assert seconds >= 0
    assert not pipeline.unet.training
    return done, {key: t.detach().clone() for key, t in network.state_dict().items()}, said


def test_pictures_come_every_so_many_steps_and_change_nothing() -> None:
    seen: list[tuple[int, Any]] = []
    done, tensors, said = train(Watch(every=2, drawn=lambda step, pictures: seen.append((step, pictures))))
    assert said == ["step 1", "step 2", "draw, training False", "step 3", "step 4", "draw, training False"]
    assert [step for step, _ in seen] == [2, 4]
    assert all(pictures is DRAWN for _, pictures in seen)
    alone_done, alone, said_alone = train(Watch())
    assert done == alone_done == 4
    assert said_alone == ["step 1", "step 2", "step 3", "step 4"]
    assert tensors.keys() == alone.keys()
    assert all(torch.equal(tensors[key], alone[key]) for key in tensors)


def test_it_ends_when_there_is_enough() -> None:
    asked: list[int] = []
    done, _, said = train(Watch(enough=lambda: bool(asked.append(1)) or len(asked) == 2))
    assert done == 2
    assert said == ["step 1", "step 2"]


def test_a_rank_of_ones_own() -> None:
    assert "rank=4" in str(DemoSettings(algo="lora").algorithm)
    assert "rank=9" in str(DemoSettings(algo="lora", rank=9).algorithm)
    assert DemoSettings(algo="loha", style="paper").stem == "paper-dora-loha"
    assert DemoSettings(algo="loha", dora=False).stem == "neon-loha"
    with pytest.raises(OptionError):
        str(DemoSettings(algo="lora", rank=0).algorithm)
