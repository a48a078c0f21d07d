"""What one process has of a run: usually all of it; where several train it together see `archopt.lab.distributed`.

Every process trains the same model with the same seeds. Of each batch it takes `part`, of the test set the batches
that `deal` gives it; `sum`, `any`, `all` and `first` bring together what the processes know, and must be called by
all of them in the same order.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from archopt.lab.record import RunFolder

T = TypeVar("T")


class Share:
    """The share of a process that trains alone."""

    rank = 0
    """Which of the processes this is; the first keeps the record."""
    size = 1
    """How many processes there are."""

    def count(self, rows: int) -> int:
        """How many of the rows of a batch are this process's: as many as the others', or one more."""
        return rows // self.size + (self.rank < rows % self.size)

    def part(self, rows: int) -> slice:
        """Which they are. A process without any takes the first row, whose `count` is 0, so as to go along."""
        first = rows // self.size * self.rank + min(self.rank, rows % self.size)
        count = self.count(rows)
        return slice(first, first + count) if count else slice(0, 1)

    def deal(self, batches: Sequence[T]) -> Sequence[T]:
        """This process's of some batches, dealt out in turn: none is lost, none is given twice."""
        return batches[self.rank :: self.size]

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Each number's sum over the processes, in float64."""
        return list(numbers)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Whether each flag is set in any of the processes."""
        return flags

    def all(self, value: T) -> list[T]:
        """What each process has, in order of their ranks."""
        return [value]

    def first(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process; it is called there alone."""
        return make()

    def agree(self, config: Mapping[str, Any], device: torch.device) -> None:
        """Raises LabError where the processes were not asked for the same run."""

    def folder(self, path: Path, config: Mapping[str, Any]) -> RunFolder:
        """The folder of the run, which the first process alone writes to."""
        return RunFolder(path, config)

    def place(self, device: torch.device) -> torch.device:
        """This process's device of the kind that was asked for."""
        return device

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as it is trained: with gradients that are means over the processes."""
        return model

    def same_buffers(self, models: Mapping[str, nn.Module]) -> None:
        """Gives all processes the first one's buffers (the running statistics of BatchNorm)."""

    def blame(self, error: Exception) -> Exception:
        """The cause of an error of a step: itself, or the end of another process."""
        return error


ALONE = Share()
