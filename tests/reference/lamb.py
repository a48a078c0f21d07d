"""LAMB and LAMB-cs in float64 with plain loops: the published baseline, written to be read.

Source: arXiv:1904.00962, with the choices of the baseline in arXiv:2102.07227 (no bias correction, weight norm
clamped at 10, r = 1 on zero tensors). Nothing here imports archopt.
"""

import math

import torch
from torch import Tensor

from reference.nero import centre_and_normalise


class LambReference:
    """LAMB over a list of tensors; with `zero_mean` or `unit_norm`, constrained after each update."""

    def __init__(
        self,
        weights: list[Tensor],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        bias_correction: bool = False,
        max_weight_norm: float | None = 10.0,
        trust_ratio: bool = True,
        zero_mean: bool = False,
        unit_norm: bool = False,
    ) -> None:
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.bias_correction, self.max_weight_norm, self.trust_ratio = (
            bias_correction,
            max_weight_norm,
            trust_ratio,
        )
        self.zero_mean, self.unit_norm = zero_mean, unit_norm
        self.weights = [w.double().clone(memory_format=torch.contiguous_format) for w in weights]
        self.exp_avg = [torch.zeros_like(w) for w in self.weights]
        self.exp_avg_sq = [torch.zeros_like(w) for w in self.weights]
        self.steps = [0 for _ in weights]
        self.weight_norms = [0.0 for _ in weights]
        self.adam_norms = [0.0 for _ in weights]
        self.trust_ratios = [0.0 for _ in weights]

    def step(self, gradients: list[Tensor | None], lr: float) -> None:
        for k, gradient in enumerate(gradients):
            if gradient is not None:
                self._step_tensor(k, gradient.double(), lr)

    def _step_tensor(self, k: int, gradient: Tensor, lr: float) -> None:
        beta1, beta2 = self.betas
        self.steps[k] += 1
        correct1 = correct2 = 1.0
        if self.bias_correction:
            correct1, correct2 = 1 - beta1 ** self.steps[k], 1 - beta2 ** self.steps[k]
        weight = self.weights[k].view(-1)
        m, v = self.exp_avg[k].view(-1), self.exp_avg_sq[k].view(-1)

        direction = []
        for j, g in enumerate(gradient.reshape(-1).tolist()):
            m[j] = beta1 * m[j] + (1 - beta1) * g
            v[j] = beta2 * v[j] + (1 - beta2) * g * g
            adam = float(m[j]) / correct1 / (math.sqrt(float(v[j]) / correct2) + self.eps)
            direction.append(adam + self.weight_decay * float(weight[j]))

        weight_norm = math.sqrt(math.fsum(w * w for w in weight.tolist()))
        if self.max_weight_norm is not None:
            weight_norm = min(weight_norm, self.max_weight_norm)
        adam_norm = math.sqrt(math.fsum(u * u for u in direction))
        ratio = 1.0 if weight_norm == 0 or adam_norm == 0 else weight_norm / adam_norm
        self.weight_norms[k], self.adam_norms[k], self.trust_ratios[k] = weight_norm, adam_norm, ratio

        for j, u in enumerate(direction):
            weight[j] -= lr * (ratio if self.trust_ratio else 1.0) * u
        self.weights[k] = centre_and_normalise(self.weights[k], self.zero_mean, self.unit_norm)
