"""The CPU kernel: accuracy, the same bits for every thread and instruction set, layouts, number formats, refusals.

That it follows Nero's rule in every form is held elsewhere: by the worked numbers and the float64 reference
(tests/maths/test_nero_numbers.py) and by the shared database of cases (tests/contract).
"""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from archopt import Lamb, Nero, kernels
from archopt.kernels import cpu, cpu_nero
from archopt.neurons import fan_in_dims
from archopt.optim import nero_fused
from archopt.optim.nero import nero_update

STATUS = kernels.status()["cpu"]
with_kernel = pytest.mark.skipif(not STATUS.available, reason=f"no CPU kernel: {STATUS.detail}")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# One rounding of the weight's own type, and what sums in float32 lose.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def gap(actual: Tensor, expected: Tensor) -> float:
    """Largest distance between rows, relative to the expected row's norm."""
    difference = (actual.detach().double() - expected.double()).reshape(expected.shape[0], -1)
    return float(
        (difference.norm(dim=1) / expected.double().reshape(expected.shape[0], -1).norm(dim=1)).max()
    )


def step_with(weight: Tensor, grad: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The weight and its state after one step; the weight is as it is, not projected at construction."""
    param = nn.Parameter(weight.clone(memory_format=torch.preserve_format))
    param.grad = torch.empty_like(param).copy_(grad)
    optimizer = Nero([param], **options)
    with torch.no_grad():
        optimizer._create_state()
        param.copy_(weight)
    optimizer.step()
    return param.detach(), optimizer.state[param]


# -- accuracy ----------------------------------------------------------------------------------------------


@with_kernel
@pytest.mark.parametrize("fan_in", [2, 3, 15, 16, 17, 1000, 1024, 1025, 100_003, 1_000_000])
@pytest.mark.parametrize("kind", ["ordinary", "tiny gradient", "large gradient", "all alike"])
def test_sums_are_those_of_float64(fan_in: int, kind: str) -> None:
    """Float32 rows of 2 to a million entries: weights, v and turn against the same step in float64."""
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
    moved, state = step_with(weight, grad, lr=0.1, fused=True)
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    expected, v, turn, _ = nero_update(
        weight.double(),
        grad.double(),
        zero,
        one,
        one,
        lr=0.1,
        beta=0.999,
        dims=(1,),
        zero_mean=True,
        unit_norm=True,
    )
    assert gap(moved, expected) <= 1e-6
    assert float((state["exp_avg_sq"].double() / v - 1).abs().max()) <= 2e-6
    assert float((state["turn"].double() / turn.mean() - 1).abs()) <= 2e-6


@with_kernel
@pytest.mark.parametrize("fan_in", [5, 100, 5000])
@pytest.mark.parametrize("offset", [1.0, 1e3])
@pytest.mark.parametrize("neuron_dim", [0, 1])
def test_rows_far_from_balanced_are_balanced(fan_in: int, offset: float, neuron_dim: int) -> None:
    """A mean that hides everything else in the five sums: the norm is formed again from the moved row."""
    weight, grad = random(3, fan_in) + offset, random(3, fan_in, seed=1)
    if neuron_dim:
        weight, grad = weight.t().contiguous(), grad.t().contiguous()
    moved, _ = step_with(weight, grad, lr=0.01, fused=True, neuron_dim=neuron_dim)
    plain, _ = step_with(weight, grad, lr=0.01, foreach=False, neuron_dim=neuron_dim)
    rows = moved.double() if neuron_dim == 0 else moved.t().double()
    assert float((rows.norm(dim=1) - 1).abs().max()) <= 1e-6
    assert float(rows.mean(dim=1).abs().max()) <= 1e-7 * offset
    assert gap(rows, (plain if neuron_dim == 0 else plain.t()).double()) <= 1e-6 + 2e-7 * offset


@with_kernel
def test_a_constant_row_is_not_blown_up() -> None:
    """Where centring leaves no more than rounding, the row is not divided by it, as in the plain form."""
    weight, grad = torch.full((2, 50), 0.1), torch.ones(2, 50)
    moved, _ = step_with(weight, grad, lr=0.01, fused=True)
    assert float(moved.norm()) <= 1e-5


# -- the same bits -----------------------------------------------------------------------------------------


def every_kind_of_work(dtype: torch.dtype) -> list[tuple[Tensor, int]]:
    """Tensors for each way that the kernel works, and their neuron dimension; some are many pieces of work."""
    shapes = [
        ((70, 1000), 0),
        ((3, 30_011), 0),
        ((40, 7), 0),
        ((300, 90), 1),
        ((20, 600, 3), 1),
        ((6, 5, 40), 1),
    ]
    shapes += [((40_000,), 0), ((), 0), ((64, 3, 3, 3), 0)]
    return [(random(*shape, seed=i, dtype=dtype), dim) for i, (shape, dim) in enumerate(shapes)]


def trajectory(dtype: torch.dtype, **call: Any) -> list[Tensor]:
    """Weights and states after three steps, with a row that is skipped and one that rests."""
    groups = [{"params": [nn.Parameter(w)], "neuron_dim": d} for w, d in every_kind_of_work(dtype)]
    optimizer = Nero(groups, fused=True, **call)
    params = [group["params"][0] for group in optimizer.param_groups]
    for t in range(3):
        for i, param in enumerate(params):
            param.grad = random(*param.shape, seed=100 * t + i, dtype=dtype)
        params[0].grad[3, 5] = math.nan
        params[0].grad[4] = 0
        optimizer.step()
    return [bits(x) for p in params for x in (p, *optimizer.state[p].values())]


@with_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("openmp", [True, False], ids=["torch's threads", "own threads"])
def test_bits_do_not_depend_on_the_number_of_threads(
    dtype: torch.dtype, openmp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = cpu._library()
    if openmp and not library.parallel:
        pytest.skip("torch's OpenMP runtime does not speak GNU's interface here")
    monkeypatch.setattr(cpu, "_library", lambda: library._replace(parallel=library.parallel if openmp else 0))
    expected = trajectory(dtype)
    for threads in (2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for actual, one_thread in zip(trajectory(dtype), expected, strict=True):
            assert torch.equal(actual, one_thread)


@with_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_instruction_set(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = cpu._library()
    expected = trajectory(dtype)
    for count in range(1, len(library.instructions)):
        older = library._replace(instructions=library.instructions[:count])
        monkeypatch.setattr(cpu, "_library", lambda older=older: older)
        for actual, best in zip(trajectory(dtype), expected, strict=True):
            assert torch.equal(actual, best), older.instructions[-1]


# -- number formats ----------------------------------------------------------------------------------------

FREE = {"zero_mean": False, "unit_norm": False, "beta": 0.0}


@with_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fan_in", [64, 1], ids=["rows", "entries"])
def test_halves_are_rounded_as_torch_rounds_them(dtype: torch.dtype, fan_in: int) -> None:
    """All 65,536 numbers of a format, moved by steps of their own size and none: to the bit what torch computes."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(-1, fan_in)
    # Rows whose norm is a power of two, so that their stride has no rounding of its own.
    sign = torch.where(random(*every.shape) > 0, 1.0, -1.0)
    param = nn.Parameter(every.clone())
    for lr in (2.0**-6, 0.3):
        for size in (1.0, 2.0**-9, 2.0**6):
            optimizer = Nero([param], lr=lr, fused=True, **FREE)
            with torch.no_grad():
                optimizer._create_state()
                param.copy_(every)
                optimizer.state[param]["scale"].fill_(math.sqrt(fan_in))
            param.grad = (size * sign).to(dtype)
            optimizer.step()
            stride = torch.tensor(lr / size, dtype=torch.float64).float()
            expected = (every.float() - stride * param.grad.float()).to(dtype)
            same = param.detach().view(torch.int16) == expected.view(torch.int16)
            assert bool((same | (param.isnan() & expected.isnan())).all()), f"lr={lr}, size={size}"


# -- layouts -----------------------------------------------------------------------------------------------


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
    picked=st.sets(st.integers(0, 4)),
)
def test_layouts_number_every_entry_as_its_statistic_is_numbered(shape, order, picked):
    """Whatever the shape, the order in memory and the dimensions that are summed over: right, or refused."""
    summed = {d for d in picked if d < len(shape)}
    permutation = list(range(len(shape)))
    order.shuffle(permutation)
    inverse = [permutation.index(d) for d in range(len(shape))]
    tensor = torch.arange(math.prod(shape)).reshape([shape[d] for d in permutation]).permute(inverse)
    layout = cpu.layout_of(tensor.shape, tensor.stride(), summed)
    if isinstance(layout, str):
        kept = [d for d in permutation if d not in summed and shape[d] > 1]
        levels = [key for key, _ in itertools.groupby(d in summed for d in permutation[::-1] if shape[d] > 1)]
        assert kept != sorted(kept) or len(levels) + (not levels[0]) > 4, layout
        return
    if not summed:
        assert layout == (1, 1, tensor.numel(), 1)
        return
    statistics = torch.arange(math.prod(n for d, n in enumerate(shape) if d not in summed))
    kept_shape = [1 if d in summed else n for d, n in enumerate(shape)]
    of_entry = statistics.reshape(kept_shape).expand(shape)  # logical
    in_memory = torch.empty(tensor.numel(), dtype=torch.long)
    in_memory[tensor.reshape(-1)] = of_entry.reshape(-1)
    batches, spread, rows, run = layout
    nested = statistics.reshape(batches, 1, rows, 1).expand(batches, spread, rows, run)
    assert torch.equal(nested.reshape(-1), in_memory)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


VIEWS = {
    "rows": (lambda: random(9, 40), {}),
    "columns": (lambda: random(40, 700), {"neuron_dim": 1}),
    "few long columns": (lambda: random(5000, 3), {"neuron_dim": 1}),
    "transposed": (lambda: random(40, 9).t(), {}),
    "filters": (lambda: random(6, 5, 3, 3), {}),
    "channels last": (lambda: channels_last(random(6, 5, 3, 3)), {}),
    "transposed filters": (lambda: random(6, 5, 3, 3), {"neuron_dim": 1}),
    "transposed filters, channels last": (lambda: channels_last(random(6, 5, 3, 3)), {"neuron_dim": 1}),
    "transposed filters with long runs": (lambda: random(4, 5, 7, 8), {"neuron_dim": 1}),
    "many groups": (lambda: random(8, 3, 2, 2), {"neuron_dim": 1, "channel_groups": 4}),
    "taps": (lambda: random(6, 5, 3, 3), {"neuron_dim": (0, 1)}),
    "outputs and rows of taps": (lambda: random(6, 5, 3, 4), {"neuron_dim": (0, 2)}),
    "batches of columns": (lambda: random(3, 40, 300), {"neuron_dim": (0, 2)}),
}


@with_kernel
@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constraints", [{}, {"unit_norm": False}, {"zero_mean": False, "maximize": True}])
def test_every_layout_follows_the_plain_form(
    name: str, dtype: torch.dtype, constraints: dict[str, bool]
) -> None:
    make, options = VIEWS[name]
    # Float32 is held against float64: torch's own sums down long columns err more than the kernel's.
    exact = torch.float64 if dtype == torch.float32 else dtype
    pair = [nn.Parameter(make().to(dtype)), nn.Parameter(make().to(exact))]
    fused = Nero(pair[:1], fused=True, **options, **constraints)
    plain = Nero(pair[1:], foreach=False, **options, **constraints)
    for t in range(3):
        for param in pair:
            param.grad = torch.empty_like(param).copy_(random(*param.shape, seed=t))
        for optimizer in (fused, plain):
            optimizer.step()
        assert (
            float((pair[0] - pair[1]).detach().double().norm() / pair[1].detach().double().norm())
            <= TOLERANCE[dtype]
        )
    for key in ("exp_avg_sq", "turn", "skipped", "step"):
        ours, theirs = fused.state[pair[0]][key], plain.state[pair[1]][key]
        tolerance = max(1e-6, TOLERANCE[dtype])
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0.0, check_dtype=False)


# -- what is served, and what is refused -------------------------------------------------------------------


def refusal(call: Any) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


@with_kernel
@pytest.mark.parametrize(
    ("weight", "options", "reason"),
    [
        (lambda: random(4, 6)[:, ::2], {}, "do not fill one piece of memory"),
        (lambda: random(4, 3).to(torch.float8_e5m2), {}, "float8_e5m2"),
        (lambda: random(2, 2, 2, 2, 2), {"neuron_dim": (0, 2, 4)}, "more often than the kernel can follow"),
        (
            lambda: random(3, 4, 2).permute(1, 0, 2),
            {"neuron_dim": (0, 1)},
            "another order than their statistics",
        ),
    ],
    ids=["gaps", "type", "alternating", "order"],
)
def test_weights_that_cannot_be_served_are_refused_at_construction(weight, options, reason):
    tensor = weight()
    refused = refusal(lambda: Nero([nn.Parameter(tensor, requires_grad=True)], fused=True, **options))
    assert "fused=True cannot be honoured" in refused
    assert reason in refused
    assert str(tuple(tensor.shape)) in refused
    assert "fused=None" in refused


@with_kernel
@pytest.mark.parametrize(
    ("grad", "reason"),
    [
        (lambda: random(3, 4).t(), "strides"),
        (lambda: random(4, 1).expand(4, 3), "strides"),
        (lambda: torch.view_as_complex(random(4, 3, 2)).conj().imag, "negates"),
    ],
    ids=["transposed", "expanded", "negated"],
)
def test_gradients_that_cannot_be_served_are_refused_before_anything_moves(grad, reason):
    first, second = nn.Parameter(random(2, 3)), nn.Parameter(random(4, 3))
    optimizer = Nero([{"params": [first]}, {"params": [second]}], fused=True)
    if reason == "negates":  # its strides are those of the complex numbers
        second.data = torch.view_as_complex(random(4, 3, 2)).imag
        optimizer.param_groups[1]["fused"] = None
        second.grad = grad()
        optimizer.step()  # served by another form
        return
    first.grad, second.grad = random(2, 3), grad()
    before = first.detach().clone()
    assert reason in refusal(optimizer.step)
    assert torch.equal(first, before)
    assert all(not state["step"] for state in optimizer.state.values())
    for group in optimizer.param_groups:
        group["fused"] = None
    optimizer.step()
    assert not torch.equal(first, before)


@with_kernel
def test_none_takes_the_kernel_for_what_it_serves_and_another_form_for_the_rest(monkeypatch) -> None:
    served = []
    call = cpu_nero.nero
    monkeypatch.setattr(
        cpu_nero,
        "nero",
        lambda table, grads, **options: (served.extend(table.weights), call(table, grads, **options)),
    )
    plain, gaps = nn.Parameter(random(4, 3)), nn.Parameter(random(4, 6)[:, ::2])
    optimizer = Nero([plain, gaps])
    before = [plain.detach().clone(), gaps.detach().clone()]
    for param in (plain, gaps):
        param.grad = torch.ones_like(param) * random(4, 3)
    optimizer.step()
    assert len(served) == 1
    assert served[0] is plain
    assert all(not torch.equal(a, b) for a, b in zip(before, (plain, gaps), strict=True))
    for options in ({"fused": False}, {"foreach": True}, {"foreach": False}):
        served.clear()
        optimizer.param_groups[0].update({"fused": None, "foreach": None} | options)
        optimizer.step()
        assert not served, options


@with_kernel
def test_what_was_prepared_is_prepared_again_where_tensors_lie_elsewhere() -> None:
    """Weights or state that were replaced, gradients that moved or are laid out otherwise, other groups."""
    ours, plain = [[nn.Parameter(random(6, 8, seed=i)) for i in range(3)] for _ in range(2)]
    optimizer, other = Nero(ours), Nero(plain, foreach=False)
    for t in range(6):
        for params, opt in ((ours, optimizer), (plain, other)):
            for i, param in enumerate(params):
                param.grad = random(6, 8, seed=10 * t + i)  # elsewhere each time
            if t == 1:
                params[0].data = params[0].detach().clone()
            if t == 2:
                opt.state[params[1]]["exp_avg_sq"] = opt.state[params[1]]["exp_avg_sq"].clone()
            if t == 3:
                opt.state[params[2]]["scale"].data = torch.full((), 2.0)
            if t == 4:
                params[1].grad = random(8, 6, seed=t).t()
            if t == 5:
                params[0].data = params[0].detach().t().contiguous().t()
                opt.param_groups[0]["neuron_dim"] = 1
                for p in params:
                    opt.state[p]["exp_avg_sq"] = torch.zeros(1, 8)
            opt.step()
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_two_forms_at_once_are_refused() -> None:
    assert "expected at most one" in refusal(
        lambda: Nero([nn.Parameter(random(4, 3))], fused=True, foreach=True)
    )


def test_rules_without_a_kernel_refuse_it() -> None:
    assert "no fused form" in refusal(lambda: Lamb([nn.Parameter(random(4, 3))], fused=True))


@with_kernel
def test_autograd_sees_that_weights_changed() -> None:
    """A weight that a graph has saved was overwritten: backward must say so rather than use the new values."""
    weight = nn.Parameter(random(4, 3))
    optimizer = Nero([weight], fused=True)
    loss = (weight * weight).sum()
    weight.grad = random(4, 3, seed=1)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- the library is missing --------------------------------------------------------------------------------


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_library", lambda: "not built: no C compiler was found")


def test_without_a_library_other_forms_serve_and_true_says_why(no_library) -> None:
    assert kernels.status()["cpu"] == (False, "not built: no C compiler was found")
    weight = nn.Parameter(random(4, 3))
    optimizer = Nero([weight])
    before, weight.grad = weight.detach().clone(), random(4, 3, seed=1)
    optimizer.step()
    assert not torch.equal(weight, before)
    assert "no C compiler" in refusal(lambda: Nero([nn.Parameter(random(4, 3))], fused=True))


@pytest.fixture
def looks_again() -> Any:
    """The library is looked for again in the test, and after it."""
    cpu._library.cache_clear()
    yield
    cpu._library.cache_clear()


@with_kernel
def test_a_library_of_another_version_is_not_used(looks_again, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "INTERFACE", cpu.INTERFACE + 1)
    status = cpu.status()
    assert not status.available
    assert "built from another version" in status.detail


def test_a_file_that_is_no_library_and_a_missing_one_are_told_apart(
    looks_again, monkeypatch, tmp_path
) -> None:
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    assert "no C compiler was found" in cpu.status().detail
    cpu._library.cache_clear()
    (tmp_path / "_native.abi3.so").write_bytes(b"not a library")
    assert "_native.abi3.so cannot be loaded" in cpu.status().detail


def test_layouts_of_groups_are_those_of_the_view_in_groups() -> None:
    """Grouped transposed convolutions: dimension 0 is split before layouts are read."""
    for groups, rest in itertools.product((1, 2, 4), ((3,), (3, 2, 2))):
        weight = random(8, *rest)
        layout = nero_fused.layout_of(weight.shape, weight.stride(), 1, groups)
        dims = fan_in_dims(weight.shape, 1, groups)
        view = weight if groups == 1 else weight.unflatten(0, (groups, -1))
        assert layout == cpu.layout_of(view.shape, view.stride(), dims)
