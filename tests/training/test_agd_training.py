"""AGD trains networks with nothing set: published form at several depths, and the module form with everything.

The data are made here: 8 x 8 pictures of ten random smooth patterns, shifted, scaled and noisy, so that classes
overlap and a linear model does not suffice. test_agd_digits.py trains on real digits.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from archopt import init
from archopt.optim.agd import AGD

Data = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def pictures() -> Data:
    """1,400 pictures to train on and 400 to test on, (n, 64) of mean 0 and deviation 1, with labels 0 to 9."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(10, 2, 4, 4, generator=generator)  # two shapes of each class
    patterns = nn.functional.interpolate(coarse, size=(8, 8), mode="bicubic")
    labels = torch.randint(0, 10, (1800,), generator=generator)
    variants = torch.randint(0, 2, (1800,), generator=generator)
    x = patterns[labels, variants]
    shifts = torch.randint(-1, 2, (1800, 2), generator=generator).tolist()
    x = torch.stack(
        [picture.roll(shift, (0, 1)) for picture, shift in zip(x, map(tuple, shifts), strict=True)]
    )
    x *= 0.7 + 0.6 * torch.rand(1800, 1, 1, generator=generator)
    x += 0.3 * torch.randn(x.shape, generator=generator)
    x = ((x - x.mean()) / x.std()).flatten(1)
    return x[:1400], labels[:1400], x[1400:], labels[1400:]


class Net(nn.Module):
    """sqrt(2) relu(norm(W x + b)) in each layer but the last."""

    def __init__(self, depth: int, width: int, *, bias: bool, norm: bool) -> None:
        super().__init__()
        pairs = list(pairwise([64] + [width] * (depth - 1)))
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in pairs)
        self.norms = nn.ModuleList(nn.LayerNorm(b) if norm else nn.Identity() for _, b in pairs)
        self.out = nn.Linear(width, 10, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = math.sqrt(2) * torch.relu(norm(layer(x)))
        return self.out(x)


def square(outputs: Tensor, labels: Tensor) -> Tensor:
    """The authors' program's loss: mean square over batch and classes, targets of RMS 1, without the half."""
    return (outputs - nn.functional.one_hot(labels, 10) * math.sqrt(10)).square().mean()


def train(
    model: nn.Module, optimizer: AGD, loss: Callable[[Tensor, Tensor], Tensor], data: Data, epochs: int
) -> tuple[list[float], list[float], float]:
    """Mean loss and mean eta of each epoch of batches of 128, and the test accuracy at the end."""
    x, y, x_test, y_test = data
    losses, etas = [], []
    for _ in range(epochs):
        values = []
        for batch in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            value = loss(model(x[batch]), y[batch])
            value.backward()
            optimizer.step()
            values.append(torch.stack((value.detach().double(), optimizer.eta)))
        mean = torch.stack(values).mean(dim=0)
        losses.append(float(mean[0]))
        etas.append(float(mean[1]))
    with torch.no_grad():
        accuracy = (model(x_test).argmax(dim=1) == y_test).double().mean()
    return losses, etas, float(accuracy)


@pytest.mark.parametrize("depth", [2, 6, 16])
def test_the_published_rule_trains_every_depth_with_nothing_set(depth: int, pictures: Data) -> None:
    model = init.orthogonal_(Net(depth, 64, bias=False, norm=False))
    losses, etas, accuracy = train(model, AGD(model.parameters()), square, pictures, 30)
    assert losses[0] > 0.5
    assert losses[-1] < 0.2
    assert accuracy > 0.9
    assert all(0 < eta < 1 for eta in etas)


@pytest.mark.parametrize("loss", [square, nn.functional.cross_entropy], ids=["square", "cross-entropy"])
def test_a_module_with_biases_and_norms_trains_from_its_own_weights(
    loss: Callable[[Tensor, Tensor], Tensor], pictures: Data
) -> None:
    model = Net(6, 64, bias=True, norm=True)
    losses, etas, accuracy = train(model, AGD(model), loss, pictures, 20)
    assert losses[-1] < 0.05
    assert accuracy > 0.9
    assert etas[-1] < etas[0] / 2  # the step size falls by itself


def test_a_small_convolutional_network_trains(pictures: Data) -> None:
    x, y, x_test, y_test = pictures
    images = (x.view(-1, 1, 8, 8), y, x_test.view(-1, 1, 8, 8), y_test)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=4),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    losses, _, accuracy = train(model, AGD(model), nn.functional.cross_entropy, images, 12)
    assert losses[-1] < 0.3
    assert accuracy > 0.9


class Characters(nn.Module):
    """A one-block causal transformer: embeddings, positions, packed attention, norms, biases, tied head."""

    def __init__(self, vocabulary: int, width: int, context: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        self.block = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=width**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(
            self.norm(self.block(self.tokens(ids) + self.position, src_mask=mask, is_causal=True))
        )


def test_a_transformer_with_tied_embeddings_learns_to_continue_a_text() -> None:
    text = (
        "the quick brown fox jumps over the lazy dog while five dozen liquor jugs are packed in my box. " * 20
    )
    ids = torch.tensor([ord(character) % 32 for character in text])
    model = Characters(32, 32, 24)
    optimizer = AGD(model)
    losses = []
    for _ in range(120):
        starts = torch.randint(0, len(ids) - 25, (16,))
        batch = torch.stack([ids[start : start + 25] for start in starts.tolist()])
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    assert losses[0] > 3.0
    assert sum(losses[-10:]) / 10 < 0.5
    assert int(optimizer.skipped_steps) == 0
