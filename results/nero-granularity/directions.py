"""Between Nero and LAMB with both constraints, on VGG-11: what makes LAMB the better of the two there.

They differ in three things: how much has a step size of its own (a neuron or a layer), whether the gradient is
divided entry by entry, and what the step is measured by (the running size of the gradient, or this very direction).
Here each can be chosen. The command stands in the first line of table.md beside this file.
"""

import torch

from archopt.neurons import balance_

BETA = 0.999
EPS = 1e-8  # LAMB's own is 1e-6


class Between(torch.optim.Optimizer):
    """Nero is size="neuron", divided=False, running=True; LAMB-cs is size="layer", divided=True, running=False."""

    def __init__(self, params, lr=0.02, size="neuron", divided=False, running=True):
        super().__init__(params, {"lr": lr})
        self.size, self.divided, self.running = size, divided, running
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    _balance(param)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                self._move(param, param.grad, self.state[param], group["lr"])

    def _move(self, param, grad, state, lr):
        state["t"] = t = state.get("t", 0) + 1
        own_rows = self.size == "neuron"
        dims = tuple(range(1, param.dim())) if own_rows else tuple(range(param.dim()))
        # A bias of Nero's keeps the size that it begins with; LAMB takes it as it is.
        if "scale" not in state:
            state["scale"] = 1.0 if param.dim() > 1 else param.abs().mean()
        direction = grad
        if self.divided:
            v = state.setdefault("v", torch.zeros_like(grad)).lerp_(grad.square(), 1 - BETA)
            direction = grad / (v.sqrt() + EPS)
        length = _norm(direction, dims)
        if self.running:
            square = state.setdefault("square", torch.zeros_like(length)).lerp_(length.square(), 1 - BETA)
            length = (square / (1 - BETA**t)).sqrt()
        scale = state["scale"] if own_rows else param.norm().clamp(max=10)
        param.sub_(torch.where(length > 0, lr * scale * direction / length, 0.0))
        _balance(param)


def _balance(param):
    if param.dim() > 1:
        balance_(param, tuple(range(1, param.dim())), zero_mean=True, unit_norm=True)


def _norm(tensor, dims):
    return tensor.square().sum(dims, keepdim=True).sqrt() if dims else tensor.abs()
