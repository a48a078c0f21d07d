"""AutoNero's guards: a bound on what steps promise, theta e sqrt(t), and a beginning that suits any first angle."""

import math

import pytest
import torch

from archopt import AutoNero
from archopt.optim.autonero_rule import Feedback, feedback_update

OPTIONS = {
    "feedback_decay": 0.95,
    "feedback_gain": 0.05,
    "target": 0.15,
    "target_steps": 100.0,
    "bound": 1.0,
    "bound_errors": 2.0,
    "limit": 2.0,
}


def promises(bound, steps=300, errors=2.0, mean=-0.03, growth=1.01):
    """Each step's feedback, and theta e sqrt(t); gradients grow, slopes are noisy around `mean`, first above 0."""
    generator = torch.Generator().manual_seed(0)
    zero = torch.zeros((), dtype=torch.float64)
    state = Feedback(*[zero] * len(Feedback._fields))._replace(theta=zero + 0.05)
    options = OPTIONS | {"bound": bound, "bound_errors": errors}
    for t in range(1, steps + 1):
        size = growth**t
        noise = torch.randn((), generator=generator, dtype=torch.float64)
        slope = size * (mean + 0.1 * noise + (0.5 if t < 30 else 0.0))
        state, _ = feedback_update(
            state, zero + size, slope, torch.tensor(True), beta2=0.99, begins=(0.05, 0.1), options=options
        )
        state = state._replace(G=zero + size)
        if t > 1:
            promised = state.theta * state.expected / (1 - 0.95 ** (t - 1)) * math.sqrt(t)
            yield state, promised.item()


@pytest.mark.parametrize("errors", [0.0, 2.0])
def test_what_a_step_promises_grows_only_while_slopes_ask_for_it(errors):
    record, asked, refused = 0.0, 0, 0
    slopes, before = [], 0.0
    for t, (state, promised) in enumerate(promises(bound=1.0, errors=errors), start=2):
        slopes.append(abs(state.C.item() - before))
        before = state.slope.item()
        weights = [0.95 ** (len(slopes) - 1 - i) for i in range(len(slopes))]
        distance = sum(w * x for w, x in zip(weights, slopes, strict=True)) / sum(weights)
        error = 1.2533141373155 * distance * math.sqrt(0.05 / 1.95)
        assert t < 3 or math.isclose(state.spread.item() / (1 - 0.95 ** (t - 1)), distance, rel_tol=1e-9)
        if before > errors * error:
            record = max(record, promised)
            asked += 1
        elif record:
            refused += promised > 0.999 * record
        record = record or promised  # the first step that there is anything to compare with
        assert promised <= record * (1 + 1e-12)
        assert math.isclose(state.bound.item(), record, rel_tol=1e-12)
    assert asked > 20
    assert refused > 20  # the bound was needed


def test_slopes_that_are_all_noise_ask_for_nothing():
    """c is above 0 half of the time: taken at its word, promises grow; with its error in mind they do not."""
    found = {}
    for errors in (0.0, 2.0):
        bounds = [
            state.bound.item()
            for state, _ in promises(bound=1.0, steps=3000, errors=errors, mean=0.0, growth=1.0)
        ]
        found[errors] = bounds[-1] / bounds[100]
    assert found[2.0] < 2
    assert found[0.0] > 4


def test_without_a_bound_growing_gradients_raise_what_is_promised():
    (*_, (_, bounded)), (*_, (_, free)) = promises(bound=1.0), promises(bound=1e9)
    assert free > 5 * bounded


def first_angles(depth, theta=None, steps=12):
    """The angles of the first steps of a plain network with random gradients."""
    layers = [torch.nn.Linear(8, 8) for _ in range(depth)]
    model = torch.nn.Sequential(*layers)
    optimizer = AutoNero(model, initial_theta=theta)
    angles = []
    for t in range(steps):
        generator = torch.Generator().manual_seed(t)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
        angles.append(optimizer.theta.item())
    return angles


def test_a_small_first_angle_doubles_until_it_is_one_whatever_the_slopes_say():
    angles = first_angles(4, 1e-5)
    assert angles[:11] == torch.tensor([*[1e-5 * 2**t for t in range(10)], 0.01]).tolist()
    assert 0.8 < angles[11] / angles[10] < 1.2  # the feedback from here on
    assert 0.8 < first_angles(4, 0.01)[1] / 0.01 < 1.2


def test_the_first_angle_is_small_enough_for_the_number_of_matrices():
    assert math.isclose(first_angles(4, 0.3)[0], 1 / 32, rel_tol=1e-6)
    assert math.isclose(first_angles(20, 0.3)[0], 1 / 160, rel_tol=1e-6)
    assert math.isclose(first_angles(1, 0.1)[0], 0.1, rel_tol=1e-6)


def test_a_small_first_angle_does_not_double_beyond_what_the_matrices_bear():
    angles = first_angles(20, 1e-3)
    assert angles[:4] == pytest.approx([0.001, 0.002, 0.004, 1 / 160], rel=1e-6)


@pytest.mark.parametrize("depth", [1, 4, 20])
def test_the_first_angle_is_a_hundredth_shared_by_the_matrices(depth):
    """0.01/(8L), doubled until it is 0.01 or 1/(8L)."""
    most = 1 / (8 * depth)
    doublings = {1: 3, 4: 5, 20: 8}[depth]
    expected = [min(0.01 * most * 2**t, 0.01, most) for t in range(doublings + 1)]
    assert expected[-1] == min(0.01, most)
    angles = first_angles(depth)
    assert angles[: len(expected)] == pytest.approx(expected, rel=1e-6)
    assert 0.8 < angles[len(expected)] / expected[-1] < 1.2  # the feedback from here on
    assert angles[len(expected)] != angles[len(expected) - 1]
