"""The one database of optimiser configurations that tests run over.

A configuration is a rule with options, what it promises by its nature (its row, tensor or step is skipped where a
gradient is not finite; it has momentum or not), and where it breaks a promise of `contract/behaviours`, with the
reason. Nothing is skipped silently: an exempt case is run and must fail, so that a reason which no longer holds is
found. torch's own optimisers stand here as controls: they show that the behaviours are torch's, and that the tests
can fail.
"""

import fnmatch
import functools
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
    main: bool = False
    """Whether these are a rule's default options, which every run of the tests checks in full."""
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
    nero("nero", main=True),
    nero("nero-mean", options={"unit_norm": False}),
    nero("nero-norm", options={"zero_mean": False}),
    nero("nero-free", options={"zero_mean": False, "unit_norm": False}),
    nero("nero-beta0.9", options={"beta": 0.9, "lr": 0.02}),
    nero("nero-beta0", options={"beta": 0.0}),
    nero("nero-columns", options={"neuron_dim": 1}),
    nero("nero-module", main=True, takes="module"),
)

# -- AGD ---------------------------------------------------------------------------------------------------


def agd(label: str, **known: Any) -> Configuration:
    return Configuration(
        label,
        archopt.AGD,
        takes_rate=False,
        skips="step",
        skipped=lambda optimizer: optimizer.skipped_steps,
        reports=("eta", "gradient_summary"),
        option="gain",
        out_of_range=(("gain", -1.0), ("gain", float("nan"))),
        exempt={
            "state_of_another_model_is_refused": "AGD keeps no state: there is nothing to tell two models apart by"
        },
        **known,
    )


AGD = (
    agd("agd", main=True, dims=MATRICES_AND_FILTERS),
    agd("agd-gain10", dims=MATRICES_AND_FILTERS, options={"gain": 10.0}),
    agd("agd-module", main=True, takes="module"),
)

# -- Lamb and Madam ----------------------------------------------------------------------------------------

LAMB_REFUSES = (
    ("betas", (1.0, 0.999)),
    ("betas", (0.9, -0.5)),
    ("eps", -1e-8),
    ("weight_decay", -0.1),
    ("weight_decay", float("nan")),
    ("max_weight_norm", -1.0),
)
MADAM_REFUSES = (("beta", 1.0), ("beta", -0.1), ("p_scale", -1.0), ("g_bound", -1.0))
MADAM_BREAKS = {
    "zero_weights_wake": "Madam's steps are multiplicative: a weight of zero never moves (2006.14560)"
}


def lamb(label: str, **known: Any) -> Configuration:
    return Configuration(
        label,
        archopt.Lamb,
        skips="tensor",
        skipped=count_in_state,
        option="weight_decay",
        out_of_range=LAMB_REFUSES,
        memoryless=known.pop("memoryless", False),
        **known,
    )


def madam(label: str, **known: Any) -> Configuration:
    return Configuration(
        label,
        archopt.Madam,
        skips="tensor",
        skipped=count_in_state,
        option="p_scale",
        out_of_range=MADAM_REFUSES,
        exempt=MADAM_BREAKS,
        **known,
    )


LAMB = (
    lamb("lamb", main=True),
    lamb("lamb-beta0", options={"betas": (0.0, 0.999)}, memoryless=True),
    lamb("lamb-decay", options={"weight_decay": 0.1}),
    lamb("lamb-corrected", options={"bias_correction": True, "max_weight_norm": None}),
    lamb("lamb-adam", options={"trust_ratio": False}),
)
MADAM = (
    madam("madam", main=True),
    madam("madam-sum", options={"constant_sum": True}),
)

# -- torch's own, as controls ------------------------------------------------------------------------------

CASTS = "torch keeps state in the type of the weights"
TORCH_BREAKS = {
    "older_state_dict_lacking_an_option_loads": "torch knows defaults for a few options alone",
    "copying_leaves_the_original_alone": "torch's load_state_dict shares tensors with the state dict",
    "state_appears_for_all_parameters_at_once": "torch makes state when a gradient first appears",
    "state_of_another_optimizer_is_refused": "torch loads any state",
    "state_of_another_model_is_refused": "torch compares numbers of tensors, not shapes",
    "non_finite_gradient_leaves_no_trace": "torch lets NaN into the weights",
    "everything_non_finite_changes_nothing": "torch lets NaN into the weights",
    "statistics_of_half_weights_are_float32": CASTS,
    "load_into_another_dtype_keeps_statistics": CASTS,
}


def torch_rule(label: str, rule: Callable[..., Optimizer], **known: Any) -> Configuration:
    return Configuration(
        label,
        rule,
        forms=known.pop("forms", ("default", "foreach")),
        memoryless=known.pop("memoryless", False),
        exempt=TORCH_BREAKS | known.pop("exempt", {}),
        **known,
    )


CONTROLS = (
    torch_rule("torch-sgd", torch.optim.SGD, options={"lr": 0.05, "momentum": 0.9}),
    torch_rule("torch-adamw", torch.optim.AdamW, main=True, options={"lr": 0.01}),
)
if hasattr(torch.optim, "Muon"):  # from torch 2.9
    CONTROLS += (
        torch_rule("torch-muon", torch.optim.Muon, dims=MATRICES, forms=("default",), maximizes=False),
    )

# -- any optimiser, constrained ----------------------------------------------------------------------------


def constrained(rule: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """A factory of `rule`, constrained as it is built."""

    @functools.wraps(rule)
    def make(params: Any, **options: Any) -> Optimizer:
        return archopt.constrain(rule(params, **options))

    return make


def constrain(configuration: Configuration, label: str, *, main: bool = False) -> Configuration:
    return replace(
        configuration, label=label, rule=constrained(configuration.rule), unit_norm=True, main=main
    )


CONSTRAINED = (
    constrain(LAMB[1], "lamb-constrained"),
    constrain(MADAM[0], "madam-constrained"),
    constrain(CONTROLS[0], "sgd-constrained"),
    constrain(torch_rule("", torch.optim.Adam, options={"lr": 0.01}), "adam-constrained", main=True),
)

CONFIGURATIONS: tuple[Configuration, ...] = (*NERO, *AGD, *LAMB, *MADAM, *CONSTRAINED, *CONTROLS)
BY_LABEL = {configuration.label: configuration for configuration in CONFIGURATIONS}
assert len(BY_LABEL) == len(CONFIGURATIONS), "two configurations share a label"
