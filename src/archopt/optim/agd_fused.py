"""AGD's fused form: which tensors a kernel serves, and their step. The equations stand in `agd.py`.

A kernel serves all tensors on one kind of device. One call measures them; once G is summed, over them and all
others, a second call moves them.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from archopt.kernels import cpu, cpu_agd
from archopt.optim import oracles
from archopt.optim.fused import Made, made_of, refuse, wants_kernel

STEPS = {"cpu": cpu_agd.AGDStep}  # by type of device


def served(
    param: Tensor, weight: Tensor, grad: Tensor, dims: tuple[int, ...], group: dict[str, Any]
) -> cpu.Layout | None:
    """How a weight and its gradient, as parts that sum over `dims`, lie in memory; None if no kernel serves them.

    Raises ValueError, with the reason, where the group has fused=True and the weight cannot be served.
    """
    if not wants_kernel("AGD", group):
        return None
    layout = _verdict(made_of(param), made_of(weight), made_of(grad), dims)
    reason = layout if isinstance(layout, str) else cpu.missing() or cpu.obstacle_of_view(weight, grad)
    if reason and group["fused"]:
        refuse("AGD", param, reason)
    return None if reason or isinstance(layout, str) else layout


def unserved(param: Tensor, group: dict[str, Any]) -> None:
    """Raises ValueError, with the reason, where no kernel can serve a weight whatever its gradient."""
    if reason := cpu.missing() or cpu.obstacle(cpu.Memory(*made_of(param))):
        refuse("AGD", param, reason)
    parts = oracles.parts_of(param.shape, group)
    weight = parts.view(param.detach())
    layout = cpu.layout_of(weight.shape, weight.stride(), parts.dims)
    if isinstance(layout, str):
        refuse("AGD", param, layout)


def fused_agd(tensors: list[cpu_agd.AGDTensor]) -> tuple[list[Tensor], list[Callable[[Tensor], None]]]:
    """The terms m r ||g||* of G, one sum a kind of device, and what moves the weights once eta is known."""
    terms: list[Tensor] = []
    moves: list[Callable[[Tensor], None]] = []
    for device, step in STEPS.items():
        if alike := [tensor for tensor in tensors if tensor.weight.device.type == device]:
            begun = step(alike)
            terms.append(begun.summary)
            moves.append(begun.move)
    return terms, moves


@functools.lru_cache(maxsize=4096)
def _verdict(param: Made, weight: Made, grad: Made, dims: tuple[int, ...]) -> cpu.Layout | str:
    """How a kernel serves a parameter, viewed as parts, with this gradient, or why it cannot: decided once."""
    view = cpu.Memory(*weight)
    if reason := cpu.obstacle(cpu.Memory(*param)) or cpu.obstacle_of_gradient(view, cpu.Memory(*grad)):
        return reason
    return cpu.layout_of(view.shape, view.strides, dims)
