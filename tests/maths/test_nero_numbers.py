"""Nero against worked numbers and against a slow float64 form."""

import pytest
import torch

from archopt import kernels
from archopt.optim.nero import Nero
from reference.nero import NeroReference
from reference.trajectories import (
    assert_close,
    follow,
    gradients_of,
    initial_weights,
    parameter,
    worked_example,
)

FORMS = {"plain": {"foreach": False}, "foreach": {"foreach": True}}
if kernels.status()["cpu"].available:  # tests/kernels says so where it is not
    FORMS["fused"] = {"fused": True}
in_each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)

BIASES = (
    "0.298333333333 -0.198333333333 0",
    "0.296225464541 -0.199078838516 -0.00235643327463",
    "0.298744327721 -0.200622147668 0.000224522844549",
)
# Options, scale(W), W after construction and after steps 1 to 3.
EXAMPLES = {
    "N1 both constraints": (
        {},
        1.0,
        (
            "0.293294230043 0.513264902575 -0.806559132617 -0.116642368704 -0.641533027872 0.758175396576",
            "0.289957231321 0.516038481701 -0.805995713021 -0.118946018535 -0.640090342764 0.7590363613",
            "0.296407105861 0.510664507228 -0.807071613088 -0.118946018535 -0.640090342764 0.7590363613",
            "0.295296194678 0.511593981154 -0.806890175833 -0.113909270186 -0.643237130514 0.7571464007",
        ),
    ),
    "N3 no constraints": (
        {"zero_mean": False, "unit_norm": False},
        3.89206890684,
        (
            "1 2 -4 0.5 -1 3",
            "0.989598008304 2.02080398339 -4.03120597509 0.48225830335 -1.02217712081 3.02661254497",
            "1.02080398339 2.0104019917 -4.05200995848 0.48225830335 -1.02217712081 3.02661254497",
            "0.982890310328 1.97248831863 -4.04442722387 0.496396723104 -1.04338475044 3.0195433351",
        ),
    ),
    "N4 norm only": (
        {"zero_mean": False},
        1.0,
        (
            "0.218217890236 0.436435780472 -0.872871560944 0.156173761889 -0.312347523777 0.937042571332",
            "0.213673538111 0.437944692786 -0.873239981432 0.150487149915 -0.315678935412 0.936856673909",
            "0.220534310433 0.433000282193 -0.873999641615 0.150487149915 -0.315678935412 0.936856673909",
            "0.212493904381 0.426674233287 -0.879087845013 0.15402919263 -0.320939134422 0.934490813124",
        ),
    ),
    "N5 mean only": (
        {"unit_norm": False},
        3.70189929945,
        (
            "1.33333333333 2.33333333333 -3.66666666667 -0.333333333333 -1.83333333333 2.16666666667",
            "1.33003541932 2.35971664545 -3.68975206476 -0.345989450678 -1.85020815646 2.19619760714",
            "1.35971664545 2.3498229034 -3.70953954885 -0.345989450678 -1.85020815646 2.19619760714",
            "1.34529217321 2.33539843116 -3.68069060437 -0.328059310374 -1.86589702923 2.1939563396",
        ),
    ),
}


@in_each_form
@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_example(name: str, form: dict[str, bool]) -> None:
    options, scale, expected = EXAMPLES[name]
    optimizer, weight, bias, ws, bs = worked_example(lambda p: Nero(p, lr=0.01, **form, **options))
    for w, text in zip(ws, expected, strict=True):
        assert_close(w, text)
    for b, text in zip(bs[1:], BIASES, strict=True):
        assert_close(b, text)
    assert_close(optimizer.state[weight]["scale"], str(scale))
    assert_close(optimizer.state[bias]["scale"], "0.166666666667")
    assert_close(optimizer.state[weight]["exp_avg_sq"], "0.00078958014 0.00090846077")
    assert_close(optimizer.state[bias]["exp_avg_sq"], "0.00020994001 0.00013981009 0.0000124975")


@in_each_form
def test_worked_example_with_beta_of_a_tenth(form: dict[str, bool]) -> None:
    optimizer, weight, bias, ws, bs = worked_example(lambda p: Nero(p, lr=0.01, beta=0.9, **form))
    assert_close(ws[2], EXAMPLES["N1 both constraints"][2][2])
    assert_close(
        ws[3], "0.295323029465 0.511571548152 -0.806894577618 -0.113722502924 -0.643353282982 0.757075785906"
    )
    assert_close(bs[2], "0.29625766717 -0.199094894611 -0.00229734145868")
    assert_close(bs[3], "0.298686915339 -0.200666565243 0.000181594747951")
    assert_close(optimizer.state[weight]["exp_avg_sq"], "0.07494 0.07637")
    assert_close(optimizer.state[bias]["exp_avg_sq"], "0.02041 0.01219 0.001225")


@in_each_form
def test_worked_example_of_mixed_shapes(form: dict[str, bool]) -> None:
    conv = parameter([[[[1, -1]], [[2, 0]]], [[[0.5, 0.5]], [[-1.5, 1]]]])
    gain, shift, scalar = parameter([1, 1]), parameter([0, 0]), parameter(0.5)
    params = [conv, gain, shift, scalar]
    optimizer = Nero(params, lr=0.01, **form)
    assert_close(
        conv,
        "0.223606797750 -0.670820393250 0.670820393250 -0.223606797750"
        " 0.195283366471 0.195283366471 -0.846227921375 0.455661188433",
    )
    steps = (
        ([0.1, 0.2, -0.3, 0.4, -0.2, 0.1, 0, 0.5], [0.2, -0.1], [-0.05, 0.3], 2),
        ([-0.4, 0.3, 0.2, 0.1, 0.6, -0.1, 0.2, 0.3], [0.1, 0.4], [0.1, 0], -1),
    )
    expected = (
        (
            "0.221972043949 -0.667728525996 0.673165708445 -0.227409226397"
            " 0.201519680945 0.196021745623 -0.847594919258 0.450053492690",
            "0.99 1.01",
            "0.0001 -0.0001",
            "0.495",
        ),
        (
            "0.229435688762 -0.670096004060 0.668236315971 -0.227576000673"
            " 0.196187235057 0.201762296855 -0.847673705910 0.449724173998",
            "0.983674495308 0.996283140146",
            "-0.000026472128 -0.000100000000",
            "0.498162752346",
        ),
    )
    for gradients, texts in zip(steps, expected, strict=True):
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = torch.tensor(gradient, dtype=torch.float64).view_as(param)
        optimizer.step()
        for param, text in zip(params, texts, strict=True):
            assert_close(param, text)
    for param, scale in zip(params, ("1", "1", "0.01", "0.5"), strict=True):
        assert_close(optimizer.state[param]["scale"], scale)


@in_each_form
def test_first_step_turns_a_row_by_arctan_of_lr(form: dict[str, bool]) -> None:
    weight = parameter([[1.0, -1.0, 0.0, 0.0]])
    optimizer = Nero([weight], lr=0.01, **form)
    before = weight.detach().clone()
    weight.grad = torch.tensor([[0.0, 0.0, 0.5**0.5, -(0.5**0.5)]], dtype=torch.float64)
    optimizer.step()
    angle = torch.linalg.vector_norm(weight.detach() - before) / 2
    assert abs(2 * float(angle.asin()) - 0.009999666686665) < 1e-14


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("zero_mean", [True, False])
@pytest.mark.parametrize("unit_norm", [True, False])
def test_random_trajectory_equals_the_float64_reference(
    beta: float, zero_mean: bool, unit_norm: bool
) -> None:
    options = {"beta": beta, "zero_mean": zero_mean, "unit_norm": unit_norm}
    weights = initial_weights(seed=0)
    follow(
        lambda params, **form: Nero(params, **form, **options),
        NeroReference(weights, **options),
        weights,
        gradients_of(seed=0),
        forms=FORMS,
    )
