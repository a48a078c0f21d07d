"""How AutoNero sees a tensor of a group: its rows, its radii, and what its movement is kept in."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from archopt.neurons import as_rows, fan_in_dims
from archopt.optim.autonero_rule import Rows
from archopt.optim.matrices import scale_rows_

MOVEMENT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def dims_of(param: Tensor, group: Mapping[str, Any]) -> tuple[int, ...]:
    """The dimensions of `as_rows` that a row sums over; `()` for vectors and for all of fan-in 1."""
    if group["family"] == "vector":
        return ()
    return fan_in_dims(param.shape, group["neuron_dim"], group["channel_groups"])


def steps_plainly(group: Mapping[str, Any]) -> bool:
    """Whether rows are those of a head that takes plain steps."""
    return bool(group["family"] == "head" and group["head"] == "plain")


def bias_name(weight: str) -> str:
    """What the bias beside a weight of this name is called, under a parametrization too."""
    return weight.partition(".parametrizations.")[0].removesuffix(".weight") + ".bias"


def movement_dtype(exact: torch.dtype, group: Mapping[str, Any]) -> torch.dtype:
    """What the movement is kept in, for a tensor whose statistics are `exact`."""
    asked = MOVEMENT_DTYPES[group["movement_dtype"]]
    return exact if asked == torch.float32 else asked


def first_radius(group: Mapping[str, Any]) -> str:
    radius: str = group["embedding_radius" if group["family"] == "embedding" else "radius"]
    return radius


def scale_(param: Tensor, group: Mapping[str, Any]) -> None:
    """Gives rows their first radius, in place."""
    rows = as_rows(param, group["channel_groups"])
    scale_rows_(rows, dims_of(param, group), rms=first_radius(group) == "rms")


def rows_of(param: Tensor, state: dict[str, Tensor], channel_groups: int) -> Rows:
    """Views of a parameter and its state, in the shape of `as_rows`."""
    return Rows(
        as_rows(param, channel_groups),
        as_rows(state["exp_avg"], channel_groups),
        state["exp_avg_sq"],
        as_rows(state["movement"], channel_groups),
        state["radius"],
        state["grows_to"],
    )


def check_blocks(param: Tensor, group: Mapping[str, Any]) -> None:
    """Raises ValueError where the rows of a weight cannot be cut into the group's blocks."""
    dims = dims_of(param, group)
    rows = as_rows(param, group["channel_groups"]) if dims else param
    count = 1
    for dim, size in enumerate(rows.shape):
        count *= size if dim not in dims else 1
    if dims and count % group["blocks"]:
        raise ValueError(
            f"blocks={group['blocks']} does not divide the {count} rows of a weight of shape "
            f"{tuple(param.shape)}; give the number of equal slices, or 1"
        )
