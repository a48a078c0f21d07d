"""Launching Triton's kernels again with little of Python's work.

At each launch Triton finds out which compiled kernel serves such arguments, and compares every global constant that
the kernel reads with what it was: some 40 us, where the launch itself takes 5. Many small tensors make a step cost
what its launches cost. So the compiled kernel is kept, by all of the arguments that Triton compiles for.
"""

import functools
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor


class Kernel:
    """One of Triton's kernels with its compile-time constants, on one device; `kernel` gives it.

    constants: the kernel's last parameters, in their order, and then Triton's own options, such as num_warps.
    """

    def __init__(self, function: Any, constants: dict[str, Any]) -> None:
        self._function = function
        self._constants = constants
        # What Triton's own launch hands on: the arguments of the function, compile-time constants too.
        names = getattr(function, "arg_names", ())
        self._values = tuple([value for name, value in constants.items() if name in names])
        self._compiled: dict[Hashable, Any] = {}

    def launch(self, grid: int, *arguments: Any) -> None:
        """Starts so many programs. The device has to be the current one. arguments: tensors, ints and floats."""
        key = tuple(map(_decides, arguments))
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid, 1, 1](*arguments, *self._values)
            return
        compiled = self._function[(grid,)](*arguments, **self._constants)
        # Nothing in the interpreter. On AMD's GPUs it also matters how large tensors are.
        if compiled is not None and torch.version.hip is None:
            self._compiled[key] = compiled


def _decides(argument: Any) -> Any:
    """What Triton compiles for: types, whether pointers and integers are multiples of 16, and the integer 1."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    if type(argument) is int:
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    return type(argument)


def kernel(function: Any, device: torch.device, **constants: Any) -> Kernel:
    """The kernel with these constants on a device (see `Kernel`); the same one each time."""
    return _kept(function, device, tuple(constants.items()))


@functools.cache
def _kept(function: Any, device: torch.device, constants: tuple[tuple[str, Any], ...]) -> Kernel:
    return Kernel(function, dict(constants))
