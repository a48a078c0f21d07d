"""The vocabulary of roles, one role, and the table of a model's roles that prints itself.

How a role is recognised is decided in `archopt.roles`; what a kind means, and what Nero and AGD do with it in
words, stands here once. `docs/roles.md` explains both.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import Parameter

from archopt.neurons import NeuronDim, fan_in_dims


class Kind(NamedTuple):
    """One word of the vocabulary."""

    family: str
    """`hidden`, `head`, `embedding` or `vector` (of which every entry is treated by itself)."""
    meaning: str
    nero: str
    agd: str


_ENTRIES = "entries move one by one"

KINDS: dict[str, Kind] = {
    "matrix": Kind(
        "hidden", "rows feed units: linear maps, recurrent gates", "rows turn", "radius sqrt(out/in)"
    ),
    "conv": Kind("hidden", "filters", "filters turn", "per tap, radius sqrt(out/in)/sqrt(taps)"),
    "depthwise": Kind("hidden", "one filter a channel", "filters turn", "per channel, radius 1/sqrt(taps)"),
    "conv_transpose": Kind(
        "hidden",
        "filters of a transposed convolution, a neuron being an output channel",
        "filters turn",
        "per tap, radius sqrt(out/in)*stride/sqrt(taps)",
    ),
    "embedding": Kind("embedding", "a row a token", "rows turn", "per row, RMS radius measured"),
    "position": Kind(
        "embedding", "a row a position or special token", "rows turn", "per row, RMS radius measured"
    ),
    "head": Kind("head", "the matrix that feeds the outputs", "rows turn", "radius sqrt(out/in)"),
    "tied": Kind(
        "embedding", "embedding and output head at once", "rows turn", "per row, RMS radius measured"
    ),
    "gain": Kind("vector", "factors around one, and weights of fan-in 1", _ENTRIES, "signs, radius 1"),
    "shift": Kind("vector", "what a normalisation layer adds", _ENTRIES, "RMS radius 1"),
    "bias": Kind("vector", "what any other layer adds", _ENTRIES, "RMS radius 1"),
    "vector": Kind("vector", "any other vector", _ENTRIES, "RMS radius measured"),
    "scalar": Kind("vector", "one number", _ENTRIES, "sign, radius measured"),
    "unknown": Kind(
        "hidden", "three or more dimensions, of no known layer", "rows turn", "RMS radius measured"
    ),
}
"""The closed vocabulary. Values of `Role.kind` are plain strings: they enter groups and so state dicts."""


@dataclass(frozen=True)
class Role:
    """What one parameter is. A tied tensor has one role, under its first name.

    kind: a key of `KINDS`.
    neuron_dim: dimension, or dimensions, that index neurons (see `archopt.neurons`).
    channel_groups: groups of a transposed convolution, whose dimension 0 is split first; 1 elsewhere.
    groups: groups of any convolution.
    slices: packed projections or gates, stacked along `neuron_dim` in equal parts.
    stride: of a transposed convolution (the geometric mean over its axes); 1 elsewhere.
    uses: how many names the tensor goes by; `aliases` are all but the first.
    note: what had to be assumed, or what is unusual, in words.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    neuron_dim: NeuronDim = 0
    channel_groups: int = 1
    groups: int = 1
    slices: int = 1
    stride: float = 1
    uses: int = 1
    trainable: bool = True
    aliases: tuple[str, ...] = ()
    note: str = ""

    @property
    def family(self) -> str:
        """`hidden`, `head`, `embedding` or `vector`."""
        return KINDS[self.kind].family

    @property
    def fan_in(self) -> int:
        """How many weights feed one neuron; 1 where every entry is a neuron by itself."""
        shape, dims = self._rows()
        return math.prod(shape[dim] for dim in dims)

    @property
    def neurons(self) -> int:
        """How many neurons the parameter feeds."""
        shape, dims = self._rows()
        return math.prod(size for dim, size in enumerate(shape) if dim not in dims)

    def _rows(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shape of `archopt.neurons.as_rows`, and the dimensions of it that a neuron sums over."""
        dims = fan_in_dims(torch.Size(self.shape), self.neuron_dim, self.channel_groups)
        if self.channel_groups == 1 or not dims:
            return self.shape, dims
        return (self.channel_groups, self.shape[0] // self.channel_groups, *self.shape[1:]), dims


def elementwise_dims(shape: tuple[int, ...]) -> NeuronDim:
    """The `neuron_dim` with which every entry of a tensor is a neuron by itself."""
    return tuple(range(len(shape))) if fan_in_dims(torch.Size(shape)) else 0


Explanation = Callable[[Role], str]


def what_nero_does(role: Role) -> str:
    """What Nero does with a parameter of this role, in words."""
    if not role.trainable:
        return "frozen"
    constrained = fan_in_dims(torch.Size(role.shape), role.neuron_dim, role.channel_groups)
    return f"{KINDS[role.kind].nero}, mean 0, norm 1" if constrained else _ENTRIES


def what_agd_does(role: Role) -> str:
    """What AGD, built on a module, does with a parameter of this role, in words."""
    if not role.trainable:
        return "frozen"
    words = KINDS[role.kind].agd
    if role.slices > 1:
        return f"per slice, {words}"
    if role.kind == "conv_transpose" and role.groups == role.shape[0] > role.shape[1] == 1:
        return "per channel, radius stride/sqrt(taps)"
    return words.replace("per tap", "per group and tap") if role.groups > 1 else words


class RoleTable:
    """The roles of a model's parameters, in registration order. Printing it shows the table.

    Iterating gives `Role`s, `items()` gives `(Role, Parameter)`, `table[name]` finds a role by its name or an
    alias. The table holds the parameters, not the module.
    """

    def __init__(self, roles: Sequence[Role], parameters: Sequence[Parameter]) -> None:
        self._items = list(zip(roles, parameters, strict=True))
        self._by_name = {name: role for role in roles for name in (role.name, *role.aliases)}

    def __iter__(self) -> Iterator[Role]:
        return (role for role, _ in self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, name: str) -> Role:
        if name not in self._by_name:
            near = difflib.get_close_matches(str(name), self._by_name, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f" ({len(self)} parameters)"
            raise KeyError(f"no parameter is named {name!r}{hint}")
        return self._by_name[name]

    def items(self) -> Iterable[tuple[Role, Parameter]]:
        """Pairs of role and parameter, each tensor once."""
        return list(self._items)

    def __repr__(self) -> str:
        return f"<RoleTable of {len(self)} parameters; print it to see them>"

    def __str__(self) -> str:
        return self.render()

    def render(self, explain: Explanation | None = None) -> str:
        """The table as plain text, then a line of totals, then one line for each alias and note.

        `explain` says in words what happens to a parameter; None shows what Nero and AGD do, a column each.
        """
        columns: dict[str, Explanation] = {
            "name": lambda role: role.name,
            "shape": lambda role: " x ".join(map(str, role.shape)) or "()",
            "role": _label,
            "neurons": lambda role: f"{role.neurons:,}",
            "fan-in": lambda role: f"{role.fan_in:,}",
        }
        columns |= (
            {"Nero": what_nero_does, "AGD": what_agd_does} if explain is None else {"treatment": explain}
        )
        rows = [list(columns)] + [[say(role) for say in columns.values()] for role in self]
        widths = [max(map(len, column)) for column in zip(*rows)]
        align = [str.rjust if title in ("neurons", "fan-in") else str.ljust for title in columns]
        lines = ["  ".join(map(_pad, align, row, widths)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*lines, "", self._totals(), *self._remarks()])

    def _totals(self) -> str:
        entries = sum(math.prod(role.shape) for role in self)
        frozen = sum(math.prod(role.shape) for role in self if not role.trainable)
        neurons = sum(role.neurons for role in self if role.trainable)
        return (
            f"{len(self):,} tensors, {entries:,} entries ({frozen:,} frozen), {neurons:,} trainable neurons"
        )

    def _remarks(self) -> Iterator[str]:
        for role in self:
            if role.aliases:
                yield f"{role.name}: the same tensor as {', '.join(role.aliases)}"
            if role.note:
                yield f"{role.name}: {role.note}"


def _pad(align: Callable[[str, int], str], text: str, width: int) -> str:
    return align(text, width)


def _label(role: Role) -> str:
    """The kind, with what changes its treatment."""
    groups = 1 if role.kind == "depthwise" else role.groups
    details = {"slices": role.slices, "groups": groups, "uses": role.uses}
    counts = [f"{count} {name}" for name, count in details.items() if count > 1]
    return f"{role.kind} ({', '.join(counts)})" if counts else role.kind


def group_by_treatment(
    table: RoleTable, treatment: Callable[[Role], dict[str, Any] | None]
) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimiser: parameters that are treated equally share a group.

    `treatment(role)` gives the options of a group, or None to leave the parameter out. They come in order of
    their first parameter. `params` lists `(name, parameter)` pairs, frozen ones too, so that they can be
    unfrozen later.
    """
    groups: list[tuple[dict[str, Any], list[tuple[str, Parameter]]]] = []
    for role, parameter in table.items():
        options = treatment(role)
        if options is None:
            continue
        members = next((members for known, members in groups if known == options), None)
        if members is None:
            groups.append((options, members := []))
        members.append((role.name, parameter))
    return [{"params": members, **options} for options, members in groups]
