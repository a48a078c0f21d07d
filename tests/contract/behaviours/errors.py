"""Errors: bad input is refused before anything changes, with what was given and what to type instead."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from contract.behaviours import DEFAULT, EAGER, behaviour
from contract.behaviours.problems import (
    assert_close,
    assert_same_bits,
    copy_of,
    model_for,
    named_tensors,
    random,
    state_tensors,
    train,
)


def refused(call: Callable[[], Any], *says: str) -> str:
    """The message with which `call` is refused; it must contain each of `says`, in one line."""
    try:
        call()
    except (ValueError, TypeError, RuntimeError) as error:
        message = str(error)
    else:
        raise AssertionError("bad input was accepted")
    for part in says:
        assert part.lower() in message.lower(), f"the message does not say {part!r}: {message}"
    assert "\n" not in message.strip(), f"more than one line: {message}"
    return message


RATES = (-1.0, -1e-9, float("nan"), float("inf"), "0.1")


@behaviour(forms=DEFAULT, applies=lambda make: make.takes_rate, rate=RATES)
def bad_rate_is_refused(make: Any, *, rate: Any) -> None:
    """At construction and in a group; the message quotes the value; the weights stay as they were."""
    model = model_for(make)
    before = copy_of(model)
    refused(lambda: make(model, lr=rate), "lr", repr(rate))
    assert_same_bits(copy_of(model), before, "weights after the refusal")


@behaviour(forms=DEFAULT, rate=(*RATES, None))
def bad_rate_in_a_group_is_refused(make: Any, *, rate: Any) -> None:
    """A group that is added with a bad rate is refused whole: the optimiser keeps the groups that it had."""
    model, extra = model_for(make), nn.Parameter(random(4, 3))
    optimizer = make(model)
    groups, before = len(optimizer.param_groups), extra.detach().clone()
    refused(lambda: optimizer.add_param_group({"params": [extra], "lr": rate}), "lr", repr(rate))
    assert len(optimizer.param_groups) == groups
    assert_same_bits({"extra": extra}, {"extra": before}, "weights after the refusal")


@behaviour(forms=DEFAULT)
def option_out_of_range_is_refused(make: Any) -> None:
    """Each value that the database lists as out of range is refused, and quoted (of a tuple, its last entry)."""
    for option, value in make.out_of_range:
        model = model_for(make)
        before = copy_of(model)
        worst = value[-1] if isinstance(value, tuple) else value
        refused(lambda o=option, v=value, m=model: make(m, **{o: v}), option, repr(worst))
        assert_same_bits(copy_of(model), before, f"weights after {option}={value} was refused")


@behaviour(forms=DEFAULT)
def unknown_option_is_refused_with_the_nearest(make: Any) -> None:
    """A misspelt option is refused; the valid ones are listed and the nearest is offered."""
    option = make.option
    message = refused(
        lambda: make(model_for(make), **{option + "s_": 1}), option + "s_", f"did you mean {option!r}"
    )
    assert "maximize" in message or not make.maximizes, f"the valid options are not listed: {message}"


@behaviour(forms=DEFAULT)
def unknown_group_option_is_refused(make: Any) -> None:
    """The same in a group, where torch's own would swallow it."""
    optimizer = make(model_for(make))
    group = {"params": [nn.Parameter(random(4, 3))], make.option + "s_": 1}
    refused(lambda: optimizer.add_param_group(group), make.option + "s_", f"did you mean {make.option!r}")
    assert len(optimizer.param_groups) == len(make(model_for(make)).param_groups)


@behaviour(forms=EAGER)
def sparse_gradient_is_refused(make: Any) -> None:
    """Refused before any weight moves; the message says what to change."""
    model = named_tensors(weight=random(4, 3), table=random(5, 3))
    optimizer = make(model)
    before = copy_of(model)
    model.weight.grad = random(4, 3, seed=1)
    model.table.grad = random(5, 3, seed=2).to_sparse()
    state = state_tensors(optimizer)
    refused(optimizer.step, "sparse")
    assert_same_bits(copy_of(model), before, "weights after the refusal")
    assert_same_bits(state_tensors(optimizer), state, "state after the refusal")


@behaviour(forms=DEFAULT)
def complex_parameter_is_refused(make: Any) -> None:
    """Refused at construction, with the remedy."""
    refused(
        lambda: make(named_tensors(weight=torch.zeros(4, 3, dtype=torch.complex64))),
        "complex",
        "view_as_real",
    )


@behaviour(forms=DEFAULT)
def meta_parameter_is_refused(make: Any) -> None:
    """A rule that reads initial weights cannot start from none; the message says to materialise the module."""
    with torch.device("meta"):
        model = nn.Linear(4, 3, bias=1 in make.dims)
    refused(lambda: make(model), "meta", "to_empty")


@behaviour(forms=DEFAULT)
def nothing_to_train_is_refused(make: Any) -> None:
    """No parameters at all, and a module whose every parameter is frozen."""
    refused(lambda: make(nn.ReLU()), "param")
    if make.takes == "module":
        frozen = model_for(make).requires_grad_(False)
        refused(lambda: make(frozen), "train")


@behaviour(forms=DEFAULT, applies=lambda make: make.takes == "parameters")
def single_tensor_is_refused(make: Any) -> None:
    refused(lambda: make(nn.Parameter(random(4, 3))), "tensor")


@behaviour(forms=DEFAULT, applies=lambda make: make.takes == "parameters")
def parameter_in_two_groups_is_refused(make: Any) -> None:
    param = nn.Parameter(random(4, 3))
    before = param.detach().clone()
    refused(lambda: make([{"params": [param]}, {"params": [param]}]), "more than one")
    optimizer = make([param])
    projected = param.detach().clone()
    refused(lambda: optimizer.add_param_group({"params": [param]}), "more than one")
    assert_same_bits({"w": param}, {"w": projected}, "weights after the refusal")
    assert before.shape == projected.shape


@behaviour(forms=DEFAULT)
def fused_form_is_refused_or_equal(make: Any) -> None:
    """`fused=True` is honoured or refused with the reason, never swallowed."""
    model, twin = model_for(make), model_for(make)
    try:
        other = make(twin, fused=True)
    except (ValueError, TypeError, RuntimeError) as error:
        message = str(error)
    else:
        train(model, make(model), range(4))
        train(twin, other, range(4))
        assert_close(copy_of(twin), copy_of(model), 1e-5, "fused form")
        return
    assert "fused" in message, f"the message does not say fused: {message}"
