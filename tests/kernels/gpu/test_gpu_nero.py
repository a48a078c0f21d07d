"""Nero's GPU kernel: accuracy, layouts, number formats, gradients that move about, random rounding, refusals.

On a GPU the kernel is compiled; under `make test-triton` the same code runs in Triton's interpreter. What that
cannot show (graphs, waiting, compiled steps) is in test_on_a_gpu.py. Everything is held against Nero's rule in
float64, in the plain form.
"""

import copy
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from archopt import Nero, kernels
from archopt.kernels import gpu
from archopt.optim.nero import nero_update
from kernels.test_cpu import VIEWS as CPU_VIEWS
from kernels.test_cpu import random

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One rounding of the weight's own type, and what sums in float32 lose.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def gap(actual: Tensor, expected: Tensor) -> float:
    """Largest distance between rows, relative to the expected row's norm."""
    difference = (actual.detach().cpu().double() - expected.double()).reshape(expected.shape[0], -1)
    return float(
        (difference.norm(dim=1) / expected.double().reshape(expected.shape[0], -1).norm(dim=1)).max()
    )


def placed(tensor: Tensor, device: str) -> Tensor:
    """The tensor on the device, in the memory layout that it has."""
    return tensor.to(device, copy=True, memory_format=torch.preserve_format)


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


def many(device: str, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Tensors for each way that the kernel works."""
    # The interpreter takes a while for long rows: one whose memory is aligned, one whose is not.
    shapes: list[tuple[int, ...]] = [(20, 100), (1, 2053), (1, 8196), (9, 7), (1500,), (), (4, 3, 3, 3)]
    return [nn.Parameter(placed(random(*s, seed=i, dtype=dtype), device)) for i, s in enumerate(shapes)]


def give_gradients(params: list[nn.Parameter], t: int) -> None:
    for i, param in enumerate(params):
        param.grad = placed(random(*param.shape, seed=100 * t + i, dtype=param.dtype), str(param.device))


def step_by(optimizer: Nero, params: list[nn.Parameter], grads: list[Tensor | None]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()


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
    for tensors, many in ((one, gpu.MANY), (several, 4)):
        monkeypatch.setattr(gpu, "MANY", many)
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


# -- memory that moves about -------------------------------------------------------------------------------


def test_gradients_may_lie_elsewhere_at_every_step(device: str) -> None:
    """New memory each step, memory that comes back, and tensors that get no gradient: the same trajectory."""
    moving, fixed = many(device), many(device)
    optimizers = Nero(moving, fused=True), Nero(fixed, fused=True)
    held = []
    for t in range(4):
        for params, optimizer in zip((moving, fixed), optimizers, strict=True):
            if params is moving:
                held.append([p.grad for p in params])  # so that its memory is not given out again
                give_gradients(params, t)
            else:
                for i, p in enumerate(params):
                    grad = random(*p.shape, seed=100 * t + i).to(device)
                    p.grad = grad if p.grad is None else p.grad.copy_(grad)
            missing = params[t % 3].grad
            params[t % 3].grad = None
            optimizer.step()
            params[t % 3].grad = missing
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(moving, fixed, strict=True))


def test_nothing_is_prepared_again_where_nothing_moved(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = []
    make = gpu.nero_launches
    monkeypatch.setattr(
        gpu, "nero_launches", lambda *args, **options: (prepared.append(1), make(*args, **options))[1]
    )
    params = many(device)
    optimizer = Nero(params, fused=True)
    give_gradients(params, 0)
    for _ in range(3):
        optimizer.step()
    assert len(prepared) == 1
    first = [p.grad for p in params]
    give_gradients(params, 1)
    second = [p.grad for p in params]
    for grads in (second, first, second):
        step_by(optimizer, params, grads)
    assert len(prepared) == 2
    params[0].data = params[0].data.clone()
    optimizer.step()
    assert len(prepared) == 3
    # The same memory, seen as something else.
    params[0].data, params[0].grad = params[0].data.view(100, 20).t(), params[0].grad.view(100, 20).t()
    optimizer.step()
    assert len(prepared) == 4


def test_gradients_are_not_kept(device: str) -> None:
    params = many(device)
    optimizer = Nero(params, fused=True)
    give_gradients(params, 0)
    grad = weakref.ref(params[0].grad)
    optimizer.step()
    optimizer.zero_grad()
    assert grad() is None


def test_views_into_one_buffer_step_as_tensors_of_their_own(device: str) -> None:
    """DDP's gradient_as_bucket_view: addresses that are a multiple of an entry's size alone."""
    shapes = [(5, 64), (3,), (6, 2052), (7, 9000)]
    runs = []
    for shift in (0, 1):
        params = [nn.Parameter(placed(random(*s, seed=i), device)) for i, s in enumerate(shapes)]
        flat = torch.empty(sum(p.numel() for p in params) + 8, device=device)
        optimizer, start = Nero(params, fused=True), shift
        for i, param in enumerate(params):
            param.grad = flat[start : start + param.numel()].view(param.shape)
            param.grad.copy_(random(*param.shape, seed=10 + i))
            start += param.numel()
        optimizer.step()
        runs.append(params)
    for a, b in zip(*runs, strict=True):
        assert gap(a.reshape(1, -1), b.detach().cpu().reshape(1, -1)) <= 1e-6


# -- groups that share launches ------------------------------------------------------------------------------


def calls(monkeypatch: pytest.MonkeyPatch) -> list[gpu.Launches]:
    """What is launched from now on."""
    launched: list[gpu.Launches] = []
    call = gpu.nero
    monkeypatch.setattr(gpu, "nero", lambda found, o: (launched.append(found), call(found, o)))
    return launched


def in_groups(params: list[nn.Parameter], **options: Any) -> list[dict[str, Any]]:
    return [{"params": [param], **options} for param in params]


def test_groups_with_equal_options_share_their_launches(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One group a tensor, with axes of their own: as many launches as of one group, and the same bits."""
    one, several = many(device), many(device)
    optimizers = Nero(one, fused=True), Nero(in_groups(several), fused=True)
    optimizers[1].param_groups[0]["neuron_dim"] = (0,)
    launched = calls(monkeypatch)
    for t in range(2):
        for params, optimizer in zip((one, several), optimizers, strict=True):
            give_gradients(params, t)
            optimizer.step()
    assert len(launched) == 4
    assert {found.tensors for found in launched} == {len(one)}
    assert len({len(found.calls) for found in launched}) == 1
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(one, several, strict=True))


@pytest.mark.parametrize(
    "option", [{"lr": 0.02}, {"beta": 0.9}, {"unit_norm": False}, {"zero_mean": False}, {"maximize": True}]
)
def test_groups_with_other_options_keep_them(option: dict[str, Any], device: str) -> None:
    """One table, launches of their own: each group steps as it does in an optimizer of its own."""
    shapes = [(6, 20), (5,), (4, 24)]
    together = [nn.Parameter(random(*s, seed=i).to(device)) for i, s in enumerate(shapes)]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    options: list[dict[str, Any]] = [{}, option, {}]
    both = Nero([{"params": [p], **o} for p, o in zip(together, options, strict=True)], fused=True)
    each = [Nero([p], fused=True, **o) for p, o in zip(alone, options, strict=True)]
    for t in range(2):
        give_gradients(together, t)
        give_gradients(alone, t)
        for optimizer in (both, *each):
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        assert gap(a.reshape(1, -1), b.detach().cpu().reshape(1, -1)) <= 1e-6


def test_groups_share_launches_while_their_rates_are_equal(device, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [nn.Parameter(random(6, 20, seed=i).to(device)) for i in range(3)]
    optimizer = Nero(in_groups(params), fused=True)
    launched = calls(monkeypatch)
    give_gradients(params, 0)
    first, second, third = optimizer.param_groups
    rate = torch.tensor(0.01, device=device)
    for rates, expected in (
        ((0.02, 0.02, 0.02), 1),
        ((0.03, 0.03, 0.03), 1),
        ((0.02, 0.03, 0.02), 2),
        ((0.01, 0.02, 0.03), 3),
        ((rate, rate, rate), 1),
        ((rate, rate.clone(), rate), 2),
    ):
        first["lr"], second["lr"], third["lr"] = rates
        optimizer.step()
        assert len(launched[-1].calls) == expected, rates


def test_a_schedule_prepares_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that differ between groups and change at every step."""
    params = [nn.Parameter(random(6, 20, seed=i).to(device)) for i in range(3)]
    optimizer = Nero(in_groups(params), fused=True)
    optimizer.param_groups[0]["lr"] = 0.02
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    launched = calls(monkeypatch)
    give_gradients(params, 0)
    turns = []
    for _ in range(4):
        optimizer.step()
        schedule.step()
        turns.append(float(optimizer.state[params[2]]["turn"]))
    assert len({id(found.table) for found in launched}) == 1
    assert turns == pytest.approx([0.01 * 0.9**t for t in range(4)], rel=1e-5)


def test_what_changes_is_prepared_anew(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new group, a frozen weight, a loaded or replaced state, another axis; each step as the plain form's."""
    shapes = [(6, 20), (5,), (4, 24), (4, 4)]
    pair = [[nn.Parameter(random(*s, seed=i).to(device)) for i, s in enumerate(shapes)] for _ in range(2)]
    optimizers = [
        Nero(in_groups(params[:3]), **form)
        for params, form in zip(pair, ({"fused": True}, {"foreach": False}), strict=True)
    ]
    launched = calls(monkeypatch)
    for i, param in enumerate(pair[0]):  # memory that stays
        param.grad = random(*param.shape, seed=10 + i).to(device)
    for ours, theirs in zip(*pair, strict=True):
        theirs.grad = ours.grad.clone()

    def steps() -> list[int]:
        """How many tensors two steps launch; the second one uses what the first one prepared, which is new."""
        before = {id(found.table) for found in launched}
        for optimizer in (*optimizers, *optimizers):
            optimizer.step()
        assert launched[-1].table is launched[-2].table
        assert id(launched[-1].table) not in before
        for ours, theirs in zip(*pair, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        return [found.tensors for found in launched[-2:]]

    assert steps() == [3, 3]
    for params, optimizer in zip(pair, optimizers, strict=True):
        optimizer.add_param_group({"params": [params[3]]})
    assert steps() == [4, 4]
    for params in pair:
        params[0].requires_grad_(False)
    assert steps() == [3, 3]
    for params in pair:
        params[0].requires_grad_(True)
        params[1].grad = None
    assert steps() == [3, 3]
    for optimizer in optimizers:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert steps() == [3, 3]
    for params, optimizer in zip(pair, optimizers, strict=True):
        optimizer.state[params[2]] = {k: v.clone() for k, v in optimizer.state[params[2]].items()}
        optimizer.state[params[2]]["exp_avg_sq"].mul_(4.0)
    assert steps() == [3, 3]
    for params, optimizer in zip(pair, optimizers, strict=True):
        v = optimizer.state[params[2]]["exp_avg_sq"]
        optimizer.state[params[2]]["exp_avg_sq"] = v * 4.0
    assert steps() == [3, 3]
    for params, optimizer in zip(pair, optimizers, strict=True):
        del optimizer.state[params[3]]
        optimizer.param_groups[3]["neuron_dim"] = 1
    assert steps() == [3, 3]


def test_a_step_that_repeats_another_looks_at_nothing_twice(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The long way is taken for what is new: gradients elsewhere, one that is missing or sparse, an option."""
    params = [nn.Parameter(random(6, 20, seed=i).to(device)) for i in range(2)]
    optimizer = Nero(in_groups(params), fused=True)
    long_ways: list[int] = []
    update = Nero._update
    monkeypatch.setattr(Nero, "_update", lambda self: (long_ways.append(1), update(self))[1])
    give_gradients(params, 0)
    first = [p.grad for p in params]
    for rate in (0.01, 0.02, 0.03):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        assert float(optimizer.state[params[1]]["turn"]) > 0.4 * rate
    assert len(long_ways) == 1
    give_gradients(params, 1)
    second = [p.grad for p in params]
    for grads in (second, first, second):
        step_by(optimizer, params, grads)
    assert len(long_ways) == 2
    assert [float(optimizer.state[p]["step"]) for p in params] == [6, 6]
    params[0].grad = None
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [6, 7]
    params[0].grad = torch.zeros(6, 20, device=device).to_sparse()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.step()
    params[0].grad = second[0]
    before = params[0].detach().clone()
    optimizer.param_groups[0]["maximize"] = True
    optimizer.step()
    moved = ((params[0].detach() - before) * second[0]).sum()
    assert float(moved) > 0
    assert len(long_ways) == 4


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
