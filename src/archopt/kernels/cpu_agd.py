"""AGD's CPU kernel (native/agd.c): the two calls, for the norms and for the step."""

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
    ctypes.c_void_p,  # a factor of each: its reach, or its distance
    ctypes.c_void_p,  # the norms of all parts, as size and scale
    ctypes.c_void_p,  # the sum of all terms, to be written, or eta
)


class AGDTensor(NamedTuple):
    """A weight with its gradient, both on one device, and what AGD knows of it."""

    weight: Tensor
    grad: Tensor
    layout: Layout  # of its parts
    reach: float  # m r f: how far a step of eta = 1 moves each part
    pace: float  # gain * lr; negative to ascend
    lr: Tensor | None  # the learning rate where it is a tensor, and then not in `pace`

    def distance(self) -> float:
        """How far a step of eta = 1 moves each part, gain and learning rate included."""
        return self.reach * self.pace * (1.0 if self.lr is None else float(self.lr))


class AGDStep:
    """A step of AGD for tensors on the CPU: `summary` is their part of G; `move`, given eta, moves them.

    Raises RuntimeError where the library is not there (see `cpu.status`) and MemoryError.
    """

    def __init__(self, tensors: Sequence[AGDTensor]) -> None:
        self._weights = [tensor.weight for tensor in tensors]
        self._grads = [tensor.grad for tensor in tensors]  # their memory is read again
        self._distances = array("d", [tensor.distance() for tensor in tensors])
        self._table = array("q")
        parts = 0
        for tensor in tensors:
            pointers = (tensor.weight.data_ptr(), tensor.grad.data_ptr())
            self._table.extend((*pointers, FORMATS[tensor.weight.dtype], *tensor.layout))
            parts += tensor.layout.batches * tensor.layout.rows
        self._norms = torch.empty(parts, 2, dtype=torch.float64)
        self.summary = torch.empty((), dtype=torch.float64)
        self._call("archopt_agd_measure", array("d", [tensor.reach for tensor in tensors]), self.summary)

    def move(self, eta: Tensor) -> None:
        """Moves all weights, in place. eta: 0-d."""
        self._call("archopt_agd_step", self._distances, eta.to(self.summary))
        torch.autograd.graph.increment_version(self._weights)

    def _call(self, name: str, factors: "array[float]", scalar: Tensor) -> None:
        table, count = self._table.buffer_info()[0], len(self._weights)
        where = (factors.buffer_info()[0], self._norms.data_ptr(), scalar.data_ptr())
        call(name, ARGUMENTS, table, count, *where)
