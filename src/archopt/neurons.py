"""A parameter as neurons: which entries belong to one neuron, their mean and norm, and the projection.

A *row* is the set of weights that feed one neuron. Which dimensions index neurons is `neuron_dim` (0 for
Linear and ordinary convolutions, whose weights are `(out, in, ...)`); all other dimensions are summed over.
Nothing here reshapes or copies a parameter, so channels-last and other strided weights keep their layout.

Where fan-in is 1 (biases, gains, scalars, `(n, 1)` weights, depthwise 1x1 filters) no dimension is left to sum
over: every entry is a neuron by itself, its norm is its absolute value, and it is never projected.
"""

import torch
from torch import Tensor

NeuronDim = int | tuple[int, ...]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums over a row are formed: float32 for half precision, else the weight's own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def as_rows(tensor: Tensor, channel_groups: int = 1) -> Tensor:
    """`tensor` with the channel groups of a grouped transposed convolution as a dimension of their own: a view."""
    return tensor if channel_groups == 1 else torch.unflatten(tensor, 0, (channel_groups, -1))


def fan_in_dims(shape: torch.Size, neuron_dim: NeuronDim = 0, channel_groups: int = 1) -> tuple[int, ...]:
    """The dimensions of `as_rows(tensor, channel_groups)` that one neuron sums over; `()` where fan-in is 1.

    Raises ValueError where `neuron_dim` names no dimension of a tensor with two or more dimensions.
    """
    if len(shape) < 2:
        return ()
    kept = set()
    for dim in (neuron_dim,) if isinstance(neuron_dim, int) else neuron_dim:
        if not -len(shape) <= dim < len(shape):
            raise ValueError(
                f"neuron_dim={neuron_dim!r} does not fit a weight of shape {tuple(shape)}; "
                f"expected {-len(shape)} <= neuron_dim < {len(shape)}"
            )
        kept.add(dim % len(shape))
    if channel_groups > 1:
        if 0 in kept or shape[0] % channel_groups:
            raise ValueError(
                f"channel_groups={channel_groups} splits the input channels in dimension 0 of a transposed "
                f"convolution; it needs neuron_dim=1 and a divisor of {shape[0]} (got neuron_dim={neuron_dim!r})"
            )
        shape = torch.Size((channel_groups, shape[0] // channel_groups, *shape[1:]))
        kept = {0} | {dim + 1 for dim in kept}
    dims = tuple(dim for dim in range(len(shape)) if dim not in kept)
    return dims if any(shape[dim] != 1 for dim in dims) else ()


def row_mean(rows: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Mean of each row, with the summed dimensions kept as 1."""
    return rows.mean(dim=dims, keepdim=True, dtype=statistics_dtype(rows.dtype))


def row_norm(rows: Tensor, dims: tuple[int, ...]) -> Tensor:
    """2-norm of each row, with the summed dimensions kept as 1; the absolute value where `dims` is empty."""
    dtype = statistics_dtype(rows.dtype)
    if not dims:
        return rows.abs().to(dtype)
    norm: Tensor = torch.linalg.vector_norm(rows, dim=dims, keepdim=True, dtype=dtype)
    return norm


def balance(rows: Tensor, dims: tuple[int, ...], *, zero_mean: bool = True, unit_norm: bool = True) -> Tensor:
    """Each row centred, then divided by its norm (2102.07227, section 3).

    A row that centring leaves nothing of (it was zero, or constant) is not divided: there is no 0/0.
    """
    if not dims:
        return rows
    mean = None
    if zero_mean:
        mean = row_mean(rows, dims)
        rows = rows - mean
    if unit_norm:
        rows = rows / divisor(row_norm(rows, dims), mean, rows.numel())
    return rows


def divisor(norm: Tensor, mean: Tensor | None, numel: int) -> Tensor:
    """The norm that a row is divided by, or 1 where it is no more than what rounding leaves of a constant row."""
    precision = torch.finfo(norm.dtype)
    floor: Tensor | float = precision.tiny
    if mean is not None:
        fan_in = numel / max(norm.numel(), 1)
        floor = mean.abs() * (8 * precision.eps * fan_in**0.5) + floor
    return torch.where(norm > floor, norm, 1.0)


def balance_(
    weight: Tensor, dims: tuple[int, ...], channel_groups: int = 1, *, zero_mean: bool, unit_norm: bool
) -> None:
    """Balances `weight` in place. Rows that are balanced already, zero or (if centred) constant keep every bit."""
    if not dims or weight.numel() == 0 or not (zero_mean or unit_norm):
        return
    rows = as_rows(weight, channel_groups)
    exact = rows.to(statistics_dtype(rows.dtype))
    keeps = is_balanced(rows, dims, zero_mean=zero_mean, unit_norm=unit_norm)
    balanced = balance(exact, dims, zero_mean=zero_mean, unit_norm=unit_norm)
    if unit_norm:
        keeps |= row_norm(balanced, dims) < 0.5
    rows.copy_(torch.where(keeps, rows, balanced.to(rows.dtype)))


def is_balanced(rows: Tensor, dims: tuple[int, ...], *, zero_mean: bool, unit_norm: bool) -> Tensor:
    """For each row, whether it meets the constraints up to a few roundings of its own type."""
    exact = rows.to(statistics_dtype(rows.dtype))
    norm = row_norm(exact, dims)
    fan_in = exact.numel() / max(norm.numel(), 1)
    tolerance = 4 * torch.finfo(rows.dtype).eps
    balanced = torch.ones_like(norm, dtype=torch.bool)
    if zero_mean:
        balanced &= row_mean(exact, dims).abs() * fan_in**0.5 <= tolerance * norm
    if unit_norm:
        balanced &= (norm - 1).abs() <= tolerance
    return balanced
