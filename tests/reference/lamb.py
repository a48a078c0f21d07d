"""LAMB and LAMB-cs in float64 with plain loops: the published baseline, written to be read.

Source: arXiv:1904.00962, with the choices of the baseline in arXiv:2102.07227 (no bias correction, weight norm
clamped at 10, r = 1 on zero tensors). Nothing here imports archopt.
"""

import math

from torch import Tensor

from reference.nero import Row, centre_and_normalise, norm, rows_of, tensor_of


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
        self.bias_correction, self.trust_ratio = bias_correction, trust_ratio
        self.max_weight_norm = math.inf if max_weight_norm is None else max_weight_norm
        self.zero_mean, self.unit_norm = zero_mean, unit_norm
        self.shapes = [w.shape for w in weights]
        self.rows = [rows_of(w) for w in weights]
        self.exp_avg = [[[0.0 for _ in row] for row in rows] for rows in self.rows]
        self.exp_avg_sq = [[[0.0 for _ in row] for row in rows] for rows in self.rows]
        self.steps = [0 for _ in weights]
        self.weight_norms = [0.0 for _ in weights]
        self.adam_norms = [0.0 for _ in weights]
        self.trust_ratios = [0.0 for _ in weights]

    @property
    def weights(self) -> list[Tensor]:
        return [tensor_of(rows, shape) for rows, shape in zip(self.rows, self.shapes, strict=True)]

    def step(self, gradients: list[Tensor | None], lr: float) -> None:
        for k, gradient in enumerate(gradients):
            if gradient is not None:
                self._step_tensor(k, rows_of(gradient), lr)

    def _step_tensor(self, k: int, gradient: list[Row], lr: float) -> None:
        beta1, beta2 = self.betas
        self.steps[k] += 1
        correction1 = correction2 = 1.0
        if self.bias_correction:
            correction1, correction2 = 1 - beta1 ** self.steps[k], 1 - beta2 ** self.steps[k]

        direction = []
        for w, g, m, v in zip(self.rows[k], gradient, self.exp_avg[k], self.exp_avg_sq[k], strict=True):
            for j in range(len(w)):
                m[j] = beta1 * m[j] + (1 - beta1) * g[j]
                v[j] = beta2 * v[j] + (1 - beta2) * g[j] ** 2
            adam = [(m[j] / correction1) / (math.sqrt(v[j] / correction2) + self.eps) for j in range(len(w))]
            direction.append([adam[j] + self.weight_decay * w[j] for j in range(len(w))])

        weight_norm = min(norm([w for row in self.rows[k] for w in row]), self.max_weight_norm)
        adam_norm = norm([u for row in direction for u in row])
        ratio = 1.0 if weight_norm == 0 or adam_norm == 0 else weight_norm / adam_norm
        self.weight_norms[k], self.adam_norms[k], self.trust_ratios[k] = weight_norm, adam_norm, ratio

        for w, u in zip(self.rows[k], direction, strict=True):
            for j in range(len(w)):
                w[j] -= lr * (ratio if self.trust_ratio else 1.0) * u[j]
        self.rows[k] = centre_and_normalise(self.rows[k], self.shapes[k], self.zero_mean, self.unit_norm)
