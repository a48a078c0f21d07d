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
