"""What must not change AutoNero's trajectory: units of the loss, order of units, scales that nothing depends on."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from archopt import AutoNero

STEPS = 12


class Net(nn.Module):
    """Tokens through two hidden layers to classes, with all four families of tensors."""

    def __init__(self, width: int = 7, normed: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 5)
        self.first = nn.Linear(5, width, bias=not normed)
        self.norm = nn.LayerNorm(width, eps=1e-30) if normed else nn.Identity()
        self.second = nn.Linear(width, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(self.tokens(x))).tanh()
        return self.head(self.second(hidden).tanh())


def loss_of(model: nn.Module, t: int) -> Tensor:
    generator = torch.Generator().manual_seed(t)
    tokens = torch.randint(9, (12,), generator=generator)
    return nn.functional.cross_entropy(model(tokens), tokens % 4)


def train(
    model: nn.Module, optimizer: AutoNero, scale: Callable[[int], float] = lambda t: 1.0
) -> list[float]:
    angles = []
    for t in range(STEPS):
        optimizer.zero_grad()
        (scale(t) * loss_of(model, t)).backward()
        optimizer.step()
        angles.append(float(optimizer.theta))
    return angles


def assert_models_close(actual: nn.Module, expected: nn.Module, tolerance: float) -> None:
    for (name, a), e in zip(actual.named_parameters(), expected.parameters(), strict=True):
        assert (a - e).norm() <= tolerance * e.norm(), f"{name} differs by {(a - e).norm() / e.norm():.2g}"


@pytest.mark.parametrize("exponent", [-20, 20])
def test_a_loss_in_other_units_keeps_every_bit(exponent: int) -> None:
    """Powers of two multiply without rounding, so all of the trajectory must be the same, not nearly the same."""
    model = Net()
    twin = copy.deepcopy(model)
    angles = train(model, AutoNero(model))
    others = train(twin, AutoNero(twin), lambda t: 2.0**exponent)
    assert others == angles
    assert len(set(angles)) > STEPS / 2, "the angle did not move"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_a_loss_scaled_by_a_million_follows_the_same_trajectory(scale: float) -> None:
    model = Net().double()
    twin = copy.deepcopy(model)
    angles = train(model, AutoNero(model))
    others = train(twin, AutoNero(twin), lambda t: scale)
    assert others == pytest.approx(angles, rel=1e-9)
    assert_models_close(twin, model, 1e-9)


@pytest.mark.parametrize("name", ["tokens.weight", "first.weight", "second.bias", "head.weight"])
def test_the_scale_of_one_gradient_changes_no_direction(name: str) -> None:
    """One tensor's gradient times 1000 leaves the first step of every tensor as it was: theta alone reads sizes.

    But for a head's and its bias's, whose ratio tells how long the features are: there the step's length follows
    and its direction does not.
    """
    model = Net().double()
    before, twin = copy.deepcopy(model), copy.deepcopy(model)
    # An angle that 1e-12 resolves.
    optimizer, other = AutoNero(model, initial_theta=0.01), AutoNero(twin, initial_theta=0.01)
    for net, opt in ((model, optimizer), (twin, other)):
        loss_of(net, 0).backward()
        if net is twin:
            net.get_parameter(name).grad.mul_(1000)  # type: ignore[union-attr]
        opt.step()
    if name == "head.weight":
        moved, others = (net.head.weight - before.head.weight for net in (model, twin))
        assert torch.allclose(others / others.norm(), moved / moved.norm(), rtol=0, atol=1e-12)
        twin.head.weight.data.copy_(model.head.weight)
    assert_models_close(twin, model, 1e-12)
    assert float(other.G) > float(optimizer.G)


def test_hidden_units_may_be_renamed() -> None:
    """A permutation of the hidden units permutes the trajectory."""
    model = Net().double()
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])

    def permute(net: Net) -> None:
        with torch.no_grad():
            net.first.weight.copy_(net.first.weight[order])
            net.first.bias.copy_(net.first.bias[order])
            net.second.weight.copy_(net.second.weight[:, order])

    twin = copy.deepcopy(model)
    permute(twin)
    train(model, AutoNero(model))
    train(twin, AutoNero(twin))
    permute(model)
    assert_models_close(twin, model, 1e-9)


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_scale_before_a_norm_layer_does_not_matter(scale: float) -> None:
    """Weights times c under a LayerNorm go the same way. (The limit is off: it reads absolute norms.)"""
    model = Net(normed=True).double()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.first.weight.mul_(scale)
    angles = train(model, AutoNero(model, limit=1e9))
    assert train(twin, AutoNero(twin, limit=1e9)) == pytest.approx(angles, rel=1e-9)
    with torch.no_grad():
        twin.first.weight.div_(scale)
    assert_models_close(twin, model, 1e-9)


@pytest.mark.parametrize("method", ["newton-schulz", "svd"])
def test_foreach_equals_plain(method: str) -> None:
    """1e-5 of each norm after 12 steps: sums over joined tensors round otherwise, and theta carries it on."""
    model = Net()
    twin = copy.deepcopy(model)
    angles = train(model, AutoNero(model, foreach=False, orthogonalise=method))
    others = train(twin, AutoNero(twin, foreach=True, orthogonalise=method))
    assert others == pytest.approx(angles, rel=1e-5)
    assert_models_close(twin, model, 1e-5)


def test_maximize_ascends_the_negative_loss() -> None:
    model = Net().double()
    twin = copy.deepcopy(model)
    train(model, AutoNero(model))
    train(twin, AutoNero(twin, maximize=True), lambda t: -1.0)
    assert_models_close(twin, model, 1e-12)


def test_packed_projections_equal_separate_ones() -> None:
    """Slices of a packed weight move as weights of their own would. (The default first angle counts tensors.)"""
    packed = nn.Sequential(nn.Linear(6, 12, bias=False), nn.Linear(12, 3)).double()
    split = nn.ModuleList([nn.Linear(6, 4, bias=False) for _ in range(3)] + [nn.Linear(12, 3)]).double()
    with torch.no_grad():
        for part, rows in zip(split, packed[0].weight.chunk(3), strict=False):
            part.weight.copy_(rows)  # type: ignore[operator]
        split[3].load_state_dict(packed[1].state_dict())
    roles = {r"0\.weight": {"kind": "matrix", "slices": 3}}
    optimizer = AutoNero(packed, roles=roles, initial_theta=0.01)
    other = AutoNero(split, initial_theta=0.01)
    for t in range(10):
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        optimizer.zero_grad()
        other.zero_grad()
        packed(inputs).square().mean().backward()
        split[3](torch.cat([part(inputs) for part in list(split)[:3]], 1)).square().mean().backward()
        optimizer.step()
        other.step()
    joined = torch.cat([part.weight for part in list(split)[:3]])  # type: ignore[misc]
    assert torch.allclose(packed[0].weight, joined, rtol=0, atol=1e-12)
