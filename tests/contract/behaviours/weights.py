"""Weights change only where a gradient asks for it, and a gradient is never written."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from contract.behaviours import behaviour
from contract.behaviours.problems import (
    Weights,
    assert_moved,
    assert_same_bits,
    copy_of,
    give_gradients,
    layer_with,
    model_for,
    named_tensors,
    random,
    state_tensors,
    train,
)


def awkward_rows(make: Any) -> nn.Module:
    """Rows that have no direction or no length to keep: zeros, fan-in 1, one row, constants, -0.0."""
    zero_row = random(4, 3, seed=1)
    zero_row[1] = 0
    signs = random(3, 4, seed=2)
    signs[0] = torch.tensor([-0.0, 1.0, -1.0, 0.0])
    tensors: dict[int, dict[str, Tensor]] = {
        0: {"scalar": torch.tensor(-0.0)},
        1: {"vector": torch.tensor([0.0, -0.0, 1.5]), "single": torch.tensor([2.0])},
        2: {
            "zero_row": zero_row,
            "zeros": torch.zeros(3, 2),
            "signs": signs,
            "fan_in_one": torch.tensor([[2.0], [-3.0], [0.0], [-0.0]]),
            "one_row": random(1, 5, seed=3),
            "one_weight": torch.tensor([[0.5]]),
            "constant": torch.full((2, 4), 0.25),
        },
        3: {"filter_1d": random(2, 1, 3, seed=4)},
        4: {"depthwise": random(3, 1, 1, 1, seed=5)},
        5: {"filter_3d": random(2, 1, 1, 2, 2, seed=6)},
    }
    found = {name: t for dim in make.dims if dim in tensors for name, t in tensors[dim].items()}
    return nn.ModuleDict({name: layer_with(tensor) for name, tensor in found.items()})


def rows_of(param: Tensor, make: Any) -> tuple[slice, ...]:
    """The index of every second neuron."""
    axis = make.neuron_dim if param.dim() > 1 else 0
    return (slice(None),) * axis + (slice(1, None, 2),)


def zero_gradients(model: nn.Module, *, negative: bool = False) -> None:
    for param in model.parameters():
        param.grad = torch.full_like(param, -0.0 if negative else 0.0)


@behaviour()
def no_gradient_no_change(make: Any) -> None:
    """A parameter without a gradient keeps weight and state; so does every one where there is none at all."""
    model = model_for(make)
    optimizer = make(model)
    train(model, optimizer, range(3))
    names = [name for name, _ in model.named_parameters()]
    for quiet in (names[:1], names):
        weights, state = copy_of(model), state_tensors(optimizer)
        give_gradients(model, 7, skip=quiet)
        optimizer.step()
        assert_same_bits({n: copy_of(model)[n] for n in quiet}, {n: weights[n] for n in quiet}, "no gradient")
        if quiet == names:
            assert_same_bits(state_tensors(optimizer), state, "state of a step without gradients")


@behaviour(applies=lambda make: make.memoryless, dtype=(torch.float32, torch.bfloat16))
def rows_with_zero_gradient_keep_bits(make: Any, *, dtype: torch.dtype) -> None:
    """Without momentum or decay a row whose gradient is zero keeps its bits while its neighbours move."""
    model = model_for(make, dtype)
    optimizer = make(model)
    for t in range(6):
        weights = copy_of(model)
        give_gradients(model, t)
        quiet = {name: rows_of(param, make) for name, param in model.named_parameters() if param.dim()}
        for name, param in model.named_parameters():
            if name in quiet:
                param.grad[quiet[name]] = -0.0 if t % 2 else 0.0  # type: ignore[index]
        optimizer.step()
        for name, param in model.named_parameters():
            if name in quiet:
                kept, expected = param[quiet[name]], weights[name][quiet[name]]
                assert_same_bits({name: kept}, {name: expected}, f"rows without gradient, step {t}")
        if dtype == torch.float32:
            assert_moved(model, weights)


@behaviour(negative=(False, True))
def zero_gradient_from_fresh_state_keeps_bits(make: Any, *, negative: bool) -> None:
    """Zero gradients, of either sign, move nothing before the first real one; also rows that are degenerate."""
    for model in (model_for(make), awkward_rows(make)):
        optimizer = make(model)
        weights = copy_of(model)
        for _ in range(3):
            zero_gradients(model, negative=negative)
            optimizer.step()
        assert_same_bits(copy_of(model), weights, "weights after zero gradients")


@behaviour(tensor=(False, True))
def zero_rate_keeps_bits(make: Any, *, tensor: bool) -> None:
    """lr = 0 moves nothing: at the first step, later, and for rows that are degenerate."""
    for model in (model_for(make), awkward_rows(make)):
        optimizer = make(model)
        for t in (0, 5):
            rates = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(0.0) if tensor else 0.0
            weights = copy_of(model)
            give_gradients(model, t)
            optimizer.step()
            assert_same_bits(copy_of(model), weights, f"weights after a step with lr=0 (t={t})")
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            give_gradients(model, t + 1)
            optimizer.step()


@behaviour(dtype=(torch.float32, torch.float64, torch.bfloat16, torch.float16))
def degenerate_rows_train(make: Any, *, dtype: torch.dtype) -> None:
    """Zero rows, fan-in 1, single rows and constants take real gradients without leaving the finite numbers."""
    model = awkward_rows(make).to(dtype)
    optimizer = make(model)
    before = copy_of(model)
    for t in range(5):
        give_gradients(model, t)
        optimizer.step()
        for name, param in model.named_parameters():
            assert torch.isfinite(param).all(), f"{name} is not finite after step {t}"
    assert_moved(
        model, before, [name for name in before if before[name].count_nonzero() == before[name].numel()]
    )


@behaviour()
def zero_weights_wake(make: Any) -> None:
    """A tensor that starts at zero, as biases and heads do, is trained like any other."""
    shapes = {1: {"bias": (5,)}, 2: {"head": (4, 3)}}
    zeros = {n: torch.zeros(s) for dim in make.dims if dim in shapes for n, s in shapes[dim].items()}
    model = named_tensors(**zeros)
    optimizer = make(model)
    before = copy_of(model)
    assert all(not weight.any() for weight in before.values()), "construction moved zeros"
    for t in range(2):
        give_gradients(model, t)
        optimizer.step()
    assert_moved(model, before)


@behaviour(maximize=(False, True))
def gradients_are_never_written(make: Any, *, maximize: bool) -> None:
    """The step leaves `p.grad` the same tensor with the same bits."""
    model = model_for(make)
    if maximize and not make.maximizes:
        return
    optimizer = make(model, **({"maximize": True} if maximize else {}))
    for t in range(3):
        give_gradients(model, t)
        gradients = {name: param.grad for name, param in model.named_parameters()}
        copies: Weights = {name: grad.clone() for name, grad in gradients.items() if grad is not None}
        optimizer.step()
        for name, param in model.named_parameters():
            assert param.grad is gradients[name], f"the gradient of {name} was replaced"
        assert_same_bits(
            {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, copies, "gradients"
        )


@behaviour(dtype=(torch.float32, torch.bfloat16))
def checkpoint_probe_keeps_weights(make: Any, *, dtype: torch.dtype) -> None:
    """torch.distributed.checkpoint steps a fresh optimiser with zero gradients to make its state; nothing moves."""
    model = model_for(make, dtype)
    optimizer = make(model)
    weights, rates = copy_of(model), [group["lr"] for group in optimizer.param_groups]
    get_optimizer_state_dict(model, optimizer)
    assert_same_bits(copy_of(model), weights, "weights after the probe")
    assert [group["lr"] for group in optimizer.param_groups] == rates
    train(model, optimizer, range(3))
    assert_moved(model, weights)


@behaviour()
def swapped_parameters_train(make: Any) -> None:
    """Parameters replaced in the groups before the first step, as accelerate does under FSDP2, train as before."""
    model, twin = model_for(make), model_for(make)
    optimizer, other = make(model), make(twin)
    swapped = {id(param): nn.Parameter(param.detach().clone()) for param in twin.parameters()}
    for group in other.param_groups:
        group["params"] = [swapped[id(param)] for param in group["params"]]
    for module in list(twin.modules()):
        for name, param in list(module.named_parameters(recurse=False)):
            setattr(module, name, swapped[id(param)])
    train(model, optimizer, range(4))
    train(twin, other, range(4))
    assert_same_bits(copy_of(twin), copy_of(model), "weights after the swap")
    assert_same_bits(state_tensors(other), state_tensors(optimizer), "state after the swap")
    held = set(itertools.chain.from_iterable(group["params"] for group in other.param_groups))
    assert set(other.state) <= held, "state is kept for parameters that are in no group"
