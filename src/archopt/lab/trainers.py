"""Which optimiser trains which of a workload's models, at which rate, with which published settings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from archopt.lab.errors import LabError
from archopt.lab.optimizers import Choice, parse_optimizer
from archopt.lab.workload import Workload


@dataclass(frozen=True)
class Trainer:
    """An optimiser at a rate, and the published settings that lie below the options it was asked for with."""

    choice: Choice
    lr: float | None
    settings: Mapping[str, Mapping[str, Any]]

    def build(self, model: nn.Module) -> Optimizer:
        """The optimiser for a model. Raises LabError, with the rule's words, where it refuses."""
        return self.choice.build(model, self.lr, self.settings)

    def record(self) -> dict[str, Any]:
        """What `config.json` says of it."""
        entry = self.choice.entry
        told: dict[str, Any] = {"label": self.choice.label, "name": entry.name, "lr": self.lr}
        told["options"] = self.choice.resolved(self.settings)
        return told if entry.source is None else {**told, "source": entry.source}


def trainer_of(workload: Workload, model: str, choice: Choice, lr: float | None) -> Trainer:
    """What trains a model of the workload: the run's optimiser, or the one that the workload has for it.

    That one's rate is the one in its brackets, else the published one, else its default. Raises LabError where it
    cannot be read or has no single rate.
    """
    settings = {name: dict(options) for name, options in workload.published.items()}
    for name, options in workload.model_settings.get(model, {}).items():
        settings.setdefault(name, {}).update(options)
    own = workload.own_optimizers().get(model)
    if own is None:
        return Trainer(choice, lr, settings)
    choice = parse_optimizer(own)
    if not choice.entry.rate:
        return Trainer(choice, None, settings)
    lr = choice.published_lr(settings) or choice.default_lr
    if lr is None or len(choice.own_lrs) > 1:
        wanted = f"{choice.entry.name}(lr=...)"
        raise LabError(f"{workload.name}: {own} for the {model}: one learning rate is needed, {wanted}")
    return Trainer(choice, lr, settings)


def packages(workload: Workload, choice: Choice) -> list[str]:
    """The other projects' packages that the optimisers of a run come from."""
    choices = [choice, *map(parse_optimizer, workload.own_optimizers().values())]
    return sorted({choice.entry.package for choice in choices if choice.entry.package is not None})


def trainers_record(workload: Workload, choice: Choice, lr: float | None) -> dict[str, Any]:
    """The run's optimiser for `config.json`; under `models`, those models that are trained in another way."""
    told = Trainer(choice, lr, workload.published).record()
    named = sorted({*workload.model_settings, *workload.own_optimizers()})
    others = {model: trainer_of(workload, model, choice, lr).record() for model in named}
    differing = {model: other for model, other in others.items() if other != told}
    return {**told, "models": differing} if differing else told
