"""Nero's fused form: which tensors the kernel serves, and their step. The equations stand in `nero.py`."""

import functools
from typing import Any

import torch
from torch import Tensor

from archopt.kernels import cpu
from archopt.neurons import NeuronDim, fan_in_dims
from archopt.optim.base import rate, statistics_like

REMEDY = "use fused=None, which takes another form for such tensors"


def served(
    params: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]
) -> list[cpu.NeroTensor | None]:
    """For each weight what the kernel takes, or None where another form has to serve it.

    Raises ValueError, with the reason, where the group has fused=True and a weight cannot be served.
    """
    fused = group["fused"]
    nothing: list[cpu.NeroTensor | None] = [None] * len(params)
    if fused is False or (fused is None and group["foreach"] is not None):
        return nothing
    if torch.compiler.is_compiling():
        if fused:
            raise ValueError(
                "Nero: fused=True cannot be honoured in a compiled step, which is fused by its compiler; "
                "use fused=None"
            )
        return nothing
    found = [_for_kernel(param, state, group) for param, state in zip(params, states, strict=True)]
    if fused:
        for param, tensor in zip(params, found, strict=True):
            if isinstance(tensor, str):
                _refuse(param, tensor)
    return [None if isinstance(tensor, str) else tensor for tensor in found]


def unserved(param: Tensor, group: dict[str, Any]) -> None:
    """Raises ValueError, with the reason, where the kernel cannot serve a weight whatever its gradient."""
    if reason := cpu.obstacle(param):
        _refuse(param, reason)
    if isinstance(layout := _layout(param, group), str):
        _refuse(param, layout)


def fused_nero(tensors: list[cpu.NeroTensor], group: dict[str, Any]) -> None:
    """The step of all weights that the kernel serves, in one call; step counts are advanced already."""
    if tensors:
        cpu.nero(
            tensors,
            lr=float(rate(group)),
            beta=float(group["beta"]),
            zero_mean=group["zero_mean"],
            unit_norm=group["unit_norm"],
            maximize=group["maximize"],
        )


def _refuse(param: Tensor, reason: str) -> None:
    raise ValueError(
        f"Nero: fused=True cannot be honoured for a weight of shape {tuple(param.shape)}: {reason}; {REMEDY}"
    )


def _for_kernel(param: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> cpu.NeroTensor | str:
    """What the kernel takes, or why it cannot."""
    grad = param.grad
    assert grad is not None
    if reason := cpu.obstacle(param) or cpu.obstacle_of_gradient(param, grad):
        return reason
    layout = _layout(param, group)
    if isinstance(layout, str):
        return layout
    v, scale, step = state["exp_avg_sq"], state["scale"], state["step"]
    exact = statistics_like(param)
    if v.dtype != exact or scale.dtype != exact or step.dtype != torch.float32:
        return f"its state is {v.dtype}, {scale.dtype} and {step.dtype}, expected {exact} and a float32 step"
    if not (v.is_contiguous() or (v.shape == param.shape and v.stride() == param.stride())):
        return f"its statistics have strides {v.stride()}"
    if any(value.device.type != "cpu" for value in state.values()):
        return "part of its state is not on the CPU"
    return cpu.NeroTensor(param, grad, v, scale, step, state["turn"], state["skipped"], layout)


def _layout(param: Tensor, group: dict[str, Any]) -> cpu.Layout | str:
    neuron_dim = group["neuron_dim"]
    key = neuron_dim if isinstance(neuron_dim, int) else tuple(neuron_dim)
    return _layout_of(param.shape, param.stride(), key, group["channel_groups"])


@functools.lru_cache(maxsize=4096)
def _layout_of(
    shape: torch.Size, strides: tuple[int, ...], neuron_dim: NeuronDim, channel_groups: int
) -> cpu.Layout | str:
    summed = fan_in_dims(shape, neuron_dim, channel_groups)
    if summed and channel_groups > 1:  # as `neurons.as_rows` splits dimension 0
        inner = shape[0] // channel_groups
        shape = torch.Size((channel_groups, inner, *shape[1:]))
        strides = (strides[0] * inner, *strides)
    return cpu.layout_of(shape, strides, summed)
