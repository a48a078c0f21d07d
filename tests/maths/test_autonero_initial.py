"""Initial states and problems that AutoNero must survive with its constants as they are."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from archopt import AutoNero

CLASSES = 5


def batch(t: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """Points of the plane-like data x in R^6, with classes that a fixed small network gives."""
    generator = torch.Generator().manual_seed(t)
    x = torch.randn(size, 6, generator=generator)
    generator.manual_seed(12345)
    first, second = torch.randn(6, 12, generator=generator), torch.randn(12, CLASSES, generator=generator)
    return x, ((x @ first).tanh() @ second).argmax(1)


def mlp(width: int = 16, depth: int = 1) -> nn.Sequential:
    hidden = [module for _ in range(depth) for module in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), *hidden, nn.Linear(width, CLASSES))


def evaluate(model: nn.Module) -> float:
    with torch.no_grad():
        x, y = batch(10_000, 512)
        return cross_entropy(model(x), y).item()


def train(
    model: nn.Module,
    optimizer: AutoNero,
    steps: int = 60,
    size: int = 16,
    labels: Callable[[int, Tensor], Tensor] = lambda t, y: y,
) -> list[float]:
    """Trains and returns theta at every step; all that is finite at the start must stay so."""
    angles = []
    for t in range(steps):
        x, y = batch(t, size)
        optimizer.zero_grad()
        cross_entropy(model(x), labels(t, y)).backward()
        optimizer.step()
        angles.append(float(optimizer.theta))
    assert all(math.isfinite(angle) for angle in angles)
    assert all(torch.isfinite(param).all() for param in model.parameters())
    assert int(optimizer.skipped) == 0
    return angles


def learns(model: nn.Module, steps: int = 60, below: float = 0.75, size: int = 16) -> None:
    """The loss over fresh points falls below a share of what it is for a network that knows nothing."""
    train(model, AutoNero(model), steps, size)
    assert evaluate(model) < below * math.log(CLASSES)


def test_zero_initialised_head_grows_up() -> None:
    model = mlp()
    nn.init.zeros_(model[-1].weight)
    learns(model)
    norms = model[-1].weight.norm(dim=1)
    assert (norms > 0.1).all()
    assert (norms < 5).all()


class Residual(nn.Module):
    """x + scale * branch(x), the scale or the weights of the branch's output times `silence` at the start."""

    def __init__(self, scale: float, silence: float) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)
        self.layer_scale = nn.Parameter(torch.full((16,), scale))
        self.head = nn.Linear(16, CLASSES)
        with torch.no_grad():
            self.down.weight.mul_(silence)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).tanh()
        return self.head(h + self.layer_scale * self.down(self.up(h).tanh()))


@pytest.mark.parametrize(("scale", "silence"), [(1e-6, 1.0), (1.0, 0.0), (1.0, 1e-9), (1.0, 1e-4)])
def test_branches_that_start_silent_wake(scale: float, silence: float) -> None:
    model = Residual(scale, silence)
    before = copy.deepcopy(model.state_dict())
    learns(model)
    assert (model.layer_scale - before["layer_scale"]).abs().max() > 0.01
    assert (model.down.weight - before["down.weight"]).norm() > 0.1


class Contrast(nn.Module):
    """Cosine similarities to class vectors over a temperature, as contrastive models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16))
        self.classes = nn.Linear(16, CLASSES, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(100.0))

    def forward(self, x: Tensor) -> Tensor:
        normalise = nn.functional.normalize
        return self.logit_scale * normalise(self.body(x)) @ normalise(self.classes.weight).T


def test_temperature_of_a_hundred_survives() -> None:
    """The temperature itself hardly moves (open point 5); the loss, which starts far above chance, falls."""
    model = Contrast()
    start = evaluate(model)
    train(model, AutoNero(model))
    assert start > 10
    assert evaluate(model) < 0.25 * start
    assert 90 < model.logit_scale.item() < 110


class Tied(nn.Module):
    def __init__(self, vocabulary: int = 20, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.hidden = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.hidden(self.embedding(tokens)).tanh()))


def test_tied_embedding_keeps_the_function_at_construction_and_learns() -> None:
    """Rows scaled to RMS 1 would make the first logits sqrt(width) times too large."""
    model = Tied()
    tokens = torch.arange(20)

    def loss() -> Tensor:
        return cross_entropy(model(tokens), (tokens + 1) % 20)

    start = loss().item()
    optimizer = AutoNero(model)
    assert loss().item() == start
    for _ in range(80):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.5 * start


def test_a_tied_table_is_a_head() -> None:
    model = Tied()
    before = model.embedding.weight.detach().clone()
    optimizer = AutoNero(model, embedding_radius="rms")
    assert torch.equal(model.embedding.weight, before)
    groups = [group for group in optimizer.param_groups if model.embedding.weight in set(group["params"])]
    assert [group["family"] for group in groups] == ["head"]


def test_a_rare_token_turns_by_no_more_than_its_steps() -> None:
    """A token that was absent for 200 steps turns by a few theta when it comes back, not by a leap."""
    model = nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 3))
    optimizer = AutoNero(model)
    rare = torch.tensor([5])

    def step(tokens: Tensor) -> Tensor:
        before = model[0].weight[5].detach().clone()
        optimizer.zero_grad()
        cross_entropy(model(tokens), tokens % 3).backward()
        optimizer.step()
        cosine = nn.functional.cosine_similarity(model[0].weight[5], before, dim=0)
        return cosine.clamp(max=1).acos() / optimizer.theta

    step(rare)
    for _ in range(200):
        step(torch.arange(5))
    assert step(torch.cat([torch.arange(5), rare])) <= 1.5


class Adapted(nn.Module):
    """A frozen layer with a low-rank pair beside it: A random, B zero."""

    def __init__(self) -> None:
        super().__init__()
        self.base = mlp().requires_grad_(False)
        self.A, self.B = nn.Linear(6, 4, bias=False), nn.Linear(4, CLASSES, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.B(self.A(x))


@pytest.mark.parametrize("roles", [None, {r"[AB]\.weight": "matrix"}])
def test_low_rank_pairs_train(roles: dict[str, str] | None) -> None:
    model = Adapted()
    base = copy.deepcopy(model.base.state_dict())
    start = evaluate(model)
    optimizer = AutoNero(model, roles=roles)
    assert evaluate(model) == start
    train(model, optimizer, 100)
    assert evaluate(model) < 0.9 * start
    assert all(torch.equal(value, base[name]) for name, value in model.base.state_dict().items())


class Language(nn.Module):
    """A token's class by way of an embedding that is far from RMS 1, with norm layers."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(30, 16)
        nn.init.normal_(self.tokens.weight, std=0.05)
        block = [nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.LayerNorm(16)]
        self.body = nn.Sequential(*[copy.deepcopy(layer) for _ in range(blocks) for layer in block])
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.tokens(x)))


@pytest.mark.parametrize("embedding_radius", ["grow", "own"])
@pytest.mark.parametrize("blocks", [1, 8])
def test_the_first_step_changes_a_trained_network_by_theta_at_most(
    blocks: int, embedding_radius: str
) -> None:
    """By theta_0 = 0.01, however many layers there are; construction changes nothing."""
    model = Language(blocks)
    tokens = torch.arange(30)
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(100):
        adam.zero_grad()
        cross_entropy(model(tokens), tokens % CLASSES).backward()
        adam.step()
    before = model(tokens).detach()
    optimizer = AutoNero(model, embedding_radius=embedding_radius)
    assert torch.equal(model(tokens), before)
    optimizer.zero_grad()
    loss = cross_entropy(model(tokens), (tokens + 1) % CLASSES)
    loss.backward()
    optimizer.step()
    change = (model(tokens) - before).norm() / before.norm()
    assert 0.0005 < change < 0.01
    assert cross_entropy(model(tokens), (tokens + 1) % CLASSES) < loss


def test_batches_of_the_whole_set() -> None:
    """The same points at every step: no noise, and C is what the last batch would say itself."""
    model = mlp()
    optimizer = AutoNero(model)
    x, y = batch(0, 256)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert max(losses[100:]) < 0.5 * losses[0]


@pytest.mark.parametrize("size", [1, 4, 64, 512])
def test_batches_of_one_to_many(size: int) -> None:
    model = mlp()
    train(model, AutoNero(model), 100, size)
    assert evaluate(model) < (0.95 if size == 1 else 0.75) * math.log(CLASSES)


def test_accumulated_gradients_equal_the_whole_batch() -> None:
    """Parts that are averaged, in float64: the same trajectory to rounding."""
    model = mlp().double()
    twin = copy.deepcopy(model)
    optimizer, other = AutoNero(model), AutoNero(twin)
    for t in range(10):
        x, y = batch(t)
        x = x.double()
        optimizer.zero_grad()
        other.zero_grad()
        cross_entropy(model(x), y).backward()
        for part, labels in zip(x.chunk(4), y.chunk(4), strict=True):
            (cross_entropy(twin(part), labels) / 4).backward()
        optimizer.step()
        other.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("width", "depth"), [(4, 1), (16, 1), (64, 1), (16, 4)])
def test_width_and_depth_times_four(width: int, depth: int) -> None:
    learns(mlp(width, depth), steps=100, below=0.95 if width == 4 else 0.85)


def test_a_problem_that_changes_half_way_is_learnt_again() -> None:
    """All classes are renamed at step 80: the angle, which had shrunk, grows again."""
    model = mlp()
    angles = train(model, AutoNero(model), 160, 32, lambda t, y: y if t < 80 else (y + 1) % CLASSES)
    with torch.no_grad():
        x, y = batch(10_000, 512)
        assert cross_entropy(model(x), (y + 1) % CLASSES).item() < 0.75 * math.log(CLASSES)
    assert max(angles[80:]) > 1.2 * angles[79]


@pytest.mark.parametrize("theta", [1e-5, 0.3])
def test_any_first_angle_between_1e5th_and_a_third(theta: float) -> None:
    model = mlp()
    optimizer = AutoNero(model, initial_theta=theta)
    train(model, optimizer, 150, 32)
    assert evaluate(model) < 0.95 * math.log(CLASSES)
