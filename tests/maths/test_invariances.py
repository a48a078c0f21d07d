"""What holds for every weight and gradient, searched by hypothesis: Nero (2102.07227) and AGD (2304.05187)."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from archopt import AGD, Nero
from archopt.optim.nero import nero_update

seeds = st.integers(0, 2**31 - 1)
rates = st.floats(1e-6, 1.0)
betas = st.floats(0.0, 0.9999)
matrices = st.tuples(st.integers(1, 6), st.integers(3, 9))
filters = st.one_of(
    matrices, st.tuples(st.integers(1, 4), st.integers(2, 3), st.integers(1, 3), st.integers(2, 3))
)
magnitudes = st.floats(-8, 8).map(lambda exponent: 10.0**exponent)


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(shape: tuple[int, ...], seed: int, steps: int) -> list[Tensor]:
    """Gradients whose rows are of very different sizes, some of them zero."""
    found = []
    for t in range(steps):
        sizes = 10.0 ** normal((shape[0],) + (1,) * (len(shape) - 1), seed + 100 + t)
        sizes[(seed + t) % shape[0]] *= t % 2
        found.append(sizes * normal(shape, seed + 1 + t))
    return found


def trained(weight: Tensor, grads: list[Tensor], **options: object) -> Tensor:
    """The weight after Nero's steps with these gradients."""
    param = nn.Parameter(weight.clone())
    optimizer = Nero([param], **options)  # type: ignore[arg-type]
    for grad in grads:
        param.grad = grad
        optimizer.step()
    return param.detach()


def row_norms(weight: Tensor) -> Tensor:
    return weight.flatten(1).norm(dim=1)


# -- Nero --------------------------------------------------------------------------------------------------


@given(shape=filters, seed=seeds, lr=rates, beta=betas, foreach=st.sampled_from([None, False, True]))
def test_rows_are_balanced_after_every_step(shape, seed, lr, beta, foreach):
    grads = gradients(shape, seed, 4)
    for steps in range(5):
        weight = trained(normal(shape, seed), grads[:steps], lr=lr, beta=beta, foreach=foreach)
        assert (row_norms(weight) - 1).abs().max() <= 1e-14 * math.sqrt(weight[0].numel())
        assert weight.flatten(1).mean(dim=1).abs().max() <= 1e-15


@given(shape=matrices, seed=seeds, lr=rates, size=magnitudes)
def test_first_step_turns_by_arctan_of_the_rate(shape, seed, lr, size):
    """A gradient that is tangent, balanced and of any size turns the row by arctan(lr) at its first step."""
    before = trained(normal(shape, seed), [])
    grad = normal(shape, seed + 1)
    grad = grad - grad.mean(dim=1, keepdim=True)
    grad = grad - (grad * before).sum(dim=1, keepdim=True) * before
    after = trained(before, [size * grad], lr=lr)
    # The angle from its tangent: sine from what is perpendicular to the old row, cosine along it.
    cosine = (after * before).sum(dim=1)
    sine = (after - cosine[:, None] * before).norm(dim=1)
    torch.testing.assert_close(
        torch.atan2(sine, cosine), torch.full_like(sine, math.atan(lr)), rtol=1e-8, atol=0.0
    )


def test_first_step_turns_by_the_worked_angle():
    assert math.atan(0.01) == pytest.approx(0.009999666686665, abs=1e-15)
    before = torch.tensor([[1.0, -1.0, 0.0, 0.0]], dtype=torch.float64) / math.sqrt(2)
    after = trained(before, [torch.tensor([[0.0, 0.0, 1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)])
    assert math.acos((after * before).sum().item()) == pytest.approx(0.009999666686665, abs=1e-12)


@given(seed=seeds, beta=betas, lr=rates, sizes=st.lists(st.floats(0.0, 1e6), min_size=1, max_size=30))
def test_no_row_moves_further_than_the_bound(seed, beta, lr, sizes):
    """||g|| / sqrt(v / (1 - beta^t)) <= sqrt((1 - beta^t) / (1 - beta)), whatever the gradients were."""
    direction = normal((3, 5), seed)
    direction /= direction.norm(dim=1, keepdim=True)
    weight, v = torch.zeros(3, 5, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    for t, size in enumerate(sizes, start=1):
        step = torch.tensor(float(t))
        one = torch.ones((), dtype=torch.float64)
        moved, v, turn, finite = nero_update(
            weight,
            size * direction,
            v,
            one,
            step,
            lr=lr,
            beta=beta,
            dims=(1,),
            zero_mean=False,
            unit_norm=False,
        )
        bound = lr * math.sqrt((1 - beta**t) / (1 - beta))
        assert finite.all()
        assert (moved - weight).norm(dim=1).max() <= bound * (1 + 1e-6)
        torch.testing.assert_close(
            turn, (moved - weight).norm(dim=1, keepdim=True), rtol=1e-9, atol=1e-12 * bound
        )
        weight = moved


def test_row_that_wakes_at_step_5000_leaps_by_31_5163_rates():
    """The largest leap: 4,999 zero gradients, then one of any size (worked number)."""
    param = nn.Parameter(torch.tensor([0.5, -0.25], dtype=torch.float64))  # entries are neurons of their own
    optimizer = Nero([param], lr=0.01)
    param.grad = torch.zeros_like(param)
    for _ in range(4999):
        optimizer.step()
    before = param.detach().clone()
    param.grad = torch.tensor([1e-3, -7.0], dtype=torch.float64)
    optimizer.step()
    leap = (before - param.detach()) / (0.01 * 0.375)  # the scale is the mean |b|
    torch.testing.assert_close(
        leap, torch.tensor([31.5163, -31.5163], dtype=torch.float64), rtol=2e-6, atol=0.0
    )


@given(
    shape=filters,
    seed=seeds,
    lr=rates,
    beta=betas,
    size=magnitudes,
    zero_mean=st.booleans(),
    unit_norm=st.booleans(),
)
def test_scale_of_the_gradients_does_not_matter(shape, seed, lr, beta, size, zero_mean, unit_norm):
    options = {"lr": lr, "beta": beta, "zero_mean": zero_mean, "unit_norm": unit_norm}
    start, grads = normal(shape, seed), gradients(shape, seed, 4)
    scaled = trained(start, [size * grad for grad in grads], **options)
    torch.testing.assert_close(scaled, trained(start, grads, **options), rtol=1e-9, atol=1e-9)
    doubled = trained(start, [2.0**20 * grad for grad in grads], **options)
    assert torch.equal(doubled, trained(start, grads, **options)), "a power of two changes no bit"


@given(shape=filters, seed=seeds, lr=rates, unit_norm=st.booleans(), foreach=st.booleans())
def test_permuting_rows_permutes_the_result(shape, seed, lr, unit_norm, foreach):
    options = {"lr": lr, "unit_norm": unit_norm, "foreach": foreach}
    start, grads = normal(shape, seed), gradients(shape, seed, 4)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
    permuted = trained(start[order], [grad[order] for grad in grads], **options)
    expected = trained(start, grads, **options)[order]
    # Off the sphere the scale is a mean over rows, whose rounding depends on their order.
    torch.testing.assert_close(permuted, expected, rtol=1e-13, atol=1e-13)


@given(shape=matrices, seed=seeds, lr=rates, beta=betas, foreach=st.booleans())
def test_rows_do_not_see_each_other(shape, seed, lr, beta, foreach):
    """Other gradients for the last row change no bit of the others; on the sphere a row alone goes the same way."""
    options = {"lr": lr, "beta": beta, "foreach": foreach}
    start, grads = normal(shape, seed), gradients(shape, seed, 4)
    other = [grad.clone() for grad in grads]
    for t, grad in enumerate(other):
        grad[-1] = 1e3 * normal(shape[1:], seed + 100 + t)
    together = trained(start, grads, **options)
    assert torch.equal(trained(start, other, **options)[:-1], together[:-1])
    alone = trained(start[:1], [grad[:1] for grad in grads], **options)
    torch.testing.assert_close(alone, together[:1], rtol=1e-13, atol=1e-13)


@given(shape=matrices, seed=seeds, lr=rates, unit_norm=st.booleans(), foreach=st.booleans())
def test_neuron_dim_transposes(shape, seed, lr, unit_norm, foreach):
    """Columns as neurons: the transposed trajectory."""
    options = {"lr": lr, "unit_norm": unit_norm, "foreach": foreach}
    start, grads = normal(shape, seed), gradients(shape, seed, 4)
    columns = trained(start.t(), [grad.t() for grad in grads], neuron_dim=1, **options)
    torch.testing.assert_close(columns.t(), trained(start, grads, **options), rtol=1e-12, atol=1e-12)


# -- AGD ---------------------------------------------------------------------------------------------------

shapes = st.lists(filters, min_size=1, max_size=4)


def agd_step(
    weights: list[Tensor], grads: list[Tensor], **options: object
) -> tuple[list[Tensor], float, float]:
    """The moves of one step of published AGD, with its eta and G."""
    params = [nn.Parameter(weight.clone()) for weight in weights]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    optimizer = AGD(params, **options)  # type: ignore[arg-type]
    optimizer.step()
    moves = [param.detach() - weight for param, weight in zip(params, weights, strict=True)]
    return moves, optimizer.eta.item(), optimizer.gradient_summary.item()


def step_size(summary: float) -> float:
    return math.log1p(2 * summary / (1 + math.sqrt(1 + 4 * summary)))


def scale_of(shape: tuple[int, ...]) -> float:
    taps = math.prod(shape[2:])
    return math.sqrt(shape[0] / shape[1] / taps)


def tap_norms(tensor: Tensor) -> Tensor:
    """The Frobenius norm of each tap of a filter, of the whole matrix where there are none."""
    return tensor.flatten(2).norm(dim=(0, 1)) if tensor.dim() > 2 else tensor.norm()


@given(shapes=shapes, seed=seeds, gain=st.sampled_from([1.0, 0.5, 10.0]), foreach=st.booleans())
def test_step_has_the_size_that_eta_says(shapes, seed, gain, foreach):
    """The norm of every move is gain * eta / L * s for each tap of each tensor (agd.md 11.4)."""
    weights = [normal(shape, seed + i) for i, shape in enumerate(shapes)]
    grads = [normal(shape, seed + 50 + i) for i, shape in enumerate(shapes)]
    moves, eta, summary = agd_step(weights, grads, gain=gain, foreach=foreach)
    expected = sum(scale_of(grad.shape) * tap_norms(grad).sum().item() for grad in grads) / len(grads)
    assert summary == pytest.approx(expected, rel=1e-12)
    assert eta == pytest.approx(step_size(summary), rel=1e-12)
    for move in moves:
        norms = tap_norms(move)
        size = gain * eta / len(moves) * scale_of(move.shape)
        torch.testing.assert_close(norms, torch.full_like(norms, size), rtol=1e-9, atol=1e-15)


@given(shapes=shapes, seed=seeds, size=magnitudes, foreach=st.booleans())
def test_scale_of_all_gradients_changes_eta_alone(shapes, seed, size, foreach):
    """g -> c g leaves every direction and turns eta(G) into eta(c G) (agd.md 11.3)."""
    weights = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    grads = [normal(shape, seed + i) for i, shape in enumerate(shapes)]
    moves, eta, summary = agd_step(weights, grads, foreach=foreach)
    scaled, scaled_eta, scaled_summary = agd_step(weights, [size * grad for grad in grads], foreach=foreach)
    assert scaled_summary == pytest.approx(size * summary, rel=1e-12)
    assert scaled_eta == pytest.approx(step_size(size * summary), rel=1e-12)
    for move, other in zip(moves, scaled, strict=True):
        torch.testing.assert_close(other / scaled_eta, move / eta, rtol=1e-11, atol=1e-14)


@given(shapes=shapes, seed=seeds, size=magnitudes, foreach=st.booleans())
def test_scale_of_one_gradient_keeps_all_directions(shapes, seed, size, foreach):
    weights = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    grads = [normal(shape, seed + i) for i, shape in enumerate(shapes)]
    moves, eta, _ = agd_step(weights, grads, foreach=foreach)
    scaled, scaled_eta, _ = agd_step(weights, [size * grads[0], *grads[1:]], foreach=foreach)
    for move, other in zip(moves, scaled, strict=True):
        torch.testing.assert_close(other / scaled_eta, move / eta, rtol=1e-11, atol=1e-14)


@given(shape=matrices, seed=seeds, foreach=st.booleans())
def test_rotating_weights_and_gradients_rotates_the_move(shape, seed, foreach):
    """W -> P W Q and g -> P g Q turn the move into P move Q (agd.md 11.6)."""
    left = torch.linalg.qr(normal((shape[0], shape[0]), seed + 1)).Q
    right = torch.linalg.qr(normal((shape[1], shape[1]), seed + 2)).Q
    weight, grad = normal(shape, seed), normal(shape, seed + 3)
    (move,), eta, _ = agd_step([weight], [grad], foreach=foreach)
    (turned,), turned_eta, _ = agd_step([left @ weight @ right], [left @ grad @ right], foreach=foreach)
    assert turned_eta == pytest.approx(eta, rel=1e-12)
    torch.testing.assert_close(turned, left @ move @ right, rtol=1e-9, atol=1e-12)


@given(exponents=st.lists(st.floats(-30, 30), min_size=2, max_size=8, unique=True))
def test_eta_grows_with_the_summary_and_never_exceeds_it(exponents):
    """eta(G) is increasing, below G, near G where G is small and near half its logarithm where it is large."""
    etas = []
    for exponent in sorted(exponents):
        grad = torch.full((1, 1), 10.0**exponent, dtype=torch.float64)
        _, eta, summary = agd_step([torch.zeros_like(grad)], [grad])
        assert summary == pytest.approx(10.0**exponent, rel=1e-15)
        assert 0 < eta <= summary
        assert summary > 0.1 or eta == pytest.approx(summary, rel=2 * summary)
        assert summary < 1e4 or abs(eta - math.log(summary) / 2) < 1e-2
        etas.append(eta)
    assert all(low <= high for low, high in pairwise(etas))
