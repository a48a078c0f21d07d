"""What every rule shares: reading parameters, refusing bad input, closures, and exact state round trips.

A rule subclasses `ArchOptimizer`, names its state in `state_names`, and writes `_init_state` (state of one
parameter) and `_update` (one step over all groups). Options live in the groups, values in `state` are tensors:
nothing that matters hangs on the object, so that state dicts, pickles and deep copies lose nothing.
"""

import difflib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from archopt.neurons import statistics_dtype

Params = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
Rate = float | Tensor

# Keys that are not a rule's options but that schedulers, loops and checkpoints put into groups.
_FOREIGN_KEYS = frozenset({"params", "param_names", "role", "name", "initial_lr", "max_lr", "min_lr"})


class ArchoptWarning(UserWarning):
    """Something that archopt had to assume. The message says what, and how to state it instead."""


def nearest(given: str, valid: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or an empty string where nothing is near."""
    match = difflib.get_close_matches(given, list(valid), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def _refuse_unknown_options(init: Callable[..., None]) -> Callable[..., None]:
    """Wraps a constructor so that a misspelt option is refused with the valid ones listed."""
    valid = [name for name in inspect.signature(init).parameters if name != "self"]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in valid:
                raise TypeError(
                    f"{type(self).__name__} has no option {name!r}{nearest(name, valid)} (valid options: "
                    f"{', '.join(valid)})"
                )
        init(self, *args, **kwargs)

    return checked


class ArchOptimizer(Optimizer):
    """Base of archopt's rules, on the structure of `torch.optim.Optimizer`."""

    state_names: ClassVar[tuple[str, ...]] = ()
    """What `_init_state` creates for a parameter; a loaded state must have it."""

    needs_all_gradients: ClassVar[str] = "its rule does not say that it treats every tensor by itself"
    """Why no tensor can be updated before all gradients are there; empty for rules that treat each by itself."""

    _first_number = 0
    """The number of the first parameter: not 0 in a copy that steps one parameter alone."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__init__ = _refuse_unknown_options(cls.__init__)  # type: ignore[method-assign]

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        if isinstance(params, Tensor):
            raise TypeError("params is a single tensor; pass a module or an iterable such as [tensor]")
        self.__dict__.update(self._nothing_kept())
        super().__init__(params, defaults)

    # -- what a rule provides ------------------------------------------------------------------------------

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError where an option of `group` is out of range."""

    def _constrain_group(self, group: dict[str, Any]) -> None:
        """What the rule does to the weights of a group when it enters (Nero projects them)."""

    def _init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The state of one parameter before its first step."""
        return {}

    def _nothing_kept(self) -> dict[str, Any]:
        """Attributes in which steps keep what they found, such as launches, as they are before the first."""
        return {}

    def _update(self) -> None:
        """One step over all groups; gradients are checked and state exists."""
        raise NotImplementedError  # abstract

    # -- parameters and groups -----------------------------------------------------------------------------

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as `torch.optim.Optimizer.add_param_group` does, after checking its options.

        Raises TypeError for complex parameters and unknown options, ValueError for values out of range and for
        meta tensors.
        """
        name = type(self).__name__
        for key in param_group:
            if key not in self.defaults and key not in _FOREIGN_KEYS:
                options = sorted(self.defaults)
                raise TypeError(
                    f"{name} has no group option {key!r}{nearest(key, options)} (valid: {', '.join(options)})"
                )
        checked = {**self.defaults, **param_group}
        if isinstance(checked["params"], Tensor):
            checked["params"] = [checked["params"]]
        checked["params"] = list(checked["params"])
        for item in checked["params"]:
            label, param = item if isinstance(item, tuple) else ("a parameter", item)
            if not isinstance(param, Tensor):
                continue  # torch's own message is clear
            if param.is_complex():
                raise TypeError(
                    f"{name} does not take complex parameters ({label}, {param.dtype}); pass "
                    "torch.view_as_real(parameter) as the leaf instead"
                )
            if param.is_meta:
                raise ValueError(
                    f"{label} is a meta tensor of shape {tuple(param.shape)}: {name} reads initial weights. "
                    "Materialise the module first (module.to_empty(device=...) and its initialisation)"
                )
        self._check_group(checked)
        super().add_param_group(checked)
        try:
            self._constrain_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def _trainable(self, group: dict[str, Any]) -> list[Tensor]:
        """The group's parameters that hold anything to train, in order."""
        return [p for p in group["params"] if p.requires_grad and p.numel() > 0]

    def _create_state(self) -> None:
        """State for all trainable parameters at once, so that ranks agree on what exists."""
        for group in self.param_groups if self.state_names else []:
            for param in self._trainable(group):
                if not self.state[param]:
                    self.state[param].update(self._init_state(param, group))

    def _check_gradients(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and param.grad.layout != torch.strided:
                    raise TypeError(
                        f"{type(self).__name__} does not take sparse gradients (a parameter of shape "
                        f"{tuple(param.shape)}); build the embedding with sparse=False"
                    )

    # -- the step ------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs one update; `closure`, if given, reevaluates the model and returns the loss.

        Raises TypeError for sparse gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not torch.compiler.is_compiling():
            self._check_graph_capture()
        self._step_all()
        return loss

    def _step_all(self) -> None:
        """The update, from gradients as they come."""
        self._check_gradients()
        self._create_state()
        self._update()

    def _step_alone(self, group: dict[str, Any], param: Tensor, number: int, kept: dict[str, Any]) -> None:
        """The same step for one parameter of a group, as if there were no other; for `step_in_backward`.

        `number` is the parameter's in the optimizer. `kept` is what `_nothing_kept` gave, one for each parameter.
        Sound for rules without `needs_all_gradients`. Raises TypeError for sparse gradients.
        """
        # A copy that shares options and state: a step in another thread does not see it.
        alone = object.__new__(type(self))
        alone.__dict__ = {**self.__dict__, **kept, "param_groups": [{**group, "params": [param]}]}
        alone._first_number = number
        alone._check_gradients()
        alone._create_state()
        alone._update()

    def _check_graph_capture(self) -> None:
        """torch's check that a CUDA graph is captured with `capturable` alone, under its new or its old name."""
        new = getattr(self, "_accelerator_graph_capture_health_check", None)
        (new or self._cuda_graph_capture_health_check)()

    # -- state ---------------------------------------------------------------------------------------------

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.update(
            self._nothing_kept()
        )  # what was found for another optimizer's tensors is of no use
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict exactly: statistics keep the type they were saved in.

        torch casts float state to the type of its parameter, which would cut the float32 statistics of bfloat16
        weights to 8 bits; here they are put back from the state dict as the pre-hooks left it.

        An option that the state dict lacks, because it is older than the option, keeps its value in the group.

        Raises ValueError where the state belongs to another optimiser or to weights of another shape.
        """
        final: dict[str, Any] = {}

        def see(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            self._check_options(loaded)
            final.update(self._completed(loaded))
            self._check_loaded(final)
            return final

        def restore(_: Optimizer) -> None:
            for param, saved in self._matched(final):
                for name, value in saved.items():
                    if isinstance(value, Tensor):
                        device = self.state[param][name].device
                        self.state[param][name] = value.detach().to(device, copy=True)

        before = self.register_load_state_dict_pre_hook(see)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _completed(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state dict with the options that it lacks, as the groups have them."""
        groups = state_dict["param_groups"]
        if len(groups) != len(self.param_groups):
            return state_dict  # torch refuses it
        options = (
            {k: v for k, v in g.items() if k not in ("params", "param_names")} for g in self.param_groups
        )
        return {
            **state_dict,
            "param_groups": [own | saved for own, saved in zip(options, groups, strict=True)],
        }

    def _check_options(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError where groups are another rule's, which has no state before its first step.

        One that lacks an option alone is older than the option, and one that has more alone is newer.
        """
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            strange = saved.keys() - group.keys() - _FOREIGN_KEYS
            if strange and (lacking := group.keys() - saved.keys() - _FOREIGN_KEYS):
                raise ValueError(
                    f"the state dict is not {type(self).__name__}'s: a group of it has "
                    f"{', '.join(sorted(strange))} and lacks {', '.join(sorted(lacking))}"
                )

    def _matched(self, state_dict: dict[str, Any]) -> Iterable[tuple[Tensor, dict[str, Any]]]:
        """Parameters with their saved state, matched by position as torch matches them."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for param, index in zip(group["params"], saved["params"], strict=False):
                if index in state_dict["state"]:
                    yield param, state_dict["state"][index]

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for param, index in zip(group["params"], saved_group["params"], strict=False):
                saved = state_dict["state"].get(index, {})
                if not saved:
                    continue
                expected = self._init_state(param.detach(), group)
                if foreign := [str(name) for name in saved if name not in self.state_names]:
                    raise ValueError(
                        f"the state dict is not {type(self).__name__}'s: state of parameter {index} holds "
                        f"{', '.join(foreign)}, expected {', '.join(self.state_names) or 'no state'}"
                    )
                if missing := [name for name in self.state_names if name not in saved]:
                    raise ValueError(
                        f"the state dict is not {type(self).__name__}'s: state of parameter {index} lacks "
                        f"{', '.join(missing)} (it has {', '.join(map(str, saved)) or 'nothing'})"
                    )
                for name, value in expected.items():
                    if isinstance(saved[name], Tensor) and saved[name].shape != value.shape:
                        raise ValueError(
                            f"the state dict belongs to another model: {name} of parameter {index} has shape "
                            f"{tuple(saved[name].shape)}, expected {tuple(value.shape)} for a weight of shape "
                            f"{tuple(param.shape)}"
                        )


# -- small pieces that rules share -------------------------------------------------------------------------


def new_step(param: Tensor, group: dict[str, Any]) -> Tensor:
    """A step count: a float32 scalar, on the CPU unless `capturable`, as torch.optim keeps it."""
    device = param.device if group["capturable"] else torch.device("cpu")
    return torch.zeros((), dtype=torch.float32, device=device)


def bias_correction(beta: float, step: Tensor) -> Tensor:
    """1 - beta^t, formed in float64 where the device has it (float32 would cost half its digits)."""
    exact = step if step.device.type == "mps" else step.to(torch.float64)
    return 1 - beta**exact


def statistics_like(param: Tensor) -> torch.dtype:
    """The type that state of `param` is kept in: float32 for half-precision weights."""
    return statistics_dtype(param.dtype)


def check_range(rule: str, name: str, value: Any, *, low: float, high: float | None = None) -> None:
    """Raises ValueError unless low <= value (< high). Tensor values are trusted: reading one synchronises."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{rule}: {name} is a tensor of {value.numel()} elements, expected one element")
        return
    expected = f"{low} <= {name}" + (f" < {high}" if high is not None else "")
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(
            f"{rule}: {name}={value!r} is a {type(value).__name__}, expected a number, {expected}"
        )
    if not (value >= low and (high is None or value < high)) or value == float("inf"):
        raise ValueError(f"{rule}: {name}={value!r}, expected {expected}")


def check_choice(rule: str, name: str, value: Any, valid: Iterable[str]) -> None:
    """Raises ValueError, with the nearest name, unless the value is one of the valid ones."""
    if value not in (valid := list(valid)):
        hint = nearest(str(value), valid)
        raise ValueError(f"{rule}: {name}={value!r}{hint}; expected one of {', '.join(valid)}")


def check_flags(rule: str, group: dict[str, Any], *names: str) -> None:
    """Raises TypeError unless each of the named options is True or False."""
    for name in names:
        if not isinstance(group[name], bool):
            raise TypeError(f"{rule}: {name}={group[name]!r}, expected True or False")


def check_forms(rule: str, group: dict[str, Any], *, has_fused: bool = False) -> None:
    """Refuses forms of a rule that cannot be honoured, with the reason."""
    if group["fused"] and not has_fused:
        raise ValueError(
            f"{rule}: fused=True, but this version has no fused form; use fused=None or foreach=True"
        )
    if group["fused"] and group["foreach"]:
        raise ValueError(f"{rule}: fused=True and foreach=True are two forms, expected at most one of them")
    check_flags(rule, group, "maximize", "capturable")


def with_names(rule: str, params: Params) -> Any:
    """A module as its `(name, parameter)` pairs, for rules that need no roles; anything else as it is.

    Raises ValueError for a module without trainable parameters.
    """
    if not isinstance(params, nn.Module):
        return params
    pairs = list(params.named_parameters())
    if not any(param.requires_grad for _, param in pairs):
        raise ValueError(
            f"{rule}: {type(params).__name__} has no trainable parameters ({len(pairs)} in all); pass a module "
            "with at least one parameter that requires a gradient"
        )
    return pairs


def rate(group: dict[str, Any]) -> Rate:
    """The group's lr, a tensor of one element as a scalar, so that it broadcasts over 0-d parameters too."""
    lr: Rate = group["lr"]
    return lr.reshape(()) if isinstance(lr, Tensor) else lr


def by_device_and_dtype(params: list[Tensor]) -> list[list[int]]:
    """Positions of tensors that may share one foreach operation."""
    buckets: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, param in enumerate(params):
        buckets.setdefault((param.device, param.dtype), []).append(index)
    return list(buckets.values())


def choose(flags: Tensor, new: Iterable[Tensor], old: Iterable[Tensor]) -> list[Tensor]:
    """For each tensor, the new one where its flag (an entry of a vector) is true, else the old one."""
    return [torch.where(flag, a, b) for flag, a, b in zip(flags.unbind(), new, old, strict=True)]


def takes_foreach(group: dict[str, Any]) -> bool:
    """Whether this group takes the foreach form: as asked, else yes (measured faster, on the CPU too)."""
    return group["foreach"] is not False


def warn_assumption(message: str) -> None:
    warnings.warn(message, ArchoptWarning, stacklevel=5)  # the line that built the optimiser
