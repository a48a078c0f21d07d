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
    ctypes.c_int32,  # stochastic_rounding
)


class NeroTensor(NamedTuple):
    """A weight with Nero's state, all on the CPU, as the kernel wants them."""

    weight: Tensor
    exp_avg_sq: Tensor
    scale: Tensor
    step: Tensor
    turn: Tensor
    skipped: Tensor
    layout: Layout
    number: int  # of the weight in its optimizer: with the step count, the key of its random numbers


class NeroTable:
    """What the kernel reads of tensors that lie where they did: made once, but for the places of gradients."""

    WORDS = 13  # of a tensor; its gradient is the second

    def __init__(self, tensors: Sequence[NeroTensor]) -> None:
        self.weights = [tensor.weight for tensor in tensors]
        self._state = [tensor[1:6] for tensor in tensors]  # whose memory the table names
        self._words = array("q")
        for weight, *state, layout, number in tensors:
            pointers = [weight.data_ptr(), 0, *(tensor.data_ptr() for tensor in state)]
            self._words.extend((*pointers, FORMATS[weight.dtype], *layout, number))

    def place(self, grads: Sequence[Tensor]) -> int:
        """Where the table is, for these gradients of its weights."""
        self._words[1 :: self.WORDS] = array("q", map(Tensor.data_ptr, grads))
        return self._words.buffer_info()[0]


def nero(
    table: NeroTable,
    grads: Sequence[Tensor],
    *,
    lr: float,
    beta: float,
    zero_mean: bool,
    unit_norm: bool,
    maximize: bool,
    stochastic_rounding: bool,
) -> None:
    """Nero's step for all tensors, in place; it advances their step counts too.

    stochastic_rounding: bfloat16 weights become one of their two neighbours, right on average. The random numbers
    are a function of the tensor's number, the step count, the neuron and the entry (native/random.h).

    Raises RuntimeError where the library is not there (see `cpu.status`) and MemoryError.
    """
    options = (lr, beta, zero_mean, unit_norm, maximize, stochastic_rounding)
    call("archopt_nero", ARGUMENTS, table.place(grads), len(grads), *options)
    torch.autograd.graph.increment_version(table.weights)
