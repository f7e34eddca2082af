"""FSDP2 (`fully_shard`) of an adapted model: training, files, merging, and the order of the calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import nerine
from nerine import IA3, DoRA, LoKr, LoRA, Rule
from nerine.errors import DeviceError, FormatError, MergeError, OptionError
from nerine.testing.battery import close
from small_world import ALGORITHMS, Model, alone, attached, copied, loss_of, model, stir, train
from two_processes import Failures, the_mesh

# torch says this of every unit whose output is a view, as a rotation's is; nobody writes into it here
VIEW = "FSDP2-wrapped module"


def shard(base: nn.Module, *units: nn.Module) -> None:
    """Shards the blocks, or `units`, and the whole."""
    for unit in units or base.blocks:  # type: ignore[union-attr]
        fully_shard(unit, mesh=the_mesh())
    fully_shard(base, mesh=the_mesh())


def whole(network: nerine.Network) -> dict[str, torch.Tensor]:
    network.model.reshard()  # type: ignore[operator]
    return {key: t.full_tensor() for key, t in network.named_parameters()}  # type: ignore[attr-defined]


def equal_to_one_process(rank: int, folder: Path) -> None:
    failures = Failures()
    for number, algorithm in enumerate(ALGORITHMS):
        with failures.case(algorithm):
            losses, want = alone(algorithm)
            base, network = attached(algorithm)
            stir(network)
            if number % 2:  # layers that are units of their own, too
                shard(base, base.blocks[0].up, base.blocks[0].norm, base.blocks[1])
            else:
                shard(base)
            assert all(type(p).__name__ == "DTensor" for p in base.parameters())
            got = torch.tensor(train(base, network.parameters(), rank), dtype=torch.float64)
            dist.all_reduce(got)
            close(got / 2, torch.tensor(losses, dtype=torch.float64), "losses")
            for key, tensor in whole(network).items():
                close(tensor, want[key], key)
            penalty(base, network, algorithm)
    failures.tell()


def penalty(base: nn.Module, network: nerine.Network, algorithm: object) -> None:
    """Its gradient reaches the pieces, once."""
    if not network.penalty().requires_grad:
        return
    network.penalty().backward()
    got = {key: p.grad.full_tensor() for key, p in network.named_parameters() if p.grad is not None}  # type: ignore[attr-defined]
    _, other = attached(algorithm)  # type: ignore[arg-type]
    other.load_state_dict({**copied(other), **whole(network)})
    other.penalty().backward()
    for key, p in other.named_parameters():
        if p.grad is not None:
            assert got[key].shape == p.grad.shape


def files_and_merging(rank: int, folder: Path) -> None:
    failures = Failures()
    for number, algorithm in enumerate(ALGORITHMS[::4]):
        with failures.case(algorithm):
            file, one = folder / f"{number}.safetensors", folder / f"{number}-one-{rank}.safetensors"
            base, network = attached(algorithm)
            stir(network)
            nerine.save(network, one)
            base.eval()
            x = loss_of(base, 0)
            merged = merged_weights(base, network)

            sharded, split = attached(algorithm)
            shard(sharded.eval())
            loss_of(sharded, 0)  # leaves the root unsharded
            split.load_state_dict(copied(network))
            report = nerine.save(split, file)
            assert report.bytes == file.stat().st_size
            assert file.read_bytes() == one.read_bytes()
            close(loss_of(sharded, 0), x, "loss")

            again, resumed = attached(algorithm)
            shard(again.eval())
            loss_of(again, 0)
            nerine.load(resumed, file, strict=True)
            close(loss_of(again, 0), x, "loss after resuming")
            before = copied_weights(again)
            resumed.merge()
            for key, t in copied_weights(again).items():
                close(t, merged[key], f"merged {key}")
            close(loss_of(again, 0), x, "loss of the merged")
            resumed.unmerge()
            for key, t in copied_weights(again).items():
                assert torch.equal(t, before[key]), f"{key} has not its bits back"
            if all(a.carriers for *_, a in resumed.adapters()):
                got, want = resumed.max_norm(0.01), network.max_norm(0.01)
                assert got == pytest.approx(want)
                close(next(iter(whole(resumed).values())), next(network.parameters()), "shrunk")
            assert resumed.norms().rows
            resumed.detach()
            assert not [key for key in again.state_dict() if "nerine" in key]
    failures.tell()


def copied_weights(base: nn.Module) -> dict[str, torch.Tensor]:
    if hasattr(base, "reshard"):
        base.reshard()
    found = {k: p for k, p in base.named_parameters() if "nerine" not in k}
    return {k: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for k, p in found.items()}


def merged_weights(base: nn.Module, network: nerine.Network) -> dict[str, torch.Tensor]:
    network.merge()
    found = copied_weights(base)
    network.unmerge()
    return found


def orders_and_errors(rank: int, folder: Path) -> None:
    base = model()
    shard(base)
    for call in (
        lambda: nerine.attach(base, LoRA(rank=2)),
        lambda: nerine.attach(base.blocks[0], DoRA(LoKr(rank=1))),
        lambda: nerine.attach(base, [Rule(nn.Linear, LoRA(rank=2))], own=False),
    ):
        with pytest.raises(OptionError, match=r"(inlet|up).*fully_shard.*attach\(\.\.\.\).*first"):
            call()
    _, network = attached(IA3())
    nerine.save(network, folder / f"ia3-{rank}.safetensors")
    with pytest.raises(OptionError, match="fully_shard"):
        nerine.load(base, folder / f"ia3-{rank}.safetensors")
    assert not [key for key in base.state_dict() if "nerine" in key]

    # names and classes match a model whose classes fully_shard has renamed
    base, network = attached(LoRA(rank=2))
    shard(base, base.blocks[0].up, base.blocks[0], base.blocks[1])
    assert type(base.blocks[0].up).__name__ == "FSDPLinear"
    assert network.set_strength(0.5, nn.Linear) == 5
    assert network.set_strength(1.0, "blocks.0.up") == 1
    network.off()
    close(loss_of(base, 0), loss_of(model(), 0), "off")
    assert len(nerine.plan(base, LoRA(rank=2)).rows) == 6

    # an error in the one process that writes reaches all
    with pytest.raises(FormatError, match="does not exist"):
        nerine.save(network, folder / "nowhere" / "x.safetensors")
    rows = nerine.attach(part := model(), [Rule("blocks.0.up", LoRA(rank=2), rows=(0, 6))])
    shard(part)
    with pytest.raises(MergeError, match="split"):
        rows.merge()


def precision_and_chance(rank: int, folder: Path) -> None:
    base, network = attached(DoRA(LoRA(rank=2)), model(torch.bfloat16), dropout=0.5, module_dropout=0.5)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for unit in (*base.blocks, base):
        fully_shard(unit, mp_policy=policy)
    torch.manual_seed(rank)  # every process draws for itself
    x = torch.randn(2, 4, 7, dtype=torch.bfloat16)
    base(x).float().square().mean().backward()
    grads = [p.grad for p in network.parameters()]
    assert all(g is not None and g.dtype == torch.float32 for g in grads)
    assert all(p.dtype == torch.float32 for p in network.parameters())
    optimiser = torch.optim.AdamW(network.parameters())
    optimiser.step()
    assert all(torch.isfinite(t).all() for t in whole(network).values())


def from_meta(rank: int, folder: Path) -> None:
    """A model without values is sharded, and gets them afterwards."""
    for settled in (False, True):
        with torch.device("meta"):
            base = Model().double()
        network = nerine.attach(base, DoRA(LoRA(rank=2)))
        shard(base)
        base.to_empty(device="cpu")
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(base, model().state_dict(), options=options)
        if not settled:
            with pytest.raises(DeviceError, match=r"inlet: .*network\.settle\(\)"):
                loss_of(base, 0)
            continue
        torch.manual_seed(rank)
        network.settle()
        single = dict(nerine.attach(model(), DoRA(LoRA(rank=2))).named_parameters())
        for key, t in whole(network).items():
            other = t.clone()
            dist.broadcast(other, 0)
            assert torch.equal(t, other)
            if "down" not in key:
                close(t, single[key], key)
        close(loss_of(base, 0), loss_of(model(), 0), "loss")
        loss_of(base, 0).backward()
        close(loss_of(base, 0), loss_of(model(), 0), "loss again")


@pytest.mark.slow
def test_fsdp(run_on_two: Callable[..., None]) -> None:
    run_on_two(
        equal_to_one_process, files_and_merging, orders_and_errors, precision_and_chance, from_meta, ignore=(VIEW,)
    )
