"""What the fused forms share: when a group wants a kernel, and refusals of `fused=True`."""

from typing import Any, NoReturn

import torch
from torch import Tensor

REMEDY = "use fused=None, which takes another form for such tensors"

Made = tuple[type, torch.dtype, torch.device, torch.Size, tuple[int, ...]]


def made_of(tensor: Tensor) -> Made:
    """The fields of `cpu.Memory`; a bare tuple, since a step makes several of them a weight."""
    return type(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def wants_kernel(rule: str, group: dict[str, Any]) -> bool:
    """Whether a kernel is to serve what it can of the group.

    Raises ValueError where the group has fused=True and the step is being compiled.
    """
    fused = group["fused"]
    if fused is False or (fused is None and group["foreach"] is not None):
        return False
    if torch.compiler.is_compiling():
        if fused:
            raise ValueError(
                f"{rule}: fused=True cannot be honoured in a compiled step, which is fused by its compiler; "
                "use fused=None"
            )
        return False
    return True


def refuse(rule: str, param: Tensor, reason: str) -> NoReturn:
    """Raises ValueError: fused=True cannot be honoured for this weight."""
    raise ValueError(
        f"{rule}: fused=True cannot be honoured for a weight of shape {tuple(param.shape)}: {reason}; {REMEDY}"
    )
