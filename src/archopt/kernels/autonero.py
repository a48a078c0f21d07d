"""What AutoNero's kernels take, whatever device they are for: tensors, options, and the three passes.

The passes stand in `native/autonero.c` and `triton_autonero.py`. Between them torch works: from the measures it
makes the limit f, the angle theta and whether the step is live, and between `average` and `turn` the polar factors.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

ENTRIES, TURNING, PLAIN, HIDDEN = range(4)
"""Kinds of tensors: vectors; rows that turn on spheres; rows that take plain steps, of a length that is given; rows
that turn along a polar factor, whose step `average` begins and `turn` ends."""


class AutoNeroTensor(NamedTuple):
    """A weight with AutoNero's state, all on one device and in one order of entries.

    The state is float64 beside float64 weights, else float32; `movement` may be bfloat16 instead. The gradient has
    the type and order of the weight, and comes later, since one may be freed between steps.
    """

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    movement: Tensor
    radius: Tensor
    grows_to: Tensor
    step: Tensor
    kind: int
    rows: int
    """Entries, in a vector."""
    fan_in: int
    """Neighbouring entries that make a row; 1 in a vector."""
    group: int
    """Which of the options and of the scalars is its own."""

    def addresses(self) -> list[int]:
        """Of the weight and of its state."""
        held = self.exp_avg, self.exp_avg_sq, self.movement, self.radius, self.grows_to, self.step
        return [self.weight.data_ptr(), *[tensor.data_ptr() for tensor in held]]

    def sizes(self) -> tuple[int, int, int, int]:
        return self.kind, self.rows, self.fan_in, self.group


class GroupOptions(NamedTuple):
    """Options of a group, as the kernels read them."""

    beta: float
    beta2: float
    sign: float
    """-1 to ascend."""
    exponent: float
    """Of the radius; 0 where rows keep theirs."""
    young: float
    """The length of a young row's plain step: 1, or 0 for sqrt(fan_in)."""


class Passes(Protocol):
    """The passes over some tensors of one device, in turn, at every step; they also advance the step counts.

    scalars: f, theta, theta lr and whether the step is live (1 or 0), one row a group, float64, on the device.
    Where it is not live nothing changes.
    """

    def measure(self, grads: Sequence[Tensor]) -> Tensor:
        """||g||^2 and <g, d> of each tensor: (tensors, 2), float64. The passes after it work with these gradients,
        but do not keep them."""
        ...

    def average(self, scalars: Tensor, reaches: Tensor) -> None:
        """m and v of all tensors, and the whole step of all that are not hidden.

        reaches: of each tensor of kind PLAIN, in order, how long the plain step of a row is, over theta; float64.
        """
        ...

    def turn(self, first: int, count: int, directions: Tensor, scalars: Tensor) -> None:
        """The rest of the step of hidden tensors of one shape.

        first, count: the position of the first, and how many. directions: their polar factors, (count, ...),
        contiguous, entries in the order of the weights' memory.
        """
        ...

    def expected(self) -> Tensor:
        """Sum <gh, d> of all that has moved since `average` began, 0-d, float64."""
        ...
