"""Nero's CPU kernel (native/nero.c): the call."""

import ctypes
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from archopt.kernels.cpu import FORMATS, Layout, call

ARGUMENTS = (
    ctypes.c_void_p,  # the table of tensors
    ctypes.c_int64,  # how many
    ctypes.c_double,  # lr
    ctypes.c_double,  # beta
    ctypes.c_int32,  # zero_mean
    ctypes.c_int32,  # unit_norm
    ctypes.c_int32,  # maximize
)


class NeroTensor(NamedTuple):
    """A weight with its gradient and Nero's state, all on the CPU, as the kernel wants them."""

    weight: Tensor
    grad: Tensor
    exp_avg_sq: Tensor
    scale: Tensor
    step: Tensor
    turn: Tensor
    skipped: Tensor
    layout: Layout


def nero(
    tensors: Sequence[NeroTensor],
    *,
    lr: float,
    beta: float,
    zero_mean: bool,
    unit_norm: bool,
    maximize: bool,
) -> None:
    """Nero's step for all tensors, in place; `step` is advanced already.

    Raises RuntimeError where the library is not there (see `cpu.status`) and MemoryError.
    """
    table = array("q")
    for t in tensors:
        pointers = (t.weight, t.grad, t.exp_avg_sq, t.scale, t.step, t.turn, t.skipped)
        table.extend([tensor.data_ptr() for tensor in pointers])
        table.append(FORMATS[t.weight.dtype])
        table.extend(t.layout)
    where = table.buffer_info()[0]
    options = (lr, beta, zero_mean, unit_norm, maximize)
    if call("archopt_nero", ARGUMENTS, where, len(tensors), *options):
        raise MemoryError(f"no memory for the table of {len(tensors)} tensors; nothing moved")
    torch.autograd.graph.increment_version([t.weight for t in tensors])
