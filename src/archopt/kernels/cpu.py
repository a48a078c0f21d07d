"""The CPU kernels: finding the compiled library, calling it, and what it can serve.

The library (native/) takes raw pointers and knows neither Python nor torch, so one build serves every version of
both. It is loaded at the first step that asks for it. `import archopt` neither needs nor touches it. Each kernel
has its own module beside this one: `cpu_nero`, `cpu_agd`, `cpu_autonero`.
"""

import ctypes
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

INTERFACE = 3  # of the library; native/shared.h has the same number
BUILD = (
    "install archopt again with gcc or clang at hand (pip's --force-reinstall --no-cache-dir --no-deps), or run "
    "python setup.py build_ext --inplace in a clone"
)

FORMATS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class Status(NamedTuple):
    """Whether a kernel can be used here, and with what (instruction set, threads) or why not."""

    available: bool
    detail: str


class _Library(NamedTuple):
    functions: ctypes.CDLL
    instructions: tuple[str, ...]  # that the processor has, the best one last; positions are their numbers
    parallel: int  # address of the entry of torch's OpenMP runtime, or 0


def status() -> Status:
    """Whether the CPU kernels can be used, with which instruction set and threads, or why not."""
    found = _library()
    if isinstance(found, str):
        return Status(False, found)
    threads = "torch's OpenMP threads" if found.parallel else "threads of its own"
    return Status(True, f"{found.instructions[-1]} instructions, {threads}")


@functools.cache
def _library() -> _Library | str:
    """The library, or why there is none."""
    files = sorted(Path(__file__).parent.glob("_native*"))
    if not files:
        return f"not built: no C compiler was found when archopt was installed, or it failed; {BUILD}"
    try:
        library = ctypes.CDLL(str(files[0]))
        interface = library.archopt_interface()
    except (OSError, AttributeError) as error:
        return f"{files[0].name} cannot be loaded ({error}); {BUILD}"
    if interface != INTERFACE:
        return f"{files[0].name} was built from another version of archopt (its interface is {interface}); {BUILD}"
    library.archopt_instructions.restype = ctypes.c_char_p
    names: list[str] = []
    while (name := library.archopt_instructions(len(names))) is not None:
        names.append(name.decode())
    return _Library(library, tuple(names), _openmp_of_torch())


def _openmp_of_torch() -> int:
    """Where the OpenMP runtime that torch has loaded starts threads; 0 if it is none that speaks GNU's interface.

    torch loads its runtime for all to see. Its threads are there already, as many as `torch.set_num_threads` says:
    a pool of our own would compete with them for the same cores.
    """
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except (
        AttributeError,
        OSError,
        TypeError,
    ):  # another runtime (macOS), or a platform without such a look-up
        return 0


def call(name: str, types: Sequence[type], table: int, count: int, *arguments: object) -> None:
    """Calls a kernel: the address of a table of `count` tensors and `arguments`, all of ctypes' `types`, then
    instruction set, threads and torch's OpenMP runtime.

    It takes the best instruction set of the processor and torch's number of threads; neither changes a bit.
    Raises RuntimeError where the library is not there (see `status`), and MemoryError before anything moves.
    """
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(f"the CPU kernel cannot be used: {library}")
    function = getattr(library.functions, name)
    if function.argtypes is None:
        function.argtypes = [*types, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p]
    best = len(library.instructions) - 1
    if function(table, count, *arguments, best, torch.get_num_threads(), library.parallel):
        raise MemoryError(f"no memory for the table of {count} tensors; nothing moved")


# -- what a kernel can serve -------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Neurons in memory, nested as [batches][spread][rows][run]: each owns `spread` runs of `run` entries."""

    batches: int
    spread: int
    rows: int
    run: int


def layout_of(shape: Sequence[int], strides: Sequence[int], summed: Iterable[int]) -> Layout | str:
    """How neurons that sum over the dimensions `summed` lie in memory, or why the kernel cannot follow them.

    Neurons are numbered along the other dimensions, as their statistics are. No `summed`: every entry is a neuron.
    """
    summed = set(summed)
    dims = sorted((d for d in range(len(shape)) if shape[d] != 1), key=lambda d: -strides[d])
    expected = 1
    for dim in reversed(dims):
        if strides[dim] != expected:
            return "its entries do not fill one piece of memory"
        expected *= shape[dim]
    if not summed:  # statistics have the strides of the weight
        return Layout(1, 1, expected, 1)
    kept = [d for d in dims if d not in summed]
    if kept != sorted(kept):
        return "its neurons lie in another order than their statistics"
    # Innermost first: run, rows, spread, batches; a level that the tensor lacks is 1.
    levels = [1, 1, 1, 1]
    level = 0
    for dim in reversed(dims):
        while (dim in summed) != (level % 2 == 0):
            level += 1
            if level == len(levels):
                return "its neurons alternate with what they sum over more often than the kernel can follow"
        levels[level] *= shape[dim]
    run, rows, spread, batches = levels
    return Layout(batches, spread, rows, run)


def missing() -> str:
    """Why the kernel cannot be used at all; an empty string if it can."""
    found = _library()
    return found if isinstance(found, str) else ""


class Memory(NamedTuple):
    """What a tensor is made of, for the kernel: hashable, so that what is decided from it is decided once."""

    kind: type
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    strides: tuple[int, ...]


def obstacle(weight: Memory) -> str:
    """Why the kernel cannot serve a weight, whatever its layout; an empty string if it can."""
    if weight.device.type != "cpu":
        return f"it is on {weight.device}, the kernel is for the CPU"
    if weight.kind is not Tensor and weight.kind is not nn.Parameter:
        return f"it is a {weight.kind.__name__}, whose memory the kernel cannot take for a plain tensor's"
    if weight.dtype not in FORMATS:
        return f"its type is {weight.dtype}; the kernel takes {', '.join(map(str, FORMATS))}"
    return ""


def obstacle_of_gradient(weight: Memory, grad: Memory) -> str:
    """Why the kernel cannot serve this gradient of a weight that it can serve; an empty string if it can."""
    if grad.dtype != weight.dtype or grad.device != weight.device:
        return f"its gradient is {grad.dtype} on {grad.device}, the weight {weight.dtype} on {weight.device}"
    if grad.kind is not Tensor:
        return f"its gradient is a {grad.kind.__name__}"
    if _strides(grad) != _strides(weight):
        return f"its gradient has strides {grad.strides}, the weight {weight.strides}"
    return ""


def obstacle_of_view(weight: Tensor, grad: Tensor) -> str:
    """Why two tensors cannot be served for what they are views of; an empty string if they can."""
    if grad.is_neg() or weight.is_neg():
        return "it or its gradient is a view that negates"
    if weight.data_ptr() == 0 or grad.data_ptr() == 0:
        return "it or its gradient has no memory of its own"
    return ""


def is_contiguous(memory: Memory) -> bool:
    """Whether entries lie in memory in their logical order, without gaps."""
    expected = 1
    for size, stride in zip(reversed(memory.shape), reversed(memory.strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _strides(memory: Memory) -> list[int]:
    """Strides that matter: of dimensions with more than one entry."""
    return [stride for size, stride in zip(memory.shape, memory.strides) if size != 1]
