"""Nero's fused form: which tensors the kernel serves, and their step. The equations stand in `nero.py`."""

import itertools
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from archopt.kernels import cpu, cpu_nero
from archopt.neurons import NeuronDim, fan_in_dims, statistics_dtype
from archopt.optim.base import rate
from archopt.optim.fused import made_of, memory_key, ordinary, refuse, wants_kernel

STATE = ("exp_avg_sq", "scale", "step", "turn", "skipped")  # as the kernel wants it


class Served(NamedTuple):
    """What the kernel serves of the tensors of a group, and the positions of those that another form serves."""

    positions: list[int]
    table: cpu_nero.NeroTable | None
    rest: list[int]


class Kept:
    """What was found for the tensors of each group, by all that it was found from: looked at again at each step."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[tuple[Any, ...], Any, Served]] = {}

    def get(self, number: int, key: tuple[Any, ...] | None, alive: Any, find: Callable[[], Served]) -> Served:
        """What was found for `key`, or is found now. `alive` keeps the objects whose identity is in the key."""
        if key is None:
            return find()
        if number not in self._found or self._found[number][0] != key:
            self._found[number] = (key, alive, find())
        return self._found[number][2]


_is_cpu = attrgetter("is_cpu")


def served(
    params: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any], number: int, kept: Kept
) -> Served:
    """Which weights the kernel serves, prepared or as they were before; `number` is that of the group's first.

    Raises ValueError, with the reason, where the group has fused=True and a weight cannot be served.
    """
    found = Served([], None, list(range(len(params))))
    if params and wants_kernel("Nero", group):
        if missing := cpu.missing():
            if group["fused"]:
                refuse("Nero", params[0], missing)
        else:
            key, alive = _key(params, states, group)
            found = kept.get(number, key, alive, lambda: _prepared(params, states, group, number))
    return found


def _key(
    params: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]
) -> tuple[tuple[Any, ...] | None, Any]:
    """All that decides how tensors are served and where they lie, but for the places of gradients; and what has to
    live for that. None where there are tensors whose memory cannot be asked for.
    """
    if not (ordinary(params) and all(map(_is_cpu, params))):
        return None, None
    values = list(itertools.chain.from_iterable([state.values() for state in states]))
    grads: list[Any] = [param.grad for param in params]
    key = (
        axis_of(group),
        group["channel_groups"],
        group["fused"],
        *map(type, grads),
        *memory_key(params, grads, values),
    )
    return key, (params, values)


def _prepared(
    params: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any], number: int
) -> Served:
    numbers = {id(param): number + i for i, param in enumerate(group["params"])}
    tensors: list[cpu_nero.NeroTensor] = []
    positions: list[int] = []
    rest: list[int] = []
    for i, (param, state) in enumerate(zip(params, states, strict=True)):
        layout = _layout(param, state, group)
        if not isinstance(layout, str):
            positions.append(i)
            v, scale, step, turn, skipped = (state[name] for name in STATE)
            tensors.append(
                cpu_nero.NeroTensor(param, v, scale, step, turn, skipped, layout, numbers[id(param)])
            )
        elif group["fused"]:
            refuse("Nero", param, layout)
        else:
            rest.append(i)
    return Served(positions, cpu_nero.NeroTable(tensors) if tensors else None, rest)


def check_rounding(params: list[Tensor], rest: list[Tensor], group: dict[str, Any]) -> None:
    """Raises ValueError where stochastic rounding is asked for and a half-precision weight cannot have it; `rest`:
    those of `params` that no kernel serves, on the CPU or on a GPU."""
    if not group["stochastic_rounding"]:
        return
    without = set(map(id, rest))
    for param in params:
        reason = ""
        if param.dtype == torch.float16:
            reason = "it is float16; bfloat16 weights alone are rounded at random"
        elif param.dtype == torch.bfloat16 and id(param) in without:
            reason = "no kernel serves it; fused=True says why"
        if reason:
            raise ValueError(
                "Nero: stochastic_rounding=True cannot be honoured for a weight of shape "
                f"{tuple(param.shape)}: {reason}; use stochastic_rounding=False in its group"
            )


def unserved(param: Tensor, group: dict[str, Any]) -> None:
    """Raises ValueError, with the reason, where the kernel cannot serve a weight whatever its gradient."""
    memory = cpu.Memory(*made_of(param))
    if reason := cpu.missing() or cpu.obstacle(memory):
        refuse("Nero", param, reason)
    layout = layout_of(memory.shape, memory.strides, axis_of(group), group["channel_groups"])
    if isinstance(layout, str):
        refuse("Nero", param, layout)


def fused_nero(found: Served, params: list[Tensor], group: dict[str, Any]) -> None:
    """The step of all weights that the kernel serves, in one call; it advances their step counts too."""
    if found.table is not None:
        grads: list[Any] = [params[i].grad for i in found.positions]
        cpu_nero.nero(
            found.table,
            grads,
            lr=float(rate(group)),
            beta=float(group["beta"]),
            zero_mean=group["zero_mean"],
            unit_norm=group["unit_norm"],
            maximize=group["maximize"],
            stochastic_rounding=group["stochastic_rounding"],
        )


def _layout(param: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> cpu.Layout | str:
    """How the kernel serves a weight with this gradient and state, or why it cannot."""
    grad = param.grad
    assert grad is not None
    weight, statistics = cpu.Memory(*made_of(param)), cpu.Memory(*made_of(state["exp_avg_sq"]))
    if reason := (
        cpu.obstacle(weight)
        or cpu.obstacle_of_gradient(weight, cpu.Memory(*made_of(grad)))
        or cpu.obstacle_of_view(param, grad)
    ):
        return reason
    exact = statistics_dtype(weight.dtype)
    expected = (exact, exact, torch.float32, torch.float32, torch.int32)
    for name, wanted in zip(STATE, expected, strict=True):
        if state[name].dtype != wanted:
            return f"its {name} is {state[name].dtype}, expected {wanted}"
        if not state[name].is_cpu:
            return f"its {name} is on {state[name].device}"
    layout = layout_of(weight.shape, weight.strides, axis_of(group), group["channel_groups"])
    if isinstance(layout, str):
        return layout
    return disorder(statistics, weight) or layout


def disorder(statistics: cpu.Memory, weight: cpu.Memory) -> str:
    """Why no kernel can follow v; an empty string if one can: a number a neuron, in order, and of entries in the
    order of the weight's memory."""
    if statistics.shape == weight.shape:
        in_order = statistics.strides == weight.strides
    else:
        in_order = cpu.is_contiguous(statistics)
    return "" if in_order else f"its statistics have strides {statistics.strides}"


def axis_of(group: dict[str, Any]) -> NeuronDim:
    neuron_dim: NeuronDim = group["neuron_dim"]
    return neuron_dim if isinstance(neuron_dim, int) else tuple(neuron_dim)


def layout_of(
    shape: torch.Size, strides: tuple[int, ...], axis: NeuronDim, channel_groups: int
) -> cpu.Layout | str:
    """How the neurons of a weight lie in memory, or why the kernel cannot follow them."""
    summed = fan_in_dims(shape, axis, channel_groups)
    if summed and channel_groups > 1:  # as `neurons.as_rows` splits dimension 0
        inner = shape[0] // channel_groups
        shape = torch.Size((channel_groups, inner, *shape[1:]))
        strides = (strides[0] * inner, *strides)
    return cpu.layout_of(shape, strides, summed)
