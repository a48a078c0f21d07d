"""AGD's GPU kernels: accuracy, layouts, number formats, gradients that are not ordinary, void steps, refusals.

On a GPU the kernels are compiled; under `make test-triton` the same code runs in Triton's interpreter. What that
cannot show (graphs, waiting) is in test_on_a_gpu.py. Everything is held against AGD's rule in float64.
"""

import copy
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from archopt import AGD
from archopt.kernels import gpu, gpu_agd
from archopt.optim import oracles
from kernels.test_cpu import bits, channels_last, random, refusal
from kernels.test_cpu_agd import exact_step

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One rounding of the weight's own type, and what sums in float32 lose.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}

# How a weight lies in memory and falls into parts: every kind of work and the ends of its tiles, kept small for the
# interpreter.
VIEWS: dict[str, tuple[Any, dict[str, Any]]] = {
    "matrix": (lambda: random(9, 41), {}),
    "matrix, aligned": (lambda: random(64, 72), {}),
    "matrix of two units": (lambda: random(3, 6001), {}),
    "transposed": (lambda: random(40, 9).t(), {}),
    "taps": (lambda: random(6, 25, 3, 3), {}),
    "taps of two units": (lambda: random(33, 32, 2, 2), {}),
    "many taps": (lambda: random(4, 3, 5, 7), {}),
    "taps, channels last": (lambda: channels_last(random(6, 5, 3, 3)), {}),
    "taps, channels last, aligned": (lambda: channels_last(random(6, 16, 3, 3)), {}),
    "taps of five dimensions": (lambda: random(3, 4, 2, 3, 2), {}),
    "groups": (lambda: random(8, 3, 2, 2), {"norm": "frobenius", "groups": 4}),
    "groups in runs": (lambda: channels_last(random(8, 4, 2, 2)), {"norm": "frobenius", "groups": 2}),
    "slices": (lambda: random(12, 50), {"norm": "frobenius", "slices": 3}),
    "slices of columns": (lambda: random(50, 12), {"norm": "frobenius", "slices": 3, "neuron_dim": 1}),
    "filters": (lambda: random(70, 1, 3, 3), {"norm": "filters"}),
    "rows": (lambda: random(65, 40), {"norm": "rows"}),
    "long rows": (lambda: random(3, 1025), {"norm": "rows"}),
    "columns": (lambda: random(130, 20), {"norm": "rows", "neuron_dim": 1}),
    "vector": (lambda: random(300), {"norm": "rms"}),
    "slices of a vector": (lambda: random(300), {"norm": "rms", "slices": 3}),
    "entries": (lambda: random(200), {"norm": "max"}),
    "scalar": (lambda: random(), {"norm": "max"}),
}


def placed(tensor: Tensor, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tensor on the device, in the memory layout that it has."""
    return tensor.to(device, dtype, copy=True, memory_format=torch.preserve_format)


def parameter(name: str, device: str, dtype: torch.dtype = torch.float32, seed: int = 1) -> nn.Parameter:
    """A parameter that lies as a view does, with a gradient."""
    param = nn.Parameter(placed(VIEWS[name][0](), device, dtype))
    param.grad = torch.empty_like(param).copy_(random(*param.shape, seed=seed))
    return param


def options_of(name: str) -> dict[str, Any]:
    return VIEWS[name][1]


def gap(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().cpu().double() - expected.cpu()).norm() / expected.norm())


# -- the same step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VIEWS)
def test_every_layout_takes_the_step_of_float64(name: str, device: str) -> None:
    for dtype in DTYPES:
        param = parameter(name, device, dtype)
        assert param.grad is not None
        expected, summary = exact_step(param.detach().cpu(), param.grad.cpu(), options_of(name))
        optimizer = AGD([{"params": [param], **options_of(name)}], fused=True)
        optimizer.step()
        assert gap(param, expected) <= TOLERANCE[dtype]
        assert abs(float(optimizer.gradient_summary) / float(summary) - 1) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_some_steps_follow_the_plain_form(dtype: torch.dtype, device: str) -> None:
    """Tensors of all kinds in one optimizer, so one launch a pass; gradients that move to other memory."""
    names = ("matrix", "taps", "taps, channels last", "rows", "vector", "entries")
    params = [parameter(name, device, dtype) for name in names]
    twins = [nn.Parameter(param.detach().double().cpu()) for param in params]
    optimizer = AGD(groups(params, names), fused=True, gain=0.5)
    other = AGD(groups(twins, names), foreach=False, gain=0.5)
    for t in range(4):
        for i, (param, twin) in enumerate(zip(params, twins, strict=True)):
            param.grad = torch.empty_like(param).copy_(random(*param.shape, seed=10 * t + i))
            twin.grad = param.grad.double().cpu()
        for opt in (optimizer, other):
            for group in opt.param_groups:
                group["lr"] = 1.0 / (1 + t // 2)
        optimizer.step()
        other.step()
        assert float(optimizer.eta) == pytest.approx(float(other.eta), rel=1e-6)
    for param, twin in zip(params, twins, strict=True):
        assert gap(param, twin.detach()) <= 4 * TOLERANCE[dtype]


def groups(params: list[nn.Parameter], names: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{"params": [param], **options_of(name)} for param, name in zip(params, names, strict=True)]


def test_types_and_forms_share_one_step_size(device: str) -> None:
    """Three types, two of them served by launches of their own, and what no kernel serves, in one G."""
    make = lambda: [  # noqa: E731
        nn.Parameter(random(4, 3).to(device)),
        nn.Parameter(random(4, 3, seed=1).to(device, torch.bfloat16)),
        nn.Parameter(random(4, 3, seed=2).to(device, torch.float64)),
        nn.Parameter(random(4, 6, seed=3).to(device)[:, ::2]),
    ]
    mixed, plain = make(), make()
    for params in (mixed, plain):
        for i, param in enumerate(params):
            param.grad = torch.empty_like(param).copy_(random(4, 3, seed=4 + i))
    optimizer, other = AGD(mixed), AGD(plain, foreach=False)
    served = []
    begin = gpu_agd.AGDStep.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            gpu_agd.AGDStep,
            "__init__",
            lambda self, made, weights, paces: (served.append(len(paces)), begin(self, made, weights, paces))[
                1
            ],
        )
        optimizer.step()
    other.step()
    assert served == [1, 1]
    torch.testing.assert_close(optimizer.eta, other.eta, rtol=1e-6, atol=0.0)
    for ours, theirs in zip(mixed, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_rate_that_is_a_tensor_is_a_float_rate(device: str) -> None:
    rates = (
        0.3,
        torch.tensor(0.3, dtype=torch.float64),
        torch.tensor(0.3, dtype=torch.float64, device=device),
    )
    moved = []
    for lr in rates:
        params = [parameter("matrix", device), parameter("taps", device, seed=2)]
        optimizer = AGD([{"params": params[:1], "lr": lr}, {"params": params[1:]}], fused=True, maximize=True)
        optimizer.step()
        moved.append([bits(param.cpu()) for param in params])
    for other in moved[1:]:
        assert all(torch.equal(a, b) for a, b in zip(moved[0], other, strict=True))


def test_the_same_bits_every_time(device: str) -> None:
    pair = []
    for _ in range(2):
        names = ("matrix of two units", "taps", "taps, channels last", "rows")
        params = [parameter(name, device) for name in names]
        optimizer = AGD(groups(params, names), fused=True)
        optimizer.step()
        optimizer.step()
        pair.append([*map(bits, (param.cpu() for param in params)), bits(optimizer.gradient_summary.cpu())])
    assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))


# -- gradients that are not ordinary -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.5e-45, 1e-30, 1e-19, 1e18, 3e38])
@pytest.mark.parametrize("name", ["matrix", "taps", "taps, channels last", "rows"])
def test_gradients_of_any_size_take_steps_of_the_same_size(name: str, size: float, device: str) -> None:
    """Beside an ordinary tensor, which sets eta; huge ones set it themselves."""
    param, other = parameter(name, device), parameter("matrix", device)
    assert param.grad is not None
    sign = torch.where(param.grad > 0, 1.0, -1.0)
    param.grad.copy_(sign * size)
    with torch.no_grad():
        param.zero_()
    optimizer = AGD([{"params": [param], **options_of(name)}, {"params": [other]}], fused=True)
    optimizer.step()
    assert math.isfinite(optimizer.gradient_summary)
    group = oracles.PUBLISHED | options_of(name)
    parts = oracles.parts_of(param.shape, group)
    expected = float(optimizer.eta) / 2 * oracles.radius_of(param.shape, group) * parts.length
    moved = oracles.norm(parts.view(param.detach()), parts.dims)
    torch.testing.assert_close(moved, torch.full_like(moved, expected), rtol=2e-6, atol=0.0)
    assert torch.equal(param.detach().sign(), -sign)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["matrix", "taps", "taps, channels last, aligned", "rows", "entries"])
def test_parts_without_gradient_keep_their_bits(name: str, dtype: torch.dtype, device: str) -> None:
    param = parameter(name, device, dtype)
    assert param.grad is not None
    still = torch.zeros(param.shape, dtype=torch.bool, device=device)
    still[(..., 1) if param.ndim == 4 else 1] = True
    still[(0,) * param.ndim] = True
    with torch.no_grad():
        param[(0,) * param.ndim] = -0.0
        param.grad[still] = -0.0
    before = param.detach().clone()
    AGD([{"params": [param], "lr": 100.0, **options_of(name)}], fused=True).step()
    assert torch.equal(bits(before[still].cpu()), bits(param.detach()[still].cpu()))
    assert int((param.detach() != before).sum()) > 0.9 * int((~still).sum())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["matrix", "taps", "taps, channels last", "rows"])
def test_one_bad_entry_anywhere_voids_the_step(name: str, bad: float, device: str) -> None:
    params = [parameter(name, device), parameter("matrix", device, torch.bfloat16)]
    assert params[0].grad is not None
    params[0].grad[(-1,) * params[0].ndim] = bad
    before = [bits(param.cpu()) for param in params]
    optimizer = AGD([{"params": params[:1], **options_of(name)}, {"params": params[1:]}], fused=True)
    optimizer.step()
    assert all(torch.equal(a, bits(b.cpu())) for a, b in zip(before, params, strict=True))
    assert (int(optimizer.skipped_steps), float(optimizer.eta)) == (1, 0.0)


# -- what is kept, served and refused ----------------------------------------------------------------------


def test_nothing_is_uploaded_while_tensors_lie_where_they_lay(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded = []
    upload = gpu.Plans.upload
    monkeypatch.setattr(
        gpu.Plans,
        "upload",
        lambda self, values, device: (uploaded.append(values.numel()), upload(self, values, device))[1],
    )
    param = parameter("taps", device)
    optimizer = AGD([param], fused=True)
    optimizer.step()
    assert uploaded
    uploaded.clear()
    optimizer.step()
    assert not uploaded
    assert param.grad is not None
    param.grad = param.grad.clone()
    optimizer.step()
    assert uploaded == [12, 1], (
        "a line of the table and a distance; the list of units does not depend on places"
    )


def test_gradients_are_not_kept(device: str) -> None:
    param = parameter("taps", device)
    optimizer = AGD([param], fused=True)
    optimizer.step()
    assert param.grad is not None
    gone = weakref.ref(param.grad)
    param.grad = None
    assert gone() is None


def test_copies_and_loaded_states_work_on_their_own_tensors(device: str) -> None:
    model = nn.Linear(4, 3).to(device)
    optimizer = AGD(model, fused=True)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    twin, other = copy.deepcopy((model, optimizer))
    other.load_state_dict(optimizer.state_dict())
    before = model.weight.detach().clone()
    for param in twin.parameters():
        param.grad = torch.ones_like(param)
    other.step()
    assert torch.equal(model.weight, before)
    assert not torch.equal(twin.weight, before)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (lambda: random(4, 6)[:, ::2], "do not fill one piece of memory"),
        (lambda: random(4, 3).double(), "float64; the GPU kernels take"),
    ],
    ids=["gaps", "type"],
)
def test_weights_that_cannot_be_served_are_refused_at_construction(weight, reason, device: str):
    tensor = weight()
    tensor = tensor.to(device) if tensor.is_contiguous() else random(4, 6).to(device)[:, ::2]
    refused = refusal(lambda: AGD([nn.Parameter(tensor)], fused=True))
    assert "AGD: fused=True cannot be honoured" in refused
    assert reason in refused


def test_gradients_that_cannot_be_served_are_refused_before_anything_moves(device: str) -> None:
    first, second = parameter("matrix", device), nn.Parameter(random(4, 3).to(device))
    optimizer = AGD([first, second], fused=True)
    second.grad = random(3, 4).to(device).t()
    before = first.detach().clone()
    assert "strides" in refusal(optimizer.step)
    assert torch.equal(first, before)


def test_autograd_sees_that_weights_changed(device: str) -> None:
    param = parameter("matrix", device)
    optimizer = AGD([param], fused=True)
    loss = (param * param).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
