"""The behaviours can fail: each is shown an optimiser with one fault that it must find.

The faults are those that packaged optimisers have had: options kept on the object, state made in the constructor
alone, gradients written, values read back, names swallowed. A behaviour that no fault here trips is one that some
configuration is exempt from, where the exemption itself must fail (`test_behaviours.py` runs those strictly).
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer

import archopt
from configurations import AGD, CONFIGURATIONS, NERO, Configuration
from contract.behaviours import BEHAVIOURS
from contract.cases import FAMILIES

FAULTS: list[tuple[type[Optimizer], Configuration, tuple[str, ...]]] = []
NERO_DEFAULT = next(c for c in NERO if c.label == "nero")
AGD_MODULE = next(c for c in AGD if c.label == "agd-module")


def found_by(
    *names: str, known: Configuration = NERO_DEFAULT
) -> Callable[[type[Optimizer]], type[Optimizer]]:
    """Lists a faulty rule; `known` is the configuration that it pretends to be."""

    def register(rule: type[Optimizer]) -> type[Optimizer]:
        FAULTS.append((rule, known, names))
        return rule

    return register


class Scaled(archopt.Nero):
    """After the ordinary update, `scale` multiplies all weights: the ground for several faults."""

    def scale(self) -> float:
        return 1.0

    def _update(self) -> None:
        super()._update()
        for group in self.param_groups:
            for param in group["params"]:
                param.mul_(self.scale())


@found_by(
    "no_gradient_no_change",
    "frozen_weights_keep_bits",
    "checkpoint_probe_keeps_weights",
    "zero_rate_keeps_bits",
)
@found_by(
    "rows_with_zero_gradient_keep_bits", "zero_gradient_from_fresh_state_keeps_bits", "padding_row_keeps_bits"
)
class AlwaysDecays(Scaled):
    def scale(self) -> float:
        return 0.5


@found_by("deepcopy_continues_bit_equal", "pickle_continues_bit_equal")
class KeepsOptionsOnTheObject(Scaled):
    def __init__(self, params: Any, foreach: bool | None = None, capturable: bool = False) -> None:
        super().__init__(params, foreach=foreach, capturable=capturable)
        self.factor = 1.0

    def scale(self) -> float:
        return self.factor


@found_by("resumes_bit_equal", "resumes_from_distributed_checkpoint", "state_of_another_model_is_refused")
class SavesNoState(archopt.Nero):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "state": {}}


@found_by("resumes_before_the_first_step", "state_of_another_number_of_parameters_is_refused")
class MovesWeightsOnLoading(archopt.Nero):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.data.mul_(0.5)
        super().load_state_dict(state_dict)


@found_by("copying_leaves_the_original_alone")
class SharesLoadedState(archopt.Nero):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for param, saved in self._matched(state_dict):
            self.state[param].update(saved)


@found_by("statistics_of_half_weights_are_float32", "load_into_another_dtype_keeps_statistics")
class LoadsAsTorchDoes(archopt.Nero):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        Optimizer.load_state_dict(self, state_dict)


@found_by("state_dict_holds_plain_values")
class KeepsObjectsInState(archopt.Nero):
    def _init_state(self, param: Any, group: Any) -> Any:
        return {**super()._init_state(param, group), "shape": [param.shape]}


@found_by("older_state_dict_lacking_an_option_loads", "foreign_keys_in_groups_survive")
class KnowsItsOwnKeysAlone(archopt.Nero):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = {"params", "param_names", *self.defaults}
        groups = [{key: group[key] for key in own if key in group} for group in state_dict["param_groups"]]
        for group in groups:
            missing = own - group.keys() - {"param_names"}
            assert not missing, f"lacks {missing}"
        super().load_state_dict({**state_dict, "param_groups": groups})


@found_by("added_group_trains", "swapped_parameters_train")
class MakesStateInTheConstructor(archopt.Nero):
    def __init__(self, params: Any, foreach: bool | None = None, capturable: bool = False) -> None:
        super().__init__(params, foreach=foreach, capturable=capturable)
        archopt.Nero._create_state(self)

    def _create_state(self) -> None:
        pass


@found_by("named_parameters_equal_parameters")
class SwallowsNames(archopt.Nero):
    def __init__(self, params: Any, foreach: bool | None = None, capturable: bool = False) -> None:
        unnamed = [item[1] if isinstance(item, tuple) else item for item in params]
        super().__init__(unnamed, foreach=foreach, capturable=capturable)


@found_by("groups_equal_one_group")
class MindsTheNumberOfGroups(Scaled):
    def scale(self) -> float:
        return 1.0 / len(self.param_groups)


@found_by("group_options_are_honoured", "scheduler_sets_the_rate")
class ReadsTheDefaultRate(archopt.Nero):
    def _update(self) -> None:
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = self.defaults["lr"]
        super()._update()
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate


@found_by("hooks_run_in_torch_order")
class RunsNoHooks(archopt.Nero):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self._create_state()
        self._update()

    step.hooked = True  # what torch marks a step with once it has wrapped it


@found_by("state_dict_hooks_run")
class SavesWithoutHooks(archopt.Nero):
    def state_dict(self) -> dict[str, Any]:
        return {"state": {}, "param_groups": [{**g, "params": [0]} for g in self.param_groups]}


@found_by("state_appears_for_all_parameters_at_once", "state_of_another_optimizer_is_refused")
class MakesStateWhenItMust(archopt.Nero):
    def _create_state(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and not self.state[param]:
                    self.state[param].update(self._init_state(param, group))

    def _check_options(self, state_dict: dict[str, Any]) -> None:
        pass

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        pass


@found_by("second_construction_keeps_bits", "frozen_weights_keep_bits")
class MovesWeightsAtConstruction(archopt.Nero):
    def _constrain_group(self, group: dict[str, Any]) -> None:
        for param in group["params"]:
            param.mul_(0.5)


@found_by("closure_runs_under_no_grad")
class CallsTheClosureAsItIs(archopt.Nero):
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        super().step()
        return loss


@found_by("grad_scaler_equals_unscaled")
class TakesScaledGradients(SGD):
    _step_supports_amp_scaling = True

    def step(self, closure: Any = None, *, grad_scaler: Any = None) -> Any:
        return super().step(closure)


@found_by("autocast_does_not_reach_the_step")
class MultipliesInTheStep(Scaled):
    def scale(self) -> Any:
        matrix = torch.full((2, 2), 0.7)
        return (matrix @ matrix)[0, 0].float()


@found_by("zero_grad_clears_gradients")
class KeepsGradients(archopt.Nero):
    def zero_grad(self, set_to_none: bool = True) -> None:
        pass


@found_by("degenerate_rows_train", "layer_trains", "padding_row_keeps_bits")
class DividesByZero(archopt.Nero):
    def _update(self) -> None:
        super()._update()
        for group in self.param_groups:
            for param in group["params"]:
                if param.dim() > 1:
                    rows = param.flatten(1)
                    rows = rows - rows.mean(1, keepdim=True)
                    param.copy_((rows / rows.norm(dim=1, keepdim=True)).view_as(param))


@found_by("gradients_are_never_written", "expanded_gradient_is_read")
class WritesGradients(archopt.Nero):
    def _update(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.grad.mul_(2)
        super()._update()


@found_by("non_finite_gradient_leaves_no_trace", "everything_non_finite_changes_nothing")
@found_by("tiny_and_huge_gradients_stay_finite")
class DividesByTheGradientsNorm(SGD):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.grad.div_(param.grad.square().sum())
        return super().step(closure)


@found_by("memory_layout_does_not_matter")
class ReadsMemoryInOrder(Scaled):
    def _update(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(param.grad.as_strided((param.numel(),), (1,)).view(param.shape))


@found_by("tied_weight_moves_once")
class ForgetsWhatIsTied(archopt.Nero):
    def __init__(self, params: Any, foreach: bool | None = None, capturable: bool = False) -> None:
        super().__init__(
            [torch.nn.Parameter(p.detach().clone()) for p in params], foreach=foreach, capturable=capturable
        )


@found_by("empty_tensors_are_left_alone")
class MeansOfNothing(archopt.Nero):
    def _trainable(self, group: dict[str, Any]) -> list[Any]:
        return [p for p in group["params"] if p.requires_grad]


@found_by("short_bfloat16_rows_do_not_drift", "reported_turn_is_the_rate_at_first")
class NeverProjects(archopt.Nero):
    def __init__(self, params: Any, foreach: bool | None = None, capturable: bool = False) -> None:
        super().__init__(params, unit_norm=False, foreach=foreach, capturable=capturable)


@found_by("form_equals_plain")
class HasAForeachFormOfItsOwn(Scaled):
    def scale(self) -> float:
        return 1.0 if self.defaults["foreach"] is False else 1.01


@found_by("mixed_types_share_a_group")
class LooksAtTheFirstTypeAlone(archopt.Nero):
    def _update(self) -> None:
        super()._update()
        for group in self.param_groups:
            for param in group["params"]:
                if param.dtype != group["params"][0].dtype:
                    param.mul_(1.1)


@found_by("maximize_equals_negated_gradients")
class SwallowsMaximize(archopt.Nero):
    def _update(self) -> None:
        for group in self.param_groups:
            group["maximize"] = False
        super()._update()


@found_by("step_reads_nothing_back", "compiled_step_equals_eager", "step_runs_on_a_pretended_accelerator")
class LooksAtItsWeights(Scaled):
    def scale(self) -> float:
        first = self.param_groups[0]["params"][0]
        return 1.0 if first.sum() > 0 else float(first.sum() < 1)


@found_by("bad_rate_is_refused", "bad_rate_in_a_group_is_refused", "option_out_of_range_is_refused")
class ChecksNothing(archopt.Nero):
    def _check_group(self, group: dict[str, Any]) -> None:
        pass


@found_by(
    "unknown_option_is_refused_with_the_nearest",
    "unknown_group_option_is_refused",
    "fused_form_is_refused_or_equal",
)
class SwallowsOptions(SGD):
    def __init__(self, params: Any, lr: float = 0.01, **options: Any) -> None:
        super().__init__(params, lr=lr * (1 + options.get("fused", 0)))


@found_by("sparse_gradient_is_refused")
class FindsSparseGradientsLate(archopt.Nero):
    def _check_gradients(self) -> None:
        pass


@found_by("complex_parameter_is_refused", "meta_parameter_is_refused", "parameter_in_two_groups_is_refused")
@found_by("nothing_to_train_is_refused", "single_tensor_is_refused")
class TakesAnything(Optimizer):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        self.param_groups = [{"params": params, "lr": lr}]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.param_groups.append(param_group)


@found_by("reported_numbers_are_scalars", "reports_before_the_first_step_are_harmless", known=AGD_MODULE)
class ReportsFloats(archopt.AGD):
    @property
    def eta(self) -> Any:
        return 1.0


@found_by("reports_are_not_overwritten", known=AGD_MODULE)
class ReportsItsOwnBuffer(archopt.AGD):
    @property
    def eta(self) -> Any:
        return self._eta


CASES = [(rule, known, name) for rule, known, names in FAULTS for name in names]


def case(rule: type[Optimizer], known: Configuration, name: str) -> Any:
    marks = [pytest.mark.slow] if BEHAVIOURS[name].costly else []
    return pytest.param(rule, known, name, marks=marks, id=f"{name}-{rule.__name__}")


@pytest.mark.parametrize(("rule", "known", "name"), [case(*each) for each in CASES])
def test_behaviour_finds_the_fault(rule, known, name):
    behaviour = BEHAVIOURS[name]
    make = Configuration(
        "faulty", rule, **{k: v for k, v in vars(known).items() if k not in ("label", "rule", "options")}
    )
    assert behaviour.applies(make)
    for form in behaviour.forms:
        for variant in behaviour.variants:
            if form not in make.forms or variant.get("backend") == "inductor":
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    behaviour.check(make.in_form(form), **variant)
            except TypeError:
                continue  # the faulty rule lacks this form
            except Exception:
                return
    raise AssertionError(f"{name} did not find {rule.__name__}")


def test_every_behaviour_is_shown_a_fault():
    assert {behaviour.family for behaviour in BEHAVIOURS.values()} == set(FAMILIES)
    shown = {name for _, _, name in CASES}
    exempt = {pattern.split("/")[0] for configuration in CONFIGURATIONS for pattern in configuration.exempt}
    assert BEHAVIOURS.keys() <= shown | exempt, sorted(BEHAVIOURS.keys() - shown - exempt)
