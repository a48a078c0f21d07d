"""Other steps for AutoNero's vectors (biases, gains, scalars), in place of theta in absolute size.

The command stands in the first line of table.md beside this file; it is run in this folder.
"""

from functools import partial
from unittest import mock

from archopt.optim import autonero
from archopt.optim.autonero import AutoNero, module_groups
from archopt.optim.autonero_rule import vector_update


class Relative(AutoNero):
    """A vector's entries move by theta times the vector's RMS, or times `least` where that is less."""

    def __init__(self, model, least=1.0):
        super().__init__(model, foreach=False)  # one vector at a time, so that it has an RMS
        self.least = least

    def step(self, closure=None):
        with mock.patch.object(autonero, "vector_update", partial(_relative, self.least)):
            return super().step(closure)


def _relative(least, past, grad, step, theta, lr, **options):
    size = past.weight.square().mean().sqrt().clamp(min=least)
    return vector_update(past, grad, step, theta, lr * size, **options)


class Held(AutoNero):
    """The angle of vectors, of heads too with head=True, is `angle` throughout, or theta where that is larger."""

    def __init__(self, model, angle=0.02, head=False):
        super().__init__(module_groups(model))
        self.angle, self.families = angle, {"vector", "head"} if head else {"vector"}

    def step(self, closure=None):
        for group in self.param_groups:
            if group["family"] in self.families:
                group["lr"] = max(self.angle / float(self.theta), 1.0)
        return super().step(closure)
