"""`constrain` against worked numbers and slow float64 forms, and what it leaves alone."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from archopt.optim.constrain import constrain
from archopt.optim.lamb import Lamb
from archopt.optim.madam import Madam
from reference.lamb import LambReference
from reference.madam import MadamReference
from reference.trajectories import (
    assert_close,
    bits,
    follow,
    gradients_of,
    initial_weights,
    parameter,
    worked_example,
)

FORMS = pytest.mark.parametrize("foreach", [False, True], ids=["plain", "foreach"])


def lamb_cs(params: Any, **options: Any) -> Lamb:
    return constrain(Lamb(params, **{"lr": 0.01, "betas": (0.0, 0.999), **options}))


def is_balanced(weight: Tensor, tolerance: float = 1e-6) -> bool:
    rows = weight.detach().double().flatten(1)
    return bool((rows.mean(1).abs() < tolerance).all() & ((rows.norm(dim=1) - 1).abs() < tolerance).all())


def step(optimizer: Optimizer, *gradients: Any) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = None if gradient is None else torch.as_tensor(gradient, dtype=param.dtype).view_as(param)
    optimizer.step()


# -- worked numbers ----------------------------------------------------------------------------------------


@FORMS
def test_worked_example_of_constrained_lamb(foreach: bool) -> None:
    optimizer, weight, _, ws, bs = worked_example(lambda p: lamb_cs(p, foreach=foreach))
    assert_close(ws[0], "1 2 -4 0.5 -1 3")  # not projected at construction
    assert_close(
        ws[1], "0.28845578033 0.517281706966 -0.805737487295 -0.120505870436 -0.639110168894 0.75961603933"
    )
    assert_close(
        ws[2], "0.298211400885 0.509151445577 -0.807362846463 -0.120505870436 -0.639110168894 0.75961603933"
    )
    assert_close(
        ws[3], "0.297522381231 0.509729754273 -0.807252135504 -0.115227735144 -0.642416079495 0.757643814639"
    )
    assert_close(bs[1], "0.297450758943 -0.197450221572 0")
    assert_close(bs[2], "0.295133432366 -0.198269841123 -0.00258931954961")
    assert_close(bs[3], "0.297416757084 -0.19966881394 -0.000250208387915")
    assert_close(optimizer.state[weight]["weight_norm"], "1.41421356237")
    assert_close(optimizer.state[weight]["trust_ratio"], "0.0307737077402")


@FORMS
def test_worked_example_of_constrained_madam(foreach: bool) -> None:
    optimizer, weight, _, ws, bs = worked_example(lambda p: constrain(Madam(p, foreach=foreach)))
    assert_close(
        ws[1], "0.290760266719 0.515372354697 -0.806132621416 -0.118903526574 -0.640117006403 0.759020532977"
    )
    assert_close(
        ws[2], "0.295218848992 0.511658634339 -0.806877483331 -0.118903526574 -0.640117006403 0.759020532977"
    )
    assert_close(
        ws[3], "0.296274022794 0.510775940034 -0.807049962828 -0.115438803063 -0.642284464215 0.757723267278"
    )
    assert_close(bs[1], "0.297014950125 -0.19800996675 0")
    assert_close(bs[2], "0.293282193101 -0.198897655338 0")
    assert_close(bs[3], "0.297748282806 -0.200747972381 0")
    assert_close(optimizer.state[weight]["max"], "6.84653196881")  # of the raw weights


# -- against the slow forms --------------------------------------------------------------------------------

FLAGS = [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize(
    ("zero_mean", "unit_norm", "options"),
    [(*flags, {}) for flags in FLAGS] + [(True, True, {"betas": (0.9, 0.999), "weight_decay": 0.05})],
)
def test_constrained_lamb_equals_the_float64_reference(
    zero_mean: bool, unit_norm: bool, options: dict[str, Any]
) -> None:
    flags = {"zero_mean": zero_mean, "unit_norm": unit_norm}
    weights, options = initial_weights(seed=3), {"betas": (0.0, 0.999), **options}
    follow(
        lambda params, foreach: constrain(Lamb(params, foreach=foreach, **options), **flags),
        LambReference(weights, **options, **flags),
        weights,
        gradients_of(seed=3),
    )


@pytest.mark.parametrize(("zero_mean", "unit_norm"), FLAGS)
def test_constrained_madam_equals_the_float64_reference(zero_mean: bool, unit_norm: bool) -> None:
    flags = {"zero_mean": zero_mean, "unit_norm": unit_norm}
    weights = initial_weights(seed=4)
    follow(
        lambda params, foreach: constrain(Madam(params, foreach=foreach), **flags),
        MadamReference(weights, **flags),
        weights,
        gradients_of(seed=4),
        by_row=False,
    )


def test_constrained_madam_of_small_weights_whose_bound_acts_equals_the_float64_reference() -> None:
    weights = initial_weights(seed=5, scale=0.3)
    follow(
        lambda params, foreach: constrain(Madam(params, foreach=foreach)),
        MadamReference(weights, zero_mean=True, unit_norm=True),
        weights,
        gradients_of(seed=5, dense=True),
        by_row=False,
        pause=False,  # the published rule clamps at lr = 0 too, this one keeps every bit
    )


# -- which weights it touches ------------------------------------------------------------------------------


def test_first_step_projects_rows_without_gradient_too() -> None:
    weight = parameter([[1.0, 2.0, -4.0], [0.5, -1.0, 3.0]])
    step(lamb_cs([weight]), [[0.1, 0.2, 0.3], [0, 0, 0]])
    assert is_balanced(weight)


def test_tensor_without_gradient_is_left_alone() -> None:
    weight, other = parameter([[1.0, 2.0, -4.0]]), parameter([[1.0, 2.0, -4.0]])
    step(lamb_cs([weight, other]), None, [[0.1, 0.2, 0.3]])
    assert weight.tolist() == [[1.0, 2.0, -4.0]]
    assert is_balanced(other)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SGD(p, lr=0.0),
        lambda p: Lamb(p, lr=0.0),
        lambda p: Madam(p, lr=0.0),
        lambda p: AdamW(p, lr=torch.tensor(0.0)),
    ],
    ids=["SGD", "Lamb", "Madam", "AdamW with tensor lr"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lr_zero_keeps_every_bit(make: Callable[..., Optimizer], dtype: torch.dtype) -> None:
    weight = parameter([[1.0, -0.0, -4.0], [0.0, 0.0, 0.0], [2.0, 2.0, 2.0]], dtype)
    before = bits(weight)
    step(constrain(make([weight])), torch.ones(3, 3))
    assert bits(weight) == before


@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.1), lambda p: Lamb(p, weight_decay=0.1), Madam])
def test_zero_gradient_from_fresh_state_keeps_every_bit(make: Callable[..., Optimizer]) -> None:
    weight = parameter([[1.0, -0.0, -4.0], [0.0, 0.0, 0.0], [2.0, 2.0, 2.0]], torch.float32)
    before = bits(weight)
    step(constrain(make([weight])), torch.zeros(3, 3))
    assert bits(weight) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_balanced_row_that_the_step_left_alone_keeps_its_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = parameter(torch.randn(4, 7, generator=generator), dtype)
    optimizer = constrain(SGD([weight], lr=0.1))
    step(optimizer, torch.randn(4, 7, generator=generator))
    for _ in range(20):
        gradient = torch.randn(4, 7, generator=generator)
        gradient[1] = 0
        before = bits(weight[1]), bits(weight[2])
        step(optimizer, gradient)
        assert bits(weight[1]) == before[0]
        assert bits(weight[2]) != before[1]


def test_skipped_tensor_is_not_projected() -> None:
    weight = parameter([[1.0, 2.0, -4.0]], torch.float32)
    step(lamb_cs([weight]), [[float("nan"), 1.0, 1.0]])
    assert weight.tolist() == [[1.0, 2.0, -4.0]]


def test_vectors_scalars_rows_of_one_and_empty_tensors_are_never_projected() -> None:
    shapes = [(3,), (), (4, 1), (2, 1, 1, 1), (0, 3)]
    params = [torch.ones(shape, requires_grad=True) for shape in shapes]
    plain = [torch.ones(shape, requires_grad=True) for shape in shapes]
    gradients = [torch.full(shape, 0.5) for shape in shapes]
    step(constrain(SGD(params, lr=0.1)), *gradients)
    step(SGD(plain, lr=0.1), *gradients)
    assert [bits(p) for p in params] == [bits(p) for p in plain]


def test_zero_and_constant_rows_do_not_become_nan() -> None:
    weight = parameter([[0.0, 0.0, 0.0], [2.0, 2.0, 2.0], [1.0, 2.0, 4.0]], torch.float32)
    step(constrain(SGD([weight], lr=0.5)), [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.1, 0.2, 0.3]])
    assert weight[:2].tolist() == [[0.0, 0.0, 0.0], [1.5, 1.5, 1.5]]
    assert is_balanced(weight[2:])


def test_frozen_weights_are_left_alone() -> None:
    weight = parameter([[1.0, 2.0, -4.0]])
    optimizer = constrain(SGD([weight], lr=0.1))
    weight.requires_grad_(False)
    optimizer.step()
    assert weight.tolist() == [[1.0, 2.0, -4.0]]


def test_gradients_are_never_written() -> None:
    weight = parameter([[1.0, 2.0, -4.0]])
    optimizer = lamb_cs([weight])
    step(optimizer, [[0.1, 0.2, 0.3]])
    assert weight.grad.tolist() == [[0.1, 0.2, 0.3]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_stay_balanced(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = parameter(torch.randn(4, 64, generator=generator), dtype)
    optimizer = constrain(SGD([weight], lr=0.3))
    for _ in range(200):
        step(optimizer, torch.randn(4, 64, generator=generator) / 8)
        assert is_balanced(weight, 3e-3)


def test_closures_are_followed() -> None:
    weight = parameter([[1.0, 2.0, -4.0]])
    optimizer = constrain(SGD([weight], lr=0.1))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight[0, 0].square()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 1.0
    assert is_balanced(weight)


def test_channels_last_weights_keep_their_layout() -> None:
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last).requires_grad_()
    step(constrain(SGD([weight], lr=0.1)), torch.randn(4, 3, 2, 2))
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert is_balanced(weight, 1e-5)


# -- attaching, copies and removal -------------------------------------------------------------------------


def test_the_same_optimizer_comes_back() -> None:
    optimizer = AdamW([parameter([[1.0, 2.0]])])
    assert constrain(optimizer) is optimizer
    assert isinstance(optimizer, AdamW)
    assert repr(optimizer.constraint) == "Constraint(zero_mean=True, unit_norm=True)"


def test_project_now_balances_before_the_first_step() -> None:
    weight, bias = parameter([[1.0, 2.0, -4.0]]), parameter([1.0])
    constrain(SGD([weight, bias], lr=0.1), project_now=True)
    assert is_balanced(weight)
    assert bias.tolist() == [1.0]


def test_groups_added_later_are_constrained() -> None:
    optimizer = lamb_cs([parameter([[1.0, 2.0, -4.0]])])
    late = parameter([[1.0, 2.0, -4.0]])
    optimizer.add_param_group({"params": [late]})
    step(optimizer, [[0.1, 0.2, 0.3]], [[0.1, 0.2, 0.3]])
    assert is_balanced(late)


def through_pickle(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def through_file(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_file])
@pytest.mark.parametrize("make", [lamb_cs, lambda p: constrain(AdamW(p, lr=0.1), zero_mean=False)])
def test_copies_stay_constrained_and_go_on_with_the_same_bits(
    copied: Callable[[Any], Any], make: Callable[..., Optimizer]
) -> None:
    weight = parameter([[1.0, 2.0, -4.0], [0.5, -1.0, 3.0]])
    optimizer = make([weight])
    step(optimizer, torch.ones(2, 3))
    twin_weight, twin = copied((weight, optimizer))
    twin = copied((twin_weight, twin))[1]  # a copy of a copy
    twin_weight = twin.param_groups[0]["params"][0]
    assert type(twin) is type(optimizer)
    assert twin.constraint.zero_mean == optimizer.constraint.zero_mean
    step(optimizer, [[0.1, 0.2, 0.3], [0.3, 0.1, 0.2]])
    step(twin, [[0.1, 0.2, 0.3], [0.3, 0.1, 0.2]])
    assert bits(twin_weight) == bits(weight)
    assert twin_weight is not weight
    twin.constraint.remove()
    assert type(twin) in (Lamb, AdamW)


def test_state_dict_resumes_bit_equal() -> None:
    weight = parameter([[1.0, 2.0, -4.0], [0.5, -1.0, 3.0]], torch.float32)
    optimizer = lamb_cs([weight])
    step(optimizer, torch.ones(2, 3))
    resumed = weight.detach().clone().requires_grad_()
    loaded = lamb_cs([resumed])
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for k in range(3):
        gradient = torch.arange(6.0).view(2, 3) - k
        step(optimizer, gradient)
        step(loaded, gradient)
    assert bits(resumed) == bits(weight)


def test_remove_gives_the_plain_optimizer_back() -> None:
    weight = parameter([[1.0, 2.0, -4.0]])
    optimizer = constrain(SGD([weight], lr=1.0))
    constraint = optimizer.constraint
    constraint.remove()
    constraint.remove()  # again is nothing
    assert type(optimizer) is SGD
    assert not hasattr(optimizer, "constraint")
    step(optimizer, [[1.0, 0.0, 0.0]])
    assert weight.tolist() == [[0.0, 2.0, -4.0]]
    constrain(optimizer)
    step(optimizer, [[1.0, 0.0, 0.0]])
    assert is_balanced(weight)


def test_other_hooks_and_schedulers_go_on_working() -> None:
    weight = parameter([[1.0, 2.0, -4.0]])
    optimizer = SGD([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    seen: list[bool] = []
    constrain(optimizer)
    optimizer.register_step_post_hook(lambda *_: seen.append(is_balanced(weight)))
    for _ in range(2):
        step(optimizer, [[0.1, 0.2, 0.4]])
        scheduler.step()
    assert seen == [True, True]
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_a_dropped_optimizer_is_freed_at_once() -> None:
    import weakref

    optimizer = constrain(SGD([parameter([[1.0, 2.0]])], lr=0.1))
    ghost = weakref.ref(optimizer)
    del optimizer
    assert ghost() is None


def test_misuse_is_refused_with_the_remedy() -> None:
    optimizer = constrain(SGD([parameter([[1.0, 2.0]])], lr=0.1))
    with pytest.raises(ValueError, match=r"constrained already; call optimizer.constraint.remove\(\) first"):
        constrain(optimizer)
    with pytest.raises(TypeError, match=r"got a Linear, expected a torch.optim.Optimizer"):
        constrain(nn.Linear(2, 2))  # type: ignore[type-var]
    with pytest.raises(TypeError, match="zero_mean=0, expected True or False"):
        constrain(SGD([parameter([[1.0]])], lr=0.1), zero_mean=0)  # type: ignore[arg-type]
