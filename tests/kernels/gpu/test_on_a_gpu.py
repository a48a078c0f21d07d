"""What only a real GPU can show: steps that do not wait for it, CUDA graphs, compiled training steps."""

import copy

import pytest
import torch
from torch import nn

from archopt import AGD, Nero
from archopt.kernels import gpu

pytestmark = pytest.mark.usefixtures("real_gpu", "_exact_passes")


@pytest.fixture
def _exact_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward passes in float32, the same at every call: what two steps differ by is the steps'."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 300),
        nn.LayerNorm(300),
        nn.Linear(300, 10),
    )
    return nn.Sequential(*layers).cuda()


def loss_of(net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return net(images).square().mean()


def train(net: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss_of(net, images).backward()
    optimizer.step()


def train_between_replays(net: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor) -> None:
    """An eager step that leaves a captured graph the gradients that it writes to."""
    kept = [param.grad for param in net.parameters()]
    train(net, optimizer, images)
    for param, grad in zip(net.parameters(), kept, strict=True):
        param.grad = grad


def test_a_step_does_not_wait_for_the_device(device: str) -> None:
    net = model()
    optimizer = Nero(net, fused=True)
    images = torch.randn(4, 3, 8, 8, device=device)
    for t in range(4):
        optimizer.zero_grad(set_to_none=True)
        loss_of(net, images).backward()
        if t == 2:  # memory that no step has seen
            for param in net.parameters():
                param.grad = param.grad.clone()
        if t:  # the first step makes the state
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("whole", [False, True], ids=["step alone", "training step"])
def test_a_captured_step_follows_the_eager_one(whole: bool, device: str) -> None:
    net = model()
    optimizer = Nero(net, fused=True, capturable=True, lr=torch.tensor(0.01, device=device))
    images = torch.randn(4, 3, 8, 8, device=device)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train(net, optimizer, images)
    torch.cuda.current_stream().wait_stream(side)
    twin = copy.deepcopy(net)
    other = Nero(twin, fused=True, capturable=True, lr=torch.tensor(0.01, device=device))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for a, b in zip(twin.parameters(), net.parameters(), strict=True):
            a.copy_(b)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    if not whole:
        loss_of(net, images).backward()
    with torch.cuda.graph(graph):
        if whole:
            loss_of(net, images).backward()
        optimizer.step()
    for t in range(4):
        for opt in (optimizer, other):
            opt.param_groups[0]["lr"].fill_(0.01 / (1 + t))
        if whole:
            graph.replay()
        else:
            static = [p.grad for p in net.parameters()]
            fresh = torch.autograd.grad(loss_of(net, images), list(net.parameters()))
            torch._foreach_copy_(static, list(fresh))
            graph.replay()
        train(twin, other, images)
        if t == 1:  # an eager step between replays must not disturb the graph
            train_between_replays(net, optimizer, images)
            train(twin, other, images)
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    for param in net.parameters():
        assert float(optimizer.state[param]["step"]) == 3 + 4 + 1


def test_a_capture_without_a_step_before_it_says_what_to_do(device: str) -> None:
    param = nn.Parameter(torch.randn(4, 8, device=device))
    optimizer = Nero([param], fused=True, capturable=True)
    with torch.no_grad():
        optimizer._create_state()
    param.grad = torch.randn_like(param)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="take a step"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


def test_a_compiled_step_takes_another_form(device: str) -> None:
    net, twin = model(), model()
    optimizer, other = Nero(net), Nero(twin)
    step = torch.compile(other.step, fullgraph=True)
    images = torch.randn(4, 3, 8, 8, device=device)
    for _ in range(3):
        for each, opt in ((net, optimizer.step), (twin, step)):
            each.zero_grad()
            loss_of(each, images).backward()
            opt()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rule", [Nero, AGD])
def test_a_step_of_many_tensors_takes_no_copy_of_them(rule: type[Nero] | type[AGD], device: str) -> None:
    params = [nn.Parameter(torch.randn(2048, 2048, device=device)) for _ in range(8)]
    optimizer = rule(params, fused=True)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before <= 0.01 * sum(p.numel() * 4 for p in params)


def test_the_kernel_serves_by_default(device: str) -> None:
    net = model()
    optimizer = Nero(net)
    loss_of(net, torch.randn(4, 3, 8, 8, device=device)).backward()
    found = []
    call = gpu.nero
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "nero", lambda launches, o: (found.append(launches.tensors), call(launches, o)))
        optimizer.step()
    assert sum(found) == len(list(net.parameters()))


# -- AGD ---------------------------------------------------------------------------------------------------


def test_a_step_of_agd_does_not_wait_for_the_device(device: str) -> None:
    net = model()
    optimizer = AGD(net, fused=True)
    images = torch.randn(4, 3, 8, 8, device=device)
    for t in range(4):
        optimizer.zero_grad(set_to_none=True)
        loss_of(net, images).backward()
        if t == 2:  # memory that no step has seen
            for param in net.parameters():
                param.grad = param.grad.clone()
        optimizer.param_groups[0]["lr"] = 1.0 / (1 + t)  # as a scheduler does
        if t:  # the first step compiles
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_captured_step_of_agd_follows_the_eager_one(device: str) -> None:
    net = model()
    rate, other_rate = (torch.tensor(1.0, device=device) for _ in range(2))
    images = torch.randn(4, 3, 8, 8, device=device)
    twin = copy.deepcopy(net)
    optimizer, other = AGD(net, fused=True, capturable=True), AGD(twin, fused=True)
    for opt, lr in ((optimizer, rate), (other, other_rate)):
        for group in opt.param_groups:
            group["lr"] = lr

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train(net, optimizer, images)
    torch.cuda.current_stream().wait_stream(side)
    with torch.no_grad():
        for a, b in zip(twin.parameters(), net.parameters(), strict=True):
            a.copy_(b)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss_of(net, images).backward()
        optimizer.step()
    for t in range(4):
        rate.fill_(1.0 / (1 + t))
        other_rate.fill_(1.0 / (1 + t))
        graph.replay()
        train(twin, other, images)
        if t == 1:  # an eager step between replays must not disturb the graph
            train_between_replays(net, optimizer, images)
            train(twin, other, images)
        torch.testing.assert_close(optimizer.eta, other.eta, rtol=1e-4, atol=0.0)
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
