"""AGD's CPU kernel: layouts, number formats, the same bits for every thread and instruction set, refusals.

That it follows the rule is held elsewhere too: by the worked numbers, the slow reference and the tests of tiny,
huge and missing gradients (tests/maths/test_agd*.py, form "fused") and by the shared cases (tests/contract).
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from archopt import AGD
from archopt.kernels import cpu, cpu_agd
from archopt.optim import oracles
from archopt.optim.agd import agd_step_size, agd_update
from kernels.test_cpu import DTYPES, TOLERANCE, bits, channels_last, random, refusal, with_kernel

# How a weight lies in memory and falls into parts.
VIEWS: dict[str, tuple[Any, dict[str, Any]]] = {
    "matrix": (lambda: random(9, 40), {}),
    "matrix of many units": (lambda: random(2, 30_011), {}),
    "transposed": (lambda: random(40, 9).t(), {}),
    "taps": (lambda: random(6, 5, 3, 3), {}),
    "taps of many units": (lambda: random(90, 70, 3, 3), {}),
    "many taps": (lambda: random(8, 9, 17, 19), {}),
    "taps, channels last": (lambda: channels_last(random(6, 5, 3, 3)), {}),
    "taps in long runs": (lambda: channels_last(random(60, 70, 3, 3)), {}),
    "taps of five dimensions": (lambda: random(3, 4, 5, 6, 2), {}),
    "groups": (lambda: random(8, 3, 2, 2), {"norm": "frobenius", "groups": 4}),
    "slices": (lambda: random(12, 50), {"norm": "frobenius", "slices": 3}),
    "slices of columns": (lambda: random(50, 12), {"norm": "frobenius", "slices": 3, "neuron_dim": 1}),
    "filters": (lambda: random(40, 1, 3, 3), {"norm": "filters"}),
    "rows": (lambda: random(40, 700), {"norm": "rows"}),
    "columns": (lambda: random(700, 400), {"norm": "rows", "neuron_dim": 1}),
    "vector": (lambda: random(3000), {"norm": "rms"}),
    "slices of a vector": (lambda: random(300), {"norm": "rms", "slices": 3}),
    "entries": (lambda: random(20_000), {"norm": "max"}),
    "scalar": (lambda: random(), {"norm": "max"}),
}


def exact_step(weight: Tensor, grad: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The weight after a step of AGD for this tensor alone, and G, both in float64."""
    group = oracles.PUBLISHED | options
    parts, radius = oracles.parts_of(weight.shape, group), oracles.radius_of(weight.shape, group)
    peak, size = oracles.measure(parts.view(grad.double()), parts.dims)
    reach = radius * parts.length / (group["slices"] * group["uses"])
    summary = reach * oracles.dual(peak, size)
    updated = agd_update(
        parts.view(weight.double()),
        parts.view(grad.double()),
        peak,
        size,
        agd_step_size(summary) * reach,
    )
    return updated.reshape(weight.shape), summary


@with_kernel
@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout_takes_the_step_of_float64(name: str, dtype: torch.dtype) -> None:
    make, options = VIEWS[name]
    weight = make().to(dtype)
    grad = torch.empty_like(weight).copy_(random(*weight.shape, seed=1))
    param = nn.Parameter(weight.clone(memory_format=torch.preserve_format))
    param.grad = grad
    expected, summary = exact_step(weight, grad, options)
    optimizer = AGD([{"params": [param], **options}], fused=True)
    optimizer.step()
    difference = (param.detach().double() - expected).norm() / expected.norm()
    assert float(difference) <= TOLERANCE[dtype]
    exact = 1e-13 if dtype == torch.float64 else 1e-6
    assert float((optimizer.gradient_summary / summary - 1).abs()) <= exact


def every_kind_of_work(dtype: torch.dtype) -> list[dict[str, Any]]:
    groups = [{"params": [nn.Parameter(make().to(dtype))], **options} for make, options in VIEWS.values()]
    return [*groups, {"params": [nn.Parameter(random(3, 100_000, dtype=dtype))]}]


def trajectory(dtype: torch.dtype) -> list[Tensor]:
    """Weights, eta and G after three steps, with parts that are zero or tiny."""
    optimizer = AGD(every_kind_of_work(dtype), fused=True)
    params = [group["params"][0] for group in optimizer.param_groups]
    reports = []
    for t in range(3):
        for i, param in enumerate(params):
            param.grad = torch.empty_like(param).copy_(random(*param.shape, seed=100 * t + i))
        params[3].grad[:, :, t, 1] = 0
        params[4].grad[:, :, 1, t] *= 1e-42
        params[7].grad[:, :, 0] *= 1e-42
        optimizer.step()
        reports += [optimizer.eta, optimizer.gradient_summary]
    return [bits(x) for x in (*params, *reports)]


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


# -- gradients that are not ordinary -----------------------------------------------------------------------


@with_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["matrix", "taps", "many taps", "taps in long runs", "rows", "entries"])
def test_parts_without_gradient_keep_their_bits(name: str, dtype: torch.dtype) -> None:
    make, options = VIEWS[name]
    param = nn.Parameter(make().to(dtype))
    view = param.detach().view(-1) if param.is_contiguous() else param.detach()
    view[:1] = -0.0
    param.grad = torch.empty_like(param).copy_(random(*param.shape, seed=1))
    still = torch.zeros(param.shape, dtype=torch.bool)
    still[(..., 1) if name not in ("rows", "matrix") else 1] = True
    still.view(-1)[0] = True
    param.grad[still] = -0.0
    before = param.detach().clone()
    AGD([{"params": [param], "lr": 100.0, **options}], fused=True).step()
    assert torch.equal(bits(before[still]), bits(param.detach()[still]))
    moved = param.detach() != before
    assert int(moved.sum()) > 0.9 * int((~still).sum())


@with_kernel
@pytest.mark.parametrize("size", [5e-324, 1e-310, 1e-200, 1e-160, 1e160, 1e300])
@pytest.mark.parametrize("name", ["matrix", "taps", "taps in long runs", "rows", "columns"])
def test_float64_gradients_of_any_size_take_steps_of_the_same_size(name: str, size: float) -> None:
    """Beside an ordinary tensor, which sets eta; huge ones set it themselves."""
    make, options = VIEWS[name]
    weight = make().double()
    sign = torch.where(random(*weight.shape, seed=1) > 0, 1.0, -1.0).double()
    grad = torch.empty_like(weight).copy_(sign * size)
    param, other = nn.Parameter(torch.zeros_like(weight)), nn.Parameter(random(3, 3).double())
    param.grad, other.grad = grad, random(3, 3, seed=2).double()
    group = oracles.PUBLISHED | options
    parts = oracles.parts_of(weight.shape, group)
    optimizer = AGD([{"params": [param], **options}, {"params": [other]}], fused=True)
    optimizer.step()
    assert math.isfinite(optimizer.gradient_summary)
    expected = float(optimizer.eta) / 2 * oracles.radius_of(weight.shape, group) * parts.length
    moved = oracles.norm(parts.view(param.detach()), parts.dims)
    torch.testing.assert_close(moved, torch.full_like(moved, expected), rtol=1e-9, atol=0.0)
    assert torch.equal(param.detach().sign(), -sign)


@with_kernel
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["matrix of many units", "taps of many units", "taps in long runs"])
def test_one_bad_entry_anywhere_voids_the_step(name: str, dtype: torch.dtype, bad: float) -> None:
    for where in (0, -1, 12_345):
        params = [nn.Parameter(VIEWS[name][0]().to(dtype)), nn.Parameter(random(3, 3, dtype=dtype))]
        for i, param in enumerate(params):
            param.grad = torch.empty_like(param).copy_(random(*param.shape, seed=i))
        flat = params[0].grad.permute(0, 2, 3, 1) if name == "taps in long runs" else params[0].grad
        flat.view(-1)[where] = bad  # in the order of memory
        before = [bits(param) for param in params]
        optimizer = AGD(params, fused=True)
        optimizer.step()
        assert all(torch.equal(a, bits(b)) for a, b in zip(before, params, strict=True))
        assert (int(optimizer.skipped_steps), float(optimizer.eta)) == (1, 0.0)
        optimizer.param_groups[0]["error_if_nonfinite"] = True
        with pytest.raises(RuntimeError, match="nothing moved"):
            optimizer.step()
        assert all(torch.equal(a, bits(b)) for a, b in zip(before, params, strict=True))


# -- what is served, and what is refused -------------------------------------------------------------------


@with_kernel
@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (lambda: random(4, 6)[:, ::2], "do not fill one piece of memory"),
        (lambda: random(4, 3).to(torch.float8_e5m2), "float8_e5m2"),
    ],
    ids=["gaps", "type"],
)
def test_weights_that_cannot_be_served_are_refused_at_construction(weight, reason):
    tensor = weight()
    refused = refusal(lambda: AGD([nn.Parameter(tensor, requires_grad=True)], fused=True))
    assert "AGD: fused=True cannot be honoured" in refused
    assert reason in refused
    assert str(tuple(tensor.shape)) in refused
    assert "fused=None" in refused


@with_kernel
def test_gradients_that_cannot_be_served_are_refused_before_anything_moves() -> None:
    first, second = nn.Parameter(random(2, 3)), nn.Parameter(random(4, 3))
    optimizer = AGD([{"params": [first]}, {"params": [second]}], fused=True)
    first.grad, second.grad = random(2, 3), random(3, 4).t()
    before = first.detach().clone()
    assert "strides" in refusal(optimizer.step)
    assert torch.equal(first, before)
    assert math.isnan(optimizer.eta)


@with_kernel
def test_one_step_size_for_what_is_served_and_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    served = []

    class Counted(cpu_agd.AGDStep):
        def __init__(self, tensors):
            served.append(len(tensors))
            super().__init__(tensors)

    monkeypatch.setattr(cpu_agd, "AGDStep", Counted)
    make = lambda: [nn.Parameter(random(4, 3)), nn.Parameter(random(4, 6, seed=1)[:, ::2])]  # noqa: E731
    mixed, plain = make(), make()
    for params in (mixed, plain):
        for i, param in enumerate(params):
            param.grad = torch.empty_like(param).copy_(random(4, 3, seed=2 + i))
    optimizer, other = AGD(mixed), AGD(plain, foreach=False)
    optimizer.step()
    other.step()
    assert served == [1]
    torch.testing.assert_close(optimizer.eta, other.eta, rtol=1e-6, atol=0.0)
    for ours, theirs in zip(mixed, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    for options in ({"fused": False}, {"foreach": True}, {"foreach": False}):
        served.clear()
        optimizer.param_groups[0].update({"fused": None, "foreach": None} | options)
        optimizer.step()
        assert not served, options


@with_kernel
def test_autograd_sees_that_weights_changed() -> None:
    weight = nn.Parameter(random(4, 3))
    optimizer = AGD([weight], fused=True)
    loss = (weight * weight).sum()
    weight.grad = random(4, 3, seed=1)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_a_library_other_forms_serve_and_true_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_library", lambda: "not built: no C compiler was found")
    weight = nn.Parameter(random(4, 3))
    optimizer = AGD([weight])
    before, weight.grad = weight.detach().clone(), random(4, 3, seed=1)
    optimizer.step()
    assert not torch.equal(weight, before)
    assert "no C compiler" in refusal(lambda: AGD([nn.Parameter(random(4, 3))], fused=True))
