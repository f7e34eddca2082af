"""DeepSpeed's ZeRO-2 and ZeRO-3 around an adapted model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn

import nerine
from nerine import DiagOFT, DoRA, Full, LoKr, LoRA, TLoRA
from nerine.errors import MergeError, OptionError
from nerine.model.sharded import whole
from nerine.testing.battery import close
from small_world import ALGORITHMS, Model, attached, batch, copied, model, stir
from two_processes import Failures

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra: pip install nerine[dist]")

FEW = ["DoRA(LoRA(", "DoRA(LoKr(", "DoRA(TLoRA(", "GLoRA(", "Full(", "BOFT(", "Norm("]
CLOSE = 1e-5  # in fp32


def settings(stage: int) -> dict[str, Any]:
    """ZeRO that partitions everything, however small it is."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_model_persistence_threshold": 0,
        },
    }


def started(base: nn.Module, network: nerine.Network, stage: int) -> Any:
    import deepspeed

    warnings.simplefilter("ignore")  # it raises several of its own and of what it calls
    optimiser = torch.optim.SGD(list(network.parameters()), lr=0.1, momentum=0.9)
    engine, *_ = deepspeed.initialize(model=base, optimizer=optimiser, config=settings(stage))
    return engine


def steps(engine: Any, part: int | None, backward: Callable[[torch.Tensor], object], step: Callable[[], object]) -> Any:
    losses = []
    for number in range(2):
        torch.manual_seed(number)
        x, y = batch(number, part, torch.float32)
        loss = (engine(x) - y).square().mean()
        backward(loss)
        step()
        losses.append(loss.detach())
    return torch.stack(losses)


def alone(algorithm: nerine.Algorithm) -> tuple[torch.Tensor, nerine.Network]:
    base, network = attached(algorithm, model(torch.float32))
    stir(network)
    optimiser = torch.optim.SGD(list(network.parameters()), lr=0.1, momentum=0.9)

    def step() -> None:
        optimiser.step()
        optimiser.zero_grad()

    return steps(base, None, lambda loss: loss.backward(), step), network


def gathered(network: nerine.Network) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {key: whole(t) for key, t in network.named_tensors()}


def equal_to_one_process(rank: int, folder: Path) -> None:
    failures = Failures()
    chosen = [next(a for a in ALGORITHMS if str(a).startswith(start)) for start in FEW]
    for number, algorithm in enumerate(chosen):
        want, single = alone(algorithm)
        for stage in (3,) if number > 1 else (2, 3):
            with failures.case((stage, algorithm)):
                base, network = attached(algorithm, model(torch.float32))
                stir(network)
                engine = started(base, network, stage)
                got = steps(engine, rank, engine.backward, engine.step)
                dist.all_reduce(got)
                close(got / 2, want, "losses", CLOSE)
                now = gathered(network)
                for key, tensor in copied(single).items():
                    close(now[key], tensor, key, CLOSE)
                if stage == 3:
                    assert not next(network.parameters()).numel(), "it should be partitioned"
                    files(algorithm, network, now, folder / str(number))
    failures.tell()


def files(algorithm: nerine.Algorithm, network: nerine.Network, now: dict[str, torch.Tensor], file: Path) -> None:
    """A save gathers; a file comes back into the partitioned network; a merge says why not."""
    nerine.save(network, file)
    _, other = attached(algorithm, model(torch.float32))
    other.load_state_dict(now)
    nerine.save(other, mine := file.with_suffix(f".{dist.get_rank()}"))
    assert file.read_bytes() == mine.read_bytes()
    network.load_state_dict({key: t * 0 for key, t in now.items()})
    nerine.load(network, file)
    nerine.save(network, again := file.with_suffix(".again"))
    assert file.read_bytes() == again.read_bytes()
    with pytest.raises(MergeError, match=r"under ZeRO-3.*save"):
        network.merge()
    assert not network.is_merged


def made_in_pieces(rank: int, folder: Path) -> None:
    """A model that is partitioned from the start: DoRA's magnitudes are those of the whole weights."""
    import deepspeed

    warnings.simplefilter("ignore")
    with deepspeed.zero.Init(config_dict_or_path=settings(3)):  # in bf16, where its settings do not say otherwise
        base = Model()
    assert not base.head.weight.numel()
    values = model(torch.bfloat16)
    for name, parameter in base.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(values.get_parameter(name))
    _, single = attached(DoRA(LoKr(rank=1)), values)
    _, network = attached(DoRA(LoKr(rank=1)), base)
    for key, t in network.named_tensors():
        assert t.dtype == torch.float32
        close(t, dict(single.named_tensors())[key], key, CLOSE)
    stir(network)
    stir(single)
    nerine.save(network, folder / "pieces")
    nerine.save(single, folder / f"pieces.{rank}")
    assert (folder / "pieces").read_bytes() == (folder / f"pieces.{rank}").read_bytes()


def orders_and_errors(rank: int, folder: Path) -> None:
    base, network = attached(TLoRA(rank=2), model(torch.float32))
    engine = started(base, network, 3)
    for late in (engine, engine.module):
        with pytest.raises(OptionError, match=r"deepspeed\.initialize"):
            nerine.attach(late, LoRA(rank=2), name="late")
    with pytest.raises(OptionError, match=r"ZeRO-3.*no_grad"):
        network.penalty()
    base, network = attached(Full(), model(torch.float32))
    engine = started(base, network, 2)
    with pytest.raises(OptionError, match=r"deepspeed\.initialize"):
        nerine.attach(engine, DiagOFT(block_size=2), name="late")


@pytest.mark.slow
def test_deepspeed(run_on_two: Callable[..., None]) -> None:
    run_on_two(equal_to_one_process, made_in_pieces, orders_and_errors, ignore=(".*",))
