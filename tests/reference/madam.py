"""Madam and Madam-cs in float64 with plain loops: the published baseline, written to be read.

Source: arXiv:2006.14560, with the choices of the baseline in arXiv:2102.07227 (bound of the weights taken at the
first step, constant-sum map off, constraints not applied at construction). Nothing here imports archopt.
"""

import math

import torch
from torch import Tensor

from reference.nero import centre_and_normalise


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
        self.weights = [w.double().clone(memory_format=torch.contiguous_format) for w in weights]
        self.maxima = []
        for weight in self.weights:
            squares = [w * w for w in weight.view(-1).tolist()]
            self.maxima.append(p_scale * math.sqrt(math.fsum(squares) / len(squares)))
        self.exp_avg_sq = [torch.zeros_like(w) for w in self.weights]
        self.steps = [0 for _ in weights]

    def step(self, gradients: list[Tensor | None], lr: float) -> None:
        for k, gradient in enumerate(gradients):
            if gradient is not None:
                self._step_tensor(k, gradient.double(), lr)

    def _step_tensor(self, k: int, gradient: Tensor, lr: float) -> None:
        self.steps[k] += 1
        correction = 1 - self.beta ** self.steps[k]
        weight, v, bound = self.weights[k].view(-1), self.exp_avg_sq[k].view(-1), self.maxima[k]
        for j, g in enumerate(gradient.reshape(-1).tolist()):
            v[j] = self.beta * v[j] + (1 - self.beta) * g * g
            rms = math.sqrt(float(v[j]) / correction)
            direction = g / rms if rms > 0 else 0.0  # 0/0 is no move
            direction = min(max(direction, -self.g_bound), self.g_bound)
            w = float(weight[j])
            sign = (w > 0) - (w < 0)
            weight[j] = min(max(w * math.exp(-lr * direction * sign), -bound), bound)
        if self.constant_sum:
            self.weights[k] = constant_sum(self.weights[k], self.sum_scale, self.sum_power)
        self.weights[k] = centre_and_normalise(self.weights[k], self.zero_mean, self.unit_norm)


def constant_sum(weight: Tensor, scale: float, power: float) -> Tensor:
    """Positive entries of a row add up to a N^p, negative ones to -a N^p; N = rows (times kernel size in 4-D)."""
    if weight.dim() == 1:
        return weight.clamp(-100, 100)
    if weight.dim() not in (2, 4):
        return weight
    size = weight.shape[0]
    if weight.dim() == 4:
        size *= weight.shape[2] * weight.shape[3]
    rows = []
    for row in weight.reshape(weight.shape[0], -1).tolist():
        positive = math.fsum(w for w in row if w > 0)
        negative = -math.fsum(w for w in row if w < 0)
        rows.append([scale * size**power * w / (positive if w > 0 else negative) if w else w for w in row])
    return torch.tensor(rows, dtype=torch.float64).view_as(weight)
