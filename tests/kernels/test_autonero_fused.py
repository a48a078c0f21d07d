"""AutoNero's fused form on the CPU: accuracy, the same bits for every thread and instruction set, refusals.

That it follows the rule is held elsewhere: by the worked numbers and the float64 reference
(tests/maths/test_autonero.py) and by the shared database of cases (tests/contract). The GPU kernels have their own
tests (tests/kernels/gpu).
"""

import copy
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import archopt
from archopt import kernels
from archopt.kernels import cpu
from archopt.optim import autonero_fused
from archopt.optim.autonero import module_groups
from kernels.test_cpu import refusal

STATUS = kernels.status()["cpu"]
pytestmark = pytest.mark.skipif(not STATUS.available, reason=f"no CPU kernel: {STATUS.detail}")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# At the first angles of the default, from 1e-5 on, a movement in float32 is mostly the rounding of weights.
AutoNero = functools.partial(archopt.AutoNero, initial_theta=0.01)


class Net(nn.Module):
    """Rows of every kind, short and long, in blocks, of zeros; a table, a head with its bias, vectors, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 12, padding_idx=1)
        self.first = nn.Linear(12, 8)
        self.twin = nn.Linear(12, 8)
        self.odd = nn.Linear(13, 5, bias=False)
        self.wide = nn.Linear(2500, 3, bias=False)
        self.zero_rows = nn.Linear(8, 6, bias=False)
        self.filters = nn.Conv2d(4, 6, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(3000)
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.head = nn.Linear(8, 5)
        with torch.no_grad():
            self.zero_rows.weight[1::2] = 0
            self.filters.weight.data = self.filters.weight.data.contiguous(memory_format=torch.channels_last)


def build(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().to(dtype)


def give_gradients(model: nn.Module, t: int, skip: tuple[str, ...] = ()) -> None:
    generator = torch.Generator().manual_seed(t)
    for name, param in model.named_parameters():
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)
        param.grad = None if name in skip else torch.empty_like(param).copy_(grad)
        if param.grad is not None and param.dim() == 2:
            param.grad[1] = 0


def steps(model: nn.Module, optimizer: archopt.AutoNero, times: range) -> None:
    for t in times:
        give_gradients(model, t, skip=("first.weight",) if t == 2 else ())
        optimizer.step()


def values(model: nn.Module, optimizer: archopt.AutoNero) -> dict[str, Tensor]:
    """Weights and state, by name."""
    found = {}
    for name, param in model.named_parameters():
        found[name] = param.detach().clone()
        for key, value in optimizer.state.get(param, {}).items():
            found[f"{name}/{key}"] = value.clone()
    return found


# -- the same step -----------------------------------------------------------------------------------------

# Of each tensor's norm. The movement is a difference of weights over theta = 0.01, so a hundred times less exact.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"head": "turn", "radius_exponent": 0.5, "embedding_radius": "grow", "maximize": True},
        {"radius": "unit", "beta": 0.0, "orthogonalise": "svd"},
        {"beta": 0.3, "lr": torch.tensor(0.5)},
    ],
    ids=["default", "turning head", "no momentum", "tensor rate"],
)
def test_fused_follows_foreach(dtype: torch.dtype, options: dict[str, Any]) -> None:
    model, twin = build(dtype), build(dtype)
    fused, foreach = AutoNero(model, fused=True, **options), AutoNero(twin, foreach=True, **options)
    steps(model, fused, range(8))
    steps(twin, foreach, range(8))
    found, expected = values(model, fused), values(twin, foreach)
    for name, wanted in expected.items():
        gap, size = float((found[name] - wanted).double().norm()), float(wanted.double().norm())
        bound = TOLERANCE[dtype] * (100 if name.endswith(("movement", "feedback")) else 1)
        assert gap <= bound * size, f"{name} differs by {gap:.3g} of {size:.3g}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_float32_rounded_once(dtype: torch.dtype) -> None:
    """After a step statistics and movement are to the bit those of float32 weights, and weights theirs, rounded."""
    model = build(dtype)
    exact = copy.deepcopy(model).float()
    fused, wide = AutoNero(model, fused=True), AutoNero(exact, fused=True)
    exact.load_state_dict(model.state_dict())
    give_gradients(model, 0)
    for param, twin in zip(model.parameters(), exact.parameters(), strict=True):
        twin.grad = param.grad.float()
    fused.step()
    wide.step()
    found, expected = values(model, fused), values(exact, wide)
    for name, wanted in expected.items():
        assert torch.equal(found[name], wanted if "/" in name else wanted.to(dtype)), name


def test_a_movement_in_bfloat16_is_the_one_in_float32_rounded() -> None:
    model, twin = build(), build()
    narrow, exact = AutoNero(model, fused=True, movement_dtype="bfloat16"), AutoNero(twin, fused=True)
    steps(model, narrow, range(1))
    steps(twin, exact, range(1))
    found, expected = values(model, narrow), values(twin, exact)
    for name, wanted in expected.items():
        assert torch.equal(found[name], wanted.bfloat16() if name.endswith("movement") else wanted), name


# -- accuracy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fan_in", [2, 17, 1000, 1025, 100_003, 1_000_000])
@pytest.mark.parametrize("kind", ["ordinary", "tiny", "large", "all alike"])
def test_sums_are_those_of_float64(fan_in: int, kind: str) -> None:
    """Float32 rows of up to a million entries: weights, v, radii, G and C against the same steps in float64."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, fan_in, generator=generator) / math.sqrt(fan_in)
    gradients = [torch.randn(2, fan_in, generator=generator) for _ in range(2)]
    if kind in ("tiny", "large"):
        gradients = [grad * ((1e-15 if kind == "tiny" else 1e15) / math.sqrt(fan_in)) for grad in gradients]
    if kind == "all alike":  # every rounding of a sum of squares goes the same way
        gradients = [torch.full_like(grad, 1 / 3) for grad in gradients]
    pair = []
    for dtype in (torch.float32, torch.float64):
        param = nn.Parameter(weight.to(dtype, copy=True))
        optimizer = AutoNero(
            [{"params": [param], "family": "embedding"}], fused=True, embedding_radius="own", radius="own"
        )
        with torch.no_grad():
            optimizer._create_state()
        # torch's norm of a million float32 entries is good to 1e-5 alone.
        optimizer.state[param]["radius"].copy_(weight.double().norm(dim=1, keepdim=True))
        for grad in gradients:
            param.grad = grad.to(dtype)
            optimizer.step()
        pair.append((param, optimizer))
    (found, ours), (exact, theirs) = pair
    assert float((found.detach().double() - exact.detach()).norm() / exact.detach().norm()) <= 1e-6
    for key in ("exp_avg_sq", "radius"):
        torch.testing.assert_close(
            ours.state[found][key].double(), theirs.state[exact][key], rtol=2e-6, atol=0.0
        )
    assert float(ours.feedback.size) == pytest.approx(float(theirs.feedback.size), rel=2e-6)
    # The movement is that of weights, which are rounded: to 6e-8, over theta.
    assert float(ours.G) == pytest.approx(float(theirs.G), rel=1e-4)
    length = float(gradients[1].double().norm() * theirs.state[exact]["movement"].norm())
    assert float(ours.C) == pytest.approx(float(theirs.C), abs=1e-5 * length)


# -- the same bits -----------------------------------------------------------------------------------------


def trajectory(dtype: torch.dtype) -> dict[str, Tensor]:
    model = build(dtype)
    optimizer = AutoNero(model, fused=True)
    steps(model, optimizer, range(3))
    return values(model, optimizer)


@pytest.fixture
def simple_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Polar factors without matrix products, whose bits depend on torch's threads."""
    monkeypatch.setattr(autonero_fused, "orthogonalise", lambda matrices, method: matrices.sign())


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_number_of_threads(
    dtype: torch.dtype, simple_directions: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trajectory(dtype)
    for threads in (2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found = trajectory(dtype)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_instruction_set(
    dtype: torch.dtype, simple_directions: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = cpu._library()
    expected = trajectory(dtype)
    for count in range(1, len(library.instructions)):
        older = library._replace(instructions=library.instructions[:count])
        monkeypatch.setattr(cpu, "_library", lambda older=older: older)
        found = trajectory(dtype)
        assert all(torch.equal(found[name], expected[name]) for name in expected), older.instructions[-1]


# -- steps that are void, and state ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_void_steps_keep_every_bit(value: float, dtype: torch.dtype) -> None:
    model = build(dtype)
    optimizer = AutoNero(model, fused=True)
    steps(model, optimizer, range(2))
    before = values(model, optimizer)
    give_gradients(model, 2, skip=("twin.weight",))
    for name, param in model.named_parameters():
        if value == 0 and param.grad is not None:
            param.grad.zero_()
        elif name == "norm.bias":
            param.grad[1] = value
    optimizer.step()
    after = values(model, optimizer)
    for name, expected in before.items():
        assert name.endswith("feedback") or torch.equal(after[name], expected), name
    assert int(optimizer.skipped) == (value != 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_goes_to_every_form_and_back_to_the_bit(dtype: torch.dtype) -> None:
    model = build(dtype)
    optimizer = AutoNero(model, fused=True)
    steps(model, optimizer, range(3))
    expected = values(model, optimizer)
    net = model
    for form in ({"foreach": True}, {"foreach": False}, {"fused": True}):
        net = copy.deepcopy(net)
        other = AutoNero(net, embedding_radius="own", **form)
        other.load_state_dict(optimizer.state_dict())
        optimizer = other
        found = values(net, other)
        assert all(torch.equal(found[name], expected[name]) for name in expected), form


def test_autograd_sees_that_weights_changed() -> None:
    """A weight that a graph has saved was overwritten: backward must say so rather than use the new values."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = AutoNero(model, fused=True)
    losses = [(param * param).sum() for param in model.parameters()]
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# -- what is served ----------------------------------------------------------------------------------------


def served_by(optimizer: archopt.AutoNero, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Notes the weights that the kernel is given from now on."""
    served: list[Tensor] = []
    make = autonero_fused.CpuPasses

    def passes(tensors: Any, options: Any) -> Any:
        served.extend([tensor.weight for tensor in tensors])
        return make(tensors, options)

    monkeypatch.setattr(autonero_fused, "CpuPasses", passes)
    return served


def test_none_takes_the_kernel_for_what_it_serves_and_foreach_for_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ConvTranspose2d(2, 3, 2), nn.Linear(4, 2))
    optimizer = AutoNero(model)
    before = [param.detach().clone() for param in model.parameters()]
    served = served_by(optimizer, monkeypatch)
    steps(model, optimizer, range(1))
    unserved = model[1].weight
    assert {id(p) for p in served} == {id(p) for p in model.parameters() if p is not unserved}
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for options in ({"fused": False}, {"foreach": True}, {"foreach": False}):
        served.clear()
        for group in optimizer.param_groups:
            group.update({"fused": None, "foreach": None} | options)
        steps(model, optimizer, range(1, 2))
        assert not served, options


def test_a_mixed_step_is_the_step_of_foreach() -> None:
    """Tensors of both forms share one feedback; heads read biases, whichever form moves them."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict(
            {"up": nn.ConvTranspose2d(2, 3, 2), "head": nn.Linear(6, 4), "tokens": nn.Embedding(5, 6)}
        )

    for own in ({"fused": None}, {"fused": False, "foreach": True}):
        nets = make().double(), make().double()
        optimizers = []
        for net, form in zip(nets, (own, {"foreach": True}), strict=True):
            groups = module_groups(net, roles={"head.weight": "head"})
            for group in groups:
                group.update(form if group["family"] in ("head", "embedding") else {"foreach": True})
            optimizers.append(AutoNero(groups))
        for net, optimizer in zip(nets, optimizers, strict=True):
            steps(net, optimizer, range(5))
        found, expected = values(nets[0], optimizers[0]), values(nets[1], optimizers[1])
        for name, wanted in expected.items():
            assert float((found[name] - wanted).norm()) <= 1e-10 * float(wanted.norm()), name


def with_weight(tensor: Tensor, **options: Any) -> list[dict[str, Any]]:
    return [{"params": [nn.Parameter(tensor)], "family": "hidden", **options}]


@pytest.mark.parametrize(
    ("weight", "options", "reason"),
    [
        (lambda: torch.ones(4, 6)[:, ::2], {}, "do not fill one piece of memory"),
        (lambda: torch.ones(4, 3).t(), {}, "not neighbours in memory"),
        (lambda: torch.ones(2, 3, 2, 2), {"neuron_dim": 1}, "not neighbours in memory"),
    ],
    ids=["gaps", "transposed", "columns"],
)
def test_weights_that_cannot_be_served_are_refused_at_construction(weight, options, reason):
    refused = refusal(lambda: AutoNero(with_weight(weight(), **options), fused=True))
    for words in ("fused=True cannot be honoured", reason, "fused=None", str(tuple(weight().shape))):
        assert words in refused


def test_gradients_and_state_that_cannot_be_served_are_refused_before_anything_moves() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    optimizer = AutoNero(model, fused=True)
    steps(model, optimizer, range(1))
    before = values(model, optimizer)
    give_gradients(model, 1)
    good = model[1].weight.grad
    model[1].weight.grad = good.t().contiguous().t()
    assert "its gradient has strides" in refusal(optimizer.step)
    model[1].weight.grad = good
    movement = optimizer.state[model[1].weight]["movement"]
    optimizer.state[model[1].weight]["movement"] = movement.bfloat16()
    assert "its movement is torch.bfloat16" in refusal(optimizer.step)
    optimizer.state[model[1].weight]["movement"] = movement
    after = values(model, optimizer)
    assert all(torch.equal(after[name], before[name]) for name in before)
    optimizer.step()
    assert not torch.equal(model[1].weight, before["1.weight"])


def test_without_a_library_other_forms_serve_and_true_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_library", lambda: "not built: no C compiler was found")
    model = nn.Sequential(nn.Linear(3, 4))
    optimizer = AutoNero(model)
    before = model[0].weight.detach().clone()
    steps(model, optimizer, range(1))
    assert not torch.equal(model[0].weight, before)
    assert "no C compiler" in refusal(lambda: AutoNero(model, fused=True))


# -- norms after the step ----------------------------------------------------------------------------------


def table_step(rows: Tensor, grad: Tensor, lr: float, **options: Any) -> tuple[Tensor, Tensor]:
    """An embedding's rows after a first step of lr/8 radians, and how long they were before it."""
    table = nn.Embedding.from_pretrained(rows.clone(), freeze=False)
    model = nn.Sequential(table, nn.Linear(rows.shape[1], 2, bias=False, dtype=rows.dtype))
    optimizer = archopt.AutoNero(model, initial_theta=0.125, embedding_radius="own", lr=lr, **options)
    table.weight.grad, model[1].weight.grad = grad.clone(), torch.ones_like(model[1].weight)
    before = table.weight.detach().double().norm(dim=1)
    optimizer.step()
    assert float(optimizer.theta) == 0.125
    return table.weight.detach().double(), before


@pytest.mark.parametrize("fan_in", [2, 64, 1025])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_a_row_that_its_step_nearly_undoes_is_as_in_float64(fan_in: int, share: float) -> None:
    """The gradient lies nearly along the row, and the step is `share` as long: the four sums alone would cancel."""
    torch.manual_seed(0)
    rows = torch.randn(5, fan_in)
    grad = rows + 1e-2 * rows.roll(1, dims=1)
    found, _ = table_step(rows, grad, 8 * share, fused=True)
    exact, _ = table_step(rows.double(), grad.double(), 8 * share, foreach=False, fused=False)
    assert (found - exact).norm() <= 1e-3 * exact.norm()


def test_rows_keep_their_norm_where_squares_of_gradients_vanish() -> None:
    torch.manual_seed(0)
    rows = torch.randn(5, 1000)
    found, before = table_step(rows, 3e-21 * torch.randn(5, 1000), 8.0, fused=True)
    assert not torch.equal(found, rows.double())
    torch.testing.assert_close(found.norm(dim=1), before, rtol=1e-6, atol=0)
