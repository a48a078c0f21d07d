"""AutoNero's bound: what a step promises, theta e sqrt(t), grows only while slopes ask for longer steps."""

import math

import torch

from archopt.optim.autonero_rule import Feedback, feedback_update

OPTIONS = {
    "feedback_decay": 0.95,
    "feedback_gain": 0.05,
    "target": 0.15,
    "target_steps": 100.0,
    "bound": 1.0,
    "limit": 2.0,
}


def promises(bound, steps=300):
    """rho, theta e sqrt(t) and B after each step; gradients grow, slopes are noisy around a little below 0."""
    generator = torch.Generator().manual_seed(0)
    zero = torch.zeros((), dtype=torch.float64)
    state = Feedback(*[zero] * len(Feedback._fields))._replace(theta=zero + 0.05)
    for t in range(1, steps + 1):
        size = 1.01**t
        noise = torch.randn((), generator=generator, dtype=torch.float64)
        slope = size * (-0.03 + 0.1 * noise + (0.5 if t < 30 else 0.0))
        norm = zero + size
        state, _ = feedback_update(
            state, norm, slope, torch.tensor(True), beta2=0.99, options=OPTIONS | {"bound": bound}
        )
        state = state._replace(G=zero + size)
        if t > 1:
            promised = state.theta * state.expected / (1 - 0.95 ** (t - 1)) * math.sqrt(t)
            yield state.rho.item(), promised.item(), state.bound.item()


def test_what_a_step_promises_grows_only_while_slopes_ask_for_it():
    record, asked, refused = 0.0, 0, 0
    for rho, promised, bound in promises(bound=1.0):
        if rho > 0:
            record = max(record, promised)
            asked += 1
        elif record:
            refused += promised > 0.999 * record
        record = record or promised  # the first step that there is anything to compare with
        assert promised <= record * (1 + 1e-12)
        assert math.isclose(bound, record, rel_tol=1e-12)
    assert asked > 20
    assert refused > 20  # the bound was needed


def test_without_a_bound_growing_gradients_raise_what_is_promised():
    (*_, (_, bounded, _)), (*_, (_, free, _)) = promises(bound=1.0), promises(bound=1e9)
    assert free > 5 * bounded
