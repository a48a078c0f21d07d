"""Small models, gradients and comparisons that the behaviours share. All are functions of a seed."""

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Weights = dict[str, Tensor]


class Net(nn.Module):
    """A filter, two matrices and, unless the rule takes matrices alone, biases, gains, shifts and a scalar."""

    def __init__(self, dims: range) -> None:
        super().__init__()
        vectors = 1 in dims
        self.filter = nn.Conv2d(2, 3, 3, bias=vectors) if 4 in dims else nn.Identity()
        self.hidden = nn.Linear(48 if 4 in dims else 72, 6, bias=vectors)
        self.norm = nn.LayerNorm(6) if vectors else nn.Identity()
        self.head = nn.Linear(6, 4, bias=vectors)
        self.temperature = nn.Parameter(torch.tensor(0.7)) if 0 in dims else 1.0
        if vectors:
            nn.init.normal_(self.norm.bias)  # zeros have promises of their own, see the families

    def forward(self, images: Tensor) -> Tensor:
        features = self.filter(images).relu().flatten(1)
        return self.head(self.norm(self.hidden(features)).tanh()) * self.temperature


def model_for(make: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """The richest small model whose parameters the rule takes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Net(make.dims)
        return model if dtype == torch.float32 else model.to(dtype)


def named_tensors(**tensors: Tensor) -> nn.Module:
    """A module that holds the given tensors as parameters, for shapes that no ordinary layer has."""
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name, nn.Parameter(tensor))
    return module


def layer_with(weight: Tensor) -> nn.Module:
    """The layer of torch.nn that has such a weight, without bias; a bare parameter where there is none."""
    if weight.dim() not in (2, 3, 4, 5):
        return named_tensors(weight=weight)
    if weight.dim() == 2:
        layer: nn.Module = nn.Linear(1, 1, bias=False)
    else:
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[weight.dim() - 3]
        layer = kind(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=False)
    layer.weight = nn.Parameter(weight)
    return layer


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, the same for every call with the same seed and shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def batch(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Eight images and their classes, for `Net`."""
    generator = torch.Generator().manual_seed(seed)
    return random(8, 2, 6, 6, seed=seed, dtype=dtype), torch.randint(4, (8,), generator=generator)


def loss_of(model: nn.Module, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    images, classes = batch(dtype, seed)
    return nn.functional.cross_entropy(model(images).float(), classes)


def give_gradients(model: nn.Module, t: int, *, skip: Iterable[str] = (), scale: float = 1.0) -> None:
    """Writes gradients that depend on `t` and each parameter's name alone; none for the names in `skip`."""
    for name, param in model.named_parameters():
        if name in skip or not param.requires_grad:
            param.grad = None
            continue
        seed = zlib.crc32(name.encode()) + 104729 * t
        grad = scale * random(*param.shape, seed=seed, dtype=param.dtype)
        param.grad = torch.empty_like(param).copy_(grad)  # in the memory layout of the weight


def zero_first_row(model: nn.Module, name: str) -> None:
    grad = dict(model.named_parameters())[name].grad
    assert grad is not None
    grad[0] = 0


def train(model: nn.Module, optimizer: Optimizer, steps: Iterable[int]) -> None:
    """Steps with the gradients of those step numbers; some rows and some tensors go without one at times."""
    for t in steps:
        give_gradients(model, t, skip=("head.weight",) if t % 3 == 2 else ())
        if t % 2:
            zero_first_row(model, "hidden.weight")
        optimizer.step()


def copy_of(model: nn.Module) -> Weights:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, so that -0.0 differs from 0.0 and a NaN equals itself."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def assert_same_bits(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    assert actual.keys() == expected.keys(), f"{what}: {sorted(actual)} against {sorted(expected)}"
    for name in expected:
        a, e = actual[name], expected[name]
        assert a.dtype == e.dtype, f"{what}: {name} is {a.dtype}, expected {e.dtype}"
        assert a.shape == e.shape, f"{what}: {name} has shape {tuple(a.shape)}, expected {tuple(e.shape)}"
        if not torch.equal(bits(a), bits(e)):
            gap = (a.detach().double() - e.detach().double()).abs().max().item()
            raise AssertionError(f"{what}: {name} differs by up to {gap:.3g}")


def assert_moved(model: nn.Module, before: Weights, names: Iterable[str] | None = None) -> None:
    """Each tensor moved and is finite; in half precision, whose rounding hides small moves, at least one did."""
    after = copy_of(model)
    names = list(before if names is None else names)
    for name in names:
        assert torch.isfinite(after[name]).all(), f"{name} is not finite"
    still = [name for name in names if torch.equal(after[name], before[name])]
    if all(after[name].dtype in (torch.bfloat16, torch.float16) for name in names):
        assert len(still) < len(names), "nothing moved"
    else:
        assert not still, f"{', '.join(still)} did not move"


def assert_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float, what: str
) -> None:
    """Equal within `tolerance` of each tensor's norm."""
    for name, e in expected.items():
        e = e.detach().double()
        gap = torch.linalg.vector_norm(actual[name].detach().double() - e).item()
        size = torch.linalg.vector_norm(e).item()
        assert gap <= tolerance * size, f"{what}: {name} differs by {gap:.3g} of a norm of {size:.3g}"


def state_tensors(optimizer: Optimizer) -> Weights:
    """All state, by the position of the parameter in the groups and the name of the state."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return {
        f"{index}.{name}": torch.as_tensor(value).clone()
        for index, param in enumerate(params)
        for name, value in sorted(optimizer.state.get(param, {}).items())
    }


def set_rates(optimizer: Optimizer, factor: float) -> None:
    """Multiplies every group's learning rate (or multiplier) by `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * factor


def group_of(optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """A group of the module's parameters, with their names if the optimiser's groups have names (torch asks so)."""
    named = "param_names" in optimizer.param_groups[0]
    return {"params": list(module.named_parameters() if named else module.parameters())}
