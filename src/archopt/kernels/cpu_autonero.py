"""AutoNero's CPU kernel (native/autonero.c): the calls."""

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from archopt.kernels.autonero import HIDDEN, PLAIN, AutoNeroTensor, GroupOptions
from archopt.kernels.cpu import FORMATS, call

WORDS = 16  # of a tensor in the table
GRAD, DIRECTION, REACH = 1, 8, 9  # words that are known later than the others

_TABLE = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)  # the tensors, how many, the options of groups
MEASURE = (*_TABLE, ctypes.c_void_p)  # the sums of each tensor
MOVE = (*_TABLE, ctypes.c_void_p, ctypes.c_void_p)  # the scalars of groups, the sum of all tensors


class CpuPasses:
    """`archopt.kernels.autonero.Passes` on the CPU.

    Each raises RuntimeError where the library is not there (see `cpu.status`) and MemoryError before it moves
    anything.
    """

    def __init__(self, tensors: Sequence[AutoNeroTensor], options: Sequence[GroupOptions]) -> None:
        self._options = array("d", [value for of_group in options for value in of_group])
        self._table = array("q")
        for tensor in tensors:
            weight, *state = tensor.addresses()
            formats = FORMATS[tensor.weight.dtype], FORMATS[tensor.movement.dtype]
            self._table.extend((weight, 0, *state, 0, 0, *formats, *tensor.sizes()))
        self._heads = [position for position, tensor in enumerate(tensors) if tensor.kind == PLAIN]
        self._weights = [tensor.weight for tensor in tensors]
        self._moved = [tensor.weight for tensor in tensors if tensor.kind != HIDDEN]  # by `average`
        self._expected: list[Tensor] = []

    def measure(self, grads: Sequence[Tensor]) -> Tensor:
        self._table[GRAD::WORDS] = array("q", map(Tensor.data_ptr, grads))
        sums = torch.empty((len(grads), 2), dtype=torch.float64)
        _call("archopt_autonero_measure", MEASURE, self._table, self._options, sums.data_ptr())
        return sums

    def average(self, scalars: Tensor, reaches: Tensor) -> None:
        for position, length in zip(self._heads, reaches.unbind(), strict=True):
            self._table[WORDS * position + REACH] = length.data_ptr()
        self._expected = [expected := torch.empty((), dtype=torch.float64)]
        where = scalars.data_ptr(), expected.data_ptr()
        _call("archopt_autonero_average", MOVE, self._table, self._options, *where)
        torch.autograd.graph.increment_version(self._moved)

    def turn(self, first: int, count: int, directions: Tensor, scalars: Tensor) -> None:
        table = self._table[WORDS * first : WORDS * (first + count)]
        for position, direction in enumerate(directions.unbind()):
            table[WORDS * position + DIRECTION] = direction.data_ptr()
        self._expected.append(expected := torch.empty((), dtype=torch.float64))
        where = scalars.data_ptr(), expected.data_ptr()
        _call("archopt_autonero_turn", MOVE, table, self._options, *where)
        torch.autograd.graph.increment_version(self._weights[first : first + count])

    def expected(self) -> Tensor:
        return torch.stack(self._expected).sum()


def _call(name: str, types: Sequence[type], table: "array[int]", options: "array[float]", *rest: int) -> None:
    call(name, types, table.buffer_info()[0], len(table) // WORDS, options.buffer_info()[0], *rest)
