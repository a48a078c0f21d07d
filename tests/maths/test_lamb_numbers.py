"""LAMB against worked numbers, against a slow float64 form, and at its edges."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from archopt.optim.lamb import Lamb
from reference.lamb import LambReference
from reference.trajectories import (
    W0,
    assert_close,
    assert_near,
    bits,
    follow,
    gradients_of,
    initial_weights,
    parameter,
    worked_example,
)

FORMS = pytest.mark.parametrize("foreach", [False, True], ids=["plain", "foreach"])


def step_once(weight: Tensor, grad: Any, **options: Any) -> Lamb:
    optimizer = Lamb([weight], **options)
    weight.grad = torch.as_tensor(grad, dtype=weight.dtype).expand_as(weight).clone()
    optimizer.step()
    return optimizer


# -- worked numbers ----------------------------------------------------------------------------------------


@FORMS
def test_worked_example_with_defaults(foreach: bool) -> None:
    optimizer, weight, bias, ws, bs = worked_example(lambda p: Lamb(p, lr=0.01, foreach=foreach))
    assert_close(
        ws[1], "0.977182495687 2.02282111151 -4.02282231416 0.477177084469 -1.02282327637 3.02282351694"
    )
    assert_close(
        ws[2], "0.994409783703 2.03210514432 -4.05664887135 0.453818595306 -1.04618213502 3.04618262192"
    )
    assert_close(
        ws[3], "0.978648444234 2.00867662123 -4.08254678957 0.445500091554 -1.08245377738 3.06522443609"
    )
    assert_close(bs[1], "0.297450758943 -0.197450221572 0")
    assert_close(bs[2], "0.294764026351 -0.196336105525 -0.00207040281423")
    assert_close(bs[3], "0.296580742349 -0.197088839801 0.000875226576192")
    state = optimizer.state[weight]
    assert_close(state["exp_avg"], "0.0311 0.0428 0.0323 0.0124 0.0705 -0.0386")
    assert_close(
        state["exp_avg_sq"],
        "0.00034989001 0.00029991004 0.00013978009 0.00019968016 0.00033950025 0.00036928036",
    )
    assert_close(state["trust_ratio"], "0.94802921807")
    assert_close(optimizer.state[bias]["exp_avg"], "-0.0139 0.0047 -0.0055")
    assert_close(optimizer.state[bias]["trust_ratio"], "0.189386849531")


@FORMS
def test_worked_example_without_momentum(foreach: bool) -> None:
    optimizer, weight, bias, ws, bs = worked_example(
        lambda p: Lamb(p, lr=0.01, betas=(0.0, 0.999), foreach=foreach)
    )
    assert_close(
        ws[1], "0.977182495687 2.02282111151 -4.02282231416 0.477177084469 -1.02282327637 3.02282351694"
    )
    assert_close(
        ws[2], "1.0221547801 2.00161442805 -4.04912596373 0.477177084469 -1.02282327637 3.02282351694"
    )
    assert_close(
        ws[3], "0.989325968628 1.96615566604 -4.03873837482 0.494559332747 -1.04281967472 3.01643244892"
    )
    assert_close(bs[1], "0.297450758943 -0.197450221572 0")
    assert_close(bs[2], "0.295133432366 -0.198269841123 -0.00258931954961")
    assert_close(bs[3], "0.297416757084 -0.19966881394 -0.000250208387915")
    assert_close(optimizer.state[weight]["trust_ratio"], "0.122821428419")
    assert_close(optimizer.state[bias]["trust_ratio"], "0.00827151889103")


@FORMS
def test_worked_example_with_weight_decay(foreach: bool) -> None:
    *_, ws, bs = worked_example(
        lambda p: Lamb(p, lr=0.01, betas=(0.0, 0.999), weight_decay=0.1, foreach=foreach)
    )
    assert_close(
        ws[1], "0.97700766485 2.02277845313 -4.02263465758 0.477038480262 -1.0228531295 3.02270836755"
    )
    assert_close(
        ws[2], "1.02205505471 2.00116220121 -4.04846229129 0.476966611486 -1.0226990304 3.02225297798"
    )
    assert_close(
        ws[3], "0.989281832 1.96565388791 -4.03763728811 0.494195066146 -1.04246060836 3.01552787835"
    )
    assert_close(bs[3], "0.297413658076 -0.199666536003 -0.000247877450558")


@FORMS
def test_weight_norm_is_clamped_at_ten(foreach: bool) -> None:
    weight = parameter([[30, 40]])
    optimizer = step_once(weight, [[1, 2]], lr=0.01, foreach=foreach)
    assert_close(weight, "29.929289880887 39.929288762880")
    assert_close(optimizer.state[weight]["weight_norm"], "10")
    assert_close(optimizer.state[weight]["adam_norm"], "4.472029891917")
    assert_close(optimizer.state[weight]["trust_ratio"], "2.236121010299")


@FORMS
def test_no_bound_takes_the_whole_norm(foreach: bool) -> None:
    weight = parameter([[30, 40]])
    optimizer = step_once(weight, [[1, 2]], lr=0.01, max_weight_norm=None, foreach=foreach)
    assert_close(optimizer.state[weight]["weight_norm"], "50")
    assert_close(weight, "29.646449404435 39.646443814400")  # five times the bounded step


@FORMS
def test_without_trust_ratio_the_ratio_is_only_recorded(foreach: bool) -> None:
    weight = parameter([[3, 4]])
    optimizer = step_once(weight, [[1, 2]], lr=0.01, trust_ratio=False, foreach=foreach)
    assert_close(weight, "2.968378223367 3.968377723390")
    assert_close(optimizer.state[weight]["trust_ratio"], "1.118060505149")


@FORMS
def test_zero_tensor_moves_by_31_lr_at_its_first_step_without_momentum(foreach: bool) -> None:
    bias = parameter([0.0])
    step_once(bias, [1.0], lr=0.01, betas=(0.0, 0.999), foreach=foreach)
    assert_close(bias, "-0.316217766333")


@FORMS
def test_bias_correction_makes_the_first_direction_one(foreach: bool) -> None:
    weight = parameter([[3.0, 4.0]])
    optimizer = step_once(weight, [[1.0, -2.0]], lr=0.01, bias_correction=True, foreach=foreach)
    # m / (1 - beta1) = g and v / (1 - beta2) = g^2, so |u| = |g| / (|g| + eps) in each entry.
    u = torch.tensor([1 / (1 + 1e-6), -2 / (2 + 1e-6)], dtype=torch.float64)
    expected = torch.tensor([3.0, 4.0], dtype=torch.float64) - 0.01 * 5 / u.norm() * u
    assert torch.allclose(weight.detach()[0], expected, rtol=0, atol=1e-14)
    assert float(optimizer.state[weight]["adam_norm"]) == pytest.approx(float(u.norm()), abs=1e-14)


# -- against the slow form ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"betas": (0.0, 0.999)},
        {"betas": (0.0, 0.0)},
        {"betas": (0.9, 0.9), "eps": 1e-3},
        {"betas": (0.0, 0.999), "weight_decay": 0.1},
        {"weight_decay": 0.01, "bias_correction": True},
        {"max_weight_norm": 0.5},
        {"max_weight_norm": None, "betas": (0.5, 0.99)},
        {"trust_ratio": False, "betas": (0.0, 0.999)},
    ],
    ids=str,
)
def test_random_trajectory_equals_the_float64_reference(options: dict[str, Any]) -> None:
    weights = initial_weights(seed=2)
    follow(
        lambda params, foreach: Lamb(params, foreach=foreach, **options),
        LambReference(weights, **options),
        weights,
        gradients_of(seed=2),
    )


OPTIONS = [
    {},
    {"betas": (0.0, 0.999), "weight_decay": 0.1},
    {"bias_correction": True, "maximize": True},
    {"trust_ratio": False, "max_weight_norm": None, "eps": 0.0},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_foreach_form_equals_the_plain_form(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Weights and state, within the roundings of 20 steps (in half precision: of one step's, in units of it)."""
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    start, gradients = initial_weights(seed=6), gradients_of(seed=6)[:20]
    runs = []
    for foreach in (False, True):
        params = [parameter(w, dtype) for w in start] + [parameter(W0)]  # one of another type
        optimizer = Lamb(params, lr=0.01, foreach=foreach, **options)
        for t, step in enumerate(gradients):
            for k, (param, gradient) in enumerate(zip(params, [*step, torch.ones(2, 3)], strict=True)):
                param.grad = None if gradient is None else gradient.to(param.dtype)
                if t % 7 == k and param.grad is not None:
                    param.grad.view(-1)[0] = (float("nan"), float("inf"))[k % 2]
            optimizer.step()
        runs.append([(p.detach(), optimizer.state[p]) for p in params])
    for (plain, plain_state), (batched, batched_state) in zip(*runs, strict=True):
        assert_near(batched.double(), plain.double(), tolerance, False, "weights")
        for name in Lamb.state_names:
            a, b = batched_state[name], plain_state[name]
            assert a.dtype == b.dtype
            assert_near(a.double(), b.double(), min(tolerance, 1e-5), False, name)
    assert any(state["skipped"] for _, state in runs[0])


# -- edges -------------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e200])
def test_gradient_that_is_not_finite_leaves_tensor_and_statistics_and_is_counted(
    foreach: bool, bad: float
) -> None:
    weight, other = parameter([[1.0, 2.0], [3.0, -0.0]]), parameter([1.0, 2.0])
    optimizer = Lamb([weight, other], lr=0.1, weight_decay=0.1, foreach=foreach)
    for _ in range(2):
        weight.grad, other.grad = torch.ones_like(weight), torch.ones_like(other)
        optimizer.step()
    names = ("exp_avg", "exp_avg_sq", "weight_norm", "adam_norm", "trust_ratio")
    before = bits(weight), [bits(optimizer.state[weight][name]) for name in names]
    moved = bits(other)
    weight.grad[0, 1] = bad
    optimizer.step()
    assert (bits(weight), [bits(optimizer.state[weight][name]) for name in names]) == before
    assert bits(other) != moved
    assert optimizer.state[weight]["skipped"] == 1
    assert optimizer.state[other]["skipped"] == 0
    assert optimizer.state[weight]["step"] == 3
    weight.grad.fill_(1.0)
    optimizer.step()
    assert bits(weight) != before[0]
    assert bool(torch.isfinite(weight).all())


@FORMS
@pytest.mark.parametrize("eps", [1e-6, 0.0])
@pytest.mark.parametrize("size", [1e-18, 1e-22, 1e-26, 1e-30, 1e-38, 1e-44])
def test_tiny_gradients_give_finite_weights(foreach: bool, eps: float, size: float) -> None:
    weight, zero = parameter([[1.0, 2.0]], torch.float32), parameter([0.0, 0.0], torch.float32)
    optimizer = Lamb([weight, zero], lr=0.01, eps=eps, foreach=foreach)
    for _ in range(3):
        weight.grad, zero.grad = torch.tensor([[size, -size]]), torch.tensor([size, 0.0])
        optimizer.step()
    assert bool(torch.isfinite(weight).all() & torch.isfinite(zero).all())
    assert bool((weight - torch.tensor([[1.0, 2.0]])).abs().max() < 0.2)


@FORMS
def test_zero_gradient_from_fresh_state_keeps_every_bit_despite_decay(foreach: bool) -> None:
    weight = parameter([[1.0, -0.0], [1e-40, 3.0]], torch.float32)
    before = bits(weight)
    optimizer = Lamb([weight], lr=0.1, weight_decay=0.1, foreach=foreach)
    for _ in range(3):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert bits(weight) == before
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    weight.grad = torch.zeros_like(weight)
    awake = bits(weight)
    optimizer.step()
    assert bits(weight) != awake  # from its first gradient on, decay and momentum act as published


@FORMS
@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_lr_zero_keeps_every_bit_and_the_statistics_advance(foreach: bool, rate: Any) -> None:
    weight = parameter([[1.0, -0.0], [1e-40, 3.0]], torch.float32)
    before = bits(weight)
    optimizer = step_once(weight, 1.0, lr=rate, weight_decay=0.1, foreach=foreach)
    assert bits(weight) == before
    assert bool((optimizer.state[weight]["exp_avg"] > 0).all())


@FORMS
def test_no_gradient_is_no_step(foreach: bool) -> None:
    weight, other = parameter([1.0, 2.0]), parameter([1.0])
    optimizer = Lamb([weight, other], lr=0.1, foreach=foreach)
    other.grad = torch.ones_like(other)
    optimizer.step()
    assert weight.tolist() == [1.0, 2.0]
    assert optimizer.state[weight]["step"] == 0


@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_float32_statistics_also_after_loading(
    foreach: bool, dtype: torch.dtype
) -> None:
    def run(steps: range, weight: Tensor, optimizer: Lamb) -> None:
        for t in steps:
            weight.grad = torch.full_like(weight, 0.01 * (t + 1)) * weight.detach().sign()
            optimizer.step()

    start = torch.linspace(-1, 1, 12).reshape(3, 4)
    weight = parameter(start, dtype)
    optimizer = Lamb([weight], lr=0.01, foreach=foreach)
    run(range(5), weight, optimizer)
    resumed = weight.detach().clone().requires_grad_()
    loaded = Lamb([resumed], lr=0.01, foreach=foreach)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(range(5, 10), weight, optimizer)
    run(range(5, 10), resumed, loaded)
    assert bits(weight) == bits(resumed)
    for name in ("exp_avg", "exp_avg_sq"):
        assert loaded.state[resumed][name].dtype == torch.float32
        assert bits(loaded.state[resumed][name]) == bits(optimizer.state[weight][name])


@FORMS
def test_maximize_is_descent_on_the_negated_gradient(foreach: bool) -> None:
    up, down = parameter([[1.0, 2.0]]), parameter([[1.0, 2.0]])
    step_once(up, [[0.3, -0.2]], maximize=True, foreach=foreach)
    step_once(down, [[-0.3, 0.2]], foreach=foreach)
    assert bits(up) == bits(down)


@FORMS
@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_lr_equals_float_lr(foreach: bool, shape: tuple[int, ...]) -> None:
    results = []
    for lr in (0.125, torch.full(shape, 0.125)):
        params = [parameter([[1.0, 2.0]]), parameter(0.5)]
        optimizer = Lamb(params, lr=lr, weight_decay=0.1, foreach=foreach)
        for param in params:
            param.grad = torch.full_like(param, 0.3)
        optimizer.step()
        results.append([bits(p) for p in params])
    assert results[0] == results[1]


@FORMS
def test_strided_weights_keep_their_layout(foreach: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(4, 3, 2, 2, generator=generator) for _ in range(2))
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = start.clone().to(memory_format=layout).requires_grad_()
        weight.grad = grad.clone().to(memory_format=layout)
        Lamb([weight], lr=0.1, foreach=foreach).step()
        assert weight.is_contiguous(memory_format=layout)
        results.append(weight.detach())
    assert torch.allclose(*results, rtol=1e-5, atol=1e-7)


def test_module_is_its_named_parameters() -> None:
    model = nn.Linear(3, 2)
    assert Lamb(model).param_groups[0]["param_names"] == ["weight", "bias"]


def test_module_without_trainable_parameters_is_refused() -> None:
    model = nn.Linear(3, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="Lamb: Linear has no trainable parameters"):
        Lamb(model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr=-1.0, expected 0.0 <= lr"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\]=1.0"),
        ({"betas": (-0.1, 0.9)}, ValueError, r"betas\[0\]=-0.1"),
        ({"betas": 0.9}, TypeError, "expected two numbers"),
        ({"eps": -1e-8}, ValueError, "eps=-1e-08"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay=-0.1"),
        ({"max_weight_norm": -1.0}, ValueError, "max_weight_norm=-1.0"),
        ({"trust_ratio": 1}, TypeError, "trust_ratio=1, expected True or False"),
        ({"fused": True}, ValueError, "no fused form"),
        ({"weight_decey": 0.1}, TypeError, "did you mean 'weight_decay'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_options_are_refused_with_what_was_expected(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Lamb([parameter([1.0])], **options)
