"""What the fused forms share: when a group wants a kernel, and refusals of `fused=True`."""

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

REMEDY = "use fused=None, which takes another form for such tensors"

Made = tuple[type, torch.dtype, torch.device, torch.Size, tuple[int, ...]]


def made_of(tensor: Tensor) -> Made:
    """The fields of `cpu.Memory`; a bare tuple, since a step makes several of them a weight."""
    return type(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride()


_ORDINARY = {Tensor, nn.Parameter}
_kind = attrgetter("dtype", "device", "shape")


def ordinary(tensors: Iterable[object]) -> bool:
    """Whether all are plain tensors; the memory of others may not be there to ask for."""
    return _ORDINARY.issuperset(map(type, tensors))


def memory_key(params: Sequence[Tensor], grads: Sequence[Any], values: Sequence[Tensor]) -> tuple[Any, ...]:
    """All that ordinary weights, their gradients and the tensors of their state say of how a kernel serves them and
    where they lie, but for the places of gradients. Weights and state are told by identity: keep them with the key.
    """
    return (
        *map(id, params),
        *map(id, values),
        *map(Tensor.data_ptr, params),
        *map(Tensor.data_ptr, values),
        *map(Tensor.stride, params),
        *map(Tensor.stride, grads),
        *map(_kind, params),
        *map(_kind, grads),
        *map(Tensor.is_neg, params),
        *map(Tensor.is_neg, grads),
    )


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
