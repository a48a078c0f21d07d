"""AGD's GPU kernels (triton_agd.py): their tables and launches."""

import functools
import importlib
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from archopt.kernels import gpu
from archopt.kernels.cpu import Layout
from archopt.kernels.cpu_agd import AGDTensor
from archopt.kernels.launch import kernel

COLUMNS = 12  # numbers a tensor, as in triton_agd.py
FLAT, ALIGNED_FLAT, IN_RUNS, ALIGNED_RUNS, SIDE_BY_SIDE, SHORT_ROWS = range(6)
SPAN = 16384  # entries of a unit: of one part,
DEEP_SPAN, WIDE = 1024, 16  # or of each of so many parts side by side,
MANY = 64  # or all of so many short parts
SHORT_RUN = 512  # entries of a part up to which it is short
FEW = 8  # pieces of a part that one thread adds up
PARTS_AT_ONCE = 1024  # that a program of `finish` adds up


class Work(NamedTuple):
    """What the kernels do for tensors of certain layouts: it does not depend on where they lie."""

    units: Tensor  # int32, four numbers a unit: tensor, part, first entry, number of the piece
    items: Tensor  # int32, two numbers an item of `finish`: tensor and first part
    counts: tuple[int, int]  # of units and items
    pieces: tuple[int, ...]  # of each tensor: units that share a part
    first_parts: tuple[int, ...]
    first_slots: tuple[int, ...]
    parts: int  # of all tensors, rounded up as `gpu.padded` says
    slots: int


class Prepared:
    """The step of tensors of one type on one device, as long as they lie where they lie. It keeps none of them."""

    def __init__(self, tensors: Sequence[AGDTensor], plans: gpu.Plans, *, capturable: bool) -> None:
        code: Any = importlib.import_module("archopt.kernels.triton_agd")
        self.device = tensors[0].weight.device
        dtype = tensors[0].weight.dtype
        of_type = {"DTYPE": code.TYPES[dtype], "PER": gpu.VECTOR // dtype.itemsize}
        self.measure = kernel(code.measure, self.device, **of_type, num_warps=4)
        self.finish = kernel(code.finish, self.device, PARTS_AT_ONCE=PARTS_AT_ONCE, num_warps=4)
        self.step = kernel(code.step, self.device, **of_type, num_warps=4)
        self._plans = plans
        self._reaches = [tensor.reach for tensor in tensors]
        self.rates = list({id(lr): lr for t in tensors if (lr := _rate(t)) is not None}.values())
        self._last: tuple[list[float], Tensor | None] = ([], None)
        places = {id(lr): place for place, lr in enumerate(self.rates)}
        kinds = tuple([(_kind(tensor), tensor.layout) for tensor in tensors])
        self.work: Work = plans.get((self.device, kinds), lambda: _work(kinds, self.device, plans))
        lines: list[int] = []
        reaches = torch.tensor(self._reaches, dtype=torch.float64).view(torch.int64).tolist()
        columns = (self.work.pieces, self.work.first_parts, self.work.first_slots, reaches)
        for t, (kind, layout), *own in zip(tensors, kinds, *columns, strict=True):
            batches, spread, rows, run = layout
            lr = _rate(t)
            lines.extend((t.weight.data_ptr(), t.grad.data_ptr(), kind, spread, rows, run, batches * rows))
            lines.extend((*own, -1 if lr is None else places[id(lr)]))
        if capturable and self.device.type == "cuda" and not gpu.capturing():
            plans.make_room(len(lines))
        self.table = plans.send(torch.tensor(lines), self.device)

    def distances(self, paces: Sequence[float]) -> Tensor:
        """How far a step of eta = 1 moves the parts of each tensor, on the device; paces: gain * lr of each."""
        wanted = [reach * pace for reach, pace in zip(self._reaches, paces, strict=True)]
        if self._last[1] is None or self._last[0] != wanted:
            values = torch.tensor(wanted, dtype=torch.float64).view(torch.int64)
            self._last = (wanted, self._plans.send(values, self.device).view(torch.float64))
        assert self._last[1] is not None
        return self._last[1]


class AGDStep:
    """A step of AGD for prepared tensors: `summary` is their part of G; `move`, given eta, moves them.

    weights: what was prepared, or what it is a view of. paces: gain * lr of each tensor, negative to ascend,
    without learning rates that are tensors on the device.
    """

    def __init__(self, prepared: Prepared, weights: list[Tensor], paces: Sequence[float]) -> None:
        made = self._made = prepared
        self._weights, self._paces = weights, paces
        work = made.work
        norms_to = work.slots + work.parts
        sums = torch.empty(norms_to + work.counts[1], dtype=torch.float64, device=made.device)
        slots, self._norms, terms = sums[: work.slots], sums[work.slots : norms_to], sums[norms_to:]
        with gpu.on(made.device):
            made.measure.launch(work.counts[0], made.table, work.units, slots)
            made.finish.launch(work.counts[1], made.table, work.items, slots, self._norms, terms)
        self.summary = terms.sum()

    def move(self, eta: Tensor) -> None:
        """Moves all weights, in place. eta: 0-d."""
        made, work = self._made, self._made.work
        distances = made.distances(self._paces)
        rates = distances  # not read where there are none
        if made.rates:
            rates = torch.stack([lr.to(made.device, torch.float64).reshape(()) for lr in made.rates])
        with gpu.on(made.device):
            eta = eta.to(self.summary)
            made.step.launch(work.counts[0], made.table, work.units, self._norms, distances, rates, eta)
        torch.autograd.graph.increment_version(self._weights)


def reads_rate(lr: Tensor, weight: Tensor) -> bool:
    """Whether the kernel reads a learning rate that is a tensor: there is no need to wait for one on the CPU."""
    return not lr.is_cpu or weight.is_cpu


def pace_of(tensor: AGDTensor) -> float:
    """gain * lr, without a learning rate that the kernel reads."""
    return tensor.pace * (1.0 if tensor.lr is None or _rate(tensor) is not None else float(tensor.lr))


def _rate(tensor: AGDTensor) -> Tensor | None:
    """The learning rate that the kernel reads, if any."""
    return tensor.lr if tensor.lr is not None and reads_rate(tensor.lr, tensor.weight) else None


def _kind(tensor: AGDTensor) -> int:
    """How the kernels work on it."""
    batches, spread, rows, run = tensor.layout
    aligned = gpu.is_aligned(tensor.weight, tensor.grad, run)
    if spread > 1:
        return SIDE_BY_SIDE if run == 1 else ALIGNED_RUNS if aligned else IN_RUNS
    if run <= SHORT_RUN and batches * rows > 1:
        return SHORT_ROWS
    return ALIGNED_FLAT if aligned else FLAT


def _work(kinds: Sequence[tuple[int, Layout]], device: torch.device, plans: gpu.Plans) -> Work:
    found = [_units(kind, layout) for kind, layout in kinds]
    pieces = tuple([count for _, _, count in found])
    parts = [layout.batches * layout.rows for _, layout in kinds]
    first_parts = (0, *itertools.accumulate(parts))
    first_slots = (0, *itertools.accumulate([p * count for p, count in zip(parts, pieces, strict=True)]))
    units = [_numbered(i, own) for i, (own, _, _) in enumerate(found)]
    items = [_numbered(i, own) for i, (_, own, _) in enumerate(found)]
    uploaded, counts = [], []
    for lists in (units, items):
        lines = torch.cat(lists)
        counts.append(lines.size(0))
        uploaded.append(plans.upload_lines(lines, device))
    return Work(
        uploaded[0],
        uploaded[1],
        (counts[0], counts[1]),
        pieces,
        first_parts[:-1],
        first_slots[:-1],
        gpu.padded(first_parts[-1], torch.float64),
        gpu.padded(first_slots[-1], torch.float64),
    )


def _numbered(number: int, lines: Tensor) -> Tensor:
    return torch.cat([torch.full_like(lines[:, :1], number), lines], dim=1)


@functools.lru_cache(maxsize=256)
def _units(kind: int, layout: Layout) -> tuple[Tensor, Tensor, int]:
    """The units of one tensor (part, first entry, piece), its items (first part), and the pieces of a part."""
    batches, spread, rows, run = layout
    parts, length = batches * rows, spread * run
    if kind == SIDE_BY_SIDE:
        firsts = (torch.arange(0, rows, WIDE) + rows * torch.arange(batches).unsqueeze(1)).reshape(-1)
        span = DEEP_SPAN
    else:
        firsts = torch.arange(0, parts, MANY if kind == SHORT_ROWS else 1)
        span = SHORT_RUN if kind == SHORT_ROWS else SPAN
    starts = torch.arange(0, length, span)
    pieces = starts.numel()
    units = torch.stack(
        [
            firsts.repeat_interleave(pieces),
            starts.repeat(firsts.numel()),
            torch.arange(pieces).repeat(firsts.numel()),
        ],
        dim=1,
    )
    items = torch.arange(0, parts, 1 if pieces > FEW else PARTS_AT_ONCE).unsqueeze(1)
    return units, items, pieces
