"""The one database of optimiser configurations that tests run over.

A configuration is a rule with options, what it promises by its nature (its row, tensor or step is skipped where a
gradient is not finite; it has momentum or not), and where it breaks a promise of `contract/behaviours`, with the
reason. Nothing is skipped silently: an exempt case is run and must fail, so that a reason which no longer holds is
found. torch's own optimisers stand here as controls: they show that the behaviours are torch's, and that the tests
can fail.
"""

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import archopt
from contract.behaviours import FORMS

ANY = range(6)
MATRICES_AND_FILTERS = range(2, 6)
MATRICES = range(2, 3)


@dataclass(frozen=True)
class Configuration:
    """A factory of optimisers: `configuration(module_or_params, **more_options)`."""

    label: str
    rule: Callable[..., Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    takes: str = "parameters"
    """What `rule` is given for a module: its "parameters", or the "module" itself."""
    dims: range = ANY
    """Numbers of dimensions of the tensors that the rule takes."""
    forms: tuple[str, ...] = ("default", "plain", "capturable", "plain capturable")
    maximizes: bool = True
    takes_rate: bool = True
    """Whether the constructor has `lr`."""
    memoryless: bool = True
    """Neither momentum nor decay: a row without gradient rests whatever came before."""
    neuron_dim: int = 0
    unit_norm: bool = False
    """Rows of matrices have norm 1 after every step."""
    skips: str = "step"
    """What is left alone where one entry of a gradient is not finite: its "row", its "tensor" or the "step"."""
    skipped: Callable[[Optimizer], Tensor | int] = lambda optimizer: 0
    """How many of those were left alone so far."""
    reports: tuple[str, ...] = ()
    """Attributes or methods that give numbers to log."""
    option: str = "lr"
    """An option of the rule, to misspell."""
    out_of_range: tuple[tuple[str, Any], ...] = ()
    """Options and values that the rule must refuse."""
    exempt: Mapping[str, str] = field(default_factory=dict)
    """Pattern of a case (`behaviour`, or `behaviour/form/variant`) -> why the rule breaks this promise."""

    def __call__(self, params: Any, **options: Any) -> Optimizer:
        if isinstance(params, nn.Module) and self.takes == "parameters":
            params = list(params.parameters())
        return self.rule(params, **{**self.options, **options})

    def in_form(self, form: str) -> "Configuration":
        return replace(self, options={**self.options, **FORMS[form]})

    def plain(self) -> "Configuration":
        """The same in the plain form, for comparisons."""
        plain = {option: False for form in self.forms for option in FORMS[form]}
        return replace(self, options={**self.options, **plain})

    def exemption(self, case: str) -> str | None:
        """Why the case `behaviour/form/variant` may fail; None if it may not."""
        name = case.split("/")[0]
        for pattern, reason in self.exempt.items():
            if pattern == name or fnmatch.fnmatchcase(case, pattern):
                return reason
        return None


def count_in_state(optimizer: Optimizer) -> Tensor:
    """The number of skipped rows or tensors, where each tensor's state counts its own."""
    counts = [state["skipped"] for state in optimizer.state.values() if "skipped" in state]
    return torch.stack(counts).sum() if counts else torch.zeros(())


# -- Nero --------------------------------------------------------------------------------------------------

NERO_REFUSES = (("beta", 1.0), ("beta", -0.1), ("beta", float("nan")))


def nero(label: str, **known: Any) -> Configuration:
    options = known.pop("options", {})
    return Configuration(
        label,
        archopt.Nero,
        options,
        unit_norm=options.get("unit_norm", True),
        neuron_dim=options.get("neuron_dim", 0),
        skips="row",
        skipped=count_in_state,
        reports=("mean_turn",),
        option="neuron_dim",
        out_of_range=NERO_REFUSES,
        **known,
    )


NERO = (
    nero("nero"),
    nero("nero-mean", options={"unit_norm": False}),
    nero("nero-norm", options={"zero_mean": False}),
    nero("nero-free", options={"zero_mean": False, "unit_norm": False}),
    nero("nero-beta0.9", options={"beta": 0.9, "lr": 0.02}),
    nero("nero-beta0", options={"beta": 0.0}),
    nero("nero-columns", options={"neuron_dim": 1}),
    nero("nero-module", takes="module"),
)

CONFIGURATIONS: tuple[Configuration, ...] = (*NERO,)
BY_LABEL = {configuration.label: configuration for configuration in CONFIGURATIONS}
assert len(BY_LABEL) == len(CONFIGURATIONS), "two configurations share a label"
