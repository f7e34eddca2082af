"""Training steps on a device other than the CPU, with real values (see tests/second_device.py)."""

from __future__ import annotations

import pytest


def test_mixed_devices_raise_the_sentence_of_cuda(run_on_second_device) -> None:
    run_on_second_device(
        """
        import pytest

        sentence = "Expected all tensors to be on the same device, but found at least two devices"
        mixed = [
            lambda: nn.Linear(4, 4).to(DEVICE)(torch.randn(2, 4)),
            lambda: nn.Linear(4, 4)(torch.randn(2, 4, device=DEVICE)),
            lambda: nn.Conv2d(2, 3, 3).to(DEVICE)(torch.randn(1, 2, 5, 5)),
            lambda: torch.einsum("ij,jk", torch.ones(2, 3), torch.ones(3, 4, device=DEVICE)),
            lambda: torch.ones(4, device=DEVICE) + torch.ones(4),
            lambda: torch.ones(4).mul_(torch.ones(4, device=DEVICE)),
            lambda: torch.ones(4, device=DEVICE) + torch.ones(4, device="fakegpu:1"),
            lambda: torch.ones(4) * torch.tensor(2.0, device=DEVICE),
            lambda: torch.ones(4)[torch.tensor([0], device=DEVICE)],
        ]
        for operation in mixed:
            with pytest.raises(RuntimeError, match=sentence):
                operation()
        """
    )


def test_what_cuda_allows_is_allowed(run_on_second_device) -> None:
    run_on_second_device(
        """
        ones = torch.ones(2, 2, device=DEVICE)
        assert (ones * torch.tensor(3.0)).cpu().tolist() == [[3, 3], [3, 3]]
        assert ones[torch.tensor([1])].device == DEVICE
        assert ones.to("fakegpu:1").device == torch.device("fakegpu:1")
        assert torch.zeros(2, 2).copy_(ones).tolist() == [[1, 1], [1, 1]]
        assert ones.clone().copy_(torch.zeros(2, 2)).sum().item() == 0

        rows = torch.arange(6.0, device=DEVICE).view(2, 3)
        rows[1].add_(1)
        rows.t()[0].mul_(2)
        rows.view(-1)[1:3].zero_()
        assert rows.cpu().tolist() == [[0, 0, 0], [8, 5, 6]]

        factories = torch.zeros, torch.ones, torch.empty, torch.rand, torch.randn
        made = [factory(2, 3, device=DEVICE) for factory in factories]
        made += [torch.eye(2, device=DEVICE), torch.tensor([1.0], device=DEVICE), torch.zeros_like(ones)]
        made += [torch.kron(ones, ones), torch.linalg.svd(ones)[1], torch.linalg.solve(made[5] + ones, ones)]
        assert all(t.device == DEVICE for t in made)
        """
    )


def test_training_equals_the_cpu(run_on_second_device) -> None:
    run_on_second_device(
        """
        import copy

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 16, 3, padding=1)
                self.norm = nn.GroupNorm(4, 16)
                self.up = nn.Linear(16, 32)
                self.layer_norm = nn.LayerNorm(32)
                self.out = nn.Linear(32, 8)

            def forward(self, x):
                x = self.norm(self.conv(x)).mean((2, 3))
                return self.out(self.layer_norm(torch.relu(self.up(x))))

        def step(net, x):
            optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
            losses = []
            for _ in range(3):
                optimizer.zero_grad()
                loss = net(x).square().mean()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            return losses

        on_cpu = Net()
        on_device = copy.deepcopy(on_cpu)
        parameters = list(on_device.parameters())
        on_device.to(DEVICE)
        assert all(a is b for a, b in zip(parameters, on_device.parameters()))
        assert all(isinstance(p, nn.Parameter) and p.device == DEVICE for p in parameters)

        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(step(on_device, x.to(DEVICE)), step(on_cpu, x))
        for ours, theirs in zip(on_device.parameters(), on_cpu.parameters()):
            assert ours.grad.device == DEVICE
            torch.testing.assert_close(ours.grad.cpu(), theirs.grad)
            torch.testing.assert_close(ours.detach().cpu(), theirs.detach())

        on_device.load_state_dict(on_cpu.state_dict())
        assert on_device.cpu().up.weight.device.type == "cpu"
        """
    )


def test_the_machinery_around_a_model_works(run_on_second_device) -> None:
    run_on_second_device(
        """
        from torch.utils.checkpoint import checkpoint

        layer = nn.Linear(4, 3).to(DEVICE)
        x = torch.randn(2, 4, device=DEVICE, requires_grad=True)

        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            y = layer(x)
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32

        x.grad = None
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        assert x.grad.device == DEVICE

        with torch.device(DEVICE):
            assert nn.Linear(3, 3).weight.device == DEVICE

        layer.weight.data = layer.weight.data.cpu()
        assert layer.weight.device.type == "cpu" and isinstance(layer.weight, nn.Parameter)
        layer.weight.data = layer.weight.data.to("fakegpu:1")
        assert layer.weight.device == torch.device("fakegpu:1")
        """
    )


def test_a_failing_snippet_fails_the_test_with_its_traceback(run_on_second_device) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"assert 1 == 2(.|\n)*AssertionError"):
        run_on_second_device("assert 1 == 2")
