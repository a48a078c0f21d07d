"""What real training relies on, one small function a promise, kept by family.

A behaviour takes `make`, a factory of optimisers, and raises AssertionError where the promise is broken. `make(x,
**options)` builds a fresh optimiser for a module or for parameters, and says what it knows of its rule as
attributes (see `configurations.Configuration`), so that a behaviour can choose a model that the rule takes. Nothing
here knows any rule by name: the same functions can judge anybody's optimiser.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

FORMS: dict[str, dict[str, bool]] = {
    "default": {},
    "plain": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
    "plain capturable": {"foreach": False, "capturable": True},
    "foreach capturable": {"foreach": True, "capturable": True},
}
EAGER = ("default", "plain", "foreach", "fused")
DEFAULT = ("default",)


@dataclass(frozen=True)
class Behaviour:
    """One promise: `check(make, **variant)` for every variant, in every form named."""

    family: str
    name: str
    check: Callable[..., None]
    forms: tuple[str, ...]
    variants: tuple[Mapping[str, Any], ...]
    applies: Callable[[Any], bool]
    costly: bool


BEHAVIOURS: dict[str, Behaviour] = {}


def behaviour(
    *,
    forms: tuple[str, ...] = (*EAGER, "capturable"),
    applies: Callable[[Any], bool] = lambda make: True,
    costly: bool = False,
    **variants: tuple[Any, ...],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a behaviour; `variants` names keyword arguments and the values that each is checked at.

    `applies` says for which rules the promise has a meaning. A rule for which it has one but which does not keep
    it is listed in the database of configurations under `exempt`, with the reason.
    """

    def register(check: Callable[..., None]) -> Callable[..., None]:
        assert check.__name__ not in BEHAVIOURS, f"two behaviours are named {check.__name__}"
        product = itertools.product(*variants.values())
        BEHAVIOURS[check.__name__] = Behaviour(
            family=check.__module__.rpartition(".")[2],
            name=check.__name__,
            check=check,
            forms=forms,
            variants=tuple(dict(zip(variants, values, strict=True)) for values in product),
            applies=applies,
            costly=costly,
        )
        return check

    return register
