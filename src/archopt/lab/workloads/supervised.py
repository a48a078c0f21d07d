"""What workloads share that learn targets from inputs, both held in memory as tensors."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

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
    """The share of rows whose largest logit is the target's, 0-d float32."""
    return (logits.argmax(1) == targets).float().mean()


def check_positive(workload: Workload, *names: str) -> None:
    """Raises ValueError where one of these options is not above 0."""
    for name in names:
        if not getattr(workload, name) > 0:
            raise ValueError(f"{name}={getattr(workload, name)!r}, expected a value above 0")


@dataclass
class Supervised(Workload):
    """Classification of rows held in memory; override `loss` and `evaluate` for another task.

    A subclass calls `hold` in its `load` and defines `build`. Every epoch visits all training rows once, in
    the order of `epoch_order`; its last batch is shorter where `batch_size` does not divide the rows.

    `loss` gives the batch's accuracy beside the loss, so a record holds the running training accuracy too:
    each batch scored before its update, averaged over the steps between evaluations.
    """

    epochs: int = 20
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_positive(self, "epochs", "batch_size")

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
    def steps_per_epoch(self) -> int:
        return -(-len(self.train_inputs) // self.batch_size)

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def eval_every(self) -> int:
        return self.steps_per_epoch

    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor]:
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != (seed, epoch):
            order = epoch_order(len(self.train_inputs), seed, epoch).to(self.train_inputs.device)
            self._order = (seed, epoch), order
        rows = self._order[1][index * self.batch_size : (index + 1) * self.batch_size]
        return self.train_inputs.index_select(0, rows), self.train_targets.index_select(0, rows)

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        inputs, targets = batch
        logits = model(inputs)
        return F.cross_entropy(logits, targets), {"accuracy": accuracy(logits, targets)}

    def evaluate(self, models: dict[str, nn.Module]) -> dict[str, float]:
        """Mean cross-entropy and accuracy over the whole test set: `test_loss`, `test_accuracy`.

        Where logits are not finite neither is the accuracy: the largest of them would mean nothing.
        """
        model = models["model"]
        loss, correct = torch.zeros(()), torch.zeros(())
        for inputs, targets in zip(
            torch.split(self.test_inputs, EVALUATION_ROWS), torch.split(self.test_targets, EVALUATION_ROWS)
        ):
            logits = model(inputs).float()
            loss = loss + F.cross_entropy(logits, targets, reduction="sum").cpu()
            correct = correct + (logits.argmax(1) == targets).sum().cpu()
        mean_loss = float(loss) / len(self.test_targets)
        share = float(correct) / len(self.test_targets)
        return {"test_loss": mean_loss, "test_accuracy": share if math.isfinite(mean_loss) else math.nan}
