"""AGD's fused form: which tensors kernels serve, on the CPU and on GPUs, and their step. The equations: `agd.py`.

A kernel serves all tensors on one kind of device. One call measures them; once G is summed, over them and all
others, a second call moves them.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from archopt.kernels import cpu, cpu_agd, gpu, gpu_agd
from archopt.kernels.cpu_agd import AGDTensor
from archopt.optim import oracles
from archopt.optim.fused import Made, made_of, ordinary, refuse, wants_kernel
from archopt.optim.nero_fused import axis_of

Move = Callable[[Tensor], None]
"""Moves weights, given eta."""


def served(
    param: Tensor, weight: Tensor, grad: Tensor, dims: tuple[int, ...], group: dict[str, Any]
) -> cpu.Layout | None:
    """How a weight and its gradient, as parts that sum over `dims`, lie in memory; None if no kernel serves them.

    Raises ValueError, with the reason, where the group has fused=True and the weight cannot be served.
    """
    if not wants_kernel("AGD", group):
        return None
    layout = _verdict(made_of(param), made_of(weight), made_of(grad), dims, on_gpu(param))
    reason = layout if isinstance(layout, str) else _missing(param) or cpu.obstacle_of_view(weight, grad)
    if reason and group["fused"]:
        refuse("AGD", param, reason)
    return None if reason or isinstance(layout, str) else layout


def unserved(param: Tensor, group: dict[str, Any]) -> None:
    """Raises ValueError, with the reason, where no kernel can serve a weight whatever its gradient."""
    if reason := _missing(param) or _obstacle(cpu.Memory(*made_of(param)), on_gpu(param)):
        refuse("AGD", param, reason)
    parts = oracles.parts_of(param.shape, group)
    weight = parts.view(param.detach())
    layout = _layout_of(weight.shape, weight.stride(), parts.dims, on_gpu(param))
    if isinstance(layout, str):
        refuse("AGD", param, layout)


def on_gpu(param: Tensor) -> bool:
    """Whether the GPU's kernels are to serve a weight rather than the CPU's."""
    return param.device.type in gpu.DEVICE_TYPES


def fused_agd(
    tensors: list[AGDTensor], plans: gpu.Plans, *, capturable: bool
) -> tuple[list[Tensor], list[Move]]:
    """The terms m r ||g||* of G, one sum a kernel and type, and what moves the weights once eta is known."""
    steps: list[cpu_agd.AGDStep | gpu_agd.AGDStep] = []
    if on_cpu := [tensor for tensor in tensors if not on_gpu(tensor.weight)]:
        steps.append(cpu_agd.AGDStep(on_cpu))
    for alike in _by_type([tensor for tensor in tensors if on_gpu(tensor.weight)]):
        weights, paces = [tensor.weight for tensor in alike], [gpu_agd.pace_of(tensor) for tensor in alike]
        steps.append(gpu_agd.AGDStep(_prepared(alike, plans, capturable), weights, paces))
    return [step.summary for step in steps], [step.move for step in steps]


def _prepared(alike: list[AGDTensor], plans: gpu.Plans, capturable: bool) -> gpu_agd.Prepared:
    """What a step of tensors of one type needs, found again where they lie as they lay."""
    prepare = functools.partial(gpu_agd.Prepared, alike, plans, capturable=capturable)
    if gpu.capturing():
        return plans.captured(prepare)
    key = (capturable, alike[0].weight.device, alike[0].weight.dtype)
    lines = [(t.weight.data_ptr(), t.grad.data_ptr(), t.layout, t.reach, id(t.lr)) for t in alike]
    return plans.get((*key, *lines), prepare)


Group = tuple[dict[str, Any], list[Tensor], int]
"""A group, those of its parameters that have a gradient, and how many could have one."""

_options = operator.itemgetter(
    "norm", "radius", "share", "uses", "slices", "groups", "stride", "fused", "foreach", "capturable"
)
_device, _dtype, _shape = map(operator.attrgetter, ("device", "dtype", "shape"))


class Ready:
    """The step of all tensors of an optimizer where GPU kernels serve them all: what no step has to find again.

    It keeps no gradient.
    """

    def __init__(self, tensors: list[AGDTensor], plans: gpu.Plans, *, capturable: bool, keeps: Any) -> None:
        places = {id(tensor): place for place, tensor in enumerate(tensors)}
        alike = _by_type(tensors)
        self._prepared = [_prepared(some, plans, capturable) for some in alike]
        self._places = [[places[id(tensor)] for tensor in some] for some in alike]
        self._keeps = keeps  # what the key tells by identity

    def begin(self, groups: list[Group]) -> tuple[list[Tensor], list[Move]]:
        """As `fused_agd`."""
        weights = [param for _, params, _ in groups for param in params]
        paces: list[float] = []
        for group, params, _ in groups:
            pace = -group["gain"] if group["maximize"] else group["gain"]
            lr = group["lr"]
            waits = params and isinstance(lr, Tensor) and not gpu_agd.reads_rate(lr, params[0])
            factor = 1.0 if isinstance(lr, Tensor) and not waits else float(lr)
            paces.extend([pace * factor] * len(params))
        steps = [
            gpu_agd.AGDStep(made, [weights[i] for i in places], [paces[i] for i in places])
            for made, places in zip(self._prepared, self._places, strict=True)
        ]
        return [step.summary for step in steps], [step.move for step in steps]


def key_of(groups: list[Group]) -> tuple[Any, ...] | None:
    """All that decides how tensors on GPUs are served and where they lie; None where that takes a closer look."""
    if torch.compiler.is_compiling():
        return None
    params = [param for _, some, _ in groups for param in some]
    grads: list[Any] = [param.grad for param in params]
    devices = list(map(_device, params))
    if not params or not all(device.type in gpu.DEVICE_TYPES for device in {*devices}):
        return None
    if gpu.missing() or gpu.capturing():
        return None
    if not (ordinary(params) and ordinary(grads)):
        return None
    if not all(wants_kernel("AGD", group) for group, _, _ in groups):
        return None
    options = [
        (
            _options(group),
            axis_of(group),
            id(group["lr"]) if isinstance(group["lr"], Tensor) else None,
            len(some),
            count,
        )
        for group, some, count in groups
    ]
    return (
        *options,
        *map(id, params),
        *map(Tensor.data_ptr, params),
        *map(Tensor.data_ptr, grads),
        *map(Tensor.stride, params),
        *map(Tensor.stride, grads),
        *devices,
        *map(_shape, params),
        *map(_dtype, params),
        *map(_dtype, grads),
        *map(Tensor.is_neg, params),
        *map(Tensor.is_neg, grads),
    )


def _by_type(tensors: list[AGDTensor]) -> list[list[AGDTensor]]:
    alike: dict[tuple[torch.device, torch.dtype], list[AGDTensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.weight.device, tensor.weight.dtype), []).append(tensor)
    return list(alike.values())


def _missing(param: Tensor) -> str:
    """Why there is no kernel for the weight's device."""
    return gpu.missing() if on_gpu(param) else cpu.missing()


def _obstacle(weight: cpu.Memory, gpus: bool) -> str:
    return gpu.obstacle(weight) if gpus else cpu.obstacle(weight)


def _layout_of(
    shape: torch.Size, strides: tuple[int, ...], dims: tuple[int, ...], gpus: bool
) -> cpu.Layout | str:
    layout = cpu.layout_of(shape, strides, dims)
    return layout if isinstance(layout, str) or not gpus else gpu.obstacle_of_layout(layout) or layout


@functools.lru_cache(maxsize=4096)
def _verdict(param: Made, weight: Made, grad: Made, dims: tuple[int, ...], gpus: bool) -> cpu.Layout | str:
    """How a kernel serves a parameter, viewed as parts, with this gradient, or why it cannot: decided once."""
    view = cpu.Memory(*weight)
    if reason := _obstacle(cpu.Memory(*param), gpus) or cpu.obstacle_of_gradient(view, cpu.Memory(*grad)):
        return reason
    return _layout_of(view.shape, view.strides, dims, gpus)
