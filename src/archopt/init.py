"""The initial weights that the analysis of AGD starts from (2304.05187, section 3 and Algorithm 1)."""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from archopt.neurons import statistics_dtype
from archopt.optim.oracles import PUBLISHED, Parts, agd_treatment, measure, parts_of, shape_radius
from archopt.roles import Overrides, parameter_roles

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def orthogonal_(
    module: Module, *, roles: Overrides | None = None, generator: torch.Generator | None = None
) -> Module:
    """Gives every weight of `module` the size that AGD takes for 100 %, in place, and returns the module.

    - Matrices, and each tap of a convolution: a random semi-orthogonal matrix times the radius, so that every
      singular value is sqrt(d_out/d_in), for convolutions over sqrt(taps). Packed projections are taken slice
      by slice, grouped convolutions group by group, transposed ones with the radius of their stride.
    - Depthwise filters: Gaussian, scaled so that the RMS of each is 1/sqrt(taps), its norm 1.
    - Embeddings: Gaussian rows scaled to RMS 1; rows that are zero (padding) stay zero.
    - Biases and shifts: 0. Gains: 1.

    Positions, tied weights, scalars, parameters of unknown role and frozen ones stay as they are. On networks
    of bias-free linear and 2-D convolutional layers this is the published initialisation.

    Args:
        roles: overrides, pattern of a parameter's name -> role (see `archopt.parameter_roles`).
        generator: source of the random numbers; by default torch's global one of the parameter's device.

    Half-precision weights are drawn in float32 and rounded. Call it before the model is wrapped (DDP, FSDP)
    and before the optimiser is built. Raises ValueError for meta tensors.
    """
    table = parameter_roles(module, roles)
    for role, param in table.items():
        if param.is_meta:
            raise ValueError(f"{role.name} is a meta tensor; call module.to_empty(device=...) first")
        if not param.requires_grad or param.numel() == 0:
            continue
        options = PUBLISHED | agd_treatment(role, param, table)
        parts, radius = parts_of(param.shape, options), shape_radius(param.shape, options)
        if options["norm"] == "frobenius":
            _fill_semi_orthogonal(param, parts, radius, generator)
        elif options["norm"] == "filters" or role.kind == "embedding":
            param.copy_(_rows_of_rms(param, parts.dims, radius, generator))
        elif role.kind in ("bias", "shift"):
            param.zero_()
        elif role.kind == "gain":
            param.fill_(1.0)
    return module


def _fill_semi_orthogonal(
    weight: Tensor, parts: Parts, radius: float, generator: torch.Generator | None
) -> None:
    """Fills each tap of each slice or group, whatever the strides of `weight`."""
    split = parts.split
    view = parts.view(weight).movedim(parts.split_dim, 0) if split > 1 else weight.unsqueeze(0)
    rows, columns, taps = view.shape[1], view.shape[2], view.shape[3:]
    matrices = semi_orthogonal(split * math.prod(taps), rows, columns, like=weight, generator=generator)
    view.copy_(radius * matrices.view(split, *taps, rows, columns).movedim((-2, -1), (1, 2)))


def semi_orthogonal(
    count: int, rows: int, columns: int, *, like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """`count` uniformly random semi-orthogonal matrices, (count, rows, columns), float32 or wider.

    The orthogonal factor of a Gaussian matrix is uniform once the diagonal of its triangular factor is made
    positive.
    """
    tall = _gaussian((count, max(rows, columns), min(rows, columns)), like, generator)
    orthogonal, triangular = torch.linalg.qr(tall)
    uniform: Tensor = orthogonal * triangular.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return uniform if rows >= columns else uniform.mT


def _rows_of_rms(
    weight: Tensor, dims: tuple[int, ...], rms: float, generator: torch.Generator | None
) -> Tensor:
    """Gaussian rows scaled to one RMS; 0 where the row of `weight` is 0."""
    rows = _gaussian(tuple(weight.shape), weight, generator)
    peak, size = measure(rows, dims)
    length = rms * math.sqrt(rows.numel() / max(peak.numel(), 1))
    occupied = weight.abs().amax(dim=dims, keepdim=True) > 0 if dims else weight != 0
    return torch.where(occupied, rows / peak * (length / size), 0.0)


def _gaussian(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, dtype=statistics_dtype(like.dtype), device=like.device, generator=generator)
