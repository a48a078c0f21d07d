"""Every behaviour, for every configuration of every rule, in every form."""

import importlib
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


def cases(family: str) -> list[Any]:
    """One test for each behaviour, configuration, form and variant; exempt ones must fail, for their reason."""
    found = []
    for configuration in CONFIGURATIONS:
        for behaviour in BEHAVIOURS.values():
            if behaviour.family != family or not behaviour.applies(configuration):
                continue
            for form in behaviour.forms:
                if form not in configuration.forms:
                    continue
                for variant in behaviour.variants:
                    case = "/".join([behaviour.name, form, ",".join(map(label, variant.values()))]).rstrip(
                        "/"
                    )
                    marks = [pytest.mark.slow] if behaviour.slow(variant) else []
                    if reason := configuration.exemption(case):
                        marks.append(pytest.mark.xfail(reason=reason, strict=True))
                    found.append(
                        pytest.param(
                            behaviour,
                            configuration.in_form(form),
                            variant,
                            marks=marks,
                            id=f"{configuration.label}/{case}",
                        )
                    )
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
