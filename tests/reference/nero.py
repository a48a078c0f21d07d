"""Nero in float64 with plain loops over tensors and rows: the published rule, written to be read.

Source: arXiv:2102.07227, Algorithm 1, with the deviations of the authors' program (bias correction, scale frozen
at construction, projection at construction). Nothing here imports archopt.
"""

import torch
from torch import Tensor


def centre_and_normalise(weight: Tensor, zero_mean: bool, unit_norm: bool) -> Tensor:
    """Each row along dimension 0 centred, then divided by its norm; vectors and scalars as they are."""
    weight = weight.clone(memory_format=torch.contiguous_format)
    if weight.dim() > 1:
        for i in range(weight.shape[0]):
            row = weight[i]
            if zero_mean:
                row = row - row.sum() / row.numel()
            if unit_norm:
                row = row / (row * row).sum().sqrt()
            weight[i] = row
    return weight


class NeroReference:
    """Nero over a list of tensors. `step(gradients, lr)` takes None for a tensor without gradient."""

    def __init__(
        self, weights: list[Tensor], beta: float = 0.999, zero_mean: bool = True, unit_norm: bool = True
    ) -> None:
        self.beta, self.zero_mean, self.unit_norm = beta, zero_mean, unit_norm
        self.weights = [centre_and_normalise(w.double(), zero_mean, unit_norm) for w in weights]
        self.steps = [0 for _ in weights]
        self.scales = []
        self.exp_avg_sq = []  # for each tensor, one number a neuron
        for weight in self.weights:
            norms = [(neuron * neuron).sum().sqrt() for neuron in neurons(weight)]
            scale = float(sum(norms)) / len(norms)
            self.scales.append(scale if scale != 0 else 0.01)
            self.exp_avg_sq.append([0.0 for _ in norms])

    def step(self, gradients: list[Tensor | None], lr: float) -> None:
        for k, gradient in enumerate(gradients):
            if gradient is None:
                continue
            self.steps[k] += 1
            correction = 1 - self.beta ** self.steps[k]
            weight, v = self.weights[k], self.exp_avg_sq[k]
            for i, (w, g) in enumerate(zip(neurons(weight), neurons(gradient.double()), strict=True)):
                v[i] = self.beta * v[i] + (1 - self.beta) * float((g * g).sum())
                if v[i] > 0:  # 0/0 is no move
                    w -= lr * self.scales[k] * g / (v[i] / correction) ** 0.5
            self.weights[k] = centre_and_normalise(weight, self.zero_mean, self.unit_norm)


def neurons(tensor: Tensor) -> list[Tensor]:
    """Views of a tensor's neurons: rows of dimension 0, or single entries of a vector or scalar."""
    if tensor.dim() > 1:
        return [tensor[i] for i in range(tensor.shape[0])]
    flat = tensor.reshape(-1)
    return [flat[i : i + 1] for i in range(flat.numel())]
