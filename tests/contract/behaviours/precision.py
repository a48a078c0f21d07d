"""Precision: statistics of half-precision weights are float32 and stay so; short rows do not drift."""

import copy
import io
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from contract.behaviours import EAGER, behaviour
from contract.behaviours.problems import (
    assert_same_bits,
    copy_of,
    give_gradients,
    model_for,
    named_tensors,
    random,
    state_tensors,
    train,
)

HALF = (torch.bfloat16, torch.float16)


def assert_wide(optimizer: Optimizer, when: str) -> None:
    for name, value in state_tensors(optimizer).items():
        if value.is_floating_point():
            assert value.dtype == torch.float32, f"{name} is {value.dtype} {when}"


@behaviour(dtype=HALF)
def statistics_of_half_weights_are_float32(make: Any, *, dtype: torch.dtype) -> None:
    """After steps, after a load into the same type, and in what is saved again."""
    model, twin = model_for(make, dtype), model_for(make, dtype)
    optimizer, other = make(model), make(twin)
    train(model, optimizer, range(3))
    assert_wide(optimizer, "after three steps")
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_wide(other, "after loading")
    assert_same_bits(state_tensors(other), state_tensors(optimizer), "loaded state")
    train(twin, other, range(3, 5))
    assert_wide(other, "after loading and two steps")


@behaviour(dtype=HALF)
def load_into_another_dtype_keeps_statistics(make: Any, *, dtype: torch.dtype) -> None:
    """State saved with float32 weights loads exactly where the weights are half precision, and trains on."""
    model, half = model_for(make), model_for(make, dtype)
    optimizer, other = make(model), make(half)
    train(model, optimizer, range(3))
    half.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same_bits(state_tensors(other), state_tensors(optimizer), "loaded state")
    train(half, other, range(3, 5))
    assert_wide(other, "after two more steps")
    assert all(torch.isfinite(param).all() for param in half.parameters())


@behaviour(dtype=HALF)
def half_precision_follows_float32(make: Any, *, dtype: torch.dtype) -> None:
    """Five steps with half-precision weights stay within their roundings of the same steps in float32."""
    half = model_for(make, dtype)
    other = make(half)
    exact = model_for(make)
    exact.load_state_dict(half.state_dict())
    optimizer = make(exact)
    for t in range(5):
        give_gradients(half, t)
        for wide, narrow in zip(exact.parameters(), half.parameters(), strict=True):
            wide.grad = narrow.grad.float()  # type: ignore[union-attr]
        optimizer.step()
        other.step()
    roundings = 6 * torch.finfo(dtype).eps
    for (name, narrow), wide in zip(half.named_parameters(), exact.parameters(), strict=True):
        gap = (narrow.detach().float() - wide.detach()).norm().item()
        assert gap <= roundings * wide.detach().norm().item(), f"{name} is {gap:.3g} away"


@behaviour(forms=EAGER, costly=True, applies=lambda make: make.unit_norm)
def short_bfloat16_rows_do_not_drift(make: Any) -> None:
    """Row norms after 10,000 steps are no further from 1 than after the first step plus 1e-3."""
    model: nn.Module = named_tensors(weight=random(128, 8, dtype=torch.bfloat16))
    optimizer = make(model)
    gradients = random(50, 128, 8, seed=1, dtype=torch.bfloat16).unbind()

    def furthest() -> float:
        return (model.weight.detach().double().norm(dim=1 - make.neuron_dim) - 1).abs().max().item()

    worst = 0.0
    for t in range(10_000):
        model.weight.grad = gradients[t % 50]
        optimizer.step()
        if t == 0:
            first = furthest()
        elif t % 1000 == 999:
            worst = max(worst, furthest())
    assert worst <= first + 1e-3, f"{worst:.2e} from 1 after 10,000 steps, {first:.2e} after the first"
    assert torch.isfinite(copy_of(model)["weight"]).all()
