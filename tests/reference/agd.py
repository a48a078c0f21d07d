"""AGD in float64, entry by entry: the slow form that the real one is compared with.

Nothing of archopt is used here. A tensor is a flat list of numbers with a shape; the entries that are normalised
together (a *part*) are found by giving each entry's index a key.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Index = tuple[int, ...]


@dataclass
class Block:
    """One tensor and how it is treated. `kind` as in `archopt.roles`, or "published"."""

    kind: str
    groups: int = 1
    slices: int = 1
    stride: float = 1.0  # along each axis
    neuron_dim: int | tuple[int, ...] = 0
    uses: int = 1
    radius: float | None = None  # as measured, for kinds that prescribe none


def tap(index: Index) -> Index:
    return index[2:]


def part_key(block: Block, shape: Index) -> Callable[[Index], object]:
    """Maps an index to the part that it belongs to."""
    neurons = (block.neuron_dim,) if isinstance(block.neuron_dim, int) else block.neuron_dim
    if block.kind == "published":
        return tap
    if block.kind in ("matrix", "head"):
        per_slice = shape[neurons[0]] // block.slices
        return lambda index: (index[neurons[0]] // per_slice, tap(index))
    if block.kind in ("conv", "conv_transpose"):
        per_group = shape[0] // block.groups
        return lambda index: (index[0] // per_group, tap(index))
    if block.kind == "depthwise":
        return lambda index: index[0]
    if block.kind in ("embedding", "position", "tied"):
        return lambda index: tuple(index[dim] for dim in neurons)
    if block.kind == "gain":
        return lambda index: index
    if block.kind in ("bias", "shift"):
        per_slice = shape[0] // block.slices if shape else 1
        return lambda index: index[0] // per_slice if index else 0
    return lambda index: 0  # vector, scalar, unknown


def radius(block: Block, shape: Index) -> float:
    """Size of a change of 100 %."""
    if block.radius is not None:
        return block.radius
    if block.kind == "published":
        s = math.sqrt(shape[0] / shape[1])
        return s / math.sqrt(shape[2] * shape[3]) if len(shape) == 4 else s
    taps = math.prod(shape[2:])
    if block.kind in ("matrix", "head"):
        fan_out, fan_in = shape[:2] if block.neuron_dim == 0 else (shape[1], shape[0])
        return math.sqrt(fan_out / block.slices / fan_in) / math.sqrt(taps)
    if block.kind == "conv":
        return math.sqrt((shape[0] / block.groups) / shape[1]) / math.sqrt(taps)
    if block.kind == "conv_transpose":  # (in, out/groups, taps...)
        strides = math.prod([block.stride] * len(shape[2:]))
        return math.sqrt(shape[1] / (shape[0] / block.groups)) * math.sqrt(strides) / math.sqrt(taps)
    if block.kind == "depthwise":
        return 1 / math.sqrt(taps)
    return 1.0


def is_rms(block: Block) -> bool:
    return block.kind in ("embedding", "position", "tied", "bias", "shift", "vector", "scalar", "unknown")


def mass(block: Block) -> float:
    return 0.25 if block.kind in ("gain", "shift", "bias", "vector", "scalar") else 1.0


def step_size(summary: float) -> float:
    return math.log((1 + math.sqrt(1 + 4 * summary)) / 2)


def agd_step(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    blocks: Sequence[Block],
    *,
    gain: float = 1.0,
    lr: float = 1.0,
) -> tuple[list[Tensor], float, float]:
    """One step: the new weights in float64, eta and G."""
    total = sum(mass(block) * block.uses * block.slices for block in blocks)
    summary = 0.0
    norms: list[dict[object, float]] = []  # of each tensor, by part
    counts: list[dict[object, int]] = []
    for weight, grad, block in zip(weights, grads, blocks, strict=True):
        shape = tuple(weight.shape)
        key = part_key(block, shape)
        squares: dict[object, float] = {}
        count: dict[object, int] = {}
        for index in indices(shape):
            entry = 0.0 if grad is None else float(grad[index])
            squares[key(index)] = squares.get(key(index), 0.0) + entry * entry
            count[key(index)] = count.get(key(index), 0) + 1
        norms.append({part: math.sqrt(square) for part, square in squares.items()})
        counts.append(count)
        for part, norm in norms[-1].items():
            length = math.sqrt(count[part]) if is_rms(block) else 1.0
            summary += mass(block) / total * radius(block, shape) * length * norm
    eta = step_size(summary)
    moved = []
    for weight, grad, block, norm_of, count in zip(weights, grads, blocks, norms, counts, strict=True):
        shape = tuple(weight.shape)
        key = part_key(block, shape)
        new = weight.detach().to(torch.float64).clone()
        for index in indices(shape):
            norm = norm_of[key(index)]
            if grad is not None and norm > 0:
                length = math.sqrt(count[key(index)]) if is_rms(block) else 1.0
                unit = length * float(grad[index]) / norm
                new[index] -= gain * lr * eta * mass(block) / total * radius(block, shape) * unit
        moved.append(new)
    return moved, eta, summary


def indices(shape: Index) -> list[Index]:
    return list(itertools.product(*(range(size) for size in shape)))
