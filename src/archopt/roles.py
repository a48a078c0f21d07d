"""What each parameter of a model is (interface; under construction)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn import Parameter

from archopt.neurons import NeuronDim


@dataclass(frozen=True)
class Role:
    """What one parameter is. A tied tensor has one role, under its first name."""

    name: str
    shape: tuple[int, ...]
    kind: str
    neuron_dim: NeuronDim = 0
    channel_groups: int = 1
    groups: int = 1
    slices: int = 1
    stride: int = 1
    uses: int = 1
    trainable: bool = True
    aliases: tuple[str, ...] = ()
    note: str = ""


class RoleTable:
    def __iter__(self) -> Iterator[Role]: ...
    def items(self) -> Iterable[tuple[Role, Parameter]]: ...


def parameter_roles(model: nn.Module, overrides: Mapping[str, str] | None = None) -> RoleTable: ...


def group_by_treatment(
    table: RoleTable, treatment: Callable[[Role], dict[str, Any]]
) -> list[dict[str, Any]]: ...
