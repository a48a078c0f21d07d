"""Madam against worked numbers, against a slow float64 form, and at its edges."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from archopt.optim.madam import Madam
from reference.madam import MadamReference
from reference.trajectories import (
    B0,
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


# -- worked numbers ----------------------------------------------------------------------------------------


@FORMS
def test_worked_example_with_defaults(foreach: bool) -> None:
    optimizer, weight, bias, ws, bs = worked_example(lambda p: Madam(p, foreach=foreach))
    assert_close(
        ws[1], "0.990049833749 2.02010033417 -4.04020066834 0.495024916875 -1.01005016708 3.03015050125"
    )
    assert_close(
        ws[2], "1.00341955744 2.00736250908 -4.07202232299 0.495024916875 -1.01005016708 3.03015050125"
    )
    assert_close(
        ws[3], "0.988842948821 1.9758838606 -4.05321071846 0.498875412619 -1.01909341751 3.02153042572"
    )
    assert_close(bs[1], "0.297014950125 -0.19800996675 0")
    assert_close(bs[2], "0.293282193101 -0.198897655338 0")
    assert_close(bs[3], "0.297748282806 -0.200747972381 0")
    assert_close(optimizer.state[weight]["max"], "6.84653196881")
    assert_close(optimizer.state[bias]["max"], "0.62449979984")


@FORMS
def test_weights_are_clamped_at_their_bound(foreach: bool) -> None:
    weight = parameter([0.1, 0.1, 0.1, 1.0])
    optimizer = Madam([weight], lr=0.5, foreach=foreach)
    for _ in range(4):
        weight.grad = torch.tensor([-1.0, 1.0, 0.0, -1.0], dtype=torch.float64)
        optimizer.step()
    assert_close(optimizer.state[weight]["max"], "1.522333734763833")
    assert_close(weight, "0.738905609893 0.013533528324 0.1 1.522333734764")


@FORMS
def test_constant_sum_map(foreach: bool) -> None:
    *_, ws, _ = worked_example(lambda p: Madam(p, lr=0.01, constant_sum=True, foreach=foreach), steps=1)
    expected = (
        "0.232570108501 0.474536672686 -0.707106781187 0.099295902774 -0.707106781187 0.607810878413",
        "0.235661285926 0.471445495260 -0.707106781187 0.099295902774 -0.707106781187 0.607810878413",
    )
    assert_close(ws[1], expected[0])
    *_, ws, _ = worked_example(lambda p: Madam(p, lr=0.01, constant_sum=True, foreach=foreach), steps=2)
    assert_close(ws[2], expected[1])


@FORMS
def test_constant_sum_counts_rows_and_kernel_not_fan_in(foreach: bool) -> None:
    weight = parameter(torch.linspace(-1, 1.1, 2 * 3 * 2 * 2).view(2, 3, 2, 2))
    vector, cube = parameter([200.0, -1.0]), parameter([[[1.0, -2.0]]])
    params = [weight, vector, cube]
    optimizer = Madam(params, constant_sum=True, sum_scale=0.7, sum_power=0.25, foreach=foreach)
    for param in params:
        param.grad = torch.full_like(param, 0.1)
    optimizer.step()
    total = 0.7 * (2 * 2 * 2) ** 0.25
    assert_close(weight.detach()[0].clamp_max(0).sum(), str(-total))  # row 0 has no positive entry: no 0/0
    assert_close(weight.detach()[1].clamp_min(0).sum(), str(total))
    assert vector[0] == 100.0  # vectors are clamped
    assert_close(cube, "0.990049833749 -2.020100334168")  # three dimensions: untouched by the map


# -- against the slow form ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.0},
        {"beta": 0.9, "p_scale": 2.0},
        {"g_bound": 1.5},
        {"beta": 0.9, "g_bound": 0.5, "p_scale": 5.0},
    ],
    ids=str,
)
def test_random_trajectory_equals_the_float64_reference(options: dict[str, Any]) -> None:
    weights = initial_weights(seed=0)
    follow(
        lambda params, foreach: Madam(params, foreach=foreach, **options),
        MadamReference(weights, **options),
        weights,
        gradients_of(seed=0),
        by_row=False,
    )


@pytest.mark.parametrize(
    "options",
    [{"p_scale": 0.5}, {"constant_sum": True}, {"constant_sum": True, "sum_scale": 2.0, "p_scale": 1.0}],
    ids=str,
)
def test_random_trajectory_where_the_bound_acts_equals_the_float64_reference(options: dict[str, Any]) -> None:
    weights = initial_weights(seed=1)
    follow(
        lambda params, foreach: Madam(params, foreach=foreach, **options),
        MadamReference(weights, **options),
        weights,
        gradients_of(seed=1, dense=True),
        by_row=False,
    )


OPTIONS = [{}, {"beta": 0.9, "g_bound": 0.5, "p_scale": 0.5}, {"constant_sum": True, "maximize": True}]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_foreach_form_equals_the_plain_form(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Weights and state, within the roundings of 20 steps (in half precision: of one step's, in units of it)."""
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    start, gradients = initial_weights(seed=6), gradients_of(seed=6)[:20]
    runs = []
    for foreach in (False, True):
        params = [parameter(w, dtype) for w in start] + [parameter(W0)]  # one of another type
        optimizer = Madam(params, lr=0.01, foreach=foreach, **options)
        for t, step in enumerate(gradients):
            for k, (param, gradient) in enumerate(zip(params, [*step, torch.ones(2, 3)], strict=True)):
                param.grad = None if gradient is None else gradient.to(param.dtype)
                if t % 7 == k and param.grad is not None:
                    param.grad.view(-1)[0] = (float("nan"), float("inf"))[k % 2]
            optimizer.step()
        runs.append([(p.detach(), optimizer.state[p]) for p in params])
    for (plain, plain_state), (batched, batched_state) in zip(*runs, strict=True):
        assert_near(batched.double(), plain.double(), tolerance, False, "weights")
        for name in Madam.state_names:
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
    optimizer = Madam([weight, other], lr=0.1, foreach=foreach)
    for _ in range(2):
        weight.grad, other.grad = torch.ones_like(weight), torch.ones_like(other)
        optimizer.step()
    before = bits(weight), bits(optimizer.state[weight]["exp_avg_sq"])
    moved = bits(other)
    weight.grad[0, 1] = bad
    optimizer.step()
    assert (bits(weight), bits(optimizer.state[weight]["exp_avg_sq"])) == before
    assert bits(other) != moved
    assert optimizer.state[weight]["skipped"] == 1
    assert optimizer.state[other]["skipped"] == 0
    assert optimizer.state[weight]["step"] == 3
    weight.grad.fill_(1.0)
    optimizer.step()
    assert bits(weight) != before[0]
    assert bool(torch.isfinite(weight).all())


@FORMS
@pytest.mark.parametrize("size", [1e-18, 1e-22, 1e-26, 1e-30, 1e-38, 1e-44])
def test_tiny_gradients_give_finite_weights(foreach: bool, size: float) -> None:
    weight = parameter([[1.0, -2.0]], torch.float32)
    optimizer = Madam([weight], lr=0.01, foreach=foreach)
    for _ in range(3):
        weight.grad = torch.tensor([[size, size]])
        optimizer.step()
    assert bool(torch.isfinite(weight).all())
    if size == 1e-18:  # its square still has all its digits
        assert_close(weight, "0.970445533549 -2.060909067906", 1e-6)


@FORMS
def test_large_steps_stay_within_the_bound(foreach: bool) -> None:
    weight = parameter([[1.0, -2.0, 0.0]], torch.float32)
    optimizer = Madam([weight], lr=1e4, foreach=foreach)
    weight.grad = torch.tensor([[-1.0, 1.0, 1.0]])
    optimizer.step()
    bound = float(optimizer.state[weight]["max"])
    assert weight.tolist() == [[bound, -bound, 0.0]]


@FORMS
def test_row_without_gradient_keeps_its_bits_even_beyond_the_bound(foreach: bool) -> None:
    weight = parameter([[1.0, -0.0, 9.0], [1.0, 2.0, 9.0]], torch.float32)
    vector = parameter([5.0, 0.1, 0.1], torch.float32)
    params = [weight, vector]
    optimizer = Madam(params, p_scale=0.5, foreach=foreach)
    before = bits(weight[0]), bits(vector[0])
    weight.grad = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    vector.grad = torch.tensor([0.0, 1.0, 0.0])
    optimizer.step()
    assert (bits(weight[0]), bits(vector[0])) == before
    assert weight[1, 2] == optimizer.state[weight]["max"]  # its row has a gradient: clamped as published
    assert vector[1] != 0.1


@FORMS
def test_zero_weights_never_move(foreach: bool) -> None:
    shift, weight = parameter([0.0, -0.0], torch.float32), parameter([[0.0, -0.0, 1.0]], torch.float32)
    before = bits(shift), bits(weight[0, :2])
    optimizer = Madam([shift, weight], foreach=foreach)
    for _ in range(3):
        shift.grad, weight.grad = torch.tensor([1.0, -1.0]), torch.tensor([[1.0, -1.0, 1.0]])
        optimizer.step()
    assert optimizer.state[shift]["max"] == 0
    assert (bits(shift), bits(weight[0, :2])) == before
    assert weight[0, 2] < 1


@FORMS
@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_lr_zero_keeps_every_bit_and_the_statistics_advance(foreach: bool, rate: Any) -> None:
    weight = parameter([[1.0, -0.0], [1e-40, 3.0]], torch.float32)
    before = bits(weight)
    optimizer = Madam([weight], lr=rate, p_scale=0.5, foreach=foreach)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert bits(weight) == before
    assert bool((optimizer.state[weight]["exp_avg_sq"] > 0).all())


@FORMS
def test_bound_is_that_of_the_weights_at_the_first_step(foreach: bool) -> None:
    weight = parameter([3.0, 4.0])
    optimizer = Madam([weight], foreach=foreach)
    with torch.no_grad():
        weight.mul_(2)  # after construction, as when a checkpoint is loaded
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert_close(optimizer.state[weight]["max"], str(3 * 50**0.5))


@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_float32_statistics_also_after_loading(
    foreach: bool, dtype: torch.dtype
) -> None:
    def run(steps: range, weight: Tensor, optimizer: Madam) -> None:
        for t in steps:
            weight.grad = torch.full_like(weight, 0.01 * (t + 1)) * weight.detach().sign()
            optimizer.step()

    weight = parameter(torch.linspace(-1, 1, 12).reshape(3, 4), dtype)
    optimizer = Madam([weight], lr=0.05, foreach=foreach)
    run(range(5), weight, optimizer)
    resumed = weight.detach().clone().requires_grad_()
    loaded = Madam([resumed], lr=0.05, foreach=foreach)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(range(5, 10), weight, optimizer)
    run(range(5, 10), resumed, loaded)
    assert bits(weight) == bits(resumed)
    for name in ("exp_avg_sq", "max"):
        assert loaded.state[resumed][name].dtype == torch.float32
        assert bits(loaded.state[resumed][name]) == bits(optimizer.state[weight][name])


@FORMS
def test_maximize_is_descent_on_the_negated_gradient(foreach: bool) -> None:
    results = []
    for sign, maximize in ((1.0, True), (-1.0, False)):
        weight = parameter(W0)
        weight.grad = torch.full_like(weight, sign)
        Madam([weight], maximize=maximize, foreach=foreach).step()
        results.append(bits(weight))
    assert results[0] == results[1] != bits(parameter(W0))


@FORMS
@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_lr_equals_float_lr(foreach: bool, shape: tuple[int, ...]) -> None:
    results = []
    for lr in (0.125, torch.full(shape, 0.125)):
        params = [parameter(W0), parameter(B0), parameter(0.5)]
        optimizer = Madam(params, lr=lr, foreach=foreach)
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
        Madam([weight], lr=0.1, constant_sum=True, foreach=foreach).step()
        assert weight.is_contiguous(memory_format=layout)
        results.append(weight.detach())
    assert torch.allclose(*results, rtol=1e-5, atol=0)


def test_module_is_its_named_parameters() -> None:
    assert Madam(nn.Linear(3, 2)).param_groups[0]["param_names"] == ["weight", "bias"]


def test_module_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="Madam: ReLU has no trainable parameters"):
        Madam(nn.ReLU())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr=-1.0, expected 0.0 <= lr"),
        ({"beta": 1.0}, ValueError, "beta=1.0, expected 0.0 <= beta < 1.0"),
        ({"p_scale": -1.0}, ValueError, "p_scale=-1.0"),
        ({"g_bound": float("nan")}, ValueError, "g_bound=nan"),
        ({"sum_scale": -0.5}, ValueError, "sum_scale=-0.5"),
        ({"constant_sum": 1}, TypeError, "constant_sum=1, expected True or False"),
        ({"fused": True}, ValueError, "no fused form"),
        ({"p_scal": 0.1}, TypeError, "did you mean 'p_scale'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_options_are_refused_with_what_was_expected(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Madam([parameter([1.0])], **options)
