"""Steps of Nero's GPU kernel one after another: gradients that move about, groups that share launches, repetition.

The kernel itself is in test_gpu_nero.py.
"""

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from archopt import Nero
from archopt.kernels import gpu
from kernels.gpu.nero_cases import bits, calls, gap, give_gradients, many, placed, step_by
from kernels.test_cpu import random

# -- memory that moves about -------------------------------------------------------------------------------


def test_gradients_may_lie_elsewhere_at_every_step(device: str) -> None:
    """New memory each step, memory that comes back, and tensors that get no gradient: the same trajectory."""
    moving, fixed = many(device), many(device)
    optimizers = Nero(moving, fused=True), Nero(fixed, fused=True)
    held = []
    for t in range(4):
        for params, optimizer in zip((moving, fixed), optimizers, strict=True):
            if params is moving:
                held.append([p.grad for p in params])  # so that its memory is not given out again
                give_gradients(params, t)
            else:
                for i, p in enumerate(params):
                    grad = random(*p.shape, seed=100 * t + i).to(device)
                    p.grad = grad if p.grad is None else p.grad.copy_(grad)
            missing = params[t % 3].grad
            params[t % 3].grad = None
            optimizer.step()
            params[t % 3].grad = missing
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(moving, fixed, strict=True))


def test_nothing_is_prepared_again_where_nothing_moved(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = []
    make = gpu.nero_launches
    monkeypatch.setattr(
        gpu, "nero_launches", lambda *args, **options: (prepared.append(1), make(*args, **options))[1]
    )
    params = many(device)
    optimizer = Nero(params, fused=True)
    give_gradients(params, 0)
    for _ in range(3):
        optimizer.step()
    assert len(prepared) == 1
    first = [p.grad for p in params]
    give_gradients(params, 1)
    second = [p.grad for p in params]
    for grads in (second, first, second):
        step_by(optimizer, params, grads)
    assert len(prepared) == 2
    params[0].data = params[0].data.clone()
    optimizer.step()
    assert len(prepared) == 3
    # The same memory, seen as something else.
    params[0].data, params[0].grad = params[0].data.view(100, 20).t(), params[0].grad.view(100, 20).t()
    optimizer.step()
    assert len(prepared) == 4


def test_gradients_are_not_kept(device: str) -> None:
    params = many(device)
    optimizer = Nero(params, fused=True)
    give_gradients(params, 0)
    grad = weakref.ref(params[0].grad)
    optimizer.step()
    optimizer.zero_grad()
    assert grad() is None


def test_views_into_one_buffer_step_as_tensors_of_their_own(device: str) -> None:
    """DDP's gradient_as_bucket_view: addresses that are a multiple of an entry's size alone."""
    shapes = [(5, 64), (3,), (6, 2052), (7, 9000)]
    runs = []
    for shift in (0, 1):
        params = [nn.Parameter(placed(random(*s, seed=i), device)) for i, s in enumerate(shapes)]
        flat = torch.empty(sum(p.numel() for p in params) + 8, device=device)
        optimizer, start = Nero(params, fused=True), shift
        for i, param in enumerate(params):
            param.grad = flat[start : start + param.numel()].view(param.shape)
            param.grad.copy_(random(*param.shape, seed=10 + i))
            start += param.numel()
        optimizer.step()
        runs.append(params)
    for a, b in zip(*runs, strict=True):
        assert gap(a.reshape(1, -1), b.detach().cpu().reshape(1, -1)) <= 1e-6


# -- groups that share launches ------------------------------------------------------------------------------


def in_groups(params: list[nn.Parameter], **options: Any) -> list[dict[str, Any]]:
    return [{"params": [param], **options} for param in params]


def test_groups_with_equal_options_share_their_launches(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One group a tensor, with axes of their own: as many launches as of one group, and the same bits."""
    one, several = many(device), many(device)
    optimizers = Nero(one, fused=True), Nero(in_groups(several), fused=True)
    optimizers[1].param_groups[0]["neuron_dim"] = (0,)
    launched = calls(monkeypatch)
    for t in range(2):
        for params, optimizer in zip((one, several), optimizers, strict=True):
            give_gradients(params, t)
            optimizer.step()
    assert len(launched) == 4
    assert {found.tensors for found in launched} == {len(one)}
    assert len({len(found.calls) for found in launched}) == 1
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(one, several, strict=True))


@pytest.mark.parametrize(
    "option", [{"lr": 0.02}, {"beta": 0.9}, {"unit_norm": False}, {"zero_mean": False}, {"maximize": True}]
)
def test_groups_with_other_options_keep_them(option: dict[str, Any], device: str) -> None:
    """One table, launches of their own: each group steps as it does in an optimizer of its own."""
    shapes = [(6, 20), (5,), (4, 24)]
    together = [nn.Parameter(random(*s, seed=i).to(device)) for i, s in enumerate(shapes)]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    options: list[dict[str, Any]] = [{}, option, {}]
    both = Nero([{"params": [p], **o} for p, o in zip(together, options, strict=True)], fused=True)
    each = [Nero([p], fused=True, **o) for p, o in zip(alone, options, strict=True)]
    for t in range(2):
        give_gradients(together, t)
        give_gradients(alone, t)
        for optimizer in (both, *each):
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        assert gap(a.reshape(1, -1), b.detach().cpu().reshape(1, -1)) <= 1e-6


def test_groups_share_launches_while_their_rates_are_equal(device, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [nn.Parameter(random(6, 20, seed=i).to(device)) for i in range(3)]
    optimizer = Nero(in_groups(params), fused=True)
    launched = calls(monkeypatch)
    give_gradients(params, 0)
    first, second, third = optimizer.param_groups
    rate = torch.tensor(0.01, device=device)
    for rates, expected in (
        ((0.02, 0.02, 0.02), 1),
        ((0.03, 0.03, 0.03), 1),
        ((0.02, 0.03, 0.02), 2),
        ((0.01, 0.02, 0.03), 3),
        ((rate, rate, rate), 1),
        ((rate, rate.clone(), rate), 2),
    ):
        first["lr"], second["lr"], third["lr"] = rates
        optimizer.step()
        assert len(launched[-1].calls) == expected, rates


def test_a_schedule_prepares_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that differ between groups and change at every step."""
    params = [nn.Parameter(random(6, 20, seed=i).to(device)) for i in range(3)]
    optimizer = Nero(in_groups(params), fused=True)
    optimizer.param_groups[0]["lr"] = 0.02
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    launched = calls(monkeypatch)
    give_gradients(params, 0)
    turns = []
    for _ in range(4):
        optimizer.step()
        schedule.step()
        turns.append(float(optimizer.state[params[2]]["turn"]))
    assert len({id(found.table) for found in launched}) == 1
    assert turns == pytest.approx([0.01 * 0.9**t for t in range(4)], rel=1e-5)


def test_what_changes_is_prepared_anew(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new group, a frozen weight, a loaded or replaced state, another axis; each step as the plain form's."""
    shapes = [(6, 20), (5,), (4, 24), (4, 4)]
    pair = [[nn.Parameter(random(*s, seed=i).to(device)) for i, s in enumerate(shapes)] for _ in range(2)]
    optimizers = [
        Nero(in_groups(params[:3]), **form)
        for params, form in zip(pair, ({"fused": True}, {"foreach": False}), strict=True)
    ]
    launched = calls(monkeypatch)
    for i, param in enumerate(pair[0]):  # memory that stays
        param.grad = random(*param.shape, seed=10 + i).to(device)
    for ours, theirs in zip(*pair, strict=True):
        theirs.grad = ours.grad.clone()

    def steps() -> list[int]:
        """How many tensors two steps launch; the second one uses what the first one prepared, which is new."""
        before = {id(found.table) for found in launched}
        for optimizer in (*optimizers, *optimizers):
            optimizer.step()
        assert launched[-1].table is launched[-2].table
        assert id(launched[-1].table) not in before
        for ours, theirs in zip(*pair, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        return [found.tensors for found in launched[-2:]]

    assert steps() == [3, 3]
    for params, optimizer in zip(pair, optimizers, strict=True):
        optimizer.add_param_group({"params": [params[3]]})
    assert steps() == [4, 4]
    for params in pair:
        params[0].requires_grad_(False)
    assert steps() == [3, 3]
    for params in pair:
        params[0].requires_grad_(True)
        params[1].grad = None
    assert steps() == [3, 3]
    for optimizer in optimizers:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert steps() == [3, 3]
    for params, optimizer in zip(pair, optimizers, strict=True):
        optimizer.state[params[2]] = {k: v.clone() for k, v in optimizer.state[params[2]].items()}
        optimizer.state[params[2]]["exp_avg_sq"].mul_(4.0)
    assert steps() == [3, 3]
    for params, optimizer in zip(pair, optimizers, strict=True):
        v = optimizer.state[params[2]]["exp_avg_sq"]
        optimizer.state[params[2]]["exp_avg_sq"] = v * 4.0
    assert steps() == [3, 3]
    for params, optimizer in zip(pair, optimizers, strict=True):
        del optimizer.state[params[3]]
        optimizer.param_groups[3]["neuron_dim"] = 1
    assert steps() == [3, 3]


def test_a_step_that_repeats_another_looks_at_nothing_twice(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The long way is taken for what is new: gradients elsewhere, one that is missing or sparse, an option."""
    params = [nn.Parameter(random(6, 20, seed=i).to(device)) for i in range(2)]
    optimizer = Nero(in_groups(params), fused=True)
    long_ways: list[int] = []
    update = Nero._update
    monkeypatch.setattr(Nero, "_update", lambda self: (long_ways.append(1), update(self))[1])
    give_gradients(params, 0)
    first = [p.grad for p in params]
    for rate in (0.01, 0.02, 0.03):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        assert float(optimizer.state[params[1]]["turn"]) > 0.4 * rate
    assert len(long_ways) == 1
    give_gradients(params, 1)
    second = [p.grad for p in params]
    for grads in (second, first, second):
        step_by(optimizer, params, grads)
    assert len(long_ways) == 2
    assert [float(optimizer.state[p]["step"]) for p in params] == [6, 6]
    params[0].grad = None
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [6, 7]
    params[0].grad = torch.zeros(6, 20, device=device).to_sparse()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.step()
    params[0].grad = second[0]
    before = params[0].detach().clone()
    optimizer.param_groups[0]["maximize"] = True
    optimizer.step()
    moved = ((params[0].detach() - before) * second[0]).sum()
    assert float(moved) > 0
    assert len(long_ways) == 4
