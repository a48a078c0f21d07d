"""The averages of a run's models (`--average`): taken after every step, evaluated beside the models themselves.

An average has no running statistics of its own, so those of its normalisation layers are renewed before it is
evaluated: from the last training batches, made again with the seeds that they had. Nothing of the training is
touched: weights, generators, and what the workload remembers stay as they are.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from archopt.lab import seeds
from archopt.lab.errors import LabError
from archopt.lab.workload import Workload
from archopt.optim.average import averaged, renew_statistics

RENEWAL_BATCHES = 100
"""Statistics are renewed from the batches of the last epoch, but from no more than these."""


class _Loss(nn.Module):
    """A model as the workload's loss calls it, since `renew_statistics` calls a module with an input."""

    def __init__(self, model: nn.Module, workload: Workload) -> None:
        super().__init__()
        self.model, self._workload = model, workload

    def forward(self, batch: Any) -> None:
        self._workload.loss(self.model, batch)


class Averages:
    """One average for each of a run's models.

    Raises LabError where running statistics would have to be renewed and the workload has a `train_step` of its
    own, which the laboratory cannot repeat without a step.
    """

    def __init__(
        self, models: Mapping[str, nn.Module], workload: Workload, seed: int, device: torch.device
    ) -> None:
        self._workload, self._seed, self._device = workload, seed, device
        self._repeatable = type(workload).train_step is Workload.train_step
        for name, model in models.items():
            statistics = [getattr(module, "running_mean", None) for module in model.modules()]
            if not self._repeatable and any(held is not None for held in statistics):
                raise LabError(
                    f"{workload.name}: --average cannot renew the running statistics of {name}, since the "
                    "workload's train_step() is its own; leave --average out"
                )
        self._averages = {name: averaged(model) for name, model in models.items()}

    @property
    def models(self) -> dict[str, nn.Module]:
        """The averaged models by name."""
        return {name: average.module for name, average in self._averages.items()}

    def update(self, name: str, model: nn.Module) -> None:
        """Takes the weights that a step has made into the average."""
        self._averages[name].update_parameters(model)

    def renew(self, step: int) -> None:
        """Renews running statistics, as they are after `step` steps. Reads no batch where there are none."""
        count = min(step, math.ceil(self._workload.steps_per_epoch), RENEWAL_BATCHES)
        for model in self.models.values():
            workload = self._apart()
            batches = ([batch] for batch in self._again(workload, step - count, step))
            renew_statistics(_Loss(model, workload), batches)

    def training_mean(self, key: str, step: int, count: int) -> float:
        """The mean of one of `loss`'s numbers over the last `count` training batches, as they were drawn.

        Raises LabError where the workload has a `train_step` of its own, or `loss` has no such number.
        """
        if not self._repeatable:
            raise LabError(
                f"{self._workload.name}: --average needs a metric that evaluate() gives; the number {key!r} of its "
                "own train_step() is known of the training alone"
            )
        workload = self._apart()
        total = 0.0
        for batch in self._again(workload, step - count, step):
            loss, extra = workload.loss(self.models["model"], batch)
            total += float({"loss": loss, **extra}[key])
        return total / count

    def _apart(self) -> Workload:
        """The workload, so that what its steps change is not the training's."""
        apart = copy.copy(self._workload)
        apart.load_state_dict(copy.deepcopy(self._workload.state_dict()))
        return apart

    def _again(self, workload: Workload, first: int, end: int) -> Iterator[Any]:
        """Training batches, each with the generators as its step had them."""
        for step in range(first, end):
            seeds.seed_all(seeds.mix(self._seed, step, seeds.STEP), self._device)
            yield workload.batch(step, self._seed)

    # -- what is kept of it --------------------------------------------------------------------------------

    def state_bytes(self) -> int:
        """Memory that the averages take."""
        tensors = [t for average in self._averages.values() for t in average.state_dict().values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def state_dict(self) -> dict[str, Any]:
        """The averages, for a checkpoint."""
        return {name: average.state_dict() for name, average in self._averages.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        for name, average in self._averages.items():
            average.load_state_dict(state[name])
