"""Nero's fused form on the GPU: which tensors the kernel serves, and their step. The equations: `nero.py`."""

import itertools
from collections.abc import Sequence
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from archopt.kernels import gpu
from archopt.kernels.cpu import Memory, obstacle_of_gradient, obstacle_of_view
from archopt.optim.base import rate
from archopt.optim.fused import made_of, ordinary, refuse, wants_kernel
from archopt.optim.nero_fused import STATE, axis_of, disorder, layout_of

EXPECTED = (torch.float32, torch.float32, torch.float32, torch.float32, torch.int32)  # types of STATE

_dtype, _shape, _grad = map(attrgetter, ("dtype", "shape", "grad"))
_options = itemgetter(*gpu.Options._fields)


class Members(NamedTuple):
    """The weights of a group that have a gradient, with their state."""

    group: dict[str, Any]
    params: list[Tensor]
    states: list[dict[str, Tensor]]
    number: int  # of the group's first parameter in the optimizer


class Served(NamedTuple):
    """The launches for the tensors of all groups, and what another form has to serve."""

    launches: list[gpu.Launches]  # one a device
    weights: list[Tensor]  # that they move
    options: list[int]  # for each of their options, a group that has them
    rest: list[list[int]]  # for each group, positions of those that another form has to serve
    keeps: Any = None  # tensors whose identity is part of what this was found by


def wants_gpu(param: Tensor, group: dict[str, Any]) -> bool:
    """Whether the kernel is to serve a weight, if it can; its step count is then kept on the device."""
    return param.device.type in gpu.DEVICE_TYPES and wants_kernel("Nero", group) and not gpu.missing()


def served(groups: Sequence[Members], plans: gpu.Plans) -> Served:
    """What the kernel serves of all groups, prepared, or found again as it was prepared before.

    Groups with equal options share their launches. Raises ValueError, with the reason, where a group has fused=True
    and a weight on a GPU cannot be served.
    """
    wanted = [_wants(members) for members in groups]
    if not any(wanted):
        return Served([], [], [], [list(range(len(members.params))) for members in groups])
    sets = sets_of([members.group for members in groups])
    asked = [members for members, wants in zip(groups, wanted, strict=True) if wants]
    params = list(itertools.chain.from_iterable([members.params for members in asked]))
    grads: list[Any] = list(map(_grad, params))
    if gpu.missing() or not (ordinary(params) and ordinary(grads)):  # others may have no address to ask for
        return _prepared(groups, wanted, sets, plans)
    if gpu.capturing():
        return plans.captured(lambda: _prepared(groups, wanted, sets, plans))
    states = itertools.chain.from_iterable([members.states for members in asked])
    values = itertools.chain.from_iterable(map(dict.values, states))
    # All that decides how tensors are served and where they lie. State and weights are told by identity, and kept;
    # gradients by address, so that they can be freed.
    key = (
        *wanted,
        *sets,
        *[_of_group(members) for members in asked],
        *map(id, values),
        *map(id, params),
        *map(Tensor.data_ptr, params),
        *map(Tensor.data_ptr, grads),
        *map(Tensor.stride, params),
        *map(Tensor.stride, grads),
        *map(_shape, params),
        *map(_dtype, params),
        *map(_dtype, grads),
        *map(Tensor.is_neg, params),
        *map(Tensor.is_neg, grads),
    )
    return plans.get(key, lambda: _prepared(groups, wanted, sets, plans))


def sets_of(groups: Sequence[dict[str, Any]]) -> list[int]:
    """For each group, the number of its options: the same for groups that can share launches.

    Not the options themselves, since a rate may change at every step. A rate that is a tensor is told by identity.
    """
    numbers: dict[tuple[Any, ...], int] = {}
    return [numbers.setdefault(_options(group), len(numbers)) for group in groups]


def _wants(members: Members) -> bool:
    """Whether the group has weights on a GPU, and a kernel is to serve what it can of them."""
    on_gpu = any(param.device.type in gpu.DEVICE_TYPES for param in members.params)
    return on_gpu and wants_kernel("Nero", members.group)


def _of_group(members: Members) -> tuple[Any, ...]:
    """What decides how the tensors of a group are served, whatever they are."""
    group, number = members.group, members.number
    return (
        len(members.params),
        number,
        axis_of(group),
        group["channel_groups"],
        group["fused"],
        group["capturable"],
    )


def unserved(param: Tensor, group: dict[str, Any]) -> None:
    """Raises ValueError, with the reason, where the kernel cannot serve a weight whatever its gradient."""
    memory = Memory(*made_of(param))
    if reason := gpu.missing() or gpu.obstacle(memory):
        refuse("Nero", param, reason)
    layout = layout_of(memory.shape, memory.strides, axis_of(group), group["channel_groups"])
    if reason := layout if isinstance(layout, str) else gpu.obstacle_of_layout(layout):
        refuse("Nero", param, reason)


def gpu_nero(found: Served, groups: Sequence[Members]) -> None:
    """The step of all weights that the kernel serves; it advances their step counts too."""
    if not found.launches:
        return
    options = []
    for index in found.options:
        group = groups[index].group
        options.append(gpu.Options(*_options(group))._replace(lr=rate(group)))
    for launches in found.launches:
        gpu.nero(launches, options)
    torch.autograd.graph.increment_version(found.weights)


def _prepared(groups: Sequence[Members], wanted: list[bool], sets: list[int], plans: gpu.Plans) -> Served:
    tensors: list[gpu.NeroTensor] = []
    rest: list[list[int]] = []
    for members, wants, options in zip(groups, wanted, sets, strict=True):
        group, params, states, number = members
        numbers = {id(param): number + i for i, param in enumerate(group["params"])}
        rest.append([])
        for i, (param, state) in enumerate(zip(params, states, strict=True)):
            tensor = (
                _for_kernel(param, state, group, numbers[id(param)], options) if wants else "not asked for"
            )
            if not isinstance(tensor, str):
                tensors.append(tensor)
            elif wants and group["fused"] and param.device.type in gpu.DEVICE_TYPES:
                refuse("Nero", param, tensor)
            else:
                rest[-1].append(i)
    by_device: dict[torch.device, list[gpu.NeroTensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.weight.device, []).append(tensor)
    capturable = any(members.group["capturable"] for members in groups)
    launches = [gpu.nero_launches(alike, plans, capturable=capturable) for alike in by_device.values()]
    kept = [(members.params, [list(state.values()) for state in members.states]) for members in groups]
    leaders = [sets.index(number) for number in range(max(sets) + 1)]
    return Served(launches, [tensor.weight for tensor in tensors], leaders, rest, kept)


def _for_kernel(
    param: Tensor, state: dict[str, Tensor], group: dict[str, Any], number: int, options: int
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
    return gpu.NeroTensor(param, grad, v, scale, step, turn, skipped, layout, number, options)
