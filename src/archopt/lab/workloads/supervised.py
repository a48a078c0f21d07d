"""What workloads share that learn targets from inputs, both held in memory as tensors."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from archopt.lab.share import ALONE, Share
from archopt.lab.workload import Workload

EVALUATION_ROWS = 1000  # rows scored at once in `evaluate`; bounds its memory, does not change its result


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch visits `count` rows: a permutation that depends on (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_000 + epoch)  # distinct below a million epochs
    return torch.randperm(count, generator=generator)


def pixels(images: NDArray[np.uint8], white: float, mean: float, std: float) -> Tensor:
    """uint8 images as float32, white -> 1, then (x - mean) / std. Same shape."""
    return torch.from_numpy(images.astype(np.float32)).div_(white).sub_(mean).div_(std)


def labels(values: NDArray[np.uint8]) -> Tensor:
    """Class labels as torch's losses take them (int64)."""
    return torch.from_numpy(values.astype(np.int64))


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """The share of rows whose largest logit is the target's, 0-d float64."""
    return (logits.argmax(1) == targets).double().mean()


def by_rows(inputs: Tensor, targets: Tensor, share: Share = ALONE) -> Iterator[tuple[Tensor, Tensor]]:
    """A process's share of rows for `score`, as many at once as an evaluation takes."""
    return zip(*(share.deal(torch.split(part, EVALUATION_ROWS)) for part in (inputs, targets)))


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of all rows together, 0-d."""
    return F.cross_entropy(logits, targets, reduction="sum")


def score(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    ranks: Sequence[int] = (1,),
    summed: Callable[[Tensor, Tensor], Tensor] = summed_cross_entropy,
    share: Share = ALONE,
) -> tuple[float, list[float]]:
    """Mean loss over all rows and, for each k of `ranks`, the share with the target among the k largest.

    summed: the loss of some rows together, given logits and targets.
    share: whose rows these are; the means are over those of all processes.
    Where logits are not finite neither is a share: the largest of them would mean nothing.
    """
    scored, loss, correct = 0, torch.zeros(()), [torch.zeros(()) for _ in ranks]
    for inputs, targets in batches:
        logits = model(inputs).float()
        loss = loss + summed(logits, targets).cpu()
        for place, k in enumerate(ranks):
            correct[place] = correct[place] + among_largest(logits, targets, k).sum().cpu()
        scored += len(targets)
    rows, total, *counts = share.sum([scored, float(loss), *map(float, correct)])
    mean = total / rows
    return mean, [count / rows if math.isfinite(mean) else math.nan for count in counts]


def among_largest(logits: Tensor, targets: Tensor, k: int) -> Tensor:
    """Whether each row's target is among its k largest logits."""
    if k == 1:
        return logits.argmax(1) == targets
    largest = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (largest == targets.unsqueeze(1)).any(1)


def check_positive(workload: Workload, *names: str) -> None:
    """Raises ValueError where one of these options is not above 0."""
    for name in names:
        if not getattr(workload, name) > 0:
            raise ValueError(f"{name}={getattr(workload, name)!r}, expected a value above 0")


class HeldRows(Workload):
    """Batches of rows that are held in memory: every epoch visits all training rows once, in the order of
    `epoch_order`; its last batch is shorter where the rows of a batch do not divide them.

    A subclass calls `hold` in its `load` and defines `batch_rows`.
    """

    @property
    def batch_rows(self) -> int:
        """Rows of a training batch."""
        raise NotImplementedError(f"{type(self).__name__} must define batch_rows")

    def hold(self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> None:
        """Takes (inputs, targets) for training and for testing, rows along dimension 0.

        Raises ValueError where inputs and targets differ in number, or a part is empty.
        """
        for part, (inputs, targets) in (("training", train), ("test", test)):
            if not len(inputs) or len(inputs) != len(targets):
                raise ValueError(
                    f"{type(self).__name__}: {len(inputs)} {part} inputs and {len(targets)} targets; "
                    "expected equally many, and at least one"
                )
        self.train_inputs, self.train_targets = train
        self.test_inputs, self.test_targets = test
        self._order: tuple[tuple[int, int], Tensor] | None = None

    def to(self, device: torch.device) -> None:
        self.hold(
            (self.train_inputs.to(device), self.train_targets.to(device)),
            (self.test_inputs.to(device), self.test_targets.to(device)),
        )

    @property
    def pass_steps(self) -> int:
        """Steps of a pass over the rows that are held."""
        return -(-len(self.train_inputs) // self.batch_rows)

    @property
    def steps_per_epoch(self) -> int:
        """A pass; of published length, where a workload keeps that however few rows are held."""
        return self.pass_steps

    def rows_of_step(self, step: int) -> int:
        """Rows of the batch of a step, of all processes together."""
        before = step % self.pass_steps * self.batch_rows
        return min(self.batch_rows, len(self.train_inputs) - before)

    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor]:
        """This process's part of the batch."""
        epoch, index = divmod(step, self.pass_steps)
        if self._order is None or self._order[0] != (seed, epoch):
            order = epoch_order(len(self.train_inputs), seed, epoch).to(self.train_inputs.device)
            self._order = (seed, epoch), order
        rows = self._order[1][index * self.batch_rows : (index + 1) * self.batch_rows]
        rows = rows[self.share.part(self.rows_of_step(step))]
        return self.train_inputs.index_select(0, rows), self.train_targets.index_select(0, rows)


@dataclass
class Supervised(HeldRows):
    """Classification of rows held in memory; override `loss` and `evaluate` for another task.

    A subclass calls `hold` in its `load` and defines `build`.

    `loss` gives the batch's accuracy beside the loss, so a record holds the running training accuracy too:
    each batch scored before its update, averaged over the steps between evaluations.
    """

    epochs: int = 20
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_positive(self, "epochs", "batch_size")

    @property
    def batch_rows(self) -> int:
        return self.batch_size

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def eval_every(self) -> int:
        return self.steps_per_epoch

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        inputs, targets = batch
        logits = model(inputs)
        return F.cross_entropy(logits, targets), {"accuracy": accuracy(logits, targets)}

    def evaluate(self, models: dict[str, nn.Module]) -> dict[str, float]:
        """Mean cross-entropy and accuracy over the whole test set: `test_loss`, `test_accuracy`."""
        batches = by_rows(self.test_inputs, self.test_targets, self.share)
        loss, (right,) = score(models["model"], batches, share=self.share)
        return {"test_loss": loss, "test_accuracy": right}
