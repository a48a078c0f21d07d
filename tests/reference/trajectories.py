"""Random trajectories on which an optimiser is held against its float64 reference, and the published example.

Sixty steps over tensors of zero to five dimensions, a vector that starts at zero among them: the learning rate
varies and is zero once, tensors go without gradient, rows have none, and one row of each tensor wakes late.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

STEPS = 60
SHAPES = ((), (5,), (4,), (4, 6), (3, 4, 5), (3, 2, 3, 2), (2, 3, 2, 2, 2))
ZERO = 2  # which of them starts at zero
PLAIN_AND_FOREACH = {"plain": {"foreach": False}, "foreach": {"foreach": True}}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

# The example of the worked numbers: W0, b0 and three gradients of each.
W0 = ((1.0, 2.0, -4.0), (0.5, -1.0, 3.0))
B0 = (0.3, -0.2, 0.0)
W_GRADIENTS = (
    ((0.1, -0.2, 0.3), (0.4, 0.5, -0.6)),
    ((-0.3, 0.1, 0.2), (0.0, 0.0, 0.0)),
    ((0.5, 0.5, -0.1), (-0.2, 0.3, 0.1)),
)
B_GRADIENTS = ((0.1, -0.3, 0.0), (0.2, 0.1, 0.05), (-0.4, 0.2, -0.1))


def parameter(values: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    """A leaf that an optimiser may train."""
    return torch.as_tensor(values, dtype=dtype).clone().requires_grad_()


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


def assert_close(tensor: Tensor, text: str, tolerance: float = 1e-11) -> None:
    """Equal to the numbers in `text`, which are given to 12 significant digits."""
    actual, expected = tensor.detach().reshape(-1).tolist(), numbers(text)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert abs(a - b) <= tolerance, f"{a!r} is not {b!r}"


def worked_example(make: Callable[[list[Tensor]], torch.optim.Optimizer], steps: int = 3) -> Any:
    """Runs the example; returns the optimiser, W, b, and their values from the start to the last step."""
    weight, bias = parameter(W0), parameter(B0)
    optimizer = make([weight, bias])
    ws, bs = [weight.detach().clone()], [bias.detach().clone()]
    for w_gradient, b_gradient in zip(W_GRADIENTS[:steps], B_GRADIENTS[:steps], strict=True):
        weight.grad = torch.tensor(w_gradient, dtype=torch.float64)
        bias.grad = torch.tensor(b_gradient, dtype=torch.float64)
        optimizer.step()
        ws.append(weight.detach().clone())
        bs.append(bias.detach().clone())
    return optimizer, weight, bias, ws, bs


def initial_weights(seed: int, scale: float = 1.0) -> list[Tensor]:
    """Uniform in (-scale, scale), so that no entry exceeds 1.74 times the tensor's root mean square by much."""
    generator = torch.Generator().manual_seed(seed)
    weights = [scale * (2 * torch.rand(s, generator=generator).double() - 1) for s in SHAPES]
    weights[ZERO].zero_()
    return [w.float().double() for w in weights]


def gradients_of(seed: int, *, dense: bool = False) -> list[list[Tensor | None]]:
    """Gradients of all steps, representable in float32. With `dense`, every entry has one at every step."""
    generator = torch.Generator().manual_seed(1000 + seed)
    size = [10 ** float(4 * torch.rand((), generator=generator) - 3) for _ in SHAPES]
    steps: list[list[Tensor | None]] = []
    for t in range(STEPS):
        step: list[Tensor | None] = []
        for k, shape in enumerate(SHAPES):
            drawn = torch.randn(shape, generator=generator) * size[k] * (1 + 0.5 * math.sin(t + k))
            chances = torch.rand(2, generator=generator).tolist()
            if dense or not shape:
                step.append(drawn)
                continue
            if t < STEPS // 2:
                drawn[0] = 0
            if chances[0] < 0.3 and t > 0:
                drawn[int(chances[0] / 0.3 * shape[0])] = 0
            step.append(None if chances[1] < 0.1 and t > 0 else drawn)
        steps.append(step)
    return steps


def rates(pause: bool) -> list[float]:
    """A warm-up and a cosine, with one step at zero if `pause`."""
    lrs = [0.03 * min(t + 1, 5) / 5 * (1.1 + math.cos(math.pi * t / STEPS)) / 2 for t in range(STEPS)]
    if pause:
        lrs[20] = 0.0
    return lrs


def follow(
    make: Callable[..., torch.optim.Optimizer],
    reference: Any,
    weights: list[Tensor],
    gradients: list[list[Tensor | None]],
    *,
    by_row: bool = True,
    pause: bool = True,
    forms: Mapping[str, Mapping[str, bool]] = PLAIN_AND_FOREACH,
) -> None:
    """Steps `make(params, **form)`, all forms in float64 and float32, beside a reference.

    After each step the weights are compared, to a fraction of each row's norm, or of the tensor's.
    """
    runs = []
    for dtype in TOLERANCE:
        for name, form in forms.items():
            params = [parameter(w, dtype) for w in weights]
            runs.append((dtype, name, params, make(params, **form)))
    for t, (lr, step) in enumerate(zip(rates(pause), gradients, strict=True)):
        reference.step(step, lr)
        expected = reference.weights
        for dtype, name, params, optimizer in runs:
            for param, gradient in zip(params, step, strict=True):
                param.grad = None if gradient is None else gradient.to(dtype)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            label = f"step {t + 1}, {dtype}, {name}"
            for param, weight in zip(params, expected, strict=True):
                assert_near(param.detach().double(), weight, TOLERANCE[dtype], by_row, label)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, by_row: bool, label: str) -> None:
    """||actual - expected|| <= tolerance ||expected||, for each row (for the tensor, where it has no rows)."""
    rows = expected.shape[0] if by_row and expected.dim() > 1 else 1
    error = (actual - expected).reshape(rows, -1).norm(dim=1)
    size = expected.reshape(rows, -1).norm(dim=1)
    assert bool((error <= tolerance * size).all()), (
        f"{label}, shape {tuple(expected.shape)}: off by {float((error / size).max()):.2g} of the row's norm"
    )
