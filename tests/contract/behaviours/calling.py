"""Calling: closures, schedulers, tensor rates, GradScaler and autocast do what they do for torch's optimisers."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR

from contract.behaviours import DEFAULT, EAGER, behaviour
from contract.behaviours.problems import (
    assert_close,
    assert_moved,
    assert_same_bits,
    copy_of,
    loss_of,
    model_for,
    train,
)

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[1, 3], gamma=0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=5, power=2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2, T_mult=2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, step_size_up=2, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=8, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [
            lr_scheduler.LinearLR(o, start_factor=0.25, total_iters=2),
            lr_scheduler.ExponentialLR(o, gamma=0.5),
        ],
        milestones=[2],
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, factor=0.5, total_iters=2), lr_scheduler.ExponentialLR(o, gamma=0.9)]
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=0.005, anneal_epochs=3),
}


def advance(scheduler: Any) -> None:
    """One step; the plateau scheduler sees a loss that does not improve."""
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


@behaviour()
def closure_runs_under_no_grad(make: Any) -> None:
    """A closure is called once, with gradients enabled even where the caller disabled them; its value returns."""
    model, twin = model_for(make), model_for(make)
    optimizer, other = make(model), make(twin)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        other.zero_grad()
        loss = loss_of(twin)
        loss.backward()
        return loss

    for t in range(3):
        optimizer.zero_grad()
        expected = loss_of(model)
        expected.backward()
        assert optimizer.step() is None
        with torch.no_grad():
            loss = other.step(closure)
            assert not torch.is_grad_enabled()
        assert calls == t + 1, f"the closure was called {calls} times in {t + 1} steps"
        assert torch.equal(loss, expected), "the closure's value did not come back"
    assert torch.is_grad_enabled()
    assert_same_bits(copy_of(twin), copy_of(model), "weights after closures")


@behaviour(forms=DEFAULT, scheduler=tuple(SCHEDULERS))
def scheduler_sets_the_rate(make: Any, *, scheduler: str) -> None:
    """Steps under a scheduler equal steps with the same rates written by hand; scheduler and state resume."""
    model, twin = model_for(make), model_for(make)
    optimizer, other = make(model), make(twin)
    schedule = SCHEDULERS[scheduler](optimizer)
    rates: set[float] = set()
    for t in range(6):
        for ours, theirs in zip(other.param_groups, optimizer.param_groups, strict=True):
            ours["lr"] = theirs["lr"]
            rates.add(float(theirs["lr"]))
        train(model, optimizer, range(t, t + 1))
        train(twin, other, range(t, t + 1))
        advance(schedule)
    assert len(rates) > 1, f"{scheduler} did not change the rate"
    assert_same_bits(copy_of(twin), copy_of(model), f"weights under {scheduler}")

    checkpoint = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    third = model_for(make)
    third.load_state_dict(model.state_dict())
    resumed = make(third)
    continued = SCHEDULERS[scheduler](resumed)
    resumed.load_state_dict(checkpoint[0])
    continued.load_state_dict(checkpoint[1])
    for t in range(6, 8):
        train(model, optimizer, range(t, t + 1))
        train(third, resumed, range(t, t + 1))
        advance(schedule)
        advance(continued)
    assert_same_bits(copy_of(third), copy_of(model), f"weights after {scheduler} resumed")


@behaviour()
def tensor_rate_equals_float_rate(make: Any) -> None:
    """A rate held in a tensor steps as the same number in a float; a scheduler writes into that tensor."""
    model, twin = model_for(make), model_for(make)
    optimizer, other = make(model), make(twin)
    for ours, theirs in zip(other.param_groups, optimizer.param_groups, strict=True):
        theirs["lr"] = 2.0**-7  # no rounding between a float and float32
        ours["lr"] = torch.tensor(2.0**-7)
    held = [group["lr"] for group in other.param_groups]
    schedules = [lr_scheduler.StepLR(o, step_size=1, gamma=0.5) for o in (optimizer, other)]
    for t in range(4):
        train(model, optimizer, range(t, t + 1))
        train(twin, other, range(t, t + 1))
        for schedule in schedules:
            schedule.step()
    assert all(group["lr"] is rate for group, rate in zip(other.param_groups, held, strict=True))
    assert all(isinstance(rate, Tensor) and rate.item() == 2.0**-11 for rate in held)
    assert_close(copy_of(twin), copy_of(model), 1e-6, "weights with a tensor rate")
    restored = make(model_for(make))
    restored.load_state_dict(copy.deepcopy(other.state_dict()))
    assert all(float(group["lr"]) == 2.0**-11 for group in restored.param_groups)


@behaviour(forms=EAGER)
def grad_scaler_equals_unscaled(make: Any) -> None:
    """Under GradScaler the step sees unscaled gradients; a scaled loss that overflows moves nothing."""
    model, twin = model_for(make), model_for(make)
    optimizer, other = make(model), make(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        other.zero_grad()
        scaler.scale(loss_of(twin)).backward()
        scaler.step(other)
        scaler.update()
    assert_close(copy_of(twin), copy_of(model), 1e-5, "weights under GradScaler")

    before = copy_of(twin)
    other.zero_grad()
    (scaler.scale(loss_of(twin)) * float("inf")).backward()
    scaler.step(other)
    scaler.update()
    assert_same_bits(copy_of(twin), before, "weights after an overflow")
    assert scaler.get_scale() == 2.0**9


@behaviour(forms=EAGER)
def autocast_does_not_reach_the_step(make: Any) -> None:
    """Training under autocast moves float32 weights; a step taken inside autocast is the same to the bit."""
    model, twin = model_for(make), model_for(make)
    optimizer, other = make(model), make(twin)
    before = copy_of(model)
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss_of(model).backward()
            loss_of(twin).backward()
            other.step()
        optimizer.step()
        optimizer.zero_grad()
        other.zero_grad()
    assert_moved(model, before)
    assert_same_bits(copy_of(twin), copy_of(model), "weights stepped inside autocast")


@behaviour(forms=DEFAULT)
def zero_grad_clears_gradients(make: Any) -> None:
    """`zero_grad` reaches every parameter of the model, as a training loop expects."""
    model: nn.Module = model_for(make)
    optimizer = make(model)
    loss_of(model).backward()
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())
