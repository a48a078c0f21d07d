"""Each weight is updated as soon as its gradient is complete, inside backward, and the gradient freed at once.

Of all gradients then only about the largest lives at a time, where an ordinary step holds as much as the model.
"""

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from archopt.optim.base import ArchOptimizer

_attached: "weakref.WeakSet[Optimizer]" = weakref.WeakSet()


def step_in_backward(optimizer: Optimizer) -> "StepInBackward":
    """Makes `backward` update each weight of `optimizer` as its gradient arrives, and free the gradient.

    The training loop stays as it is, `optimizer.step()` included: it closes the step. It finds no gradients, so it
    moves nothing but weights that still have one (those unfrozen, or added to the optimiser, since this call). A
    second gradient for a weight that has been updated since the last `optimizer.step()` is refused. The optimiser
    keeps its groups, options (schedulers act), hooks and state dict, and its weights the bits that the ordinary
    step gives.

    Gradient accumulation: put every backward but the last into `handle.accumulating()`. Gradients then stay, all of
    them, until the last backward, so that only the bits are kept and no memory is saved.

    Takes Nero, Lamb and Madam, whose rules treat every tensor by itself. What looks at gradients after backward
    finds none: `clip_grad_norm_` clips nothing, and `GradScaler` neither unscales nor skips (its `step` raises, but
    the weights have moved by then): train in bfloat16, which needs no scaler.

    Returns the handle, whose `remove()` ends it.

    Raises TypeError for rules that need all gradients at once (AGD, AutoNero), for optimisers under
    `archopt.constrain` and for those of torch; ValueError where the optimiser steps in backward already; and, in
    `backward`, RuntimeError before anything has moved: in one of several processes, unless the weight is a DTensor
    (DistributedDataParallel averages gradients only after they have been here, and holds all of them anyway), with
    `create_graph=True`, and for a second gradient.

    Example:
        >>> import torch, archopt
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = archopt.Nero(model)
        >>> handle = archopt.step_in_backward(optimizer)
        >>> model(torch.ones(2, 8)).square().mean().backward()
        >>> model.weight.grad is None
        True
        >>> optimizer.step()
        >>> handle.remove()
    """
    if not isinstance(optimizer, ArchOptimizer):
        given = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        raise TypeError(
            f"step_in_backward: got a {given}, expected archopt's Nero, Lamb or Madam. A torch optimiser has no "
            "step for one tensor alone: give each parameter an optimiser of its own (SGD, Adam, AdamW and others "
            "whose tensors do not depend on one another; not LBFGS)"
        )
    if getattr(optimizer, "constraint", None) is not None:
        raise TypeError(
            f"step_in_backward: this {type(optimizer).__name__} projects after each whole step, by its gradients; "
            "call optimizer.constraint.remove() first, or leave its gradients alone"
        )
    if reason := optimizer.needs_all_gradients:
        raise TypeError(
            f"step_in_backward: {type(optimizer).__name__} cannot update a weight before backward has ended: "
            f"{reason}. Nero, Lamb and Madam can"
        )
    if optimizer in _attached:
        raise ValueError(
            f"step_in_backward: this {type(optimizer).__name__} steps in backward already; call remove() of the "
            "handle that it gave"
        )
    return StepInBackward(optimizer)


class StepInBackward:
    """What `step_in_backward` attached to an optimiser and its weights. It ends with `remove()`."""

    def __init__(self, optimizer: ArchOptimizer) -> None:
        self._optimizer = optimizer
        self._accumulates = False
        self._updated: set[Tensor] = set()
        self._lock = threading.Lock()  # backward runs one thread for each device
        self._handles: list[Any] = [optimizer.register_step_post_hook(self._close)]
        number = 0
        for index, group in enumerate(optimizer.param_groups):
            for param in group["params"]:
                if param.requires_grad:
                    hook = self._hook(index, number)
                    self._handles.append(param.register_post_accumulate_grad_hook(hook))
                number += 1
        _attached.add(optimizer)

    def remove(self) -> None:
        """Makes backward leave gradients alone again; weights and state stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        _attached.discard(self._optimizer)

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """Backward passes in here leave their gradients, for the first one outside to add to and use.

        A weight that gets no gradient from that one is updated by `optimizer.step()`.
        """
        before, self._accumulates = self._accumulates, True
        try:
            yield
        finally:
            self._accumulates = before

    def _close(self, *_: Any) -> None:
        self._updated.clear()

    def _hook(self, index: int, number: int) -> Any:
        """What is called with the gradient of a weight of a group, the optimiser's `number`-th."""
        kept = self._optimizer._nothing_kept()

        @torch.no_grad()
        def update(param: Tensor) -> None:
            if self._accumulates or param.grad is None:
                return
            with self._lock:
                self._check(param, index)
                self._optimizer._step_alone(self._optimizer.param_groups[index], param, number, kept)
                self._updated.add(param)
            param.grad = None

        return update

    def _check(self, param: Tensor, index: int) -> None:
        """Raises RuntimeError where the gradient is not the one that a step should use."""
        if param in self._updated:
            raise RuntimeError(
                f"step_in_backward: a second gradient for {self._name(param, index)}, which this step has updated "
                "already. Close a step by optimizer.step(); to accumulate gradients, put every backward but the "
                "last into `with handle.accumulating():`. (Checkpointing with use_reentrant=True also brings "
                "gradients of a shared weight in parts: take use_reentrant=False)"
            )
        if param.grad is not None and param.grad.requires_grad:
            raise RuntimeError(
                "step_in_backward: create_graph=True needs the weights as they were in the forward pass; remove() "
                "the handle for such a backward"
            )
        if (processes := _processes()) > 1 and not _is_sharded(param):
            raise RuntimeError(
                f"step_in_backward: {processes} processes train together, and DistributedDataParallel averages "
                "gradients only after a weight's hooks have run: each process would use its own. It also keeps all "
                "gradients in its buckets, so no memory would be saved. Use the ordinary step"
            )

    def _name(self, param: Tensor, index: int) -> str:
        group = self._optimizer.param_groups[index]
        names = dict(zip(group["params"], group.get("param_names", ())))
        name = names.get(param, f"a parameter of group {index}")
        return f"{name}, shape {tuple(param.shape)}"


def _processes() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _is_sharded(param: Tensor) -> bool:
    """Whether a weight is a DTensor, whose gradient comes to its hooks when it has been reduced."""
    from torch.distributed.tensor import DTensor  # takes a second: not at `import archopt`

    return isinstance(param, DTensor)
