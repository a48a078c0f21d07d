"""What only some rules can refuse: each message says what was given, what was expected and what to do."""

import pytest
import torch
from torch import nn

from archopt import AGD, Lamb, Madam, Nero, constrain


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))


@pytest.mark.parametrize("rule", [Nero, AGD])
def test_roles_need_a_module(rule):
    with pytest.raises(
        ValueError, match=rf"roles=\.\.\. needs a module: {rule.__name__}\(model, roles=\.\.\.\)"
    ):
        rule([nn.Parameter(torch.ones(3, 2))], roles={"weight": "matrix"})


@pytest.mark.parametrize("rule", [Nero, AGD])
def test_roles_that_match_nothing_are_refused(rule):
    with pytest.raises(ValueError, match=r"embeding.*match"):
        rule(model(), roles={"embeding": "embedding"})


@pytest.mark.parametrize("rule", [Nero, AGD])
def test_unknown_role_is_refused_with_the_nearest(rule):
    with pytest.raises(ValueError, match=r"'matrx'.*did you mean"):
        rule(model(), roles={"0.weight": "matrx"})


@pytest.mark.parametrize("rule", [Nero, AGD, Lamb, Madam])
def test_frozen_module_is_refused(rule):
    with pytest.raises(ValueError, match=r"nothing to train|no trainable parameters"):
        rule(model().requires_grad_(False))


@pytest.mark.parametrize("neuron_dim", [2, -3, (0, 2)])
def test_neuron_dim_that_does_not_fit_is_refused(neuron_dim):
    weight = nn.Parameter(torch.arange(6.0).reshape(3, 2))
    with pytest.raises(ValueError, match=r"neuron_dim.*\(3, 2\)"):
        Nero([weight], neuron_dim=neuron_dim)
    assert torch.equal(weight, torch.arange(6.0).reshape(3, 2)), "the weight changed before the refusal"


def test_neuron_dim_of_a_group_is_checked_before_any_group_is_projected():
    weight, other = nn.Parameter(torch.arange(6.0).reshape(3, 2)), nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="neuron_dim=5"):
        Nero([{"params": [weight]}, {"params": [other], "neuron_dim": 5}])


@pytest.mark.parametrize(("name", "value"), [("zero_mean", "yes"), ("unit_norm", 1.5), ("maximize", None)])
def test_flags_take_true_or_false(name, value):
    with pytest.raises(TypeError, match=rf"{name}={value!r}.*True or False"):
        Nero(model().parameters(), **{name: value})


def test_published_agd_refuses_vectors_and_names_the_form_that_takes_them():
    with pytest.raises(ValueError, match=r"AGD\(model\)"):
        AGD(model().parameters())


def test_agd_can_raise_where_a_gradient_is_not_finite():
    """`error_if_nonfinite` names the tensor, and nothing moves."""
    net = model()
    optimizer = AGD(net, error_if_nonfinite=True)
    for param in net.parameters():
        param.grad = torch.ones_like(param)
    net[0].weight.grad[0, 0] = float("nan")
    before = [param.detach().clone() for param in net.parameters()]
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


def test_constrain_takes_an_optimizer_once():
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer"):
        constrain(model())
    optimizer = constrain(torch.optim.SGD(model().parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"constraint\.remove\(\)"):
        constrain(optimizer)


@pytest.mark.parametrize("rule", [Lamb, Madam])  # Nero and AGD have a fused form: tests/kernels
def test_fused_true_is_refused_not_swallowed(rule):
    with pytest.raises(ValueError, match=f"{rule.__name__}: fused=True"):
        rule(nn.Linear(4, 3), fused=True)
