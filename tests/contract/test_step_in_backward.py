"""Stepping inside backward: the bits of the ordinary step, the memory of the largest gradient, and refusals."""

import copy
import functools
import itertools
import json
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import archopt

RULES = {
    "nero": archopt.Nero,
    "nero-foreach": functools.partial(archopt.Nero, foreach=True),
    "nero-plain": functools.partial(archopt.Nero, foreach=False),
    "lamb": archopt.Lamb,
    "lamb-plain": functools.partial(archopt.Lamb, foreach=False),
    "madam": archopt.Madam,
    "madam-plain": functools.partial(archopt.Madam, foreach=False),
}


class Tied(nn.Module):
    """Embedding and head are one table; a branch that is not used, and a norm layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(12, 8)
        self.hidden = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.unused = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.hidden(self.norm(self.tokens(tokens))))
        return nn.functional.linear(hidden, self.tokens.weight)


def model(dtype: torch.dtype = torch.float32) -> Tied:
    torch.manual_seed(0)
    return Tied().to(dtype)


def loss(net: nn.Module, seed: int) -> Tensor:
    tokens = torch.randint(12, (5, 4), generator=torch.Generator().manual_seed(seed))
    return net(tokens).float().logsumexp(-1).mean()


def same_bits(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_weights_and_state_have_the_bits_of_the_ordinary_step(rule: str, dtype: torch.dtype) -> None:
    ordinary, stepping = model(dtype), model(dtype)
    first, second = RULES[rule](ordinary.parameters()), RULES[rule](stepping.parameters())
    archopt.step_in_backward(second)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (first, second)]
    for seed in range(4):
        loss(ordinary, seed).backward()
        loss(stepping, seed).backward()
        assert all(param.grad is None for param in stepping.parameters())
        for optimizer, scheduler in zip((first, second), schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    assert same_bits(ordinary, stepping)
    saved, other = first.state_dict(), second.state_dict()
    assert saved["param_groups"] == other["param_groups"]
    assert saved["state"].keys() == other["state"].keys()
    for index, state in saved["state"].items():
        assert all(torch.equal(value, other["state"][index][name]) for name, value in state.items())


def test_tied_weights_are_updated_once_a_backward() -> None:
    net = model()
    optimizer = archopt.Nero(net.parameters())
    archopt.step_in_backward(optimizer)
    loss(net, 0).backward()
    assert float(optimizer.state[net.tokens.weight]["step"]) == 1


def live_gradients(net: nn.Module, optimizer: Any, *, in_backward: bool, inputs: Tensor) -> int:
    """The most bytes of gradients that were alive at once during a backward, each seen by weak reference."""
    seen: list[weakref.ref[Tensor]] = []
    peak = 0

    def look(param: Tensor) -> None:
        nonlocal peak
        assert param.grad is not None
        seen.append(weakref.ref(param.grad))
        alive = [grad for reference in seen if (grad := reference()) is not None]
        peak = max(peak, sum(grad.untyped_storage().nbytes() for grad in alive))

    for param in net.parameters():  # before those of step_in_backward, so that it is seen what they will free
        param.register_post_accumulate_grad_hook(look)
    if in_backward:
        archopt.step_in_backward(optimizer)
    net(inputs).square().mean().backward()
    return peak


@pytest.mark.parametrize("rule", ["nero", "lamb", "madam"])
def test_gradients_take_no_more_than_the_largest_layer(rule: str) -> None:
    def stack() -> nn.Module:
        return nn.Sequential(
            *[nn.Linear(64, 64, bias=False) for _ in range(8)], nn.Linear(64, 128, bias=False)
        )

    inputs, sizes = torch.randn(4, 64), [p.numel() * 4 for p in stack().parameters()]
    nets = stack(), stack()
    peaks = [
        live_gradients(net, RULES[rule](net.parameters()), in_backward=flag, inputs=inputs)
        for net, flag in zip(nets, (False, True), strict=True)
    ]
    assert peaks == [sum(sizes), max(sizes)]


def highest(work: Callable[[], object]) -> int:
    """By how many bytes memory rises during some work, at the most: every allocation of torch counts."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        work()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


def test_memory_of_a_backward_with_its_step_falls_by_the_gradients_of_all_but_few_layers() -> None:
    layers, inputs = 16, torch.randn(2, 128)
    layer = 128 * 128 * 4

    def peak(stepping: bool) -> int:
        net = nn.Sequential(*[nn.Linear(128, 128, bias=False) for _ in range(layers)])
        optimizer = archopt.Nero(net.parameters(), fused=False, foreach=False)
        handle = archopt.step_in_backward(optimizer)
        net(inputs).square().mean().backward()  # makes the state
        optimizer.step()
        if not stepping:
            handle.remove()

        def work() -> None:
            net(inputs).square().mean().backward()
            optimizer.step()

        return highest(work)

    ordinary, stepping = peak(False), peak(True)
    assert ordinary >= layers * layer
    assert (
        stepping <= 6 * layer
    )  # one gradient and what the plain step of one tensor holds; activations are small


def test_accumulated_gradients_give_the_bits_of_the_ordinary_step() -> None:
    ordinary, stepping = model(), model()
    first, second = archopt.Nero(ordinary.parameters()), archopt.Nero(stepping.parameters())
    handle = archopt.step_in_backward(second)
    for step in range(3):
        for part in range(3):
            (loss(ordinary, 10 * step + part) / 3).backward()
        first.step()
        first.zero_grad()
        with handle.accumulating():
            for part in range(2):
                (loss(stepping, 10 * step + part) / 3).backward()
        assert stepping.hidden.weight.grad is not None
        (loss(stepping, 10 * step + 2) / 3).backward()
        assert stepping.hidden.weight.grad is None
        second.step()
    assert same_bits(ordinary, stepping)


def test_a_gradient_that_the_last_backward_does_not_reach_is_used_by_step() -> None:
    net = model()
    optimizer = archopt.Nero(net.parameters())
    handle = archopt.step_in_backward(optimizer)
    with handle.accumulating():
        net.unused(torch.ones(2, 8)).sum().backward()
    loss(net, 0).backward()
    before = net.unused.weight.clone()
    optimizer.step()
    assert not torch.equal(net.unused.weight, before)


def test_a_second_gradient_before_step_is_refused_and_moves_nothing() -> None:
    net = model()
    optimizer = archopt.Nero(net.named_parameters())
    archopt.step_in_backward(optimizer)
    loss(net, 0).backward()
    before = copy.deepcopy(net)
    with pytest.raises(RuntimeError, match=r"a second gradient for (tokens|hidden)\.\w+.*accumulating"):
        loss(net, 1).backward()
    assert same_bits(before, net)


def test_step_updates_weights_that_were_frozen_when_it_began() -> None:
    net = model()
    net.hidden.weight.requires_grad_(False)
    optimizer = archopt.Nero(net.parameters())
    archopt.step_in_backward(optimizer)
    net.hidden.weight.requires_grad_(True)
    loss(net, 0).backward()
    before = net.hidden.weight.clone()
    optimizer.step()
    assert not torch.equal(net.hidden.weight, before)


def test_the_closure_of_a_step_may_run_backward() -> None:
    ordinary, stepping = model(), model()
    first, second = archopt.Lamb(ordinary), archopt.Lamb(stepping)
    archopt.step_in_backward(second)

    def closure(net: nn.Module, optimizer: Any) -> Any:
        optimizer.zero_grad()
        value = loss(net, 0)
        value.backward()
        return value

    for _ in range(2):
        values = [
            o.step(functools.partial(closure, n, o)) for n, o in ((ordinary, first), (stepping, second))
        ]
        assert values[0] == values[1]
    assert same_bits(ordinary, stepping)


def test_remove_gives_back_ordinary_gradients() -> None:
    net = model()
    optimizer = archopt.Nero(net.parameters())
    archopt.step_in_backward(optimizer).remove()
    before = copy.deepcopy(net)
    loss(net, 0).backward()
    loss(net, 1).backward()
    assert net.hidden.weight.grad is not None
    assert same_bits(before, net)
    archopt.step_in_backward(optimizer).remove()  # and it may begin again


def test_loaded_state_goes_on_with_the_same_bits() -> None:
    net = model()
    optimizer = archopt.Nero(net.parameters())
    archopt.step_in_backward(optimizer)
    loss(net, 0).backward()
    optimizer.step()
    other = copy.deepcopy(net)
    resumed = archopt.Nero(other.parameters())
    archopt.step_in_backward(resumed)
    resumed.load_state_dict(optimizer.state_dict())
    for which, rule in ((net, optimizer), (other, resumed)):
        rule.param_groups[0]["lr"] = 0.03
        loss(which, 1).backward()
        rule.step()
    assert same_bits(net, other)


def test_a_gradient_that_is_not_finite_leaves_its_weights() -> None:
    net = nn.Linear(8, 4)
    optimizer = archopt.Lamb(net)
    archopt.step_in_backward(optimizer)
    before = copy.deepcopy(net)
    (net(torch.ones(2, 8)) * float("nan")).sum().backward()
    optimizer.step()
    assert same_bits(before, net)
    assert int(optimizer.state[net.weight]["skipped"]) == 1


def test_autocast_gives_the_bits_of_the_ordinary_step() -> None:
    ordinary, stepping = model(), model()
    first, second = archopt.Nero(ordinary.parameters()), archopt.Nero(stepping.parameters())
    archopt.step_in_backward(second)
    for net, optimizer in ((ordinary, first), (stepping, second)):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(net, 0)
        value.backward()
        optimizer.step()
    assert same_bits(ordinary, stepping)


def test_checkpointed_segments_give_the_bits_of_the_ordinary_step() -> None:
    def run(stepping: bool) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)])
        optimizer = archopt.Nero(net.parameters())
        if stepping:
            archopt.step_in_backward(optimizer)
        for seed in range(2):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
            for segment in net:
                x = torch.utils.checkpoint.checkpoint(segment, x, use_reentrant=False)
            x.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return net

    assert same_bits(run(False), run(True))


def test_a_grad_scaler_raises_in_its_step() -> None:
    net = nn.Linear(8, 4)
    optimizer = archopt.Nero(net.parameters())
    archopt.step_in_backward(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(net(torch.ones(2, 8)).square().mean()).backward()
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.step(optimizer)


def test_create_graph_is_refused() -> None:
    net = nn.Linear(8, 4)
    archopt.step_in_backward(archopt.Nero(net.parameters()))
    before = copy.deepcopy(net)
    with pytest.raises(RuntimeError, match="create_graph"):
        net(torch.ones(2, 8)).square().mean().backward(create_graph=True)
    assert same_bits(before, net)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (archopt.AGD, "AGD cannot.*step size is formed from the gradients of all tensors"),
        (archopt.AutoNero, "AutoNero cannot.*angle follows from the gradients of all"),
        (lambda net: archopt.constrain(archopt.Lamb(net)), "projects after each whole step"),
        (
            lambda net: torch.optim.SGD(net.parameters(), lr=0.1),
            r"torch\.optim\.sgd\.SGD.*optimiser of its own",
        ),
    ],
)
def test_optimisers_that_cannot_are_refused(build: Any, reason: str) -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    with pytest.raises(TypeError, match=reason):
        archopt.step_in_backward(build(net))


def test_a_rule_that_says_nothing_is_refused() -> None:
    class Mine(archopt.optim.base.ArchOptimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 1.0})

    with pytest.raises(TypeError, match="does not say"):
        archopt.step_in_backward(Mine(nn.Linear(2, 2).parameters()))


def test_to_attach_twice_is_refused() -> None:
    optimizer = archopt.Nero(nn.Linear(8, 4).parameters())
    archopt.step_in_backward(optimizer)
    with pytest.raises(ValueError, match="already"):
        archopt.step_in_backward(optimizer)


# -- several processes -------------------------------------------------------------------------------------


def _inputs_of(rank: int, store: str) -> Tensor:
    """Joins the two processes; each has inputs of its own."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    return torch.full((2, 8), 1.0 + rank)


def _ddp(rank: int, store: str) -> None:
    inputs = _inputs_of(rank, store)
    torch.manual_seed(0)
    net = nn.Linear(8, 4)
    wrapped = nn.parallel.DistributedDataParallel(net)
    seen: list[Tensor] = []
    net.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    wrapped(inputs).sum().backward()
    assert not torch.equal(seen[0], net.weight.grad)  # the reason: hooks come before the average
    net.zero_grad()
    archopt.step_in_backward(archopt.Nero(net.parameters()))
    before = copy.deepcopy(net)
    with pytest.raises(RuntimeError, match=r"2 processes.*DistributedDataParallel"):
        wrapped(inputs).sum().backward()
    assert same_bits(before, net)
    torch.distributed.destroy_process_group()


def test_ddp_is_refused_before_anything_moves(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_ddp, args=(str(tmp_path / "store"),), nprocs=2)


def _sharded(rank: int, store: str) -> None:
    inputs = _inputs_of(rank, store)
    results = []
    for stepping in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        for layer in net:
            fully_shard(layer)
        fully_shard(net)
        optimizer = archopt.Madam(net.parameters())
        if stepping:
            archopt.step_in_backward(optimizer)
        for _ in range(2):
            net(inputs).square().mean().backward()
            assert all((p.grad is None) == stepping for p in net.parameters())
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.full_tensor() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9),
    reason="gloo of older torch cannot average, which the mean of a DTensor needs",
)
def test_sharded_weights_get_the_bits_of_the_ordinary_step(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_sharded, args=(str(tmp_path / "store"),), nprocs=2)
