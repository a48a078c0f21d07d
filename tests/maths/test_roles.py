"""What each parameter is: over the layers of torch.nn, real architectures, and modules of a user's own."""

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrizations, parametrize, prune

from archopt.neurons import as_rows, fan_in_dims
from archopt.roles import Role, parameter_roles
from maths.models import HfConv1D, Holder, ResNet, ViT, kinds


def neuron_of_each_entry(role: Role) -> Tensor:
    """The number of the neuron that each entry of the parameter belongs to, in the order of the role's rows."""
    ids = torch.zeros(role.shape)
    rows = as_rows(ids, role.channel_groups)
    dims = fan_in_dims(ids.shape, role.neuron_dim, role.channel_groups)
    kept = [1 if dim in dims else size for dim, size in enumerate(rows.shape)]
    rows.copy_(torch.arange(math.prod(kept)).reshape(kept).expand(rows.shape))
    return ids.long()


# -- layers ----------------------------------------------------------------------------------------------

# A layer, and for its parameters: kind, neurons, fan-in, slices. Linear is wrapped, or it would be the head.
LAYERS: list[tuple[nn.Module, dict[str, tuple[str, int, int, int]]]] = [
    (nn.Bilinear(3, 4, 5), {"weight": ("matrix", 5, 12, 1), "bias": ("bias", 5, 1, 1)}),
    (nn.Conv1d(4, 6, 3), {"weight": ("conv", 6, 12, 1), "bias": ("bias", 6, 1, 1)}),
    (nn.Conv2d(4, 6, 3, groups=2, bias=False), {"weight": ("conv", 6, 18, 1)}),
    (nn.Conv3d(1, 6, 3, bias=False), {"weight": ("conv", 6, 27, 1)}),
    (nn.Conv2d(4, 8, 3, groups=4, bias=False), {"weight": ("depthwise", 8, 9, 1)}),
    (nn.Conv2d(4, 4, 1, groups=4, bias=False), {"weight": ("gain", 4, 1, 1)}),
    (nn.Conv2d(1, 4, 1, bias=False), {"weight": ("gain", 4, 1, 1)}),
    (nn.ConvTranspose1d(4, 6, 3), {"weight": ("conv_transpose", 6, 12, 1), "bias": ("bias", 6, 1, 1)}),
    (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), {"weight": ("conv_transpose", 6, 18, 1)}),
    (nn.ConvTranspose3d(4, 4, 3, groups=4, bias=False), {"weight": ("conv_transpose", 4, 27, 1)}),
    (nn.ConvTranspose2d(4, 4, 1, groups=4, bias=False), {"weight": ("gain", 4, 1, 1)}),
    (nn.Embedding(9, 5, padding_idx=2), {"weight": ("embedding", 9, 5, 1)}),
    (nn.EmbeddingBag(9, 5), {"weight": ("embedding", 9, 5, 1)}),
    (nn.LayerNorm(6), {"weight": ("gain", 6, 1, 1), "bias": ("shift", 6, 1, 1)}),
    (nn.LayerNorm((2, 3)), {"weight": ("gain", 6, 1, 1), "bias": ("shift", 6, 1, 1)}),
    (nn.RMSNorm(6), {"weight": ("gain", 6, 1, 1)}),
    (nn.BatchNorm1d(6), {"weight": ("gain", 6, 1, 1), "bias": ("shift", 6, 1, 1)}),
    (nn.SyncBatchNorm(6), {"weight": ("gain", 6, 1, 1), "bias": ("shift", 6, 1, 1)}),
    (nn.GroupNorm(2, 6), {"weight": ("gain", 6, 1, 1), "bias": ("shift", 6, 1, 1)}),
    (nn.InstanceNorm2d(6, affine=True), {"weight": ("gain", 6, 1, 1), "bias": ("shift", 6, 1, 1)}),
    (nn.PReLU(), {"weight": ("scalar", 1, 1, 1)}),
    (nn.PReLU(6), {"weight": ("gain", 6, 1, 1)}),
    (
        nn.MultiheadAttention(6, 2, add_bias_kv=True),
        {
            "in_proj_weight": ("matrix", 18, 6, 3),
            "in_proj_bias": ("bias", 18, 1, 1),
            "bias_k": ("position", 1, 6, 1),
            "bias_v": ("position", 1, 6, 1),
            "out_proj.weight": ("matrix", 6, 6, 1),
            "out_proj.bias": ("bias", 6, 1, 1),
        },
    ),
    (
        nn.MultiheadAttention(6, 2, bias=False, kdim=4, vdim=5),
        {
            "q_proj_weight": ("matrix", 6, 6, 1),
            "k_proj_weight": ("matrix", 6, 4, 1),
            "v_proj_weight": ("matrix", 6, 5, 1),
            "out_proj.weight": ("matrix", 6, 6, 1),
        },
    ),
    (
        nn.LSTM(5, 6, proj_size=2),
        {
            "weight_ih_l0": ("matrix", 24, 5, 4),
            "weight_hh_l0": ("matrix", 24, 2, 4),
            "bias_ih_l0": ("bias", 24, 1, 1),
            "bias_hh_l0": ("bias", 24, 1, 1),
            "weight_hr_l0": ("matrix", 2, 6, 1),
        },
    ),
    (
        nn.GRU(5, 6, bias=False, bidirectional=True),
        {
            "weight_ih_l0": ("matrix", 18, 5, 3),
            "weight_hh_l0": ("matrix", 18, 6, 3),
            "weight_ih_l0_reverse": ("matrix", 18, 5, 3),
            "weight_hh_l0_reverse": ("matrix", 18, 6, 3),
        },
    ),
    (nn.RNN(5, 6, bias=False), {"weight_ih_l0": ("matrix", 6, 5, 1), "weight_hh_l0": ("matrix", 6, 6, 1)}),
    (nn.LSTMCell(5, 6, bias=False), {"weight_ih": ("matrix", 24, 5, 4), "weight_hh": ("matrix", 24, 6, 4)}),
    (nn.GRUCell(5, 6, bias=False), {"weight_ih": ("matrix", 18, 5, 3), "weight_hh": ("matrix", 18, 6, 3)}),
    (nn.RNNCell(1, 6, bias=False), {"weight_ih": ("gain", 6, 1, 1), "weight_hh": ("matrix", 6, 6, 1)}),
    (
        nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(1, 4, bias=False)),
        {
            "0.weight": ("matrix", 6, 4, 1),
            "0.bias": ("bias", 6, 1, 1),
            "1.weight": ("head", 3, 6, 1),
            "1.bias": ("bias", 3, 1, 1),
            "2.weight": ("gain", 4, 1, 1),
        },
    ),
]


@pytest.mark.parametrize(("layer", "expected"), LAYERS, ids=lambda value: type(value).__name__)
def test_each_layer_has_its_documented_roles(layer, expected):
    roles = parameter_roles(layer)
    assert {r.name: (r.kind, r.neurons, r.fan_in, r.slices) for r in roles} == expected


def test_every_layer_of_torch_nn_that_creates_parameters_is_known():
    known = (nn.Linear, nn.Bilinear, _ConvNd, nn.Embedding, nn.EmbeddingBag, _NormBase, nn.LayerNorm)
    known += (nn.RMSNorm, nn.GroupNorm, nn.PReLU, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
    containers = (nn.ParameterList, nn.ParameterDict)
    classes = {c for c in vars(nn).values() if inspect.isclass(c) and issubclass(c, nn.Module)} - {nn.Module}
    creating = [c for c in classes if "Parameter(" in inspect.getsource(c.__init__)]
    assert len(creating) > 10
    assert [c.__name__ for c in creating if not issubclass(c, known + containers)] == []


FORWARDS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.Linear(4, 6), (2, 4)),
    (lambda: nn.Bilinear(4, 4, 6), (2, 4)),
    (lambda: HfConv1D(6, 4), (2, 4)),
    *[(lambda g=g, b=b: nn.Conv1d(4, 8, 3, groups=g, bias=b), (2, 4, 9)) for g in (1, 2, 4) for b in (0, 1)],
    *[(lambda g=g: nn.Conv2d(4, 8, 3, groups=g), (2, 4, 9, 9)) for g in (1, 2, 4)],
    (lambda: nn.Conv3d(4, 8, 2, groups=2), (2, 4, 3, 3, 3)),
    *[(lambda g=g: nn.ConvTranspose1d(4, 8, 3, stride=2, groups=g), (2, 4, 5)) for g in (1, 2, 4)],
    *[(lambda g=g: nn.ConvTranspose2d(4, 8, 3, groups=g), (2, 4, 5, 5)) for g in (1, 2, 4)],
    *[(lambda g=g: nn.ConvTranspose3d(4, 8, 2, groups=g), (2, 4, 3, 3, 3)) for g in (1, 2, 4)],
]


@pytest.mark.parametrize(("build", "shape"), FORWARDS)
def test_rows_are_the_true_output_neurons(build, shape):
    """Scaling the weights of neuron i changes output i, and nothing else."""
    torch.manual_seed(0)
    layer = build()
    x = torch.randn(shape)
    inputs = (x, x) if isinstance(layer, nn.Bilinear) else (x,)
    role = parameter_roles(layer)["weight"]
    neuron = neuron_of_each_entry(role)
    original = layer.weight.detach().clone()
    with torch.no_grad():
        before = layer(*inputs)
        assert before.shape[1] == role.neurons
        for i in range(role.neurons):
            layer.weight.copy_(torch.where(neuron == i, 3 * original, original))
            changed = (layer(*inputs) - before).abs().transpose(0, 1).flatten(1).amax(1) > 0
            assert changed.nonzero().flatten().tolist() == [i]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_transposed_convolution_agrees_with_a_slow_loop(groups):
    """Which weight feeds which output, by the definition of the operation, entry by entry."""
    layer = nn.ConvTranspose2d(8, 12, (2, 3), groups=groups)
    neuron = neuron_of_each_entry(parameter_roles(layer)["weight"])
    inputs_of_a_group, outputs_of_a_group = 8 // groups, 12 // groups
    for group in range(groups):
        for i in range(inputs_of_a_group):
            for o in range(outputs_of_a_group):
                entries = neuron[group * inputs_of_a_group + i, o]
                assert entries.tolist() == [[group * outputs_of_a_group + o] * 3] * 2


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 4),
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 3),
    kernel=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    transposed=st.booleans(),
)
def test_neurons_times_fan_in_is_the_number_of_entries(groups, inputs, outputs, kernel, transposed):
    name = f"Conv{'Transpose' if transposed else ''}{len(kernel)}d"
    layer = getattr(nn, name)(groups * inputs, groups * outputs, tuple(kernel), groups=groups, bias=False)
    role = parameter_roles(layer)["weight"]
    assert role.neurons * role.fan_in == layer.weight.numel()
    assert role.fan_in == inputs * math.prod(kernel)
    if role.fan_in > 1:
        assert role.neurons == groups * outputs
        assert role.groups == groups


def test_stride_of_a_transposed_convolution_is_kept_and_of_others_is_not():
    model = nn.Sequential(
        nn.ConvTranspose2d(4, 4, 3, stride=2),
        nn.ConvTranspose2d(4, 4, 3, stride=(4, 1)),
        nn.Conv2d(4, 4, 3, stride=2),
    )
    table = parameter_roles(model)
    assert [table[f"{i}.weight"].stride for i in range(3)] == [2, 2.0, 1]


def test_subclasses_count_as_their_layer():
    class MyLinear(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 6)
            self.lora_a = nn.Parameter(torch.randn(2, 4))
            self.weight_orig = nn.Parameter(torch.randn(6, 4))

    class MyNorm(nn.LayerNorm):
        pass

    table = parameter_roles(nn.Sequential(MyLinear(), MyNorm(6), nn.Linear(6, 2)))
    assert table["0.weight"].kind == "matrix"
    assert table["1.weight"].kind == "gain"
    assert table["0.lora_a"].kind == "matrix"
    assert "MyLinear" in table["0.lora_a"].note
    assert "MyLinear" in table["0.weight_orig"].note


# -- packed projections ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qkv", "to_qkv", "Wqkv", "c_attn", "in_proj"])
def test_packed_projections_are_found_by_name_and_shape(name):
    model = nn.Sequential()
    model.add_module(name, nn.Linear(4, 12))
    model.add_module("fc", nn.Linear(12, 3))
    table = parameter_roles(model)
    assert (table[f"{name}.weight"].kind, table[f"{name}.weight"].slices) == ("matrix", 3)
    assert table[f"{name}.bias"].kind == "bias"


def test_a_packed_name_without_the_shape_and_a_shape_without_the_name_stay_whole():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_proj = nn.Linear(4, 16)
            self.up = nn.Linear(4, 12)
            self.fc = nn.Linear(12, 3)

    assert {role.slices for role in parameter_roles(Model())} == {1}


def test_conv1d_of_transformers_has_its_neurons_along_dimension_1():
    model = nn.ModuleDict({"c_attn": HfConv1D(12, 4), "c_proj": HfConv1D(4, 4)})
    table = parameter_roles(model)
    assert (table["c_attn.weight"].neuron_dim, table["c_attn.weight"].slices) == (1, 3)
    assert (table["c_attn.weight"].neurons, table["c_attn.weight"].fan_in) == (12, 4)
    assert (table["c_proj.weight"].neuron_dim, table["c_proj.weight"].slices) == (1, 1)
    assert "stored (in, out)" in table["c_proj.weight"].note
    assert table["c_proj.bias"].kind == "bias"


# -- reparametrised weights ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [torch.nn.utils.spectral_norm, parametrizations.spectral_norm])
def test_spectral_norm_keeps_the_role_of_the_layer_and_its_buffers(norm):
    model = nn.Sequential(norm(nn.ConvTranspose2d(4, 6, 3, groups=2), dim=1), norm(nn.Linear(6, 1)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = [role for role in parameter_roles(model) if not role.name.endswith("bias")]
    assert [(r.kind, r.neuron_dim, r.channel_groups) for r in weights] == [
        ("conv_transpose", 1, 2),
        ("head", 0, 1),
    ]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, parametrizations.weight_norm])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_has_a_magnitude_of_fan_in_1_and_a_direction_like_the_layer(norm, dim):
    table = parameter_roles(norm(nn.Conv2d(4, 6, 3), dim=dim))
    shapes = {(6, 4, 3, 3): "conv", (): "scalar", (6,): "bias"}
    assert {role.kind for role in table} == {"conv", "bias", "scalar" if dim is None else "gain"}
    for role in table:
        assert role.kind == shapes.get(role.shape, "gain")
        assert role.fan_in == (36 if role.kind == "conv" else 1)


def test_weight_norm_of_a_recurrent_weight_keeps_its_gates():
    table = parameter_roles(parametrizations.weight_norm(nn.GRU(5, 6), "weight_hh_l0"))
    assert table["parametrizations.weight_hh_l0.original1"].slices == 3
    assert table["parametrizations.weight_hh_l0.original0"].kind == "gain"


def test_pruned_and_orthogonal_weights_keep_the_role_of_the_layer():
    pruned = prune.random_unstructured(nn.Conv1d(4, 6, 3), "weight", 0.5)
    orthogonal = parametrizations.orthogonal(nn.RNNCell(6, 6), "weight_hh")
    assert parameter_roles(pruned)["weight_orig"].kind == "conv"
    assert parameter_roles(orthogonal)["parametrizations.weight_hh.original"].kind == "matrix"


def test_a_parametrisation_that_changes_the_shape_is_judged_by_shape_and_said_so():
    class LowRank(nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return left @ right

        def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            return (u * s)[:, :2], v[:2]

    layer = nn.Linear(5, 4)
    parametrize.register_parametrization(layer, "weight", LowRank(), unsafe=True)
    table = parameter_roles(layer)
    for index, neurons in ((0, 4), (1, 2)):
        role = table[f"parametrizations.weight.original{index}"]
        assert (role.kind, role.neurons) == ("matrix", neurons)
        assert "by its shape" in role.note


# -- parameters of a user's own modules ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "kind", "neurons", "fan_in"),
    [
        ("temperature", (), "scalar", 1, 1),
        ("logit_bias", (1, 1), "scalar", 1, 1),
        ("attention_bias", (7,), "bias", 7, 1),
        ("relative_position_bias_table", (9, 4), "bias", 36, 1),
        ("layer_scale", (7,), "vector", 7, 1),
        ("gamma", (7, 1, 1), "vector", 7, 1),
        ("gamma", (1, 7, 1, 1), "vector", 7, 1),
        ("pos_embedding", (1, 9, 4), "position", 9, 4),
        ("positional_encoding", (9, 4), "position", 9, 4),
        ("posEmbed", (9, 1, 4), "position", 9, 4),
        ("class_token", (1, 1, 4), "position", 1, 4),
        ("pos_embed", (1, 4, 7, 7), "unknown", 1, 196),
        ("composed", (9, 4), "matrix", 9, 4),
        ("kernel", (9, 4), "matrix", 9, 4),
        ("factor", (9, 1), "gain", 9, 1),
        ("experts", (3, 5, 4), "unknown", 3, 20),
        ("nothing", (0,), "vector", 0, 1),
        ("nothing", (0, 4), "matrix", 0, 4),
    ],
)
def test_own_parameters_are_judged_by_shape_and_name(name, shape, kind, neurons, fan_in):
    role = parameter_roles(Holder(**{name: shape}))[name]
    assert (role.kind, role.neurons, role.fan_in) == (kind, neurons, fan_in)
    assert bool(role.note) == (len(shape) > 1 and kind != "scalar")


def test_lists_and_dicts_of_parameters_are_named_after_their_container():
    model = Holder()
    model.pos_embeds = nn.ParameterList([torch.randn(4, 5)])
    model.extra = nn.ParameterDict({"bias": torch.randn(4), "kernel": torch.randn(4, 5)})
    assert kinds(model) == {"pos_embeds.0": "position", "extra.bias": "bias", "extra.kernel": "matrix"}


def test_own_norm_classes_are_known_by_their_name():
    class LlamaRMSNorm(Holder):
        pass

    class NormalisedFlow(Holder):
        pass

    class DiagonalNormal(Holder):
        pass

    assert kinds(LlamaRMSNorm(weight=(6,), beta=(1, 6, 1, 1))) == {"weight": "gain", "beta": "shift"}
    assert kinds(DiagonalNormal(loc=(6,))) == {"loc": "vector"}
    assert kinds(NormalisedFlow(shift=(6,))) == {"shift": "vector"}


# -- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (nn.ReLU, ValueError, ["ReLU has nothing to train: it has no parameters", "pass the module"]),
        (
            lambda: ResNet().requires_grad_(False),
            ValueError,
            ["parameters are frozen", "requires_grad_(True)"],
        ),
        (lambda: nn.Sequential(nn.LazyLinear(3)), ValueError, ["0.weight of LazyLinear", "one forward pass"]),
        (lambda: nn.LazyConv2d(3, 3), ValueError, ["weight of LazyConv2d is not initialised"]),
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), TypeError, ["weight is complex", "view_as_real"]),
        (lambda: nn.Embedding(3, 2, sparse=True), TypeError, ["weight", "sparse gradients", "sparse=False"]),
        (lambda: nn.EmbeddingBag(3, 2, sparse=True), TypeError, ["EmbeddingBag", "sparse=False"]),
        (lambda: list(ResNet().parameters()), TypeError, ["needs a torch.nn.Module, got a list"]),
    ],
)
def test_what_cannot_have_roles_is_refused_with_the_remedy(build, error, words):
    with pytest.raises(error) as caught:
        parameter_roles(build())
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lazy_layers_have_roles_after_one_forward_pass():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(3))
    model(torch.randn(1, 2, 5, 5))
    assert kinds(model)["0.weight"] == "conv"
    assert kinds(model)["2.weight"] == "head"


def test_frozen_sparse_and_complex_parameters_are_listed():
    model = nn.Sequential(nn.Embedding(3, 2, sparse=True), nn.Linear(2, 2, dtype=torch.complex64))
    model.requires_grad_(False)
    model.append(nn.Linear(2, 2))
    assert kinds(model)["0.weight"] == "embedding"


def test_meta_parameters_have_roles():
    with torch.device("meta"):
        model = ViT()
    assert kinds(model) == kinds(ViT())
