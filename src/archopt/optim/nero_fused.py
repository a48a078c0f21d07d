"""Nero's fused form: which tensors the kernel serves, and their step. The equations stand in `nero.py`."""

import functools
from typing import Any

import torch
from torch import Tensor

from archopt.kernels import cpu, cpu_nero
from archopt.neurons import NeuronDim, fan_in_dims, statistics_dtype
from archopt.optim.base import rate
from archopt.optim.fused import Made, made_of, refuse, wants_kernel

STATE = ("exp_avg_sq", "scale", "step", "turn", "skipped")  # as the kernel wants it


def served(
    params: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]
) -> list[cpu_nero.NeroTensor | None]:
    """For each weight what the kernel takes, or None where another form has to serve it.

    Raises ValueError, with the reason, where the group has fused=True and a weight cannot be served.
    """
    fused = group["fused"]
    nothing: list[cpu_nero.NeroTensor | None] = [None] * len(params)
    if not wants_kernel("Nero", group):
        return nothing
    if missing := cpu.missing():
        if fused and params:
            refuse("Nero", params[0], missing)
        return nothing
    found = [_for_kernel(param, state, group) for param, state in zip(params, states, strict=True)]
    if fused:
        for param, tensor in zip(params, found, strict=True):
            if isinstance(tensor, str):
                refuse("Nero", param, tensor)
    return [None if isinstance(tensor, str) else tensor for tensor in found]


def unserved(param: Tensor, group: dict[str, Any]) -> None:
    """Raises ValueError, with the reason, where the kernel cannot serve a weight whatever its gradient."""
    memory = cpu.Memory(*made_of(param))
    if reason := cpu.missing() or cpu.obstacle(memory):
        refuse("Nero", param, reason)
    layout = layout_of(memory.shape, memory.strides, axis_of(group), group["channel_groups"])
    if isinstance(layout, str):
        refuse("Nero", param, layout)


def fused_nero(tensors: list[cpu_nero.NeroTensor], group: dict[str, Any]) -> None:
    """The step of all weights that the kernel serves, in one call; step counts are advanced already."""
    if tensors:
        cpu_nero.nero(
            tensors,
            lr=float(rate(group)),
            beta=float(group["beta"]),
            zero_mean=group["zero_mean"],
            unit_norm=group["unit_norm"],
            maximize=group["maximize"],
        )


def _for_kernel(param: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> cpu_nero.NeroTensor | str:
    """What the kernel takes, or why it cannot."""
    grad = param.grad
    assert grad is not None
    v, scale, step, turn, skipped = (state[name] for name in STATE)
    layout = _verdict(
        made_of(param),
        made_of(grad),
        made_of(v),
        (scale.dtype, step.dtype, turn.dtype, skipped.dtype),
        v.is_cpu and scale.is_cpu and step.is_cpu and turn.is_cpu and skipped.is_cpu,
        axis_of(group),
        group["channel_groups"],
    )
    if isinstance(layout, str):
        return layout
    return cpu.obstacle_of_view(param, grad) or cpu_nero.NeroTensor(
        param, grad, v, scale, step, turn, skipped, layout
    )


@functools.lru_cache(maxsize=4096)
def _verdict(
    param: Made,
    grad: Made,
    v: Made,
    scalars: tuple[torch.dtype, ...],
    on_cpu: bool,
    axis: NeuronDim,
    channel_groups: int,
) -> cpu.Layout | str:
    """How the kernel serves a weight with this gradient and state, or why it cannot: decided once."""
    weight, statistics = cpu.Memory(*param), cpu.Memory(*v)
    if reason := cpu.obstacle(weight) or cpu.obstacle_of_gradient(weight, cpu.Memory(*grad)):
        return reason
    exact = statistics_dtype(weight.dtype)
    expected = (exact, exact, torch.float32, torch.float32, torch.int32)
    for name, wanted, found in zip(STATE, expected, (statistics.dtype, *scalars), strict=True):
        if found != wanted:
            return f"its {name} is {found}, expected {wanted}"
    if not on_cpu:
        return "part of its state is not on the CPU"
    layout = layout_of(weight.shape, weight.strides, axis, channel_groups)
    if isinstance(layout, str):
        return layout
    # One statistic a neuron, in order; of entries, in the order of the weight's memory.
    if statistics.shape == weight.shape:
        in_order = statistics.strides == weight.strides
    else:
        in_order = cpu.is_contiguous(statistics)
    return layout if in_order else f"its statistics have strides {statistics.strides}"


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
