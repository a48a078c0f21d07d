"""Nero in float64 with plain loops over tensors and rows: the published rule, written to be read.

Source: arXiv:2102.07227, Algorithm 1, with the deviations of the authors' program (bias correction, scale frozen
at construction, projection at construction). Nothing here imports archopt.
"""

import math

import torch
from torch import Tensor

Row = list[float]


def rows_of(tensor: Tensor) -> list[Row]:
    """The neurons of a tensor: rows of dimension 0; each entry of a vector, and a scalar, is one by itself."""
    return tensor.double().reshape(tensor.shape[0] if tensor.dim() > 1 else tensor.numel(), -1).tolist()


def tensor_of(rows: list[Row], shape: torch.Size) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).reshape(shape)


def norm(row: Row) -> float:
    return math.sqrt(math.fsum(w * w for w in row))


def centre_and_normalise(rows: list[Row], shape: torch.Size, zero_mean: bool, unit_norm: bool) -> list[Row]:
    """Each row centred, then divided by its norm; vectors and scalars as they are."""
    if len(shape) < 2:
        return rows
    result = []
    for row in rows:
        if zero_mean:
            mean = math.fsum(row) / len(row)
            row = [w - mean for w in row]
        if unit_norm:
            length = norm(row)
            row = [w / length for w in row]
        result.append(row)
    return result


class NeroReference:
    """Nero over a list of tensors. `step(gradients, lr)` takes None for a tensor without gradient."""

    def __init__(
        self, weights: list[Tensor], beta: float = 0.999, zero_mean: bool = True, unit_norm: bool = True
    ) -> None:
        self.beta, self.zero_mean, self.unit_norm = beta, zero_mean, unit_norm
        self.shapes = [w.shape for w in weights]
        self.rows = [self._project(rows_of(w), w.shape) for w in weights]
        self.steps = [0 for _ in weights]
        self.scales = []
        self.exp_avg_sq = []  # for each tensor, one number a neuron
        for rows in self.rows:
            scale = math.fsum(norm(row) for row in rows) / len(rows)
            self.scales.append(scale if scale != 0 else 0.01)
            self.exp_avg_sq.append([0.0 for _ in rows])

    @property
    def weights(self) -> list[Tensor]:
        return [tensor_of(rows, shape) for rows, shape in zip(self.rows, self.shapes, strict=True)]

    def step(self, gradients: list[Tensor | None], lr: float) -> None:
        for k, gradient in enumerate(gradients):
            if gradient is None:
                continue
            self.steps[k] += 1
            correction = 1 - self.beta ** self.steps[k]
            v = self.exp_avg_sq[k]
            for i, g in enumerate(rows_of(gradient)):
                v[i] = self.beta * v[i] + (1 - self.beta) * norm(g) ** 2
                if v[i] > 0:  # 0/0 is no move
                    stride = lr * self.scales[k] / math.sqrt(v[i] / correction)
                    self.rows[k][i] = [wj - stride * gj for wj, gj in zip(self.rows[k][i], g, strict=True)]
            self.rows[k] = self._project(self.rows[k], self.shapes[k])

    def _project(self, rows: list[Row], shape: torch.Size) -> list[Row]:
        return centre_and_normalise(rows, shape, self.zero_mean, self.unit_norm)
