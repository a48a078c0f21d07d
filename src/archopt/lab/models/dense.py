"""Fully connected networks: the plain one, and one whose rows of weights are centred and of norm 1."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RELU_GAIN = math.sqrt(2)  # a ReLU halves the mean square of a symmetric input; this gives it back


class MLP(nn.Module):
    """Linear layers with `gain * relu` between them, with LayerNorm before each relu if asked for.

    Input (batch, ...), flattened; output (batch, sizes[-1]). sizes: widths from the input to the output. The
    initial weights and biases are torch's own for `nn.Linear`, uniform in +-1/sqrt(fan_in).
    """

    def __init__(
        self, sizes: Sequence[int], *, bias: bool = True, gain: float = 1.0, layer_norm: bool = False
    ) -> None:
        super().__init__()
        self.gain = gain
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=bias) for n, m in pairwise(sizes))
        self.norms = nn.ModuleList(nn.LayerNorm(n) if layer_norm else nn.Identity() for n in sizes[1:-1])

    def forward(self, inputs: Tensor) -> Tensor:
        *hidden, last = self.layers
        x = inputs.flatten(1)
        for layer, norm in zip(hidden, self.norms):
            x = F.relu(norm(layer(x)))
            if self.gain != 1.0:
                x = x * self.gain
        out: Tensor = last(x)
        return out


class CentredLinear(nn.Module):
    """A linear map without bias through (w - mean(w)) / ||w - mean(w)|| for each row w of the raw weights.

    The gradient is taken through the centring and the norm. Raw weights are drawn from N(0, sigma^2): the
    function does not depend on sigma, but how far a step of a given length turns it does.
    """

    def __init__(self, in_features: int, out_features: int, sigma: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) * sigma)

    def forward(self, inputs: Tensor) -> Tensor:
        centred = self.weight - self.weight.mean(dim=1, keepdim=True)
        return F.linear(inputs, centred / centred.norm(dim=1, keepdim=True))


class CentredMLP(nn.Module):
    """`CentredLinear` layers, the last one too, with sqrt(2) * relu between them. Shapes as in `MLP`."""

    def __init__(self, sizes: Sequence[int], sigma: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CentredLinear(n, m, sigma) for n, m in pairwise(sizes))

    def forward(self, inputs: Tensor) -> Tensor:
        *hidden, last = self.layers
        x = inputs.flatten(1)
        for layer in hidden:
            x = F.relu(layer(x)) * RELU_GAIN
        out: Tensor = last(x)
        return out
