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
    """Options and values that the rule must refuse; of a tuple, the last entry is the bad one."""
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

FUSED_REFUSES = {
    "memory_layout_does_not_matter/fused/*": "fused=True refuses gradients and weights that are not laid out alike",
    "expanded_gradient_is_read/fused": "fused=True refuses a gradient that is not laid out as its weight",
    "compiled_step_equals_eager/fused/*": "fused=True refuses a step that is compiled: its compiler fuses it",
    "step_runs_on_a_pretended_accelerator/fused": "fused=True has a kernel for the CPU alone",
}
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
        forms=tuple(FORMS),
        exempt=FUSED_REFUSES,
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
        forms=tuple(FORMS),
        exempt=FUSED_REFUSES
        | {
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
    ("betas", (0.9, 1.0)),
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
        exempt=MADAM_BREAKS | known.pop("exempt", {}),
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
    madam(
        "madam-sum",
        options={"constant_sum": True},
        exempt={
            f"degenerate_rows_train/*/{dtype}": "a constant sum leaves a row of one weight no room"
            for dtype in ("float32", "float64")
        },
    ),
)

# -- torch's own, as controls ------------------------------------------------------------------------------

CASTS = "torch keeps state in the type of the weights"
CHECKS_LITTLE = "torch checks the constructor's own options alone, and quotes no nearest name"
NEGATIVE_ZERO = "torch's -0.0 - lr * 0.0 is 0.0: a weight of -0.0 loses its sign"
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
    "zero_rate_keeps_bits": NEGATIVE_ZERO,
    "bad_rate_is_refused": "torch's message does not name the option; strings and infinity are not looked for",
    "bad_rate_in_a_group_is_refused": CHECKS_LITTLE,
    "unknown_option_is_refused_with_the_nearest": CHECKS_LITTLE,
    "unknown_group_option_is_refused": CHECKS_LITTLE,
    "complex_parameter_is_refused": "torch takes complex weights, as pairs of real ones",
    "meta_parameter_is_refused": "torch's rules do not read initial weights",
}
BREAKS_GRAPHS = {"compiled_step_equals_eager": "torch breaks the graph of its own steps on purpose"}
SGD_BREAKS = BREAKS_GRAPHS | {
    "zero_gradient_from_fresh_state_keeps_bits/*/True": NEGATIVE_ZERO,
    "tiny_and_huge_gradients_stay_finite/*1e+*": "the step of SGD is as large as the gradient",
    "tiny_and_huge_gradients_stay_finite/*10000.0": "the step of SGD is as large as the gradient",
    "form_equals_plain/foreach/bfloat16": "torch's two forms round the momentum of bfloat16 weights differently",
    "sparse_gradient_is_refused": "torch's SGD takes sparse gradients, without momentum",
}
ADAM_BREAKS = BREAKS_GRAPHS | {
    "sparse_gradient_is_refused": "torch makes the state of earlier tensors before it looks at the sparse one",
    "tensor_rate_equals_float_rate/foreach": "torch wants capturable=True beside a tensor rate and foreach",
    "tiny_and_huge_gradients_stay_finite/*/float16,*": "eps=1e-8 is 0 in float16",
    "half_precision_follows_float32/*/float16": "eps=1e-8 is 0 in float16",
}
DECAYS = {"zero_gradient_from_fresh_state_keeps_bits": "weight decay moves weights without a gradient"}


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
    torch_rule("torch-sgd", torch.optim.SGD, options={"lr": 0.05, "momentum": 0.9}, exempt=SGD_BREAKS),
    torch_rule("torch-adamw", torch.optim.AdamW, exempt=ADAM_BREAKS | DECAYS),
)
if hasattr(torch.optim, "Muon"):  # from torch 2.9
    MUON_BREAKS = {
        "empty_tensors_are_left_alone": "torch's Muon divides by the number of rows",
        "sparse_gradient_is_refused": "torch makes the state of earlier tensors before it looks",
    }
    CONTROLS += (
        torch_rule(
            "torch-muon",
            torch.optim.Muon,
            dims=MATRICES,
            forms=("default",),
            maximizes=False,
            exempt=MUON_BREAKS | DECAYS,
        ),
    )

# -- AutoNero ----------------------------------------------------------------------------------------------

NO_MATRIX = "a module without matrices is refused: nothing of it would turn"
VECTORS_ALONE = {
    "layer_trains/*/Linear from one": NO_MATRIX,
    "layer_trains/*/depthwise 1x1 Conv2d": NO_MATRIX,
    "layer_trains/*/LayerNorm": NO_MATRIX,
    "layer_trains/*/BatchNorm2d": NO_MATRIX,
    "layer_trains/*/GroupNorm": NO_MATRIX,
    "layer_trains/*/PReLU": NO_MATRIX,
}


ROWS_APART = "fused=True refuses weights whose rows are not one piece of memory: transposed convolutions"
AUTONERO_REFUSES = FUSED_REFUSES | {
    f"layer_trains/fused/{layer}": ROWS_APART
    for layer in ("ConvTranspose1d", "ConvTranspose2d", "grouped ConvTranspose2d")
}
NARROW_MOVEMENT = "the movement is kept in bfloat16, as asked"


def autonero(label: str, **known: Any) -> Configuration:
    return Configuration(
        label,
        archopt.AutoNero,
        takes="module",
        memoryless=False,
        skipped=lambda optimizer: optimizer.skipped,
        reports=("G",),
        option="feedback_gain",
        forms=tuple(FORMS),
        out_of_range=(("beta", 1.0), ("feedback_decay", -0.1), ("target_steps", 0), ("limit", float("nan"))),
        exempt=VECTORS_ALONE | AUTONERO_REFUSES | known.pop("exempt", {}),
        **known,
    )


AUTONERO = (
    autonero("autonero", main=True),
    autonero(
        "autonero-unit",
        options={"radius": "unit", "embedding_radius": "own"},
        exempt={
            "second_construction_keeps_bits": "1 is where radii start; a second optimiser starts them again"
        },
    ),
    autonero("autonero-svd", options={"orthogonalise": "svd"}),
    autonero(
        "autonero-bfloat16-movement",
        options={"movement_dtype": "bfloat16"},
        exempt={
            "statistics_of_half_weights_are_float32": NARROW_MOVEMENT,
            "load_into_another_dtype_keeps_statistics": NARROW_MOVEMENT,
        },
    ),
)

# -- any optimiser, constrained ----------------------------------------------------------------------------


def constrained(rule: Callable[..., Optimizer], **constraint: bool) -> Callable[..., Optimizer]:
    """A factory of `rule`, constrained as it is built."""

    @functools.wraps(rule)
    def make(params: Any, **options: Any) -> Optimizer:
        return archopt.constrain(rule(params, **options), **constraint)

    return make


PROJECTS_ALL = (
    "the first step that moves a tensor projects all its rows, as published: it starts from raw weights"
)
CONSTRAINED_BREAKS = {
    "rows_with_zero_gradient_keep_bits": PROJECTS_ALL,
    "padding_row_keeps_bits": PROJECTS_ALL,
}


def constrain(
    configuration: Configuration, label: str, *, main: bool = False, **options: bool
) -> Configuration:
    """A configuration whose optimiser is constrained; memoryless ones project rows at their first step."""
    breaks = CONSTRAINED_BREAKS if configuration.memoryless and not options.get("project_now") else {}
    return replace(
        configuration,
        label=label,
        rule=constrained(configuration.rule, **options),
        unit_norm=options.get("unit_norm", True),
        main=main,
        exempt=configuration.exempt | breaks,
    )


ADAM = torch_rule("torch-adam", torch.optim.Adam, options={"lr": 0.01}, exempt=ADAM_BREAKS)
CONSTRAINED = (
    constrain(ADAM, "adam-constrained", main=True),
    constrain(CONTROLS[0], "sgd-constrained"),
    constrain(CONTROLS[0], "sgd-centred", unit_norm=False),
    constrain(LAMB[1], "lamb-constrained"),
    constrain(LAMB[1], "lamb-projected", project_now=True),
    constrain(MADAM[0], "madam-constrained"),
    constrain(MADAM[0], "madam-normed", zero_mean=False, project_now=True),
)

CONFIGURATIONS: tuple[Configuration, ...] = (
    *NERO,
    *AGD,
    *AUTONERO,
    *LAMB,
    *MADAM,
    *CONSTRAINED,
    *CONTROLS,
)
BY_LABEL = {configuration.label: configuration for configuration in CONFIGURATIONS}
assert len(BY_LABEL) == len(CONFIGURATIONS), "two configurations share a label"
