"""Fused kernels: one call for all tensors of a group, at about the cost of the memory that a step must move.

`status()` says which kernels can be used here, and why the others cannot. An optimiser's `fused` option chooses:
None takes a kernel for every tensor that one can serve and another form for the rest; True refuses what cannot be
served, with the reason; False takes none.

    cpu     Nero, AGD, AutoNero on the CPU: a library of C, built with the package, given a C compiler
    gpu     Nero, AGD, AutoNero on the GPU: Triton, part of torch's CUDA builds; compiled at the first step
"""

from archopt.kernels.cpu import Status
from archopt.kernels.cpu import status as _cpu_status
from archopt.kernels.gpu import status as _gpu_status

__all__ = ["Status", "status"]


def status() -> dict[str, Status]:
    """Which kernels can be used here, by name: whether, and with what or why not.

    Example:
        >>> from archopt import kernels
        >>> sorted(kernels.status())
        ['cpu', 'gpu']
        >>> bool(kernels.status()["cpu"].detail)
        True
    """
    return {"cpu": _cpu_status(), "gpu": _gpu_status()}
