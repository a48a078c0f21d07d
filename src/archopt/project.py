"""Nero's constraints on request: the weights of each neuron centred, then scaled to norm 1 (2102.07227)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from archopt.neurons import NeuronDim, balance_, fan_in_dims
from archopt.roles import Overrides, parameter_roles


@torch.no_grad()
def project_(
    params_or_module: nn.Module | Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
    *,
    zero_mean: bool = True,
    unit_norm: bool = True,
    neuron_dim: NeuronDim = 0,
    roles: Overrides | None = None,
) -> None:
    """Balances weights in place: rows of mean 0 (`zero_mean`) and of norm 1 (`unit_norm`).

    Of a module, each parameter by its role, with `roles` as overrides (see `parameter_roles`); frozen ones
    are left alone. Tensors, singly, in an iterable or in `(name, tensor)` pairs, have neurons along
    `neuron_dim`. Whatever has fan-in 1 (biases, gains, vectors, scalars) is left alone. A row that has
    nothing to normalise (zero, or constant with `zero_mean`) stays as it is, and a row that is balanced
    keeps every bit.

    Raises TypeError for what is not a floating-point tensor, ValueError for a `neuron_dim` that does not
    fit, and what `parameter_roles` raises. Nothing is changed then.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[3.0, 1.0], [0.0, 0.0]])
        >>> project_(weight)
        >>> weight
        tensor([[ 0.7071, -0.7071],
                [ 0.0000,  0.0000]])
    """
    work: list[tuple[Tensor, tuple[int, ...], int]] = []
    if isinstance(params_or_module, nn.Module):
        if neuron_dim != 0:
            raise ValueError(
                f"neuron_dim={neuron_dim!r} is for tensors, the neurons of a module follow from its roles; "
                "state them with roles={'name': {'neuron_dim': ...}}"
            )
        for role, parameter in parameter_roles(params_or_module, roles).items():
            if role.trainable:
                dims = fan_in_dims(parameter.shape, role.neuron_dim, role.channel_groups)
                work.append((parameter, dims, role.channel_groups))
    else:
        if roles is not None:
            raise ValueError(
                "roles=... needs a module: project_(model, roles=...); for tensors use neuron_dim"
            )
        tensors = [params_or_module] if isinstance(params_or_module, Tensor) else params_or_module
        for index, item in enumerate(tensors):
            name, tensor = item if isinstance(item, tuple) else (f"item {index}", item)
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"project_: {name} is a {type(tensor).__name__}, expected a tensor or a module"
                )
            if not tensor.is_floating_point():
                raise TypeError(
                    f"project_: {name} has dtype {tensor.dtype}, expected a real floating-point type"
                )
            work.append((tensor, fan_in_dims(tensor.shape, neuron_dim), 1))
    for tensor, dims, channel_groups in work:
        balance_(tensor, dims, channel_groups, zero_mean=zero_mean, unit_norm=unit_norm)
