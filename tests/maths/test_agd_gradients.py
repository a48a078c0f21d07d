"""AGD and gradients that are zero, tiny, huge, half precision, not finite, or missing."""

import pytest
import torch
from torch import Tensor, nn

from archopt.optim.agd import AGD
from maths.agd_cases import FORMS, bits, params, step


@FORMS
def test_what_has_no_gradient_keeps_every_bit(form: dict[str, bool]) -> None:
    weights = params((4, 3), (2, 3, 2, 1), (3, 3), (2, 2), dtype=torch.float32)
    with torch.no_grad():
        for weight in weights:
            weight[0] = -0.0
    before = [weight.detach().clone() for weight in weights]
    moving, tap = torch.randn(4, 3), torch.randn(2, 3, 2, 1)
    moving[0] = -0.0
    tap[:, :, 1] = 0.0
    step(weights, [moving, tap, torch.full((3, 3), -0.0), None], AGD(weights, **form))
    assert (weights[0].detach() != before[0])[1:].all()
    assert (weights[1].detach() != before[1])[:, :, 0].all()
    for kept, old in [
        (weights[0][0], before[0][0]),
        (weights[1][:, :, 1], before[1][:, :, 1]),
        (weights[2], before[2]),
        (weights[3], before[3]),
    ]:
        assert bits(kept) == bits(old)


@FORMS
def test_all_zero_gradients_move_nothing(form: dict[str, bool]) -> None:
    weights = params((4, 3), (2, 3, 2, 1))
    before = [bits(weight) for weight in weights]
    optimizer = step(weights, [torch.zeros_like(w) for w in weights], AGD(weights, **form))
    assert [bits(weight) for weight in weights] == before
    assert float(optimizer.eta) == 0 == float(optimizer.gradient_summary)
    assert int(optimizer.skipped_steps) == 0


@FORMS
@pytest.mark.parametrize("option", ["lr", "gain"])
def test_zero_rate_or_gain_keeps_every_bit_and_reports_the_step_size(
    option: str, form: dict[str, bool]
) -> None:
    weights = params((4, 3), (2, 3, 2, 1), dtype=torch.float32)
    with torch.no_grad():
        weights[0].fill_(-0.0)
    before = [bits(weight) for weight in weights]
    optimizer = AGD(weights, **form)
    optimizer.param_groups[0][option] = 0.0
    step(weights, [torch.randn_like(weight) for weight in weights], optimizer)
    assert [bits(weight) for weight in weights] == before
    assert float(optimizer.eta) > 0


@FORMS
@pytest.mark.parametrize("tiny", [1e-18, 1e-30, 1e-40])
def test_tiny_gradients_beside_ordinary_ones_take_steps_of_the_same_size(
    tiny: float, form: dict[str, bool]
) -> None:
    weights = params((4, 3), (4, 3), (2, 3, 2, 1), dtype=torch.float32)
    with torch.no_grad():
        for weight in weights:
            weight.zero_()  # so that the step can be read off exactly
    conv = torch.ones(2, 3, 2, 1)
    conv[:, :, 1] = tiny
    optimizer = step(weights, [torch.ones(4, 3), torch.full((4, 3), tiny), conv], AGD(weights, **form))
    unit = float(optimizer.eta) / 3
    for weight in weights[:2]:
        assert float(weight.detach().norm()) == pytest.approx(unit * (4 / 3) ** 0.5, rel=1e-5)
    assert weights[2].detach().pow(2).sum(dim=(0, 1)).sqrt() == pytest.approx(
        unit * (2 / 3 / 2) ** 0.5, rel=1e-5
    )
    mixed = torch.ones(4, 3)
    mixed[0] = tiny
    before = weights[0].detach().clone()
    step([weights[0]], [mixed])
    assert torch.equal(weights[0].detach()[0], before[0] - 0 * before[0])


@FORMS
@pytest.mark.parametrize("huge", [1e18, 1e30, 3e38])
def test_huge_finite_gradients_neither_overflow_nor_void_the_step(huge: float, form: dict[str, bool]) -> None:
    weights = params((4, 3), (2, 3, 2, 1), dtype=torch.float32)
    start = [weight.detach().clone() for weight in weights]
    optimizer = step(weights, [torch.full_like(w, huge) for w in weights], AGD(weights, **form))
    assert int(optimizer.skipped_steps) == 0
    moved = (weights[0].detach().double() - start[0].double()).norm()
    assert float(moved) == pytest.approx(float(optimizer.eta) / 2 * (4 / 3) ** 0.5, rel=1e-4)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_take_the_float32_step_rounded_once(
    dtype: torch.dtype, form: dict[str, bool]
) -> None:
    weights = params((64, 48), (8, 6, 3, 3), dtype=dtype)
    wide = [nn.Parameter(weight.detach().float()) for weight in weights]
    grads: list[Tensor | None] = [(torch.randn_like(w) * 300).to(dtype) for w in weights]
    one = step(weights, grads, AGD(weights, **form))
    other = step(wide, [grad.float() for grad in grads if grad is not None], AGD(wide, **form))
    torch.testing.assert_close(one.eta, other.eta, rtol=1e-12, atol=0)
    for half, full in zip(weights, wide, strict=True):
        assert torch.equal(half.detach(), full.detach().to(dtype))


def test_a_large_float16_gradient_does_not_overflow() -> None:
    weights = params((512, 512), dtype=torch.float16)
    optimizer = step(weights, [torch.full((512, 512), 300.0, dtype=torch.float16)])
    assert float(optimizer.gradient_summary) == pytest.approx(300 * 512, rel=1e-3)
    assert weights[0].isfinite().all()


@FORMS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_nonfinite_gradient_voids_the_whole_step_and_is_counted(bad: float, form: dict[str, bool]) -> None:
    weights = params((4, 3), (2, 3, 2, 1), (3, 3), dtype=torch.float32)
    with torch.no_grad():
        weights[2].fill_(-0.0)
    before = [bits(weight) for weight in weights]
    grads = [torch.randn_like(weight) for weight in weights]
    grads[1][1, 2, 0, 0] = bad
    optimizer = step(weights, grads, AGD(weights, **form))
    step(weights, grads, optimizer)
    assert [bits(weight) for weight in weights] == before
    assert int(optimizer.skipped_steps) == 2
    assert float(optimizer.eta) == 0
    assert not optimizer.gradient_summary.isfinite()
    grads[1][1, 2, 0, 0] = 1.0
    step(weights, grads, optimizer)
    assert all(bits(weight) != old for weight, old in zip(weights, before, strict=True))
    assert int(optimizer.skipped_steps) == 2


def test_error_if_nonfinite_raises_before_anything_moves() -> None:
    weights = dict(zip(("first", "second"), params((4, 3), (3, 2)), strict=True))
    before = [bits(weight) for weight in weights.values()]
    optimizer = AGD(weights.items(), error_if_nonfinite=True)
    grads = [torch.ones(4, 3).double(), torch.full((3, 2), float("nan")).double()]
    with pytest.raises(RuntimeError, match=r"gradient of second, shape \(3, 2\), is not finite"):
        step(list(weights.values()), grads, optimizer)
    assert [bits(weight) for weight in weights.values()] == before


def test_a_missing_gradient_keeps_its_share_reserved() -> None:
    weights = params((4, 4), (4, 4))
    before = weights[0].detach().clone()
    grad = torch.randn(4, 4).double()
    optimizer = step(weights, [grad, None])
    assert float(optimizer.gradient_summary) == pytest.approx(float(grad.norm()) / 2, rel=1e-12)
    assert float((weights[0].detach() - before).norm()) == pytest.approx(float(optimizer.eta) / 2, rel=1e-12)
    optimizer.zero_grad()
    optimizer.step()
    assert float(optimizer.eta) == 0 == float(optimizer.gradient_summary)


def test_freezing_and_unfreezing_recounts_the_depth() -> None:
    weights = params((4, 4), (4, 4))
    weights[1].requires_grad_(False)
    optimizer = AGD(weights)
    grad = torch.eye(4).double()
    step(weights, [grad, None], optimizer)
    assert float(optimizer.gradient_summary) == pytest.approx(2.0)
    weights[1].requires_grad_(True)
    step(weights, [grad, grad], optimizer)
    assert float(optimizer.gradient_summary) == pytest.approx(2.0)
    step(weights, [grad, None], optimizer)
    assert float(optimizer.gradient_summary) == pytest.approx(1.0)


def test_an_added_group_is_counted() -> None:
    weights = params((4, 4))
    optimizer = AGD(weights)
    later = params((4, 4))
    optimizer.add_param_group({"params": later, "gain": 2.0})
    before = later[0].detach().clone()
    step([*weights, *later], [torch.eye(4).double()] * 2, optimizer)
    assert float(optimizer.gradient_summary) == pytest.approx(2.0)
    assert float((later[0].detach() - before).norm()) == pytest.approx(float(optimizer.eta))


@FORMS
def test_accumulated_gradients_are_to_be_averaged(form: dict[str, bool]) -> None:
    """The average over parts of a batch is the step of the whole batch; the sum takes the step size of twice G."""
    x, y = torch.randn(8, 5).double(), torch.randn(8, 3).double()

    def stepped(parts: int, weight: float) -> tuple[Tensor, AGD]:
        torch.manual_seed(1)
        (w,) = params((3, 5))
        optimizer = AGD([w], **form)
        for inputs, targets in zip(x.chunk(parts), y.chunk(parts)):
            (weight * (inputs @ w.T - targets).square().mean()).backward()
        optimizer.step()
        return w.detach(), optimizer

    whole, once = stepped(1, 1.0)
    averaged, _ = stepped(2, 0.5)
    torch.testing.assert_close(averaged, whole, rtol=1e-12, atol=1e-12)
    _, summed = stepped(2, 1.0)
    assert float(summed.gradient_summary) == pytest.approx(2 * float(once.gradient_summary), rel=1e-12)
    assert float(summed.eta) > float(once.eta)


@FORMS
def test_a_network_whose_gradients_are_all_tiny_has_its_exact_step_size(form: dict[str, bool]) -> None:
    weights = params((4, 3), (2, 3, 2, 1), dtype=torch.float32)
    grads: list[Tensor | None] = [torch.full_like(weight, 1e-30) for weight in weights]
    optimizer = step(weights, grads, AGD(weights, **form))
    summary = 1e-30 * ((4 / 3) ** 0.5 * 12**0.5 + (2 / 3 / 2) ** 0.5 * 2 * 6**0.5) / 2
    assert float(optimizer.gradient_summary) == pytest.approx(summary, rel=1e-6)
    assert float(optimizer.eta) == pytest.approx(summary, rel=1e-6)  # eta is G where G is small
    assert int(optimizer.skipped_steps) == 0


def test_a_tied_weight_of_the_published_rule_is_one_tensor() -> None:
    """`parameters()` names it once, so it counts once in L; its gradient is the sum over both uses."""
    first = nn.Linear(4, 4, bias=False).double()
    second = nn.Linear(4, 4, bias=False).double()
    second.weight = first.weight
    before = first.weight.detach().clone()
    optimizer = AGD(nn.Sequential(first, second).parameters())
    second(first(torch.randn(3, 4).double())).square().mean().backward()
    assert first.weight.grad is not None
    summary = float(first.weight.grad.norm())
    optimizer.step()
    assert float(optimizer.gradient_summary) == pytest.approx(summary, rel=1e-12)
    assert float((first.weight.detach() - before).norm()) == pytest.approx(float(optimizer.eta), rel=1e-12)
