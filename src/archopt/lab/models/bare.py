"""Networks of matrices alone: no biases, BatchNorm without gains and shifts. AGD's paper trains no others."""

from typing import TypeVar

from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def bare(model: Network) -> Network:
    """Takes the biases, gains and shifts from a network and gives the rest torch's own initial weights."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.affine = False
            module.register_parameter("weight", None)
            module.register_parameter("bias", None)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            module.register_parameter("bias", None)
            module.reset_parameters()
    return model
