"""The database of configurations is whole: nothing is left out of it, and nothing in it is stale."""

import itertools

import pytest
import torch
from torch.optim import lr_scheduler

import archopt
from configurations import (
    AGD,
    AUTONERO_REFUSES,
    BY_LABEL,
    CONFIGURATIONS,
    FUSED_REFUSES,
    NERO,
    VECTORS_ALONE,
)
from contract.behaviours import BEHAVIOURS
from contract.behaviours.calling import SCHEDULERS
from contract.cases import FAMILIES, case_of, is_quick

RULES = [getattr(archopt, name) for name in archopt.__all__ if isinstance(getattr(archopt, name), type)]
RULES = [rule for rule in RULES if issubclass(rule, torch.optim.Optimizer)]
BOTH_FORMS = {archopt.Nero, archopt.AGD}  # given parameters the published rule, given a module its roles
MODULE_ONLY = {archopt.AutoNero}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_rule_is_there_with_its_default_options(rule):
    defaults = [c for c in CONFIGURATIONS if c.rule is rule and not c.options and c.main]
    expected = set() if rule in MODULE_ONLY else {"parameters"}
    expected |= {"module"} if rule in MODULE_ONLY | BOTH_FORMS else set()
    assert {configuration.takes for configuration in defaults} == expected


def test_default_configurations_skip_nothing():
    """Every behaviour that has a meaning for a rule is checked at its defaults, in every run of the tests."""
    for configuration in CONFIGURATIONS:
        if not configuration.main:
            continue
        for behaviour in BEHAVIOURS.values():
            if behaviour.applies(configuration) and "default" in behaviour.forms:
                quick = [
                    is_quick(behaviour, configuration, "default", variant) for variant in behaviour.variants
                ]
                assert any(quick) if behaviour.costly else all(quick), (configuration.label, behaviour.name)


def test_every_family_has_behaviours_and_every_behaviour_a_promise():
    assert {behaviour.family for behaviour in BEHAVIOURS.values()} == set(FAMILIES)
    for behaviour in BEHAVIOURS.values():
        assert "_" in behaviour.name
        assert any(behaviour.applies(configuration) for configuration in CONFIGURATIONS), behaviour.name


@pytest.mark.parametrize("label", BY_LABEL)
def test_exemptions_match_a_case_and_say_why(label):
    configuration = BY_LABEL[label]
    cases = [
        case_of(behaviour, form, variant)
        for behaviour in BEHAVIOURS.values()
        if behaviour.applies(configuration)
        for form, variant in itertools.product(behaviour.forms, behaviour.variants)
        if form in configuration.forms
    ]
    for pattern, reason in configuration.exempt.items():
        alone = type(configuration)("", configuration.rule, exempt={pattern: reason})
        assert any(alone.exemption(case) for case in cases), f"{pattern} matches no case of {label}"
        assert len(reason.split()) >= 3, f"{pattern}: {reason!r} is no reason"


def test_our_rules_keep_every_promise_but_those_of_their_mathematics():
    """An exemption of a rule of ours is a decision; this list makes adding one a change that is seen."""
    ours = {c.label: set(c.exempt) for c in CONFIGURATIONS if c.rule in RULES and c.exempt}
    assert ours == {
        # fused=True is asked for, and says what it cannot do; fused=None, the default, breaks nothing.
        **{configuration.label: {*FUSED_REFUSES} for configuration in NERO},
        **{c.label: {*FUSED_REFUSES, "state_of_another_model_is_refused"} for c in AGD},
        "autonero": {*VECTORS_ALONE, *AUTONERO_REFUSES},
        # A movement in bfloat16 is what that one is asked for.
        "autonero-bfloat16-movement": {
            *VECTORS_ALONE,
            *AUTONERO_REFUSES,
            "statistics_of_half_weights_are_float32",
            "load_into_another_dtype_keeps_statistics",
        },
        "autonero-svd": {*VECTORS_ALONE, *AUTONERO_REFUSES},
        "autonero-unit": {*VECTORS_ALONE, *AUTONERO_REFUSES, "second_construction_keeps_bits"},
        "madam": {"zero_weights_wake"},
        "madam-sum": {
            "zero_weights_wake",
            "degenerate_rows_train/*/float32",
            "degenerate_rows_train/*/float64",
        },
    }


def test_every_scheduler_of_torch_is_covered():
    abstract = {"LRScheduler"}
    public = {name for name in lr_scheduler.__all__ if name not in abstract}
    assert public <= set(SCHEDULERS), f"not covered: {sorted(public - set(SCHEDULERS))}"
