"""AutoNero's GPU kernels: they follow the foreach form; layouts, types, void steps, and no waiting.

On a GPU the kernels are compiled; under `make test-triton` the same code runs in Triton's interpreter.
"""

import copy
import functools
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import archopt
from archopt.kernels.gpu_autonero import ON_CHIP
from archopt.optim import autonero_fused
from kernels.test_autonero_fused import values
from kernels.test_cpu import refusal

ON_GPU = os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = "cuda" if ON_GPU else "cpu"

# Weights in float32 differ by some roundings. The movement is a difference of two weights over theta = 0.01.
WEIGHTS, MOVEMENT = 1e-5, 2e-4


# At the first angles of the default, from 1e-5 on, a movement in float32 is mostly the rounding of weights.
AutoNero = functools.partial(archopt.AutoNero, initial_theta=0.01)


class Net(nn.Module):
    """Rows of every kind: short, aligned or not, longer than a tile, in blocks, zero; a table, a head, vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 12, padding_idx=1)
        self.first = nn.Linear(12, 8)
        self.twin = nn.Linear(12, 8)
        self.odd = nn.Linear(13, 5, bias=False)
        self.wide = nn.Linear(ON_CHIP + 60, 2, bias=False)
        self.zero_rows = nn.Linear(8, 6, bias=False)
        self.filters = nn.Conv2d(4, 6, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.head = nn.Linear(8, 5)
        with torch.no_grad():
            self.zero_rows.weight[1::2] = 0
            self.filters.weight.data = self.filters.weight.data.contiguous(memory_format=torch.channels_last)


def build(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Net().to(DEVICE, dtype)


def give_gradients(model: nn.Module, t: int, skip: tuple[str, ...] = ()) -> None:
    generator = torch.Generator().manual_seed(t)
    for name, param in model.named_parameters():
        grad = torch.randn(param.shape, generator=generator).to(DEVICE, param.dtype)
        param.grad = None if name in skip else torch.empty_like(param).copy_(grad)
        if param.grad is not None and param.dim() == 2:
            param.grad[1] = 0


def steps(model: nn.Module, optimizer: archopt.AutoNero, times: range) -> None:
    for t in times:
        give_gradients(model, t, skip=("first.weight",) if t == 2 else ())
        optimizer.step()


def assert_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], weights: float, movement: float
) -> None:
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        gap, size = float((actual[name].double() - wanted.double()).norm()), float(wanted.double().norm())
        bound = movement if name.endswith(("movement", "feedback")) else weights
        assert gap <= bound * size, f"{name} differs by {gap:.3g} of {size:.3g}"


# -- the same step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"head": "turn", "radius_exponent": 0.5, "embedding_radius": "grow", "maximize": True},
        {"movement_dtype": "bfloat16", "beta": 0.0},
    ],
    ids=["default", "turning head", "bfloat16 movement"],
)
def test_float32_follows_foreach(options: dict[str, Any]) -> None:
    model, twin = build(), build()
    fused, foreach = AutoNero(model, fused=True, **options), AutoNero(twin, foreach=True, **options)
    steps(model, fused, range(5))
    steps(twin, foreach, range(5))
    # One digit of bfloat16, and what angles that the feedback makes of it differ by.
    weights, movement = (1e-4, 2.0**-7) if "movement_dtype" in options else (WEIGHTS, MOVEMENT)
    assert_close(values(model, fused), values(twin, foreach), weights, movement)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_follow_float32(dtype: torch.dtype) -> None:
    """One step: statistics and movement are those of float32 weights, and weights theirs once rounded."""
    model = build(dtype)
    exact = copy.deepcopy(model).float()
    fused, wide = AutoNero(model, fused=True), AutoNero(exact, fused=True)
    exact.load_state_dict(model.state_dict())
    give_gradients(model, 0)
    for param, twin in zip(model.parameters(), exact.parameters(), strict=True):
        twin.grad = param.grad.float()
    fused.step()
    wide.step()
    found, expected = values(model, fused), values(exact, wide)
    for name, _ in model.named_parameters():
        assert found[name].dtype == dtype
        expected[name] = expected[name].to(dtype)
        assert found[f"{name}/movement"].dtype == torch.float32
    assert_close(found, expected, torch.finfo(dtype).eps / 8, MOVEMENT)


def test_a_tensor_rate_is_a_float_rate() -> None:
    model, twin = build(), build()
    fused, other = AutoNero(model, fused=True, lr=0.3), AutoNero(twin, fused=True, lr=torch.tensor(0.3))
    for group in other.param_groups:
        group["lr"] = group["lr"].to(DEVICE)
    steps(model, fused, range(3))
    steps(twin, other, range(3))
    assert_close(values(twin, other), values(model, fused), WEIGHTS, MOVEMENT)


def test_the_same_bits_every_time() -> None:
    pair = []
    for _ in range(2):
        model = build()
        optimizer = AutoNero(model, fused=True)
        steps(model, optimizer, range(3))
        pair.append(values(model, optimizer))
    if ON_GPU:  # torch's matrix products may not be: what is left then is everything else
        pair = [
            {k: v for k, v in p.items() if "norm" in k or "tokens" in k or k.endswith("avg_sq")} for p in pair
        ]
    for name in pair[0]:
        assert torch.equal(pair[0][name], pair[1][name]), name


# -- steps that are void, or none --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_void_steps_keep_every_bit(value: float) -> None:
    model = build()
    optimizer = AutoNero(model, fused=True)
    steps(model, optimizer, range(2))
    before = values(model, optimizer)
    give_gradients(model, 2, skip=("twin.weight",))
    for name, param in model.named_parameters():
        if value == 0 and param.grad is not None:
            param.grad.zero_()
        elif name == "norm.bias":
            param.grad[1] = value
    optimizer.step()
    after = values(model, optimizer)
    for name, expected in before.items():
        if not name.endswith("feedback"):
            assert torch.equal(after[name], expected), name
    assert int(optimizer.skipped) == (value != 0)


def test_zero_rate_keeps_weights_and_counts_on() -> None:
    model = build()
    optimizer = AutoNero(model, fused=True, lr=0.0)
    before = [param.detach().clone() for param in model.parameters()]
    steps(model, optimizer, range(2))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert int(optimizer.state[model.head.weight]["step"]) == 2


# -- state, and what is served -----------------------------------------------------------------------------


def test_state_goes_to_foreach_and_back_to_the_bit() -> None:
    model = build()
    optimizer = AutoNero(model, fused=True)
    steps(model, optimizer, range(2))
    twin = copy.deepcopy(model)
    other = AutoNero(twin, foreach=True, embedding_radius="own")
    other.load_state_dict(optimizer.state_dict())
    again = copy.deepcopy(twin)
    third = AutoNero(again, fused=True, embedding_radius="own")
    third.load_state_dict(other.state_dict())
    expected, found = values(model, optimizer), values(again, third)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_tensor_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    optimizer = AutoNero(model)
    served = []
    make = autonero_fused.GpuPasses
    monkeypatch.setattr(
        autonero_fused,
        "GpuPasses",
        lambda tensors, *args, **rest: served.extend(tensors) or make(tensors, *args, **rest),
    )
    steps(model, optimizer, range(1))
    assert {id(tensor.weight) for tensor in served} == {id(param) for param in model.parameters()}


def test_what_is_not_served_is_refused_with_the_reason() -> None:
    for layer, reason in (
        (nn.Linear(3, 4).double(), "float64"),
        (nn.ConvTranspose2d(2, 3, 2), "not neighbours"),
    ):
        assert reason in refusal(lambda layer=layer: AutoNero(layer.to(DEVICE), fused=True))


# -- on a GPU alone ----------------------------------------------------------------------------------------


def test_no_step_waits_for_the_device(real_gpu: None) -> None:
    model = build()
    optimizer = AutoNero(model, fused=True)
    steps(model, optimizer, range(2))
    give_gradients(model, 3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_step_is_the_step(real_gpu: None) -> None:
    model, twin = build(), build()
    optimizer, other = (AutoNero(net, fused=True, capturable=True) for net in (model, twin))
    give_gradients(model, 0)
    give_gradients(twin, 0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    graph.replay()
    graph.replay()
    for _ in range(4):
        other.step()
    torch.cuda.synchronize()
    assert_close(values(model, optimizer), values(twin, other), WEIGHTS, MOVEMENT)
