"""What the tests of AGD share."""

import pickle

import pytest
import torch
from torch import Tensor, nn

from archopt import kernels
from archopt.optim.agd import AGD

forms = {"plain": {"foreach": False}, "foreach": {"foreach": True}}
if kernels.status()["cpu"].available:  # tests/kernels says so where it is not
    forms["fused"] = {"fused": True}
FORMS = pytest.mark.parametrize("form", forms.values(), ids=forms)


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
