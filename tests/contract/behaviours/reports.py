"""Reports: numbers a person may log, as 0-d tensors that cost no wait."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from contract.behaviours import DEFAULT, behaviour
from contract.behaviours.problems import give_gradients, model_for, named_tensors, random, set_rates


def reported(make: Any, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Every number that the database says the rule reports, with its name."""
    for name in make.reports:
        value = getattr(optimizer, name)
        value = value() if callable(value) else value
        if isinstance(value, dict):
            assert value, f"{name} is empty"
            yield from ((f"{name}/{key}", number) for key, number in value.items())
        else:
            yield name, value


@behaviour(applies=lambda make: bool(make.reports))
def reported_numbers_are_scalars(make: Any) -> None:
    """Each report is a 0-d tensor, finite and positive after an ordinary step, on the weights' device."""
    model = model_for(make)
    optimizer = make(model)
    for t in range(2):
        give_gradients(model, t)
        optimizer.step()
        for name, number in reported(make, optimizer):
            assert isinstance(number, Tensor), f"{name} is a {type(number).__name__}"
            assert number.dim() == 0, f"{name} has shape {tuple(number.shape)}"
            assert not number.requires_grad
            assert 0 < number < float("inf"), f"{name} is {number}"


@behaviour(applies=lambda make: bool(make.reports))
def reports_are_not_overwritten(make: Any) -> None:
    """A number that was read stays what it was when later steps are taken, so that a log may keep it."""
    model = model_for(make)
    optimizer = make(model)
    give_gradients(model, 0)
    optimizer.step()
    kept = dict(reported(make, optimizer))
    values = {name: number.item() for name, number in kept.items()}
    for t in range(1, 3):
        give_gradients(model, t, scale=3.0)
        optimizer.step()
    assert {name: number.item() for name, number in kept.items()} == values


@behaviour(applies=lambda make: make.unit_norm and "mean_turn" in make.reports)
def reported_turn_is_the_rate_at_first(make: Any) -> None:
    """Rows of unit norm turn by the learning rate at their first step, and so it is reported."""
    model = named_tensors(weight=random(4, 3))
    optimizer = make(model)
    set_rates(optimizer, 2.0)
    give_gradients(model, 0)
    optimizer.step()
    rate = optimizer.param_groups[0]["lr"]
    for name, number in reported(make, optimizer):
        assert abs(number.item() - rate) < 1e-6 * rate, f"{name} is {number.item()}, the rate is {rate}"


@behaviour(forms=DEFAULT, applies=lambda make: bool(make.reports))
def reports_before_the_first_step_are_harmless(make: Any) -> None:
    """Asking early raises nothing: there is no number yet, or it is zero or NaN."""
    optimizer = make(model_for(make))
    for name in make.reports:
        value = getattr(optimizer, name)
        value = value() if callable(value) else value
        numbers = value.values() if isinstance(value, dict) else [value]
        assert not any(float(number) < 0 or float(number) > 0 for number in numbers), (
            f"{name} is {value} before a step"
        )
