"""What tests of Nero's GPU kernel share: tensors of all sizes that step together, comparisons, watched launches."""

import pytest
import torch
from torch import Tensor, nn

from archopt import Nero
from archopt.kernels import gpu
from kernels.test_cpu import random


def gap(actual: Tensor, expected: Tensor) -> float:
    """Largest distance between rows, relative to the expected row's norm."""
    difference = (actual.detach().cpu().double() - expected.double()).reshape(expected.shape[0], -1)
    return float(
        (difference.norm(dim=1) / expected.double().reshape(expected.shape[0], -1).norm(dim=1)).max()
    )


def placed(tensor: Tensor, device: str) -> Tensor:
    """The tensor on the device, in the memory layout that it has."""
    return tensor.to(device, copy=True, memory_format=torch.preserve_format)


def calls(monkeypatch: pytest.MonkeyPatch) -> list[gpu.Launches]:
    """What is launched from now on."""
    launched: list[gpu.Launches] = []
    call = gpu.nero
    monkeypatch.setattr(gpu, "nero", lambda found, o: (launched.append(found), call(found, o)))
    return launched


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def many(device: str, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Tensors for each way that the kernel works."""
    # The interpreter takes a while for long rows: one whose memory is aligned, one whose is not.
    shapes: list[tuple[int, ...]] = [(20, 100), (1, 2053), (1, 8196), (9, 7), (1500,), (), (4, 3, 3, 3)]
    return [nn.Parameter(placed(random(*s, seed=i, dtype=dtype), device)) for i, s in enumerate(shapes)]


def give_gradients(params: list[nn.Parameter], t: int) -> None:
    for i, param in enumerate(params):
        param.grad = placed(random(*param.shape, seed=100 * t + i, dtype=param.dtype), str(param.device))


def step_by(optimizer: Nero, params: list[nn.Parameter], grads: list[Tensor | None]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()
