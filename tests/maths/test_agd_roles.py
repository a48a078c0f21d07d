"""AGD(model): every role against the slow reference, shares, packed and tied weights, what is kept and refused."""

import io
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from archopt import ArchoptWarning
from archopt.optim.agd import AGD
from maths.agd_cases import FORMS
from reference.agd import Block, agd_step, indices, is_rms, mass, part_key, radius


class Conv1D(nn.Module):
    """As in GPT-2 of transformers: a linear layer whose weight is stored (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))


class Zoo(nn.Module):
    """One layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(5, 4, padding_idx=2)
        self.position = nn.Parameter(0.02 * torch.randn(1, 3, 4))
        self.plain = nn.Conv2d(2, 4, (3, 2))
        self.grouped = nn.Conv2d(4, 6, 3, groups=2, bias=False)
        self.depthwise = nn.Conv2d(3, 6, 3, groups=3)
        self.line = nn.Conv1d(2, 3, 4)
        self.cube = nn.Conv3d(2, 3, 2, bias=False)
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
        self.up_line = nn.ConvTranspose1d(2, 3, 4, stride=2, bias=False)
        self.up_depthwise = nn.ConvTranspose2d(3, 3, 3, stride=2, groups=3, bias=False)
        self.attention = nn.MultiheadAttention(4, 2)
        self.c_attn = Conv1D(12, 4)
        self.lstm = nn.LSTM(3, 2)
        self.gru = nn.GRU(3, 2)
        self.rnn = nn.RNN(3, 2)
        self.norm = nn.LayerNorm(4)
        self.batch = nn.BatchNorm2d(3)
        self.temperature = nn.Parameter(torch.tensor(-2.5))
        self.scales = nn.Parameter(torch.full((4,), 1e-5))
        self.out = nn.Linear(4, 5)
        self.tied = nn.Linear(4, 6, bias=False)
        self.words = nn.Embedding(6, 4)
        self.words.weight = self.tied.weight
        self.double()


def zoo_blocks(model: Zoo) -> dict[str, Block]:
    """How each parameter of the zoo is treated, written out by hand."""

    def rms(tensor: Tensor) -> float:
        return math.sqrt(sum(x * x for x in tensor.detach().flatten().tolist()) / tensor.numel())

    bias = Block("bias")
    return {
        "position": Block("position", neuron_dim=(0, 1)),
        "temperature": Block("scalar", radius=2.5),
        "scales": Block("vector", radius=1e-3),
        "token.weight": Block("embedding"),
        "plain.weight": Block("conv"),
        "plain.bias": bias,
        "grouped.weight": Block("conv", groups=2),
        "depthwise.weight": Block("depthwise"),
        "depthwise.bias": bias,
        "line.weight": Block("conv"),
        "line.bias": bias,
        "cube.weight": Block("conv"),
        "up.weight": Block("conv_transpose", groups=2, stride=2),
        "up.bias": bias,
        "up_line.weight": Block("conv_transpose", stride=2),
        "up_depthwise.weight": Block("depthwise", radius=2 / 3),
        "attention.in_proj_weight": Block("matrix", slices=3),
        "attention.in_proj_bias": Block("bias", slices=3),
        "attention.out_proj.weight": Block("matrix"),
        "attention.out_proj.bias": bias,
        "c_attn.weight": Block("matrix", neuron_dim=1, slices=3),
        "c_attn.bias": Block("bias", slices=3),
        **{f"lstm.weight_{part}_l0": Block("matrix", slices=4) for part in ("ih", "hh")},
        **{f"lstm.bias_{part}_l0": Block("bias", slices=4) for part in ("ih", "hh")},
        **{f"gru.weight_{part}_l0": Block("matrix", slices=3) for part in ("ih", "hh")},
        **{f"gru.bias_{part}_l0": Block("bias", slices=3) for part in ("ih", "hh")},
        **{f"rnn.weight_{part}_l0": Block("matrix") for part in ("ih", "hh")},
        **{f"rnn.bias_{part}_l0": bias for part in ("ih", "hh")},
        "norm.weight": Block("gain"),
        "norm.bias": Block("shift"),
        "batch.weight": Block("gain"),
        "batch.bias": Block("shift"),
        "out.weight": Block("head"),
        "out.bias": bias,
        "tied.weight": Block("tied", uses=2, radius=rms(model.tied.weight)),
    }


def set_gradients(model: nn.Module) -> None:
    for param in model.parameters():
        param.grad = torch.randn_like(param)


def block_norm(block: Block, change: Tensor) -> float:
    """The norm of a block: the largest over its parts of their 2-norm, or RMS."""
    shape = tuple(change.shape)
    key = part_key(block, shape)
    parts: dict[object, list[float]] = {}
    for index in indices(shape):
        parts.setdefault(key(index), []).append(float(change[index]))
    return max(
        math.sqrt(sum(x * x for x in part) / (len(part) if is_rms(block) else 1)) for part in parts.values()
    )


# -- every role --------------------------------------------------------------------------------------------


@FORMS
def test_every_role_equals_the_reference(form: dict[str, bool]) -> None:
    model = Zoo()
    blocks = zoo_blocks(model)
    named = dict(model.named_parameters())
    assert named.keys() == blocks.keys()
    optimizer = AGD(model, gain=1.5, **form)
    expected = [param.detach().clone() for param in named.values()]
    for t in range(4):
        set_gradients(model)
        model.lstm.weight_ih_l0.grad = None if t == 1 else model.lstm.weight_ih_l0.grad
        model.token.weight.grad[2] = 0
        model.plain.weight.grad[:, :, 0, 1] = 0
        model.norm.weight.grad[1] = 0
        lr = optimizer.param_groups[0]["lr"] = 1.0
        for group in optimizer.param_groups:
            lr = group["lr"] = 1 / (1 + t)
        optimizer.step()
        grads = [param.grad for param in named.values()]
        expected, eta, summary = agd_step(expected, grads, [blocks[name] for name in named], gain=1.5, lr=lr)
        assert float(optimizer.eta) == pytest.approx(eta, rel=1e-12)
        assert float(optimizer.gradient_summary) == pytest.approx(summary, rel=1e-12)
        for (name, param), reference in zip(named.items(), expected, strict=True):
            assert (param.detach() - reference).norm() <= 1e-12 * reference.norm() + 1e-15, name


def test_steps_have_the_prescribed_sizes_and_shares_sum_to_one() -> None:
    model = Zoo()
    blocks = zoo_blocks(model)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = AGD(model)
    set_gradients(model)
    optimizer.step()
    shares = {}
    for name, param in model.named_parameters():
        moved = block_norm(blocks[name], param.detach() - before[name])
        shares[name] = moved / float(optimizer.eta) / radius(blocks[name], tuple(param.shape))
    total = sum(share * blocks[name].uses * blocks[name].slices for name, share in shares.items())
    assert total == pytest.approx(1.0, rel=1e-10)
    largest = max(shares.values())
    for name, share in shares.items():
        assert share / largest == pytest.approx(mass(blocks[name]), rel=1e-8), name


@pytest.mark.parametrize(
    ("norm", "grad", "dual"),
    [
        ("rms", [0.3, -0.4, 0.0], 0.866025403784),
        ("max", [-0.2, 0.05], 0.25),
        ("rows", [[0.3, 0.4], [0.0, 0.0], [-0.05, 0.12]], 0.890954544295),
    ],
    ids=["bias", "gain", "embedding"],
)
def test_worked_duals(norm: str, grad: list[float], dual: float) -> None:
    weight = nn.Parameter(torch.zeros_like(torch.tensor(grad).double()))
    weight.grad = torch.tensor(grad, dtype=torch.float64)
    optimizer = AGD([{"params": [weight], "norm": norm}])
    optimizer.step()
    assert float(optimizer.gradient_summary) == pytest.approx(dual, abs=1e-11)


KINDS = {
    "matrix": ((4, 3), Block("matrix"), {"norm": "frobenius"}),
    "packed": ((6, 3), Block("matrix", slices=3), {"norm": "frobenius", "slices": 3}),
    "conv": ((3, 2, 2, 2), Block("conv"), {"norm": "frobenius"}),
    "grouped": ((4, 2, 2), Block("conv", groups=2), {"norm": "frobenius", "groups": 2}),
    "depthwise": ((4, 1, 2, 2), Block("depthwise"), {"norm": "filters"}),
    "transposed": (
        (4, 2, 3, 2),
        Block("conv_transpose", groups=2, stride=2),
        {"norm": "frobenius", "groups": 2, "neuron_dim": 1, "stride": 2},
    ),
    "embedding": ((5, 3), Block("embedding"), {"norm": "rows"}),
    "position": ((2, 3, 4), Block("position", neuron_dim=(0, 1)), {"norm": "rows", "neuron_dim": (0, 1)}),
    "bias": ((6,), Block("bias"), {"norm": "rms"}),
    "packed bias": ((6,), Block("bias", slices=3), {"norm": "rms", "slices": 3}),
    "gain": ((6,), Block("gain"), {"norm": "max"}),
    "scalar": ((), Block("scalar"), {"norm": "rms"}),
    "unknown": ((2, 3, 2), Block("unknown"), {"norm": "rms"}),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_step_is_the_steepest_in_its_unit_ball(name: str) -> None:
    shape, block, options = KINDS[name]
    weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    weight.grad = torch.randn(shape, dtype=torch.float64)
    optimizer = AGD([{"params": [weight], **options}])
    optimizer.step()
    r = radius(block, shape)
    a = -weight.detach() / (float(optimizer.eta) * r) * block.slices  # share 1/slices
    dual = float(optimizer.gradient_summary) / r * block.slices
    assert block_norm(block, a) == pytest.approx(1.0, rel=1e-12)
    assert float((weight.grad * a).sum()) == pytest.approx(dual, rel=1e-12)
    for _ in range(1000):
        other = torch.randn(shape, dtype=torch.float64) + torch.rand(()) * 3 * a
        other /= block_norm(block, other)
        assert float((weight.grad * other).sum()) <= dual * (1 + 1e-12)


# -- packed, tied, padded ----------------------------------------------------------------------------------


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.out = nn.Linear(4, 2)


class Split(nn.Module):
    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.out = nn.Linear(4, 2)
        self.out.load_state_dict(packed.out.state_dict())
        for i, part in enumerate(self.qkv):
            part.load_state_dict({k: v[4 * i : 4 * i + 4] for k, v in packed.qkv.state_dict().items()})


def test_a_packed_projection_moves_as_three_linears_do() -> None:
    packed = Packed().double()
    split = Split(packed).double()
    one, other = AGD(packed), AGD(split)
    for _ in range(3):
        x, y = torch.randn(7, 4).double(), torch.randn(7, 2).double()
        for optimizer, parts in (
            (one, packed.qkv(x).chunk(3, dim=1)),
            (other, [part(x) for part in split.qkv]),
        ):
            model = packed if optimizer is one else split
            optimizer.zero_grad()
            (model.out(parts[0] * parts[1].tanh() + parts[2]) - y).square().mean().backward()
            optimizer.step()
        torch.testing.assert_close(one.eta, other.eta, rtol=1e-12, atol=0)
    joined = [torch.cat([getattr(part, name) for part in split.qkv]) for name in ("weight", "bias")]
    torch.testing.assert_close(
        [packed.qkv.weight.detach(), packed.qkv.bias.detach()], [j.detach() for j in joined]
    )


def test_recurrent_gates_are_slices() -> None:
    for layer, gates in ((nn.LSTM(3, 2), 4), (nn.GRU(3, 2), 3), (nn.RNN(3, 2), 1)):
        groups = {name: group for group in AGD(layer).param_groups for name in group["param_names"]}
        assert {
            groups[f"{kind}_{part}_l0"]["slices"] for kind in ("weight", "bias") for part in ("ih", "hh")
        } == {gates}


def test_padding_and_unseen_rows_keep_their_bits() -> None:
    model = nn.Sequential(nn.Embedding(6, 4, padding_idx=0), nn.Linear(4, 3))
    before = model[0].weight.detach().clone()
    optimizer = AGD(model)
    model(torch.tensor([[0, 2, 3, 2]])).square().sum().backward()
    optimizer.step()
    after = model[0].weight.detach()
    assert torch.equal(after[[0, 1, 4, 5]], before[[0, 1, 4, 5]])
    moved = (after - before)[[2, 3]].square().mean(dim=1).sqrt()  # every seen row by the same RMS
    assert float(moved[0]) == pytest.approx(float(moved[1]), rel=1e-5)
    assert float(moved[0]) > 0


def test_a_tied_weight_counts_twice_and_moves_by_its_rows() -> None:
    embedding, head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, nn.Linear(4, 4, bias=False), head)
    (tied,) = [group for group in AGD(model).param_groups if group["uses"] == 2]
    assert tied["norm"] == "rows"
    assert tied["radius"] == pytest.approx(float(embedding.weight.detach().square().mean().sqrt()), rel=1e-6)


# -- what the module form promises -------------------------------------------------------------------------


def test_a_bias_free_module_and_its_parameters_give_the_same_steps() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(
            nn.Sequential(
                nn.Conv2d(2, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3, bias=False)
            )
        )
    optimizers = [AGD(models[0]), AGD(models[1].parameters())]
    for _ in range(5):
        x = torch.randn(6, 2, 4, 4)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


def test_a_weight_of_fan_in_1_is_a_gain_unless_an_override_says_matrix() -> None:
    twins = [nn.Sequential(nn.Linear(1, 4, bias=False), nn.Linear(4, 3, bias=False)) for _ in range(3)]
    grads = [torch.randn_like(param) for param in twins[0].parameters()]
    for model in twins[1:]:
        model.load_state_dict(twins[0].state_dict())
    by_role, overridden = AGD(twins[0]), AGD(twins[1], roles={r"0\.weight": "matrix"})
    published = AGD(twins[2].parameters())
    for model in twins:
        for param, grad in zip(model.parameters(), grads, strict=True):
            param.grad = grad
    for optimizer in (by_role, overridden, published):
        optimizer.step()
    torch.testing.assert_close(overridden.eta, published.eta)
    for a, b in zip(twins[1].parameters(), twins[2].parameters(), strict=True):
        torch.testing.assert_close(a, b)
    moved = (twins[0][0].weight - twins[2][0].weight).detach()
    assert moved.abs().max() > 1e-3
    assert by_role.param_groups[0]["norm"] == "max"


def test_construction_keeps_initial_weights_and_makes_plain_groups() -> None:
    model = Zoo()
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = AGD(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    options = {type(v) for group in optimizer.param_groups for k, v in group.items() if "param" not in k}
    assert options <= {str, int, float, bool, tuple, type(None)}


def test_a_reloaded_module_form_goes_on_bit_for_bit_with_its_measured_radii() -> None:
    model, other = Zoo().float(), Zoo().float()  # other initial weights, so other measured radii
    optimizer = AGD(model)
    set_gradients(model)
    optimizer.step()
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    buffer.seek(0)
    weights, state = torch.load(buffer, weights_only=True)
    resumed = AGD(other)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    set_gradients(model)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        b.grad = a.grad.clone()
    optimizer.step()
    resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert not optimizer.state
    assert not resumed.state


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Parameter(torch.randn(2, 3, 4, 5))
        self.out = nn.Linear(3, 2)


def test_an_unknown_parameter_is_named_with_the_remedy_and_moves_as_one_vector() -> None:
    model = Odd()
    with pytest.warns(ArchoptWarning, match=r"role of core:.* AGD\(model, roles=\{'core': 'matrix'\}\)"):
        optimizer = AGD(model)
    before = model.core.detach().clone()
    set_gradients(model)
    optimizer.step()
    moved = float((model.core.detach() - before).square().mean().sqrt())
    share = 1 / 2.25  # core, out.weight, out.bias
    assert moved == pytest.approx(
        float(optimizer.eta) * share * float(before.square().mean().sqrt()), rel=1e-4
    )
    (group,) = [
        group for group in AGD(Odd(), roles={"core": "conv"}).param_groups if "core" in group["param_names"]
    ]
    assert group["norm"] == "frobenius"


def test_a_part_of_the_network_can_be_given_other_options() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = AGD(model)
    before = [layer.weight.detach().clone() for layer in model]
    set_gradients(model)
    groups = [group for group in optimizer.param_groups if group["norm"] == "frobenius"]
    groups[0] |= {"gain": 2.0, "radius": 0.5}
    optimizer.step()
    moved = [float((layer.weight.detach() - b).norm()) for layer, b in zip(model, before, strict=True)]
    shares = 1 / 2.5
    assert moved[0] == pytest.approx(2.0 * 0.5 * shares * float(optimizer.eta), rel=1e-5)


def test_the_steps_of_a_deep_network_with_everything_stay_finite() -> None:
    layers = [
        nn.Sequential(nn.Linear(a, b), nn.LayerNorm(b), nn.GELU()) for a, b in pairwise([8] + [16] * 10)
    ]
    model = nn.Sequential(*layers, nn.Linear(16, 3))
    optimizer = AGD(model)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(32, 8)), torch.randint(0, 3, (32,))).backward()
        optimizer.step()
    assert all(param.isfinite().all() for param in model.parameters())
    assert int(optimizer.skipped_steps) == 0
