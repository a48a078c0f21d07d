"""The protocol of an experiment. One subclass in one file says all of it: data, model, loss, schedule, metric.

The laboratory owns the loop, the seeds, the records and the checkpoints. A workload is a dataclass: its fields
are its options (`--width 256` on the command line), `presets` are named sets of them. Everything random is drawn
from what the laboratory hands in: `build` runs right after the global generators (torch's, numpy's, Python's) were
seeded with the run's seed, step k right after they were seeded with (seed, k), `evaluate` after a seed of its own.
So every optimiser sees the same initial weights, the same batches and the same dropout, measuring changes nothing,
and a run that was killed goes on with the same bits.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from archopt.lab.data import DataFolder
from archopt.lab.share import ALONE

Models = nn.Module | dict[str, nn.Module]


@dataclass(frozen=True)
class Metric:
    """What a workload is judged by, and how to read it.

    `key` is one of `evaluate`'s, or `train_` and one of `train_step`'s numbers: its mean since the last evaluation.
    """

    key: str
    name: str
    higher_is_better: bool
    unit: str = ""  # "%" shows a fraction as a percentage


JOINED_LATER = {"joined_later": True}
"""Metadata of a field that a workload got after runs of it had been stored.

At its default it stays out of the record, so that those runs keep their identity.
"""


class Training(Protocol):
    """What `train_step` may use of a run: its models, one optimiser for each, and the run's seed."""

    models: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    seed: int
    clip_norm: float | None
    """Gradients are clipped to this norm in `update`; None leaves them."""

    def batch(self, step: int) -> Any:
        """The workload's batch of this step; the time it takes is not counted as forward and backward."""

    def apart(self) -> AbstractContextManager[None]:
        """While it lasts, time is not counted as forward and backward: for what a step does beside them."""

    def update(self, name: str, loss: Tensor) -> None:
        """Backward of `loss`, clipping where the workload asks for it, the named model's step, gradients freed."""


@dataclass
class Workload:
    """One experiment. Subclass as a dataclass; see `examples/my_workload.py` for a whole one in 40 lines."""

    name: ClassVar[str]
    """How the command line calls it."""
    summary: ClassVar[str]
    """One line for `archopt list`."""
    metric: ClassVar[Metric]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "small": {}, "smoke": {}}
    """Values of the fields by preset; fields that a preset leaves out keep their defaults."""
    settings: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Published settings by optimiser name: `lr`, options that differ from the laboratory's, and `clip_norm` where
    the experiment clips the gradients of this optimiser to another norm than those of all."""
    model_settings: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {}
    """Where there are several models: the settings of one, by its name, in which it differs from `settings`."""
    lrs: ClassVar[tuple[float, ...]] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    """The grid that `--lrs grid` tries."""
    default_optimizer: ClassVar[str] = "nero"
    """What `archopt train` takes where none is asked for: the published one, where the experiment is one rule's."""
    default_preset: ClassVar[str] = "small"
    """What `archopt train` takes where none is asked for."""
    divisible: ClassVar[bool] = False
    """Whether several processes can train it together (`--distribute`): a batch is rows that depend on (seed, step)
    alone, of which `batch` gives those in `share.part`; its loss is a mean over rows; and `evaluate` brings
    together with `share.sum` what each process found for the rows that `share.deal` gave it."""
    clip_norm: ClassVar[float | None] = None
    """Norm that gradients are clipped to, where the published experiment does so; `--clip-norm` overrides it."""

    share = ALONE
    """What this process has of a run; all of it, but for workloads that are divisible."""

    @property
    def published(self) -> Mapping[str, Mapping[str, Any]]:
        """`settings` under the options of this experiment, where they depend on them."""
        return self.settings

    def load(self, data: DataFolder) -> None:
        """Reads the data into memory. Raises `DataError` with the one command or file that is needed."""

    def build(self) -> Models:
        """The model, or several by name (each gets its own optimiser). Called once, after `load`."""
        raise NotImplementedError(f"{type(self).__name__} must define build()")

    def own_optimizers(self) -> Mapping[str, str]:
        """Models, by name, that another optimiser than the run's trains, spelt as on the command line."""
        return {}

    @property
    def steps(self) -> int:
        """Optimiser steps of a whole run."""
        raise NotImplementedError(f"{type(self).__name__} must define steps")

    @property
    def eval_every(self) -> int:
        """Steps between evaluations (an epoch, usually). The last step is always evaluated."""
        raise NotImplementedError(f"{type(self).__name__} must define eval_every")

    @property
    def steps_per_epoch(self) -> float:
        """Steps in one pass over the data, for the axes of pictures."""
        return self.eval_every

    @property
    def data_note(self) -> str:
        """Where the data at hand are less than the published set, what there is, in a few words for titles."""
        return ""

    @property
    def unheeded(self) -> frozenset[str]:
        """Options that mean nothing under the others, so that pages need not tell how they differ."""
        return frozenset()

    @property
    def updates_every(self) -> int:
        """Steps between measurements of the relative update, which cost a copy of the weights each; 0: none."""
        return 0

    def schedule(self, step: int) -> float:
        """Multiplier of the learning rate at a step, counted from 0. Not applied to rules without a rate."""
        return 1.0

    def batch(self, step: int, seed: int) -> Any:
        """The training batch of a step: a function of (seed, step) alone."""
        raise NotImplementedError(f"{type(self).__name__} must define batch()")

    def rows_of_step(self, step: int) -> int:
        """Rows of the batch of a step, of all processes together. For workloads that are divisible."""
        raise NotImplementedError(f"{type(self).__name__} must define rows_of_step(), or not be divisible")

    def weight(self, step: int) -> float:
        """What the batch of a step counts in the means of a record: its rows, where those are to be exact over
        batches of different size. Here all batches count alike."""
        return 1.0

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of a batch, and further 0-d numbers (accuracy, ...) to average between evaluations."""
        raise NotImplementedError(f"{type(self).__name__} must define loss()")

    def train_step(self, training: Training, step: int) -> dict[str, Tensor]:
        """One optimiser step; returns detached 0-d numbers, "loss" among them. GANs and PPO override this."""
        loss, extra = self.loss(training.models["model"], training.batch(step))
        training.update("model", loss)
        return {"loss": loss.detach(), **{key: value.detach() for key, value in extra.items()}}

    def evaluate(self, models: dict[str, nn.Module]) -> dict[str, float]:
        """Metrics by key. Called in eval mode, without gradients, after seeding of its own."""
        raise NotImplementedError(f"{type(self).__name__} must define evaluate()")

    def pictures(self, models: dict[str, nn.Module]) -> Mapping[str, Tensor]:
        """Pictures (3, h, w), uint8, or films (frames, 3, h, w), by name, for the run's folder; called after
        `evaluate`, in the same way."""
        return {}

    def to(self, device: torch.device) -> None:
        """Moves what `load` read to the device."""

    def state_dict(self) -> dict[str, Any]:
        """State of the workload's own that a resumed run needs (environments, replay); usually none.

        Tensors, numbers, strings, and lists and dicts of them.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
