"""Gradients of every kind: not finite, tiny, huge, strided, of every layer of torch.nn."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from contract.behaviours import EAGER, behaviour
from contract.behaviours.problems import (
    Weights,
    assert_close,
    assert_moved,
    assert_same_bits,
    copy_of,
    give_gradients,
    layer_with,
    model_for,
    named_tensors,
    random,
    state_tensors,
    train,
)


@behaviour(value=(float("nan"), float("inf"), -float("inf")), dtype=(torch.float32, torch.bfloat16))
def non_finite_gradient_leaves_no_trace(make: Any, *, value: float, dtype: torch.dtype) -> None:
    """What the rule skips (a row, a tensor or the step) keeps weight and statistics, is counted, and trains on."""
    model, twin = model_for(make, dtype), model_for(make, dtype)
    optimizer, other = make(model), make(twin)
    train(model, optimizer, range(3))
    train(twin, other, range(3))
    before, counted = copy_of(model), int(make.skipped(optimizer))
    for module, opt, bad in ((model, optimizer, True), (twin, other, False)):
        give_gradients(module, 3)
        if bad:
            module.hidden.weight.grad[2, 2] = value
        opt.step()
    assert int(make.skipped(optimizer)) == counted + 1, "the skip was not counted"
    assert int(make.skipped(other)) == 0, "a finite step was counted as skipped"

    after, expected = copy_of(model), copy_of(twin)
    for name in after:
        if make.skips == "step" or (make.skips == "tensor" and name == "hidden.weight"):
            expected[name] = before[name]
    if make.skips == "row":
        neuron = (slice(None),) * make.neuron_dim + (2,)
        expected["hidden.weight"][neuron] = before["hidden.weight"][neuron]
    assert_same_bits(after, expected, "weights after a step with one bad gradient")
    assert all(torch.isfinite(value).all() for value in state_tensors(optimizer).values()), (
        "state is not finite"
    )

    train(model, optimizer, range(4, 6))
    assert_moved(model, after)
    assert int(make.skipped(optimizer)) == counted + 1


@behaviour()
def everything_non_finite_changes_nothing(make: Any) -> None:
    """A step whose every gradient is NaN keeps every weight, from fresh state as well."""
    model = model_for(make)
    optimizer = make(model)
    before = copy_of(model)
    for _ in range(2):
        give_gradients(model, 0, scale=float("nan"))
        optimizer.step()
    assert_same_bits(copy_of(model), before, "weights after NaN gradients")
    train(model, optimizer, range(3))
    assert_moved(model, before)


SIZES = (
    (torch.float32, 1e-45),
    (torch.float32, 1e-30),
    (torch.float32, 1e-20),
    (torch.float32, 1e19),
    (torch.float32, 1e30),
    (torch.float16, 1e-7),
    (torch.float16, 1e-6),
    (torch.float16, 1e-4),
    (torch.float16, 1e4),
    (torch.bfloat16, 1e-30),
    (torch.bfloat16, 1e30),
)


@behaviour(size=SIZES)
def tiny_and_huge_gradients_stay_finite(make: Any, *, size: tuple[torch.dtype, float]) -> None:
    """Gradients near the ends of their type, alone and next to ordinary ones, give no inf, no NaN, no leap."""
    dtype, scale = size
    for everywhere in (True, False):
        model = model_for(make, dtype)
        optimizer = make(model)
        before = copy_of(model)
        for t in range(3):
            give_gradients(model, t)
            for name, param in model.named_parameters():
                if everywhere or name == "hidden.weight":
                    param.grad.clamp_(-2, 2).mul_(scale)  # type: ignore[union-attr]
            optimizer.step()
        for name, param in model.named_parameters():
            moved = (param.detach().double() - before[name].double()).norm()
            assert torch.isfinite(param).all(), f"{name} is not finite"
            assert moved <= 1000 * (1 + before[name].double().norm()), f"{name} leapt by {moved.item():.3g}"


def _unlike_layouts(make: Any) -> dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """Tensors and what puts them, and their gradients, into another memory layout."""
    layouts: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
        "transposed": (random(5, 4), lambda t: t.t().contiguous().t()),
        "every other column": (random(5, 4), lambda t: torch.stack([t, t], -1)[..., 0]),
    }
    if 4 in make.dims:
        layouts["channels last"] = (
            random(3, 4, 2, 2),
            lambda t: t.contiguous(memory_format=torch.channels_last),
        )
    if 5 in make.dims:
        layouts["channels last 3d"] = (
            random(3, 4, 2, 2, 2),
            lambda t: t.contiguous(memory_format=torch.channels_last_3d),
        )
    return layouts


@behaviour(gradient_too=(True, False))
def memory_layout_does_not_matter(make: Any, *, gradient_too: bool) -> None:
    """Channels-last and other strided weights train as contiguous ones and keep their strides."""
    for layout, (tensor, change) in _unlike_layouts(make).items():
        plain, strided = layer_with(tensor.clone()), layer_with(change(tensor))
        strides = strided.weight.stride()
        optimizer, other = make(plain), make(strided)
        for t in range(4):
            give_gradients(plain, t)
            grad = plain.weight.grad
            strided.weight.grad = change(grad) if gradient_too else grad.clone()
            optimizer.step()
            other.step()
        assert_close(copy_of(strided), copy_of(plain), 1e-5, layout)
        assert strided.weight.stride() == strides, f"{layout}: strides changed"


@behaviour()
def expanded_gradient_is_read(make: Any) -> None:
    """A gradient with stride 0, as the sum over an output gives, is read like any other and not written."""
    plain, expanded = named_tensors(weight=random(4, 3)), named_tensors(weight=random(4, 3))
    optimizer, other = make(plain), make(expanded)
    for t in range(3):
        row = random(4, 1, seed=t)
        plain.weight.grad = row.repeat(1, 3)
        expanded.weight.grad = row.expand(4, 3)
        optimizer.step()
        other.step()
        assert torch.equal(expanded.weight.grad, row.expand(4, 3))
    assert_close(copy_of(expanded), copy_of(plain), 1e-6, "expanded gradient")


@behaviour()
def frozen_weights_keep_bits(make: Any) -> None:
    """A frozen parameter keeps its bits through construction and steps, then trains once it is released."""
    model = model_for(make)
    model.hidden.weight.requires_grad_(False)
    before = copy_of(model)
    optimizer = make(model)
    _steps(model, optimizer, 3)
    assert_same_bits(
        {"hidden.weight": model.hidden.weight}, {"hidden.weight": before["hidden.weight"]}, "a frozen weight"
    )
    assert_moved(model, before, [name for name in before if name != "hidden.weight"])
    model.hidden.weight.requires_grad_(True)
    _steps(model, optimizer, 3)
    assert_moved(model, before)


def _steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for t in range(count):
        give_gradients(model, t)
        optimizer.step()


class Tied(nn.Module):
    """An embedding whose weight is also the output head's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


@behaviour()
def tied_weight_moves_once(make: Any) -> None:
    """A weight with two names takes one step, equal to that of a model that holds it once."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tied = Tied()
    optimizer = make(tied)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 1
    before = copy_of(tied)
    tied(torch.arange(6)).logsumexp(1).sum().backward()
    optimizer.step()
    assert tied.head.weight is tied.embedding.weight
    assert_moved(tied, before)


def _recurrent(kind: type[nn.Module]) -> Callable[[nn.Module], Tensor]:
    return lambda module: module(random(5, 2, 4))[0].square().sum()


def _attend(module: nn.Module) -> Tensor:
    x = random(5, 2, 4)
    return module(x, x, x)[0].square().sum()


LAYERS: dict[str, tuple[Callable[[bool], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "Linear": (lambda bias: nn.Linear(4, 3, bias=bias), lambda m: m(random(5, 4)).square().sum()),
    "Linear to one": (lambda bias: nn.Linear(4, 1, bias=bias), lambda m: m(random(5, 4)).square().sum()),
    "Linear from one": (lambda bias: nn.Linear(1, 4, bias=bias), lambda m: m(random(5, 1)).square().sum()),
    "Bilinear": (
        lambda bias: nn.Bilinear(4, 3, 2, bias=bias),
        lambda m: m(random(5, 4), random(5, 3)).square().sum(),
    ),
    "Conv1d": (lambda bias: nn.Conv1d(4, 3, 3, bias=bias), lambda m: m(random(2, 4, 5)).square().sum()),
    "Conv2d": (lambda bias: nn.Conv2d(4, 3, 3, bias=bias), lambda m: m(random(2, 4, 5, 5)).square().sum()),
    "Conv3d": (lambda bias: nn.Conv3d(4, 3, 2, bias=bias), lambda m: m(random(2, 4, 3, 3, 3)).square().sum()),
    "grouped Conv2d": (
        lambda bias: nn.Conv2d(4, 6, 3, groups=2, bias=bias),
        lambda m: m(random(2, 4, 5, 5)).square().sum(),
    ),
    "depthwise Conv2d": (
        lambda bias: nn.Conv2d(4, 4, 3, groups=4, bias=bias),
        lambda m: m(random(2, 4, 5, 5)).square().sum(),
    ),
    "depthwise 1x1 Conv2d": (
        lambda bias: nn.Conv2d(4, 4, 1, groups=4, bias=bias),
        lambda m: m(random(2, 4, 5, 5)).square().sum(),
    ),
    "ConvTranspose1d": (
        lambda bias: nn.ConvTranspose1d(4, 3, 2, bias=bias),
        lambda m: m(random(2, 4, 5)).square().sum(),
    ),
    "ConvTranspose2d": (
        lambda bias: nn.ConvTranspose2d(4, 3, 3, stride=2, bias=bias),
        lambda m: m(random(2, 4, 5, 5)).square().sum(),
    ),
    "grouped ConvTranspose2d": (
        lambda bias: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=bias),
        lambda m: m(random(2, 4, 5, 5)).square().sum(),
    ),
    "Embedding": (
        lambda bias: nn.Embedding(6, 4),
        lambda m: m(torch.tensor([0, 1, 2, 3, 4, 5])).square().sum(),
    ),
    "LSTM": (lambda bias: nn.LSTM(4, 3, bias=bias), _recurrent(nn.LSTM)),
    "GRU": (lambda bias: nn.GRU(4, 3, bias=bias), _recurrent(nn.GRU)),
    "MultiheadAttention": (lambda bias: nn.MultiheadAttention(4, 2, bias=bias), _attend),
    "LayerNorm": (
        lambda bias: nn.LayerNorm(4),
        lambda m: (m(random(5, 4)) * random(5, 4, seed=1)).exp().mean(),
    ),
    "BatchNorm2d": (
        lambda bias: nn.BatchNorm2d(4),
        lambda m: (m(random(3, 4, 2, 2)) * random(3, 4, 2, 2, seed=1)).exp().mean(),
    ),
    "GroupNorm": (
        lambda bias: nn.GroupNorm(2, 4),
        lambda m: (m(random(3, 4, 2, 2)) * random(3, 4, 2, 2, seed=1)).exp().mean(),
    ),
    "PReLU": (lambda bias: nn.PReLU(), lambda m: m(random(5, 4)).square().sum()),
    "TransformerEncoderLayer": (
        lambda bias: nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, dropout=0.0, bias=bias),
        lambda m: (m(random(5, 2, 4)) * random(5, 2, 4, seed=1)).exp().mean(),
    ),
}


@behaviour(forms=EAGER, layer=tuple(LAYERS))
def layer_trains(make: Any, *, layer: str) -> None:
    """Three steps of real gradients move every tensor that has one and lose nothing to NaN."""
    build, loss = LAYERS[layer]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(1 in make.dims)
        for param in model.parameters():
            if not param.any():
                nn.init.normal_(param, std=0.1)  # zeros have a behaviour of their own
    if any(param.dim() not in make.dims for param in model.parameters()):
        return
    optimizer = make(model)
    before = copy_of(model)
    asked: set[str] = set()
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        asked |= {
            name for name, param in model.named_parameters() if param.grad is not None and param.grad.any()
        }
        optimizer.step()
    assert asked, "no gradient reached the layer"
    assert_moved(model, before, asked)
    assert all(torch.isfinite(value).all() for value in state_tensors(optimizer).values()), (
        "state is not finite"
    )


@behaviour(forms=EAGER, applies=lambda make: make.neuron_dim == 0)
def padding_row_keeps_bits(make: Any) -> None:
    """The zero row of an embedding with padding stays zero; unseen rows keep their bits without momentum."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Embedding(6, 4, padding_idx=2)
    optimizer = make(model)
    before = copy_of(model)
    for _ in range(3):
        optimizer.zero_grad()
        (model(torch.tensor([0, 1, 2, 3])) * random(4, 4)).sum().backward()
        optimizer.step()
    after = copy_of(model)
    rows: Weights = {"padding": after["weight"][2]}
    expected: Weights = {"padding": before["weight"][2]}
    if make.memoryless:
        rows["unseen"], expected["unseen"] = after["weight"][4:], before["weight"][4:]
    assert not expected["padding"].any(), "construction moved the padding row"
    assert_same_bits(rows, expected, "rows of the embedding")
    assert not torch.equal(after["weight"][0], before["weight"][0]), "a row that was seen did not move"


@behaviour()
def empty_tensors_are_left_alone(make: Any) -> None:
    """Tensors without elements cost nothing and break nothing, with a gradient or without."""
    empty = {"no_rows": torch.empty(0, 3), "no_columns": torch.empty(3, 0)}
    if 1 in make.dims:
        empty["nothing"] = torch.empty(0)
    model = named_tensors(weight=random(4, 3), **empty)
    optimizer = make(model)
    before = copy_of(model)
    for t in range(3):
        give_gradients(model, t, skip=("no_rows",) if t == 1 else ())
        optimizer.step()
    assert_moved(model, before, ["weight"])
    assert all(torch.isfinite(value).all() for value in state_tensors(optimizer).values()), (
        "state is not finite"
    )
