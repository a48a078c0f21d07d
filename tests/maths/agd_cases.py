"""What the tests of AGD share."""

import pickle

import pytest
import torch
from torch import Tensor, nn

from archopt.optim.agd import AGD

FORMS = pytest.mark.parametrize("foreach", [False, True], ids=["plain", "foreach"])


def step(weights: list[Tensor], grads: list[Tensor | None], optimizer: AGD | None = None) -> AGD:
    """One step of AGD(weights) with the given gradients, in place."""
    optimizer = optimizer or AGD(weights)
    for weight, grad in zip(weights, grads, strict=True):
        weight.grad = None if grad is None else grad.clone()
    optimizer.step()
    return optimizer


def params(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def bits(tensor: Tensor) -> bytes:
    return pickle.dumps(tensor.detach().contiguous().view(torch.uint8).tolist())
