"""Overrides of roles: what a user says about a parameter, checked and applied.

An override is a regular expression and what it states: a kind, or a dict of fields. It replaces what was
recognised.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from archopt.role_table import KINDS, Role, elementwise_dims

Overrides = Mapping[str, str | Mapping[str, Any]]
Fields = dict[str, Any]

_GEOMETRY: Fields = {"neuron_dim": 0, "channel_groups": 1, "groups": 1, "slices": 1, "stride": 1}
_OVERRIDABLE = ("kind", *_GEOMETRY, "uses")


class Rules:
    """Overrides, checked: each a pattern and the fields that it states."""

    def __init__(self, overrides: Overrides) -> None:
        if not isinstance(overrides, Mapping):
            raise TypeError(
                f"overrides is a {type(overrides).__name__}, expected a mapping such as "
                "{'head.weight': 'head', 'experts': {'kind': 'matrix', 'neuron_dim': (0, 1)}}"
            )
        self._rules = [(pattern, _compiled(pattern), _stated(pattern, v)) for pattern, v in overrides.items()]

    @property
    def name_a_head(self) -> bool:
        return any(fields.get("kind") == "head" for _, _, fields in self._rules)

    def apply(self, roles: list[Role]) -> list[Role]:
        """The roles with the first matching override applied. Raises ValueError where one matches no name."""
        names = [name for role in roles for name in (role.name, *role.aliases)]
        for pattern, compiled, _ in self._rules:
            if not any(compiled.search(name) for name in names):
                near = (
                    difflib.get_close_matches(pattern.replace("\\", ""), names, n=3, cutoff=0.3) or names[:3]
                )
                raise ValueError(
                    f"override {pattern!r} matches no parameter; the nearest names are {', '.join(near)}"
                )
        return [self._apply_to(role) for role in roles]

    def _apply_to(self, role: Role) -> Role:
        for pattern, compiled, fields in self._rules:
            if any(compiled.search(name) for name in (role.name, *role.aliases)):
                return _overridden(role, pattern, fields)
        return role


def _compiled(pattern: str) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise TypeError(f"override {pattern!r}: a pattern is a string, got a {type(pattern).__name__}")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"override {pattern!r} is not a regular expression: {error}") from error


def _stated(pattern: str, value: str | Mapping[str, Any]) -> Fields:
    """What an override says, as fields of a role, each checked by itself."""
    if not isinstance(value, str | Mapping):
        raise TypeError(
            f"override {pattern!r}: {value!r} is neither a kind nor a dict of {', '.join(_OVERRIDABLE)}"
        )
    fields: Fields = {"kind": value} if isinstance(value, str) else dict(value)
    for field, given in fields.items():
        if field not in _OVERRIDABLE:
            raise ValueError(_mistaken(pattern, "field", field, _OVERRIDABLE))
        if field == "kind" and str(given) not in KINDS:
            raise ValueError(_mistaken(pattern, "kind", given, KINDS))
        if field == "neuron_dim":
            dims = given if isinstance(given, tuple | list) else (given,)
            if not all(type(dim) is int for dim in dims):
                raise TypeError(
                    f"override {pattern!r}: neuron_dim={given!r}, expected an integer or a tuple of them"
                )
            fields[field] = given if type(given) is int else tuple(dims)
        elif field != "kind" and not (type(given) is int or (field == "stride" and type(given) is float)):
            raise TypeError(f"override {pattern!r}: {field}={given!r}, expected a number from 1")
        elif field != "kind" and given < 1:
            raise ValueError(f"override {pattern!r}: {field}={given!r}, expected a number from 1")
    return fields


def _mistaken(pattern: str, what: str, given: object, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(given), valid, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"override {pattern!r}: {given!r} is no {what}{hint} (valid: {', '.join(valid)})"


def _overridden(role: Role, pattern: str, stated: Fields) -> Role:
    """The role as an override states it; a kind restates the geometry too, except where more is said."""
    kind = stated.get("kind", role.kind)
    says = f"override {pattern!r} makes {role.name} of shape {role.shape} a {kind!r}"
    if KINDS[kind].family == "vector" and (moved := [field for field in stated if field in _GEOMETRY]):
        raise ValueError(f"{says}, which is treated entry by entry; leave out {', '.join(moved)}")
    if KINDS[kind].family != "vector" and len(role.shape) < 2:
        raise ValueError(f"{says}, which needs two or more dimensions; narrow the pattern to the weights")
    geometry = _geometry(role, kind) if "kind" in stated else {}
    new = replace(role, **{**geometry, **stated, "note": f"by override {pattern!r}"})
    try:
        new.fan_in  # noqa: B018 - raises where the axes do not fit
    except ValueError as error:
        raise ValueError(f"{says}: {error}") from error
    if new.slices > 1 and (not isinstance(new.neuron_dim, int) or role.shape[new.neuron_dim] % new.slices):
        raise ValueError(
            f"{says} in {new.slices} slices, which do not divide dimension {new.neuron_dim} evenly"
        )
    return new


def _geometry(role: Role, kind: str) -> Fields:
    """Axes, groups and slices of a role that is given another kind by name alone."""
    if KINDS[kind].family == "vector":
        return {**_GEOMETRY, "neuron_dim": elementwise_dims(role.shape)}
    if kind == role.kind:
        return {"slices": 1}
    if kind == "position":
        return {**_GEOMETRY, "neuron_dim": tuple(range(len(role.shape) - 1))}
    if kind == "conv_transpose":
        return {**_GEOMETRY, "neuron_dim": 1}
    if kind in ("conv", "depthwise"):
        return {**_GEOMETRY, "groups": role.groups}
    if role.family == "vector" or role.kind == "position":
        return _GEOMETRY
    return {"slices": 1}
