"""Which behaviours are checked for which configurations, in which forms, and which of those in every run."""

import importlib
import itertools
from typing import Any

import pytest

from archopt import kernels
from configurations import CONFIGURATIONS, Configuration
from contract.behaviours import BEHAVIOURS, Behaviour

FAMILIES = ("state", "calling", "weights", "gradients", "precision", "forms", "errors", "reports")
for family in FAMILIES:
    importlib.import_module(f"contract.behaviours.{family}")


def label(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(label, value))
    return str(value).removeprefix("torch.").replace("/", "|")


def case_of(behaviour: Behaviour, form: str, variant: Any) -> str:
    """`behaviour/form/variant`, the name that exemptions are written for."""
    return "/".join([behaviour.name, form, ",".join(map(label, variant.values()))]).rstrip("/")


def is_quick(behaviour: Behaviour, configuration: Configuration, form: str, variant: Any) -> bool:
    """Whether a case is in every run of the tests; the others are in the long one.

    Every rule with its default options, in the default form, is checked for all variants. Other forms of it, and
    other options in the default form, take the first and the last variant.
    """
    if behaviour.costly:
        return configuration.main and form == "default" and variant == behaviour.variants[0]
    if configuration.main and form == "default":
        return True
    return (configuration.main or form == "default") and variant in (
        behaviour.variants[0],
        behaviour.variants[-1],
    )


def cases(family: str) -> list[Any]:
    """One test for each behaviour, configuration, form and variant; exempt ones must fail, for their reason.

    Of costly behaviours, options other than the default take the first variant alone (they are not compiled twice).
    """
    found = []
    kernel = kernels.status()["cpu"]
    without_kernel = pytest.mark.skipif(not kernel.available, reason=f"no CPU kernel: {kernel.detail}")
    for configuration in CONFIGURATIONS:
        for behaviour in BEHAVIOURS.values():
            if behaviour.family != family or not behaviour.applies(configuration):
                continue
            for form, variant in itertools.product(behaviour.forms, behaviour.variants):
                unneeded = behaviour.costly and not configuration.main and variant != behaviour.variants[0]
                if form not in configuration.forms or unneeded:
                    continue
                case = case_of(behaviour, form, variant)
                marks = [] if is_quick(behaviour, configuration, form, variant) else [pytest.mark.slow]
                if "fused" in form:
                    marks.append(without_kernel)
                if reason := configuration.exemption(case):
                    marks.append(pytest.mark.xfail(reason=reason, strict=True))
                make, name = configuration.in_form(form), f"{configuration.label}/{case}"
                found.append(pytest.param(behaviour, make, variant, marks=marks, id=name))
    return found
