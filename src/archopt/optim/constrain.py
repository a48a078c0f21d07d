"""Any optimiser on balanced neurons (Liu, Bernstein, Meister, Yue 2021, arXiv:2102.07227, section 3).

After each step of the optimiser, for every neuron (row along dimension 0) of every tensor that the step changed:

    w  <-  w - mean(w)                                   (zero_mean)
    w  <-  w / ||w||                                     (unit_norm)

`constrain(Lamb(parameters, betas=(0.0, 0.999)))` and `constrain(Madam(parameters))` are LAMB-cs and Madam-cs, the
constrained baselines of the paper's experiments. The first step starts from the raw weights, as theirs does.
"""

import functools
import weakref
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from archopt.neurons import balance, balance_, fan_in_dims, is_balanced, row_mean, row_norm, statistics_dtype

OptimizerT = TypeVar("OptimizerT", bound=Optimizer)


def constrain(
    optimizer: OptimizerT, *, zero_mean: bool = True, unit_norm: bool = True, project_now: bool = False
) -> OptimizerT:
    """Makes `optimizer` keep neurons balanced: returns the same object, now projecting after each of its steps.

    A tensor of two or more dimensions whose gradient was not None is projected, all its rows along dimension 0, if
    the step changed any weight of it: with lr = 0, or where the optimiser itself stood still, every bit stays. A
    row that the step left alone and that is balanced already keeps its bits too. Vectors, scalars, rows of a
    single weight, zero rows and, if centred, constant rows are never projected. Sums are formed in float32 for
    half-precision weights.

    The constraint is part of the optimiser: copies and pickles of it are constrained as well (torch drops other
    hooks there). State dicts do not hold it, as they hold no hooks: constrain the optimiser that you load into.
    `optimizer.constraint` names the two options, and `optimizer.constraint.remove()` ends it.

    Args:
        optimizer: any `torch.optim.Optimizer`. Wrappers that forward `step` (accelerate's) come after.
        zero_mean: centre each row.
        unit_norm: divide each row by its norm, after centring.
        project_now: also project all trainable weights at once, which the published variants do not.

    Raises TypeError where `optimizer` is not a torch optimiser or an option not a flag, ValueError where it is
    constrained already.

    Example:
        >>> import torch
        >>> from archopt.optim.constrain import constrain
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = constrain(torch.optim.AdamW(model.parameters()))
        >>> model(torch.randn(2, 8)).square().mean().backward()
        >>> optimizer.step()
        >>> bool(torch.allclose(model.weight.norm(dim=1), torch.ones(4)))
        True
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"constrain: got a {type(optimizer).__name__}, expected a torch.optim.Optimizer, such as "
            "constrain(torch.optim.Adam(model.parameters()))"
        )
    for name, value in (("zero_mean", zero_mean), ("unit_norm", unit_norm), ("project_now", project_now)):
        if not isinstance(value, bool):
            raise TypeError(f"constrain: {name}={value!r}, expected True or False")
    if isinstance(optimizer, _Constrained):
        raise ValueError(
            f"constrain: this {type(optimizer).__name__} is constrained already; call "
            "optimizer.constraint.remove() first"
        )
    plain: type = type(optimizer)
    optimizer.__class__ = _constrained_class(plain)
    constraint = Constraint(optimizer, zero_mean, unit_norm)
    cast(_Constrained, optimizer).constraint = constraint
    if project_now:
        constraint.project()
    return optimizer


class Constraint:
    """What `constrain` attached to an optimiser, as `optimizer.constraint`. It ends with `remove()`."""

    def __init__(self, optimizer: Optimizer, zero_mean: bool, unit_norm: bool) -> None:
        self.zero_mean = zero_mean
        self.unit_norm = unit_norm
        self._optimizer = weakref.ref(optimizer)
        self._before: list[tuple[Tensor, tuple[int, ...], Tensor, Tensor]] = []
        self._handles = (
            optimizer.register_step_pre_hook(self._record),
            optimizer.register_step_post_hook(self._project_changed),
        )

    def __repr__(self) -> str:
        return f"Constraint(zero_mean={self.zero_mean}, unit_norm={self.unit_norm})"

    def remove(self) -> None:
        """Makes the optimiser what it was before `constrain`; its weights and state stay as they are."""
        optimizer = self._optimizer()
        if optimizer is None or getattr(optimizer, "constraint", None) is not self:
            return
        for handle in self._handles:
            handle.remove()
        optimizer.__class__ = _plain_class(type(optimizer))
        del cast(_Constrained, optimizer).constraint

    @torch.no_grad()
    def project(self) -> None:
        """Projects all trainable weights now; rows that are balanced already keep their bits."""
        optimizer = self._optimizer()
        for param, dims in _neurons(optimizer) if optimizer is not None else ():
            balance_(param, dims, zero_mean=self.zero_mean, unit_norm=self.unit_norm)

    @torch.no_grad()
    def _record(self, optimizer: Optimizer, *_: Any) -> None:
        """Before a step: mean and norm of every row, by which a change is seen without a copy of the model."""
        self._before = [(p, dims, row_mean(p, dims), row_norm(p, dims)) for p, dims in _neurons(optimizer)]

    @torch.no_grad()
    def _project_changed(self, optimizer: Optimizer, *_: Any) -> None:
        before, self._before = self._before, []
        for param, dims, mean, norm in before:
            if param.grad is None:
                continue
            changed = (row_mean(param, dims) != mean) | (row_norm(param, dims) != norm)
            param.copy_(constrained(param, changed, dims, zero_mean=self.zero_mean, unit_norm=self.unit_norm))


def constrained(
    weight: Tensor, changed: Tensor, dims: tuple[int, ...], *, zero_mean: bool, unit_norm: bool
) -> Tensor:
    """`weight` with its rows balanced if any row of it changed. changed: one flag a row, `dims` kept as 1."""
    balanced = balance(
        weight.to(statistics_dtype(weight.dtype)), dims, zero_mean=zero_mean, unit_norm=unit_norm
    )
    keeps = ~changed & is_balanced(weight, dims, zero_mean=zero_mean, unit_norm=unit_norm)
    if unit_norm:
        keeps |= row_norm(balanced, dims) < 0.5  # nothing was left to normalise: the row was zero or constant
    return torch.where(keeps | ~changed.any(), weight, balanced.to(weight.dtype))


def _neurons(optimizer: Optimizer) -> list[tuple[Tensor, tuple[int, ...]]]:
    """The tensors that hold neurons, with the dimensions that a neuron sums over."""
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad and p.numel()]
    pairs = [(p, fan_in_dims(p.shape)) for p in params]
    return [(p, dims) for p, dims in pairs if dims]


# -- copies ------------------------------------------------------------------------------------------------
#
# torch drops hooks when an optimiser is copied or pickled. A copy that silently stops projecting would be another
# rule, so the constrained optimiser has a class of its own that knows how to put the constraint back.


class _Constrained:
    constraint: Constraint

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        options = self.constraint.zero_mean, self.constraint.unit_norm
        return _blank, (_plain_class(type(self)),), {**super().__getstate__(), "constraint": options}  # type: ignore[dict-item]

    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict comes through here too, with the state and the groups alone.
        super().__setstate__({k: v for k, v in state.items() if k != "constraint"})  # type: ignore[misc]
        if "constraint" in state:
            self.constraint = Constraint(cast(Optimizer, self), *state["constraint"])


@functools.cache
def _constrained_class(plain: type) -> type:
    members = {"__module__": plain.__module__, "__doc__": plain.__doc__}
    return type(f"Constrained{plain.__name__}", (_Constrained, plain), members)


def _plain_class(constrained: type) -> type:
    return constrained.__bases__[1]


def _blank(plain: type) -> object:
    return object.__new__(_constrained_class(plain))
