"""Nero's GPU kernel: accuracy, layouts, number formats, state, random rounding, refusals.

On a GPU the kernel is compiled; under `make test-triton` the same code runs in Triton's interpreter. What that
cannot show (graphs, waiting, compiled steps) is in test_on_a_gpu.py. Everything is held against Nero's rule in
float64, in the plain form.
"""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from archopt import Nero, kernels
from archopt.kernels import gpu
from archopt.optim.nero import nero_update
from kernels.gpu.nero_cases import bits, calls, gap, give_gradients, many, placed
from kernels.test_cpu import VIEWS as CPU_VIEWS
from kernels.test_cpu import random

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One rounding of the weight's own type, and what sums in float32 lose.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def step_with(weight: Tensor, grad: Tensor, device: str, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The weight and its state after one step; the weight is as it is, not projected at construction."""
    param = nn.Parameter(placed(weight, device))
    param.grad = torch.empty_like(param).copy_(grad)
    optimizer = Nero([param], fused=True, **options)
    with torch.no_grad():
        optimizer._create_state()
        param.copy_(weight)
    optimizer.step()
    return param.detach().cpu(), {name: value.cpu() for name, value in optimizer.state[param].items()}


# -- accuracy ----------------------------------------------------------------------------------------------

# The ends of all size classes, rows whose memory is aligned to 16 bytes and others, and long rows.
FAN_INS = (
    2,
    3,
    31,
    32,
    33,
    128,
    129,
    255,
    256,
    257,
    1000,
    1024,
    2048,
    2049,
    4096,
    4100,
    8192,
    8196,
    8197,
    100_003,
)


@pytest.mark.parametrize("fan_in", FAN_INS)
@pytest.mark.parametrize("kind", ["ordinary", "tiny gradient", "large gradient", "all alike"])
def test_sums_are_those_of_float64(fan_in: int, kind: str, device: str) -> None:
    """Float32 rows of any length: weights, v and turn against the same step in float64."""
    if fan_in > 10_000 and "gradient" in kind and device == "cpu":
        pytest.skip("a long row takes the interpreter a while; shorter ones have this kind of gradient")
    weight, grad = random(2, fan_in), random(2, fan_in, seed=1)
    weight = weight - weight.mean(dim=1, keepdim=True)
    weight = weight / weight.norm(dim=1, keepdim=True)
    if kind == "tiny gradient":
        grad = grad * (1e-17 / math.sqrt(fan_in))
    if kind == "large gradient":
        grad = grad * (1e17 / math.sqrt(fan_in))
    if kind == "all alike":  # every rounding of a sum of squares goes the same way
        grad = torch.full_like(grad, 1 / 3)
        grad[:, ::2] *= -1
    moved, state = step_with(weight, grad, device, lr=0.1)
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    rules = {"lr": 0.1, "beta": 0.999, "dims": (1,), "zero_mean": True, "unit_norm": True}
    expected, v, turn, _ = nero_update(weight.double(), grad.double(), zero, one, one, **rules)
    assert gap(moved, expected) <= 1e-6
    assert float((state["exp_avg_sq"].double() / v - 1).abs().max()) <= 2e-6
    assert float((state["turn"].double() / turn.mean() - 1).abs()) <= 2e-6


@pytest.mark.parametrize("fan_in", [5, 1501, 9001])
@pytest.mark.parametrize("offset", [1.0, 1e3])
@pytest.mark.parametrize("neuron_dim", [0, 1])
def test_rows_far_from_balanced_are_balanced(
    fan_in: int, offset: float, neuron_dim: int, device: str
) -> None:
    """A mean that hides everything else in the five sums: the norm is formed again from the moved row."""
    if neuron_dim:
        fan_in = min(fan_in, 1501)  # columns are read twice, however short they are
    weight, grad = random(3, fan_in) + offset, random(3, fan_in, seed=1)
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    rules = {"lr": 0.01, "beta": 0.999, "dims": (1,), "zero_mean": True, "unit_norm": True}
    expected, *_ = nero_update(weight.double(), grad.double(), zero, one, one, **rules)
    if neuron_dim:
        weight, grad = weight.t().contiguous(), grad.t().contiguous()
    moved, _ = step_with(weight, grad, device, lr=0.01, neuron_dim=neuron_dim)
    rows = moved.double() if neuron_dim == 0 else moved.t().double()
    assert float((rows.norm(dim=1) - 1).abs().max()) <= 1e-6
    assert float(rows.mean(dim=1).abs().max()) <= 1e-7 * offset
    assert gap(rows, expected) <= 1e-6 + 2e-7 * offset


@pytest.mark.parametrize("fan_in", [50, 9000])
def test_a_constant_row_is_not_blown_up(fan_in: int, device: str) -> None:
    """Where centring leaves no more than rounding, the row is not divided by it, as in the plain form."""
    moved, _ = step_with(torch.full((2, fan_in), 0.1), torch.ones(2, fan_in), device, lr=0.01)
    assert float(moved.norm()) <= 1e-5


@pytest.mark.parametrize("t", [1, 2, 10, 300, 600, 5000, 10**6])
def test_bias_correction_keeps_its_digits(t: int, device: str) -> None:
    param = nn.Parameter(torch.tensor([1.0], device=device))
    optimizer = Nero([param], lr=0.5, fused=True)
    param.grad = torch.ones_like(param)
    optimizer._create_state()
    state = optimizer.state[param]
    state["step"].fill_(t - 1)
    state["exp_avg_sq"].fill_(2.0)
    optimizer.step()
    stride = 0.5 / math.sqrt((0.999 * 2.0 + 0.001) / (1 - 0.999**t))
    assert float(state["turn"]) == pytest.approx(stride, rel=3e-7)
    assert float(param.detach()) == pytest.approx(1 - stride, rel=1e-6)
    assert float(state["step"]) == t


# -- layouts and groups ------------------------------------------------------------------------------------


# As for the CPU's kernel, with sizes that the interpreter gets through, and size classes of the GPU's own.
VIEWS = {
    **CPU_VIEWS,
    "many short rows": (lambda: random(150, 7), {}),
    "entries": (lambda: random(2500), {}),
    "scalar": (lambda: random(), {}),
    "one entry a row": (lambda: random(40, 1), {}),
    "columns": (lambda: random(40, 170), {"neuron_dim": 1}),
    "few long columns": (lambda: random(1000, 3), {"neuron_dim": 1}),
    "batches of columns": (lambda: random(3, 40, 70), {"neuron_dim": (0, 2)}),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constraints", [{}, {"unit_norm": False}, {"zero_mean": False, "maximize": True}])
def test_every_layout_follows_the_plain_form(
    name: str, dtype: torch.dtype, constraints: dict[str, bool], device: str
) -> None:
    make, options = VIEWS[name]
    # Float32 is held against float64: torch's own sums err more than the kernel's.
    exact = torch.float64 if dtype == torch.float32 else dtype
    pair = [nn.Parameter(placed(make().to(dtype), device)), nn.Parameter(make().to(exact))]
    fused = Nero(pair[:1], fused=True, **options, **constraints)
    plain = Nero(pair[1:], foreach=False, **options, **constraints)
    for t in range(3):
        for param in pair:
            param.grad = torch.empty_like(param).copy_(random(*param.shape, seed=t))
        for optimizer in (fused, plain):
            optimizer.step()
        ours, theirs = (param.detach().cpu().double() for param in pair)
        assert float((ours - theirs).norm() / theirs.norm()) <= TOLERANCE[dtype]
    for key in ("exp_avg_sq", "turn", "skipped", "step"):
        ours, theirs = fused.state[pair[0]][key].cpu(), plain.state[pair[1]][key]
        tolerance = max(1e-6, TOLERANCE[dtype])
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0.0, check_dtype=False)


def test_tensors_of_all_sizes_and_types_step_together_as_each_does_alone(device: str) -> None:
    together = many(device) + many(device, torch.bfloat16)
    alone = many(device) + many(device, torch.bfloat16)
    optimizers = [Nero(together, fused=True), *(Nero([param], fused=True) for param in alone)]
    for t in range(2):
        give_gradients(together, t)
        give_gradients(alone, t)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        assert gap(a.reshape(1, -1), b.detach().cpu().reshape(1, -1)) <= TOLERANCE[a.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_programs_of_several_blocks_do_what_several_programs_do(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large tensors: here the least that several blocks are taken for is lowered, so that small ones are large."""
    one, several = (
        [placed(random(n, k), device) for n, k in ((13, 130), (3, 2044), (9, 24))] for _ in range(2)
    )
    found = []
    made = calls(monkeypatch)
    for tensors, enough in ((one, gpu.MANY), (several, 4)):
        monkeypatch.setattr(gpu, "MANY", enough)
        params = [nn.Parameter(tensor.to(dtype)) for tensor in tensors]
        optimizer = Nero(params, fused=True, stochastic_rounding=dtype == torch.bfloat16)
        for t in range(3):
            give_gradients(params, t)
            params[0].grad.view(-1)[5 * 130] = math.nan  # type: ignore[union-attr]
            optimizer.step()
        found.append((params, [optimizer.state[param] for param in params]))
    single, more = (max(call.arguments[-1] for call in launches.calls) for launches in (made[0], made[-1]))
    assert single == 1 < more
    (params, states), (others, their_states) = found
    for param, other, state, theirs in zip(params, others, states, their_states, strict=True):
        assert torch.equal(param, other)
        assert torch.equal(state["exp_avg_sq"], theirs["exp_avg_sq"])
        assert torch.equal(state["skipped"], theirs["skipped"])
        assert float((state["turn"] / theirs["turn"] - 1).abs()) <= 1e-6
    assert int(states[0]["skipped"]) == 3


def test_small_size_classes_join_wider_ones() -> None:
    """Launches cost time: tiles of which there is little work are done with the next wider ones."""
    narrow, wide = gpu.ALIGNED[0], gpu.ALIGNED[3]
    assert gpu._joined([narrow, wide], [100, 10**7]) == [wide, wide]
    assert gpu._joined([narrow, wide], [10**7, 100]) == [narrow, wide]
    assert gpu._joined([narrow, narrow], [100, 100]) == [narrow, narrow]


def test_a_step_is_the_same_to_the_bit_every_time(device: str) -> None:
    runs = []
    for _ in range(2):
        params = many(device)
        optimizer = Nero(params, fused=True)
        for t in range(2):
            give_gradients(params, t)
            optimizer.step()
        runs.append([bits(x) for p in params for x in (p, *optimizer.state[p].values())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# -- what must not move ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 20), (6, 2053), (6,)], ids=["tiles", "long rows", "entries"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_rows_that_are_not_finite_are_left_alone_and_counted(shape: tuple[int, ...], bad: float, device: str):
    param = nn.Parameter(placed(random(*shape), device))
    optimizer = Nero([param], fused=True)
    give_gradients([param], 0)
    optimizer.step()
    before = param.detach().clone(), optimizer.state[param]["exp_avg_sq"].clone()
    give_gradients([param], 1)
    param.grad[1, ...] = bad
    param.grad[4, ...] = 0
    optimizer.step()
    for row in (1, 4):
        assert torch.equal(bits(param[row]), bits(before[0][row]))
    assert torch.equal(optimizer.state[param]["exp_avg_sq"][1], before[1][1])
    others = [0, 2, 3, 5]
    assert bool((param[others] != before[0][others]).reshape(4, -1).any(dim=1).all())
    assert bool(param.isfinite().all())
    assert int(optimizer.state[param]["skipped"]) == 1
    optimizer.param_groups[0]["lr"] = 0.0
    before = (param.detach().clone(),)
    give_gradients([param], 2)
    optimizer.step()
    assert torch.equal(bits(param), bits(before[0]))


def test_a_rate_may_be_a_tensor(device: str) -> None:
    runs = []
    for lr in (0.03, torch.tensor(0.03, device=device), torch.tensor([0.03], device=device)):
        params = many(device)
        optimizer = Nero(params, lr=lr, fused=True)
        for t in range(2):
            give_gradients(params, t)
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.5
        runs.append(params)
    for other in runs[1:]:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(runs[0], other, strict=True))


# -- state -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", [False, True], ids=["nearest", "stochastic"])
def test_state_dict_resumes_bit_equal(rounding: bool, device: str) -> None:
    params = many(device, torch.bfloat16)
    optimizer = Nero(params, fused=True, stochastic_rounding=rounding)
    for t in range(2):
        give_gradients(params, t)
        optimizer.step()
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = Nero(copies, fused=True, stochastic_rounding=rounding)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for ours, theirs in zip(copies, params, strict=True):
            ours.copy_(theirs)
    for t in range(2, 4):
        for ps, opt in ((params, optimizer), (copies, resumed)):
            give_gradients(ps, t)
            opt.step()
    for a, b in zip(params, copies, strict=True):
        assert torch.equal(bits(a), bits(b))
        for name, value in optimizer.state[a].items():
            assert torch.equal(bits(value), bits(resumed.state[b][name])), name


def test_a_run_of_another_form_goes_on_in_the_kernel(device: str) -> None:
    """Step counts on the CPU, as other forms keep them, move to the device."""
    params = many(device)
    optimizer = Nero(params, foreach=False)
    for t in range(4):
        if t == 2:
            optimizer.param_groups[0].update(foreach=None, fused=True)
        give_gradients(params, t)
        optimizer.step()
    for param in params:
        step = optimizer.state[param]["step"]
        assert step.device == param.device
        assert float(step) == 4


# -- stochastic rounding -----------------------------------------------------------------------------------

FREE = {"zero_mean": False, "unit_norm": False, "beta": 0.0, "stochastic_rounding": True}


def rounded(value: float, shape: tuple[int, ...], device: str, steps: int = 1, others: int = 0) -> Tensor:
    """bfloat16 weights of 1 that were moved to `value`, once a step (each from 1), as (steps, *shape)."""
    params = [nn.Parameter(torch.ones(shape, dtype=torch.bfloat16, device=device)) for _ in range(1 + others)]
    optimizer = Nero(params, lr=1 - value, fused=True, **FREE)
    results = []
    for _ in range(steps):
        for param in params:
            param.grad = torch.ones_like(param)
            with torch.no_grad():
                param.fill_(1.0)
        with torch.no_grad():
            optimizer._create_state()
        for param in params:
            optimizer.state[param]["scale"].fill_(math.sqrt(math.prod(shape[1:])))
        optimizer.step()
        results.append(params[-1].detach().cpu().clone())
    return torch.stack(results)


@pytest.mark.parametrize("part", [0.5, 0.1, 0.9])
@pytest.mark.parametrize("shape", [(50, 64), (2, 2053), (4000,)], ids=["tiles", "long rows", "entries"])
def test_random_rounding_is_right_on_average(part: float, shape: tuple[int, ...], device: str) -> None:
    """Between two neighbours, the upper one as often as the distance says: over entries, and over steps."""
    low = 1 - 2.0**-8  # bfloat16's neighbour of 1 below
    drawn = rounded(low + part * 2.0**-8, shape, device, steps=4).double()
    assert set(drawn.unique().tolist()) == {low, 1.0}
    up = (drawn == 1.0).double()
    assert float(up.mean()) == pytest.approx(part, abs=5 * math.sqrt(part * (1 - part) / up.numel()))
    # No entry is partial, and neither steps nor neighbours repeat one another.
    by_step = up.reshape(4, -1)
    for a, b in ((by_step[0], by_step[1]), (by_step[2], by_step[3]), (by_step[0, :-1], by_step[0, 1:])):
        covariance = float(((a - part) * (b - part)).mean())
        assert abs(covariance) <= 5 * part * (1 - part) / math.sqrt(a.numel())


def test_random_rounding_differs_between_tensors_and_rows(device: str) -> None:
    value = 1 - 2.0**-9
    first, second = rounded(value, (8, 512), device)[0], rounded(value, (8, 512), device, others=1)[0]
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_random_rounding_keeps_what_needs_no_rounding(device: str) -> None:
    assert bool((rounded(1 - 2.0**-8, (10, 64), device) == 1 - 2.0**-8).all())


def test_small_steps_are_not_lost(device: str) -> None:
    """Steps of a sixteenth of a digit: rounded to nearest nothing ever moves."""
    ends = []
    for rounding in (True, False):
        param = nn.Parameter(torch.ones(2000, dtype=torch.bfloat16, device=device))
        optimizer = Nero([param], lr=2.0**-12, fused=True, **{**FREE, "stochastic_rounding": rounding})
        for _ in range(16):
            param.grad = torch.ones_like(param)
            optimizer.step()
        ends.append(float(param.detach().double().mean()))
    assert ends[1] == 1.0
    assert ends[0] == pytest.approx(1 - 2.0**-8, abs=5 * 2.0**-8 / math.sqrt(2000))


def test_random_rounding_is_refused_where_no_kernel_serves(device: str) -> None:
    param = nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16, device=device))
    optimizer = Nero([param], foreach=True, stochastic_rounding=True)
    before, param.grad = param.detach().clone(), torch.ones_like(param)
    with pytest.raises(ValueError, match=r"stochastic_rounding=True cannot be honoured.*\(4, 3\)"):
        optimizer.step()
    assert torch.equal(param, before)
    with pytest.raises(TypeError, match="stochastic_rounding='yes'"):
        Nero([param], stochastic_rounding="yes")


# -- what is served, and what is refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "options", "reason"),
    [
        (lambda: random(4, 3, dtype=torch.float64), {}, "float64"),
        (lambda: random(4, 6)[:, ::2], {}, "do not fill one piece of memory"),
        (lambda: random(2, 2, 2, 2, 2), {"neuron_dim": (0, 2, 4)}, "more often than the kernel can follow"),
    ],
    ids=["type", "gaps", "alternating"],
)
def test_weights_that_cannot_be_served_are_refused_at_construction(weight, options, reason, device):
    tensor = weight().to(device) if weight().is_contiguous() else random(4, 6).to(device)[:, ::2]
    with pytest.raises(ValueError, match=reason) as refused:
        Nero([nn.Parameter(tensor)], fused=True, **options)
    assert "fused=True cannot be honoured" in str(refused.value)
    assert str(tuple(tensor.shape)) in str(refused.value)


def test_gradients_that_cannot_be_served_are_refused_before_anything_moves(device: str) -> None:
    first, second = nn.Parameter(random(2, 3).to(device)), nn.Parameter(random(4, 3).to(device))
    optimizer = Nero([{"params": [first]}, {"params": [second]}], fused=True)
    first.grad, second.grad = random(2, 3).to(device), random(3, 4).to(device).t()
    before = first.detach().clone()
    with pytest.raises(ValueError, match="strides"):
        optimizer.step()
    assert torch.equal(first, before)
    assert all(not state["step"] for state in optimizer.state.values())
    for group in optimizer.param_groups:
        group["fused"] = None
    optimizer.step()
    assert not torch.equal(first, before)
    assert all(float(state["step"]) == 1 for state in optimizer.state.values())


def test_none_takes_the_kernel_for_what_it_serves_and_another_form_for_the_rest(device, monkeypatch) -> None:
    launched = []
    call = gpu.nero
    monkeypatch.setattr(gpu, "nero", lambda found, o: (launched.append(found.tensors), call(found, o)))
    plain, gaps = nn.Parameter(random(4, 3).to(device)), nn.Parameter(random(4, 6).to(device)[:, ::2])
    optimizer = Nero([plain, gaps])
    before = [plain.detach().clone(), gaps.detach().clone()]
    for param in (plain, gaps):
        param.grad = torch.ones_like(param) * random(4, 3).to(device)
    optimizer.step()
    assert launched == [1]
    assert all(not torch.equal(a, b) for a, b in zip(before, (plain, gaps), strict=True))
    for options in ({"fused": False}, {"foreach": True}, {"foreach": False}):
        launched.clear()
        optimizer.param_groups[0].update({"fused": None, "foreach": None} | options)
        optimizer.step()
        assert not launched, options


def test_autograd_sees_that_weights_changed(device: str) -> None:
    weight = nn.Parameter(random(4, 3).to(device))
    optimizer = Nero([weight], fused=True)
    loss = (weight * weight).sum()
    weight.grad = random(4, 3, seed=1).to(device)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_status_says_with_what(device: str) -> None:
    status = kernels.status()["gpu"]
    assert status.available
    assert "Triton" in status.detail
