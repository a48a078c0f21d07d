"""The published rule on the digits that ship with the laboratory: no settings, at three depths.

1,400 digits to train on, batches of 128, 30 epochs, square loss, no biases. The bounds are those of our own
specification, whose throw-away runs ended at losses of .117, .040 and .059 for 2, 8 and 32 layers of 128, and at
.045 and 99.5 % of the training digits for 6.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("numpy", reason="the digits come with the laboratory")

from archopt import init
from archopt.lab.data import DataFolder
from archopt.lab.data.digits import load_digits
from archopt.optim.agd import AGD

WIDTH = 128


class Plain(nn.Module):
    """sqrt(2) relu(W x) in each layer but the last."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        dims = [64, *[WIDTH] * (depth - 1), 10]
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = math.sqrt(2) * torch.relu(layer(x))
        return self.layers[-1](x)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training pictures (1400, 64), mean 0 and deviation 1, their labels, and the same to test on."""
    held = load_digits(DataFolder(None))
    x, x_test = (torch.tensor(part).flatten(1).float() for part in (held.train_images, held.test_images))
    mean, std = x.mean(), x.std()
    y, y_test = (torch.tensor(part).long() for part in (held.train_labels, held.test_labels))
    return (x - mean) / std, y, (x_test - mean) / std, y_test


def trained(depth: int, digits: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[float, float, float]:
    """Mean loss of the last epoch, and the accuracies on training and test digits after it."""
    torch.manual_seed(0)
    x, y, x_test, y_test = digits
    model = init.orthogonal_(Plain(depth))
    optimizer = AGD(model.parameters())
    wanted = nn.functional.one_hot(y, 10) * math.sqrt(10)
    losses: list[float] = []
    for _ in range(30):
        losses = []
        for batch in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            loss = (model(x[batch]) - wanted[batch]).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    with torch.no_grad():
        train, test = (
            float((model(inputs).argmax(1) == labels).double().mean())
            for inputs, labels in ((x, y), (x_test, y_test))
        )
    return sum(losses) / len(losses), train, test


def test_the_published_preset_learns_the_digits(digits) -> None:
    loss, train, test = trained(6, digits)
    assert train >= 0.98
    assert loss < 0.08
    assert test > 0.95


@pytest.mark.parametrize("depth", [2, 8, 32])
def test_every_depth_trains_with_no_settings(depth: int, digits) -> None:
    loss, _, test = trained(depth, digits)
    assert loss < 0.2
    assert test > 0.93
