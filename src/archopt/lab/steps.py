"""Numbers of single steps, told as mean, least and greatest over the steps between two lines of a record.

The automatic step size of rules that have one, at every step; and the relative update, the mean over layers of
||dW|| / ||W|| (Frobenius norms, W before the step), at every so many steps, since it costs a copy of the weights.
Nothing here waits for a device: values stay there until a line is written.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

SIZES = ("eta", "theta")
"""Automatic step sizes, as rules call them."""
UPDATE = "update"


class StepNumbers:
    """Follows the steps that an optimiser makes on a model.

    A layer is a trainable tensor with two dimensions or more.
    updates_every: steps between measurements of the relative update, beginning with the first after an evaluation;
        0: none.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, updates_every: int) -> None:
        self._optimizer, self._every = optimizer, updates_every
        self._layers = {
            name: param for name, param in model.named_parameters() if param.requires_grad and param.ndim > 1
        }
        self._before: list[Tensor] | None = None
        told = [name for name in SIZES if isinstance(getattr(optimizer, name, None), Tensor)]
        self._values: dict[str, list[Tensor]] = {name: [] for name in told}
        if updates_every and self._layers:
            self._values[UPDATE] = []  # of each layer

    def before(self, step: int) -> None:
        """Notes the weights, where the coming step's update is to be measured. step: since the last evaluation."""
        measured = UPDATE in self._values and step % self._every == 0
        self._before = [param.detach().clone() for param in self._layers.values()] if measured else None

    @torch.no_grad()
    def after(self) -> None:
        """Notes what the step has been."""
        for name in SIZES:
            if name in self._values:
                self._values[name].append(getattr(self._optimizer, name).detach().clone())
        if self._before is not None:
            sizes = torch._foreach_norm(self._before)
            # In place: what was noted is not needed any more.
            torch._foreach_sub_(self._before, [param.detach() for param in self._layers.values()])
            moves = torch._foreach_norm(self._before)
            self._values[UPDATE].append(torch.stack(moves).double() / torch.stack(sizes).double())
            self._before = None

    def take(self) -> dict[str, Any]:
        """By number: its mean, least and greatest since the last `take`, over so many `steps`. Under `update`, also
        each layer's own mean, `layers`.
        """
        told: dict[str, Any] = {}
        for name, values in self._values.items():
            if not values:
                continue
            found = torch.stack(values).double().cpu()
            told[name] = _spread(found.mean(1) if name == UPDATE else found)
            if name == UPDATE:
                told[name]["layers"] = dict(zip(self._layers, found.mean(0).tolist(), strict=True))
            values.clear()
        return told

    def state_dict(self) -> dict[str, Any]:
        """What was noted since the last `take`."""
        return {name: torch.stack(values).cpu() for name, values in self._values.items() if values}

    def load_state_dict(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Takes back what `state_dict` gave."""
        for name, values in state.items():
            self._values[name] = list(values.to(device).unbind())


def _spread(values: Tensor) -> dict[str, float]:
    return {
        "mean": values.mean().item(),
        "least": values.min().item(),
        "greatest": values.max().item(),
        "steps": len(values),
    }
