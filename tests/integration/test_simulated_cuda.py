"""The simulated CUDA devices do what CUDA does, as far as the tests build on it (see tests/simulated_cuda).

Nothing here knows of adapters: torch, accelerate and diffusers on plain modules. Where there is a GPU, the same
checks run on it, which tells whether they say something true about CUDA.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from simulated_cuda import build

pytestmark = pytest.mark.slow  # most of a minute; what is built on the devices runs with the other tests

MODELS = """
import copy, tempfile
import pytest
import simulated_cuda

OTHER = torch.device("cuda", torch.cuda.device_count() - 1)  # the same one on a machine with a single GPU


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.register_buffer("offset", torch.full((width,), 0.5))

    def forward(self, x):
        q, k, v = self.to_qkv(self.norm(x) + self.offset).unflatten(-1, (3, 2, -1)).transpose(1, 3).unbind(2)
        return x + self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Net(nn.Module):
    '''A picture and a class in, tokens through blocks, numbers out.'''

    def __init__(self, width=16):
        super().__init__()
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, stride=2, groups=width)
        self.norm = nn.GroupNorm(4, width)
        self.embedding = nn.Embedding(10, width)
        self.blocks = nn.ModuleList([Attention(width) for _ in range(3)])
        self.head = nn.Linear(width, 5)

    def forward(self, picture, label):
        x = F.silu(self.norm(self.depthwise(self.conv_in(picture))))
        x = x.flatten(2).transpose(1, 2) + self.embedding(label)[:, None]
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def net_of(seed=1):
    torch.manual_seed(seed)
    return Net().double()


def inputs(device="cpu"):
    generator = torch.Generator().manual_seed(2)
    picture = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    return picture.to(device), torch.tensor([3, 7]).to(device)


def same(got, want):
    torch.testing.assert_close(got.detach().cpu(), want.detach(), rtol=1e-9, atol=1e-11)
"""


@pytest.fixture
def run(run_on_simulated_cuda) -> Callable[[str], None]:
    """Executes checks that have a small model at hand, in one process."""
    return lambda code: run_on_simulated_cuda(MODELS + textwrap.dedent(code))


def test_the_rule_of_one_device(run) -> None:
    run(
        """
        import re

        def on(device, *size):
            return torch.ones(*size, device=device)

        def check_mixed_devices_raise_the_sentence_of_cuda():
            mixed = {
                "linear": lambda: nn.Linear(4, 4).to(DEVICE)(on("cpu", 2, 4)),
                "linear, the other way": lambda: nn.Linear(4, 4)(on(DEVICE, 2, 4)),
                "conv": lambda: F.conv2d(on("cpu", 1, 2, 5, 5), on(DEVICE, 3, 2, 3, 3)),
                "bias of a conv": lambda: F.conv2d(on(DEVICE, 1, 2, 5, 5), on(DEVICE, 3, 2, 3, 3), on("cpu", 3)),
                "einsum": lambda: torch.einsum("ij,jk", on("cpu", 2, 3), on(DEVICE, 3, 4)),
                "matmul": lambda: on(DEVICE, 2, 3) @ on("cpu", 3, 2),
                "add": lambda: on(DEVICE, 4) + on("cpu", 4),
                "in place": lambda: on("cpu", 4).mul_(on(DEVICE, 4)),
                "where": lambda: torch.where(on(DEVICE, 4) > 0, on("cpu", 4), 0.0),
                "cat": lambda: torch.cat([on(DEVICE, 4), on("cpu", 4)]),
                "stack": lambda: torch.stack([on("cpu", 4), on(DEVICE, 4)]),
                "lerp": lambda: on(DEVICE, 4).lerp(on(DEVICE, 4), on("cpu", 4)),
                "layer_norm": lambda: F.layer_norm(on(DEVICE, 4), (4,), on("cpu", 4), on("cpu", 4)),
                "embedding": lambda: nn.Embedding(4, 4).to(DEVICE)(torch.tensor([1])),
                "index_select": lambda: on(DEVICE, 4).index_select(0, torch.tensor([1])),
                "a CUDA number on the CPU": lambda: on("cpu", 4) * torch.tensor(2.0, device=DEVICE),
                "CUDA indices on the CPU": lambda: on("cpu", 4)[torch.tensor([0], device=DEVICE)],
            }
            if OTHER != DEVICE:
                mixed["add of two GPUs"] = lambda: on(DEVICE, 4) + on(OTHER, 4)
                mixed["linear of two GPUs"] = lambda: nn.Linear(4, 4).to(DEVICE)(on(OTHER, 2, 4))
                mixed["indices on another GPU"] = lambda: on(DEVICE, 4)[torch.tensor([0], device=OTHER)]
            sentence = "Expected all tensors to be on the same device|indices should be either on cpu or on the same"
            for name, operation in mixed.items():
                try:
                    operation()
                except RuntimeError as error:
                    assert re.search(sentence, str(error)), f"{name}: {error}"
                else:
                    raise AssertionError(f"{name} was allowed")

        def check_what_cuda_allows_is_allowed():
            ones = on(DEVICE, 2, 2)
            assert (ones * torch.tensor(3.0)).cpu().tolist() == [[3, 3], [3, 3]]
            assert torch.where(ones > 0, torch.tensor(2.0), ones).sum().item() == 8
            assert ones[torch.tensor([1])].device == DEVICE
            ones.clone()[torch.tensor([0])] = torch.tensor(0.0)
            assert ones.to(OTHER).device == OTHER
            assert torch.zeros(2, 2).copy_(ones).tolist() == [[1, 1], [1, 1]]
            assert ones.clone().copy_(torch.zeros(2, 2)).sum().item() == 0

        def check_views_share_memory():
            rows = torch.arange(6.0, device=DEVICE).view(2, 3)
            rows[1].add_(1)
            rows.t()[0].mul_(2)
            rows.view(-1)[1:3].zero_()
            rows.unfold(1, 2, 1)[0, 1, 1] = 7
            assert rows.cpu().tolist() == [[0, 0, 7], [8, 5, 6]]
            torch.add(rows[:, ::2], 1, out=rows[:, ::2])
            rows[:, 1].copy_(torch.tensor([3.0, 4.0]))
            assert rows.cpu().tolist() == [[1, 3, 8], [9, 4, 7]]
            pairs = torch.view_as_complex(rows[:, :2].contiguous())
            assert pairs.conj().cpu().tolist() == [1 - 3j, 9 - 4j]
            assert pairs.mul_(1j).conj().resolve_conj().cpu().tolist() == [-3 - 1j, -4 - 9j]
            grown = torch.ones(2, device=DEVICE)
            torch.mul(rows, 2, out=grown.resize_(0))
            assert grown.cpu().tolist() == [[2, 6, 16], [18, 8, 14]]

        def check_results_are_where_they_were_asked_for():
            ones = on(DEVICE, 2, 2)
            made = [factory(2, 3, device=DEVICE) for factory in (torch.zeros, torch.empty, torch.rand, torch.randn)]
            made += [torch.eye(2, device=DEVICE), torch.randperm(3, device=DEVICE), torch.arange(3, device=DEVICE)]
            made += [torch.tensor([1.0], device=DEVICE), torch.linspace(0, 1, 3, device=DEVICE), torch.zeros_like(ones)]
            made += [torch.kron(ones, ones), torch.linalg.svd(ones)[1], torch.tril_indices(2, 2, device=DEVICE)]
            with torch.device(DEVICE):
                made.append(nn.Linear(3, 3).weight)
            with torch.cuda.device(OTHER):
                assert torch.ones(1, device="cuda").device == OTHER
            assert all(t.device == DEVICE for t in made)
            with pytest.raises(RuntimeError, match="invalid device ordinal"):
                torch.ones(1, device=f"cuda:{torch.cuda.device_count()}")

        def check_a_generator_belongs_to_a_device():
            first = torch.randn(3, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(4))
            again = torch.randn(3, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(4))
            assert torch.equal(first, again)
            with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
                torch.randn(3, device=DEVICE, generator=torch.Generator())
            with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator"):
                torch.randn(3, generator=torch.Generator(DEVICE))

        def check_torch_knows_its_accelerator():
            assert torch.accelerator.current_accelerator().type == "cuda"
            assert torch.device(0) == DEVICE
            assert torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            assert torch.cuda.get_device_capability() >= (8, 0)
        """
    )


def test_training_equals_the_cpu(run) -> None:
    run(
        """
        from torch.utils.checkpoint import checkpoint

        def losses_of(net, device, **options):
            optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, **options)
            losses = []
            for _ in range(3):
                optimizer.zero_grad()
                loss = net(*inputs(device)).square().mean()
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                losses.append(loss.item())
            return losses

        def check_training_steps():
            for options in ({}, {"fused": True}, {"foreach": False}):
                on_cpu = net_of()
                on_device = copy.deepcopy(on_cpu).to(DEVICE)
                assert losses_of(on_device, DEVICE, **options) == pytest.approx(losses_of(on_cpu, "cpu"), rel=1e-9)
                for ours, theirs in zip(on_device.parameters(), on_cpu.parameters()):
                    assert ours.device == ours.grad.device == DEVICE
                    same(ours, theirs)

        def check_a_model_over_two_devices():
            on_cpu = net_of()
            split = copy.deepcopy(on_cpu).to(DEVICE)
            split.head.to(OTHER)
            split.head.register_forward_pre_hook(lambda module, args: args[0].to(OTHER))
            for net, device in ((on_cpu, "cpu"), (split, DEVICE)):
                net(*inputs(device)).square().sum().backward()
            assert split.head.weight.grad.device == OTHER
            for ours, theirs in zip(split.parameters(), on_cpu.parameters()):
                same(ours.grad, theirs.grad)

        def check_moving_keeps_the_parameters():
            net = net_of()
            parameters = list(net.parameters())
            state = copy.deepcopy(net.state_dict())
            net.to(DEVICE)
            assert all(a is b and b.is_cuda for a, b in zip(parameters, net.parameters(), strict=True))
            net.load_state_dict(state)
            net.to(OTHER).half().float().cpu()
            assert all(a is b and not b.is_cuda for a, b in zip(parameters, net.parameters(), strict=True))

        def check_data_is_exchanged_across_devices():
            layer = nn.Linear(4, 3).to(DEVICE)
            weight = layer.weight
            weight.data = weight.data.cpu()
            assert layer.weight is weight and weight.device.type == "cpu" and weight.is_leaf
            weight.data = weight.data.to(OTHER)
            assert weight.device == OTHER and weight.requires_grad

        def check_checkpointing():
            net = net_of().to(DEVICE)
            picture, label = inputs(DEVICE)
            net(picture, label).sum().backward()
            want = [p.grad.cpu() for p in net.parameters()]
            net.zero_grad()
            checkpoint(net, picture, label, use_reentrant=False).sum().backward()
            for p, grad in zip(net.parameters(), want):
                same(p.grad, grad)

        def check_checkpointing_repeats_random_numbers():
            x = torch.ones(64, device=DEVICE, requires_grad=True)
            y = checkpoint(lambda x: F.dropout(x, 0.5), x, use_reentrant=False)
            y.sum().backward()
            assert torch.equal(x.grad, y.detach())

        def check_softmax_of_half_precision():
            x = torch.randn(3, 5).bfloat16()
            for function in (F.softmax, F.log_softmax):
                values = []
                for device in (DEVICE, "cpu"):
                    leaf = x.detach().to(device).requires_grad_()
                    y = function(leaf, -1, dtype=torch.float32)
                    y.square().sum().backward()
                    values.append((y.detach().cpu(), leaf.grad.cpu()))
                torch.testing.assert_close(values[0], values[1])

        def check_autocast():
            x = torch.randn(2, 4, device=DEVICE)
            layer = nn.Linear(4, 3).to(DEVICE)
            conv = nn.Conv2d(2, 3, 3).to(DEVICE)
            for dtype in (torch.bfloat16, torch.float16):
                with torch.autocast("cuda", dtype=dtype):
                    assert torch.get_autocast_dtype("cuda") == dtype
                    y = layer(x)
                    assert y.dtype == (x @ x.t()).dtype == conv(torch.randn(1, 2, 5, 5, device=DEVICE)).dtype == dtype
                    assert y.softmax(-1).dtype == F.layer_norm(y, (3,)).dtype == torch.float32
                    assert layer.cpu()(x.cpu()).dtype == torch.float32
                    layer.to(DEVICE)
                y.float().sum().backward()
                assert layer.weight.grad.dtype == torch.float32

        def check_grad_scaler():
            layer = nn.Linear(4, 3).to(DEVICE)
            optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
            scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
            before = layer.bias.detach().clone()
            scaler.scale(layer(torch.ones(1, 4, device=DEVICE)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            torch.testing.assert_close(layer.bias.detach(), before - 0.1)

        def check_compiling_without_a_code_generator():
            net = net_of().to(DEVICE)
            compiled = torch.compile(net, backend="aot_eager")
            same(compiled(*inputs(DEVICE)), net_of()(*inputs()))
        """
    )


def test_memory_is_counted_and_limited(run) -> None:
    run(
        """
        MIB = 2**20

        def check_known_allocations():
            before = torch.cuda.memory_allocated()
            kept = torch.ones(MIB, device=DEVICE)
            assert torch.cuda.memory_allocated() - before == 4 * MIB
            small = torch.ones(3, device=DEVICE, dtype=torch.bfloat16)
            assert torch.cuda.memory_allocated() - before == 4 * MIB + 512
            view = kept[:10].view(2, 5)
            del small
            assert torch.cuda.memory_allocated() - before == 4 * MIB
            del kept
            assert torch.cuda.memory_allocated() - before == 4 * MIB  # the view holds it
            del view
            assert torch.cuda.memory_allocated() == before

        def check_peaks():
            kept = torch.ones(MIB, device=DEVICE)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            assert torch.cuda.max_memory_allocated() == before
            (kept + 1).mul_(2).sum()
            assert 4 * MIB <= torch.cuda.max_memory_allocated() - before < 5 * MIB
            assert torch.cuda.memory_allocated() == before
            torch.cuda.reset_peak_memory_stats()
            kept.mul_(2)
            assert torch.cuda.max_memory_allocated() == before

        def check_a_training_step_has_the_peak_of_its_parts():
            layer = nn.Linear(1024, 1024, bias=False).to(DEVICE)  # 4 MiB
            x = torch.ones(1024, 1024, device=DEVICE)
            layer(x).square().sum().backward()
            layer.zero_grad()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            layer(x).square().sum().backward()
            assert torch.cuda.memory_allocated() - before == 4 * MIB  # the gradient of the weight
            assert 8 * MIB <= torch.cuda.max_memory_allocated() - before < 17 * MIB  # y and gradients of its size

        def check_each_device_has_its_own_counters():
            if OTHER == DEVICE:
                return
            before = [torch.cuda.memory_allocated(i) for i in range(2)]
            kept = torch.ones(MIB, device=OTHER)
            assert torch.cuda.memory_allocated(0) == before[0]
            assert torch.cuda.memory_allocated(OTHER) - before[1] == 4 * MIB
            with torch.cuda.device(OTHER):
                assert torch.cuda.memory_allocated() - before[1] == 4 * MIB

        def check_torch_accelerator_has_the_same_numbers():
            kept = torch.ones(MIB, device=DEVICE)
            assert torch.accelerator.memory_allocated() == torch.cuda.memory_allocated()
            free, total = torch.cuda.mem_get_info()
            assert 0 < free < total

        def check_freed_storage():
            before = torch.cuda.memory_allocated()
            kept = torch.ones(MIB, device=DEVICE)
            kept.untyped_storage().resize_(0)
            assert torch.cuda.memory_allocated() == before
            kept.untyped_storage().resize_(4 * MIB)
            kept.copy_(torch.ones(MIB))
            assert kept.sum().item() == MIB

        def check_out_of_memory():
            with simulated_cuda.memory_limit(192 * MIB):
                for _ in range(2):
                    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
                        torch.empty(256 * MIB, device=DEVICE, dtype=torch.uint8)
                assert torch.ones(MIB, device=DEVICE).sum().item() == MIB
            assert torch.empty(256 * MIB, device=DEVICE, dtype=torch.uint8).numel() == 256 * MIB

        def check_the_limit_is_exact():
            if not simulated_cuda.is_simulated():
                return
            with simulated_cuda.memory_limit(torch.cuda.memory_allocated() + 8192):
                kept = torch.ones(2048, device=DEVICE)
                with pytest.raises(torch.OutOfMemoryError):
                    kept + 1
                kept.add_(1)
                assert torch.ones(4096, device=OTHER).device == OTHER

        def check_fresh_memory_is_not_zero():
            if simulated_cuda.is_simulated():
                for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
                    assert torch.empty(3, dtype=dtype, device=DEVICE).isnan().all()

        def check_copies_are_counted():
            if not simulated_cuda.is_simulated():
                return
            before = simulated_cuda.counters()
            x = torch.ones(256).to(DEVICE)
            y = (x * 2).to(OTHER)
            y.cpu()
            y[0].item()
            assert simulated_cuda.counters().since(before)[1:] == (1, 1024, 1, 1024, 1, 1024, 1)
            assert simulated_cuda.counters().since(before).operations > 0
        """
    )


def test_pinned_memory_streams_and_files(run) -> None:
    run(
        """
        def check_pinned_memory():
            x = torch.ones(1000)
            pinned = x.pin_memory()
            assert pinned.is_pinned() and pinned[10:20].is_pinned() and not x.is_pinned()
            assert torch.equal(pinned, x)
            assert torch.empty(3, pin_memory=True).is_pinned()
            assert torch.equal(pinned.to(DEVICE, non_blocking=True).cpu(), x)

        def check_streams_and_events():
            side = torch.cuda.Stream()
            assert torch.cuda.current_stream() == torch.cuda.default_stream() != side
            with torch.cuda.stream(side):
                assert torch.cuda.current_stream() == side
                x = torch.ones(3).pin_memory().to(DEVICE, non_blocking=True)
                x.record_stream(torch.cuda.default_stream())
            assert torch.cuda.current_stream() == torch.cuda.default_stream()
            torch.cuda.current_stream().wait_stream(side)
            side.synchronize()
            assert x.sum().item() == 3 and side.query()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            end.record()
            torch.cuda.synchronize()
            assert start.elapsed_time(end) >= 0
            assert torch.cuda.Stream(OTHER).device == OTHER

        def check_files():
            from safetensors.torch import load_file, save_file

            with tempfile.TemporaryDirectory() as folder:
                values = {"a": torch.arange(4.0, device=DEVICE)}
                torch.save(values, f"{folder}/a.pt")
                assert torch.load(f"{folder}/a.pt", weights_only=True)["a"].device == DEVICE
                assert torch.load(f"{folder}/a.pt", map_location="cpu", weights_only=True)["a"].tolist() == [0, 1, 2, 3]
                assert torch.load(f"{folder}/a.pt", map_location=OTHER, weights_only=True)["a"].device == OTHER
                save_file(values, f"{folder}/a.safetensors")
                for device in (DEVICE, OTHER):
                    loaded = load_file(f"{folder}/a.safetensors", device=str(device))["a"]
                    assert loaded.device == device and loaded.tolist() == [0, 1, 2, 3]

        def check_copies_of_modules():
            import pickle

            layer = nn.Linear(2, 2).to(OTHER)
            for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
                assert other.weight.device == OTHER and torch.equal(other.weight, layer.weight)
        """
    )


@pytest.mark.skipif(not find_spec("accelerate"), reason="needs accelerate, of the extra 'train'")
def test_accelerate_offloads_and_dispatches(run) -> None:
    run(
        """
        import accelerate

        def equals_plain(net, device):
            '''Output and the picture's gradient, of a few calls.'''
            plain = net_of()
            for _ in range(2):
                (picture, label), (x, y) = inputs(), inputs(device)
                out, want = net(x.requires_grad_(), y), plain(picture.requires_grad_(), label)
                out.sum().backward()
                want.sum().backward()
                same(out, want)
                same(x.grad, picture.grad)

        def check_cpu_offload():
            before = torch.cuda.memory_allocated()
            net = accelerate.cpu_offload(net_of(), execution_device=DEVICE, offload_buffers=True)
            assert net.head.weight.device.type == "meta"
            equals_plain(net, DEVICE)
            if simulated_cuda.is_simulated():  # cuBLAS would have its workspace there
                assert torch.cuda.memory_allocated() == before

        def check_disk_offload():
            with tempfile.TemporaryDirectory() as folder:
                net = accelerate.disk_offload(net_of(), folder, execution_device=DEVICE)
                equals_plain(net, DEVICE)

        def check_dispatch_model():
            where = {"conv_in": 0, "depthwise": 0, "norm": 0, "embedding": 0, "head": 0}
            where |= {"blocks.0": OTHER.index, "blocks.1": "cpu", "blocks.2": "disk"}
            with tempfile.TemporaryDirectory() as folder:
                net = accelerate.dispatch_model(net_of(), where, main_device=0, offload_dir=folder)
                assert net.blocks[0].to_out.weight.device == OTHER
                assert net.blocks[1].to_out.weight.device.type == net.blocks[2].to_out.weight.device.type == "meta"
                equals_plain(net, DEVICE)
                equals_plain(net, "cpu")  # the hooks move the inputs

        def check_a_device_map_by_memory():
            net = net_of()
            size = accelerate.utils.compute_module_sizes(net)
            block = size["blocks.0"]
            limits = {0: size[""] - block, "cpu": 10 * size[""]}  # room for the largest layer is set aside
            if OTHER != DEVICE:
                limits[1] = block
            where = accelerate.infer_auto_device_map(net, limits, no_split_module_classes=["Attention"])
            assert {0, "cpu"} <= set(where.values())
            equals_plain(accelerate.dispatch_model(net, where), DEVICE)
        """
    )


@pytest.mark.skipif(not find_spec("diffusers"), reason="needs diffusers, of the extra 'train'")
def test_diffusers_offloads_and_casts(run) -> None:
    run(
        """
        from diffusers.hooks import apply_group_offloading, apply_layerwise_casting

        def offloaded(**options):
            '''A net under group offloading equals the plain one, and leaves no weight on the device.'''
            before = torch.cuda.memory_allocated()
            net = net_of()
            apply_group_offloading(net, onload_device=DEVICE, offload_device=torch.device("cpu"), **options)
            with torch.no_grad():
                for _ in range(3):  # with streams, the first call learns the order of the layers
                    same(net(*inputs(DEVICE)), net_of()(*inputs()))
            assert not any(p.is_cuda for p in net.parameters())
            if simulated_cuda.is_simulated():
                buffers = sum(b.is_cuda for b in net.buffers())  # with streams, diffusers leaves them there
                assert torch.cuda.memory_allocated() - before == 512 * buffers

        def check_blocks():
            offloaded(offload_type="block_level", num_blocks_per_group=1)
            offloaded(offload_type="block_level", num_blocks_per_group=2, non_blocking=True)

        def check_leaves():
            offloaded(offload_type="leaf_level")

        def check_blocks_with_a_stream():
            for more in ({}, {"record_stream": True}, {"low_cpu_mem_usage": True}):
                offloaded(offload_type="block_level", num_blocks_per_group=1, use_stream=True, **more)

        def check_leaves_with_a_stream():
            for more in ({}, {"record_stream": True}, {"low_cpu_mem_usage": True}):
                offloaded(offload_type="leaf_level", use_stream=True, **more)

        def check_to_disk():
            for kind in ({"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}):
                for use_stream in (False, True):
                    with tempfile.TemporaryDirectory() as folder:
                        offloaded(**kind, use_stream=use_stream, offload_to_disk_path=folder)

        def check_layerwise_casting():
            layers = (nn.Linear, nn.Conv2d)
            plain, net = net_of().float(), net_of().float().to(DEVICE)
            for module in plain.modules():
                if isinstance(module, layers):
                    for p in module.parameters():
                        p.data = p.data.to(torch.float8_e4m3fn).float()
            apply_layerwise_casting(net, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32,
                skip_modules_pattern=("norm", "embedding"))
            assert net.head.weight.dtype == torch.float8_e4m3fn and net.head.weight.device == DEVICE
            picture, label = inputs()
            with torch.no_grad():
                want = plain(picture.float(), label)
                got = net(picture.float().to(DEVICE), label.to(DEVICE))
            torch.testing.assert_close(got.cpu(), want, rtol=1e-3, atol=1e-3)
            assert net.head.weight.dtype == torch.float8_e4m3fn
        """
    )


def test_every_failing_check_is_shown(run_on_simulated_cuda) -> None:
    with pytest.raises(pytest.fail.Exception) as failure:
        run_on_simulated_cuda(
            """
            def check_one():
                assert 1 == 2

            def check_another():
                pass

            def check_mixed():
                torch.ones(2, device=DEVICE) + torch.ones(2)

            def check_warning():
                import warnings

                warnings.warn("an error")
            """
        )
    text = str(failure.value)
    assert "assert 1 == 2" in text
    assert "torch.ones(2, device=DEVICE) + torch.ones(2)" in text
    assert "UserWarning: an error" in text
    assert "check_another" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="has no use for the simulation")
def test_the_simulation_must_come_before_torch() -> None:
    code = "import simulated_cuda, torch; simulated_cuda.install('nowhere.so')"
    tests = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=tests, capture_output=True, text=True, check=False)
    assert "before torch is imported" in done.stderr


def test_a_machine_without_the_tools_is_told_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(build.sys, "platform", "linux")
    monkeypatch.setattr(build, "OLDEST_TORCH", (2, 0))
    monkeypatch.setattr(build, "_path", lambda: "")
    with pytest.raises(build.CannotBuild, match=r"install g\+\+"):
        build.library()
    monkeypatch.setattr(build.shutil, "which", lambda name, path: None if name == "ninja" else name)
    with pytest.raises(build.CannotBuild, match="pip install ninja"):
        build.library()
