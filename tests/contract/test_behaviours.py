"""Every behaviour, for every configuration of every rule, in every form."""

import importlib
import itertools
from typing import Any

import pytest

from configurations import CONFIGURATIONS, Configuration
from contract.behaviours import BEHAVIOURS, Behaviour

FAMILIES = ("state", "calling", "weights", "gradients", "precision", "forms", "errors", "reports")
for family in FAMILIES:
    importlib.import_module(f"contract.behaviours.{family}")


def label(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(label, value))
    return str(value).removeprefix("torch.").replace("/", "|")


def is_quick(behaviour: Behaviour, configuration: Configuration, form: str, variant: Any) -> bool:
    """Whether a case is in every run of the tests; the others are in the long one.

    Every rule with its default options, in the default form, is checked for all variants. Other forms of it, and
    other options in the default form, take the first and the last variant.
    """
    if behaviour.costly:
        return configuration.main and variant == behaviour.variants[0]
    if configuration.main and form == "default":
        return True
    return (configuration.main or form == "default") and variant in (
        behaviour.variants[0],
        behaviour.variants[-1],
    )


def cases(family: str) -> list[Any]:
    """One test for each behaviour, configuration, form and variant; exempt ones must fail, for their reason."""
    found = []
    for configuration in CONFIGURATIONS:
        for behaviour in BEHAVIOURS.values():
            if behaviour.family != family or not behaviour.applies(configuration):
                continue
            for form, variant in itertools.product(behaviour.forms, behaviour.variants):
                if form not in configuration.forms:
                    continue
                case = "/".join([behaviour.name, form, ",".join(map(label, variant.values()))]).rstrip("/")
                marks = [] if is_quick(behaviour, configuration, form, variant) else [pytest.mark.slow]
                if reason := configuration.exemption(case):
                    marks.append(pytest.mark.xfail(reason=reason, strict=True))
                make, name = configuration.in_form(form), f"{configuration.label}/{case}"
                found.append(pytest.param(behaviour, make, variant, marks=marks, id=name))
    return found


def hold(behaviour: Behaviour, make: Configuration, variant: dict[str, Any]) -> None:
    behaviour.check(make, **variant)


@pytest.mark.parametrize(("behaviour", "make", "variant"), cases("state"))
def test_state(behaviour: Behaviour, make: Configuration, variant: dict[str, Any]) -> None:
    hold(behaviour, make, variant)


@pytest.mark.parametrize(("behaviour", "make", "variant"), cases("calling"))
def test_calling(behaviour: Behaviour, make: Configuration, variant: dict[str, Any]) -> None:
    hold(behaviour, make, variant)


@pytest.mark.parametrize(("behaviour", "make", "variant"), cases("weights"))
def test_weights(behaviour: Behaviour, make: Configuration, variant: dict[str, Any]) -> None:
    hold(behaviour, make, variant)


@pytest.mark.parametrize(("behaviour", "make", "variant"), cases("gradients"))
def test_gradients(behaviour: Behaviour, make: Configuration, variant: dict[str, Any]) -> None:
    hold(behaviour, make, variant)


@pytest.mark.parametrize(("behaviour", "make", "variant"), cases("precision"))
def test_precision(behaviour: Behaviour, make: Configuration, variant: dict[str, Any]) -> None:
    hold(behaviour, make, variant)


@pytest.mark.parametrize(("behaviour", "make", "variant"), cases("forms"))
def test_forms(behaviour: Behaviour, make: Configuration, variant: dict[str, Any]) -> None:
    hold(behaviour, make, variant)


@pytest.mark.parametrize(("behaviour", "make", "variant"), cases("errors"))
def test_errors(behaviour: Behaviour, make: Configuration, variant: dict[str, Any]) -> None:
    hold(behaviour, make, variant)


@pytest.mark.parametrize(("behaviour", "make", "variant"), cases("reports"))
def test_reports(behaviour: Behaviour, make: Configuration, variant: dict[str, Any]) -> None:
    hold(behaviour, make, variant)
