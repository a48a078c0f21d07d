"""AutoNero's GPU kernels (triton_autonero.py): their tables and launches."""

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from archopt.kernels import gpu
from archopt.kernels.autonero import ENTRIES, HIDDEN, PLAIN, TURNING, AutoNeroTensor, GroupOptions
from archopt.kernels.launch import Kernel, kernel

MEASURED = 4096  # entries that a program measures
SUMMED = 256  # parts that a program adds up at a time
OF_VECTORS = 1024  # entries of a vector that a program moves
ON_CHIP = 8192  # entries of a row up to which it is read once
LONG_TILE = 2048  # entries at a time of a longer one
TILE = 2048  # entries that a program holds, where rows are short: 16 a thread
COLUMNS, OPTIONS, PACE = 15, 7, 12  # numbers a tensor, a group and a tensor, as in triton_autonero.py

Types = tuple[torch.dtype, torch.dtype]  # of a weight and of its movement


class Shape(NamedTuple):
    """What a launch does at a time: `rows` rows, `columns` entries of each; the whole of them unless `long`."""

    kind: int
    aligned: int
    """Entries that can be read at once because memory is aligned; 0 if it is not."""
    long: bool
    rows: int
    columns: int
    warps: int


class Call(NamedTuple):
    """A launch over a list of units: so many from `first` on."""

    types: Types
    shape: Shape
    first: int
    units: int


class Work(NamedTuple):
    """The launches for tensors of certain shapes."""

    measures: tuple[Call, ...]
    averages: tuple[Call, ...]
    of_measures: Tensor  # int32, (units, 2): tensor and number of its part
    of_averages: Tensor  # tensor and first row or entry
    parts: tuple[tuple[int, int], ...]  # of each tensor the first unit of `measure`, and how many
    turned: int  # room for what the units of all `turn`s write


class Prepared(NamedTuple):
    """What a step of some tensors needs on the device, as long as they lie where they lie."""

    table: Tensor
    options: Tensor
    work: Work
    shapes: tuple[Shape, ...]  # of the tensors


class GpuPasses:
    """`archopt.kernels.autonero.Passes` on a GPU. Step counts are advanced by `average`, of hidden tensors too."""

    def __init__(
        self,
        tensors: Sequence[AutoNeroTensor],
        options: Sequence[GroupOptions],
        plans: gpu.Plans,
        *,
        spare: bool,
    ) -> None:
        self._tensors = tensors
        self._device = tensors[0].weight.device
        code: Any = importlib.import_module("archopt.kernels.triton_autonero")
        self._total = kernel(code.total, self._device, N=SUMMED, num_warps=4)
        self._of_paces = kernel(code.paces, self._device, num_warps=1)
        self._options = options
        self._plans = plans
        self._spare = spare
        self._types = [(tensor.weight.dtype, tensor.movement.dtype) for tensor in tensors]
        self._weights = [tensor.weight for tensor in tensors]
        self._moved = [tensor.weight for tensor in tensors if tensor.kind != HIDDEN]  # by `average`
        self._prepared: Prepared | None = None
        self._paces: Tensor | None = None
        self._parts: Tensor | None = None  # <gh, d> of units, those of `average` and then of `turn`s
        self._written = 0

    def measure(self, grads: Sequence[Tensor]) -> Tensor:
        self._prepared = made = self._find(tuple(map(Tensor.data_ptr, grads)))
        count = len(grads)
        parts = self._empty(made.work.of_measures.size(0), 2)
        sums = torch.empty((count, 2), dtype=torch.float64, device=self._device)
        with gpu.on(self._device):
            for call in made.work.measures:
                measure = _kernel("measure", self._device, call.types, call.shape)
                measure.launch(call.units, made.table, made.work.of_measures, parts, call.first)
            self._total.launch(count, made.table, made.options, parts, sums)
        return sums

    def average(self, scalars: Tensor, reaches: Tensor) -> None:
        made, count = self._now(), len(self._tensors)
        self._paces = self._empty(count, PACE)
        averaged = made.work.of_averages.size(0)
        self._parts = torch.zeros(
            gpu.padded(averaged, torch.float32) + made.work.turned, dtype=torch.float32, device=self._device
        )
        self._written = gpu.padded(averaged, torch.float32)
        with gpu.on(self._device):
            self._of_paces.launch(count, made.table, made.options, scalars, self._paces)
            for call in made.work.averages:
                average = _kernel("average", self._device, call.types, call.shape)
                lists = made.work.of_averages, self._paces, reaches, self._parts
                average.launch(call.units, made.table, *lists, call.first)
        torch.autograd.graph.increment_version(self._moved)

    def turn(self, first: int, count: int, directions: Tensor, scalars: Tensor) -> None:
        made, tensor = self._now(), self._tensors[first]
        assert self._paces is not None, "turn comes after average"
        assert self._parts is not None
        aligned = min(shape.aligned for shape in made.shapes[first : first + count])
        shape = made.shapes[first]._replace(aligned=0 if directions.data_ptr() % gpu.VECTOR else aligned)
        units = -(-tensor.rows // shape.rows)
        parts = self._parts[self._written :]
        self._written += gpu.padded(count * units, torch.float32)
        with gpu.on(self._device):
            turn = _kernel("turn", self._device, self._types[first], shape)
            turn.launch(count * units, made.table, self._paces, directions, parts, first, units)
        torch.autograd.graph.increment_version(self._weights[first : first + count])

    def expected(self) -> Tensor:
        assert self._parts is not None, "it comes after average"
        return self._parts.sum(dtype=torch.float64)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self._device)

    def _now(self) -> Prepared:
        assert self._prepared is not None, "the other passes come after measure"
        return self._prepared

    def _find(self, grads: tuple[int, ...]) -> Prepared:
        """What a step needs with gradients at these addresses, made now or found again."""
        if gpu.capturing():
            return self._plans.captured(lambda: self._prepare(grads))
        if self._spare and self._device.type != "cpu":
            self._plans.make_room(len(self._tensors) * COLUMNS + len(self._options) * OPTIONS)
        return self._plans.get((self, grads), lambda: self._prepare(grads))

    def _prepare(self, grads: tuple[int, ...]) -> Prepared:
        # The work depends on shapes alone, not on addresses: a capture finds what steps before it uploaded.
        begins = [_begins(tensor, grad) for tensor, grad in zip(self._tensors, grads, strict=True)]
        shapes = tuple([_shape(tensor, at) for tensor, at in zip(self._tensors, begins, strict=True)])
        whole = [
            _aligned(tensor, at, tensor.weight.numel())
            for tensor, at in zip(self._tensors, begins, strict=True)
        ]
        geometry = tuple(
            (shape, types, tensor.rows, tensor.fan_in, aligned)
            for tensor, types, shape, aligned in zip(self._tensors, self._types, shapes, whole, strict=True)
        )
        work = self._plans.get((self._device, geometry), lambda: self._work(shapes, whole))
        values: list[int] = []
        heads = 0
        for tensor, grad, parts in zip(self._tensors, grads, work.parts, strict=True):
            weight, *state = tensor.addresses()
            values.extend((weight, grad, *state, *tensor.sizes(), heads, *parts))
            heads += tensor.kind == PLAIN
        doubles = [
            (*group, *(math.log(beta) if beta else -math.inf for beta in group[:2]))
            for group in self._options
        ]
        of_groups = torch.tensor(doubles, dtype=torch.float64).view(torch.int64).reshape(-1)
        there = self._plans.send(torch.cat([torch.tensor(values), of_groups]), self._device)
        return Prepared(there[: len(values)], there[len(values) :].view(torch.float64), work, shapes)

    def _work(self, shapes: Sequence[Shape], whole: Sequence[int]) -> Work:
        measured, averaged = [], []
        for index, (tensor, shape) in enumerate(zip(self._tensors, shapes, strict=True)):
            types = self._types[index]
            flat = Shape(ENTRIES, whole[index], False, 1, MEASURED, 4)
            measured.append((types, flat, index, torch.arange(-(-tensor.rows * tensor.fan_in // MEASURED))))
            averaged.append((types, shape, index, torch.arange(0, tensor.rows, shape.rows)))
        measures, of_measures, firsts = _units(measured)
        averages, of_averages, _ = _units(averaged)
        there = [self._plans.upload_lines(units, self._device) for units in (of_measures, of_averages)]
        counts = [parts.numel() for _, _, _, parts in measured]
        turned = [
            gpu.padded(starts.numel(), torch.float32)
            for _, shape, _, starts in averaged
            if shape.kind == HIDDEN
        ]
        parts = tuple(zip(firsts, counts, strict=True))
        return Work(measures, averages, there[0], there[1], parts, sum(turned))


@functools.cache
def _kernel(name: str, device: torch.device, types: Types, shape: Shape) -> Kernel:
    """The kernel `measure`, `average` or `turn` for tensors of these types, worked on in this way."""
    code: Any = importlib.import_module("archopt.kernels.triton_autonero")
    constants = {"W": code.TYPES[types[0]], "D": code.TYPES[types[1]]}
    if name == "measure":
        constants |= {"N": shape.columns, "ALIGNED": shape.aligned}
    else:
        constants |= {"KIND_OF_WORK": shape.kind} if name == "average" else {}
        constants |= {"ALIGNED": shape.aligned, "LONG": shape.long, "R": shape.rows, "C": shape.columns}
    return kernel(getattr(code, name), device, **constants, num_warps=shape.warps)


def _begins(tensor: AutoNeroTensor, grad: int) -> tuple[int, ...]:
    """Where what is as large as the weight begins."""
    return (grad, *[held.data_ptr() for held in (tensor.weight, tensor.exp_avg, tensor.movement)])


def _aligned(tensor: AutoNeroTensor, begins: Sequence[int], length: int) -> int:
    """How many entries of its rows of that length can be read at once: 0 if memory is not aligned."""
    at_once = gpu.VECTOR // min(tensor.weight.element_size(), tensor.movement.element_size())
    return 0 if any(begin % gpu.VECTOR for begin in begins) or length % at_once else at_once


def _shape(tensor: AutoNeroTensor, begins: Sequence[int]) -> Shape:
    """How a kernel works on it."""
    if tensor.kind == ENTRIES:
        return Shape(ENTRIES, 0, False, OF_VECTORS, 1, 4)
    kind = HIDDEN if tensor.kind == HIDDEN else TURNING
    aligned = _aligned(tensor, begins, tensor.fan_in)
    if tensor.fan_in > ON_CHIP:
        return Shape(kind, aligned, True, 1, LONG_TILE, 8)
    columns = max(32, 1 << (tensor.fan_in - 1).bit_length())
    rows = max(1, TILE // columns)
    return Shape(kind, aligned, False, rows, columns, max(4, columns * rows // 512))


def _units(parts: Sequence[tuple[Types, Shape, int, Tensor]]) -> tuple[tuple[Call, ...], Tensor, list[int]]:
    """The launches, the list of units (tensor and start), and the first unit of each tensor."""
    firsts = [0] * len(parts)
    calls, units, number = [], [], 0
    alike: dict[tuple[Types, Shape], list[tuple[int, Tensor]]] = {}
    for types, shape, index, starts in parts:
        alike.setdefault((types, shape), []).append((index, starts))
    for (types, shape), members in alike.items():
        begin = number
        for index, starts in members:
            firsts[index] = number
            units.append(torch.stack([torch.full_like(starts, index), starts], dim=-1))
            number += starts.numel()
        calls.append(Call(types, shape, begin, number - begin))
    return tuple(calls), torch.cat(units), firsts
