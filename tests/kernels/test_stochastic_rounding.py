"""Stochastic rounding of bfloat16 weights by Nero's CPU kernel: right on average, repeatable, refused elsewhere."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import archopt
from archopt import Nero
from archopt.kernels import cpu
from kernels.test_cpu import bits, channels_last, random, refusal, with_kernel

FREE = {"zero_mean": False, "unit_norm": False, "beta": 0.0}
LAYOUTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "rows": (lambda: torch.ones(64, 4096), {}),
    "many steps": (lambda: torch.ones(2, 131_072), {}),
    "columns": (lambda: torch.ones(512, 512), {"neuron_dim": 1}),
    "short runs": (lambda: torch.ones(256, 128, 3, 3), {"neuron_dim": 1}),
    "entries": (lambda: torch.ones(262_144), {}),
}


def one_step(make: Any, options: dict[str, Any], part: float, sign: float = 1.0) -> Tensor:
    """Weights of 1 after a step to 1 + part * 2^-7, the fraction `part` of the way to the next bfloat16."""
    param = nn.Parameter((make() * sign).bfloat16())
    param.grad = torch.full_like(param, -sign)
    optimizer = Nero([param], fused=True, stochastic_rounding=True, **FREE, **options)
    with torch.no_grad():
        optimizer._create_state()
        fan_in = param.numel() / optimizer.state[param]["exp_avg_sq"].numel()
        optimizer.state[param]["scale"].fill_(math.sqrt(fan_in))
    optimizer.param_groups[0]["lr"] = part * 2.0**-7
    optimizer.step()
    return param.detach()


@with_kernel
@pytest.mark.parametrize("part", [1 / 16, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", LAYOUTS)
def test_rounding_is_right_on_average(name: str, sign: float, part: float) -> None:
    """Either neighbour and nothing else, the upper one as often as it should be within five standard errors."""
    make, options = LAYOUTS[name]
    moved = one_step(make, options, part, sign).double() * sign
    up = moved > 1
    assert bool((up | (moved == 1)).all())
    assert bool((moved[up] == 1 + 2.0**-7).all())
    error = math.sqrt(part * (1 - part) / moved.numel())
    assert abs(float(up.double().mean()) - part) <= 5 * error
    # Neighbours, and rows, are rounded independently.
    flat = up.double().reshape(-1) - part
    for lag in (1, 2, 3, 9, 512, 4096):
        together = float((flat[lag:] * flat[:-lag]).mean())
        assert abs(together) <= 5 * part * (1 - part) / math.sqrt(moved.numel() - lag)


@with_kernel
def test_small_steps_add_up_where_rounding_to_nearest_loses_them() -> None:
    for rounding, expected in ((False, 1.0), (True, 1.25)):
        param = nn.Parameter(torch.ones(32, 256).bfloat16())
        optimizer = Nero([param], lr=2.0**-11, fused=True, stochastic_rounding=rounding, **FREE)
        optimizer.step()  # no gradient, but state
        optimizer.state[param]["scale"].fill_(16.0)
        param.grad = torch.full_like(param, -1.0)
        for _ in range(512):
            optimizer.step()
        # A walk of 512 steps, each of variance p (1 - p) ulp^2 with p = 1/16.
        error = 2.0**-7 * math.sqrt(512 / 16 / param.numel())
        assert abs(float(param.detach().double().mean()) - expected) <= 5 * error


def trained(steps: range, start: tuple[list[Tensor], dict[str, Any]] | None = None) -> Any:
    shapes: list[Tensor] = [
        random(70, 1000),
        random(300, 90).t(),
        channels_last(random(20, 16, 3, 3)),
        random(4000),
        random(6, 40, 5),
    ]
    params = [nn.Parameter(w.bfloat16()) for w in shapes]
    groups = [{"params": params[:3]}, {"params": params[3:], "neuron_dim": -1}]
    optimizer = Nero(groups, fused=True, stochastic_rounding=True)
    if start:
        with torch.no_grad():
            for param, value in zip(params, start[0], strict=True):
                param.copy_(value)
        optimizer.load_state_dict(start[1])
    for t in steps:
        for i, param in enumerate(params):
            param.grad = torch.empty_like(param).copy_(random(*param.shape, seed=100 * t + i))
        optimizer.step()
    return [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())


@with_kernel
def test_bits_depend_on_neither_threads_nor_instructions_and_runs_resume(monkeypatch) -> None:
    expected, _ = trained(range(4))
    resumed, _ = trained(range(2, 4), trained(range(2)))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(expected, resumed, strict=True))
    library = cpu._library()
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for count in range(1, len(library.instructions) + 1):
            other = library._replace(instructions=library.instructions[:count])
            monkeypatch.setattr(cpu, "_library", lambda other=other: other)
            actual, _ = trained(range(4))
            assert all(torch.equal(bits(a), bits(b)) for a, b in zip(expected, actual, strict=True))


@with_kernel
def test_steps_tensors_and_groups_are_rounded_differently() -> None:
    params = [nn.Parameter(torch.ones(8, 512).bfloat16()) for _ in range(3)]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = Nero(groups, lr=2.0**-8, fused=True, stochastic_rounding=True, **FREE)
    optimizer.step()
    seen = []
    for _ in range(2):
        for param in params:
            with torch.no_grad():
                param.fill_(1.0)
            optimizer.state[param]["scale"].fill_(math.sqrt(512))
            param.grad = torch.full_like(param, -1.0)
        optimizer.step()
        seen += [param.detach().clone() for param in params]
    for i, a in enumerate(seen):
        for b in seen[:i]:
            assert 0.4 < float((a == b).double().mean()) < 0.6


@with_kernel
def test_rows_at_rest_and_wider_weights_are_as_without_it() -> None:
    twins = []
    for rounding in (False, True):
        wide, half = nn.Parameter(random(9, 40)), nn.Parameter(random(9, 40, seed=1).bfloat16())
        optimizer = Nero([wide, half], fused=True, stochastic_rounding=rounding)
        still = half.detach()[3].clone()
        wide.grad, half.grad = random(9, 40, seed=2), random(9, 40, seed=3).bfloat16()
        half.grad[3] = 0
        half.grad[4, 7] = math.nan
        other = half.detach()[4].clone()
        optimizer.step()
        assert torch.equal(bits(half.detach()[3]), bits(still))
        assert torch.equal(bits(half.detach()[4]), bits(other))
        twins.append((bits(wide), bits(half)))
    assert torch.equal(twins[0][0], twins[1][0])
    assert not torch.equal(twins[0][1], twins[1][1])


@pytest.mark.parametrize(
    ("dtype", "options", "words"),
    [
        (torch.bfloat16, {"foreach": True}, "no kernel serves it"),
        (torch.bfloat16, {"fused": False}, "no kernel serves it"),
        (torch.float16, {}, "it is float16"),
    ],
    ids=["foreach", "no kernel", "float16"],
)
def test_it_is_refused_where_it_cannot_be_had_before_anything_moves(dtype, options, words) -> None:
    first, second = nn.Parameter(random(4, 3)), nn.Parameter(random(4, 3).to(dtype))
    optimizer = Nero([{"params": [first]}, {"params": [second], "stochastic_rounding": True, **options}])
    first.grad, second.grad = random(4, 3, seed=1), random(4, 3, seed=2).to(dtype)
    before = first.detach().clone()
    refused = refusal(optimizer.step)
    assert words in refused
    assert "stochastic_rounding=True cannot be honoured for a weight of shape (4, 3)" in refused
    assert "stochastic_rounding=False" in refused
    assert torch.equal(first, before)


def test_it_is_true_or_false() -> None:
    with pytest.raises(TypeError, match="stochastic_rounding='yes'"):
        Nero([nn.Parameter(random(4, 3))], stochastic_rounding="yes")  # type: ignore[arg-type]


@with_kernel
def test_a_step_in_backward_draws_the_numbers_of_the_ordinary_step() -> None:
    torch.manual_seed(0)
    ordinary = nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)]).bfloat16()
    stepping = copy.deepcopy(ordinary)
    optimizers = [Nero(net.parameters(), stochastic_rounding=True) for net in (ordinary, stepping)]
    archopt.step_in_backward(optimizers[1])
    inputs = torch.randn(8, 64).bfloat16()
    for _ in range(3):
        for net, optimizer in zip((ordinary, stepping), optimizers, strict=True):
            net(inputs).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(ordinary.parameters(), stepping.parameters(), strict=True):
        assert torch.equal(a, b)
