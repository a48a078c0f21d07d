"""Between Muon + AdamW and AutoNero: parts of the one exchanged for parts of the other, at rates that are given.

The command stands in the first line of table.md beside this file; it is run in this folder.
"""

import torch

from archopt.optim.orthogonalise import orthogonalise
from archopt.roles import parameter_roles


class Between(torch.optim.Optimizer):
    """hidden: "muon", steps of lr times the polar factor; or "turn", rows turn by the angle lr on their spheres.
    falls: T where the angle is lr/sqrt(1 + t/T), 0 where it is constant. rest: "adamw", or "own", AutoNero's rules
    of the head and of vectors; rest_falls as falls. All tensors of one model with biases beside its heads."""

    def __init__(self, model, lr=0.05, hidden="muon", falls=0, rest="adamw", rest_lr=0.02, rest_falls=0):
        roles = parameter_roles(model).items()
        groups = [{"params": [param], "family": role.family} for role, param in roles]
        groups.sort(key=lambda group: group["family"] == "head")  # a head reads the state of its bias
        super().__init__(groups, {"lr": lr})
        self.hidden, self.falls, self.rest = hidden, falls, rest
        self.rest_lr, self.rest_falls = rest_lr, rest_falls

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            (param,), family = group["params"], group["family"]
            state, grad = self.state[param], param.grad
            state["t"] = t = state.get("t", 0) + 1
            if family == "hidden":
                self._hidden(param, grad, state, _rate(group["lr"], self.falls, t))
            else:
                self._rest(param, grad, state, _rate(self.rest_lr, self.rest_falls, t), family, t)

    def _hidden(self, param, grad, state, lr):
        m = state.setdefault("m", torch.zeros_like(param)).lerp_(grad, 0.05)
        direction = grad.lerp(m, 0.95)  # Nesterov's, as torch's Muon has it
        polar = orthogonalise(direction.flatten(1)[None, None], "newton-schulz")[0, 0]
        w = param.flatten(1)
        if self.hidden == "muon":
            w = w - lr * max(1, w.size(0) / w.size(1)) ** 0.5 * polar
        else:
            radius = state.setdefault("radius", w.norm(dim=1, keepdim=True))
            w = w - lr * radius * polar / polar.norm(dim=1, keepdim=True)
            w = radius * w / w.norm(dim=1, keepdim=True)
        param.copy_(w.view_as(param))

    def _rest(self, param, grad, state, lr, family, t):
        beta2 = 0.95 if self.rest == "adamw" else 0.99
        rows = family == "head" and self.rest == "own"
        square = grad.square().sum(1, keepdim=True) if rows else grad.square()
        m = state.setdefault("m", torch.zeros_like(grad)).lerp_(grad, 0.1)
        v = state.setdefault("v", torch.zeros_like(square)).lerp_(square, 1 - beta2)
        gh, s = m / (1 - 0.9**t), (v / (1 - beta2**t)).sqrt()
        if rows:
            lr *= 8 / (s.norm() / self.bias_norm).clamp(min=2)
        elif param.numel() == 10:
            self.bias_norm = s.norm()
        param.sub_(lr * gh / (s + 1e-10))


def _rate(lr, falls, t):
    return lr / (1 + t / falls) ** 0.5 if falls else lr
