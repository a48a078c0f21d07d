"""The norms of AGD's blocks, and which role has which.

A block (one parameter tensor) falls into *parts*: a matrix, a kernel tap, a row, an entry. Each part has its
own direction of steepest descent g/||g||_2; the norm of a block is the largest over its parts, so that its
dual norm is a sum over them.

    norm         a part is                          f         radius r where none is given
    published    one tap, dimensions 0 and 1        1         sqrt(out/in); of 4-D tensors / sqrt(taps)
    frobenius    one tap, dimensions 0 and 1        1         sqrt(out/in) q / sqrt(taps)
    filters      one filter, all dimensions but 0   1         q / sqrt(taps)
    rows         one row, all but `neuron_dim`      sqrt(n)   1
    rms          the whole tensor                   sqrt(n)   1
    max          one entry                          1         1

f is the 2-norm of a unit step of a part with n entries (sqrt(n) where the norm is a root mean square). The
dual norm is the sum over parts of f ||g||_2. `neuron_dim` says which of dimensions 0 and 1 is `out`. Packed
projections are first split along it (`slices`), grouped convolutions along dimension 0 (`groups`): each slice
or group is a matrix with its own parts and shape. q = stride^(axes/2), `stride` being that of a transposed
convolution along each of its axes: an output pixel meets only taps/q^2 of the taps.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from archopt.neurons import NeuronDim, fan_in_dims
from archopt.optim.base import check_choice, check_flags, check_range, statistics_like, warn_assumption
from archopt.roles import Overrides, Role, RoleTable, group_by_treatment, parameter_roles

NORMS = ("published", "frobenius", "filters", "rows", "rms", "max")
MATRIX_NORMS = ("published", "frobenius", "filters")

PUBLISHED: dict[str, Any] = {
    "norm": "published",
    "radius": None,
    "share": 1.0,
    "uses": 1,
    "slices": 1,
    "groups": 1,
    "stride": 1,
    "neuron_dim": 0,
}
"""The options of a group that say how a block is measured, as the published rule has them."""

VECTOR_SHARE = 0.25  # share of a bias, gain or scalar beside a matrix's 1: 1, 1/4 and 1/10 differ little
SMALLEST_RADIUS = 1e-3  # of a tensor whose radius is measured, so that one that starts at zero can move


class Parts(NamedTuple):
    """How a block falls into parts."""

    split_dim: int
    split: int  # into so many slices or groups that dimension is split first
    dims: tuple[int, ...]  # what one part sums over, in the split view; () where each entry is a part
    length: float  # f, the 2-norm of a unit step of one part

    def view(self, tensor: Tensor) -> Tensor:
        """The view of a tensor that `dims` speaks of."""
        return tensor if self.split == 1 else torch.unflatten(tensor, self.split_dim, (self.split, -1))


def check_group(group: dict[str, Any]) -> None:
    """Raises ValueError or TypeError where options are out of range or do not fit the group's parameters."""
    check_choice("AGD", "norm", group["norm"], NORMS)
    if isinstance(group["gain"], Tensor):
        raise TypeError("AGD: gain is a tensor, expected a number; a multiplier that is a tensor can be lr")
    for name in ("uses", "slices", "groups", "stride"):
        check_range("AGD", name, group[name], low=1)
    for name in ("slices", "groups"):
        if not isinstance(group[name], int):
            raise TypeError(f"AGD: {name}={group[name]!r}, expected a whole number")
    for name in ("share", "radius"):
        if name == "share" or group[name] is not None:
            check_range("AGD", name, group[name], low=0.0)
            if group[name] == 0:
                raise ValueError(f"AGD: {name}=0, expected {name} > 0; to freeze, use requires_grad_(False)")
    check_flags("AGD", group, "error_if_nonfinite")
    for item in group["params"]:
        name, param = item if isinstance(item, tuple) else ("a parameter", item)
        if isinstance(param, Tensor):
            if reason := _misfit(param.shape, group):
                raise ValueError(f"AGD: {name} of shape {tuple(param.shape)} {reason}")
            parts_of(param.shape, group)


def _misfit(shape: torch.Size, group: Mapping[str, Any]) -> str:
    norm, slices, groups, neuron_dim = (group[name] for name in ("norm", "slices", "groups", "neuron_dim"))
    if norm in MATRIX_NORMS and len(shape) < 2:
        return (
            f"has fewer than the two dimensions that norm={norm!r} needs. The published rule, AGD(params), "
            "has none for biases and gains; AGD(model) takes them in (or set norm='rms', for gains 'max', "
            "and share=0.25 in their group)"
        )
    if norm in MATRIX_NORMS and neuron_dim not in (0, 1):
        return f"is a matrix for norm={norm!r}, whose neuron_dim is 0 or 1; got neuron_dim={neuron_dim!r}"
    split_dim = _split_dim(shape, group)
    if slices > 1 and groups > 1:
        return f"has slices={slices} and groups={groups}; only one of them can be more than 1"
    if slices * groups > 1 and (not shape or shape[split_dim] % (slices * groups)):
        return f"cannot be split along dimension {split_dim} by slices={slices} or groups={groups}"
    return ""


def _split_dim(shape: torch.Size, group: Mapping[str, Any]) -> int:
    neurons_are_columns = len(shape) > 1 and group["neuron_dim"] == 1
    return 1 if neurons_are_columns and group["slices"] > 1 else 0


def parts_of(shape: torch.Size, group: Mapping[str, Any]) -> Parts:
    """The parts of a tensor of `shape` under the options of its group."""
    norm, split, split_dim = group["norm"], group["slices"] * group["groups"], _split_dim(shape, group)
    dims = _summed_dims(shape, norm, group["neuron_dim"])
    entries = math.prod([shape[dim] for dim in dims])
    if split > 1:
        entries = entries // split if split_dim in dims else entries
        dims = tuple(dim + 1 if dim >= split_dim else dim for dim in dims)
    return Parts(split_dim, split, dims, math.sqrt(entries) if norm in ("rows", "rms") else 1.0)


def _summed_dims(shape: torch.Size, norm: str, neuron_dim: NeuronDim) -> tuple[int, ...]:
    if norm in ("published", "frobenius"):
        return (0, 1)
    if norm == "rms":
        return tuple(range(len(shape)))
    if norm == "max":
        return ()
    return fan_in_dims(shape, 0 if norm == "filters" else neuron_dim)


def shape_radius(shape: torch.Size, group: Mapping[str, Any]) -> float:
    """The radius r that follows from the shape: the size of a change of 100 %."""
    norm = group["norm"]
    if norm not in MATRIX_NORMS:
        return 1.0
    axes = len(shape) - 2
    taps = 1 if norm == "published" and axes != 2 else math.prod(shape[2:])
    radius: float = group["stride"] ** (axes / 2) / math.sqrt(taps)
    if norm == "filters":
        return radius
    rows, columns = shape[0] / group["groups"], shape[1]
    ratio = rows / columns if group["neuron_dim"] == 0 else columns / rows
    return radius * math.sqrt(ratio / group["slices"])


def radius_of(shape: torch.Size, group: Mapping[str, Any]) -> float:
    """The radius of a parameter: as given in its group, else from the shape."""
    return shape_radius(shape, group) if group["radius"] is None else float(group["radius"])


def measure(grad: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Scale and relative 2-norm of each part: ||g|| = peak * size, with `dims` kept as 1.

    peak is the largest entry, or the smallest normal number where that is more. Two factors, since squares of
    entries below 1e-23 vanish in float32 and those above 1e19 overflow. The size of a part is 0 where it is zero,
    and not finite where it is not.
    """
    peak = largest(grad, dims).clamp(min=torch.finfo(grad.dtype).tiny)
    return peak, norm(grad / peak, dims)


def largest(grad: Tensor, dims: tuple[int, ...]) -> Tensor:
    """max |g| of each part."""
    return grad.abs().amax(dim=dims, keepdim=True) if dims else grad.abs()


def norm(grad: Tensor, dims: tuple[int, ...]) -> Tensor:
    """||g||_2 of each part."""
    return torch.linalg.vector_norm(grad, dim=dims, keepdim=True) if dims else grad.abs()


def dual(peak: Tensor, size: Tensor) -> Tensor:
    """The sum over parts of ||g||, 0-d."""
    return products(peak, size).sum()


def products(peak: Tensor, size: Tensor) -> Tensor:
    """||g|| of each part, in a type in which it cannot overflow."""
    exact = scalar_dtype(peak.device)
    return peak.to(exact) * size.to(exact)


def scalar_dtype(device: torch.device) -> torch.dtype:
    """The type of G and eta: float64 where the device has it, in which no float32 gradient overflows."""
    return torch.float32 if device.type == "mps" else torch.float64


def module_groups(model: nn.Module, roles: Overrides | None = None) -> list[dict[str, Any]]:
    """Parameter groups of a module for AGD, one for each treatment, with names.

    Warns (ArchoptWarning) of parameters whose role is not known.
    """
    table = parameter_roles(model, roles)
    treatments = {role.name: agd_treatment(role, param, table) for role, param in table.items()}
    if unknown := [role.name for role in table if role.kind == "unknown"]:
        warn_assumption(
            f"AGD does not know the role of {', '.join(unknown)}: taken as one vector whose radius is the "
            f"RMS of its initial values. State it, as in AGD(model, roles={{{unknown[0]!r}: 'matrix'}}), or "
            "set norm and radius in its group"
        )
    return group_by_treatment(table, lambda role: treatments[role.name])


def agd_treatment(role: Role, param: Tensor, table: RoleTable) -> dict[str, Any]:
    """What AGD does with a parameter, as group options; docs/agd.md has the table and the reasons."""
    kind = role.kind
    treatment: dict[str, Any] = {"role": kind, "uses": role.uses}
    if kind == "depthwise" or (
        kind == "conv_transpose" and role.groups == role.shape[0] > role.shape[1] == 1
    ):
        treatment |= {"norm": "filters", "stride": role.stride}
    elif kind in ("matrix", "head", "conv", "conv_transpose"):
        treatment |= {"norm": "frobenius", "neuron_dim": role.neuron_dim, "stride": role.stride}
        treatment |= {"slices": role.slices, "groups": role.groups}
    elif kind in ("embedding", "position", "tied"):
        treatment |= {"norm": "rows", "neuron_dim": role.neuron_dim}
        if kind == "tied":  # as a head, rows of RMS 1 would be far too large
            treatment |= {"radius": _rms(param) or 1.0}
    elif kind == "gain":
        treatment |= {"norm": "max", "share": VECTOR_SHARE}
    elif kind in ("bias", "shift"):
        treatment |= {"norm": "rms", "share": VECTOR_SHARE, "slices": _slices_of_bias(role, table)}
    else:  # vector, scalar, unknown: nothing prescribes a radius
        share = 1.0 if kind == "unknown" else VECTOR_SHARE
        treatment |= {"norm": "rms", "share": share, "radius": max(_rms(param), SMALLEST_RADIUS)}
    return treatment


def _slices_of_bias(role: Role, table: RoleTable) -> int:
    """The slices of the weight that a bias goes with: `in_proj_bias` is packed as `in_proj_weight` is."""
    path, _, name = role.name.rpartition(".")
    weight = f"{path}.{name}".lstrip(".").replace("bias", "weight")
    slices = next((other.slices for other in table if other.name == weight), 1)
    return slices if len(role.shape) == 1 and role.shape[0] % slices == 0 else 1


def _rms(param: Tensor) -> float:
    """Root mean square of a parameter's present values."""
    return float(param.detach().to(statistics_like(param)).square().mean().sqrt()) if param.numel() else 0.0
