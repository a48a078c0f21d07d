"""Madam and Madam-cs in float64 with plain loops: the published baseline, written to be read.

Source: arXiv:2006.14560, with the choices of the baseline in arXiv:2102.07227 (bound of the weights taken at the
first step, constant-sum map off, constraints not applied at construction). Nothing here imports archopt.
"""

import math

import torch
from torch import Tensor

from reference.nero import Row, centre_and_normalise, norm, rows_of, tensor_of


class MadamReference:
    """Madam over a list of tensors; with `zero_mean` or `unit_norm`, constrained after each update."""

    def __init__(
        self,
        weights: list[Tensor],
        beta: float = 0.999,
        p_scale: float = 3.0,
        g_bound: float = 10.0,
        constant_sum: bool = False,
        sum_scale: float = 0.5,
        sum_power: float = 0.5,
        zero_mean: bool = False,
        unit_norm: bool = False,
    ) -> None:
        self.beta, self.g_bound = beta, g_bound
        self.constant_sum, self.sum_scale, self.sum_power = constant_sum, sum_scale, sum_power
        self.zero_mean, self.unit_norm = zero_mean, unit_norm
        self.shapes = [w.shape for w in weights]
        self.rows = [rows_of(w) for w in weights]
        self.maxima = []
        for weight, rows in zip(weights, self.rows, strict=True):
            mean_square = norm([w for row in rows for w in row]) ** 2 / weight.numel()
            self.maxima.append(p_scale * math.sqrt(mean_square))
        self.exp_avg_sq = [[[0.0 for _ in row] for row in rows] for rows in self.rows]
        self.steps = [0 for _ in weights]

    @property
    def weights(self) -> list[Tensor]:
        return [tensor_of(rows, shape) for rows, shape in zip(self.rows, self.shapes, strict=True)]

    def step(self, gradients: list[Tensor | None], lr: float) -> None:
        for k, gradient in enumerate(gradients):
            if gradient is not None:
                self._step_tensor(k, rows_of(gradient), lr)

    def _step_tensor(self, k: int, gradient: list[Row], lr: float) -> None:
        self.steps[k] += 1
        correction = 1 - self.beta ** self.steps[k]
        bound = self.maxima[k]
        for w, g, v in zip(self.rows[k], gradient, self.exp_avg_sq[k], strict=True):
            for j in range(len(w)):
                v[j] = self.beta * v[j] + (1 - self.beta) * g[j] ** 2
                rms = math.sqrt(v[j] / correction)
                direction = clamp(g[j] / rms, self.g_bound) if rms > 0 else 0.0  # 0/0 is no move
                sign = (w[j] > 0) - (w[j] < 0)
                w[j] = clamp(w[j] * math.exp(-lr * direction * sign), bound)
        if self.constant_sum:
            self.rows[k] = constant_sum(self.rows[k], self.shapes[k], self.sum_scale, self.sum_power)
        self.rows[k] = centre_and_normalise(self.rows[k], self.shapes[k], self.zero_mean, self.unit_norm)


def clamp(value: float, bound: float) -> float:
    return min(max(value, -bound), bound)


def constant_sum(rows: list[Row], shape: torch.Size, scale: float, power: float) -> list[Row]:
    """Positive entries of a row add up to a N^p, negative ones to -a N^p; N = rows (times kernel size in 4-D)."""
    if len(shape) == 1:
        return [[clamp(w, 100.0) for w in row] for row in rows]
    if len(shape) not in (2, 4):
        return rows
    total = scale * (shape[0] * (shape[2] * shape[3] if len(shape) == 4 else 1)) ** power
    result = []
    for row in rows:
        positive = math.fsum(w for w in row if w > 0)
        negative = -math.fsum(w for w in row if w < 0)
        result.append([total * w / (positive if w > 0 else negative) if w != 0 else w for w in row])
    return result
