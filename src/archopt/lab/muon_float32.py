"""Muon's update of matrices with its products in float32: for processors that have no bfloat16 products.

torch.optim.Muon always forms them in bfloat16, which takes ten to thirty times longer than float32 on a CPU without
instructions for it. Jordan 2024; the coefficients and the five steps are `archopt.optim.orthogonalise`'s.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from archopt.optim.matrices import joined_entries
from archopt.optim.orthogonalise import STEPS, newton_schulz


def loss_of(closure: Callable[[], float] | None) -> float | None:
    """What the closure of a step returns, with gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class MuonInFloat32(Optimizer):
    """torch.optim.Muon with float32 products; arguments and state as there, but for its coefficients and eps.

    Raises ValueError for another number of steps than five.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        *,
        weight_decay: float,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
        adjust_lr_fn: str | None,
    ) -> None:
        if ns_steps != STEPS:
            raise ValueError(f"ns_steps={ns_steps}, expected {STEPS} where products are formed in float32")
        if adjust_lr_fn not in (None, "original", "match_rms_adamw"):
            raise ValueError(f"adjust_lr_fn={adjust_lr_fn!r}, expected 'original' or 'match_rms_adamw'")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "adjust_lr_fn": adjust_lr_fn,
        }
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step."""
        loss = loss_of(closure)
        for group in self.param_groups:
            moving = sorted([p for p in group["params"] if p.grad is not None], key=_alike)
            for _, alike in itertools.groupby(moving, _alike):
                matrices = list(alike)
                most = max(1, joined_entries(matrices[0].device) // matrices[0].numel())
                for start in range(0, len(matrices), most):
                    self._move(matrices[start : start + most], group)
        return loss

    def _move(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        updates = []
        for matrix in matrices:
            grad = matrix.grad
            assert grad is not None
            state = self.state[matrix]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(grad)
            buffer = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
            updates.append(grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer)
        lr = group["lr"]
        adjusted = lr * _stretch(group["adjust_lr_fn"], *matrices[0].shape)
        for matrix, polar in zip(matrices, newton_schulz(torch.stack(updates).float()), strict=True):
            matrix.mul_(1 - lr * group["weight_decay"]).add_(polar.to(matrix.dtype), alpha=-adjusted)


def _alike(matrix: Tensor) -> tuple[Any, ...]:
    return *matrix.shape, str(matrix.dtype), str(matrix.device)


def _stretch(adjust_lr_fn: str | None, rows: int, columns: int) -> float:
    """The factor of the rate by the shape of the matrix."""
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))
