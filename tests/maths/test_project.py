"""`project_`: rows of mean 0 and norm 1 on request, by the roles of a module or along an axis of tensors."""

import copy

import pytest
import torch
from torch import Tensor, nn

from archopt.optim.nero import Nero
from archopt.project import project_
from archopt.roles import parameter_roles
from maths.models import GPT, UNet, ViT


def rows_of_output_channels(weight: Tensor, groups: int) -> Tensor:
    """A transposed convolution's weights as one row an output channel, by slow copying."""
    inputs, outputs = weight.shape[0] // groups, weight.shape[1]
    return torch.stack(
        [weight[g * inputs : (g + 1) * inputs, o].flatten() for g in range(groups) for o in range(outputs)]
    )


def assert_balanced(rows: Tensor, tolerance: float = 1e-6) -> None:
    assert rows.mean(1).abs().max() < tolerance
    assert (rows.norm(dim=1) - 1).abs().max() < tolerance


def test_a_hand_computed_row():
    weight = torch.tensor([[1.0, 2.0, -4.0]], dtype=torch.float64)
    project_(weight)
    expected = torch.tensor([4.0, 7.0, -11.0], dtype=torch.float64) / 186**0.5  # (1, 2, -4) + 1/3, times 3
    assert torch.allclose(weight[0], expected, atol=1e-15, rtol=0)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"zero_mean": False}, [[0.6, 0.8]]),
        ({"unit_norm": False}, [[-0.5, 0.5]]),
        ({"zero_mean": False, "unit_norm": False}, [[3.0, 4.0]]),
    ],
)
def test_each_constraint_alone(flags, expected):
    weight = torch.tensor([[3.0, 4.0]])
    assert project_(weight, **flags) is None
    assert torch.allclose(weight, torch.tensor(expected))


def test_a_module_is_balanced_by_its_roles():
    model = nn.ModuleDict({"unet": UNet(), "vit": ViT()})
    vectors = {r.name: p.detach().clone() for r, p in parameter_roles(model).items() if r.family == "vector"}
    with torch.no_grad():
        model["vit"].cls_token.copy_(torch.arange(8.0))
    project_(model)
    weights = dict(model.named_parameters())
    assert_balanced(rows_of_output_channels(weights["unet.up.weight"], groups=2))
    assert_balanced(weights["unet.down.weight"].flatten(1))
    assert_balanced(weights["vit.pos_embed"][0])
    assert_balanced(weights["vit.cls_token"][0])
    assert_balanced(weights["vit.attn.in_proj_weight"])
    assert vectors
    assert all(torch.equal(weights[name], before) for name, before in vectors.items())


def test_tied_weights_are_balanced_once_and_zero_rows_stay():
    model = GPT()
    model.wte.weight.data[3] = 0
    project_(model)
    assert model.lm_head.weight is model.wte.weight
    assert torch.equal(model.wte.weight[3], torch.zeros(8))
    assert_balanced(model.wte.weight[torch.arange(30) != 3])


@pytest.mark.parametrize("build", [UNet, ViT, GPT])
def test_projection_is_what_nero_does_at_construction(build):
    model = build()
    projected = copy.deepcopy(model)
    Nero(model)
    project_(projected)
    for (name, a), b in zip(model.named_parameters(), projected.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_overrides_decide_what_is_a_row():
    model = nn.Module()
    model.experts = nn.Parameter(torch.randn(3, 5, 4))
    project_(model, roles={"experts": {"kind": "matrix", "neuron_dim": (0, 1)}})
    assert_balanced(model.experts.reshape(15, 4))


def test_frozen_weights_of_a_module_stay_but_move_when_given_as_tensors():
    model = nn.Sequential(nn.Linear(4, 3).requires_grad_(False), nn.Linear(3, 2))
    before = model[0].weight.clone()
    project_(model)
    assert torch.equal(model[0].weight, before)
    assert_balanced(model[1].weight)
    project_(model[0].weight)
    assert_balanced(model[0].weight)


def test_iterables_pairs_and_axes():
    model = nn.Linear(4, 3)
    bias = model.bias.clone()
    project_(model.named_parameters())
    assert_balanced(model.weight)
    assert torch.equal(model.bias, bias)
    weights = [torch.randn(4, 5), torch.randn(4, 6, 3)]
    project_(iter(weights), neuron_dim=1)
    assert_balanced(weights[0].T)
    assert_balanced(weights[1].transpose(0, 1).flatten(1))
    stacked = torch.randn(2, 3, 5)
    project_(stacked, neuron_dim=(0, 1))
    assert_balanced(stacked.reshape(6, 5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_balanced_rows_keep_every_bit(dtype):
    torch.manual_seed(0)
    weight = torch.randn(50, 33).to(dtype)
    project_(weight)
    once = weight.clone()
    project_(weight)
    assert torch.equal(weight, once)
    assert weight.dtype == dtype


@pytest.mark.parametrize("value", [0.0, 0.1, -3e-3, 7e4])
def test_zero_and_constant_rows_stay(value):
    weight = torch.randn(3, 17)
    weight[1] = value
    project_(weight)
    assert torch.equal(weight[1], torch.full((17,), value))
    assert_balanced(weight[[0, 2]])


def test_strided_weights_keep_their_layout():
    weight = torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)
    project_(weight)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert_balanced(weight.flatten(1))


@pytest.mark.parametrize("shape", [(), (3,), (3, 1), (0, 4), (4, 0)])
def test_fan_in_1_and_empty_tensors_stay(shape):
    weight = torch.randn(shape)
    before = weight.clone()
    project_(weight)
    assert torch.equal(weight, before)


def test_gradients_and_graphs_are_left_alone():
    model = nn.Linear(4, 3)
    model(torch.ones(1, 4)).sum().backward()
    gradient = model.weight.grad.clone()
    project_(model)
    assert torch.equal(model.weight.grad, gradient)
    assert model.weight.is_leaf
    assert model.weight.requires_grad


@pytest.mark.parametrize(
    ("bad", "kwargs", "error", "words"),
    [
        (torch.zeros(2, 2, dtype=torch.complex64), {}, TypeError, ["item 1", "complex64", "floating-point"]),
        (torch.zeros(2, 2, dtype=torch.int64), {}, TypeError, ["item 1", "int64"]),
        (("w", [1.0]), {}, TypeError, ["w is a list", "expected a tensor"]),
        ({"params": []}, {}, TypeError, ["item 1 is a dict"]),
        (torch.zeros(2, 2), {"neuron_dim": 2}, ValueError, ["neuron_dim=2", "(2, 3)"]),
        (torch.zeros(2, 2), {"roles": {}}, ValueError, ["needs a module"]),
    ],
)
def test_bad_input_is_refused_and_nothing_is_changed(bad, kwargs, error, words):
    first = torch.randn(2, 3)
    before = first.clone()
    with pytest.raises(error) as caught:
        project_([first, bad], **kwargs)
    for word in words:
        assert word in str(caught.value)
    assert torch.equal(first, before)


def test_an_axis_beside_a_module_is_refused():
    with pytest.raises(ValueError, match=r"neuron_dim=1 is for tensors.*roles="):
        project_(nn.Linear(3, 2), neuron_dim=1)
