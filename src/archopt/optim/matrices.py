"""A parameter's rows as a batch of matrices `(blocks, rows, fan_in)`, and small pieces of rules that turn rows."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from archopt.neurons import row_norm, statistics_dtype


def joined_entries(device: torch.device) -> int:
    """How many entries are joined at a time where tensors are joined: bounds the transient memory.

    On a CPU so few that they stay in its caches between the operations on them; larger matrices keep its threads
    busy one by one, and joining would only copy them.
    """
    return 2**18 if device.type == "cpu" else 2**24


def to_matrices(rows: Tensor, dims: tuple[int, ...], blocks: int = 1) -> Tensor:
    """Rows that sum over `dims` as `(blocks, rows, fan_in)`, a view where strides allow.

    `blocks` cuts the rows into equal matrices: packed projections, stacked gates, groups of a convolution. Where
    `dims` is empty nothing is a row, and the tensor is returned as it is.
    """
    if not dims:
        return rows
    order = _rows_first(rows.dim(), dims)
    count = math.prod([rows.size(dim) for dim in order[: -len(dims)]])
    ordered = rows if order == sorted(order) else rows.permute(order)
    return ordered.reshape(blocks, count // blocks, -1)


def from_matrices(matrices: Tensor, shape: torch.Size, dims: tuple[int, ...]) -> Tensor:
    """The inverse of `to_matrices`, for rows of `shape`."""
    if not dims:
        return matrices
    order = _rows_first(len(shape), dims)
    ordered = matrices.reshape([shape[dim] for dim in order])
    return ordered if order == sorted(order) else ordered.permute([order.index(d) for d in range(len(shape))])


def _rows_first(count: int, dims: tuple[int, ...]) -> list[int]:
    """All dimensions, those that a row sums over last."""
    return [dim for dim in range(count) if dim not in dims] + list(dims)


def join(tensors: Sequence[Tensor], dims: tuple[int, ...], blocks: int, dtype: torch.dtype) -> Tensor:
    """Tensors in one: of equal shape as `(tensors, blocks, rows, fan_in)`; vectors (no `dims`) end to end."""
    if not dims:
        return torch.cat([tensor.reshape(-1) for tensor in tensors]).to(dtype)
    parts = [to_matrices(tensor.to(dtype), dims, blocks) for tensor in tensors]
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)


def part(joined: Tensor, shapes: Sequence[Tensor], dims: tuple[int, ...]) -> list[Tensor]:
    """The inverse of `join`, for tensors shaped as `shapes`."""
    if not dims:
        pieces = torch.split(joined, [like.numel() for like in shapes])
        return [piece.reshape(like.shape) for piece, like in zip(pieces, shapes, strict=True)]
    return [from_matrices(matrices, shapes[0].shape, dims) for matrices in joined.unbind()]


def scale_rows_(rows: Tensor, dims: tuple[int, ...], *, rms: bool) -> None:
    """Scales rows to RMS 1, or to norm 1, in place. Rows of norm 0 and rows that are there already keep bits."""
    exact = rows.to(statistics_dtype(rows.dtype))
    norm = row_norm(exact, dims)
    goal = (rows.numel() / norm.numel()) ** 0.5 if rms else 1.0
    keeps = (norm == 0) | ((norm - goal).abs() <= 4 * torch.finfo(rows.dtype).eps * goal)
    rows.copy_(torch.where(keeps, rows, (exact * (goal / nonzero(norm))).to(rows.dtype)))


def median_of_positive(values: Tensor) -> Tensor:
    """The median of the positive entries, without waiting for the device; of no meaning where there is none."""
    ordered = values.flatten().sort().values
    zeros = (ordered == 0).sum()
    positive = ordered.numel() - zeros
    middle = torch.stack([zeros + (positive - 1) // 2, zeros + positive // 2])
    return ordered.gather(0, middle.clamp(0, ordered.numel() - 1)).mean()


def nonzero(values: Tensor) -> Tensor:
    """`values` with 1 for 0: a denominator whose quotient is 0, or is discarded, where it was 0."""
    return torch.where(values == 0, 1.0, values)
