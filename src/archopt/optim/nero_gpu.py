"""Nero's fused form on the GPU: which tensors the kernel serves, and their step. The equations: `nero.py`."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from archopt.kernels import gpu
from archopt.kernels.cpu import Memory, obstacle_of_gradient, obstacle_of_view
from archopt.optim.base import by_device_and_dtype, rate
from archopt.optim.fused import made_of, refuse, wants_kernel
from archopt.optim.nero_fused import STATE, axis_of, disorder, layout_of

EXPECTED = (torch.float32, torch.float32, torch.float32, torch.float32, torch.int32)  # types of STATE


class Served:
    """The launches for a group's tensors, and the positions of those that another form has to serve."""

    def __init__(self, launches: list[gpu.Launches], rest: list[int], keeps: Any = None) -> None:
        self.launches = launches
        self.rest = rest
        self.keeps = keeps  # tensors whose identity is part of what this was found by


def wants_gpu(param: Tensor, group: dict[str, Any]) -> bool:
    """Whether the kernel is to serve a weight, if it can; its step count is then kept on the device."""
    return param.device.type in gpu.DEVICE_TYPES and wants_kernel("Nero", group) and not gpu.missing()


def served(
    params: list[Tensor],
    states: list[dict[str, Tensor]],
    group: dict[str, Any],
    plans: gpu.Plans,
    number: int,
) -> Served:
    """What the kernel serves of the tensors of a group, prepared, or found again as it was prepared before.

    `number` is that of the group's first parameter in the optimizer. Raises ValueError, with the reason, where the
    group has fused=True and a weight on a GPU cannot be served.
    """
    if not any(param.device.type in gpu.DEVICE_TYPES for param in params) or not wants_kernel("Nero", group):
        return Served([], list(range(len(params))))
    grads: list[Any] = [param.grad for param in params]
    ordinary = {*map(type, params), *map(type, grads)} <= {Tensor, nn.Parameter}
    if gpu.missing() or not ordinary:  # others may have no address to ask for
        return _prepared(params, states, group, plans, number)
    if gpu.capturing():
        return plans.captured(lambda: _prepared(params, states, group, plans, number))
    values = list(itertools.chain.from_iterable([state.values() for state in states]))
    # All that decides how tensors are served and where they lie. State and weights are told by identity, and kept;
    # gradients by address, so that they can be freed.
    key = (
        number,
        axis_of(group),
        group["channel_groups"],
        group["fused"],
        group["capturable"],
        *map(id, values),
        *map(id, params),
        *map(Tensor.data_ptr, params),
        *map(Tensor.data_ptr, grads),
        *map(Tensor.stride, params),
        *map(Tensor.stride, grads),
        *[param.shape for param in params],
        *[param.dtype for param in params],
        *[grad.dtype for grad in grads],
        *map(Tensor.is_neg, params),
        *map(Tensor.is_neg, grads),
    )
    return plans.get(key, lambda: _prepared(params, states, group, plans, number))


def unserved(param: Tensor, group: dict[str, Any]) -> None:
    """Raises ValueError, with the reason, where the kernel cannot serve a weight whatever its gradient."""
    memory = Memory(*made_of(param))
    if reason := gpu.missing() or gpu.obstacle(memory):
        refuse("Nero", param, reason)
    layout = layout_of(memory.shape, memory.strides, axis_of(group), group["channel_groups"])
    if reason := layout if isinstance(layout, str) else gpu.obstacle_of_layout(layout):
        refuse("Nero", param, reason)


def gpu_nero(found: Served, params: list[Tensor], group: dict[str, Any]) -> None:
    """The step of all weights that the kernel serves; it advances their step counts too."""
    if not found.launches:
        return
    for launches in found.launches:
        gpu.nero(
            launches,
            lr=rate(group),
            beta=group["beta"],
            zero_mean=group["zero_mean"],
            unit_norm=group["unit_norm"],
            maximize=group["maximize"],
            stochastic_rounding=group["stochastic_rounding"],
        )
    rest = set(found.rest)
    torch.autograd.graph.increment_version([p for i, p in enumerate(params) if i not in rest])


def _prepared(
    params: list[Tensor],
    states: list[dict[str, Tensor]],
    group: dict[str, Any],
    plans: gpu.Plans,
    number: int,
) -> Served:
    numbers = {id(param): number + i for i, param in enumerate(group["params"])}
    tensors: list[gpu.NeroTensor] = []
    rest: list[int] = []
    for i, (param, state) in enumerate(zip(params, states, strict=True)):
        tensor = _for_kernel(param, state, group, numbers[id(param)])
        if not isinstance(tensor, str):
            tensors.append(tensor)
        elif group["fused"] and param.device.type in gpu.DEVICE_TYPES:
            refuse("Nero", param, tensor)
        else:
            rest.append(i)
    launches = [
        gpu.nero_launches([tensors[i] for i in alike], plans, capturable=group["capturable"])
        for alike in by_device_and_dtype([tensor.weight for tensor in tensors])
    ]
    return Served(launches, rest, (params, [list(state.values()) for state in states]))


def _for_kernel(
    param: Tensor, state: dict[str, Tensor], group: dict[str, Any], number: int
) -> gpu.NeroTensor | str:
    """What the kernel takes, or why it cannot."""
    memory, grad = Memory(*made_of(param)), param.grad
    assert grad is not None
    reason = gpu.obstacle(memory) or gpu.missing() or obstacle_of_gradient(memory, Memory(*made_of(grad)))
    if reason := reason or obstacle_of_view(param, grad):
        return reason
    layout = layout_of(memory.shape, memory.strides, axis_of(group), group["channel_groups"])
    if isinstance(layout, str):
        return layout
    if reason := gpu.obstacle_of_layout(layout):
        return reason
    if state["step"].device != param.device and not gpu.capturing():
        # Counted on the CPU so far, by another form or an older version; the kernel counts where it works.
        state["step"] = state["step"].to(param.device, non_blocking=True)
    for name, dtype in zip(STATE, EXPECTED, strict=True):
        if state[name].dtype != dtype or state[name].device != param.device:
            return f"its {name} is {state[name].dtype} on {state[name].device}, expected {dtype}"
    if reason := disorder(Memory(*made_of(state["exp_avg_sq"])), memory):
        return reason
    v, scale, step, turn, skipped = (state[name] for name in STATE)
    return gpu.NeroTensor(param, grad, v, scale, step, turn, skipped, layout, number)
