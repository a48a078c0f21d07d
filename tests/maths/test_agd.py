"""AGD's rule: worked numbers, equality with the slow reference, invariances, forms, round trips, refusals."""

import copy
import io
import math
import pickle
from decimal import Decimal, getcontext

import pytest
import torch
from torch import Tensor, nn

from archopt.optim.agd import AGD, agd_step_size
from maths.agd_cases import FORMS, bits, forms, params, step
from reference.agd import Block, agd_step

# 2304.05187's rule on three tensors, three steps: s*sum of norms of A, B, C; then G and eta.
WORKED_SUMMARY = (
    (0.600000000000, 0.683130051064, 2.210466148094, 1.164532066386, 0.524338525026),
    (0.533853912602, 0.683130051064, 2.072528542580, 1.096504168748, 0.507052311245),
    (0.533853912602, 0.683130051064, 1.406828584678, 0.874604182781, 0.444989342719),
)
WORKED_WEIGHTS = (
    (
        "0.187389754171 0.156305122914 0.431084631257 0.400000000000 0.368915368743 0.643694877086",
        "0.067056733494 -0.048829799518 0.235283667471 -0.285283667471 0.198829799518 -0.317056733494",
        "-0.508587821751 0.131876209262 -0.298234777189 0.350000000000 -0.201765222811 0.568123790738 "
        "0.008587821751 -0.413752418524 0.218940866313 -0.195628627786 0.429293910876 0.022495162952",
    ),
    (
        "0.234879554215 0.061325522826 0.526064231345 0.352510199956 0.511384768876 0.643694877086",
        "0.017573494741 -0.065324212435 0.251778080388 -0.235800428717 0.281301864106 -0.399528798083",
        "-0.479313142912 0.087102396397 -0.259201872070 0.327613093568 -0.152974091412 0.568123790738 "
        "-0.040203309647 -0.391365512092 0.179907961195 -0.150854814922 0.400019232037 0.089655882249",
    ),
    (
        "0.234879554215 -0.063705688582 0.567741301815 0.269156059017 0.594738909815 0.602017806616",
        "0.089951016744 -0.137701734439 0.208351567186 -0.250275933118 0.295777368507 -0.356102284881",
        "-0.461740547061 0.087102396397 -0.232842978293 0.327613093568 -0.117828899709 0.568123790738 "
        "0.003728179982 -0.391365512092 0.135976471566 -0.150854814922 0.364874040333 0.089655882249",
    ),
)
STEP_SIZES = (
    (0.01, 0.009853248279),
    (0.1, 0.087651818647),
    (0.5, 0.311905358182),
    (1, 0.481211825060),
    (2, 0.693147180560),
    (4, 0.940613642107),
    (10, 1.308754924799),
    (100, 2.352564283063),
    (1e4, 4.610170165155),
)


class Worked(nn.Module):
    """The tensors A (3, 2), B (2, 3) and C (2, 3, 2, 1) of the worked numbers, as layers without biases."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.a = nn.Linear(2, 3, bias=False)
        self.b = nn.Linear(3, 2, bias=False)
        self.c = nn.Conv2d(3, 2, (2, 1), bias=False)
        self.to(dtype)
        i = torch.arange(12, dtype=dtype)
        with torch.no_grad():
            self.a.weight.copy_(((i[:6] + 1) / 10).view(3, 2))
            self.b.weight.copy_(((-1) ** i[:6] * (i[:6] + 1) / 20).view(2, 3))
            self.c.weight.copy_((((7 * i) % 12 - 5.5) / 10).view(2, 3, 2, 1))

    def set_gradients(self, t: int) -> None:
        i = torch.arange(12, dtype=self.a.weight.dtype)
        self.a.weight.grad = (((3 * i[:6] + t) % 7 - 3) / 10).view(3, 2)
        self.b.weight.grad = (((5 * i[:6] + 2 * t) % 6 - 2.5) / 5).view(2, 3)
        self.c.weight.grad = (((5 * i + t) % 11 - 5) / 4).view(2, 3, 2, 1)
        if t == 3:
            self.c.weight.grad[:, :, 1, :] = 0


# -- the published rule ------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("constructor", ["parameters", "module"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-6)])
def test_worked_numbers_of_the_published_rule(
    dtype: torch.dtype, tolerance: float, constructor: str, form: dict[str, bool]
) -> None:
    model = Worked(dtype)
    optimizer = AGD(model if constructor == "module" else model.parameters(), **form)
    for t in (1, 2, 3):
        model.set_gradients(t)
        optimizer.step()
        *terms, summary, eta = WORKED_SUMMARY[t - 1]
        assert abs(float(optimizer.gradient_summary) - summary) < tolerance
        assert abs(sum(terms) / 3 - summary) < 1e-11
        assert abs(float(optimizer.eta) - eta) < tolerance
        for layer, numbers in zip((model.a, model.b, model.c), WORKED_WEIGHTS[t - 1], strict=True):
            expected = torch.tensor([float(number) for number in numbers.split()], dtype=dtype)
            assert (layer.weight.detach().flatten() - expected).abs().max() < tolerance


@FORMS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_the_reference_over_60_steps(
    dtype: torch.dtype, tolerance: float, form: dict[str, bool]
) -> None:
    shapes = [(4, 3), (2, 5), (3, 2, 3), (4, 2, 2, 3), (2, 3, 2, 1, 2), (1, 4), (3, 1)]
    weights = params(*shapes, dtype=dtype)
    blocks = [Block("published") for _ in shapes]
    expected = [weight.detach().clone().to(torch.float64) for weight in weights]
    optimizer = AGD(weights, gain=1.5, **form)
    for t in range(60):
        grads: list[Tensor | None] = [torch.randn_like(weight) * 10.0 ** (t % 5 - 3) for weight in weights]
        grads[t % 3] = None if t % 4 == 1 else grads[t % 3]  # rows that sleep and wake
        grads[3][:, :, t % 2] = 0
        lr = optimizer.param_groups[0]["lr"] = 1 / (1 + t % 7)
        step(weights, grads, optimizer)
        expected, eta, summary = agd_step(expected, grads, blocks, gain=1.5, lr=lr)
        assert float(optimizer.eta) == pytest.approx(eta, rel=tolerance)
        assert float(optimizer.gradient_summary) == pytest.approx(summary, rel=tolerance)
        for weight, reference in zip(weights, expected, strict=True):
            assert (weight.detach() - reference).norm() <= tolerance * reference.norm()


def test_only_four_dimensions_are_divided_by_the_kernel_as_published() -> None:
    for shape, radius in [((4, 2, 5), 2**0.5), ((4, 2, 5, 2), 0.2**0.5), ((4, 2, 5, 1, 2), 2**0.5)]:
        (weight,) = params(shape)
        before = weight.detach().clone()
        optimizer = step([weight], [torch.randn(shape, dtype=torch.float64)])
        taps = (before - weight.detach()).pow(2).sum(dim=(0, 1)).sqrt()
        torch.testing.assert_close(taps, float(optimizer.eta) * radius * torch.ones_like(taps))


# -- the step size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("summary", "eta"), STEP_SIZES)
def test_step_size_has_the_tabulated_values(summary: float, eta: float) -> None:
    assert abs(float(agd_step_size(torch.tensor(summary, dtype=torch.float64))) - eta) < 1e-11


def test_step_size_keeps_its_digits_for_small_summaries() -> None:
    getcontext().prec = 60
    for exponent in range(-20, -2):
        summary = 10.0**exponent
        exact = ((1 + (1 + 4 * Decimal(summary)).sqrt()) / 2).ln()
        assert float(agd_step_size(torch.tensor(summary, dtype=torch.float64))) == pytest.approx(
            float(exact), rel=1e-12
        )


def test_step_size_is_monotone_and_solves_its_equation() -> None:
    summary = torch.logspace(-18, 12, 500, dtype=torch.float64)
    eta = agd_step_size(summary)
    assert (eta.diff() > 0).all()
    torch.testing.assert_close((2 * eta).exp() - eta.exp(), summary, rtol=1e-9, atol=1e-15)
    assert float(agd_step_size(torch.tensor(2.0, dtype=torch.float64))) == pytest.approx(
        math.log(2), rel=1e-15
    )


# -- invariances -------------------------------------------------------------------------------------------


@FORMS
def test_rescaling_the_loss_changes_nothing_but_the_step_size(form: dict[str, bool]) -> None:
    shapes = [(4, 3), (2, 3, 2, 2)]
    start, grads = params(*shapes), [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    moves, summaries = [], []
    for scale in (1.0, 37.0):
        weights = [nn.Parameter(weight.detach().clone()) for weight in start]
        optimizer = step(weights, [scale * grad for grad in grads], AGD(weights, **form))
        moves.append([(w.detach() - s.detach()) / optimizer.eta for w, s in zip(weights, start, strict=True)])
        summaries.append(optimizer.gradient_summary / scale)
    torch.testing.assert_close(moves[0], moves[1], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(summaries[0], summaries[1], rtol=1e-13, atol=0)


def test_rescaling_one_gradient_changes_the_others_by_the_step_size_alone() -> None:
    start, grads = params((4, 3), (3, 5)), [torch.randn(4, 3).double(), torch.randn(3, 5).double()]
    moves = []
    for scale in (1.0, 100.0):
        weights = [nn.Parameter(weight.detach().clone()) for weight in start]
        optimizer = step(weights, [scale * grads[0], grads[1]])
        moves.append([(w.detach() - s.detach()) / optimizer.eta for w, s in zip(weights, start, strict=True)])
    torch.testing.assert_close(moves[0], moves[1], rtol=1e-12, atol=1e-15)


@FORMS
def test_a_step_has_the_size_that_the_radius_says(form: dict[str, bool]) -> None:
    weights = params((5, 3), (4, 2, 3, 2))
    before = [weight.detach().clone() for weight in weights]
    optimizer = AGD(weights, gain=3.0, **form)
    optimizer.param_groups[0]["lr"] = 0.5
    step(weights, [torch.randn_like(weight) for weight in weights], optimizer)
    unit = 3.0 * 0.5 * float(optimizer.eta) / 2
    matrix, conv = (b - w.detach() for b, w in zip(before, weights, strict=True))
    assert float(matrix.norm()) == pytest.approx(unit * (5 / 3) ** 0.5, rel=1e-12)
    torch.testing.assert_close(
        conv.pow(2).sum(dim=(0, 1)).sqrt(), torch.full((3, 2), unit * (4 / 2 / 6) ** 0.5).double()
    )


def test_orthogonal_maps_of_weight_and_gradient_map_the_step() -> None:
    weight, grad = torch.randn(4, 6).double(), torch.randn(4, 6).double()
    left, right = (torch.linalg.qr(torch.randn(n, n).double())[0] for n in (4, 6))
    one, other = nn.Parameter(weight.clone()), nn.Parameter(left @ weight @ right)
    step([one], [grad])
    step([other], [left @ grad @ right])
    torch.testing.assert_close(left @ one.detach() @ right, other.detach())


def test_maximize_ascends() -> None:
    weights = params((4, 3), (2, 3, 2, 2))
    before = [weight.detach().clone() for weight in weights]
    mirrored = [nn.Parameter(weight.clone()) for weight in before]
    grads: list[Tensor | None] = [torch.randn_like(weight) for weight in weights]
    step(weights, grads)
    step(mirrored, grads, AGD(mirrored, maximize=True))
    for b, w, m in zip(before, weights, mirrored, strict=True):
        torch.testing.assert_close(b - w.detach(), m.detach() - b)


# -- layouts, forms ----------------------------------------------------------------------------------------


@FORMS
def test_strided_weights_step_as_contiguous_ones(form: dict[str, bool]) -> None:
    shapes = [(4, 3), (4, 3, 2, 2)]
    plain = params(*shapes)
    strided = [
        nn.Parameter(plain[0].detach().clone().T.contiguous().T),
        nn.Parameter(plain[1].detach().clone(memory_format=torch.channels_last)),
    ]
    assert not any(weight.is_contiguous() for weight in strided)
    grads = [torch.randn(shape).double() for shape in shapes]
    step(plain, grads, AGD(plain, **form))
    alike = [torch.empty_like(weight).copy_(grad) for weight, grad in zip(strided, grads, strict=True)]
    step(strided, alike, AGD(strided, **form))
    torch.testing.assert_close([w.detach() for w in plain], [w.detach() for w in strided])


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 2), (4, 3, 2, 2)])
def test_every_form_equals_the_plain_one_for_every_norm(shape: tuple[int, ...]) -> None:
    for norm in ("frobenius", "filters", "rows", "rms", "max"):
        if len(shape) < 2 and norm in ("frobenius", "filters"):
            continue
        (weight,) = params(shape, dtype=torch.float32)
        twins = [nn.Parameter(weight.detach().clone()) for _ in forms]
        grad = torch.randn(shape)
        for twin, form in zip(twins, forms.values(), strict=True):
            step([twin], [grad], AGD([{"params": [twin], "norm": norm}], **form))
        # The forms multiply the same factors in another order: a few roundings of the step.
        for twin in twins[1:]:
            torch.testing.assert_close(twin.detach(), twins[0].detach(), rtol=1e-6, atol=1e-6)


def test_the_step_compiles_to_one_graph_and_does_not_recompile() -> None:
    weights, twins = params((4, 3), (2, 3, 2, 2)), None
    twins = [nn.Parameter(weight.detach().clone()) for weight in weights]
    rate = torch.tensor(1.0)
    optimizer, eager = AGD(weights), AGD(twins)
    optimizer.param_groups[0]["lr"] = rate
    torch._dynamo.reset()
    compiled = torch.compile(optimizer.step, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t in range(10):
            rate.fill_(1 / (1 + t))
            eager.param_groups[0]["lr"] = 1 / (1 + t)
            for weight, twin in zip(weights, twins, strict=True):
                weight.grad = torch.randn_like(weight)
                twin.grad = weight.grad.clone()
            compiled()
            eager.step()
    torch.testing.assert_close(
        [w.detach() for w in weights], [w.detach() for w in twins], rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(optimizer.eta, eager.eta)


# -- an optimiser like any other ---------------------------------------------------------------------------


def test_state_stays_empty_and_a_reloaded_run_goes_on_bit_for_bit() -> None:
    model = Worked(torch.float32)
    optimizer = AGD(model, gain=2.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    model.set_gradients(1)
    optimizer.step()
    scheduler.step()
    assert not optimizer.state
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    assert saved["optimizer"]["state"] == {}
    other = Worked(torch.float32)
    resumed = AGD(other)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for t in (2, 3):
        for each, stepper in ((model, optimizer), (other, resumed)):
            each.set_gradients(t)
            stepper.step()
    assert [bits(p) for p in model.parameters()] == [bits(p) for p in other.parameters()]
    assert not resumed.state
    torch.testing.assert_close(resumed.eta, optimizer.eta, rtol=0, atol=0)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"]
)
def test_copies_step_and_report(copied: object) -> None:
    weights = params((4, 3))
    optimizer = step(weights, [torch.randn(4, 3).double()])
    clone = copied(optimizer)  # type: ignore[operator]
    assert clone.eta.isnan()
    assert clone.gradient_summary.isnan()
    assert int(clone.skipped_steps) == 0
    clone.param_groups[0]["params"][0].grad = torch.randn(4, 3).double()
    clone.step()
    assert float(clone.eta) > 0


def test_reports_are_nan_before_the_first_step_and_kept_ones_do_not_change() -> None:
    weights = params((4, 3))
    optimizer = AGD(weights)
    assert optimizer.eta.isnan()
    assert optimizer.gradient_summary.isnan()
    step(weights, [torch.ones(4, 3).double()], optimizer)
    kept, value = optimizer.eta, float(optimizer.eta)
    step(weights, [10 * torch.ones(4, 3).double()], optimizer)
    assert float(kept) == value < float(optimizer.eta)
    assert optimizer.eta.shape == optimizer.gradient_summary.shape == optimizer.skipped_steps.shape == ()


def test_schedulers_and_tensor_rates_multiply_the_step() -> None:
    grad = torch.randn(4, 3).double()
    moves = []
    for lr in (1.0, 0.25, torch.tensor(0.25), torch.tensor([0.25])):
        weight = nn.Parameter(torch.zeros(4, 3).double())
        optimizer = AGD([weight])
        optimizer.param_groups[0]["lr"] = lr
        step([weight], [grad], optimizer)
        moves.append(weight.detach())
    for move in moves[1:]:
        torch.testing.assert_close(move, moves[0] / 4)


def test_a_gradient_scaler_changes_nothing() -> None:
    weights, twins = params((4, 3), dtype=torch.float32), None
    twins = [nn.Parameter(weights[0].detach().clone())]
    x = torch.randn(5, 3)
    optimizer, plain = AGD(weights), AGD(twins)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((x @ weights[0].T).square().mean()).backward()
    scaler.step(optimizer)
    (x @ twins[0].T).square().mean().backward()
    plain.step()
    torch.testing.assert_close(optimizer.eta, plain.eta, rtol=1e-6, atol=0)
    torch.testing.assert_close(weights[0].detach(), twins[0].detach())


def test_a_closure_is_called_and_its_loss_returned() -> None:
    (weight,) = params((4, 3))
    optimizer = AGD([weight])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    before = float(weight.detach().square().sum())
    with torch.no_grad():
        assert float(optimizer.step(closure)) == before
    assert float(weight.detach().square().sum()) < before


# -- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (4,)])
def test_parameters_without_two_dimensions_are_refused_and_the_remedy_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"layer.bias of shape .* AGD\(model\) takes them in"):
        AGD([("layer.weight", params((4, 3))[0]), ("layer.bias", params(shape)[0])])
    optimizer = AGD(params((4, 3)))
    with pytest.raises(ValueError, match=r"AGD\(model\)"):
        optimizer.add_param_group({"params": params(shape)})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr=-1.0"),
        ({"gain": -0.5}, ValueError, "gain=-0.5"),
        ({"gain": float("nan")}, ValueError, "gain=nan"),
        ({"gain": "10"}, TypeError, "gain='10'"),
        ({"gain": torch.tensor(2.0)}, TypeError, "gain is a tensor"),
        ({"norm": "frobenus"}, ValueError, "did you mean 'frobenius'"),
        ({"share": 0}, ValueError, "share=0, expected share > 0"),
        ({"radius": -1.0}, ValueError, "radius=-1.0"),
        ({"uses": 0}, ValueError, "uses=0"),
        ({"slices": 3}, ValueError, "cannot be split along dimension 0"),
        ({"slices": 1.5}, TypeError, "slices=1.5, expected a whole number"),
        ({"slices": 2, "groups": 2}, ValueError, "only one of them"),
        ({"neuron_dim": 2}, ValueError, "neuron_dim=2"),
        ({"norm": "rows", "neuron_dim": 2}, ValueError, "neuron_dim=2 does not fit"),
        ({"fused": True, "foreach": True}, ValueError, "expected at most one"),
        ({"maximize": 1}, TypeError, "maximize=1"),
        ({"error_if_nonfinite": None}, TypeError, "error_if_nonfinite=None"),
        ({"shares": 1}, TypeError, "did you mean 'share'"),
    ],
)
def test_bad_options_of_a_group_are_refused(
    group: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        AGD([{"params": params((4, 3)), **group}])


def test_a_learning_rate_is_no_option_of_the_constructor() -> None:
    with pytest.raises(TypeError, match="AGD has no option 'lr'"):
        AGD(params((4, 3)), lr=0.1)  # type: ignore[call-arg]


def test_roles_without_a_module_are_refused() -> None:
    with pytest.raises(ValueError, match=r"AGD\(model, roles=...\)"):
        AGD(params((4, 3)), roles={"a": "matrix"})
