"""Every behaviour, for every configuration of every rule, in every form."""

from typing import Any

import pytest

from configurations import Configuration
from contract.behaviours import Behaviour
from contract.cases import cases


@pytest.mark.parametrize(("behaviour", "make", "variant"), cases("state"))
def test_state(behaviour: Behaviour, make: Configuration, variant: dict[str, Any]) -> None:
    behaviour.check(make, **variant)


@pytest.mark.parametrize(("behaviour", "make", "variant"), cases("calling"))
def test_calling(behaviour: Behaviour, make: Configuration, variant: dict[str, Any]) -> None:
    behaviour.check(make, **variant)


@pytest.mark.parametrize(("behaviour", "make", "variant"), cases("weights"))
def test_weights(behaviour: Behaviour, make: Configuration, variant: dict[str, Any]) -> None:
    behaviour.check(make, **variant)


@pytest.mark.parametrize(("behaviour", "make", "variant"), cases("gradients"))
def test_gradients(behaviour: Behaviour, make: Configuration, variant: dict[str, Any]) -> None:
    behaviour.check(make, **variant)


@pytest.mark.parametrize(("behaviour", "make", "variant"), cases("precision"))
def test_precision(behaviour: Behaviour, make: Configuration, variant: dict[str, Any]) -> None:
    behaviour.check(make, **variant)


@pytest.mark.parametrize(("behaviour", "make", "variant"), cases("forms"))
def test_forms(behaviour: Behaviour, make: Configuration, variant: dict[str, Any]) -> None:
    behaviour.check(make, **variant)


@pytest.mark.parametrize(("behaviour", "make", "variant"), cases("errors"))
def test_errors(behaviour: Behaviour, make: Configuration, variant: dict[str, Any]) -> None:
    behaviour.check(make, **variant)


@pytest.mark.parametrize(("behaviour", "make", "variant"), cases("reports"))
def test_reports(behaviour: Behaviour, make: Configuration, variant: dict[str, Any]) -> None:
    behaviour.check(make, **variant)
