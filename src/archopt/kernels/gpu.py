"""The GPU kernels: finding Triton, what they can serve, and the tables that they read.

A kernel finds its tensors by a *table* on the device, one line a tensor, of addresses and shapes; and its part of
the work by a list of units (`triton_nero.py`). Both are made when tensors lie elsewhere than before, and kept: a
step whose gradients came back to memory that they had before uploads nothing, and no step waits for the device.

`import archopt` does not import Triton; the first step that asks for a kernel does.
"""

import functools
import importlib
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from archopt.kernels.cpu import Layout, Memory, Status
from archopt.kernels.launch import Kernel, kernel

DEVICE_TYPES = ("cuda",)  # what torch calls AMD's GPUs too; tests of Triton's interpreter add the CPU
FORMATS = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 2**31 - 2**16  # neurons, and entries of one: the kernels count both in 32 bits
INSTALL = "pip install triton (part of torch's CUDA builds)"

RECENT = 8  # tables that are kept: gradients that alternate between a few places upload nothing
ROOM = 16  # tables that can be captured into CUDA graphs between two steps outside of a capture
NOT_IN_CAPTURE = (
    "a CUDA graph that is being captured cannot prepare its tensors' work: take a step with the same tensors"
)

Kept = TypeVar("Kept")


def status() -> Status:
    """Whether the GPU kernels can be used, with what, or why not."""
    if reason := missing():
        return Status(False, reason)
    version = importlib.import_module("triton").__version__
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "its interpreter on the CPU"
    return Status(True, f"Triton {version}, {where}")


@functools.cache
def missing() -> str:
    """Why the kernels cannot be used at all; an empty string if they can."""
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error}); {INSTALL}"
    if interpreted():
        return ""
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    try:
        triton.runtime.driver.active.get_current_target()
    except (RuntimeError, OSError, ImportError, AttributeError) as error:  # no C compiler, an unknown device
        return f"Triton {triton.__version__} cannot use the GPU ({error})"
    return ""


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python on the CPU (TRITON_INTERPRET=1)."""
    knobs = getattr(importlib.import_module("triton"), "knobs", None)  # from Triton 3.4 on; torch 2.7 has 3.3
    return os.environ.get("TRITON_INTERPRET") == "1" if knobs is None else bool(knobs.runtime.interpret)


def obstacle(weight: Memory) -> str:
    """Why no kernel can serve a weight, whatever its layout; an empty string if one can."""
    if weight.device.type not in DEVICE_TYPES:
        return f"it is on {weight.device}, the kernels are for {' and '.join(DEVICE_TYPES)}"
    if weight.kind is not Tensor and weight.kind is not nn.Parameter:
        return f"it is a {weight.kind.__name__}, whose memory a kernel cannot take for a plain tensor's"
    if weight.dtype not in FORMATS:
        return f"its type is {weight.dtype}; the GPU kernels take {', '.join(map(str, FORMATS))}"
    return ""


def obstacle_of_layout(layout: Layout) -> str:
    """Why the kernels cannot count the neurons of a weight; an empty string if they can."""
    if max(layout.batches * layout.rows, layout.spread * layout.run) > LARGEST:
        return f"it has more than {LARGEST} neurons, or entries of one"
    return ""


def capturing() -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return started and torch.cuda.is_current_stream_capturing()


class Plans:
    """What was prepared for the tensors of an optimizer, to be used again while they lie where they lay.

    What goes into a CUDA graph is never dropped and never used outside of it: the graph itself uploads the table,
    at every replay, from host memory that nobody writes again. That memory is set aside by steps before the
    capture, since pinned memory cannot be allocated in one. Hence: at least one step before a capture, as for
    state, and the optimizer lives as long as the graph.
    """

    def __init__(self) -> None:
        self._recent: OrderedDict[Hashable, Any] = OrderedDict()
        self._last: tuple[Hashable, Any] = (None, None)
        self._captured: list[Any] = []
        self._room = torch.empty(0, dtype=torch.int64)

    def get(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """What was made for `key`, or is made now; the key holds all that the result depends on."""
        if self._last[0] == key:
            return cast(Kept, self._last[1])
        if key in self._recent:
            self._recent.move_to_end(key)
        else:
            self._recent[key] = make()
            if len(self._recent) > RECENT:
                self._recent.popitem(last=False)
        self._last = (key, self._recent[key])
        return cast(Kept, self._last[1])

    def captured(self, make: Callable[[], Kept]) -> Kept:
        """What is made now, for a graph."""
        self._captured.append(kept := make())
        return kept

    def upload(self, values: Tensor, device: torch.device) -> Tensor:
        """A vector of int64 on the device, without waiting for it. A capture takes `upload_in_capture`."""
        if device.type == "cpu":
            return values
        if capturing():
            raise RuntimeError(f"{NOT_IN_CAPTURE} before the capture")
        return values.pin_memory().to(device, non_blocking=True)

    def upload_lines(self, lines: Tensor, device: torch.device) -> Tensor:
        """Lines of an even number of integers, as int32 on the device: two of them travel as one int64."""
        packed = lines.to(torch.int32).contiguous().view(torch.int64).reshape(-1)
        return self.upload(packed, device).view(torch.int32).reshape(lines.shape)

    def send(self, values: Tensor, device: torch.device) -> Tensor:
        """A vector of int64 on the device: for this step, or for every replay of the graph being captured."""
        return (self.upload_in_capture if capturing() else self.upload)(values, device)

    def make_room(self, entries: int) -> None:
        """Sets memory aside for vectors of so many int64 that captures will upload."""
        if self._room.numel() < entries:
            self._room = torch.empty(ROOM * entries, dtype=torch.int64, pin_memory=True)

    def upload_in_capture(self, values: Tensor, device: torch.device) -> Tensor:
        """As `upload`, at every replay of the graph that is being captured."""
        size = values.numel()
        if self._room.numel() < size:
            raise RuntimeError(
                f"{NOT_IN_CAPTURE}, and capturable=True, before the capture (again after {ROOM} of them)"
            )
        staging, self._room = self._room[:size], self._room[size:]
        staging.copy_(values)
        self._captured.append(staging)
        return staging.to(device, non_blocking=True)


VECTOR = 16  # bytes


def padded(count: int, dtype: torch.dtype) -> int:
    """So many entries, and what follows them is still aligned: Triton compiles again for pointers that are not."""
    per = VECTOR // dtype.itemsize
    return -(-count // per) * per


def is_aligned(weight: Tensor, grad: Tensor, run: int) -> bool:
    """Whether all runs of so many entries begin at multiples of VECTOR bytes."""
    return (weight.data_ptr() | grad.data_ptr() | run * weight.element_size()) % VECTOR == 0


# -- Nero --------------------------------------------------------------------------------------------------

ENTRIES, TILES, ALIGNED_TILES, LONG, ALIGNED_LONG, SIDE_BY_SIDE, IN_RUNS = range(7)  # as in triton_nero.py
MANY = (
    2**14
)  # blocks of a launch from which on programs work on several, and spend less on finding out what to do
MOST_BLOCKS = 16
FEW = 2**24  # entries, idle ones too: where the next wider tile would hold fewer, it spares a launch


class Shape(NamedTuple):
    """What a launch does at a time: `rows` neurons, `columns` entries of each, by so many warps."""

    kind: int
    rows: int
    columns: int
    warps: int


# 16 entries a thread: what it holds of weights and gradients stays in registers, and some blocks fit side by side.
ALIGNED = tuple(
    Shape(ALIGNED_TILES, max(1, 2048 // c), c, max(4, c // 512)) for c in (128 << i for i in range(7))
)
UNALIGNED = (Shape(TILES, 32, 32, 4), Shape(TILES, 4, 256, 4), Shape(TILES, 1, 2048, 4))
VECTORS = Shape(ENTRIES, 1024, 1, 4)
LONG_ROWS = (Shape(LONG, 1, 1024, 4), Shape(ALIGNED_LONG, 1, 1024, 4))
COLUMNS = Shape(SIDE_BY_SIDE, 64, 16, 4)
PIECES = Shape(IN_RUNS, 16, 64, 4)


class NeroTensor(NamedTuple):
    """A weight with its gradient and Nero's state, all on one device."""

    weight: Tensor
    grad: Tensor
    exp_avg_sq: Tensor
    scale: Tensor
    step: Tensor
    turn: Tensor
    skipped: Tensor
    layout: Layout
    number: int  # of the weight in its optimizer: with the step count, the key of its random numbers
    options: int  # which of the step's options are its own

    def neurons(self) -> int:
        return self.layout.batches * self.layout.rows

    def shape(self) -> Shape:
        """How a kernel works on it, were it alone."""
        _, spread, _, run = self.layout
        if spread * run == 1:
            return VECTORS
        if spread > 1:
            return COLUMNS if run == 1 else PIECES
        aligned = is_aligned(self.weight, self.grad, run)
        tiles = [tile for tile in (ALIGNED if aligned else UNALIGNED) if tile.columns >= run]
        return tiles[0] if tiles else LONG_ROWS[aligned]


class Options(NamedTuple):
    """What the tensors of a launch share. `lr` is read on the device where it is a tensor there."""

    lr: float | Tensor
    beta: float
    zero_mean: bool
    unit_norm: bool
    maximize: bool
    stochastic_rounding: bool


class Work(NamedTuple):
    """Tensors of one type with the same options that are worked on in the same way: they share a launch."""

    options: int
    dtype: torch.dtype
    shape: Shape


class Call(NamedTuple):
    """A launch, ready but for its options."""

    options: int
    dtype: torch.dtype
    kernels: tuple[Kernel, Kernel]  # rounding to nearest, and at random
    units: int
    arguments: tuple[Any, ...]


class Launches(NamedTuple):
    """All that a step of tensors on one device needs, but for its options."""

    table: Tensor
    turns: Tensor  # a unit's part of its tensor's turn
    skipped: Tensor
    calls: tuple[Call, ...]
    report: Kernel
    tensors: int


def nero_launches(tensors: Sequence[NeroTensor], plans: Plans, *, capturable: bool) -> Launches:
    """Prepares the step of tensors on one device.

    Raises RuntimeError in a CUDA graph's capture where no step before it had tensors of these shapes.
    """
    code = importlib.import_module("archopt.kernels.triton_nero")
    device = tensors[0].weight.device
    geometry = tuple(zip(_work(tensors), [t.layout for t in tensors], strict=True))
    parts, units, firsts, counts = plans.get(
        (device, geometry), lambda: _units(geometry, lambda lines: plans.upload_lines(lines, device))
    )
    lines: list[int] = []
    for t, first, count in zip(tensors, firsts, counts, strict=True):
        _, spread, rows, run = t.layout
        pointers = (t.weight, t.grad, t.exp_avg_sq, t.scale, t.step, t.turn, t.skipped)
        lines.extend([tensor.data_ptr() for tensor in pointers])
        lines.extend([spread * run, rows, run, t.neurons(), first, count, t.number])
    table = plans.send(torch.tensor(lines), device)
    if capturable and device.type == "cuda" and not capturing():
        plans.make_room(len(lines))
    turns = torch.empty(sum(counts), dtype=torch.float32, device=device)
    skipped = torch.empty(sum(counts), dtype=torch.int32, device=device)
    calls = []
    for (options, dtype, shape), begin, count, blocks in parts:
        constants = {"DTYPE": code.TYPES[dtype], "PER": VECTOR // dtype.itemsize}
        constants |= {"KIND": shape.kind, "R": shape.rows, "C": shape.columns}
        nearest, at_random = (
            kernel(code.nero, device, **constants, STOCHASTIC=stochastic, num_warps=shape.warps)
            for stochastic in (False, True)
        )
        arguments = (table, units, turns, skipped, begin, blocks)
        calls.append(Call(options, dtype, (nearest, at_random), count, arguments))
    report = kernel(code.report, device, N=1024, num_warps=4)
    return Launches(table, turns, skipped, tuple(calls), report, len(tensors))


def _work(tensors: Sequence[NeroTensor]) -> list[Work]:
    """Of each tensor, what it is worked on with: launches with little to do are joined where they can be."""
    work = [Work(t.options, t.weight.dtype, t.shape()) for t in tensors]
    for options, dtype in {(w.options, w.dtype) for w in work}:
        alike = [i for i, w in enumerate(work) if (w.options, w.dtype) == (options, dtype)]
        shapes = _joined([work[i].shape for i in alike], [tensors[i].neurons() for i in alike])
        for i, shape in zip(alike, shapes, strict=True):
            work[i] = Work(options, dtype, shape)
    return work


def _joined(shapes: list[Shape], neurons: list[int]) -> list[Shape]:
    """Shapes of tensors, with tiles of which there is little taken into the next wider ones that are needed."""
    for tiles in (UNALIGNED, ALIGNED):
        for i, narrow in enumerate(tiles):
            wider = [tile for tile in tiles[i + 1 :] if tile in shapes]
            rows = sum(n for shape, n in zip(shapes, neurons, strict=True) if shape == narrow)
            if wider and rows * wider[0].columns < FEW:
                shapes = [wider[0] if shape == narrow else shape for shape in shapes]
    return shapes


def _units(
    geometry: Sequence[tuple[Work, Layout]], upload: Callable[[Tensor], Tensor]
) -> tuple[tuple[tuple[Work, int, int, int], ...], Tensor, list[int], list[int]]:
    """The launches, with their first unit, how many, and the blocks of a unit; the units on the device, int32 of
    (units, 2): tensor and first neuron; and for each tensor its first unit and how many."""
    firsts, counts = [0] * len(geometry), [0] * len(geometry)
    calls, parts, total = [], [], 0
    for work in dict.fromkeys(work for work, _ in geometry):
        begin, blocks = total, _blocks(work.shape, [layout for own, layout in geometry if own == work])
        for i, (own, (batches, spread, rows, _)) in enumerate(geometry):
            if own != work:
                continue
            if spread == 1:  # neurons of all batches follow one another
                batches, rows = 1, batches * rows
            starts = torch.arange(0, rows, blocks * work.shape.rows) + rows * torch.arange(batches).unsqueeze(
                1
            )
            parts.append(torch.stack([torch.full_like(starts, i), starts], dim=-1).reshape(-1, 2))
            firsts[i], counts[i] = total, starts.numel()
            total += starts.numel()
        calls.append((work, begin, total - begin, blocks))
    return tuple(calls), upload(torch.cat(parts)), firsts, counts


def _blocks(shape: Shape, layouts: Sequence[Layout]) -> int:
    """How many times `shape.rows` neurons a program works on, one after another."""
    if shape.kind not in (TILES, ALIGNED_TILES):
        return 1
    blocks = sum(-(-batches * rows // shape.rows) for batches, _, rows, _ in layouts)
    return min(MOST_BLOCKS, max(1, blocks // MANY))


def nero(launches: Launches, options: Sequence[Options]) -> None:
    """Nero's step for the prepared tensors, in place; it advances their step counts too.

    Each tensor has those of the `options` that its `NeroTensor.options` says.
    """
    rules = [_rule(own, launches) for own in options]
    with on(launches.table.device):
        for number, dtype, kernels, units, arguments in launches.calls:
            at_random = options[number].stochastic_rounding and dtype == torch.bfloat16
            kernels[at_random].launch(units, *arguments, *rules[number])
        launches.report.launch(launches.tensors, launches.table, launches.turns, launches.skipped)


def _rule(options: Options, launches: Launches) -> tuple[Any, ...]:
    """Options as the kernel takes them."""
    lr, beta = options.lr, options.beta
    flags = options.zero_mean * 1 + options.unit_norm * 2 + options.maximize * 4
    rate = launches.turns  # any float32 tensor, which is not read
    if isinstance(lr, Tensor) and lr.device.type == "cpu" and launches.table.device.type != "cpu":
        lr = float(lr)
    if isinstance(lr, Tensor):
        flags, rate, lr = flags + 8, lr.to(torch.float32), 0.0
    return rate, float(lr), beta, 1 - beta, math.log(beta) if beta > 0 else -math.inf, flags


class _Here:
    """A context that does nothing, and costs nothing."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


_HERE = _Here()


def on(device: torch.device) -> Any:
    """The context in which launches go to a device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)
